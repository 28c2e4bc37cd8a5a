"""Times the drawing of images as `vapi_jax.sample` does it, against what memory allows.

What --json holds beside name, device, versions and notes ("batch" is one batch over all devices, and
each median has its quartiles beside it as [low, high]):

  batch_size, batches, cfg_scale, image_size, tokens_per_image   what was asked for
  parameters, weights_dtype, compute_dtype                       of the generator
  seconds_per_batch, seconds_quartiles               tokens and pixels
  token_seconds_per_batch, token_seconds_quartiles   tokens alone
  decode_seconds_per_batch, decode_seconds_quartiles  pixels from tokens alone
  images_per_second            batch_size / seconds_per_batch
  tokens_per_second            batch_size * tokens_per_image / token_seconds_per_batch
  compile_seconds              what the first batch took longer than a later one
  compilations                 programs compiled in the timed batches: 0, or the command fails
  peak_memory_bytes, peak_memory_source
  step_bytes_per_device        what one decoding step reads, see `bandwidth.StepBytes`
  bandwidth_bytes_per_second, bandwidth_source, data_sheet_bandwidth_bytes_per_second (or null)
  devices_at_one_memory        1, but all of a CPU's virtual devices share one
  limits                       tokens/s that the measured bandwidth allows, see `bandwidth.limits`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from vapi_jax.bench import bandwidth
from vapi_jax.bench.batches import (
    Compilations,
    common_lines,
    heading,
    rounded,
    seconds_of,
    seconds_text,
)
from vapi_jax.bench.devices import peak_memory, planned_memory
from vapi_jax.bench.measure import WARM_UP, environment, say
from vapi_jax.bench.report import quantity
from vapi_jax.bench.setup import spread, timed
from vapi_jax.common.options import Errors
from vapi_jax.common.progress import ProgressBar
from vapi_jax.common.tables import format_table
from vapi_jax.generation.generator import Generator
from vapi_jax.generation.requests import make_requests
from vapi_jax.generation.sampler import DEFAULTS, Sampler
from vapi_jax.methods import make_method
from vapi_jax.methods.classes import with_classes
from vapi_jax.methods.config import ConfigError, TrainConfig
from vapi_jax.methods.generator import GeneratorMethod
from vapi_jax.methods.method import tokenizer_source
from vapi_jax.models.loading import WeightsSource, load_weights
from vapi_jax.models.pixels import PixelSpace
from vapi_jax.models.policy import Policy
from vapi_jax.models.sampling import generate
from vapi_jax.models.vq import VQModel
from vapi_jax.parallel import compiler
from vapi_jax.parallel.sharding import shard_whole, tree_shardings
from vapi_jax.weights.names import WeightsError

SEED = 0


def _weights(
    source: WeightsSource | None, init: Callable[[Array], Any], layout_of: Callable[[Any], Any]
) -> tuple[Any, str]:
    """Weights on the mesh from a file or, where there is none, from `init(key)`; and which."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    layout, note = layout_of(shapes), "random weights"
    if source is not None:
        try:
            return load_weights(source, shapes, layout), source.path
        except WeightsError as error:
            note += f"; {str(error).splitlines()[0]}"
    return jax.jit(init, out_shardings=layout)(jax.random.key(SEED)), note


