"""LlamaGen's transformer: sizes, memory and precision choices, dropout."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.jaxprs import every_equation
from tests.helpers.policies import draw_weights
from vapi_jax.models.attention import attend, attention_implementation, causal_mask, pad_to_even
from vapi_jax.models.llama import LLAMA_SIZES, Llama, LlamaConfig
from vapi_jax.models.policies import make_policy, on_devices
from vapi_jax.models.transformer import head_matmul

TINY = {
    "dim": 32, "n_head": 4, "n_kv_head": 2, "n_layer": 3, "vocab_size": 11, "block_size": 9,
    "multiple_of": 16, "num_classes": 5,
}  # fmt: skip
KEY = jax.random.key(0)
LABELS = jnp.arange(4, dtype=jnp.int32)
CONTEXT = jnp.arange(32, dtype=jnp.int32).reshape(4, 8) % 11


@pytest.mark.parametrize(
    ("size", "millions", "tolerance"),
    [
        ("GPT-B", 111, 0.01),
        ("GPT-L", 343, 0.01),
        ("GPT-XL", 775, 0.01),
        ("GPT-XXL", 1400, 0.02),
        ("GPT-XXXL", 3900, 0.02),
        ("GPT-3B", 3100, 0.02),
    ],
)
def test_published_sizes(size, millions, tolerance):
    """The class-conditional models have the parameter counts of LlamaGen's table 1."""
    policy = make_policy("class", size=size)
    leaves = jax.tree.leaves(jax.eval_shape(policy.init, jax.random.key(0)))
    assert sum(leaf.size for leaf in leaves) == pytest.approx(millions * 1e6, rel=tolerance)


def test_every_size_is_a_valid_configuration():
    for size, fields in LLAMA_SIZES.items():
        config = LlamaConfig(**fields, block_size=576)
        assert config.hidden_dim % 256 == 0, size
        assert config.hidden_dim >= 8 * config.dim / 3 - 1, size


def test_grouped_heads_shrink_the_fused_projection():
    params = jax.eval_shape(make_policy("class", **TINY).init, jax.random.key(0))
    kernel = params["layers"]["attention"]["wqkv"]["kernel"]
    assert kernel.shape == (3, 32, (4 + 2 * 2) * 8)
    assert params["cls_embedding"]["embedding"].shape == (6, 32)


def test_grouped_heads_are_neighbours():
    """Query head h reads key head h // (H / KV): repeating each key head gives plain attention."""
    grouped, full = make_policy("class", **TINY), make_policy("class", **{**TINY, "n_kv_head": 4})
    params = draw_weights(jax.eval_shape(grouped.init, KEY), 0.3)
    attention = params["layers"]["attention"]
    q, k, v = jnp.split(attention["wqkv"]["kernel"], [32, 48], axis=-1)
    k, v = (jnp.repeat(x.reshape(3, 32, 2, 8), 2, axis=2).reshape(3, 32, 32) for x in (k, v))
    wide = {**attention, "wqkv": {"kernel": jnp.concatenate([q, k, v], axis=-1)}}
    wide = {**params, "layers": {**params["layers"], "attention": wide}}
    want = jax.jit(full.logits)(wide, LABELS, CONTEXT)
    got = jax.jit(grouped.logits)(params, LABELS, CONTEXT)
    assert_close(got, want, 3e-6)


def test_untrained_model_is_uniform():
    policy = make_policy("class", **TINY)
    params = jax.jit(policy.init)(jax.random.key(0))
    np.testing.assert_array_equal(jax.jit(policy.logits)(params, LABELS, CONTEXT), 0)
    spread = np.std(params["layers"]["feed_forward"]["w1"]["kernel"])
    assert spread == pytest.approx(0.02, rel=0.1)


def test_rematerialisation_changes_no_gradient():
    results, checkpoints = [], []
    for remat in ("none", "full", "dots"):
        policy = make_policy("class", **TINY, remat=remat)
        params = draw_weights(jax.eval_shape(policy.init, KEY), 0.3)

        def loss(params, policy=policy):
            return jnp.mean(jnp.sin(policy.logits(params, LABELS, CONTEXT)))

        gradient = jax.value_and_grad(loss)
        jaxpr = jax.make_jaxpr(gradient)(params).jaxpr
        names = {equation.primitive.name for equation in every_equation(jaxpr)}
        checkpoints.append(any("remat" in name or "checkpoint" in name for name in names))
        results.append(jax.jit(gradient)(params))
    assert checkpoints == [False, True, True]
    for other in results[1:]:
        assert_close(other, results[0], 3e-6)
    with pytest.raises(ValueError, match="remat"):
        jax.eval_shape(make_policy("class", **TINY, remat="some").init, jax.random.key(0))


