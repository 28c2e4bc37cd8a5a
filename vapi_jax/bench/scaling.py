"""What a step sends, and a small model of its time on more devices from those bytes.

Not a claim but arithmetic under stated assumptions; what is measured replaces it. Devices form nodes of
`Link.node`: parameters are split over the devices of a node (axis "fsdp") and gradients averaged
between nodes (axis "data").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vapi_jax.common.trees import flatten
from vapi_jax.parallel.fsdp import AXIS, LAYERS
from vapi_jax.parallel.sharding import tree_shardings


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by how a step moves them.

    Attributes:
      layers: of split matrices of the layers, gathered a layer at a time.
      rest: of other split matrices, gathered once a step.
      whole: of what every device has whole.
    """

    layers: int
    rest: int
    whole: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in one step.

    Attributes:
      gathers: parameters, within its node.
      scatter: gradients to the devices that keep them, within its node.
      across: the averaging of gradients between nodes.
    """

    gathers: float
    scatter: float
    across: float


@dataclass(frozen=True)
class Link:
    """A machine: FLOP/s and bytes/s of one device, each as much as can be had of it.

    Attributes:
      name: what it is.
      flops: dense bfloat16 peak.
      utilisation: share of the peak that the compute of a step reaches.
      node: devices of a node.
      inside, between: bytes/s that a device sends within a node and to others.
      achieved: share of those that collectives reach.
    """

    name: str
    flops: float
    utilisation: float
    node: int
    inside: float
    between: float
    achieved: float


H100 = Link(
    "H100 SXM, NVLink inside 8, 400 Gb/s a device between", 989e12, 0.5, 8, 450e9, 50e9, 0.8
)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step on `devices`: with all gathers hidden behind compute, and with nothing hidden."""

    devices: int
    images: int
    compute: float
    gathers: float
    reduction: float

    @property
    def hidden(self) -> float:
        return max(self.compute, self.gathers) + self.reduction

    @property
    def exposed(self) -> float:
        return self.compute + self.gathers + self.reduction


def count_parameters(params: Any, mesh: Any) -> Parameters:
    """Sorts a tree of arrays or shapes by its layout on a mesh."""
    counts = {"layers": 0, "rest": 0, "whole": 0}
    layout = flatten(jax.tree.map(lambda s: s.spec, tree_shardings(params, mesh)))
    for path, leaf in flatten(params).items():
        split = mesh.shape[AXIS] > 1 and AXIS in (layout[path] or PartitionSpec())
        kind = "whole" if not split else "layers" if path.startswith(LAYERS) else "rest"
        counts[kind] += leaf.size
    return Parameters(**counts)


def traffic(
    parameters: Parameters, dtype: str, microbatches: int, fsdp: int, nodes: int
) -> Traffic:
    """What each device sends in a step, by the algorithms on a ring.

    All in the compute dtype: layers are gathered forward and backward of every microbatch, other split
    parameters once. Gradients move in float32: within a node in every microbatch, between nodes once.
    """
    share, nodes_share = (fsdp - 1) / fsdp, (nodes - 1) / nodes
    gathered = 2 * microbatches * parameters.layers + parameters.rest
    split, whole = 4 * (parameters.layers + parameters.rest), 4 * parameters.whole
    return Traffic(
        gathers=share * gathered * jnp.dtype(dtype).itemsize,
        scatter=share * (microbatches * split + 2 * whole),
        across=2 * nodes_share * (split / fsdp + whole),
    )


def predict(
    parameters: Parameters,
    dtype: str,
    flops_per_image: float,
    images: int,
    devices: int,
    microbatch: int,
    link: Link = H100,
) -> Prediction:
    """The time of a step.

    Args:
      parameters: of the generator.
      dtype: compute dtype.
      flops_per_image: hardware FLOPs that a step spends on an image.
      images: of one step, over all devices; at least one for each.
      devices: how many.
      microbatch: images of a forward and backward on one device.
      link: the machine.

    Raises:
      ValueError: for fewer images than devices, or devices that do not fill nodes.
    """
    fsdp = min(devices, link.node)
    if images % devices or devices % fsdp:
        raise ValueError(f"{images} images on {devices} devices in nodes of {link.node}")
    own = images // devices
    sent = traffic(parameters, dtype, -(-own // min(microbatch, own)), fsdp, devices // fsdp)
    inside, between = link.inside * link.achieved, link.between * link.achieved
    return Prediction(
        devices=devices,
        images=images,
        compute=own * flops_per_image / (link.flops * link.utilisation),
        gathers=sent.gathers / inside,
        reduction=sent.scatter / inside + sent.across / between,
    )
