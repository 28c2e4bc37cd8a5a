"""The loop round the step: input, metrics, health, held-out evaluation, checkpoints, final weights.

Nothing here knows what is being trained; see `vapi_jax.methods`. What a run goes on from after a break
is in `vapi_jax.training.resume`.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview
from safetensors import SafetensorError

from vapi_jax.common.files import write_atomically
from vapi_jax.common.host_calls import raise_failure
from vapi_jax.common.progress import ProgressBar, Timer
from vapi_jax.data import SkippedImages, make_dataset
from vapi_jax.evaluation.held_out import HELD_OUT, HeldOut
from vapi_jax.evaluation.in_training import SAMPLED, Sampled, sampled_of
from vapi_jax.evaluation.samples import SampleJudge, on_judging_devices
from vapi_jax.methods import HealthError, Method
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.method import NothingLearned
from vapi_jax.models.loading import CONFIG
from vapi_jax.parallel import distributed
from vapi_jax.parallel.preemption import Stopped, StopRequest
from vapi_jax.parallel.sharding import host_array, shard_batch
from vapi_jax.training import resume, train
from vapi_jax.training.checkpoint import Checkpointer, CheckpointError
from vapi_jax.training.logging import TENSORBOARD, MetricsWriter
from vapi_jax.training.profiling import Profiler
from vapi_jax.training.train import TrainState
from vapi_jax.weights.store import save_safetensors

logger = logging.getLogger(__name__)


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


@dataclasses.dataclass
class Run:
    """What a finished run hands to its report."""

    method: Method
    params: Any
    start_params: Any  # the parameters at step 0, where they were asked for
    extra: Any  # what the method keeps beside the parameters
    frozen: dict[str, Any]
    first: dict[str, float]  # held-out metrics before the first step
    last: dict[str, float]  # and after the last
    held_out: HeldOut
    judge: SampleJudge | None  # of samples in training, where there were any
    timer: Timer
    parameters: dict[str, int]  # network -> number of parameters
    weights: dict[str, str]  # file -> SHA-256
    skipped: int  # steps whose gradient was not finite


def _batches(config: TrainConfig, workdir: Path) -> Any:
    """This process's batches without end, and its list of images that cannot be read."""
    process, count = jax.process_index(), jax.process_count()
    skipped = SkippedImages.of_process(workdir, process)
    size = config.batch_size // count
    return iter(make_dataset(config.data, "train", size, config.seed, process, count, skipped))


def fit(
    method: Method,
    workdir: Path,
    *,
    keep_start: bool = False,
    stop: StopRequest | None = None,
    resume_with_changes: bool = False,
    profile: range | None = None,
) -> Run:
    """Trains to its last step and saves the weights under `workdir`/weights.

    A run whose `workdir`/checkpoints holds a checkpoint goes on from it, and ends with the bits that
    it would have had without the break.

    Args:
      method: what to train.
      workdir: receives config.json, metrics.jsonl, tensorboard/, checkpoints/ and weights/.
      keep_start: also hand back the parameters of step 0 (a second copy on the mesh).
      stop: asked after every step whether to save and stop.
      resume_with_changes: go on also where the configuration is not that of the checkpoint.
      profile: steps to trace, into `workdir`/tensorboard.

    Returns:
      The final parameters and what a report needs.

    Raises:
      CheckpointError: no checkpoint can be used, they are of another configuration, or one could not
        be written.
      HealthError: a step's metrics say that training is broken.
      Stopped: it was asked to stop, and has saved.
      WeightsError: weights to start from are missing or do not fit.
    """
    config = method.config
    checkpoints = config.checkpoint
    with (
        Checkpointer(
            workdir / "checkpoints", checkpoints.keep_last, checkpoints.keep_every
        ) as saver,
        distributed.telling(),  # before closing what waits for all processes
    ):
        timer = Timer()
        facts = resume.read_facts(saver, config, resume_with_changes)
        if facts is None and (workdir / "metrics.jsonl").exists():
            logger.warning(
                "%s holds no checkpoint, though a run has been here: beginning again at step 0",
                saver.directory,
            )
        with timer.phase("setup"):
            optimizer = train.make_optimizer(config.optimizer, config.steps)
            frozen = train.load_frozen(method)
            shapes = train.abstract_state(method, optimizer, config.seed)
            shardings = train.state_shardings(shapes, method.mesh, method.partition_rules)
            based = method.keeps_start
            state, start = None, None
            if facts is None or keep_start or based:
                state, _ = train.init_state(method, optimizer, config.seed)
                start = jax.tree.map(jnp.copy, state.params) if keep_start or based else None
            origin = resume.origin_of(method, frozen, start)
            progress = resume.Progress()
            if facts is not None:
                resume.check_origin(facts["origin"], origin, resume_with_changes)
                state = None  # memory for what is restored
                state, progress = resume.restore(saver, shapes, shardings)
                timer.resume(progress.seconds)
            assert state is not None
            if based:
                frozen["base"] = start
            batches = _batches(config, workdir)
            resume.seek(batches, progress.images, config)
            if jax.process_index() == 0:
                _write_description(workdir, config, state.params)
        writer = MetricsWriter(
            workdir,
            active=jax.process_index() == 0,
            after=-1 if facts is None else progress.step,
        )
        with writer:
            judged = on_judging_devices(method, frozen)
            trainer = _Trainer(
                method=method,
                step_fn=train.make_train_step(method, optimizer, shardings),
                held_out=HeldOut(*judged),
                sampled=sampled_of(*judged),
                frozen=frozen,
                batches=batches,
                saver=saver,
                writer=writer,
                timer=timer,
                stop=stop or StopRequest(),
                progress=progress,
                facts={"origin": origin, "code": resume.code_facts()},
                profiler=Profiler(profile, workdir / TENSORBOARD),
            )
            state = trainer.finish(state)
    with timer.phase("checkpoint"):
        weights = _save_weights(method, state, workdir)
    parameters = {
        name: count(tree) for name, tree in method.weights_of(state.params, state.extra).items()
    }
    parameters |= {name: count(tree) for name, tree in frozen.items() if name == "tokenizer"}
    return Run(
        method=method,
        params=state.params,
        start_params=start if keep_start else None,
        extra=state.extra,
        frozen=frozen,
        first=progress.first,
        last=progress.last,
        held_out=trainer.held_out,
        judge=trainer.sampled.judge if trainer.sampled else None,
        timer=timer,
        parameters=parameters,
        weights=weights,
        skipped=progress.skipped,
    )


