"""The loop round the step: input, metrics, health, held-out evaluation, checkpoints, final weights.

Nothing here knows what is being trained; see `vapi_jax.tasks`.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

from vapi_jax import train
from vapi_jax.checkpoint import Checkpointer, CheckpointError, abstract_like
from vapi_jax.config import TrainConfig
from vapi_jax.data import fixed_batch, make_dataset
from vapi_jax.metrics import MetricsWriter, Progress, Timer, read_history
from vapi_jax.sharding import host_array, replicated, shard_batch, shard_whole
from vapi_jax.tasks import Task
from vapi_jax.weights import save_safetensors

logger = logging.getLogger(__name__)

HELD_OUT = "held_out/"


def count(tree: Any) -> int:
    """How many numbers a tree of arrays holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


class _Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        return max(elapsed, 1e-9)


class HeldOut:
    """The fixed held-out batch of a run and its metrics, the same images and keys at every call."""

    def __init__(self, task: Task, frozen: Mapping[str, Any]):
        config = task.config
        batch = fixed_batch(config.data, config.eval.split, config.eval.images, config.seed)
        self._batch = shard_whole(batch, task.mesh)
        self._frozen = frozen
        self._rng = jax.device_put(jax.random.key(config.seed), replicated(task.mesh))
        self._metrics = jax.jit(task.held_out)
        self._mesh, self._temperature = task.mesh, config.vapi.temperature

    def __call__(self, params: Any, temperature: float | None = None) -> dict[str, float]:
        """The metrics; samples are drawn at the configured temperature unless told otherwise."""
        drawn_at = self._temperature if temperature is None else temperature
        drawn_at = jax.device_put(np.float32(drawn_at), replicated(self._mesh))
        metrics = self._metrics(params, self._frozen, self._batch, self._rng, drawn_at)
        return {name: float(value) for name, value in jax.device_get(metrics).items()}


@dataclasses.dataclass
class Run:
    """What a finished run hands to its report."""

    task: Task
    params: Any
    start_params: Any  # the parameters at step 0, where they were asked for
    frozen: dict[str, Any]
    first: dict[str, float]  # held-out metrics before the first step
    last: dict[str, float]  # and after the last
    held_out: HeldOut
    timer: Timer
    parameters: dict[str, int]  # network -> number of parameters
    weights: dict[str, str]  # file -> SHA-256


def _batches(config: TrainConfig, mesh: Mesh) -> Iterator[Any]:
    count = jax.process_count()
    return iter(
        make_dataset(
            config.data,
            "train",
            config.batch_size // count,
            config.seed,
            jax.process_index(),
            count,
        )
    )


