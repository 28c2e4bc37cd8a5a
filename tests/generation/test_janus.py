"""Images of a Janus for prompts: its own tokenizer, GenEval's folders, the same in every batch."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.helpers.janus import deepseek_tensors, write_deepseek
from vapi_jax import sample
from vapi_jax.generation.loading import load_generator
from vapi_jax.generation.prompts import request_prompts
from vapi_jax.generation.protocols import departures_from_geneval
from vapi_jax.models.janus_folder import convert_janus
from vapi_jax.parallel.sharding import make_mesh

PROMPTS = ["a cat", "red", "a red cat " * 9]


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus")
    convert_janus(
        write_deepseek(folder / "published", golden, deepseek_tensors(golden)), folder / "converted"
    )
    return folder / "converted"


def test_genevals_images_by_janus_own_protocol_are_the_same_in_every_batch(converted, tmp_path):
    metadata = tmp_path / "evaluation_metadata.jsonl"
    lines = [{"tag": "colors", "include": [], "prompt": prompt} for prompt in PROMPTS]
    metadata.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    flags = [f"--ckpt={converted}", "--protocol=geneval_janus", f"--prompts={metadata}", "--seed=3"]
    for batch, out in ((8, "one"), (5, "several")):
        assert sample.main([*flags, f"--batch={batch}", f"--out={tmp_path / out}"]) == 0
    recipe = json.loads((tmp_path / "one" / "recipe.json").read_text())
    assert recipe["sampling"]["cfg_scale"] == 5.0 and recipe["sampling"]["top_k"] == 0
    assert departures_from_geneval(recipe) is None
    assert "7.5" in departures_from_geneval({**recipe, "checkpoint": {}})
    assert recipe["captions"]["encoder"]["tokenizer"]
    images = {}
    for out in ("one", "several"):
        paths = sorted((tmp_path / out).glob("*/samples/*.png"))
        assert len(paths) == 12
        images[out] = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)
    assert np.abs(images["one"] - images["several"]).max() <= 1
    assert len(np.unique(images["one"].reshape(12, -1), axis=0)) == 12


def test_all_prompts_of_a_list_have_one_length(converted):
    generator = load_generator(str(converted), make_mesh())
    requests = request_prompts(generator, PROMPTS[0], 2, "flat", None)
    short = requests.of(np.arange(2))["tokens"]
    assert short.shape == (2, 32)
    (path := converted.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    requests = request_prompts(generator, path, 2, "flat", None)
    tokens, mask = (requests.of(np.arange(2))[name] for name in ("tokens", "mask"))
    assert tokens.shape == (2, 64)
    np.testing.assert_array_equal(tokens[mask], short[short != generator.condition.pad_id])
