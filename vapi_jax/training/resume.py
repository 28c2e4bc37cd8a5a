"""What a run goes on from: the items of a checkpoint, and whether the run is still the same one.

A checkpoint holds, each as an item of its own: `params`, `opt_state`, `rest` (step, random key, extra
state), and as JSON `data` (how many images have been consumed: valid under any number of devices and
processes), `config`, `code` (versions), `origin` (digests of the frozen weights) and `progress`
(held-out metrics, seconds, skipped steps: what report and summary need of the whole run).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import vapi_jax
from vapi_jax.common.versions import versions
from vapi_jax.methods import Method, find_method
from vapi_jax.methods.config import TrainConfig, to_dict
from vapi_jax.parallel.sharding import replicated
from vapi_jax.training.checkpoint import Checkpointer, CheckpointError, array_digest
from vapi_jax.training.train import TrainState

logger = logging.getLogger(__name__)

FACTS = ("config", "code", "origin", "data", "progress")
CUT = ("mesh.", "cpu_devices", "microbatch_size")
"""Of these the numbers of some methods depend (`Method.depends_on_cut`), which is warned about."""
FREE = (
    # How it is computed: the same numbers, but for the order in which they are rounded; see `CUT`.
    *CUT, "decode_chunk", "policy.remat", "data.num_threads",
    "data.prefetch", "init.verify",
    # What is written and measured beside the training.
    "checkpoint.", "log_every", "eval.every", "eval.compare", "eval.controls", "eval.unseen",
    "eval.samples", "eval.seeds", "eval.temperatures", "eval.grid_per_class", "eval.grid_classes",
    "eval.sampled_every", "eval.sampled", "eval.cfg_scales", "eval.allow_singular",
    # What is put up with.
    "on_nonfinite", "max_skipped", "data.max_unreadable",
)  # fmt: skip
"""Options that may change between the lives of a run: names, and sections ending in a full stop."""


# --- is it the same run? --------------------------------------------------------------------------


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of nested mappings."""
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{name}.{key}" if name else str(key))
    return found


def config_facts(config: TrainConfig) -> dict[str, Any]:
    """The configuration as it comes back from a file: tuples are lists."""
    return to_dict(config)