def fit(task: Task, workdir: Path, *, keep_start: bool = False) -> Run:
    """Trains a task to its last step and saves the weights under `workdir`/weights.

    A run whose `workdir`/checkpoints holds a checkpoint goes on from it.

    Args:
      task: what to train.
      workdir: receives metrics.jsonl, tensorboard/, checkpoints/ and weights/.
      keep_start: also hand back the parameters of step 0 (a second copy on the mesh).

    Returns:
      The final parameters and what a report needs.

    Raises:
      HealthError: if a step's metrics say that training is broken.
      WeightsError: if weights to start from are missing or do not fit.
    """
    config, mesh, timer = task.config, task.mesh, Timer()
    with timer.phase("setup"):
        optimizer = train.make_optimizer(config.optimizer, config.steps)
        state, shardings = train.init_state(task, optimizer, config.seed)
        frozen = train.load_frozen(task)
        start = jax.tree.map(jnp.copy, state.params) if keep_start else None
        if config.task == "vapi" and config.vapi.needs_base:
            frozen["base"] = start if keep_start else jax.tree.map(jnp.copy, state.params)
        batches = _batches(config, mesh)
        step_fn = train.make_train_step(task, optimizer, shardings)
        held_out = HeldOut(task, frozen)
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            overview = parameter_overview.get_parameter_overview(
                state.params, include_stats="sharding"
            )
            (workdir / "parameters.txt").write_text(f"{overview}\n", encoding="utf-8")
    saver = Checkpointer(workdir / "checkpoints", config.checkpoint.keep_last)
    if saver.latest_step() is not None:
        state = _restore(saver, state, batches)
    done = int(state.step)
    pending: tuple[int, Any] | None = None
    clock = _Clock()

    with (
        saver,
        MetricsWriter(workdir, active=jax.process_index() == 0) as writer,
        Progress(config.steps, config.name, first_step=done) as progress,
    ):

        def judge(step: int, params: Any) -> dict[str, float]:
            with timer.phase("held_out"):
                found = held_out(params)
            writer.write(step, {HELD_OUT + name: value for name, value in found.items()})
            return found

        def settle(entry: tuple[int, Any]) -> None:
            """Metrics of a step that another has followed already: nothing waits for them."""
            step, values = entry
            scalars = {name: float(value) for name, value in jax.device_get(values).items()}
            task.check(step, scalars)
            scalars["images_per_second"] = config.batch_size / clock.lap()
            if step % config.log_every == 0 or step == config.steps:
                writer.write(step, scalars)
            shown = {name: scalars[name] for name in task.headline if name in scalars}
            progress.update(step, config.batch_size, shown)

        first = last = judge(done, state.params)
        if done:
            first = _first_judgement(workdir, first)
        clock.lap()
        for step in range(done + 1, config.steps + 1):
            with timer.phase("input"):
                batch = shard_batch(next(batches), mesh)
            with timer.phase("step"):
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, frozen, batch)
                if pending is not None:
                    settle(pending)
                pending = (step, metrics)
            if step % config.eval.every == 0 or step == config.steps:
                with timer.phase("step"):
                    settle(pending)
                pending = None
                last = judge(step, state.params)
                clock.lap()
            if config.checkpoint.every and step % config.checkpoint.every == 0:
                if pending is not None:  # a broken step must not be saved
                    with timer.phase("step"):
                        settle(pending)
                    pending = None
                with timer.phase("checkpoint"):
                    _save(saver, step, state, batches)
        with timer.phase("checkpoint"):
            weights = _save_weights(task, state, workdir)
    parameters = {
        name: count(tree) for name, tree in task.weights_of(state.params, state.extra).items()
    }
    parameters |= {name: count(tree) for name, tree in frozen.items() if name == "tokenizer"}
    return Run(task, state.params, start, frozen, first, last, held_out, timer, parameters, weights)


def _first_judgement(workdir: Path, default: dict[str, float]) -> dict[str, float]:
    """Held-out metrics of the first row that has them: step 0 of a run that was resumed."""
    for row in read_history(workdir / "metrics.jsonl"):
        found = {k.removeprefix(HELD_OUT): v for k, v in row.items() if k.startswith(HELD_OUT)}
        if found:
            return found
    return default


def _items(state: train.TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "rng": jax.random.key_data(state.rng), "extra": state.extra}
    return {"params": state.params, "opt_state": state.opt_state, "rest": rest}


def _save(saver: Checkpointer, step: int, state: train.TrainState, batches: Any) -> None:
    data = json.dumps(batches.get_state()).encode()
    saver.save(step, {**_items(state), "data": data})


def _restore(saver: Checkpointer, state: train.TrainState, batches: Any) -> train.TrainState:
    abstract = {**abstract_like(_items(state)), "data": bytes}
    try:
        step, items = saver.restore(None, abstract)
    except ValueError as error:
        raise CheckpointError(f"{error}. Give this run another --workdir") from error
    batches.set_state(json.loads(items["data"]))
    logger.info("resumed at step %d from %s", step, saver.directory)
    rest: Any = items["rest"]
    return dataclasses.replace(
        state,
        step=rest["step"],
        params=items["params"],
        opt_state=items["opt_state"],
        extra=rest["extra"],
        rng=jax.random.wrap_key_data(rest["rng"]),
    )


def _save_weights(task: Task, state: train.TrainState, workdir: Path) -> dict[str, str]:
    """Final weights as safetensors, one file a network: {file name: SHA-256}."""
    folder = workdir / "weights"
    digests = {}
    for name, tree in task.weights_of(state.params, state.extra).items():
        path = folder / f"{name}.safetensors"
        host = jax.tree.map(host_array, tree)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            facts = {"name": task.config.name, "task": task.config.task}
            digests[path.name] = save_safetensors(path, host, facts)
    return digests
