"""What the compiler of a target that is not here says of a recipe: memory, FLOPs, traffic and kernels.

A target is a name of `vapi_jax.parallel.targets`. Everything is made of shapes; nothing is run, and no
weights exist. Figures are of compiled programs, but for the split of a step's memory into gradients,
activations and the rest: the compiler plans them together, and shapes tell them apart
(`vapi_jax.training.memory`).
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vapi_jax.bench import hlo
from vapi_jax.bench.devices import planned_memory
from vapi_jax.bench.hlo_flops import Product, products
from vapi_jax.bench.measure import say
from vapi_jax.bench.setup import placed, shapes
from vapi_jax.common.options import Errors
from vapi_jax.generation.sampler import DEFAULTS
from vapi_jax.methods import Method, make_method
from vapi_jax.methods.classes import with_classes
from vapi_jax.methods.config import ConfigError, TrainConfig
from vapi_jax.methods.resolve import device_errors, raise_all
from vapi_jax.models.sampling import generate
from vapi_jax.parallel import compiler
from vapi_jax.parallel.sharding import batch_sharding, make_mesh, replicated
from vapi_jax.parallel.targets import Target, open_devices
from vapi_jax.training import memory, train

SAMPLES = 64
"""Drawn at once, over all devices: what `vapi_jax.sample` does where nobody says otherwise."""

PALLAS = "tpu_custom_call"

_REFUSED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is known of one compiled program, of one device and one call unless said otherwise.

    Attributes:
      program: "step", "sampling", "decoding" or "evaluation".
      fits: whether its peak is within what a device can give.
      peak: bytes at once; None where the compiler gave up without a figure.
      parts: name -> bytes of the peak, in order.
      flops: of matrix products, convolutions and attention, loops counted; NaN where nothing was compiled.
      exact: False where a loop of unknown length was counted once.
      collectives: kind -> what is sent.
      attention: what the generator's attention became.
      float32: share of `flops` at float32's speed.
      largest: the largest products at float32's speed, as (where, shapes of operands, share of `flops`).
      uncounted: calls whose work is not in `flops`.
      seconds: of tracing and compiling.
    """

    program: str
    fits: bool
    peak: int | None
    parts: Mapping[str, int]
    flops: float = float("nan")
    exact: bool = True
    collectives: Mapping[str, hlo.Total] = dataclasses.field(default_factory=dict)
    attention: str = ""
    float32: float = 0.0
    largest: tuple[tuple[str, str, float], ...] = ()
    uncounted: Mapping[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def sent(self) -> float:
        """Bytes that a device sends."""
        return sum(total.sent_bytes for total in self.collectives.values())


def open_mesh(config: TrainConfig, target: Target) -> Mesh:
    """The recipe's mesh of a target's devices.

    Raises:
      ConfigError: if mesh or batch do not fit them.
      TargetError: as `open_devices`.
    """
    devices = open_devices(target)
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    raise_all(device_errors(config, len(devices)))
    return mesh


def on_mesh(config: TrainConfig, mesh: Mesh) -> Method:
    """The recipe's method, its classes settled as far as what is here says them."""
    return make_method(with_classes(config, Errors()), mesh)


TOLD = ("parameters", "optimizer", "frozen networks", "gradients", "gathered", "activations")
"""Parts of a step's memory that shapes tell; what is counted for a chunk of decoding is temporary."""


# --- programs -------------------------------------------------------------------------------------

Lowered = Any


def lower_step(method: Method) -> tuple[Lowered, dict[str, int]]:
    """The training step, traced, and the parts of its memory that shapes tell.

    Raises:
      ConfigError: for a method whose step is several programs.
    """
    config = method.config
    if method.rolls_out or method.updates > 1:
        raise ConfigError(f"config.method={config.method!r}: its step is more than one program")
    optimizer, state, shardings, frozen = shapes(method)
    batch = _batch(method, config.batch_size)
    step: Any = train.make_train_step(method, optimizer, shardings)
    known = {
        part.name: part.bytes for part in memory.estimate(method, state, method.frozen_shapes())
    }
    known["frozen networks"] += known.get("base generator", 0)
    return step.lower(state, frozen, batch), {n: known[n] for n in TOLD if n in known}


def _batch(method: Method, rows: int) -> Any:
    batch = method.example_batch(rows)
    return placed(batch, jax.tree.map(lambda _: batch_sharding(method.mesh), batch))


def _whole(tree: Any, mesh: Mesh) -> Any:
    return placed(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def _key(mesh: Mesh) -> Any:
    return _whole(jax.eval_shape(lambda: jax.random.key(0)), mesh)


def _bytes(**trees: Any) -> dict[str, int]:
    """Bytes of a device in each tree of placed shapes."""
    return {
        name: memory.bytes_per_device(tree, jax.tree.map(lambda x: x.sharding, tree))
        for name, tree in trees.items()
    }


def lower_evaluation(method: Method) -> tuple[Lowered, dict[str, int]]:
    """The metrics of the held-out batch, as `vapi_jax.evaluation.held_out` computes them."""
    mesh = method.mesh
    _, state, _, frozen = shapes(method)
    frozen = {name: tree for name, tree in frozen.items() if name != "base"}
    params = _whole(jax.eval_shape(method.narrowed, method.whole(state.params, frozen)), mesh)
    program = jax.jit(method.held_out, compiler_options=compiler.options(mesh))
    batch = _batch(method, method.config.eval.images)
    temperature = _whole(jax.ShapeDtypeStruct((), jnp.float32), mesh)
    lowered = program.lower(params, frozen, batch, _key(mesh), temperature)
    return lowered, _bytes(parameters=params, **{"frozen networks": frozen})


def lower_sampling(method: Method) -> tuple[Lowered, dict[str, int]] | None:
    """The loop over the tokens of `SAMPLES` images, as samples are drawn; None without a policy."""
    drawn, mesh = method.sampled(), method.mesh
    if drawn is None:
        return None
    rows = -(-SAMPLES // mesh.size) * mesh.size
    _, state, _, frozen = shapes(method)
    policy = drawn.policy
    params = jax.eval_shape(
        lambda params, frozen: policy.unstacked(policy.narrowed(drawn.params(params, frozen))),
        state.params,
        frozen,
    )
    params = _whole(params, mesh)
    given = {
        "condition": jax.eval_shape(lambda: policy.condition.example(rows)),
        "ids": jax.ShapeDtypeStruct((rows,), jnp.uint32),
    }
    given = placed(given, jax.tree.map(lambda _: batch_sharding(mesh), given))
    program = jax.jit(
        partial(generate, policy, **DEFAULTS), compiler_options=compiler.options(mesh)
    )
    lowered = program.lower(params, given["condition"], _key(mesh), sample_ids=given["ids"])
    return lowered, _bytes(parameters=params)


def lower_decoding(method: Method) -> tuple[Lowered, dict[str, int]] | None:
    """From the tokens of `SAMPLES` images to their pixels; None without a policy."""
    drawn, mesh = method.sampled(), method.mesh
    if drawn is None:
        return None
    rows = -(-SAMPLES // mesh.size) * mesh.size
    _, _, _, frozen = shapes(method)
    frozen = {"tokenizer": frozen["tokenizer"]}
    tokens = jax.ShapeDtypeStruct((rows, drawn.policy.num_tokens), jnp.int32)
    program = jax.jit(drawn.pixels.decode, compiler_options=compiler.options(mesh))
    lowered = program.lower(frozen, placed(tokens, batch_sharding(mesh)))
    return lowered, _bytes(**{"frozen networks": frozen})


PROGRAMS: Mapping[str, Callable[[Method], tuple[Lowered, dict[str, int]] | None]] = {
    "step": lower_step,
    "sampling": lower_sampling,
    "decoding": lower_decoding,
    "evaluation": lower_evaluation,
}


# --- figures --------------------------------------------------------------------------------------


def attention_kernel(found: list[Product], uncounted: Mapping[str, int]) -> str:
    """What a program's attention is computed with."""
    fused = [one.instruction.attributes for one in found if one.kind == "attention"]
    if fused:
        backward = sum("Backward" in attributes for attributes in fused)
        return f"cuDNN ({len(fused) - backward} forward, {backward} backward)"
    return "Pallas" if PALLAS in uncounted else "XLA"


def largest_float32(found: list[Product], count: int = 3) -> tuple[tuple[str, str, float], ...]:
    """The largest products at float32's speed, those of one place together."""
    whole = sum(one.flops for one in found)
    by_place: dict[tuple[str, str], float] = {}
    for one in found:
        if one.slow:
            name = "/".join(one.instruction.op_name.split("/")[-4:])
            operands = " x ".join(re.sub(r"\{.*?\}", "", shape) for shape in one.operands)
            by_place[name, operands] = by_place.get((name, operands), 0.0) + one.flops
    ordered = sorted(by_place.items(), key=lambda item: -item[1])[:count]
    return tuple((*place, flops / whole) for place, flops in ordered)


def read(
    program: str, compiled: Any, known: Mapping[str, int], target: Target, seconds: float
) -> Figures:
    """The figures of a compiled program.

    Args:
      program: its name.
      compiled: by a target's compiler.
      known: parts of its memory that shapes tell.
      target: the devices.
      seconds: that it took.
    """
    text, peak = compiled.as_text(), planned_memory(compiled)
    found, uncounted = products(text, padding=False)
    flops = sum(one.flops for one in found)
    parts, left = {}, peak
    for name, size in known.items():  # activations come last: not all of them live at the peak
        parts[name] = min(size, left)
        left -= parts[name]
    return Figures(
        program=program,
        fits=peak <= target.kind.memory,
        peak=peak,
        parts={**parts, "temporary": left},
        flops=flops,
        exact=all(one.instruction.exact for one in found),
        collectives=hlo.totals(hlo.collectives(text)),
        attention=attention_kernel(found, uncounted),
        float32=sum(one.flops for one in found if one.slow) / flops if flops else 0.0,
        largest=largest_float32(found),
        uncounted=uncounted,
        seconds=seconds,
    )


def compile_program(
    program: str, lowered: Lowered, known: Mapping[str, int], target: Target, seconds: float = 0.0
) -> Figures:
    """Compiles a traced program and reads it; one that the compiler refuses for its size does not fit."""
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = _REFUSED.search(str(error))
        peak = int(float(used[1]) * _UNITS[used[2]]) if used else None
        taken = seconds + time.perf_counter() - started
        return Figures(program, False, peak, dict(known), seconds=taken)
    return read(program, compiled, known, target, seconds + time.perf_counter() - started)


def examine(
    config: TrainConfig, target: Target, programs: Sequence[str] = tuple(PROGRAMS)
) -> list[Figures]:
    """Compiles a recipe's programs for a target, one after the other.

    Raises:
      ConfigError: if the recipe does not fit the target's devices, or has no single step.
      TargetError: if there is no compiler for it.
    """
    method, found = on_mesh(config, open_mesh(config, target)), []
    for program in programs:
        say(f"{target.name}: compiling the {program}")
        started = time.perf_counter()
        lowered = PROGRAMS[program](method)
        if lowered is not None:
            found.append(compile_program(program, *lowered, target, time.perf_counter() - started))
    return found
