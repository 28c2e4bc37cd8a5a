"""Low-rank adapters (LoRA, arXiv 2106.09685) of the linear maps in a transformer's layers.

A map of weights W becomes y = x W + (α / r) (x A) B. B starts at zero, so a fresh adapter changes nothing.
Its A and B are parameters beside W: `split` takes the two apart, for whoever trains adapters over a
frozen base, `union` puts them together as the model takes them, and `merged` is the same model without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vapi_jax.common.options import Count, Positive
from vapi_jax.common.trees import flatten, unflatten

Tree = dict[str, Any]

A, B = "lora_a", "lora_b"

Target = Literal["wqkv", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]


@dataclasses.dataclass(frozen=True)
class LoRA:
    """`policy.lora` of a recipe.

    Attributes:
      rank: r, of every adapter.
      alpha: α; what an adapter adds is scaled by α / r.
      targets: the maps that are adapted; () for all of a layer's.
    """

    rank: Count = 16
    alpha: Positive = 32.0
    targets: tuple[Target, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether the map of this name has an adapter."""
        return not self.targets or name in self.targets


def settled(lora: LoRA | Mapping[str, Any] | None, fused_qkv: bool) -> LoRA | None:
    """The options, which a stored configuration has as a mapping.

    Raises:
      ValueError: a target that layers of this kind do not have.
      TypeError: an unknown option.
    """
    if isinstance(lora, Mapping):
        lora = LoRA(**{**lora, "targets": tuple(lora.get("targets", ()))})
    attention = ("wqkv",) if fused_qkv else ("wq", "wk", "wv")
    known = (*attention, "wo", "w1", "w2", "w3")
    if lora is not None and (other := [name for name in lora.targets if name not in known]):
        raise ValueError(f"lora.targets: a layer has no {', '.join(other)}; it has {known}")
    return lora


class Adapted(nn.Module):
    """A linear map without bias, and its adapter."""

    features: int
    lora: LoRA
    std: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*N I"]) -> Float[Array, "*N O"]:
        init, rank = nn.initializers.normal(self.std), self.lora.rank
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        a = self.param(A, nn.initializers.lecun_normal(), (x.shape[-1], rank))
        b = self.param(B, nn.initializers.zeros, (rank, self.features))
        x, kernel, a, b = nn.dtypes.promote_dtype(x, kernel, a, b, dtype=self.dtype)
        return x @ kernel + self.lora.scale * ((x @ a) @ b)


def split(params: Tree) -> tuple[Tree, Tree]:
    """(the base, the adapters) of a model's parameters."""
    flat = flatten(params)
    mine = {path: leaf for path, leaf in flat.items() if path.endswith((f"/{A}", f"/{B}"))}
    rest = {path: leaf for path, leaf in flat.items() if path not in mine}
    return unflatten(rest), unflatten(mine)


def union(base: Mapping[str, Any], adapters: Mapping[str, Any]) -> Tree:
    """The parameters that `split` took apart; leaves are what they are."""
    both = dict(base)
    for name, tree in adapters.items():
        both[name] = union(both[name], tree) if isinstance(tree, Mapping) and name in both else tree
    return both


def merged(params: Tree, lora: LoRA) -> Tree:
    """The parameters of the same model without adapters: W + (α / r) A B."""
    base, adapters = (flatten(part) for part in split(params))
    for path, a in adapters.items():
        if path.endswith(A):
            stem = path.removesuffix(A)
            kernel, b = base[f"{stem}kernel"], adapters[f"{stem}{B}"]
            change = lora.scale * jnp.matmul(a, b, precision="highest")
            base[f"{stem}kernel"] = kernel + change.astype(kernel.dtype)
    return unflatten(base)
