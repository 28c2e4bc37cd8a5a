"""Free-running generation: the distribution, the filters, guidance, and independence of the batch."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.compilers import optimised
from tests.helpers.policies import draw_weights
from vapi_jax.bench import hlo
from vapi_jax.models import sampling
from vapi_jax.models.categorical import entropy
from vapi_jax.models.conditions import text_condition
from vapi_jax.models.policies import ClassPolicy, make_policy
from vapi_jax.models.sampling import filter_logits, generate, guidance_scales
from vapi_jax.parallel.sharding import batch_sharding, make_mesh, replicated

VOCAB, TOKENS = 7, 4
SMALL = {
    "dim": 16, "n_head": 2, "n_layer": 2, "vocab_size": VOCAB, "block_size": TOKENS,
    "multiple_of": 16, "num_classes": 5,
}  # fmt: skip
POLICY = make_policy("class", **SMALL)
LABELS = jnp.arange(6, dtype=jnp.int32) % 5
RNG = jax.random.key(7)


@pytest.fixture(scope="module")
def params():
    return draw_weights(jax.eval_shape(POLICY.init, RNG), 0.4)


@pytest.fixture(scope="module")
def plain(params):
    return generate(POLICY, params, LABELS, RNG, return_entropy=True)


def test_tokens_are_reproducible_and_in_range(params, plain):
    tokens, _ = plain
    assert (tokens.shape, tokens.dtype) == ((6, TOKENS), jnp.int32)
    assert np.all((np.asarray(tokens) >= 0) & (np.asarray(tokens) < VOCAB))
    again, _ = generate(POLICY, params, LABELS, RNG, return_entropy=True)
    np.testing.assert_array_equal(again, tokens)
    other, _ = generate(POLICY, params, LABELS, jax.random.key(8), return_entropy=True)
    assert np.any(np.asarray(other) != np.asarray(tokens))


def test_samples_do_not_depend_on_the_batch(params, plain):
    """Another batch size, another order: sample_ids say which sample is which."""
    rows = jnp.array([4, 1, 5])
    got = generate(POLICY, params, LABELS[rows], RNG, sample_ids=rows)
    np.testing.assert_array_equal(got, plain[0][rows])


def test_entropies_are_those_of_the_teacher_forced_distribution(params, plain):
    logits = jax.jit(POLICY.logits)(params, LABELS, plain[0][:, :-1])
    assert_close(plain[1], entropy(logits), 2e-6)


def test_filters_and_temperature_act_on_what_is_drawn(params):
    options = {"temperature": 0.7, "top_k": 4, "top_p": 0.8}
    tokens, spread = generate(POLICY, params, LABELS, RNG, return_entropy=True, **options)
    logits = jax.jit(POLICY.logits)(params, LABELS, tokens[:, :-1])
    kept = filter_logits(logits / 0.7, 4, 0.8)
    assert_close(spread, entropy(kept), 2e-6)
    chosen = np.take_along_axis(np.asarray(kept), np.asarray(tokens)[..., None], axis=-1)
    assert np.all(chosen > -np.inf)


def test_guidance_ends_with_its_interval(params):
    """Interval 0 guides tokens 0 and 1 (prefill and decoding step 0), later ones not."""
    scale = 3.0
    tokens, spread = generate(
        POLICY, params, LABELS, RNG, cfg_scale=scale, cfg_interval=0, return_entropy=True
    )
    forward = jax.jit(POLICY.logits)
    given = forward(params, LABELS, tokens[:, :-1])
    without = forward(params, POLICY.unconditional(LABELS), tokens[:, :-1])
    guided = without + scale * (given - without)
    want = jnp.concatenate([entropy(guided[:, :2]), entropy(given[:, 2:])], axis=1)
    assert_close(spread, want, 2e-6)
    assert np.abs(entropy(guided) - entropy(given)).max() > 1e-2


def test_greedy_takes_the_most_probable_token(params):
    tokens, spread = generate(POLICY, params, LABELS, RNG, greedy=True, return_entropy=True)
    logits = jax.jit(POLICY.logits)(params, LABELS, tokens[:, :-1])
    np.testing.assert_array_equal(tokens, jnp.argmax(logits, axis=-1))
    np.testing.assert_array_equal(spread, 0)


def test_joint_frequencies_are_the_models(params):
    """Pairs (token 0, token 1) against p(x0) p(x1 | x0), 20000 samples, all 49 pairs at once."""
    count = 20_000
    labels = jnp.full(count, 2, jnp.int32)
    tokens = np.asarray(generate(POLICY, params, labels, RNG))
    first = jnp.arange(VOCAB, dtype=jnp.int32)
    context = jnp.stack([first, first, first], axis=1)
    probs = jax.nn.softmax(jax.jit(POLICY.logits)(params, labels[:VOCAB], context), axis=-1)
    joint = np.asarray(probs[:1, 0].T * probs[:, 1])
    seen = np.zeros((VOCAB, VOCAB))
    np.add.at(seen, (tokens[:, 0], tokens[:, 1]), 1)
    expected = joint * count
    usual = expected > 5
    chi2 = np.sum((seen - expected)[usual] ** 2 / expected[usual])
    freedom = usual.sum() - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_filter_logits():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))

    def kept(**options):
        return (np.asarray(filter_logits(logits, **options)) > -np.inf)[0].tolist()

    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.35) == [True, False, False, False]  # always at least one
    assert kept(top_p=0.45) == [True, True, False, False]  # the one that crosses stays
    assert kept(top_k=3, top_p=0.6) == [True, True, False, False]
    tied = filter_logits(jnp.array([1.0, 2.0, 2.0, 0.0]), top_k=1)
    assert (np.asarray(tied) > -np.inf).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"cfg_interval": -2}, "cfg_interval"),
        ({"cfg_scale": float("nan")}, "cfg_scale nan"),
        ({"cfg_schedule": "linear"}, "'linear'.*constant, interval, cosine"),
        ({"cfg_schedule": "cosine", "cfg_power": 0.0}, "cfg_power"),
        ({"cfg_schedule": "constant", "cfg_interval": 3}, "cfg_interval.*'interval'"),
        ({"cfg_schedule": "interval", "cfg_power": 2.0}, "cfg_power.*'cosine'"),
    ],
)
def test_mistakes_are_named(params, options, match):
    with pytest.raises(ValueError, match=match):
        generate(POLICY, params, LABELS, RNG, **options)


@pytest.mark.parametrize(
    ("schedule", "options", "want"),
    [
        ("constant", {}, [3, 3, 3, 3]),
        ("interval", {}, [3, 3, 3, 3]),
        ("interval", {"interval": 0}, [3, 3, 1, 1]),
        ("interval", {"interval": 1}, [3, 3, 3, 1]),
        ("cosine", {}, [1, 1.29289322, 2, 2.70710678]),
        ("cosine", {"power": 2.0}, [1, 1.01921472, 1.29289322, 2.19509032]),
        ("cosine", {"power": 0.5}, [1, 2, 2.60569986, 2.91272530]),
    ],
)
def test_guidance_scales_are_these(schedule, options, want):
    """s = 3 over four tokens; the cosine by hand from 1 + (3 - 1)(1 - cos(pi (t/4)^power)) / 2."""
    got = guidance_scales(schedule, 3.0, 4, **options)
    assert got.dtype == np.float32
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("power", [0.7, 1.0, 2.75])
def test_the_cosine_rises_from_none_to_nearly_all_guidance(power):
    scales = guidance_scales("cosine", 4.0, 576, power=power)
    assert scales[0] == 1.0
    assert np.all(np.diff(scales) >= 0)
    assert 3.999 < scales[-1] < 4.0
    np.testing.assert_array_equal(guidance_scales("cosine", 1.0, 576, power=power), 1.0)


@pytest.mark.parametrize(
    ("steps", "want"),
    [(0, [0]), (31, [31]), (35, [17, 35]), (63, [21, 42, 63]), (575, [143, 287, 431, 575]),
     (4095, [1023, 2047, 3071, 4095])],
)  # fmt: skip
def test_short_images_take_one_loop_and_long_ones_a_few(steps, want):
    assert sampling.segments(steps) == want


def test_buffers_grow_before_they_are_full_and_change_no_token(params, monkeypatch):
    """Four lengths against one; guidance ends between two changes of the length."""
    policy, guided = make_policy("class", **{**SMALL, "block_size": 16}), 6
    scales = jnp.where(jnp.arange(16) < guided, 2.0, 1.0)

    def drawn(segment):
        monkeypatch.setattr(sampling, "SEGMENT", segment)
        lowered = jax.jit(
            lambda p: sampling._generate(
                policy, p, LABELS, RNG, jnp.arange(6), jnp.float32(1), scales,
                top_k=0, top_p=1.0, guided=guided, greedy=False, with_entropy=True,
            )
        ).lower(params)  # fmt: skip
        rows, lengths = {}, re.findall(r"tensor<(6|12)x2x(\d+)x8xf32>", lowered.as_text())
        for count, length in lengths:
            rows.setdefault(int(count), set()).add(int(length))
        return lowered.compile()(params), rows

    found, rows = drawn(3)
    want, _ = drawn(99)
    np.testing.assert_array_equal(found[0], want[0])
    assert_close(found[1], want[1], 2e-6)
    ends = {4, 8, 12, 16}  # a position for the class, then 3, 7, 11 and 15 steps
    assert {n for lengths in rows.values() for n in lengths} >= ends
    assert rows.keys() == {12, 6}


TEXT = {"cls_token_num": 4, "caption_dim": 6}
GROUPS = {  # kind, architecture, settings
    "two heads a key, drawn": ("class", {"n_kv_head": 2}, {}),
    "one key for all, cosine guidance, filters": (
        "class", {"n_kv_head": 1, "n_layer": 3},
        {"cfg_scale": 2.5, "cfg_schedule": "cosine", "cfg_power": 0.8, "top_k": 9, "top_p": 0.9},
    ),
    "text, two heads a key, drawn": ("text", {**TEXT, "n_kv_head": 2}, {"temperature": 0.8}),
    "text, guided at first, greedy": (
        "text", {**TEXT}, {"cfg_scale": 3.0, "cfg_interval": 2, "greedy": True}
    ),
}  # fmt: skip


def invert(weights, bits):
    """The place of a uniform of 24 bits in the cumulative sum."""
    return np.searchsorted(np.cumsum(weights), int(bits) / 2**24 * weights.sum(), side="right")


@pytest.mark.parametrize("case", GROUPS)
def test_the_cache_gives_the_tokens_of_a_forward_over_the_growing_prefix(case, monkeypatch):
    """Guidance, filters and the draw in NumPy, logits from `policy.logits`: token for token.

    The cache's buffers grow on the way, where guidance ends and where it does not.
    """
    monkeypatch.setattr(sampling, "SEGMENT", 4)
    assert sampling.segments(8) == [4, 8]
    kind, options, settings = GROUPS[case]
    batch, length, vocab = 5, 9, 23
    policy = make_policy(kind, **{
        "dim": 32, "n_head": 4, "n_layer": 2, "vocab_size": vocab, "block_size": length,
        "multiple_of": 16, "num_classes": 7, **options,
    })  # fmt: skip
    rng = np.random.default_rng(sum(case.encode()))
    params = draw_weights(jax.eval_shape(policy.init, RNG), seed=sum(case.encode()))
    condition = jnp.asarray(rng.integers(0, 7, batch), jnp.int32)
    if kind == "text":
        features = rng.normal(size=(batch, 4, 6)).astype(np.float32)
        condition = text_condition(features, np.arange(4) >= rng.integers(0, 4, (batch, 1)))
    got = np.asarray(generate(policy, params, condition, RNG, **settings))

    forward = jax.jit(policy.logits)
    known = {"schedule": settings.get("cfg_schedule", "interval")}
    scales = guidance_scales(
        scale=settings.get("cfg_scale", 1.0), num_tokens=length, power=settings.get("cfg_power", 1.0),
        interval=settings.get("cfg_interval", -1), **known,
    )  # fmt: skip
    tokens = np.zeros((batch, length), np.int64)
    for t in range(length):
        context = jnp.asarray(tokens[:, :-1])  # zeros from t on, which no earlier position sees
        logits = np.float64(forward(params, condition, context)[:, t])
        if scales[t] != 1.0:
            without = np.float64(forward(params, policy.unconditional(condition), context)[:, t])
            logits = without + np.float64(scales[t]) * (logits - without)
        if settings.get("greedy"):
            tokens[:, t] = logits.argmax(axis=-1)
            continue
        for i in range(batch):
            row = logits[i] / settings.get("temperature", 1.0)
            order = np.argsort(-row)
            probs = np.exp(row - row.max())
            if top_k := settings.get("top_k"):
                probs[order[top_k:]] = 0.0
            probs /= probs.sum()
            before = np.cumsum(probs[order]) - probs[order]
            probs[order[before > settings.get("top_p", 1.0)]] = 0.0
            # 23 tokens: eight of them first, then one of these.
            bits = jax.random.bits(jax.random.fold_in(RNG, i), (length, 2), jnp.uint32)[t] >> 8
            eights = np.pad(probs, (0, 1)).reshape(3, 8)
            eight = invert(eights.sum(axis=1), bits[0])
            tokens[i, t] = 8 * eight + invert(eights[eight], bits[1])
    np.testing.assert_array_equal(got, tokens)
    assert len(np.unique(tokens)) > 3  # no model that says the same whatever it is fed


@dataclasses.dataclass(frozen=True)
class Watched(ClassPolicy):
    """A policy that notes the batch of every decoding step that is traced, once for each `case`."""

    case: str

    def decode(self, params, cache, token, index):
        SEEN.append(token.shape[0])
        return super().decode(params, cache, token, index)


SEEN: list[int] = []


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({}, {6}),
        ({"cfg_scale": 2.0}, {12}),
        ({"cfg_scale": 2.0, "cfg_interval": 0}, {12, 6}),
        ({"cfg_scale": 2.0, "cfg_interval": 9}, {12}),
        ({"cfg_scale": 2.0, "cfg_schedule": "cosine"}, {12}),
        ({"cfg_scale": 1.0, "cfg_schedule": "cosine"}, {6}),
    ],
)
def test_only_guidance_and_what_comes_before_it_costs_twice(params, settings, batches):
    SEEN.clear()
    jax.eval_shape(
        lambda p, c: generate(Watched(POLICY.config, str(settings)), p, c, RNG, **settings),
        params,
        LABELS,
    )
    assert set(SEEN) == batches


def test_every_layers_cache_is_updated_in_place():
    """The compiled loop copies no buffer of the cache: each step writes one position of each."""
    policy = make_policy(
        "class", dim=32, n_head=4, n_kv_head=2, n_layer=3, vocab_size=11, block_size=16,
        multiple_of=16, num_classes=5,
    )  # fmt: skip
    shapes = jax.eval_shape(policy.init, RNG)
    lowered = jax.jit(sampling._generate, static_argnames=sampling._STATIC).lower(
        policy, shapes, LABELS, RNG, jnp.arange(6), jnp.float32(1), jnp.ones(16),
        top_k=0, top_p=1.0, guided=16, greedy=False, with_entropy=False,
    )  # fmt: skip
    with optimised():
        compiled = lowered.compile()
    program, buffer = compiled.as_text(), r"f32\[12,2,16,8\]\S* "
    assert len(re.findall(rf"= {buffer}dynamic-update-slice\(", program)) >= 2 * 3
    assert not re.findall(rf"= {buffer}copy\(", program)


@pytest.mark.parametrize("guided", [0, 9])
def test_devices_draw_their_samples_alone(guided):
    """Over eight devices the compiled loop sends nothing, with guidance's rows neither."""
    policy = make_policy(
        "class", dim=32, n_head=4, n_layer=2, vocab_size=11, block_size=16, multiple_of=16,
        num_classes=5,
    )  # fmt: skip
    mesh = make_mesh(8, 1)
    rows, whole = batch_sharding(mesh), replicated(mesh)

    def put(shape, dtype, layout):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    shapes = jax.eval_shape(policy.init, RNG)
    lowered = jax.jit(sampling._generate, static_argnames=sampling._STATIC).lower(
        policy,
        jax.tree.map(lambda x: put(x.shape, x.dtype, whole), shapes),
        put((16,), jnp.int32, rows), jax.device_put(RNG, whole), put((16,), jnp.int32, rows),
        put((), jnp.float32, whole), put((16,), jnp.float32, whole),
        top_k=0, top_p=1.0, guided=guided, greedy=False, with_entropy=False,
    )  # fmt: skip
    compiled = lowered.compile()
    assert hlo.totals(hlo.collectives(compiled.as_text())) == {}
