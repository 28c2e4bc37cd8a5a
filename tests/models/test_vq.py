"""Properties of the tokenizer that hold for any weights."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.jaxprs import every_equation
from vapi_jax.common.trees import flatten
from vapi_jax.models import quantize, vq

CONFIG = vq.VQConfig(
    codebook_size=32,
    codebook_embed_dim=4,
    ch=8,
    encoder_ch_mult=(1, 2),
    decoder_ch_mult=(1, 2),
    num_res_blocks=1,
    z_channels=8,
    groupnorm_groups=4,
)
MODEL = vq.VQModel(CONFIG)
RUN = jax.jit(lambda params, images: MODEL.apply({"params": params}, images))


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1, maxval=1)


def random_params(model, images, seed=0):
    """Weights of the right size, drawn by numpy: compiling the initialisers takes far longer."""
    target = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape)
        match path[-1].key:
            case "scale":
                values = 1 + 0.1 * values
            case "bias":
                values = 0.1 * values
            case "kernel":
                values = values / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, target)


@pytest.fixture(scope="module")
def params(images):
    return random_params(MODEL, images)


@pytest.fixture(scope="module")
def output(params, images):
    return RUN(params, images)


def apply(params, x, method, model=MODEL):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(params, x)


def test_decoding_the_tokens_gives_the_reconstruction(params, images, output):
    tokens = apply(params, images, "encode")
    side = images.shape[1] // CONFIG.downsample_factor
    assert tokens.shape == (images.shape[0], side * side)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, output.indices)
    assert len(np.unique(tokens)) > 4, "the images must use several codes for this to say much"
    decoded = apply(params, tokens, "decode_tokens")
    assert_close(decoded, output.reconstruction, 5e-6)


def test_scaling_codes_or_latents_changes_nothing(params, images, output):
    scales = jax.random.uniform(jax.random.key(2), (CONFIG.codebook_size, 1), minval=0.1, maxval=9)
    scaled = params | {"codebook": {"embedding": params["codebook"]["embedding"] * scales}}
    scaled["quant_conv"] = jax.tree.map(lambda x: 3.0 * x, params["quant_conv"])
    got = RUN(scaled, images)
    np.testing.assert_array_equal(got.indices, output.indices)
    assert_close(got.reconstruction, output.reconstruction, 1e-5)
    assert_close(got.vq_loss, output.vq_loss, 3e-6)


def test_without_l2_norm_the_codes_are_taken_as_they_are(params, images):
    model = vq.VQModel(dataclasses.replace(CONFIG, codebook_l2_norm=False))
    stored = 0.3 * params["codebook"]["embedding"]
    raw = params | {"codebook": {"embedding": stored}}
    got = jax.jit(model.apply)({"params": raw}, images)
    z = np.asarray(got.z).reshape(-1, CONFIG.codebook_embed_dim)
    distances = np.square(z[:, None] - np.asarray(stored)[None]).sum(-1)
    np.testing.assert_array_equal(got.indices.reshape(-1), distances.argmin(-1))
    np.testing.assert_array_equal(
        got.quantized.reshape(-1, CONFIG.codebook_embed_dim), stored[got.indices.reshape(-1)]
    )
    assert_close(got.vq_loss, distances.min(-1).mean() / z.shape[1], 3e-6)


def test_each_loss_moves_only_its_side(params, images):
    """Eq. 33: the codebook term moves the codes, the commitment term the encoder."""

    @jax.jit
    def sides(params):
        def terms(params):
            out = MODEL.apply({"params": params}, images)
            return out.vq_loss, out.commit_loss

        def size(tree):
            return sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree))

        _, pull_back = jax.vjp(terms, params)
        gradients = pull_back((1.0, 0.0))[0], pull_back((0.0, 1.0))[0]
        return [[size(g[side]) for side in ("codebook", "encoder", "decoder")] for g in gradients]

    (codebook, encoder, decoder), (commit_codebook, commit_encoder, commit_decoder) = sides(params)
    assert codebook > 0 and encoder == 0 and decoder == 0
    assert commit_codebook == 0 and commit_encoder > 0 and commit_decoder == 0


def test_straight_through_gradient(params):
    """The gradient of the codes is that of the normalised latents, whatever the code."""
    latents = jax.random.normal(jax.random.key(3), (1, 2, 2, CONFIG.codebook_embed_dim))
    probe = jax.random.normal(jax.random.key(4), latents.shape)

    def through(z):
        return (MODEL.apply({"params": params}, z, method="from_latents").quantized * probe).sum()

    def straight(z):
        return (quantize.l2_normalize(z) * probe).sum()

    assert_close(jax.jit(jax.grad(through))(latents), jax.grad(straight)(latents), 2e-6)


def test_a_token_of_its_own_patch_knows_of_no_other(params, images, output):
    """`encoder_patches` takes the same weights, and without it every latent follows every pixel."""
    patches = vq.VQModel(dataclasses.replace(CONFIG, encoder_patches=True))
    changed = images.at[:, 2:4, 4:6].add(0.5)
    own = np.zeros((2, 4, 4), bool)
    own[:, 1, 2] = True
    for model, elsewhere in ((patches, False), (MODEL, True)):
        one, other = (apply(params, x, "encode_latents", model) for x in (images, changed))
        np.testing.assert_array_equal((one != other).any(-1), own | elsewhere)
    alone = apply(params, images[:, 2:4, 4:6], "encode_latents", MODEL)
    assert_close(alone[:, 0, 0], apply(params, images, "encode_latents", patches)[:, 1, 2], 3e-6)
    assert apply(params, images, "encode", patches).shape == output.indices.shape


def test_bfloat16_runs_and_is_close(params, images, output):
    dtypes = dict.fromkeys(("encoder_dtype", "decoder_dtype"), "bfloat16")
    model = vq.VQModel(dataclasses.replace(CONFIG, **dtypes))
    target = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(target)} == {jnp.dtype("float32")}
    decoded = apply(params, output.indices, "decode_tokens", model)
    assert decoded.dtype == jnp.float32
    assert_close(decoded, output.reconstruction, 0.05)
    assert np.abs(decoded - output.reconstruction).max() > 0, "computed in float32 after all"
    latents = apply(params, images, "encode_latents", model)
    assert latents.dtype == jnp.float32
    assert_close(latents, output.z, 0.05)


def test_the_encoder_asks_accelerators_for_float32(params, images):
    """Their default is one pass in bfloat16 or TF32, and other tokens."""

    def encode(params, images):
        return MODEL.apply({"params": params}, images, method="encode")

    jaxpr = jax.make_jaxpr(encode)(params, images).jaxpr
    products = ("conv_general_dilated", "dot_general")
    found = [e for e in every_equation(jaxpr) if e.primitive.name in products]
    assert {e.primitive.name for e in found} == set(products)  # convolutions; attention, search
    enough = {jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST}
    assert all(enough.issuperset(e.params["precision"] or (None,)) for e in found)


@pytest.mark.parametrize(
    ("name", "size", "grid", "millions"), [("VQ-16", 384, 24, 71.9), ("VQ-8", 256, 32, 70.1)]
)
def test_full_size_presets(name, size, grid, millions):
    config = vq.VQ_PRESETS[name]
    model = vq.VQModel(config)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    out, variables = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), image)
    assert config.downsample_factor == size // grid
    assert out.indices.shape == (1, grid * grid)
    assert out.z.shape == (1, grid, grid, config.codebook_embed_dim)
    assert out.reconstruction.shape == image.shape
    assert out.features.shape == (1, size, size, config.ch)
    shapes = {path: leaf.shape for path, leaf in flatten(variables["params"]).items()}
    for path in shapes:
        matches = [rule for rule in vq.NAME_RULES if re.fullmatch(rule.ours, path)]
        assert len(matches) == 1, f"{path} matches {matches}"
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert round(count / 1e6, 1) == millions


def test_codes_start_on_the_unit_sphere():
    codes = vq.Codebook(CONFIG).init(jax.random.key(0))["params"]["embedding"]
    assert codes.shape == (CONFIG.codebook_size, CONFIG.codebook_embed_dim)
    assert_close(jnp.linalg.norm(codes, axis=-1), 1.0, 1e-6)
    raw = vq.Codebook(dataclasses.replace(CONFIG, codebook_l2_norm=False))
    codes = raw.init(jax.random.key(0))["params"]["embedding"]
    assert 0.9 / CONFIG.codebook_size < float(jnp.abs(codes).max()) <= 1 / CONFIG.codebook_size


@pytest.mark.parametrize("block_size", [4, 5, 16])
def test_nearest_codes_in_blocks(block_size):
    """Blocks give the plain search; 5 does not divide the 16 codes and falls back to it."""
    latents = jax.random.normal(jax.random.key(5), (200, 3))
    codebook = jax.random.normal(jax.random.key(6), (16, 3))
    distances = np.square(np.asarray(latents)[:, None] - np.asarray(codebook)[None]).sum(-1)
    got = jax.jit(quantize.nearest_codes, static_argnums=2)(latents, codebook, block_size)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, distances.argmin(-1))


def test_the_smaller_index_wins_a_tie_across_blocks():
    codebook = jnp.tile(jnp.eye(3), (4, 1))
    np.testing.assert_array_equal(quantize.nearest_codes(jnp.eye(3), codebook, 3), [0, 1, 2])


def test_l2_normalize_has_a_finite_gradient_at_zero():
    zero = jnp.zeros(4)
    np.testing.assert_array_equal(quantize.l2_normalize(zero), zero)
    assert np.isfinite(jax.grad(lambda x: quantize.l2_normalize(x).sum())(zero)).all()


def test_entropy_loss_extremes():
    """Sure and even: -log K. Sure of one and the same code, or undecided: 0."""
    sure_and_even, same = 100.0 * jnp.eye(8), 100.0 * jnp.eye(8)[:1].repeat(8, 0)
    assert_close(quantize.entropy_loss(sure_and_even, 1.0), -np.log(8), 1e-3, scale=np.log(8))
    assert_close(quantize.entropy_loss(same, 1.0), 0.0, 1e-3, scale=np.log(8))
    assert_close(quantize.entropy_loss(jnp.zeros((8, 8)), 1.0), 0.0, 1e-3, scale=np.log(8))


def test_codebook_usage():
    assert quantize.codebook_usage(jnp.array([[0, 3], [3, 3]]), 8) == 0.25
    assert quantize.codebook_usage(jnp.arange(8), 8) == 1.0


def test_restart_dead_codes():
    codebook = jax.random.normal(jax.random.key(7), (6, 3))
    latents = 5.0 * jax.random.normal(jax.random.key(8), (9, 3))
    counts = jnp.array([4.0, 0.0, 0.5, 2.0, 0.0, 1.0])
    restart = jax.jit(quantize.restart_dead_codes)
    got = restart(jax.random.key(9), codebook, counts, latents)
    live = np.array([0, 3, 5])
    np.testing.assert_array_equal(got[live], codebook[live])
    unit = np.asarray(quantize.l2_normalize(latents))
    sources = [int(np.abs(unit - row).max(-1).argmin()) for row in np.asarray(got)[[1, 2, 4]]]
    assert_close(got[np.array([1, 2, 4])], unit[sources], 1e-6)
    assert len(set(sources)) == 3, "two dead codes landed on one latent"
    other = restart(jax.random.key(10), codebook, counts, latents)
    assert not np.array_equal(other, got), "the key is not used"
    # Fewer latents than codes: repetition is allowed, and nothing else changes.
    few = restart(jax.random.key(9), codebook, counts, latents[:2])
    np.testing.assert_array_equal(few[live], codebook[live])
    assert np.isfinite(few).all()


def test_wrong_sizes_are_named(params):
    with pytest.raises(ValueError, match="multiples of 2"):
        MODEL.apply({"params": params}, jnp.zeros((1, 7, 8, 3)), method="encode")
    with pytest.raises(ValueError, match="5 .*2 x 2"):
        MODEL.apply({"params": params}, jnp.zeros((1, 5), jnp.int32), method="lookup")
    entries = MODEL.apply({"params": params}, jnp.zeros((1, 6), jnp.int32), (2, 3), method="lookup")
    assert entries.shape == (1, 2, 3, CONFIG.codebook_embed_dim)
    with pytest.raises(ValueError, match="same length"):
        vq.VQConfig(encoder_ch_mult=(1, 2))
    with pytest.raises(ValueError, match="groups"):
        vq.VQConfig(ch=48)
    with pytest.raises(ValueError, match="float16"):
        vq.VQConfig(decoder_dtype="float16")


def test_decoding_from_projected_codes_is_decoding_from_codes(params):
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 32, (2, 16)), jnp.int32)

    def apply(*args, method):
        return jax.jit(lambda p: MODEL.apply({"params": p}, *args, method=method))(params)

    want = apply(apply(tokens, method="lookup"), method="decode")
    table = apply(method="projected_codes")
    assert table.shape == (32, 8)
    for more in ((), (None, table)):
        assert_close(apply(tokens, *more, method="decode_tokens"), want, 5e-6)
