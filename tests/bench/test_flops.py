"""Model FLOPs against published counts, against XLA's cost analysis and against compiled steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.paths import CONFIGS
from tests.helpers.tiny import make_tiny_config
from vapi_jax.bench import setup
from vapi_jax.bench.flops import (
    StepFlops,
    decoder_flops,
    encoder_flops,
    lpips_flops,
    policy_flops,
    step_flops,
)
from vapi_jax.bench.hlo_flops import matmul_flops
from vapi_jax.common.recipes import load_recipe
from vapi_jax.methods.generator import sized_policy
from vapi_jax.methods.resolve import changed, resolve
from vapi_jax.models import lpips
from vapi_jax.models.policies import make_policy
from vapi_jax.models.vq import VQ_PRESETS, VQConfig, VQModel
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.rewards import RewardSpec
from vapi_jax.training import train

VQ16 = VQ_PRESETS["VQ-16"]


def recipe(kind, size, side):
    """128 images of 8 samples, and the generator; what the images are conditioned on is not read."""
    config = {
        "name": "counted",
        "method": "vapi",
        "batch_size": 128,
        "data": {"image_size": side},
        "policy": {"kind": "class", "size": size},
        "init": {"vq": "unread"},
    }
    return resolve(config), make_policy(kind, size=size, block_size=(side // 16) ** 2)


@pytest.fixture(scope="module")
def xxl():
    return recipe("class", "GPT-XXL", 384)


@pytest.fixture(scope="module")
def xl_text():
    return recipe("text", "GPT-XL", 256)


# --- published counts, in PFLOP a step or TFLOP an image ------------------------------------------


@pytest.mark.parametrize(
    ("count", "side", "tera"),
    [
        (functools.partial(encoder_flops, VQ16), 384, 0.313),
        (functools.partial(encoder_flops, VQ16), 256, 0.138),
        (functools.partial(decoder_flops, VQ16, repeated=True), 384, 0.570),
        (functools.partial(decoder_flops, VQ16, repeated=True), 256, 0.253),
        (functools.partial(decoder_flops, VQ16), 384, 0.510),
        (functools.partial(lpips_flops, "vgg"), 384, 0.090),
        (functools.partial(lpips_flops, "vgg"), 256, 0.040),
    ],
)
def test_networks_at_full_size(count, side, tera):
    assert count(side) / 1e12 == pytest.approx(tera, rel=0.01)


def test_a_sequence_of_the_released_generators(xxl, xl_text):
    assert policy_flops(xxl[1]).total / 1e12 == pytest.approx(1.69, rel=0.005)
    assert policy_flops(xl_text[1]).total / 1e12 == pytest.approx(0.59, rel=0.01)


# encode, sampling, decode, LPIPS, forward + backward, base
XXL_REFERENCE = (0.040, 0.217, 0.584, 0.185, 5.199, 1.733)
XXL_FUSED = (0.040, 0.0, 0.522, 0.104, 0.650, 0.0)


@pytest.mark.parametrize(
    ("way", "phases", "total"),
    [("reference", XXL_REFERENCE, 7.96), ("fused", XXL_FUSED, 1.32)],
)
def test_a_step_of_the_largest_recipe(xxl, way, phases, total):
    found = step_flops(*xxl, way)
    counted = (
        found.encode,
        found.sampling,
        found.decode,
        found.lpips,
        found.forward + found.backward,
        found.base,
    )
    assert [c / 1e15 for c in counted] == pytest.approx(phases, rel=0.01, abs=1e-9)
    assert found.model / 1e15 == pytest.approx(total, rel=0.005)


def test_a_step_of_the_text_recipe(xl_text):
    reference = step_flops(*xl_text, "reference")
    assert (reference.model - reference.base) / 1e15 == pytest.approx(2.25, rel=0.02)
    assert step_flops(*xl_text, "fused").model / 1e15 == pytest.approx(0.52, rel=0.01)


def test_the_plain_step_is_the_reference_without_its_waste(xxl):
    plain, reference = step_flops(*xxl, "plain"), step_flops(*xxl, "reference")
    assert plain.base == 0.0
    assert plain.lpips / reference.lpips == pytest.approx(9 / 16)
    assert plain.decode / reference.decode == pytest.approx(0.510 / 0.570, rel=0.003)
    same = ("encode", "sampling", "forward", "backward")
    assert all(getattr(plain, name) == getattr(reference, name) for name in same)


def test_the_configuration_says_which_way(xxl):
    config, policy = xxl
    assert step_flops(config, policy) == step_flops(config, policy, "fused")
    plain = step_flops(changed(config, fused=False, monitor_kl=True), policy)
    assert plain.base == 128 * policy_flops(policy).total
    assert plain.forward == 8 * 128 * policy_flops(policy).total


def test_what_a_recipe_leaves_out_costs_nothing(xxl):
    config, policy = xxl
    no_lpips = dataclasses.replace(config, rewards=(RewardSpec("mse"),))
    assert step_flops(no_lpips, policy).lpips == 0.0
    encoded = dataclasses.replace(config, data=dataclasses.replace(config.data, name="encoded"))
    assert step_flops(encoded, policy).encode == 0.0
    assert step_flops(encoded, policy).decode == step_flops(config, policy).decode


def test_the_policy_part_does_not_grow_with_the_group(xxl):
    config, policy = xxl
    wide = changed(config, group_size=32)
    small, large = step_flops(config, policy), step_flops(wide, policy)
    assert (small.forward, small.backward) == (large.forward, large.backward)
    assert large.decode == 4 * small.decode


def test_model_and_hardware_are_sums():
    found = StepFlops(1, 2, 4, 8, 16, 32, 64, 128)
    assert (found.model, found.hardware) == (127, 255)


def test_another_way_is_refused(xxl):
    with pytest.raises(ValueError, match="'fast'"):
        step_flops(*xxl, "fast")


def test_a_janus_prompt_needs_its_length():
    policy = make_policy("janus", dim=64, n_layer=2, n_head=4, hidden_dim=96, text_vocab_size=50,
                         vocab_size=32, num_tokens=16, pad_id=3)  # fmt: skip
    with pytest.raises(ValueError, match="prompt_length"):
        policy_flops(policy)


def test_a_recipe_says_how_long_a_prompt_of_janus_can_be():
    config = resolve(load_recipe(CONFIGS / "janus_pro_7b.py", "janus_pro_7b").get_config())
    policy = make_policy(**sized_policy(config))
    wanted = step_flops(config, policy, prompt_length=256)
    assert step_flops(config, policy) == wanted
    # Two for each weight and position, thrice for the gradient: the published 6.5 G and the prompt's share.
    least = 6 * 6.1e9 * (256 + 575) * config.batch_size
    assert least < wanted.model < 2 * least


# --- XLA's own count of programs without loops ----------------------------------------------------


def xla_flops(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.cost_analysis()["flops"], matmul_flops(compiled.as_text(), padding=False)


def shapes_of(function, *args):
    return jax.eval_shape(function, jax.random.key(0), *args)


SMALL_VQ = VQConfig(
    codebook_size=32, codebook_embed_dim=8, ch=64, encoder_ch_mult=(1, 2),
    decoder_ch_mult=(2, 1), num_res_blocks=1, z_channels=32,
)  # fmt: skip


def test_the_tokenizer_costs_what_xla_says():
    """XLA adds norms and activations; products and convolutions agree to the last multiplication."""
    model, image = VQModel(SMALL_VQ), jax.ShapeDtypeStruct((2, 24, 24, 3), jnp.float32)
    params = shapes_of(model.init, image)

    def encode(config):
        return functools.partial(VQModel(config).apply, method="encode_latents")

    xla, ours = xla_flops(encode(SMALL_VQ), params, image)
    search = 2.0 * 12**2 * 32 * 8
    want = 2 * (encoder_flops(SMALL_VQ, 24, padding=False) - search)
    assert ours.total == want
    assert xla == pytest.approx(want, rel=0.05)

    apart = dataclasses.replace(SMALL_VQ, encoder_patches=True)
    _, ours = xla_flops(encode(apart), params, image)
    # Over maps of one pixel XLA multiplies the padding as well.
    assert ours.total == pytest.approx(2 * (encoder_flops(apart, 24) - search), rel=1e-3)

    tokens = jax.ShapeDtypeStruct((2, 144), jnp.int32)
    table = jax.ShapeDtypeStruct((32, 32), jnp.float32)

    def decode(params, tokens, table):
        return model.apply(params, tokens, None, table, method="decode_tokens")

    xla, ours = xla_flops(decode, params, tokens, table)
    want = 2 * decoder_flops(SMALL_VQ, 24, padding=False)
    assert ours.total == want
    assert xla == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize(("net", "side"), [("vgg", 48), ("alex", 64)])
def test_perceptual_features_cost_what_xla_says(net, side):
    params = lpips.lpips_shapes(net)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    xla, ours = xla_flops(lambda p, x: lpips.backbone_features(p, x, net), params, image)
    want = lpips_flops(net, side, padding=False)
    assert xla == pytest.approx(want, rel=0.03)
    assert ours.total == pytest.approx(want, rel=0.03)


def generator(kind, **sizes):
    common = {"dim": 128, "n_layer": 1, "n_head": 4, "n_kv_head": 2, "vocab_size": 256}
    return make_policy(kind, **common, **sizes)


GENERATORS = [
    (generator("class", block_size=36, num_classes=10, multiple_of=32), 0),
    (generator("text", block_size=36, caption_dim=48, cls_token_num=7, multiple_of=32), 0),
    (
        generator("janus", num_tokens=36, hidden_dim=256, text_vocab_size=50, pad_id=3,
                  image_embed_dim=8, aligner_dim=40, gen_head_dim=72),
        2,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "prompt"), GENERATORS, ids=["class", "text", "janus"])
def test_a_forward_pass_costs_what_xla_says(policy, prompt):
    """One layer, so that no loop hides work from XLA's count."""
    batch = 3
    params = jax.eval_shape(policy.init, jax.random.key(0))
    condition = policy.example_condition(batch)
    context = jnp.zeros((batch, policy.context_length), jnp.int32)
    xla, ours = xla_flops(policy.logits, params, condition, context)
    want = batch * policy_flops(policy, prompt).total
    assert ours.total == pytest.approx(want, rel=1e-9)
    assert xla == pytest.approx(want, rel=0.1)


