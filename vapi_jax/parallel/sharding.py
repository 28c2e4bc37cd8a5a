"""The mesh ("data", "fsdp"), and ONE ordered table from parameter names to their layout on it.

The batch is split over both axes; parameters, their gradients and optimizer moments over "fsdp".
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.trees import flatten, unflatten

AXES = ("data", "fsdp")
BATCH_AXES = AXES

Rules = Sequence[tuple[str, PartitionSpec]]
"""(pattern of a path, layout of what it matches)."""

# First match wins; searched in the "/"-joined path, so that optimizer moments follow their
# parameters. Scanned layers carry a leading layer axis, which is never split.
PARTITION_RULES: Rules = (
    (r"(^|/)(tokenizer|discriminator|perceptual|rewards)/", PartitionSpec()),
    (r"norm\w*/", PartitionSpec()),
    (r"/bias$", PartitionSpec()),
    (r"layers/attention/(wqkv|wq|wk|wv)/kernel$", PartitionSpec(None, "fsdp", None)),
    (r"layers/attention/wo/kernel$", PartitionSpec(None, None, "fsdp")),
    (r"layers/feed_forward/(w1|w3)/kernel$", PartitionSpec(None, "fsdp", None)),
    (r"layers/feed_forward/w2/kernel$", PartitionSpec(None, None, "fsdp")),
    (r"/lora_[ab]$", PartitionSpec()),
    (r"embed\w*/embedding$", PartitionSpec(None, "fsdp")),
    (r"uncond_embedding$", PartitionSpec()),
    (r"/kernel$", PartitionSpec("fsdp", None)),
    (r"(^|/)(count|step|rng)$", PartitionSpec()),
)


class DevicesError(ExpectedError, RuntimeError):
    """The devices that JAX was told to use cannot be used."""


def all_devices() -> list[jax.Device]:
    """`jax.devices()`.

    Raises:
      DevicesError: JAX_PLATFORMS asks for what is not there.
    """
    try:
        return jax.devices()
    except (
        AssertionError,
        RuntimeError,
    ) as error:  # without CUDA, JAX fails an assertion of its own
        asked = jax.config.values["jax_platforms"]
        if not asked:
            raise
        raise DevicesError(
            f"JAX_PLATFORMS={asked}: JAX finds no such devices here. Install it with the extra for them "
            f"(cuda12, cuda13, tpu), or set JAX_PLATFORMS=cpu. {error}".rstrip()
        ) from error


def make_mesh(data: int = -1, fsdp: int = 1, devices: Any = None) -> Mesh:
    """A mesh of all devices; -1 for one of the two axes means "what is left".

    Raises:
      ValueError: if the axes do not multiply to the number of devices.
      DevicesError: see `all_devices`.
    """
    devices = all_devices() if devices is None else devices
    sizes, count = [data, fsdp], len(devices)
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = count // known if known > 0 else 0
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp} does not fit {count} device(s): the two must multiply "
            f"to {count}; -1 for one of them takes what is left"
        )
    # jax.make_mesh would give Explicit axes, under which sharded gathers and contractions raise.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def split_axes() -> tuple[str, ...]:
    """The axes that the batch is split over inside the `jax.shard_map` around the caller; () outside."""
    try:
        return tuple(name for name in BATCH_AXES if jax.lax.axis_size(name))
    except NameError:  # of an axis that nothing has bound
        return ()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = ()) -> PartitionSpec:
    """The layout of a parameter by its name.

    `rules` go before the table. An axis that the mesh does not divide stays whole; scalars are replicated.

    Raises:
      ValueError: for a name that no row of the table matches, or a row of another rank.
    """
    if not shape:
        return PartitionSpec()
    for pattern, spec in (*rules, *PARTITION_RULES):
        if re.search(pattern, path):
            if len(spec) not in (0, len(shape)):
                raise ValueError(f"{path} has shape {shape}, its rule {pattern} is {spec}")
            axes = [
                axis if axis is None or size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, shape, strict=False)
            ]
            return PartitionSpec(*axes)
    raise ValueError(f"no partition rule for {path!r}: add a row to PARTITION_RULES")


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """NamedShardings for a tree of arrays or ShapeDtypeStructs, by `rules` and the table above."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def put_sharded(
    read: Mapping[str, np.ndarray] | Callable[[str, Any], np.ndarray],
    target: Any,
    shardings: Any,
) -> Any:
    """Arrays laid out as `shardings`, each device taking only its slices.

    Args:
      read: path -> numpy array, or a function (path, index) -> that slice of it.
      target: nested dict of ShapeDtypeStructs.
      shardings: nested dict of NamedShardings, like `target`.
    """
    wanted, layout = flatten(target), flatten(shardings)

    def load(path: str) -> jax.Array:
        leaf = wanted[path]

        def piece(index: Any) -> np.ndarray:
            part = read(path, index) if callable(read) else read[path][index]
            return np.asarray(part, dtype=leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, layout[path], piece)

    return unflatten({path: load(path) for path in wanted})


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A process's host arrays as global arrays, the leading axis over all devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def shard_whole(batch: Any, mesh: Mesh) -> Any:
    """Arrays that every process holds whole as global arrays, the leading axis over all devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Numbers, arrays and keys that every process holds as global arrays, a copy on every device."""

    def put(x: Any) -> jax.Array:
        if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                put(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, replicated(mesh), lambda index: host[index])

    return jax.tree.map(put, tree)


def whole_copy(params: Any, mesh: Mesh, narrowed: Callable[[Any], Any]) -> Any:
    """Parameters in any layout, narrowed where they are and then sent whole to every device of a mesh.

    `narrowed` is compiled already, and kept by the caller.
    """
    return jax.device_put(narrowed(params), replicated(mesh))


def without_virtual_devices(mesh: Mesh) -> Mesh:
    """The mesh, or the first of one process's virtual CPU devices.

    Those share its cores and only wait for each other where nothing is divided among them.
    """
    first = mesh.devices.flat[0]
    if first.platform != "cpu" or jax.process_count() > 1 or mesh.size == 1:
        return mesh
    return make_mesh(1, 1, [first])


def local_rows(leaf: jax.Array) -> np.ndarray:
    """This process's rows of an array whose leading axis is split over all devices."""
    shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    # Asked for explicitly: steps run where transfers that nobody asked for are errors.
    return np.concatenate(jax.device_get([shard.data for shard in shards]))


def host_array(leaf: Any) -> np.ndarray:
    """The whole array on this host, whatever its sharding. A collective across processes."""
    if isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if not leaf.is_fully_addressable:
            if leaf.is_fully_replicated:
                leaf = leaf.addressable_data(0)
            else:
                leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
