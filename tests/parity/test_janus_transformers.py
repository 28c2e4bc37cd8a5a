"""Janus against PyTorch's, through a folder of transformers: logits, tokens, images and the way back."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from tests.helpers.compare import assert_close
from tests.helpers.janus import assert_holds, load, transformers_janus, write_tokenizer
from vapi_jax.models import sampling
from vapi_jax.models.conditions import Prompt
from vapi_jax.models.head import project
from vapi_jax.models.janus_folder import convert_janus
from vapi_jax.models.policies import make_policy
from vapi_jax.models.vq import VQModel
from vapi_jax.training.export_janus import export_janus
from vapi_jax.weights.tensors import open_tensors

CAPTIONS = ["a red circle left of a blue square", "", "two dogs"]
GUIDANCE = 5.0


@pytest.fixture(scope="module")
def theirs():
    return transformers_janus()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("transformers") / "published"
    theirs.save_pretrained(path, max_shard_size="100KB")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "janus"
    convert_janus(folder, out, understanding=True)
    return out


@torch.no_grad()
def their_numbers(model, prompt, context):
    """Of every image token after a prompt without padding, as the port's own sampler feeds them: what the
    last linear map sees, and logits."""
    words = model.get_input_embeddings()(torch.tensor(prompt))
    codes = model.prepare_embeddings_for_image_generation(torch.tensor(context))
    fed = torch.cat([words, codes], dim=1)
    hidden = model.model.language_model(inputs_embeds=fed).last_hidden_state
    hidden, head = hidden[:, words.shape[1] - 1 :], model.model.generation_head
    inner = head.activation_fn(head.proj_out(hidden))
    return inner.numpy()[0], head(hidden).numpy()[0]


def test_logits_with_and_without_a_caption_whatever_else_is_in_the_batch(theirs, converted):
    config, params = load(converted)
    policy = make_policy("janus", **dataclasses.asdict(config))
    condition = Prompt(pad_id=config.pad_id, vocab=config.text_vocab_size, tokenizer=str(converted))
    prompt = condition.prepare(np.array(CAPTIONS))
    without = condition.unconditional(prompt)
    rng = np.random.default_rng(0)
    context = rng.integers(0, config.vocab_size, (len(CAPTIONS), policy.context_length), np.int32)

    @jax.jit
    def forward(params, condition, context):
        hidden = policy.hidden(params, condition, context)
        return hidden, project(hidden, policy.head(params))

    (hidden, given), (_, dropped) = (forward(params, c, context) for c in (prompt, without))
    given, dropped = np.asarray(given), np.asarray(dropped)
    for row, mask in enumerate(prompt["mask"]):
        ids = prompt["tokens"][row : row + 1, mask].astype(np.int64)
        empty = ids.copy()
        empty[:, 1:-1] = config.pad_id
        rest = context[row : row + 1].astype(np.int64)
        seen, want = their_numbers(theirs, ids, rest)
        _, want_dropped = their_numbers(theirs, empty, rest)
        assert_close(hidden[row], seen, 2e-5)
        assert_close(given[row], want, 2e-5)
        assert_close(dropped[row], want_dropped, 2e-5)
        guided = want_dropped + GUIDANCE * (want - want_dropped)
        ours = dropped[row] + GUIDANCE * (given[row] - dropped[row])
        assert_close(ours, guided, 1e-4)
        assert np.abs(want - want_dropped).max() > 0.01
    right = dataclasses.replace(condition, side="right").prepare(np.array(CAPTIONS))
    assert right["mask"][1, 0] and not prompt["mask"][1, 0]
    assert_close(forward(params, right, context)[1], given, 2e-5)


@torch.no_grad()
def test_greedy_tokens_under_guidance_are_those_of_their_sampler(theirs, converted):
    from transformers import GenerationConfig

    config, params = load(converted)
    policy = make_policy("janus", **dataclasses.asdict(config))
    condition = Prompt(pad_id=config.pad_id, vocab=config.text_vocab_size, tokenizer=str(converted))
    prompt = condition.prepare(np.array(CAPTIONS))
    ours = sampling.generate(
        policy, params, prompt, jax.random.key(0), greedy=True, cfg_scale=GUIDANCE
    )
    bos, boi = (int(prompt["tokens"][0, prompt["mask"][0]][place]) for place in (0, -1))
    settings = GenerationConfig(
        bos_token_id=bos, pad_token_id=config.pad_id, do_sample=False, guidance_scale=GUIDANCE,
        generation_kwargs={"boi_token_id": boi},
    )  # fmt: skip
    tokens = theirs.generate(
        torch.tensor(prompt["tokens"], dtype=torch.long),
        attention_mask=torch.tensor(prompt["mask"], dtype=torch.long),
        generation_mode="image",
        generation_config=settings,
    )
    np.testing.assert_array_equal(ours, tokens.numpy())
    assert len(np.unique(tokens.numpy(), axis=0)) == len(CAPTIONS)


@torch.no_grad()
def test_the_tokenizer_inside_sees_and_shows_the_same(theirs, converted):
    """Latents, and images of tokens. The port's search for a code compares vectors of any length, where
    DeepSeek's and ours compare directions, so its tokens are no oracle."""
    config, params = load(converted, "vq")
    rng, model = np.random.default_rng(1), theirs.model.vqmodel
    images = rng.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    latents = model.quant_conv(model.encoder(torch.from_numpy(np.moveaxis(images, -1, 1).copy())))
    ours = jax.jit(lambda p, x: VQModel(config).apply({"params": p}, x, method="encode_latents"))
    assert_close(ours(params, images), np.moveaxis(latents.numpy(), 1, -1), 1e-5)
    tokens = rng.integers(0, config.codebook_size, (2, 16))
    shown = np.moveaxis(model.decode(torch.from_numpy(tokens)).numpy(), 1, -1)
    decode = jax.jit(lambda p, x: VQModel(config).apply({"params": p}, x, method="decode_tokens"))
    assert_close(decode(params, tokens), shown, 1e-5)


def test_the_folder_that_comes_out_loads_with_every_bit(theirs, folder, converted, tmp_path):
    from transformers import JanusForConditionalGeneration

    export_janus(converted, tmp_path / "again", shard_bytes=200_000)
    again, found = JanusForConditionalGeneration.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(found.values()), found
    state = again.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name
    with open_tensors(folder) as file:
        assert_holds(tmp_path / "again", {name: t.read() for name, t in file.tensors.items()})


def test_shards_of_pickles_are_the_same_model(theirs, folder, converted, tmp_path):
    theirs.save_pretrained(tmp_path / "bins", max_shard_size="100KB", safe_serialization=False)
    write_tokenizer(tmp_path / "bins")
    convert_janus(tmp_path / "bins", tmp_path / "converted", understanding=True)
    name = "model.safetensors"
    assert (tmp_path / "converted" / name).read_bytes() == (converted / name).read_bytes()
