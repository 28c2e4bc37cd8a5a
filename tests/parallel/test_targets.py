"""Names of devices that are not here, and what is said where one cannot be compiled for."""

import importlib.util
from types import SimpleNamespace

import jax
import pytest

from tests.helpers.messages import assert_mentions
from vapi_jax.parallel import targets
from vapi_jax.parallel.targets import TargetError, memory_of, open_devices, parse


@pytest.mark.parametrize(
    ("name", "shape", "devices"),
    [
        ("h100:1", (1,), 1),
        ("a100:8", (8,), 8),
        ("h200:64", (64,), 64),
        ("v5e:2x4", (2, 4), 8),
        ("v5p:2x2x1", (2, 2, 1), 4),
        ("v6e:16x16", (16, 16), 256),
    ],
)
def test_a_name_says_kind_and_number(name, shape, devices):
    target = parse(name)
    assert (target.name, target.shape, target.devices) == (name, shape, devices)
    assert target.kind is targets.KINDS[name.split(":")[0]]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("h1000:8", ("h1000", *targets.KINDS)),
        ("h100", ("h100:8",)),
        ("h100:0", ("h100:8",)),
        ("h100:12", ("multiple", "8")),
        ("h100:2x4", ("h100:8",)),
        ("v5e:8", ("v5e:2x4",)),
        ("v5p:2x4", ("v5p:2x2x1",)),
        ("v5e:2x4x1", ("v5e:2x4",)),
        ("v5e:0x4", ("v5e:2x4",)),
        ("", tuple(targets.KINDS)),
    ],
)
def test_a_name_that_means_nothing(name, told):
    with pytest.raises(TargetError) as caught:
        parse(name)
    assert_mentions(str(caught.value), repr(name), *told)


@pytest.mark.parametrize(
    ("name", "extra"), [("h100:8", "compile-cuda"), ("v4:2x2x1", "compile-tpu")]
)
def test_without_its_compiler_the_extra_is_named(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError) as caught:
        open_devices(parse(name))
    assert_mentions(str(caught.value), name, extra)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
    ],
)
def test_memory_is_known_by_what_jax_calls_a_device(reported, name):
    assert memory_of(SimpleNamespace(device_kind=reported)) == targets.KINDS[name].memory
    assert memory_of(jax.devices()[0]) is None  # a CPU
