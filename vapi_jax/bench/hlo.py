"""What a compiled program communicates, read from the text of its HLO.

`compiled.as_text()` of a jitted function is the program that one device runs. Everything in it is
counted as often as it is executed, loops by the trip counts that XLA writes beside them. Pure
functions of text: no device is needed. See `hlo_flops` for what the program computes.

Grammar: https://openxla.org/xla/operation_semantics and the printer of HloInstruction.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_BITS = {
    "pred": 8, "token": 0, "s1": 8, "u1": 8, "s2": 8, "u2": 8, "s4": 4, "u4": 4, "f4e2m1fn": 4,
    "f8e8m0fnu": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32,
    "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_NAMED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"\}')
_OPERAND = re.compile(r"%([\w.\-]+)")

_FUSED_START = "AsyncCollectiveStart"
_FUSED_SCATTER = "AllReduceScatterFusion"


class HloError(ValueError):
    """Text that is no compiled HLO module, or says something that this reader does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of the module, with how often a device executes it in one call.

    Attributes:
      name: unique in the module.
      opcode: such as "dot" or "all-gather-start".
      shape: of the result, as printed: "bf16[8,64]{1,0}" or "(f32[], s32[4]{0})".
      operands: names of the arguments, all in `computation`.
      literal: value of a constant, as printed.
      attributes: what follows the arguments, as printed.
      op_name: where it comes from: the jitted functions, named scopes and primitive.
      computation: name of the computation that it belongs to.
      executions: times a device executes it in one call.
      exact: False if it is inside a loop of unknown length, counted as one pass, or inside a branch,
        counted as taken.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    op_name: str
    computation: str
    literal: str = ""
    executions: int = 1
    exact: bool = True


@dataclass(frozen=True)
class Collective:
    """One communicating instruction, from the view of one device.

    Attributes:
      kind: one of `COLLECTIVES`; an asynchronous pair counts once, by its start.
      dtypes: of what is sent, each once.
      operand_bytes: what a device puts in at one execution.
      result_bytes: what it holds afterwards.
      group_size: devices that take part together; 1 communicates nothing.
      executions, exact, op_name, name: as of `Instruction`.
    """

    kind: str
    dtypes: tuple[str, ...]
    operand_bytes: int
    result_bytes: int
    group_size: int
    executions: int
    exact: bool
    op_name: str
    name: str

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends in all executions, by the algorithms on a ring.

        With n devices: an all-gather passes on n - 1 shards, a reduce-scatter n - 1 parts of the
        operand, an all-reduce does both, an all-to-all keeps its own part.
        """
        if self.group_size <= 1:
            return 0.0
        share = (self.group_size - 1) / self.group_size
        once = {
            "all-gather": share * self.result_bytes,
            "all-reduce": 2 * share * self.operand_bytes,
            "reduce-scatter": share * self.operand_bytes,
            "all-to-all": share * self.operand_bytes,
            "ragged-all-to-all": share * self.operand_bytes,
        }.get(self.kind, float(self.operand_bytes))
        return once * self.executions


@dataclass(frozen=True)
class Total:
    """All collectives of one kind: what is sent, how many executions, and bytes over all of them."""

    dtypes: tuple[str, ...]
    executions: int
    operand_bytes: int
    result_bytes: int
    sent_bytes: float


# --- shapes ---------------------------------------------------------------------------------------


def shape_arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a printed shape, tuples flattened: "(f32[2,3]{1,0}, s32[])" -> [("f32", (2, 3)), ..].

    Raises:
      HloError: for an element type that is not known.
    """
    found = []
    for dtype, dims in _ARRAY.findall(shape):
        if dtype not in _BITS and not dtype.startswith("f8"):
            raise HloError(f"element type {dtype!r} of shape {shape} is not known")
        found.append((dtype, tuple(int(d) for d in dims.split(",") if d)))
    return found


