"""Checkpoints that notice damage: orbax, plus a SHA-256 digest of every array, plus a walk back.

Orbax writes a step into a temporary folder and renames it when complete, so a killed save leaves only
what is ignored. But bytes that flip on disk later are restored without complaint as wrong numbers, and a
missing file stops the run although an older step may be whole. So each step also holds a manifest (item
`manifest`, committed by the same rename) of shapes, dtypes and digests; `restore` checks every array
against it and goes back to the newest older step that verifies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from vapi_jax.sharding import host_array
from vapi_jax.weights import unflatten

logger = logging.getLogger(__name__)

PyTree = Any
MANIFEST = "manifest"


class CheckpointError(RuntimeError):
    """No usable checkpoint: says which steps were tried, what is wrong with each, and what to do."""


def abstract_like(tree: PyTree) -> PyTree:
    """The ShapeDtypeStructs (with sharding) of a tree of arrays: what `Checkpointer.restore` wants."""

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(np.shape(leaf), _dtype(leaf), sharding=sharding)

    return jax.tree.map(abstract, tree)


def _named_leaves(item: str, tree: PyTree) -> dict[str, Any]:
    """'params/layers/kernel' -> leaf, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        "/".join([item, jax.tree_util.keystr(path, simple=True, separator="/")]).rstrip("/"): leaf
        for path, leaf in leaves
    }


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _describe(leaf: Any) -> dict[str, Any]:
    """What an array must look like, without its values: {"shape", "dtype"}."""
    return {"shape": list(np.shape(leaf)), "dtype": str(_dtype(leaf))}


def array_digest(leaf: Any) -> str:
    """SHA-256 of an array's bytes in C order: independent of its sharding."""
    host = np.ascontiguousarray(host_array(leaf))
    return hashlib.sha256(host.reshape(-1).view(np.uint8).data).hexdigest()