def config_changes(there: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Options in which a saved configuration differs from this one: "steps: 100 -> 200".

    `FREE` options do not count, nor do more steps where nothing but the end depends on their number.
    An option that the saved one does not know has its default there.
    """
    return [
        _line(name, *values)
        for name, values in _differences(there, config).items()
        if not _is_free(name, *values, config)
    ]


_MISSING = object()


def _differences(there: Mapping[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Option -> its saved value and this one, where they differ."""
    bare = TrainConfig(name="", method="", options=type(config.options)(), section=config.section)
    defaults = flat(config_facts(bare))
    old, new = flat(there), flat(config_facts(config))
    pairs = {
        name: (old.get(name, defaults.get(name, _MISSING)), new.get(name, _MISSING))
        for name in sorted(old.keys() | new.keys())
    }
    return {name: (before, after) for name, (before, after) in pairs.items() if before != after}


def _line(name: str, *values: Any) -> str:
    shown = ["nothing" if value is _MISSING else json.dumps(value) for value in values]
    return f"{name}: {' -> '.join(shown)}"


def _is_free(name: str, before: Any, after: Any, config: TrainConfig) -> bool:
    if name == "steps":
        depends = find_method(config.method).depends_on_steps(config.options)
        return config.optimizer.schedule == "constant" and not depends and after > before
    return _is_among(name, FREE)


def _is_among(name: str, options: Sequence[str]) -> bool:
    return any(name.startswith(one) if one.endswith(".") else name == one for one in options)


def code_facts() -> dict[str, str]:
    """What computes: versions, a digest of this package's own source, the device, XLA's flags."""
    folder = Path(vapi_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return {
        **versions(),
        "source_sha256": digest.hexdigest(),
        "device": jax.devices()[0].device_kind,
        "devices": str(jax.device_count()),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def origin_of(method: Method, frozen: Any, start: Any) -> dict[str, str | None]:
    """`origin_facts` of a run's frozen weights and its parameters at step 0; fresh ones have no origin."""
    start = None if method.init_from is None else start
    return origin_facts(frozen, start, method.describe(), method.computed())


def origin_facts(
    frozen: Any,
    start: Any,
    condition: Mapping[str, Any] | None = None,
    computed: Mapping[str, Any] | None = None,
) -> dict[str, str | None]:
    """Digests of the weights that a run takes from files and does not train.

    Args:
      frozen, start: trees of them.
      condition: what the method says that its batches depend on; versions of libraries may change.
      computed: paths in `frozen` of what is no file's -> what it is computed of, known by that instead.
    """
    kept = {name: value for name, value in (condition or {}).items() if name != "libraries"}
    return {
        # Digests of before had what is computed in them, so they go by another name.
        "computed" if computed else "frozen": _tree_digest(frozen, computed),
        "start": _tree_digest(start),
        "condition": _digest(json.dumps(kept, sort_keys=True)) if kept else None,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tree_digest(tree: Any, computed: Mapping[str, Any] | None = None) -> str | None:
    """None where there is nothing, or where it would have to be gathered across processes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    if not leaves or not all(_is_here(leaf) for _, leaf in leaves):
        return None
    known = {name: json.dumps(of, sort_keys=True) for name, of in (computed or {}).items()}
    lines = []
    for path, leaf in leaves:
        of = known.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        lines.append(f"{jax.tree_util.keystr(path)} {array_digest(leaf) if of is None else of}\n")
    return _digest("".join(lines))


def _is_here(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


# --- progress -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Progress:
    """What of a run so far is neither an array nor a row of metrics.jsonl."""

    step: int = 0
    images: int = 0  # consumed by all processes: the place in the data
    first: dict[str, float] = dataclasses.field(default_factory=dict)  # held-out, before step 1
    last: dict[str, float] = dataclasses.field(default_factory=dict)  # held-out, the newest
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # per phase, all lives
    skipped: int = 0  # steps with a gradient that was not finite
    idle: int = 0  # steps in a row, up to the newest, that had nothing to learn


def read_facts(
    saver: Checkpointer, config: TrainConfig, with_changes: bool = False
) -> dict[str, Any] | None:
    """The facts of the newest checkpoint that can be read; None where there is none.

    Raises:
      CheckpointError: the checkpoints are of another configuration (all differences are listed), or
        none can be read.
    """
    if saver.latest_step() is None:
        return None
    try:
        step, facts = saver.restore(None, {}, FACTS)
    except ValueError as error:
        raise CheckpointError(f"{error}. Give this run another --workdir") from error
    changes = config_changes(facts["config"], config)
    if changes and not with_changes:
        raise CheckpointError(
            f"{saver.directory} holds step {step} of a run with another configuration:\n"
            + "".join(f"  {line}\n" for line in changes)
            + "Give the same options to go on with it, another --workdir for a run of its own, or "
            "--resume_with_changes to go on from there with the changed ones"
        )
    if changes:
        logger.warning("going on from step %d with changes: %s", step, "; ".join(changes))
    if step > config.steps:
        raise CheckpointError(
            f"{saver.directory} holds step {step}, and steps={config.steps}: nothing is left to do. "
            "Give another --workdir"
        )
    there, here = facts["code"], code_facts()
    if others := [f"{k}: {there.get(k)} -> {here[k]}" for k in here if there.get(k) != here[k]]:
        logger.warning(
            "what computes has changed since step %d, so the last bits may differ: %s",
            step,
            "; ".join(others),
        )
    found = _differences(facts["config"], config)
    cut = [_line(name, *values) for name, values in found.items() if _is_among(name, CUT)]
    cut += [line for line in others if line.startswith("devices: ") and "devices" in there]
    if cut and find_method(config.method).depends_on_cut(config):
        logger.warning(
            "dropout or statistics of method %s are of a part of a batch, and the parts have changed since "
            "step %d (%s): from here on the run is another than it would have been, and as good",
            config.method,
            step,
            "; ".join(cut),
        )
    return facts


def check_origin(saved: Mapping[str, Any], here: Mapping[str, Any], with_changes: bool) -> None:
    """Raises CheckpointError where frozen weights are not those that the run began with."""
    parts = {
        "frozen": "tokenizer and reward networks",
        "computed": "tokenizer, reward networks or prompts",
        "start": "the policy of step 0",
        "condition": "the encoder of captions",
    }
    wrong = [what for key, what in parts.items() if _differ(saved.get(key), here.get(key))]
    if not wrong:
        return
    message = f"weights that this run began with have changed since: {', '.join(wrong)}"
    if not with_changes:
        raise CheckpointError(
            f"{message}. Bring the old files back, give another --workdir, or --resume_with_changes"
        )
    logger.warning(message)


def _differ(saved: str | None, here: str | None) -> bool:
    return saved is not None and here is not None and saved != here


# --- the state as items ---------------------------------------------------------------------------


def items_of(state: TrainState) -> dict[str, Any]:
    """A state as the arrays of a checkpoint."""
    rest = {"step": state.step, "rng": jax.random.key_data(state.rng), "extra": state.extra}
    return {"params": state.params, "opt_state": state.opt_state, "rest": rest}


def facts_of(
    config: TrainConfig, progress: Progress, origin: Mapping[str, Any], code: Mapping[str, Any]
) -> dict[str, Any]:
    """A state's facts."""
    fields = dataclasses.asdict(progress)
    return {
        "config": config_facts(config),
        "code": code,
        "origin": origin,
        "data": {"images": fields.pop("images")},
        "progress": fields,
    }


def restore(saver: Checkpointer, shapes: TrainState, shardings: Any) -> tuple[TrainState, Progress]:
    """The newest state that verifies, in the wanted layout, and how far the run had come.

    Args:
      saver: whose checkpoints.
      shapes: a state of ShapeDtypeStructs.
      shardings: a `TrainState` of NamedShardings.

    Raises:
      CheckpointError: no checkpoint verifies, or they are of another model.
    """
    whole = replicated(shardings.step.mesh)
    layout = {
        "params": shardings.params,
        "opt_state": shardings.opt_state,
        "rest": {"step": whole, "rng": whole, "extra": shardings.extra},
    }
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(items_of, shapes),
        layout,
    )
    try:
        step, found = saver.restore(None, abstract, FACTS)
    except ValueError as error:
        raise CheckpointError(f"{error}. Give this run another --workdir") from error
    logger.info("going on from step %d in %s", step, saver.directory)
    rest = found["rest"]
    state = TrainState(
        step=rest["step"],
        params=found["params"],
        opt_state=found["opt_state"],
        extra=rest["extra"],
        rng=jax.random.wrap_key_data(rest["rng"]),
    )
    return state, Progress(**found["progress"], **found["data"])


def seek(batches: Any, images: int, config: TrainConfig) -> None:
    """Moves an iterator over training batches to where `images` have been consumed by all processes.

    Raises:
      CheckpointError: under another batch size that place is inside a batch.
    """
    number, rest = divmod(images, config.batch_size)
    if rest:
        raise CheckpointError(
            f"{images} images have been consumed, which is no whole number of batches of "
            f"{config.batch_size}: choose a batch_size that divides it"
        )
    state = batches.get_state()
    assert state.keys() == {"next_index"}, state  # the position in a grain.MapDataset of batches
    batches.set_state({"next_index": number})
