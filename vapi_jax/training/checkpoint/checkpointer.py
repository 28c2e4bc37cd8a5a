"""Saves and restores a run's state, one folder per step.

Orbax writes a step into a temporary folder and renames it when complete, so a killed save leaves only
what is ignored. But bytes that flip on disk later are restored without complaint as wrong numbers, and a
missing file stops the run although an older step may be whole. So each step also holds a manifest (see
`checkpoint.manifest`), committed by the same rename; `restore` checks every array against it
and goes back to the newest older step that verifies.
"""

from __future__ import annotations

import datetime
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vapi_jax.common.trees import unflatten
from vapi_jax.training.checkpoint.digests import (
    ManifestSave,
    copied,
    described,
    dtype_of,
    gather_text,
    wrong_arrays,
)
from vapi_jax.training.checkpoint.errors import CheckpointError, Damage, brief, files_named
from vapi_jax.training.checkpoint.handlers import write_copies_once
from vapi_jax.training.checkpoint.manifest import (
    MANIFEST,
    ArrayFacts,
    ManifestError,
    facts_digest,
    read_manifest,
)

logger = logging.getLogger(__name__)

PyTree = Any


def abstract_like(tree: PyTree) -> PyTree:
    """The ShapeDtypeStructs (with sharding) of a tree of arrays: what `Checkpointer.restore` wants."""

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf), sharding=sharding)

    return jax.tree.map(abstract, tree)