def test_class_conditioning_builds_no_mask(monkeypatch):
    """The reference feeds [B, 1, S, S] masks; plainly causal attention needs none."""
    calls = []
    real = jax.nn.dot_product_attention

    def spy(*args, **options):
        calls.append((options["mask"], options["is_causal"]))
        return real(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    text = make_policy("text", **TINY, cls_token_num=4, caption_dim=6)
    for policy, condition in (
        (make_policy("class", **TINY), LABELS),
        (text, text.example_condition(4)),
    ):
        params = jax.eval_shape(policy.init, jax.random.key(0))
        calls.clear()
        jax.eval_shape(policy.logits, params, condition, CONTEXT)
        assert calls
        for mask, is_causal in calls:
            assert (mask is None) == is_causal == (policy is not text)
            assert mask is None or mask.shape == (4, 1, 12, 12)


def test_head_accumulates_in_float32_and_multiplies_in_bfloat16():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 5, 16))
    kernel = jax.random.normal(keys[1], (16, 7))
    cotangent = jax.random.normal(keys[2], (3, 5, 7))

    def gradients(function, x):
        return jax.vjp(function, x, kernel)[1](cotangent)

    for got, want in zip(gradients(head_matmul, x), gradients(jnp.matmul, x), strict=True):
        assert_close(got, want, 2e-6)
    coarse = x.astype(jnp.bfloat16)
    assert head_matmul(coarse, kernel).dtype == jnp.float32
    dx, dw = gradients(head_matmul, coarse)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    jaxpr = jax.make_jaxpr(lambda x: gradients(head_matmul, x))(coarse).jaxpr
    dots = [e for e in every_equation(jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) == 3  # forward, and backward for either operand
    assert all(operand.aval.dtype == jnp.bfloat16 for e in dots for operand in e.invars)


DEVICES = {  # attributes as JAX's devices have them: both vendors' GPUs are of one platform
    "H100": ("gpu", "NVIDIA H100 80GB HBM3", "9.0"),
    "A100": ("gpu", "NVIDIA A100-SXM4-80GB", "8.0"),
    "V100": ("gpu", "Tesla V100-SXM2-16GB", "7.0"),
    "B200": ("gpu", "NVIDIA B200", "10.0"),
    "MI300": ("gpu", "AMD Instinct MI300X", "gfx942"),
    "TPU": ("tpu", "TPU v5 lite", None),
    "CPU": ("cpu", "cpu", None),
}
DEVICES = {
    name: SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    for name, (platform, kind, capability) in DEVICES.items()
}
FUSED = {"H100", "A100", "B200"}


@pytest.mark.parametrize("name", DEVICES)
def test_attention_is_chosen_for_the_devices_that_a_program_is_for(name):
    device = DEVICES[name]
    fused = "cudnn" if name in FUSED else "xla"
    assert attention_implementation("auto", "bfloat16", 64, device) == fused
    alone = "splash" if name == "TPU" else fused
    assert attention_implementation("auto", "bfloat16", 64, device, alone=True) == alone
    assert attention_implementation("auto", "float32", 64, device, alone=True) == "xla"
    assert attention_implementation("auto", "float32", 64, device) == "xla"
    assert attention_implementation("auto", "bfloat16", 100, device) == "xla"  # 3200 / 32 heads
    assert attention_implementation("xla", "bfloat16", 64, device) == "xla"
    if name in FUSED:
        assert attention_implementation("cudnn", "bfloat16", 64, device) == "cudnn"
    else:
        with pytest.raises(ValueError, match=rf"8\.0.*{device.device_kind}"):
            attention_implementation("cudnn", "bfloat16", 64, device)


def test_a_policy_takes_the_attention_of_its_mesh():
    """Not of the default backend: a step can be compiled for devices that are not there."""
    policy = make_policy("class", **{**TINY, "dtype": "bfloat16"})
    assert policy.config.block.head_dim % 8 == 0
    for name, device in DEVICES.items():
        mesh = SimpleNamespace(devices=np.array([device, device], object))
        settled = on_devices(policy, mesh)
        assert settled.config.attention == ("cudnn" if name in FUSED else "xla")
        assert dataclasses.replace(settled.config, attention="auto") == policy.config
        one = SimpleNamespace(devices=np.array([device], object))
        assert on_devices(policy, one) == on_devices(policy, mesh, alone=True)
    # What is settled is not asked again of the CPU that traces.
    block = on_devices(policy, SimpleNamespace(devices=np.array([DEVICES["H100"]]))).config.block
    assert attention_implementation(block.attention, block.dtype, block.head_dim) == "cudnn"


def test_an_attention_that_does_not_exist():
    with pytest.raises(ValueError, match="attention"):
        attention_implementation("flash", "bfloat16", 64)
    with pytest.raises(ValueError, match="multiple of 8"):
        attention_implementation("cudnn", "bfloat16", 100)


def test_padding_to_even_lengths_changes_no_output():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 7, 4, 8))
    mask = causal_mask(jnp.array([[True, True, True], [False, False, True]]), 7)
    want = attend(q, k, v, mask, "xla")
    padded = pad_to_even(q, k, v, mask)
    assert [x.shape[1] for x in padded[:3]] == [8, 8, 8]
    assert padded[3].shape == (2, 1, 8, 8)
    got = attend(*padded, "xla")
    assert np.all(np.isfinite(got))
    assert_close(got[:, :7], want, 1e-6)
    assert pad_to_even(*padded)[0].shape == padded[0].shape