def _write_description(workdir: Path, config: TrainConfig, params: Any) -> None:
    """config.json and parameters.txt, for people and for whoever reads the weights later."""
    text = json.dumps(resume.config_facts(config), indent=2)
    write_atomically(workdir / CONFIG, f"{text}\n")
    overview = parameter_overview.get_parameter_overview(params, include_stats="sharding")
    write_atomically(workdir / "parameters.txt", f"{overview}\n")


@dataclasses.dataclass
class _Trainer:
    """The steps of one life of a run. Everything that a later life needs is in `progress`."""

    method: Method
    step_fn: Any
    held_out: HeldOut
    sampled: Sampled | None
    frozen: Mapping[str, Any]
    batches: Any
    saver: Checkpointer
    writer: MetricsWriter
    timer: Timer
    stop: StopRequest
    progress: resume.Progress
    facts: Mapping[str, Any]  # "origin" and "code", which do not change while it lives
    profiler: Profiler
    pending: tuple[int, Any] | None = None  # a step whose metrics nobody has looked at yet
    clock: _Clock = dataclasses.field(default_factory=_Clock)
    line: ProgressBar = dataclasses.field(init=False)

    def finish(self, state: TrainState) -> TrainState:
        """The state after the last step, saved."""
        config, progress = self.method.config, self.progress
        if not progress.first:
            progress.first = self._judge(0, state.params)
            self._sample(0, state.params)
        self.clock.lap()
        with (
            ProgressBar(config.steps, config.name, first_step=progress.step) as self.line,
            contextlib.ExitStack() as unsaved,
            self.profiler,
        ):
            for step in range(progress.step + 1, config.steps + 1):
                self.profiler.before(step, state)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state = self._step(step, state)
                self.profiler.before(step + 1, state)
                if progress.step + 1 == step:  # before that, compiling: nothing to save
                    unsaved.enter_context(self.stop.unsaved())
                last = step == config.steps
                if last or step % config.eval.every == 0:
                    self._settle()
                    self._judge(step, state.params)
                    self.clock.lap()
                if self.sampled is not None and (last or self.sampled.due(step)):
                    self._settle()
                    self._sample(step, state.params)
                    self.clock.lap()
                stopping = self.stop.asked(step)
                every = config.checkpoint.every
                if last or stopping or (every and step % every == 0):
                    self._save(step, state)
                self.saver.check()
                if stopping:
                    self.saver.wait()
                    raise Stopped(
                        f"{self.stop.name}: stopped at step {step} of {config.steps}, saved in "
                        f"{self.saver.directory}"
                    )
            self.saver.wait()
        return state

    def _step(self, step: int, state: TrainState) -> TrainState:
        with self.timer.phase("input"):
            batch = shard_batch(self.method.prepare(next(self.batches)), self.method.mesh)
        with self.timer.phase("step"), jax.transfer_guard("disallow"):
            state, values = self.step_fn(state, self.frozen, batch)
        self._settle()
        self.pending = step, values
        return state

    def _settle(self) -> None:
        """Metrics of a step, when another has followed already: nothing waits for them."""
        if self.pending is None:
            return
        config, (step, values) = self.method.config, self.pending
        self.pending = None
        with self.timer.phase("step"):
            scalars = {name: float(value) for name, value in jax.device_get(values).items()}
        raise_failure()
        if scalars["nonfinite"]:
            self._skip(step, scalars)
        if scalars["nonfinite"] < 1.0:
            self._check(step, scalars)
        self.progress.images += config.batch_size
        scalars["images_per_second"] = config.batch_size / self.clock.lap()
        if step % config.log_every == 0 or step == config.steps or scalars["nonfinite"]:
            self.writer.write(step, scalars)
        shown = {name: scalars[name] for name in self.method.headline if name in scalars}
        self.line.update(step, config.batch_size, shown)

    def _check(self, step: int, scalars: Mapping[str, float]) -> None:
        """Ends a run that is broken, or that has learned nothing for as long as its method puts up with."""
        method, progress = self.method, self.progress
        try:
            method.check_health(step, scalars)
        except NothingLearned as error:
            progress.idle += 1
            most = min(method.patience, method.config.steps)
            told = f"{error} So many such steps in a row end a run: {most}."
            if progress.idle >= most:
                raise HealthError(told) from error
            if progress.idle == 1:
                logger.warning(told)
        else:
            progress.idle = 0

    def _skip(self, step: int, scalars: Mapping[str, float]) -> None:
        """Counts a step with a gradient that was not finite, and whose update therefore changed nothing."""
        config, updates = self.method.config, self.method.updates
        what = f"step {step}: the gradient is not finite (norm {scalars['grad_norm']})"
        if (lost := round(scalars["nonfinite"] * updates)) < updates:
            what = f"step {step}: the gradient of {lost} of {updates} updates is not finite"
        if config.on_nonfinite == "stop":
            raise HealthError(
                f"{what}. It was not applied, and nothing is saved after it. Look at the loss, the "
                "learning rate and the data; on_nonfinite='skip' goes on without such steps"
            )
        self.progress.skipped += 1
        if self.progress.skipped > config.max_skipped:
            raise HealthError(
                f"{what}. That is one more than the max_skipped={config.max_skipped} steps that may "
                "be left out. Look at the loss, the learning rate and the data"
            )
        logger.warning(
            "%s and was not applied (%d of at most %d)",
            what,
            self.progress.skipped,
            config.max_skipped,
        )

    def _judge(self, step: int, params: Any) -> dict[str, float]:
        with self.timer.phase("held_out"):
            found = self.held_out(params)
        self.writer.write(step, {HELD_OUT + name: value for name, value in found.items()})
        self.progress.last = found
        return found

    def _sample(self, step: int, params: Any) -> None:
        if self.sampled is None:
            return
        with self.timer.phase("sampled"):
            found, grid = self.sampled(params)
        self.writer.write(step, {SAMPLED + name: value for name, value in found.items()})
        self.writer.write_images(step, {SAMPLED + "grid": grid})

    def _save(self, step: int, state: TrainState) -> None:
        self._settle()  # a broken step must not be saved
        with self.timer.phase("checkpoint"):
            self.progress.seconds = self.timer.summary()
            progress = dataclasses.replace(self.progress, step=step)
            facts = resume.facts_of(self.method.config, progress, **self.facts)
            self.saver.save(step, resume.items_of(state), facts)


def _save_weights(method: Method, state: train.TrainState, workdir: Path) -> dict[str, str]:
    """Final weights as safetensors, one file a network: {file name: SHA-256}."""
    folder = workdir / "weights"
    digests = {}
    for name, tree in method.weights_of(state.params, state.extra).items():
        path = folder / f"{name}.safetensors"
        host = jax.tree.map(host_array, tree)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            facts = {"name": method.config.name, "method": method.config.method}
            try:
                digests[path.name] = save_safetensors(path, host, facts)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path} could not be written: {error}. The state after the last step is saved: "
                    "put this right and run the same command again"
                ) from error
    return digests
