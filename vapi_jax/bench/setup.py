"""The real task, state, weights and batches of a recipe, ready to be timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vapi_jax.common.options import Errors
from vapi_jax.data import DataError, make_dataset
from vapi_jax.methods import Method
from vapi_jax.methods.classes import with_classes
from vapi_jax.methods.config import ConfigError, TrainConfig
from vapi_jax.methods.resolve import changed
from vapi_jax.methods.vapi_method import VAPi
from vapi_jax.parallel.sharding import batch_sharding, shard_batch, tree_shardings
from vapi_jax.training import train
from vapi_jax.weights.names import WeightsError


@dataclasses.dataclass(frozen=True)
class RandomTokenizer(VAPi):
    """VA-π over a tokenizer with random weights: its speed does not depend on their values."""

    def load_tokenizer(self) -> Any:
        side = self.config.data.image_size
        image = jnp.zeros((1, side, side, 3))
        init = jax.jit(self.pixels.tokenizer.init)
        return jax.device_get(init(jax.random.key(0), image)["params"])


@dataclasses.dataclass
class Setup:
    """What a step takes.

    Attributes:
      method: the recipe's, of method "vapi".
      optimizer: its AdamW.
      state: on the mesh; a step consumes it and gives the next.
      shardings: of the state.
      frozen: frozen weights on the mesh.
      batch: one batch on the mesh.
      notes: what is real and what stands in for it, by subject.
    """

    method: VAPi
    optimizer: optax.GradientTransformation
    state: train.TrainState
    shardings: Any
    frozen: dict[str, Any]
    batch: dict[str, Any]
    notes: dict[str, str]

    def step(self, fused: bool) -> Any:
        """The jitted step, of one sequence an image or of G."""
        config = changed(self.method.config, fused=fused)
        method = dataclasses.replace(self.method, config=config)
        return train.make_train_step(method, self.optimizer, self.shardings)


def batch_shapes(method: VAPi) -> dict[str, Any]:
    """Shapes of a batch over all devices.

    Raises:
      ConfigError: for a policy whose conditions are not labels: this version trains on none other.
    """
    config = method.config
    if method.policy.condition.num_classes is None:
        raise ConfigError(
            f"config.policy.kind={config.policy.get('kind')!r}: no batches of captions can be made; "
            "the benchmark takes class-conditional recipes"
        )
    return method.example_batch(config.batch_size)


def random_batch(method: VAPi, seed: int) -> dict[str, Any]:
    """A process's batch of noise images and random labels."""
    rng, shapes, processes = np.random.default_rng(seed), batch_shapes(method), jax.process_count()
    batch, *image = shapes["image"].shape
    classes = method.policy.condition.num_classes
    return {
        "image": rng.uniform(-1, 1, (batch // processes, *image)).astype(np.float32),
        "condition": rng.integers(0, classes, batch // processes).astype(np.int32),
    }


def host_batches(method: VAPi) -> Iterator[dict[str, Any]]:
    """The recipe's own input pipeline.

    Raises:
      DataError: where its data are not to be had.
    """
    config, count = method.config, jax.process_count()
    size, place = config.batch_size // count, jax.process_index()
    return map(method.prepare, make_dataset(config.data, "train", size, config.seed, place, count))


def _first_batch(method: VAPi) -> tuple[dict[str, Any], str]:
    try:
        return dict(next(host_batches(method))), f"the recipe's data ({method.config.data.name})"
    except DataError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return random_batch(method, 0), f"random images and labels; the recipe's data: {reason}"


def _random_head(state: train.TrainState, shardings: Any) -> train.TrainState:
    """An untrained output layer is zero, and would send a zero gradient through all layers."""
    params = dict(state.params)
    if "output" not in params:
        return state
    kernel, layout = params["output"]["kernel"], shardings.params["output"]["kernel"]
    draw = jax.jit(
        lambda key: 0.02 * jax.random.normal(key, kernel.shape, kernel.dtype), out_shardings=layout
    )
    params["output"] = {"kernel": draw(jax.random.key(1))}
    return dataclasses.replace(state, params=params)


def abstract(config: TrainConfig, mesh: Mesh) -> Setup:
    """A setup of shapes and layouts alone, to compile a step that this machine could not hold.

    Raises:
      ConfigError: as `build`.
    """
    _check_method(config)
    method = RandomTokenizer(with_classes(config, Errors()), mesh)
    batch = batch_shapes(method)
    optimizer, state, shardings, frozen = shapes(method)
    return Setup(
        method,
        optimizer,
        state,
        shardings,
        frozen,
        placed(batch, dict.fromkeys(batch, batch_sharding(mesh))),
        {"generator": "shapes alone", "tokenizer": "shapes alone", "data": "shapes alone"},
    )


def placed(tree: Any, layout: Any) -> Any:
    """A tree of shapes, each with its NamedSharding of a like tree."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout
    )


def shapes(method: Method) -> tuple[optax.GradientTransformation, Any, Any, dict[str, Any]]:
    """What a step of any method takes beside its batch, as shapes in their layout.

    Returns:
      (optimizer, state, shardings of the state, frozen weights).
    """
    config, mesh, rules = method.config, method.mesh, method.partition_rules
    optimizer = train.make_optimizer(config.optimizer, config.steps)
    state = train.abstract_state(method, optimizer, config.seed)
    shardings = train.state_shardings(state, mesh, rules)
    frozen = method.frozen_shapes()
    if method.keeps_start:
        frozen["base"] = state.params
    layout = tree_shardings(frozen, mesh, rules)
    return optimizer, placed(state, shardings), shardings, placed(frozen, layout)


def _check_method(config: TrainConfig) -> None:
    if config.method != "vapi":
        raise ConfigError(f"config.method={config.method!r}: the benchmark times method 'vapi'")


def build(config: TrainConfig, mesh: Mesh) -> Setup:
    """Everything that a step of the recipe takes, real where it can be had.

    Raises:
      ConfigError: for a recipe of another method than "vapi", or one whose batches cannot be made.
      WeightsError: if weights exist and do not fit.
    """
    _check_method(config)
    config, notes = with_classes(config, Errors()), {}
    method = VAPi(config, mesh)
    batch_shapes(method)  # refuses before any weights are read
    optimizer = train.make_optimizer(config.optimizer, config.steps)
    notes["generator"] = config.init.gpt or "random weights"
    try:
        state, shardings = train.init_state(method, optimizer, config.seed)
    except WeightsError as error:
        notes["generator"] = f"random weights; {str(error).splitlines()[0]}"
        init = dataclasses.replace(config.init, gpt="")
        method = VAPi(dataclasses.replace(config, init=init), mesh)
        state, shardings = train.init_state(method, optimizer, config.seed)
    if notes["generator"].startswith("random"):
        state = _random_head(state, shardings)
    notes["tokenizer"] = config.init.vq or "random weights"
    try:
        frozen = train.load_frozen(method)
    except WeightsError as error:
        if config.init.vq:
            notes["tokenizer"] = f"random weights; {str(error).splitlines()[0]}"
        method = RandomTokenizer(method.config, mesh)
        frozen = train.load_frozen(method)
    if method.keeps_start:
        frozen["base"] = jax.tree.map(jnp.copy, state.params)
    batch, notes["data"] = _first_batch(method)
    return Setup(method, optimizer, state, shardings, frozen, shard_batch(batch, mesh), notes)


# --- timing ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of measured seconds."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, by linear interpolation."""
    low, median, high = (float(q) for q in np.quantile(np.asarray(values), (0.25, 0.5, 0.75)))
    return Spread(median, low, high, len(values))


def timed(function: Any, *args: Any) -> tuple[Any, float]:
    """What a function returns, and the seconds until all of it is there."""
    start = time.perf_counter()
    out = jax.block_until_ready(function(*args))
    return out, time.perf_counter() - start


def compile_step(setup: Setup, fused: bool) -> tuple[Any, float]:
    """The compiled step, and the seconds that tracing and compiling it took."""
    start = time.perf_counter()
    compiled = setup.step(fused).lower(setup.state, setup.frozen, setup.batch).compile()
    return compiled, time.perf_counter() - start


@dataclasses.dataclass
class Laps:
    """Seconds of each call of a step, and seconds that the process's threads computed in it."""

    wall: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)


def time_steps(
    setup: Setup,
    steps: Mapping[str, Any],
    count: int,
    warm_up: int,
    tick: Callable[[], None],
    beside: Callable[[bool], None] = lambda timed: None,
) -> dict[str, Laps]:
    """`count` calls of each compiled step, taking turns, after `warm_up` untimed ones.

    Taking turns gives every step its share of what else the machine does. `tick()` is called after
    every call, and `beside(timed)` once a turn.
    """
    laps = {name: Laps() for name in steps}
    for turn in range(-warm_up, count):
        beside(turn >= 0)
        for name, step in steps.items():
            before = time.process_time()
            (setup.state, _), elapsed = timed(step, setup.state, setup.frozen, setup.batch)
            if turn >= 0:
                laps[name].wall.append(elapsed)
                laps[name].processor.append(time.process_time() - before)
            tick()
    return laps


def input_wait(setup: Setup, step: Any, count: int, tick: Callable[[], None]) -> float | None:
    """Median seconds that a step waits for its batch, the pipeline working beside it.

    None where the recipe's data are not to be had.
    """
    mesh, waits = setup.method.mesh, []
    try:
        batches = host_batches(setup.method)
        first = next(batches)
    except DataError:
        return None
    batch = shard_batch(dict(first), mesh)
    for _ in range(count):
        setup.state, _ = jax.block_until_ready(step(setup.state, setup.frozen, batch))
        start = time.perf_counter()
        batch = jax.block_until_ready(shard_batch(dict(next(batches)), mesh))
        waits.append(time.perf_counter() - start)
        tick()
    return spread(waits).median
