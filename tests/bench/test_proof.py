"""What is said of a GPU's proof, and which kernels took longest."""

import json

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.messages import assert_mentions
from vapi_jax.bench import proof
from vapi_jax.bench.kernels import top_kernels
from vapi_jax.common.errors import ExpectedError


def test_the_longest_kernel_comes_first():
    large, small = jnp.ones((900, 900)), jnp.ones(8)
    run = jax.jit(lambda x, y: (x @ x @ x, jnp.sin(y)))
    jax.block_until_ready(run(large, small))
    found = top_kernels(lambda: run(large, small), 3)
    assert found[0]["share"] > 0.5 and found[0]["calls"] >= 1
    assert [one["seconds"] for one in found] == sorted(one["seconds"] for one in found)[::-1]
    assert 0.5 < sum(one["share"] for one in found) <= 1.0 + 1e-9


def test_attention_agrees_with_itself():
    check = proof.attention_off()
    assert check.passed and check.figure == 0.0  # one and the same on a CPU


def test_differences_are_relative_to_what_is_wanted():
    want = dict.fromkeys(proof.STEP, 2.0)
    assert proof.off({**want, "ce": 2.2}, want) == pytest.approx(0.1)
    assert not proof.Check("a", float("nan"), 1.0).passed


STEP = {
    "seconds_per_step": 2.0, "model_flops": 1e15, "peak_flops_per_second": 1e15, "peak_memory_bytes": 40e9,
    "phases": {"decode": 0.5}, "ratio": 4.5, "plain_seconds_per_step": 9.0,
    "kernels": [{"name": "gemm", "calls": 3, "seconds": 0.25, "share": 0.5}],
}  # fmt: skip


def test_the_table_tells_everything_that_was_left(tmp_path):
    about = {"device": {"count": 1, "kind": "NVIDIA H100"}, "versions": {"jax": "0.11.0"}}
    sample = {"mode": "sample", "batch_size": 64, "cfg_scale": 1.75, "tokens_per_second": 1234.0,
              "images_per_second": 5.0}  # fmt: skip
    check = {"name": "tokens", "figure": 0.5, "allowed": 0.001, "passed": False}
    row = {"varied": "recipe", "planned_memory_bytes": 30e9, "seconds_per_step": 1.75,
           "model_flops": 1e15}  # fmt: skip
    dots = {
        **row,
        "varied": "policy.remat=dots",
        "planned_memory_bytes": 50e9,
        "seconds_per_step": 1.5,
    }
    large = {"varied": "microbatch_size=64", "planned_memory_bytes": 142e9}
    parts = {"checks": {"checks": [check]}, "xxl": STEP, "sample_cfg": sample,
             "settings": {"rows": [row, dots], "no_room": [large], "peak_flops_per_second": 1e15},
             }  # fmt: skip
    for name, part in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(about | part))
    (tmp_path / "missing.txt").write_text("xl (no time left)\n")
    text = proof.write_table(tmp_path).read_text()
    assert_mentions(
        text, "NVIDIA H100", "0.11.0", "**NO**", "2.000", "50.0 %", "40 GB", "4.50", "settings, recipe |",
        "policy.remat=dots, **fastest** | 1.500", "microbatch_size=64 | no room", "142 GB",
        "1234", "1.75", "decode", "gemm", "xl (no time left)",
    )  # fmt: skip
    assert json.loads((tmp_path / "proof.json").read_text()).keys() == parts.keys()
    assert "settings, policy.remat=dots" in proof.write_table(tmp_path).read_text()  # again


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ExpectedError, match=str(tmp_path)):
        proof.write_table(tmp_path)
    assert not list(tmp_path.iterdir())