def build(config: TrainConfig, mesh: Mesh) -> tuple[Generator, dict[str, str]]:
    """The recipe's generator as `load_generator` would assemble it, and what its weights are.

    Weights are the recipe's where they can be had. Random ones draw other images at the same speed.

    Raises:
      ConfigError: for a recipe that has no generator to draw from.
    """
    method = make_method(with_classes(config, Errors()), mesh)
    if not isinstance(method, GeneratorMethod):
        raise ConfigError(f"config.method={config.method!r} trains no generator for --mode=sample")
    config, side, policy = method.config, method.config.data.image_size, method.policy
    tokenizer = VQModel(config.tokenizer)

    def fresh(key: Array) -> Any:
        return tokenizer.init(key, jnp.zeros((1, side, side, 3)))["params"]

    def tokenizer_layout(shapes: Any) -> Any:
        return tree_shardings({"tokenizer": shapes}, mesh)["tokenizer"]

    params, generator_note = _weights(
        method.init_from, policy.init, lambda shapes: tree_shardings(shapes, mesh)
    )
    tokenizer_params, tokenizer_note = _weights(tokenizer_source(config), fresh, tokenizer_layout)
    generator = Generator(
        policy=policy,
        params=params,
        mesh=mesh,
        pixels=PixelSpace(tokenizer=tokenizer, mesh=mesh),
        frozen={"tokenizer": tokenizer_params},
        image_size=side,
        class_names=None,
        facts={"kind": "recipe", "policy": {"kind": config.policy["kind"]}},
        condition=policy.condition,
    )
    return generator, {"generator": generator_note, "tokenizer": tokenizer_note}


def draw_settings(cfg_scale: float) -> dict[str, Any]:
    """What `generate` gets from `vapi_jax.sample` where nothing but the guidance is asked for."""
    return {**DEFAULTS, "cfg_scale": cfg_scale}


def _check_guidance(generator: Generator, scale: float) -> None:
    if scale != 1.0:
        try:
            generator.policy.unconditional(generator.policy.example_condition(1))
        except ValueError as error:
            raise ConfigError(f"--cfg={scale:g}: {error}") from error


def _memory(
    generator: Generator, weights: Any, condition: Any, options: Mapping[str, Any]
) -> tuple[int, str]:
    """Bytes in use at most so far; where the backend keeps no account, as the compiler plans."""
    if "peak_bytes_in_use" in (jax.local_devices()[0].memory_stats() or {}):
        return peak_memory(None)
    rows = len(jax.tree.leaves(condition)[0])
    batch = {"condition": condition, "ids": np.arange(rows, dtype=np.uint32)}
    batch = shard_whole(batch, generator.mesh)
    draw = jax.jit(
        partial(generate, generator.policy, **options),
        compiler_options=compiler.options(generator.mesh),
    )
    lowered = draw.lower(weights, batch["condition"], jax.random.key(SEED), sample_ids=batch["ids"])
    return planned_memory(lowered.compile()), "as the compiler plans the loop over tokens"


def measure(
    config: TrainConfig, mesh: Mesh, batches: int, batch: int | None, cfg_scale: float
) -> dict[str, Any]:
    """Times whole batches, their tokens alone and their pixels alone, taking turns.

    Args:
      config: of method "vapi" or "base".
      mesh: devices.
      batches: timed ones of each kind.
      batch: images at once, rounded up to the devices as `Sampler` does; None is the recipe's.
      cfg_scale: of guidance, the same for all tokens; 1 is none.

    Returns:
      What --json writes; the module's docstring tells of the keys.

    Raises:
      ConfigError: for a recipe that cannot be drawn from, or not with guidance.
    """
    say("weights")
    generator, notes = build(config, mesh)
    _check_guidance(generator, cfg_scale)
    rows = rounded(batch or config.batch_size, mesh.size)
    turns = WARM_UP + batches
    conditions = make_requests(generator, turns * rows, SEED, None, None)
    options = draw_settings(cfg_scale)
    side = generator.image_size
    sampler = Sampler(generator.policy, generator.pixels, generator.frozen, rows, options)
    weights, rng = sampler.weights(generator.params), sampler.key(SEED)

    def draw(samples: range) -> Array:
        return sampler.tokens(weights, conditions.of, samples, rng)

    def turn(number: int) -> list[float]:
        samples = range(number * rows, (number + 1) * rows)
        _, all_of_it = timed(lambda: sampler.images(draw(samples)))
        tokens, drawing = timed(draw, samples)
        _, decoding = timed(sampler.images, tokens)
        return [all_of_it, drawing, decoding]

    say("compiling")
    first = turn(0)[0]
    for number in range(1, WARM_UP):
        turn(number)
    with ProgressBar(batches, f"{config.name} samples") as progress, Compilations() as compilations:
        laps = []
        for number in range(WARM_UP, turns):
            laps.append(turn(number))
            progress.update(len(laps))
    seconds, drawing, decoding = (spread(one) for one in zip(*laps, strict=True))
    given = conditions.of(np.zeros(rows, np.int64))
    memory, memory_source = _memory(generator, weights, given, options)
    rate = rows * generator.policy.num_tokens / drawing.median
    leaves = jax.tree.leaves(weights)
    return {
        "name": config.name,
        "mode": "sample",
        **environment(mesh),
        "notes": notes,
        "batch_size": rows,
        "batches": batches,
        "cfg_scale": cfg_scale,
        "image_size": side,
        "tokens_per_image": generator.policy.num_tokens,
        "parameters": sum(leaf.size for leaf in leaves),
        "weights_dtype": "+".join(sorted({str(leaf.dtype) for leaf in leaves})),
        "compute_dtype": generator.policy.compute_dtype,
        "compile_seconds": max(0.0, first - seconds.median),
        "compilations": compilations.count,
        **seconds_of("seconds", seconds),
        **seconds_of("token_seconds", drawing),
        **seconds_of("decode_seconds", decoding),
        "images_per_second": rows / seconds.median,
        "tokens_per_second": rate,
        "peak_memory_bytes": memory,
        "peak_memory_source": memory_source,
        **_against_memory(generator.policy, weights, given, mesh, cfg_scale != 1.0, rate),
    }