def _gather_text(value: bytes) -> list[str]:
    """The bytes of every process, in order of process, as text. A collective across processes."""
    if jax.process_count() == 1:
        return [value.decode()]
    length = int(multihost_utils.process_allgather(np.int64(len(value))).max())
    # Trailing zeros: JSON text holds none, so they can be cut off again.
    padded = np.frombuffer(value.ljust(length, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]


def _text_digest(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


class Checkpointer:
    """Saves and restores a run's state, one folder per step.

    The state is a dict of named items. An item is a pytree of arrays ("params", "opt_state", ...: each can
    be restored without the others) or `bytes` of UTF-8 text (the state of the data iterator as JSON,
    which may differ between processes: each gets its own back).

    All methods are collective: every process calls them with the same arguments.

    Args:
      directory: made if absent; used by this run only.
      keep_last: how many of the newest steps stay. Two, so that there is one to go back to.
      asynchronous: `save` returns once the values are copied and hashed, and the files are written in
        the background. The arrays may be donated at once. `close` (or `wait`) waits.
    """

    def __init__(self, directory: str | Path, keep_last: int = 2, asynchronous: bool = True):
        self.directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(keep_last),
                enable_async_checkpointing=asynchronous,
            ),
        )
        self._damaged: dict[int, str] = {}
        self._cleaned = False

    def steps(self) -> list[int]:
        """Complete steps on disk, oldest first, without those that `restore` found damaged."""
        return sorted(set(self._manager.all_steps()) - self._damaged.keys())

    def latest_step(self) -> int | None:
        """The newest step, or None. A save that was killed does not count."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Mapping[str, PyTree | bytes]) -> None:
        """Saves a state.

        Steps that `restore` found damaged are removed first.

        Raises:
          ValueError: the directory holds this step or a newer one (another run's, or one that this run
            chose not to continue from); an item has a reserved name or holds no array.
        """
        latest = self.latest_step()
        if latest is not None and latest >= step:
            raise ValueError(
                f"cannot save step {step}: {self.directory} already holds step {latest}. Continue from"
                " that one, use another directory, or delete the newer steps"
            )
        self._clean()
        saves: dict[str, ocp.args.CheckpointArgs] = {}
        arrays: dict[str, dict[str, Any]] = {}
        texts: dict[str, str] = {}
        for item, value in state.items():
            if item == MANIFEST:
                raise ValueError(f"the item name {MANIFEST!r} is reserved")
            if isinstance(value, bytes):
                gathered = _gather_text(value)
                texts[item] = _text_digest(gathered)
                saves[item] = ocp.args.JsonSave({"processes": gathered})
                continue
            leaves = _named_leaves(item, value)
            if not leaves:
                raise ValueError(f"item {item!r} holds no array")
            for name, leaf in leaves.items():
                arrays[name] = _describe(leaf) | {"sha256": array_digest(leaf)}
            saves[item] = ocp.args.StandardSave(value)
        manifest = {"step": step, "arrays": arrays, "texts": texts}
        saves[MANIFEST] = ocp.args.JsonSave(manifest)
        # force: whether a step is due is the caller's decision.
        self._manager.save(step, args=ocp.args.Composite(**saves), force=True)

    def restore(
        self, step: int | None, abstract: Mapping[str, PyTree]
    ) -> tuple[int, dict[str, PyTree | bytes]]:
        """Restores the newest step that verifies, at most `step`.

        Args:
          step: where to begin; None for the newest.
          abstract: item -> pytree of ShapeDtypeStruct with the sharding wanted (any mesh, not only the
            one it was saved from), or the type `bytes` for an item of bytes. Items left out are not read.

        Returns:
          (the step restored, item -> value). A warning names every step passed over and its damage.

        Raises:
          ValueError: the checkpoint is of another model (names, shapes or dtypes differ): going back
            would not help.
          CheckpointError: no step verifies, or there is none.
        """
        self.wait()
        begin = self.latest_step() if step is None else step
        candidates = [s for s in reversed(self.steps()) if begin is not None and s <= begin]
        if not candidates:
            wanted = "" if step is None else f" at or before step {step}"
            raise CheckpointError(f"{self.directory} holds no checkpoint{wanted}")
        if step is not None and candidates[0] != step:
            logger.warning("%s holds no step %d: trying %d", self.directory, step, candidates[0])
        found: dict[int, str] = {}
        for candidate in candidates:
            try:
                state = self._restore_step(candidate, abstract)
            except _Damage as damage:
                found[candidate] = str(damage)
                self._damaged[candidate] = str(damage)
                logger.warning(
                    "DAMAGED CHECKPOINT: step %d in %s cannot be used: %s. Trying the step before it.",
                    candidate,
                    self.directory,
                    damage,
                )
                continue
            if found:
                logger.warning(
                    "Restored step %d instead of %s: the work in between is done again, and the damaged"
                    " steps are removed at the next save. Check the disk.",
                    candidate,
                    ", ".join(map(str, found)),
                )
            return candidate, state
        tried = "\n".join(f"  step {s}: {reason}" for s, reason in found.items())
        raise CheckpointError(
            f"no checkpoint in {self.directory} can be used:\n{tried}\n"
            "Bring the folder back from a copy, or start again with another work directory."
        )

    def abstract_item(self, step: int, item: str) -> PyTree:
        """What `restore` wants for an item, from the step's own manifest: for readers without a model.

        Raises:
          CheckpointError: if the manifest cannot be read or knows no such item.
        """
        try:
            manifest = self._read(step, {MANIFEST: ocp.args.JsonRestore()})[MANIFEST]
        except _Damage as damage:
            raise CheckpointError(f"step {step} in {self.directory}: {damage}") from damage
        found = {
            name.removeprefix(f"{item}/"): jax.ShapeDtypeStruct(facts["shape"], facts["dtype"])
            for name, facts in manifest["arrays"].items()
            if name.startswith(f"{item}/")
        }
        if not found:
            raise CheckpointError(f"step {step} in {self.directory} holds no item {item!r}")
        return unflatten(found)

    def _restore_step(self, step: int, abstract: Mapping[str, PyTree]) -> dict[str, PyTree | bytes]:
        manifest = self._read(step, {MANIFEST: ocp.args.JsonRestore()})[MANIFEST]
        try:
            arrays: dict[str, dict[str, Any]] = manifest["arrays"]
            texts: dict[str, str] = manifest["texts"]
        except (KeyError, TypeError) as error:
            raise _Damage(f"its {MANIFEST} is incomplete") from error
        reads: dict[str, ocp.args.CheckpointArgs] = {}
        for item, tree in abstract.items():
            if tree is bytes:
                if item not in texts:
                    raise ValueError(f"step {step} in {self.directory} holds no text item {item!r}")
                reads[item] = ocp.args.JsonRestore()
            else:
                self._check_same_model(step, item, tree, arrays)
                reads[item] = ocp.args.StandardRestore(jax.tree.map(_with_sharding, tree))
        values = self._read(step, reads)
        state: dict[str, PyTree | bytes] = {}
        wrong: list[str] = []
        for item, tree in abstract.items():
            if tree is bytes:
                gathered = values[item].get("processes", [])
                if _text_digest(gathered) != texts[item]:
                    wrong.append(item)
                    continue
                if len(gathered) != jax.process_count():
                    raise ValueError(
                        f"step {step} in {self.directory}: {item!r} was saved by {len(gathered)}"
                        f" processes and cannot be given to {jax.process_count()}"
                    )
                state[item] = gathered[jax.process_index()].encode()
            else:
                state[item] = values[item]
                for name, leaf in _named_leaves(item, values[item]).items():
                    if array_digest(leaf) != arrays[name]["sha256"]:
                        wrong.append(name)
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise _Damage(
                f"the values of {', '.join(wrong[:5])}{more} differ from the SHA-256 digest taken when"
                " they were saved"
            )
        return state

    def _check_same_model(
        self, step: int, item: str, tree: PyTree, arrays: dict[str, dict[str, Any]]
    ) -> None:
        """Raises ValueError where names, shapes or dtypes are not those of the checkpoint."""
        have = {name: spec for name, spec in arrays.items() if name.split("/")[0] == item}
        want = _named_leaves(item, tree)
        where = f"step {step} in {self.directory} is of another model"
        if difference := sorted(have.keys() ^ want.keys()):
            side = "only in the checkpoint" if difference[0] in have else "not in the checkpoint"
            raise ValueError(f"{where}: {difference[0]} is {side} ({len(difference)} names differ)")
        for name, leaf in want.items():
            saved = {"shape": have[name]["shape"], "dtype": have[name]["dtype"]}
            if saved != _describe(leaf):
                raise ValueError(f"{where}: {name} was saved as {saved}, wanted {_describe(leaf)}")

    def _read(self, step: int, items: dict[str, ocp.args.CheckpointArgs]) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            # Whatever a storage layer may raise on a broken or missing file. The caller passes over this
            # step, says so, and raises if no step is left.
            first_line = (str(error).splitlines() or [""])[0][:300]
            raise _Damage(
                f"reading {', '.join(items)}: {type(error).__name__}: {first_line}"
            ) from error

    def _clean(self) -> None:
        """Before a save: removes damaged steps and, once, what killed saves have left."""
        for step in sorted(self._damaged.keys() & set(self._manager.all_steps())):
            self._manager.delete(step)
        self._damaged.clear()
        if not self._cleaned and jax.process_index() == 0:
            for left in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left)
        self._cleaned = True

    def wait(self) -> None:
        """Waits for the save in progress; raises what it raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Damage(Exception):
    """A step that cannot be used; internal, turned into a warning or a CheckpointError."""


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """Without a sharding orbax would ask for the devices it was saved from, which may not exist."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