# --- whole steps ----------------------------------------------------------------------------------


PROJECTION = 2 * 16 * 4 * 8
"""The 16 codes to the decoder's width, once a step, is all that the count leaves out."""


def compiled_step(way, **changes):
    config = make_tiny_config("vapi", vapi={"fused": way == "fused", "group_size": 3}, **changes)
    one = setup.abstract(config, make_mesh(1, 1, jax.devices()[:1]))
    step = train.make_train_step(one.method, one.optimizer, one.shardings)
    found = matmul_flops(step.lower(one.state, one.frozen, one.batch).compile().as_text())
    return found, step_flops(one.method.config, one.method.policy)


@pytest.mark.parametrize("way", ["fused", "plain"])
def test_a_compiled_step_computes_what_is_counted(way):
    """With one block of logits nothing is computed twice, and the counts agree."""
    found, counted = compiled_step(way)
    assert found.exact
    assert found.uncounted == {}
    assert counted.recomputed == 0.0
    assert found.total == pytest.approx(counted.model, abs=PROJECTION)


def test_a_rematerialised_step_computes_what_is_counted_in_loops():
    found, counted = compiled_step("fused", microbatch_size=4, policy={"remat": "full"})
    assert counted.recomputed > 0.0
    assert found.total == pytest.approx(counted.hardware, abs=PROJECTION)