def test_dropout_is_drawn_per_key_and_off_without_one():
    dropouts = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0}
    for name in [*dropouts, "drop_path_rate"]:
        policy = make_policy("class", **TINY, **{**dropouts, name: 0.5})
        params = draw_weights(jax.eval_shape(policy.init, KEY), 0.3)
        run = jax.jit(lambda params, key, policy=policy: policy.logits(
            params, LABELS, CONTEXT, dropout_rng=key
        ))  # fmt: skip
        first, again, other = (run(params, jax.random.key(seed)) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 1e-2, name
        if name == "token_dropout_p":  # the others' programs without a key are the same one
            plain = jax.jit(policy.logits)(params, LABELS, CONTEXT)
            assert np.abs(first - plain).max() > 1e-2


def test_stochastic_depth_keeps_the_mean_and_spares_the_first_layer():
    """Rates rise linearly from 0; a surviving branch is divided by its survival probability."""
    config = LlamaConfig(**{**TINY, "n_layer": 2, "drop_path_rate": 0.5}, ffn_dropout_p=0.0,
                         token_dropout_p=0.0, resid_dropout_p=0.0)  # fmt: skip
    policy = make_policy("class", **dataclasses.asdict(config))
    params = draw_weights(jax.eval_shape(policy.init, KEY), 0.3)
    labels, context = jnp.zeros(2000, jnp.int32), jnp.zeros((2000, 1), jnp.int32)

    @jax.jit
    def hidden(params, key):
        _, state = Llama(config).apply(
            {"params": params}, labels, context, False, rngs={"dropout": key},
            mutable=["intermediates"],
        )  # fmt: skip
        return state["intermediates"]["layers"]["hidden"][0]

    first, second = np.asarray(hidden(params, jax.random.key(0)))
    np.testing.assert_array_equal(first, np.broadcast_to(first[:1], first.shape))
    outcomes, counts = np.unique(second.round(4), axis=0, return_counts=True)
    assert len(outcomes) == 4  # attention kept or not, feed-forward kept or not
    assert np.abs(counts / 2000 - 0.25).max() < 0.05  # five standard deviations


def test_attention_dropout_is_refused():
    policy = make_policy("class", **TINY, attn_dropout_p=0.1)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    assert jax.eval_shape(policy.logits, params, LABELS, CONTEXT).shape == (4, 9, 11)
    with pytest.raises(NotImplementedError, match="attn_dropout_p"):
        jax.eval_shape(
            lambda params, key: policy.logits(params, LABELS, CONTEXT, dropout_rng=key),
            params,
            jax.random.key(0),
        )
