"""Images with captions train, from every layout, and a run of them is taken up bit for bit."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers.image_text import FIELDS, LAYOUTS, pairs, png, write
from tests.helpers.tiny import make_tiny_method
from vapi_jax.methods.config import to_dict
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training.loop import fit
from vapi_jax.training.plan import check
from vapi_jax.training.run import run

POLICY = {"kind": "text", "cls_token_num": 6, "caption_dim": 16}
CONDITION = {"name": "tests.helpers.toys:Spelled", "options": {"length": 6, "width": 16}}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def captioned(mesh, root, layout, images=4, **changes):
    data = {
        "name": "image_text", "path": str(root), "flip": False, "folder_holdout": 0.5,
        "options": {"caption_field": FIELDS[layout]}, "num_threads": 1,
    }  # fmt: skip
    return make_tiny_method(
        "base", mesh, data=data, policy=POLICY, condition=CONDITION, batch_size=8,
        eval={"every": 1, "images": images}, **changes,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains(layout, mesh, tmp_path):
    root = write(layout, tmp_path / "data")
    steps = 4 if layout == "tar" else 2
    whole = captioned(mesh, root, layout, steps=steps, checkpoint={"every": 0})
    done = fit(whole, tmp_path / "whole")
    assert 0.0 < done.last["ce"] < 2 * np.log(16)
    if layout == "tar":  # killed and taken up
        fit(captioned(mesh, root, layout, steps=2), tmp_path / "parts")
        parts = fit(captioned(mesh, root, layout, steps=4), tmp_path / "parts")
        for a, b in zip(jax.tree.leaves(done.params), jax.tree.leaves(parts.params), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_plan_shows_captions_and_what_is_left_out(mesh, tmp_path, capsys):
    root = write("folder", tmp_path / "data", [*pairs(150), ("none", png(1), "")])
    assert check(to_dict(captioned(mesh, root, "folder", images=8).config)) == 0
    told = capsys.readouterr().out
    assert told.count("a caption: picture ") == 3
    assert "1 image(s) without a caption" in told


def test_what_wants_classes_is_refused(mesh, tmp_path, capsys):
    root = write("folder", tmp_path / "data", pairs(150))
    recipe = to_dict(captioned(mesh, root, "folder", images=8).config)
    recipe["eval"] |= {"sampled_every": 1, "sampled": 16}
    assert check(recipe) == 1
    assert "eval.sampled_every=1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_ends_with_samples_of_held_out_captions(mesh, tmp_path):
    root = write("folder", tmp_path / "data", pairs(150))
    config = captioned(mesh, root, "folder", images=8, steps=2).config
    shown = dataclasses.replace(config.eval, grid_classes=3, grid_per_class=2)
    summary = run(dataclasses.replace(config, eval=shown, cpu_devices=8), tmp_path / "run")
    names = summary["sample_classes"]
    assert len(names) == 6 and len(set(names)) == 3
    assert all(name.startswith("picture ") for name in names)
    assert (tmp_path / "run" / "samples.png").is_file()
