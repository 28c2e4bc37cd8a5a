"""Fully sharded parameters inside `jax.shard_map`: gathered a layer at a time, gradients scattered.

Each device works on its own images with explicit collectives. A split parameter is sent in the dtype
that layers compute in, whole where it is used (and again in the backward pass), and dropped. Its
gradient goes the way back: summed over devices in float32, each keeping its part. So nothing of a
parameter's full size outlives its layer, and a step sends 2 + 2 + 4 bytes of every parameter in bfloat16,
as often as it has microbatches: few large ones are best.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from vapi_jax.common.trees import flatten, unflatten

Tree = Mapping[str, Any]

AXIS, REPLICAS = "fsdp", "data"

LAYERS = "layers/"
"""Where the stacked parameters of a model's layers are."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """A device's part of a parameter of the layers, for `assemble` to gather.

    Attributes:
      shard: float32.
      axis: that is split, counted from the last, for `scan` takes the first away.
      dtype: of the whole.
    """

    shard: Array
    axis: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})


def split_axis(spec: PartitionSpec) -> int | None:
    """The axis along which a device has a part of a parameter only, if any."""
    return spec.index(AXIS) if AXIS in spec and jax.lax.axis_size(AXIS) > 1 else None


def view(params: Tree, specs: Tree, dtype: Any) -> dict[str, Any]:
    """The parameters as the model takes them in a step; inside `jax.shard_map`, and differentiable.

    Args:
      params: this device's shards, float32.
      specs: PartitionSpecs of the parameters.
      dtype: that split parameters are sent in: what every use casts them to.

    Returns:
      The same tree. Split parameters of the layers are `Split`, others whole, in float32.
    """
    layout, seen = flatten(specs), {}
    for path, leaf in flatten(params).items():
        axis = split_axis(layout[path])
        if axis is None:
            seen[path] = leaf
        elif path.startswith(LAYERS):
            seen[path] = Split(leaf, axis - leaf.ndim, dtype)
        else:
            seen[path] = _whole(leaf, axis, dtype, jnp.float32)
    return unflatten(seen)


def _is_split(node: Any) -> bool:
    return isinstance(node, Split)


def is_split(tree: Any) -> bool:
    """Whether a tree from `view` has parameters that `assemble` must put together."""
    return any(map(_is_split, jax.tree.leaves(tree, is_leaf=_is_split)))


def assemble(layer: Any) -> Any:
    """One layer's parameters, whole: gathered from all devices, and differentiable."""

    def whole(node: Any) -> Array:
        if not _is_split(node):
            return node
        return _whole(node.shard, node.axis + node.shard.ndim, node.dtype, node.dtype)

    return jax.tree.map(whole, layer, is_leaf=_is_split)


def _gathered(shard: Array, axis: int) -> Array:
    return jax.lax.all_gather(shard, AXIS, axis=axis, tiled=True)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _whole(shard: Array, axis: int, sent: Any, dtype: Any) -> Array:
    """Gathered in one dtype, delivered in another."""
    with jax.named_scope("gather"):
        return _gathered(shard.astype(sent), axis).astype(dtype)


@_whole.defjvp
def _(
    axis: int, sent: Any, dtype: Any, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    # Transposed, this gather of float32 adds gradients up in float32: of shares rounded to bfloat16 the
    # sum would lose what each is worth.
    with jax.named_scope("gather"):
        whole = _gathered(primals[0].astype(sent), axis).astype(dtype)
    with jax.named_scope("reduce_gradients"):
        return whole, _gathered(tangents[0], axis).astype(dtype)


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A `jax.checkpoint` policy: a layer's backward pass gathers again and recomputes nothing else."""
    return bool(primitive.name != "all_gather")


def mean_gradients(gradients: Tree, specs: Tree, mesh: Mesh) -> dict[str, Any]:
    """The mean over devices of gradients that `view` has scattered: what remains to be added up.

    Once a step: replicas of the shards, and parameters that are not split.
    """
    layout, reduced = flatten(specs), {}
    for path, leaf in flatten(gradients).items():
        axes = (REPLICAS, AXIS) if split_axis(layout[path]) is None else (REPLICAS,)
        with jax.named_scope("reduce_gradients"):
            reduced[path] = jax.lax.psum(leaf, axes) / mesh.size
    return unflatten(reduced)
