"""The recipes that ship, and finished runs of their tiny forms."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.helpers import modes
from tests.helpers.paths import CONFIGS
from vapi_jax.methods.resolve import resolve
from vapi_jax.training.logging import read_history
from vapi_jax.training.run import run
from vapi_jax.weights.store import load_safetensors

RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py"))
# Tiny forms that another's run covers: they are the same (the 7B's, c2i_xl's), or the demo with a method that
# the XXL has as well, or run by launch/demo.sh in .ci/run.
OTHERS = {"janus_pro_7b", "c2i_xl", "demo_sft", "demo_ste", "demo_cca", "demo_tokenizer_post"}
OTHERS |= {"bench_cpu"}
RUN = [name for name in RECIPES if name not in OTHERS]
TEXT = [name for name in RUN if name.startswith(("t2i", "scenes", "janus"))]

SUMMARY = {"method", "name", "config", "devices", "versions", "steps", "seconds", "held_out"}


def load(name, variant=""):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def tiny_runs(tmp_path_factory):
    """For a fixture: name -> (summary, workdir) of a finished tiny run, each run once."""
    done = {}

    def finish(name):
        if name not in done:
            workdir = tmp_path_factory.mktemp(name)
            done[name] = (run(resolve(load(name, "tiny")), workdir), workdir)
        return done[name]

    with pytest.MonkeyPatch.context() as patch:  # where recipes keep what they make
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield finish


def assert_complete(name, summary, workdir):
    written = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(summary))
    assert written.keys() >= SUMMARY
    assert written["name"] == name
    assert written["directory"] == str(Path.cwd())
    assert written["config"]["steps"] == written["steps"] == resolve(load(name, "tiny")).steps
    assert written["devices"]["count"] == 8
    assert written["devices"]["mesh"]["data"] * written["devices"]["mesh"]["fsdp"] == 8
    assert written["versions"].keys() >= {"vapi_jax", "python", "jax", "flax", "optax", "grain"}
    assert 0.0 < written["seconds"]["train"] < written["seconds"]["total"]
    modes.assert_for_all(workdir)
    rows = read_history(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(written["steps"] + 1))
    assert list((workdir / "tensorboard").iterdir())
    for file, digest in written["weights"].items():
        assert len(digest) == 64
        assert load_safetensors(workdir / "weights" / file)
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert name in page
    assert "data:image/png;base64," in page
    assert not any(link in page for link in ('src="http', "src='http", "<link"))  # self-contained


def assert_changed(summary):
    for metric in ("reward", "ce", "entropy"):
        assert summary[metric].keys() >= {"first", "last"}
        assert summary[metric]["first"] != summary[metric]["last"]
    assert summary["reward"]["last"] < 0.0 < summary["ce"]["last"]
