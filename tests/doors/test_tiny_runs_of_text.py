"""Text-conditional recipes run from end to end in their tiny forms."""

import jax
import pytest

from tests.helpers.recipes import TEXT, assert_changed, assert_complete, tiny_runs
from vapi_jax.data.scenes.grammar import TASKS
from vapi_jax.generation.loading import load_generator
from vapi_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    yield from tiny_runs(tmp_path_factory)


@pytest.mark.parametrize("name", TEXT)
def test_the_tiny_form_runs_from_end_to_end(name, finished):
    assert_complete(name, *finished(name))


@pytest.mark.parametrize("name", ["t2i_xl", "t2i_demo"])
def test_a_post_training_run_tells_what_changed(name, finished):
    assert_changed(finished(name)[0])


def test_the_text_demo_scores_scenes(finished):
    """Six scores in every row, with what guidance does to the base, and what changed, paired."""
    summary, workdir = finished("t2i_demo")
    tasks, scores = {*TASKS, "overall"}, summary["scenes"]
    kinds = [row["kind"] for row in summary["table"]]
    assert {"base", "guided", "matched", "vapi", "floor", "real"} <= set(kinds)
    for row in [*(row["scenes"] for row in summary["table"]), *scores["changes"].values()]:
        assert row.keys() == tasks
        assert all(-1 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in row.values())
    assert scores["changes"].keys() == {"base", "matched"}
    for task in tasks:
        change = scores["vapi"][task]["value"] - scores["base"][task]["value"]
        assert scores["changes"]["base"][task]["value"] == pytest.approx(change)
    real = next(row["scenes"] for row in summary["table"] if row["kind"] == "real")
    assert real["overall"]["value"] == 1.0
    assert "color attr" in (workdir / "report.html").read_text(encoding="utf-8")
    found = load_generator(str(workdir), make_mesh(1, 1, jax.devices()[:1]))
    assert found.condition.encoder == "scenes"  # so that it is sampled without naming one
    assert found.sample(["a photo of a red star"]).shape == (1, 32, 32, 3)