def _against_memory(
    policy: Policy, weights: Any, given: Any, mesh: Mesh, guided: bool, tokens_per_second: float
) -> dict[str, Any]:
    """What was reached of the tokens/s that the memory's bandwidth allows for a batch like `given`."""
    say("the memory's bandwidth")
    devices, rows = mesh.size, len(jax.tree.leaves(given)[0])
    found = bandwidth.step_bytes(policy, weights, given, devices, guided)
    speed = bandwidth.measured_bandwidth()
    sharing = devices if jax.default_backend() == "cpu" else 1
    return {
        "step_bytes_per_device": dataclasses.asdict(found),
        "bandwidth_bytes_per_second": speed,
        "bandwidth_source": bandwidth.SOURCE,
        "data_sheet_bandwidth_bytes_per_second": bandwidth.table_bandwidth(
            jax.devices()[0].device_kind
        ),
        "devices_at_one_memory": sharing,
        "limits": bandwidth.limits(found, rows, speed, sharing, tokens_per_second),
    }


_LIMITS = {
    "needed": "weights as held, filled cache",
    "read": "weights as held, cache as it is read",
    "computed": "weights in the compute dtype, filled cache",
}


def text_report(result: Mapping[str, Any]) -> str:
    """Everything that was measured, for a terminal."""
    sheet = result["data_sheet_bandwidth_bytes_per_second"]
    rows = [
        [_LIMITS[name], quantity(one["bytes_per_step"], "B"),
         f"{one['tokens_per_second']:.4g}", f"{100 * one['share']:.1f} %"]
        for name, one in result["limits"].items()
    ]  # fmt: skip
    return "\n".join(
        [
            heading(result),
            *(f"{subject:<12} {note}" for subject, note in result["notes"].items()),
            f"batch        {result['batch_size']} images of {result['tokens_per_image']} tokens, "
            f"guidance {result['cfg_scale']:g}, {result['compute_dtype']}",
            f"whole        {seconds_text(result, 'seconds')}, "
            f"{result['images_per_second']:.4g} images/s",
            f"tokens       {seconds_text(result, 'token_seconds')}, "
            f"{result['tokens_per_second']:.4g} tokens/s",
            f"pixels       {seconds_text(result, 'decode_seconds')}",
            *common_lines(result),
            f"bandwidth    {quantity(result['bandwidth_bytes_per_second'], 'B/s')} measured"
            + (f", {quantity(sheet, 'B/s')} by the data sheet" if sheet else ""),
            "",
            format_table(rows, ["a step reads", "a device", "limit, tokens/s", "reached"]),
        ]
    )
