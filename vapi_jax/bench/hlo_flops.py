"""What a compiled program computes: FLOPs of matrix products and convolutions from the text of its HLO.

XLA's own cost analysis counts the body of a loop once, whatever the length of the loop, which leaves
out nearly all of a scanned transformer. Here loops count as often as they run. Element by element
work is left out: it is bound by memory, not by arithmetic.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from vapi_jax.bench.hlo import HloError, Instruction, instructions, shape_arrays


@dataclass(frozen=True)
class MatmulFlops:
    """Multiplications and additions of matrix products and convolutions, on one device.

    Attributes:
      dot: of matrix products, library calls included.
      convolution: of convolutions.
      exact: False if a loop of unknown length or a branch holds some.
      uncounted: custom calls whose work is not known, target -> executions.
    """

    dot: float
    convolution: float
    exact: bool
    uncounted: dict[str, int]

    @property
    def total(self) -> float:
        return self.dot + self.convolution


@dataclass(frozen=True)
class Product:
    """One matrix product, convolution or fused attention.

    Attributes:
      kind: "dot", "convolution" or "attention".
      operands: shapes of the first two, as printed.
      flops: of all its executions.
      instruction: where it stands.
    """

    kind: str
    operands: tuple[str, ...]
    flops: float
    instruction: Instruction

    @property
    def slow(self) -> bool:
        """Whether it runs at float32's speed: no operand is narrower.

        TPUs multiply float32 as bfloat16 unless more precision is asked for.
        """
        dtypes = {dtype for shape in self.operands for dtype, _ in shape_arrays(shape)}
        if ":T(" in self.instruction.shape:  # the tiles that TPUs lay arrays out in
            return dtypes == {"f32"} and "operand_precision={high" in self.instruction.attributes
        return dtypes == {"f32"}


def _window(attributes: str, key: str, rank: int, default: str) -> list[str]:
    """The values of one key of a window, an entry for each spatial axis."""
    window = re.search(r"window=\{([^}]*)\}", attributes)
    found = re.search(rf"\b{key}=(\S+)", window[1]) if window else None
    return found[1].split("x") if found else [default] * rank


def taps(
    size: int,
    out: int,
    window: int,
    stride: int = 1,
    low: int = 0,
    base: int = 1,
    dilation: int = 1,
    padding: bool = True,
) -> int:
    """Along one axis, the pairs of an output place and a tap of the kernel that are multiplied.

    Args:
      size, out, window: lengths of input, output and kernel.
      stride: of the kernel over the input.
      low: places of padding before the input.
      base: dilation of the input: its numbers lie so far apart, and the holes do not count.
      dilation: of the kernel.
      padding: whether taps on padding count: published counts have them, XLA's do not.
    """
    hits = 0
    for tap in range(window):
        first = tap * dilation - low
        places = (first + stride * i for i in range(out))
        hits += sum(p % base == 0 and (padding or 0 <= p <= (size - 1) * base) for p in places)
    return hits


def _convolution_flops(one: Instruction, shapes: Mapping[str, str], padding: bool) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None:
        raise HloError(f"convolution {one.name} has no dim_labels")
    image, kernel = (shape_arrays(shapes[name])[0][1] for name in one.operands[:2])
    out = shape_arrays(one.shape)[0][1]
    # cuDNN's gradients name the arrays by their parts in the convolution that they are gradients of.
    if "convBackwardInput" in one.attributes:
        image, out = out, image
    elif "convBackwardFilter" in one.attributes:
        kernel, out = out, kernel
    axes = [label for label in labels[3] if label.isdigit()]
    keys = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    window = {key: _window(one.attributes, key, len(axes), value) for key, value in keys.items()}
    macs = out[labels[3].index("b")] * out[labels[3].index("f")] * kernel[labels[2].index("i")]
    for place, axis in enumerate(sorted(axes)):
        macs *= taps(
            image[labels[1].index(axis)],
            out[labels[3].index(axis)],
            kernel[labels[2].index(axis)],
            int(window["stride"][place]),
            int(window["pad"][place].split("_")[0]),
            int(window["lhs_dilate"][place]),
            int(window["rhs_dilate"][place]),
            padding,
        )
    return 2.0 * macs


def _dot_flops(one: Instruction, shapes: Mapping[str, str]) -> float:
    # As an instruction prints it, or the configuration of a call to cuBLAS.
    contracted = re.search(
        r'lhs_contracting_dim(?:s=\{|ensions":\s*\[)([\d,"\s]*)[\]}]', one.attributes
    )
    left = shape_arrays(shapes[one.operands[0]])[0][1]
    depth = 1
    if contracted:
        depth = math.prod(left[int(d)] for d in re.findall(r"\d+", contracted[1]))
    return 2.0 * math.prod(shape_arrays(one.shape)[0][1]) * depth


def _attention_flops(one: Instruction, shapes: Mapping[str, str]) -> float:
    """cuDNN's fused attention: two products forward, five backward, masked scores counted."""
    scores = re.search(
        r'"intermediate_tensor_shape":\s*\{[^}]*"dimensions":\s*\[([^\]]*)\]', one.attributes
    )
    if scores is None:
        raise HloError(f"fused attention {one.name} does not say the shape of its scores")
    width = shape_arrays(shapes[one.operands[0]])[0][1][-1]
    products = 5 if "Backward" in one.attributes.split('"', 2)[1] else 2
    return 2.0 * products * width * math.prod(int(d) for d in re.findall(r"\d+", scores[1]))


def products(text: str, padding: bool = True) -> tuple[list[Product], dict[str, int]]:
    """Matrix products and convolutions of one call on one device, loops counted.

    Knows HLO's own instructions and the library calls that XLA makes of them on NVIDIA GPUs.

    Args:
      text: `compiled.as_text()`.
      padding: whether a convolution's taps on padding count.

    Returns:
      Them in order, and custom calls whose work is not known, target -> executions.

    Raises:
      HloError: if the text is no compiled HLO module.
    """
    executed = instructions(text)
    shapes = {one.name: one.shape for one in executed}
    found, uncounted = [], defaultdict[str, int](int)
    for one in executed:
        target = ""
        if one.opcode == "custom-call":
            match = re.search(r'custom_call_target="([^"]*)"', one.attributes)
            target = match[1] if match else ""
        if one.opcode == "dot" or target.startswith("__cublas$"):
            kind, once = "dot", _dot_flops(one, shapes)
        elif one.opcode == "convolution" or target.startswith("__cudnn$conv"):
            kind, once = "convolution", _convolution_flops(one, shapes, padding)
        elif target.startswith("__cudnn$fmha"):
            kind, once = "attention", _attention_flops(one, shapes)
        else:
            if target:
                uncounted[target] += one.executions
            continue
        operands = tuple(shapes[name] for name in one.operands[:2])
        found.append(Product(kind, operands, once * one.executions, one))
    return found, dict(uncounted)


def matmul_flops(text: str, padding: bool = True) -> MatmulFlops:
    """FLOPs of `products`, summed."""
    found, uncounted = products(text, padding)
    convolutions = [one.flops for one in found if one.kind == "convolution"]
    return MatmulFlops(
        sum(one.flops for one in found) - sum(convolutions),
        sum(convolutions),
        all(one.instruction.exact for one in found),
        uncounted,
    )
