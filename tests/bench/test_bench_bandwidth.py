"""What a decoding step reads, by hand, and the limit that reading sets."""

import jax
import numpy as np
import pytest

from vapi_jax.bench import bandwidth
from vapi_jax.common.trees import flatten
from vapi_jax.models.policies import make_policy

# dim 8 in 2 heads of 4, one of keys; SwiGLU of 32 (2/3 of 4 * 8, up to a multiple of 32).
SMALL = {
    "kind": "class", "dim": 8, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "multiple_of": 32,
    "vocab_size": 16, "block_size": 4, "num_classes": 5,
}  # fmt: skip


def small(**changes):
    policy = make_policy(**{**SMALL, **changes})
    return policy, jax.eval_shape(policy.init, jax.random.key(0))


def labels(count):
    return np.zeros(count, np.int32)


def test_the_bytes_of_a_step_of_a_small_generator_by_hand():
    policy, params = small()
    layer = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 32 + 2 * 8  # wqkv, wo, feed-forward, two norms
    weights = 4 * (3 * layer + 8 + 8 * 16)  # of all layers, the last norm and the output
    found = bandwidth.step_bytes(policy, params, labels(6), devices=1, guided=False)
    assert found.weights == weights == 12256
    # Keys and values, 3 layers, 6 rows, 1 head, 1 + 3 positions of 4 numbers of 4 bytes.
    assert found.cache_read == 2 * 3 * 6 * 1 * 4 * 4 * 4 == 2304
    # The three steps of an image attend to 2, 3 and 4 of 4 positions.
    assert found.cache_filled == 2304 * 3 / 4


def test_a_long_image_reads_buffers_that_grow():
    """Of 288 steps a quarter reads 1 + 72 positions, the next one 1 + 144, and so on."""
    found = bandwidth.step_bytes(*small(block_size=289), labels(6), devices=1, guided=False)
    position = 2 * 3 * 6 * 1 * 4 * 4
    assert found.cache_read == position * (73 + 145 + 217 + 289) / 4
    assert found.cache_filled == position * sum(range(2, 290)) / 288


def test_guidance_doubles_the_rows_of_the_cache_and_shares_the_weights():
    policy, params = small()
    plain = bandwidth.step_bytes(policy, params, labels(6), devices=1, guided=False)
    guided = bandwidth.step_bytes(policy, params, labels(6), devices=1, guided=True)
    assert guided.weights == plain.weights
    assert guided.cache_read == 2 * plain.cache_read
    assert guided.cache_filled == 2 * plain.cache_filled


def test_each_device_reads_all_weights_and_its_share_of_the_cache():
    policy, params = small()
    one = bandwidth.step_bytes(policy, params, labels(8), devices=1, guided=False)
    four = bandwidth.step_bytes(policy, params, labels(8), devices=4, guided=False)
    assert four.weights == one.weights
    assert four.cache_read == one.cache_read / 4
    assert four.cache_filled == one.cache_filled / 4


def test_in_bfloat16_the_cache_is_half_and_weights_are_as_held():
    found, half = (
        bandwidth.step_bytes(*small(dtype=dtype), labels(6), 1, False)
        for dtype in ("float32", "bfloat16")
    )
    assert half.weights == found.weights == found.weights_computed == 2 * half.weights_computed
    assert half.cache_read == found.cache_read / 2


def test_tables_that_are_looked_up_are_not_read_whole():
    policy, params = small()
    more_codes = small(num_classes=500)
    assert bandwidth.weight_bytes(more_codes[1]) == bandwidth.weight_bytes(params)
    sizes = {path: leaf.size for path, leaf in flatten(params).items()}
    assert sum(sizes.values()) * 4 - bandwidth.weight_bytes(params) == 4 * 8 * (16 + 5 + 1)
    assert policy.vocab_size == 16


@pytest.mark.parametrize(("prefix", "tokens"), [(1, 64), (120, 256), (1, 2), (3, 5)])
def test_the_mean_of_filled_positions_is_that_of_the_steps(prefix, tokens):
    steps = [prefix + index + 1 for index in range(tokens - 1)]
    assert bandwidth.mean_filled(prefix, tokens) == sum(steps) / len(steps)


def test_limits_by_hand():
    read = bandwidth.StepBytes(
        weights=600, weights_computed=300, cache_filled=200.0, cache_read=400
    )
    found = bandwidth.limits(read, batch=10, bandwidth=1e6, sharing=1, tokens_per_second=2500.0)
    assert found["needed"] == {"bytes_per_step": 800.0, "tokens_per_second": 12500.0, "share": 0.2}
    assert found["read"]["tokens_per_second"] == 10_000.0
    assert found["read"]["share"] == 0.25
    assert found["computed"]["bytes_per_step"] == 500.0
    shared = bandwidth.limits(read, batch=10, bandwidth=1e6, sharing=4, tokens_per_second=2500.0)
    assert shared["needed"]["tokens_per_second"] == 3125.0


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35),
        ("NVIDIA H100 PCIe", 2.0),
        ("NVIDIA H100 NVL", 3.9),
        ("NVIDIA H200", 4.8),
        ("NVIDIA GH200 480GB", 4.0),
        ("NVIDIA A100-SXM4-40GB", 1.555),
        ("NVIDIA A100-PCIE-40GB", 1.555),
        ("NVIDIA A100-SXM4-80GB", 2.039),
        ("NVIDIA A100 80GB PCIe", 1.935),
        ("TPU v4", 1.228),
        ("TPU v5 lite", 0.819),
        ("TPU v5p", 2.765),
        ("TPU v6 lite", 1.638),
    ],
)
def test_bandwidths_of_known_devices(kind, tera):
    assert bandwidth.table_bandwidth(kind) == pytest.approx(tera * 1e12)


def test_an_unknown_device_has_no_data_sheet_but_a_measurement():
    assert bandwidth.table_bandwidth("cpu") is None
    assert 1e8 < bandwidth.measured_bandwidth(repeats=2, size=2**24) < 1e13


def test_a_generator_of_captions_is_counted_too():
    policy = make_policy("text", dim=32, n_layer=1, n_head=4, multiple_of=16, vocab_size=16,
                         block_size=16, cls_token_num=3, caption_dim=5)  # fmt: skip
    params = jax.eval_shape(policy.init, jax.random.key(0))
    given = policy.example_condition(2)
    found = bandwidth.step_bytes(policy, params, given, 1, True)
    assert found.cache_read == 2 * 4 * 4 * (3 + 15) * 8 * 4
    assert found.cache_filled == found.cache_read * (3 + 16 / 2) / (3 + 15)