def shape_bytes(shape: str) -> int:
    """Bytes of a printed shape without padding, all arrays of a tuple together."""
    return sum(
        -(-math.prod(dims) * _BITS.get(dtype, 8) // 8) for dtype, dims in shape_arrays(shape)
    )


def _closing(text: str, start: int) -> int:
    """Where the bracket at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "({[":
            depth += 1
        elif text[place] in ")}]":
            depth -= 1
            if depth == 0:
                return place
    raise HloError(f"a bracket never closes in: {text[:200]}")


def _tuple_elements(shape: str) -> list[str]:
    """The outermost elements of a printed tuple shape; the shape itself if it is none."""
    if not shape.startswith("("):
        return [shape]
    elements, depth, begin = [], 0, 1
    for place, letter in enumerate(shape):
        if letter in "({[":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        if depth == 0 or (depth == 1 and letter == ","):
            elements.append(shape[begin:place].strip())
            begin = place + 1
    return [element for element in elements if element]


# --- the module -----------------------------------------------------------------------------------


def _parse_instruction(line: str, computation: str) -> Instruction | None:
    named = _NAMED.match(line)
    if named is None:
        return None
    start = named.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise HloError(f"no operation in: {line.strip()[:200]}")
    close = _closing(line, opcode.end() - 1)
    attributes = line[close + 1 :]
    op_name = _OP_NAME.search(attributes)
    return Instruction(
        name=named[1],
        opcode=opcode[1],
        shape=line[start:end],
        operands=tuple(_OPERAND.findall(line[opcode.end() : close])),
        attributes=attributes.strip(", "),
        op_name=op_name[1] if op_name else "",
        computation=computation,
        literal=line[opcode.end() : close] if opcode[1] == "constant" else "",
    )


def _parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The entry computation's name, and every computation's instructions in order."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif line.rstrip() == "}":  # not the "}}" on which a Pallas kernel's attributes end
            current = ""
        elif current:
            found = _parse_instruction(line, current)
            if found is not None:
                computations[current].append(found)
    if not entry:
        raise HloError("no ENTRY computation: this is not the text of a compiled HLO module")
    return entry, computations


def _attribute(attributes: str, name: str) -> list[str]:
    """Computations named by `name=%a` or `name={%a, %b}`."""
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)", attributes)
    return re.findall(r"[\w.\-]+", found[1]) if found else []


def _trip_count(attributes: str, computations: Mapping[str, list[Instruction]]) -> int | None:
    """How often a loop runs; None where nothing says so.

    XLA writes it beside a loop, but not for TPUs: there it is the n of the condition i < n, for JAX's
    loops of known length count from 0.
    """
    if known := _TRIP_COUNT.search(attributes):
        return int(known[1])
    for name in _attribute(attributes, "condition"):
        within = {one.name: one for one in computations.get(name, ())}
        root = list(within.values())[-1] if within else None
        if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
            continue
        counter, limit = (within.get(operand) for operand in root.operands)
        if counter and counter.opcode == "get-tuple-element" and limit and limit.literal.isdigit():
            return int(limit.literal)
    return None


def _calls(
    instruction: Instruction, computations: Mapping[str, list[Instruction]]
) -> Iterator[tuple[str, int, bool]]:
    """(computation, times it runs when the instruction does, whether that is certain)."""
    attributes = instruction.attributes
    if instruction.opcode == "while":
        known = _trip_count(attributes, computations)
        count = 1 if known is None else known
        for name in _attribute(attributes, "body"):
            yield name, count, known is not None
        for name in _attribute(attributes, "condition"):
            yield name, count + 1, known is not None
        return
    if instruction.opcode == "call":  # elsewhere to_apply is a scalar function of a reduction
        for name in _attribute(attributes, "to_apply"):
            yield name, 1, True
    for attribute in ("calls", "called_computations"):
        for name in _attribute(attributes, attribute):
            yield name, 1, True
    for attribute in ("branch_computations", "true_computation", "false_computation"):
        for name in _attribute(attributes, attribute):
            yield name, 1, False


def instructions(text: str) -> list[Instruction]:
    """Every instruction that a device executes in one call, fusions opened.

    An instruction of a computation that is called from several places comes once for each.

    Args:
      text: `compiled.as_text()`.

    Raises:
      HloError: if the text is no compiled HLO module.
    """
    entry, computations = _parse(text)
    found: list[Instruction] = []

    def walk(name: str, times: int, exact: bool) -> None:
        for one in computations.get(name, ()):
            found.append(replace(one, executions=times, exact=exact))
            for called, count, certain in _calls(one, computations):
                walk(called, times * count, exact and certain)

    walk(entry, 1, True)
    return found


# --- communication --------------------------------------------------------------------------------


def _kind(opcode: str) -> str | None:
    base = opcode.removesuffix("-start")
    return base if base in COLLECTIVES else None


def _result_shape(instruction: Instruction) -> str:
    """Of the finished collective: a start also carries its operands, and sometimes buffers."""
    kind = _kind(instruction.opcode)
    # An all-reduce works in place, and its start has the shape of its result.
    if instruction.opcode == kind or kind == "all-reduce":
        return instruction.shape
    return _tuple_elements(instruction.shape)[1]


def group_size(attributes: str, devices: int) -> int:
    """How many devices take part in a collective together, by its printed replica groups.

    Written as lists {{0,1},{2,3}}, as an iota [2,2]<=[4], or by axes of a mesh
    mesh['x'=2,'y'=2] {'y'}, where 'y':(1)2 is a part of an axis. No groups means all devices.

    Raises:
      HloError: for a notation that is none of these.
    """
    if "source_target_pairs=" in attributes:
        return devices
    found = re.search(r"\breplica_groups=", attributes)
    if found is None:
        return devices
    rest = attributes[found.end() :]
    if rest.startswith("{"):
        inner = rest[1 : _closing(rest, 0)]
        first = re.match(r"\s*\{([\d,\s]*)\}", inner)
        return len(re.findall(r"\d+", first[1])) if first else devices
    iota = re.match(r"\[(\d+),(\d+)\]<=", rest)
    if iota:
        return int(iota[2])
    mesh = re.match(r"@?[\w.]*\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if mesh is None:
        raise HloError(f"replica groups in a notation that is not known: {rest[:100]}")
    sizes = {name: int(size) for name, size in re.findall(r"['\"]?([\w.]+)['\"]?=(\d+)", mesh[1])}
    axes = re.findall(r"['\"]?([\w.]+)['\"]?(?::\((\d+)\)(\d+))?(?:,|$)", mesh[2].replace(" ", ""))
    unknown = [name for name, _, _ in axes if name not in sizes]
    if unknown:
        raise HloError(f"replica groups name axes {unknown} that their mesh lacks: {rest[:100]}")
    return math.prod(int(part) if part else sizes[name] for name, _, part in axes)


def device_count(text: str) -> int:
    """Devices that the module was compiled for, as its first line says."""
    header = text.split("\n", 1)[0]
    return math.prod(
        int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
    )


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled module, with bytes for one device and one execution.

    Args:
      text: `compiled.as_text()`.

    Raises:
      HloError: if the text is no compiled HLO module.
    """
    devices, found, executed = device_count(text), [], instructions(text)
    starts = {one.computation for one in executed if f'"{_FUSED_START}"' in one.attributes}
    # TPUs: a sum fused with the slice that a device takes of it is sent as a scatter, in one kernel.
    scatters = {
        name
        for one in executed
        if _FUSED_SCATTER in one.attributes
        for name in _attribute(one.attributes, "calls")
    }
    for one in executed:
        kind = _kind(one.opcode)
        # TPUs: one that is fused with compute stands in its start, in what runs beside it and in its end.
        if kind is None or ("chain_id=" in one.attributes and one.computation not in starts):
            continue
        size = group_size(one.attributes, devices)
        shape = _result_shape(one)
        result = shape_bytes(shape)
        if kind == "all-reduce" and one.computation in scatters:
            kind, result = "reduce-scatter", result // size
        operand = {"all-gather": result // size, "reduce-scatter": result * size}.get(kind, result)
        dtypes = tuple(dict.fromkeys(dtype for dtype, _ in shape_arrays(shape)))
        found.append(
            Collective(
                kind,
                dtypes,
                operand,
                result,
                size,
                one.executions,
                one.exact,
                one.op_name,
                one.name,
            )
        )
    return found


def totals(found: list[Collective]) -> dict[str, Total]:
    """Executions and bytes of each kind that occurs; those of one device alone are left out."""
    by_kind: dict[str, list[Collective]] = defaultdict(list)
    for one in found:
        if one.group_size > 1:
            by_kind[one.kind].append(one)
    return {
        kind: Total(
            dtypes=tuple(sorted({dtype for c in ones for dtype in c.dtypes})),
            executions=sum(c.executions for c in ones),
            operand_bytes=sum(c.operand_bytes * c.executions for c in ones),
            result_bytes=sum(c.result_bytes * c.executions for c in ones),
            sent_bytes=sum(c.sent_bytes for c in ones),
        )
        for kind, ones in sorted(by_kind.items())
    }
