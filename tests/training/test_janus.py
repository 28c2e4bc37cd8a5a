"""A folder goes in, VA-π runs, a folder comes out: a tiny Janus on drawn scenes."""

import json
import re

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.helpers.janus import transformers_janus, write_tokenizer
from vapi_jax.generation.loading import load_generator
from vapi_jax.methods.resolve import resolve
from vapi_jax.models import sampling
from vapi_jax.models.janus_folder import convert_janus
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training.export_janus import export_adapters, export_janus
from vapi_jax.training.run import run
from vapi_jax.weights.store import load_safetensors

PROMPTS = ["a photo of a red circle", "a ring"]
SIDE = 32  # scenes are no smaller


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus")
    transformers_janus(levels=4).save_pretrained(folder / "published")
    write_tokenizer(folder / "published")
    convert_janus(folder / "published", folder / "converted", understanding=True)
    return folder / "converted"


def recipe(converted, policy_more=(), **changes):
    """VA-π on scenes, from a converted directory."""
    told = json.loads((converted / "config.json").read_text())
    policy, tokenizer = ({k: v for k, v in told[p].items() if k != "name"} for p in ("gpt", "vq"))
    prompt = {"tokenizer": str(converted), "lengths": (128,)}
    return resolve({
        "name": "janus", "method": "vapi", "batch_size": 8, "cpu_devices": 8,
        "mesh": {"data": 2, "fsdp": 4}, "rewards": ("mse",), "vapi": {"group_size": 3},
        "data": {"name": "scenes", "flip": False, "image_size": SIDE, "num_threads": 0},
        "policy": {**policy, "kind": "janus", **dict(policy_more)}, "tokenizer": tokenizer,
        "condition": {"name": "prompt", "options": prompt},
        "init": {"gpt": str(converted), "vq": str(converted)},
        "optimizer": {"learning_rate": 1e-3}, "eval": {"every": 4, "images": 8, "grid_classes": 2},
        **changes,
    })  # fmt: skip


@pytest.mark.slow
def test_a_folder_goes_in_and_a_trained_one_comes_out(converted, tmp_path, capsys):
    """Taken up bit for bit; transformers loads what comes out, and draws the same tokens from it."""
    from transformers import JanusForConditionalGeneration

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(recipe(converted, steps=4, checkpoint={"every": 0}), whole)
    told = capsys.readouterr()
    assert "gen_head" in told.out + told.err and "lm_head" in told.out + told.err
    run(recipe(converted, steps=2), parts)
    run(recipe(converted, steps=4), parts)
    one, other = (load_safetensors(d / "weights" / "policy.safetensors") for d in (whole, parts))
    jax.tree.map(np.testing.assert_array_equal, one, other)

    generator = load_generator(str(parts), make_mesh())
    assert generator.sample(PROMPTS, per_condition=2, cfg=5.0).shape == (4, SIDE, SIDE, 3)
    prompt = generator.condition.prepare(np.array(PROMPTS))
    ours = sampling.generate(
        generator.policy, generator.params, prompt, jax.random.key(0), greedy=True, cfg_scale=5.0
    )
    done = export_janus(parts, tmp_path / "out")
    assert done.complete and done.unchanged.float32 < done.unchanged.weights / 2
    theirs, found = JanusForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(found.values()), found
    np.testing.assert_array_equal(ours, their_greedy_tokens(theirs, generator, prompt))


def their_greedy_tokens(theirs, generator, prompt):
    from transformers import GenerationConfig

    bos, boi = (int(prompt["tokens"][0, prompt["mask"][0]][place]) for place in (0, -1))
    settings = GenerationConfig(
        bos_token_id=bos, pad_token_id=generator.policy.config.pad_id, do_sample=False,
        guidance_scale=5.0, generation_kwargs={"boi_token_id": boi},
    )  # fmt: skip
    return theirs.eval().generate(
        torch.tensor(prompt["tokens"], dtype=torch.long),
        attention_mask=torch.tensor(prompt["mask"], dtype=torch.long),
        generation_mode="image", generation_config=settings,
    ).numpy()  # fmt: skip


@pytest.mark.slow
def test_adapters_are_trained_and_come_out_merged(converted, tmp_path, capsys):
    from transformers import JanusForConditionalGeneration

    lora, workdir = {"lora": {"rank": 2, "alpha": 64.0}}, tmp_path / "run"
    run(recipe(converted, steps=1, policy_more=lora), workdir)
    summary = run(recipe(converted, steps=2, policy_more=lora), workdir)
    told = capsys.readouterr()
    assert "adapters of rank 2" in told.out + told.err
    assert summary["reward"]["first"] != summary["reward"]["last"]
    assert list(summary["weights"]) == ["lora.safetensors"]
    generator = load_generator(str(workdir), make_mesh())
    assert generator.policy.config.lora is None
    prompt = generator.condition.prepare(np.array(PROMPTS))
    ours = sampling.generate(
        generator.policy, generator.params, prompt, jax.random.key(0), greedy=True, cfg_scale=5.0
    )
    done = export_janus(workdir, tmp_path / "out")
    kernels = sum(
        leaf.size for leaf in jax.tree.leaves(generator.params["layers"]) if leaf.ndim == 3
    )
    assert done.unchanged.weights - done.unchanged.float32 > 0.9 * kernels
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(ours, their_greedy_tokens(theirs, generator, prompt))
    again = export_janus(workdir, tmp_path / "again", step=2)
    assert again.digests == done.digests

    export_adapters(workdir, tmp_path / "apart")
    settings = json.loads((tmp_path / "apart" / "adapter_config.json").read_text())
    adapters = load_file(tmp_path / "apart" / "adapter_model.safetensors")
    begun = transformers_janus(levels=4)
    for name, module in begun.named_modules():
        targeted = bool(re.fullmatch(settings["target_modules"], name))
        assert targeted == (f"base_model.model.{name}.lora_A.weight" in adapters), name
        if targeted:  # as PEFT computes it
            a, b = (adapters.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
            change = settings["lora_alpha"] / settings["r"] * (b @ a)
            merged = module.weight.detach().numpy() + change
            np.testing.assert_allclose(
                theirs.get_submodule(name).weight.detach(), merged, atol=1e-6
            )
    assert not adapters
