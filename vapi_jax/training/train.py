"""The one trainer: state and the step. What is trained is a `Method`.

Order of a step in the loop: restore (once) > input > step > metrics of the step before > held-out
evaluation > save, all before the next batch is asked for; so a checkpoint always holds the state of
the data iterator that belongs to it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PRNGKeyArray

from vapi_jax.methods import Method
from vapi_jax.methods.config import OptimizerConfig
from vapi_jax.methods.method import EMA
from vapi_jax.models.loading import load_weights
from vapi_jax.parallel import compiler, fsdp
from vapi_jax.parallel.sharding import (
    BATCH_AXES,
    Rules,
    batch_sharding,
    local_rows,
    replicate,
    replicated,
    shard_batch,
    tree_shardings,
)


@flax.struct.dataclass
class TrainState:
    """All that a step changes, and the key it derives its randomness from."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    extra: Any
    rng: PRNGKeyArray


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant or cosine to a tenth of the peak at the last step."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=0.1)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: not on norms, biases and the unconditional caption.

    The released text models keep that caption as a constant.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(getattr(key, "key", key)) for key in path]
        constant = names[-1] in ("bias", "scale", "uncond_embedding")
        return not (constant or any("norm" in name for name in names))

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with decoupled decay; `steps` are those of the run."""
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.max_grad_norm <= 0.0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _of_schedule(path: tuple[Any, ...], _: Any) -> bool:
    """Whether a leaf of an optimizer's state is where its schedule stands."""
    return bool(getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState")


# --- state ----------------------------------------------------------------------------------------


def abstract_state(
    method: Method, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state's shapes and dtypes, nothing computed."""
    return jax.eval_shape(functools.partial(_fresh_state, method, optimizer), jax.random.key(seed))


def _fresh_state(
    method: Method, optimizer: optax.GradientTransformation, rng: PRNGKeyArray
) -> TrainState:
    init_rng, _ = jax.random.split(rng)
    return _state_of(method, optimizer, rng, method.init(init_rng))


def _state_of(
    method: Method, optimizer: optax.GradientTransformation, rng: PRNGKeyArray, params: Any
) -> TrainState:
    """Step 0 with these parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        extra=method.init_extra(params),
        rng=jax.random.split(rng)[1],
    )


def state_shardings(state: TrainState, mesh: Mesh, rules: Rules = ()) -> Any:
    """The layout of the whole state: parameters, moments and averages by name, the rest replicated."""
    whole = jax.tree.map(lambda _: replicated(mesh), state)
    params = tree_shardings(state.params, mesh, rules)
    return dataclasses.replace(
        whole,
        params=params,
        opt_state=tree_shardings(state.opt_state, mesh, rules),
        extra={**whole.extra, EMA: params} if EMA in state.extra else whole.extra,
    )


def init_state(
    method: Method, optimizer: optax.GradientTransformation, seed: int
) -> tuple[TrainState, Any]:
    """A fresh state, and its shardings (a `TrainState` of NamedShardings).

    Parameters are born on the devices that keep them; where the method names weights to start from,
    each device reads its own slices of the file. No device ever holds a full copy of a split array.

    Raises:
      WeightsError: if the weights to start from do not fit.
    """
    shapes, rng = abstract_state(method, optimizer, seed), jax.random.key(seed)
    shardings = state_shardings(shapes, method.mesh, method.partition_rules)
    if method.init_from is None:
        make = functools.partial(_fresh_state, method, optimizer)
        return jax.jit(make, out_shardings=shardings)(rng), shardings
    loaded = load_weights(
        method.init_from, method.start_like(shapes.params), method.start_like(shardings.params)
    )
    make = functools.partial(_state_of, method, optimizer)
    params = method.with_start(loaded, functools.partial(_init_part, method, shardings, rng))
    # Donated, or two copies would stand side by side for a moment.
    made = jax.jit(make, out_shardings=shardings, donate_argnums=1)(rng, params)
    return made, shardings


def _init_part(method: Method, shardings: Any, rng: PRNGKeyArray, name: str) -> Any:
    """One part of the fresh parameters in its layout: others, which weights cover, are not made."""

    def make(rng: PRNGKeyArray) -> Any:
        return method.init(rng)[name]

    return jax.jit(make, out_shardings=shardings.params[name])(jax.random.split(rng)[0])


# --- the step -------------------------------------------------------------------------------------


def split_microbatches(batch: Any, count: int, mesh: Mesh | None) -> Any:
    """[B, ...] -> [count, B/count, ...], every device keeping its own images.

    Microbatch i takes images i, i + count, ...: with the batch axis split over devices in order, no
    image moves. Without a mesh the batch is one device's own.
    """

    def split(x: Array) -> Array:
        x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
        if mesh is None:
            return x
        spec = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
        return jax.lax.with_sharding_constraint(x, spec)

    return jax.tree.map(split, batch)


Gradients = Callable[..., tuple[Any, dict[str, Array], Any]]
"""(state, frozen, rng, batch) -> gradients, microbatches' arrays for metrics, extra state."""


def per_device_gradients(method: Method, shardings: Any, count: int) -> Gradients:
    """Every device differentiates the loss of its own images; collectives are those of `fsdp`.

    For methods whose loss is a mean over images that do not see each other.
    """
    mesh, local = method.mesh, dataclasses.replace(method, local=True)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings.params)
    dtype = jnp.dtype(method.compute_dtype)

    def on_device(
        layout: Any,
        params: Any,
        extra: Any,
        frozen: dict[str, Any],
        batch: Any,
        rng: PRNGKeyArray,
        step: Array,
    ) -> tuple[Any, Any]:
        if "backbone" in frozen:
            backbone = fsdp.view(frozen["backbone"], layout["backbone"], dtype)
            frozen = {**frozen, "backbone": backbone}
        if "base" in frozen:
            base = local.whole(fsdp.view(frozen["base"], specs, dtype), frozen)
            frozen = {**frozen, "base": base}

        def loss(params: Any, part: Any) -> Any:
            tree = local.whole(fsdp.view(params, specs, dtype), frozen)
            value, (aux, _) = local.loss(tree, extra, frozen, part, rng, step)
            return value, aux

        def body(total: Any, part: Any) -> Any:
            grads, aux = jax.grad(loss, has_aux=True)(params, part)
            return jax.tree.map(jnp.add, total, grads), aux

        micro = split_microbatches(batch, count, None)
        zeros = jax.tree.map(jnp.zeros_like, params)
        if count == 1:
            total, aux = body(zeros, jax.tree.map(lambda x: x[0], micro))
            aux = jax.tree.map(lambda x: x[None], aux)
        else:
            total, aux = jax.lax.scan(body, zeros, micro)
        mean = jax.tree.map(lambda g: g / count, total)
        return fsdp.mean_gradients(mean, specs, mesh), aux

    def gradients(state: TrainState, frozen: Any, rng: PRNGKeyArray, batch: Any) -> Any:
        frozen_specs = jax.tree.map(
            lambda s: s.spec, tree_shardings(frozen, mesh, method.partition_rules)
        )
        seen = {name: value for name, value in state.extra.items() if name != EMA}
        grads, aux = jax.shard_map(
            functools.partial(on_device, frozen_specs),
            mesh=mesh,
            in_specs=(
                specs,
                PartitionSpec(),
                frozen_specs,
                PartitionSpec(BATCH_AXES),
                PartitionSpec(),
                PartitionSpec(),
            ),
            out_specs=(specs, PartitionSpec(None, BATCH_AXES)),
            check_vma=False,
        )(state.params, seen, frozen, batch, rng, state.step)
        return grads, aux, state.extra

    return gradients


def whole_batch_gradients(method: Method, shardings: Any, count: int) -> Gradients:
    """The loss sees a whole microbatch over all devices, and the compiler places collectives.

    For methods whose images see each other: batch statistics, code usage.
    """

    def one(state: TrainState, frozen: Any, rng: PRNGKeyArray, batch: Any, extra: Any) -> Any:
        loss = jax.grad(method.loss, has_aux=True)
        grads, (aux, extra) = loss(state.params, extra, frozen, batch, rng, state.step)
        return jax.lax.with_sharding_constraint(grads, shardings.params), aux, extra

    def gradients(state: TrainState, frozen: Any, rng: PRNGKeyArray, batch: Any) -> Any:
        micro = split_microbatches(batch, count, method.mesh)

        def body(carry: Any, part: Any) -> Any:
            total, extra = carry
            grads, aux, extra = one(state, frozen, rng, part, extra)
            return (jax.tree.map(jnp.add, total, grads), extra), aux

        if count == 1:
            first = jax.tree.map(lambda x: x[0], micro)
            grads, aux, extra = one(state, frozen, rng, first, state.extra)
            return grads, jax.tree.map(lambda x: x[None], aux), extra
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (grads, extra), aux = jax.lax.scan(body, (zeros, state.extra), micro)
        return jax.tree.map(lambda g: g / count, grads), aux, extra

    return gradients


Step = Callable[
    [TrainState, Mapping[str, Any], Mapping[str, Any]], tuple[TrainState, dict[str, Array]]
]
"""(state, frozen weights, batch) -> (next state, metrics)."""


def make_train_step(
    method: Method, optimizer: optax.GradientTransformation, shardings: Any
) -> Step:
    """A step of the run; it consumes the state that it is given.

    One compiled program where the method has no rollout of its own and updates once. Otherwise the
    programs `method.rollout` and update, with `method.review` on the host between them.
    """
    update = make_update(method, optimizer, shardings)
    if not method.rolls_out and method.updates == 1:
        return update
    rollout = jax.jit(_rollout_of(method), compiler_options=compiler.options(method.mesh))
    reviews = type(method).review is not Method.review
    together = jax.jit(over_updates)
    turns = [replicate(np.int32(turn), method.mesh) for turn in range(method.updates)]

    def train_step(
        state: TrainState, frozen: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> tuple[TrainState, dict[str, Array]]:
        experience = dict(batch)
        if method.rolls_out:
            experience = rollout(state, dict(frozen), experience)
        if reviews:
            added = method.review(jax.tree.map(local_rows, experience))
            experience |= shard_batch(added, method.mesh)
        found = []
        for turn in turns:
            state, metrics = update(state, frozen, experience, turn)
            found.append(metrics)
        return state, together(found)

    return train_step


def over_updates(found: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Metrics of a step from those of its updates: of those that were applied, where any was.

    Means, and of names with "max" or "min" among their words the extreme; "nonfinite" is the share of updates
    that were not applied.

    Args:
      found: names -> scalars, the same names of each update.
    """
    updates = jax.tree.map(lambda *x: jnp.stack(x), *found)
    applied = updates["nonfinite"] == 0.0
    applied |= ~applied.any()

    def of_step(name: str, values: Array) -> Array:
        if name == "nonfinite":
            return values.mean()
        if "max" in name.split("_"):
            return jnp.max(values, where=applied, initial=-jnp.inf)
        if "min" in name.split("_"):
            return jnp.min(values, where=applied, initial=jnp.inf)
        return jnp.mean(values, where=applied)

    return {name: of_step(name, values) for name, values in updates.items()}


def _rollout_of(method: Method) -> Callable[..., dict[str, Any]]:
    def rollout(state: TrainState, frozen: Any, batch: dict[str, Any]) -> dict[str, Any]:
        rng = jax.random.fold_in(state.rng, state.step)
        batch = {**batch, "index": jnp.arange(method.config.batch_size)}
        with jax.named_scope("rollout"):
            params = method.whole(state.params, frozen)
            found = method.rollout(params, frozen, batch, rng, state.step)
        return jax.lax.with_sharding_constraint(
            jax.lax.stop_gradient(found), batch_sharding(method.mesh)
        )

    return rollout


def make_update(
    method: Method, optimizer: optax.GradientTransformation, shardings: Any
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The jitted update (state, frozen weights, experience, turn) -> (state, metrics); the state is donated.

    `turn` counts the updates on one rollout, and may be left out where there is one. An update whose
    gradient is not finite changes nothing but the step number, and its metric `nonfinite` is 1.
    """
    config, updates = method.config, method.updates
    count = config.batch_size // (config.microbatch_size or config.batch_size)
    schedule = learning_rate(config.optimizer, config.steps)
    way = per_device_gradients if method.independent_images else whole_batch_gradients
    gradients = way(method, shardings, count)

    def update(
        state: TrainState,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        turn: Array | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        done = jnp.int32(1)
        if turn is not None:
            rng = jax.random.fold_in(rng, turn)
            done = (turn == updates - 1).astype(jnp.int32)
        batch = {**batch, "index": jnp.arange(config.batch_size)}
        grads, aux, extra = gradients(state, dict(frozen), rng, batch)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            # Its own count is of updates that were applied, and the schedule is one of steps.
            opt_state = optax.tree.set(state.opt_state, _of_schedule, count=state.step)
            changes, opt_state = optimizer.update(grads, opt_state, state.params)
            params = optax.apply_updates(state.params, changes)
        summary = method.summarize(aux)
        params, extra = method.after_update(
            params, extra, jax.random.fold_in(rng, 1), state.step, summary
        )
        metrics = {
            **summary,
            "grad_norm": norm,
            "nonfinite": 1.0 - jnp.isfinite(norm),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        updated = dataclasses.replace(state, params=params, opt_state=opt_state, extra=extra)
        kept = jax.tree.map(
            lambda new, old: jax.lax.select(jnp.isfinite(norm), new, old), updated, state
        )
        return dataclasses.replace(kept, step=state.step + done), metrics

    whole = replicated(method.mesh)
    return jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(shardings, whole),
        compiler_options=compiler.options(method.mesh),
    )


def load_frozen(method: Method) -> dict[str, Any]:
    """The method's frozen weights on the mesh."""
    frozen = method.load_frozen()
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]),
        frozen,
        tree_shardings(frozen, method.mesh, method.partition_rules),
    )