class Checkpointer:
    """The checkpoints of one run.

    A state is a dict of named items. An item is a pytree of arrays ("params", "opt_state", ...: each
    can be restored without the others). Beside them go facts: named JSON-able values (configuration,
    place in the data), the same on every process.

    All methods are collective: every process calls them with the same arguments.

    Args:
      directory: made if absent; used by this run only.
      keep_last: how many of the newest steps stay. Two, so that there is one to go back to.
      keep_every: steps that are a multiple of it stay for good; 0 for none.
    """

    def __init__(self, directory: str | Path, keep_last: int = 2, keep_every: int = 0):
        self.directory = Path(directory).absolute()
        write_copies_once()
        policies: list[Any] = [checkpoint_managers.LatestN(keep_last)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            ),
        )
        self._damaged: dict[int, str] = {}
        self._cleaned = False
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """Complete steps on disk, oldest first, without those that `restore` found damaged."""
        return sorted(set(self._manager.all_steps()) - self._damaged.keys())

    def latest_step(self) -> int | None:
        """The newest step, or None. A save that was killed does not count."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: Mapping[str, PyTree], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Saves a state; returns once its values are copied, hashes and writes in the background.

        The arrays may be donated at once. Steps that `restore` found damaged are removed first.

        Raises:
          ValueError: the directory holds this step or a newer one (another run's, or one that this run
            chose not to continue from); an item has a reserved name or holds no array, or a key.
          CheckpointError: this or the save before it could not be written.
        """
        self.wait()
        facts = facts or {}
        latest = self.latest_step()
        if latest is not None and latest >= step:
            raise ValueError(
                f"cannot save step {step}: {self.directory} already holds step {latest}. Continue from"
                " that one, use another directory, or delete the newer steps"
            )
        saves: dict[str, ocp.args.CheckpointArgs] = {}
        arrays = {}
        for item, tree in state.items():
            leaves = _named_leaves(item, tree)
            if item == MANIFEST or item in facts:
                raise ValueError(f"the item name {item!r} is taken")
            if not leaves:
                raise ValueError(f"item {item!r} holds no array")
            for name, leaf in leaves.items():
                if jax.dtypes.issubdtype(dtype_of(leaf), jax.dtypes.prng_key):
                    raise ValueError(f"{name} is a JAX key: save its jax.random.key_data")
                arrays[name] = copied(leaf)
            saves[item] = ocp.args.StandardSave(tree)
        for item, value in facts.items():
            saves[item] = ocp.args.JsonSave(json.loads(json.dumps(value)))
        self._check_space(step, sum(array.nbytes for array in arrays.values()))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        digests = {item: facts_digest(value) for item, value in facts.items()}
        saves[MANIFEST] = ManifestSave(step, now, arrays, digests)
        self._saving = step
        try:
            self._clean()
            # force: whether a step is due is the caller's decision.
            self._manager.save(step, args=ocp.args.Composite(**saves), force=True)
        except Exception as error:
            raise self._not_saved(brief(error)) from error

    def restore(
        self, step: int | None, abstract: Mapping[str, PyTree], facts: Sequence[str] = ()
    ) -> tuple[int, dict[str, Any]]:
        """Restores the newest step that verifies, at most `step`.

        Args:
          step: where to begin; None for the newest.
          abstract: item -> pytree of ShapeDtypeStruct with the sharding wanted (any mesh, not only the
            one it was saved from). Items left out are not read.
          facts: names of the facts wanted.

        Returns:
          (the step restored, item or fact -> value). A warning names every step passed over and its
          damage.

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
                state = self._restore_step(candidate, abstract, facts)
            except Damage as damage:
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
            manifest = read_manifest(self.directory / str(step))
        except ManifestError as error:
            raise CheckpointError(f"step {step} in {self.directory}: {error}") from error
        found = {
            name.removeprefix(f"{item}/"): jax.ShapeDtypeStruct(facts.shape, facts.dtype)
            for name, facts in manifest.arrays.items()
            if name.startswith(f"{item}/")
        }
        if not found:
            raise CheckpointError(f"step {step} in {self.directory} holds no item {item!r}")
        return unflatten(found)

    def damage(self, step: int) -> str:
        """What is wrong with a step, "" if nothing: reads every item, one at a time, on one device."""
        try:
            manifest = read_manifest(self.directory / str(step))
            for item in manifest.items:
                if item in manifest.facts:
                    self._restore_step(step, {}, [item])
                else:
                    self._restore_step(step, {item: self._saved_tree(step, item)}, [])
        except (ManifestError, ValueError, Damage) as error:
            return str(error)
        return ""

    def _saved_tree(self, step: int, item: str) -> PyTree:
        """An item's ShapeDtypeStructs in the structure that orbax noted, which may hold lists."""
        try:
            handler = ocp.StandardCheckpointHandler()
            metadata = handler.metadata(self._manager.directory / str(step) / item)
            return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), metadata.tree)
        except Exception as error:
            raise Damage(f"{self.directory / str(step) / item}: {brief(error)}") from error

    def _restore_step(
        self, step: int, abstract: Mapping[str, PyTree], facts: Sequence[str]
    ) -> dict[str, Any]:
        directory = self.directory / str(step)
        damage = ""
        values: Any = {}
        try:
            manifest = read_manifest(directory)
            for item, tree in abstract.items():
                self._check_same_model(step, item, tree, manifest.arrays)
            if missing := [item for item in facts if item not in manifest.facts]:
                raise ValueError(f"step {step} in {self.directory} holds no {missing[0]!r}")
            values = self._read(step, abstract, facts)
        except (ManifestError, Damage) as error:
            damage = str(error)
        # From here on every process must take the same way, so what one has found is everybody's.
        _raise_together(damage)
        wrong = [item for item in facts if facts_digest(values[item]) != manifest.facts[item]]
        leaves = {
            n: leaf for item in abstract for n, leaf in _named_leaves(item, values[item]).items()
        }
        wrong += wrong_arrays(leaves, manifest.arrays)
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise Damage(
                f"the values of {', '.join(wrong[:5])}{more} in {directory} differ from the SHA-256"
                " digest taken when they were saved"
            )
        return values

    def _check_same_model(
        self, step: int, item: str, tree: PyTree, arrays: Mapping[str, ArrayFacts]
    ) -> None:
        """Raises ValueError where names, shapes or dtypes are not those of the checkpoint."""
        have = {name: spec for name, spec in arrays.items() if name.split("/")[0] == item}
        want = _named_leaves(item, tree)
        where = f"step {step} in {self.directory} is of another model"
        if difference := sorted(have.keys() ^ want.keys()):
            side = "only in the checkpoint" if difference[0] in have else "not in the checkpoint"
            raise ValueError(f"{where}: {difference[0]} is {side} ({len(difference)} names differ)")
        for name, leaf in want.items():
            saved, wanted = described(have[name]), described(leaf)
            if saved != wanted:
                raise ValueError(f"{where}: {name} was saved as {saved}, wanted {wanted}")

    def _read(self, step: int, abstract: Mapping[str, PyTree], facts: Sequence[str]) -> Any:
        reads: dict[str, ocp.args.CheckpointArgs] = {
            item: ocp.args.StandardRestore(jax.tree.map(_with_sharding, tree))
            for item, tree in abstract.items()
        }
        reads |= {item: ocp.args.JsonRestore() for item in facts}
        values = {}
        for item, args in reads.items():  # one by one, to be able to say which one is damaged
            try:
                found = self._manager.restore(step, args=ocp.args.Composite(**{item: args}))
            except Exception as error:
                # Whatever a storage layer may raise on a broken or missing file. The caller passes
                # over this step, says so, and raises if no step is left.
                folder = self.directory / str(step) / item
                files = files_named(error, folder) or str(folder)
                raise Damage(f"{files}: {brief(error)}") from error
            values[item] = found[item]
        return values

    def _check_space(self, step: int, nbytes: int) -> None:
        """Refuses what cannot fit before it is begun: a save that fails on its way is messier."""
        wanted = nbytes
        if (latest := self.latest_step()) is not None:  # compressed, as this one will be
            files = (self.directory / str(latest)).rglob("*")
            wanted = sum(path.stat().st_size for path in files if path.is_file())
        free = shutil.disk_usage(self.directory).free
        if free < wanted:
            self._saving = step
            raise self._not_saved(f"it takes about {wanted:,} bytes, and {free:,} are free")

    def _not_saved(self, reason: str) -> CheckpointError:
        kept = ", ".join(map(str, self._committed())) or "none"
        return CheckpointError(
            f"step {self._saving} could not be saved in {self.directory}: {reason}. Nothing"
            f" saved before is lost (steps: {kept}). Put right what is wrong (disk full? read-only?"
            " quota?) and run the same command again"
        )

    def _committed(self) -> list[int]:
        """Steps on disk, asked of the disk: the manager counts a failed one."""
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

    def _clean(self) -> None:
        """Before a save: removes damaged steps and, once, what killed saves have left."""
        for step in sorted(self._damaged.keys() & set(self._manager.all_steps())):
            self._manager.delete(step)
        self._damaged.clear()
        if not self._cleaned and jax.process_index() == 0:
            for left in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left)
        self._cleaned = True

    def check(self) -> None:
        """Raises CheckpointError if a save in the background has failed; waits for nothing."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._not_saved(brief(error)) from error

    def wait(self) -> None:
        """Waits for the save in progress; raises CheckpointError if it fails."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(brief(error)) from error

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            logger.error("%s", failure)  # the error under way says why the run ends


# --- helpers --------------------------------------------------------------------------------------


def _raise_together(damage: str) -> None:
    """Raises `Damage` on every process if one has found any. A collective across processes."""
    if found := dict.fromkeys(text for text in gather_text(damage) if text):
        raise Damage("; ".join(found))


def _named_leaves(item: str, tree: PyTree) -> dict[str, Any]:
    """'params/layers/kernel' -> leaf, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        "/".join([item, jax.tree_util.keystr(path, simple=True, separator="/")]).rstrip("/"): leaf
        for path, leaf in leaves
    }


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """Without a sharding orbax would ask for the devices it was saved from, which may not exist."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
