"""Class-conditional recipes run from end to end in their tiny forms."""

import jax
import numpy as np
import pytest

from tests.helpers.recipes import (
    RUN,
    TEXT,
    assert_changed,
    assert_complete,
    load,
    tiny_runs,
)
from vapi_jax.common.trees import flatten
from vapi_jax.generation.loading import load_generator
from vapi_jax.methods.resolve import resolve
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training.run import run
from vapi_jax.weights.store import load_safetensors

pytestmark = pytest.mark.slow
ESTIMATE = {"mean", "sd", "n", "values"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    yield from tiny_runs(tmp_path_factory)


@pytest.mark.parametrize("name", [name for name in RUN if name not in TEXT])
def test_the_tiny_form_runs_from_end_to_end(name, finished):
    assert_complete(name, *finished(name))


@pytest.mark.parametrize("name", ["c2i_xxl", "c2i_demo"])
def test_a_post_training_run_tells_what_changed(name, finished):
    assert_changed(finished(name)[0])


def test_the_demo_compares(finished):
    summary, workdir = finished("c2i_demo")
    for key in ("frechet", "frechet_unseen"):
        found = summary[key]
        assert found["feature"]
        for row in ("before", "after", "floor"):
            assert found[row].keys() == ESTIMATE
            assert found[row]["mean"] > 0.0
            assert found[row]["sd"] >= 0.0
            assert found[row]["n"] == 2
    assert summary["frechet"]["feature"] != summary["frechet_unseen"]["feature"]
    assert "FID" not in summary["frechet"]["feature"].replace("not FID", "")
    kinds = [row["kind"] for row in summary["table"]]
    assert {"base", "temperature", "matched", "vapi", "floor", "real"} == set(kinds)
    for picture in ("samples_before", "samples_after", "reconstructions", "real"):
        assert (workdir / f"{picture}.png").stat().st_size > 0


def test_a_finished_run_asked_again_trains_no_further(finished):
    """The same command on a finished workdir goes on from its last checkpoint: nothing is left."""
    summary, workdir = finished("demo_base")
    again = run(resolve(load("demo_base", "tiny")), workdir)
    assert again["weights"] == summary["weights"]
    assert again["ce"] == summary["ce"]


def test_a_trained_decoder_is_sampled_with_the_generator_that_it_is_for(finished):
    _, workdir = finished("xxl_tokenizer_post")
    generator = load_generator(str(workdir), make_mesh(1, 1, jax.devices()[:1]))
    trained = load_safetensors(workdir / "weights" / "tokenizer.safetensors")
    demo = load_generator("demo", make_mesh(1, 1, jax.devices()[:1]))
    own, start = (flatten(g.frozen["tokenizer"]) for g in (generator, demo))
    for name, want in flatten(trained).items():
        np.testing.assert_array_equal(own[name], want)
        kept = name.startswith(("encoder/", "quant_conv/", "codebook/"))
        assert np.array_equal(own[name], start[name]) == kept, name
    for name, want in flatten(demo.params).items():
        np.testing.assert_array_equal(flatten(generator.params)[name], want)
