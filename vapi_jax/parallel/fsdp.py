"""Fully sharded parameters inside `jax.shard_map`: gathered a layer at a time, gradients reduced once.

Each device works on its own images with explicit collectives. A layer's parameters are gathered where
the layer runs (and again in its backward pass) and dropped. Their gradients must not be reduced
there, or every microbatch would send them: so the gathered shard is a constant, and its gradient
goes to a stand-in of its full shape that nothing reads. That is what a device accumulates over
microbatches. One reduce-scatter at the end of the step gives every device the mean of its shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from vapi_jax.common.trees import flatten, unflatten

Tree = Mapping[str, Any]

AXIS, REPLICAS = "fsdp", "data"

_LAYERS = "layers/"
_SHARD, _STAND_IN = "shard", "stand_in"


def split_axis(spec: PartitionSpec) -> int | None:
    """The axis along which a device has a part of a parameter only, if any."""
    return spec.index(AXIS) if AXIS in spec and jax.lax.axis_size(AXIS) > 1 else None


def open_view(params: Tree, specs: Tree, dtype: Any) -> tuple[dict[str, Array], dict[str, Array]]:
    """The parameters as a device sees them in a step; inside `jax.shard_map`.

    Args:
      params: this device's shards.
      specs: PartitionSpecs of the parameters.
      dtype: that the layers compute in: their matrices are sent in it.

    Returns:
      (variables, shards), flat by path. Gradients are taken of the variables: stand-ins for the
      layers' split parameters, which `shards` holds, and everything else as it is, whole.
    """
    layout, variables, shards = flatten(specs), {}, {}
    for path, leaf in flatten(params).items():
        axis = split_axis(layout[path])
        if axis is None:
            variables[path] = leaf
        elif path.startswith(_LAYERS):
            shards[path] = leaf.astype(dtype)
            shape = list(leaf.shape)
            shape[axis] *= jax.lax.axis_size(AXIS)
            variables[path] = jnp.zeros(shape, dtype)
        else:
            variables[path] = jax.lax.all_gather(leaf, AXIS, axis=axis, tiled=True)
    return variables, shards


def join(variables: Mapping[str, Array], shards: Mapping[str, Array]) -> dict[str, Any]:
    """The parameter tree for the model; split layers carry shard and stand-in for `assemble`."""
    joined = {
        path: {_SHARD: shards[path], _STAND_IN: leaf} if path in shards else leaf
        for path, leaf in variables.items()
    }
    return unflatten(joined)


def is_split(layers: Tree) -> bool:
    """Whether a tree from `join` has parameters that `assemble` must put together."""
    return any(path.endswith(f"/{_SHARD}") for path in flatten(layers))


def assemble(layer: Tree) -> dict[str, Any]:
    """One layer's parameters, whole: gathered from all devices, and differentiable in the stand-ins."""
    if layer.keys() == {_SHARD, _STAND_IN}:
        raise TypeError("a single parameter is no tree")
    return {
        name: _whole(node[_SHARD], node[_STAND_IN])
        if isinstance(node, Mapping) and node.keys() == {_SHARD, _STAND_IN}
        else assemble(node)
        if isinstance(node, Mapping)
        else node
        for name, node in layer.items()
    }


def _gather(shard: Array, shape: tuple[int, ...]) -> Array:
    axis = next(i for i in range(shard.ndim) if shard.shape[i] != shape[i])
    with jax.named_scope("gather"):
        return jax.lax.all_gather(shard, AXIS, axis=axis, tiled=True)


@jax.custom_jvp
def _whole(shard: Array, stand_in: Array) -> Array:
    return _gather(shard, stand_in.shape)


@_whole.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    shard, stand_in = primals
    return _gather(shard, stand_in.shape), tangents[1]


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A `jax.checkpoint` policy: a layer's backward pass gathers again and recomputes nothing else."""
    return bool(primitive.name != "all_gather")


def reduce_gradients(gradients: Mapping[str, Array], specs: Tree, mesh: Mesh) -> dict[str, Any]:
    """The mean over devices of whole gradients, each device keeping its shard: once per step."""
    layout, reduced = flatten(specs), {}
    for path, leaf in gradients.items():
        axis = split_axis(layout[path])
        with jax.named_scope("reduce_gradients"):
            if axis is None:
                total = jax.lax.psum(leaf, (REPLICAS, AXIS))
            else:
                total = jax.lax.psum_scatter(leaf, AXIS, scatter_dimension=axis, tiled=True)
                if mesh.shape[REPLICAS] > 1:
                    total = jax.lax.psum(total, REPLICAS)
        reduced[path] = total / mesh.size
    return unflatten(reduced)
