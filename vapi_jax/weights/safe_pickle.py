"""Read weights stored as a pickle without running anything the file asks for.

`pickle.load` calls any function a file names. This module never builds an unpickler: it walks the
opcodes (`pickletools.genops`, which only decodes) and interprets the few that plain data needs.
A global in the file is looked up in a `Vocabulary`, a table from dotted name to a handler written
here; a name outside the table, an opcode outside the list, or an array larger than the file that
claims to hold it is refused. `NUMPY` is the vocabulary of nested containers of numpy arrays.

What is bounded: objects by the opcodes in the file, arrays (in total, so that many arrays cannot
share one buffer into a huge result) by its length. Containers may be shared or cyclic, as pickle
allows: walk a result with a set of visited ids, read it by known keys, or see `check_tree` first.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vapi_jax.common.errors import ExpectedError


class PickleRefused(ExpectedError, ValueError):
    """A pickle that is damaged or asks for more than plain data; says where, what and what to do."""


_ADVICE = (
    "Nothing was executed. Use an unmodified copy of the file from its publisher, or convert the"
    " weights to safetensors on a machine where the file is trusted."
)


@dataclass(frozen=True)
class GlobalName:
    """An allowed global met in the file, standing on the stack; it is never the object itself."""

    name: str


@dataclass(frozen=True)
class Record:
    """What the file says of an object of a class: the names of class and attributes, no behaviour."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Budget:
    """Array bytes the file may still turn into; shared by the handlers of one read."""

    remaining: int

    def spend(self, count: int) -> None:
        """Raises ValueError when more is asked for than the file can hold."""
        if count < 0 or count > self.remaining:
            raise ValueError(f"{count} bytes of array data asked for, {self.remaining} possible")
        self.remaining -= count


def quoted(text: str) -> str:
    """Text from a file as an error may show it: escaped, and not longer than a line or two."""
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}..."


Call = Callable[[tuple[Any, ...], Budget], Any]
Build = Callable[[Any, Any, Budget], None]


@dataclass(frozen=True)
class Vocabulary:
    """What a file may name.

    Attributes:
      globals: dotted name -> handler that stands for calling it with the file's arguments, or None
        where the name may only be passed as an argument.
      builders: type of an object made by a handler -> function (object, state, budget) that fills
        it in place when the file sets its state.
      persistent: turns a persistent id (how PyTorch refers to tensor storage) into an object, or
        None to refuse such references.
      results: types that a finished result may contain besides containers, text and numbers.
      classes: dotted names of classes whose objects become a `Record` of their attributes.
      reasons: dotted name -> why it is not in the table, for names that people do meet.
    """

    globals: Mapping[str, Call | None]
    builders: Mapping[type, Build] = field(default_factory=dict)
    persistent: Callable[[Any, Budget], Any] | None = None
    results: tuple[type, ...] = ()
    classes: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(default_factory=dict)


_SCALARS = (str, bytes, int, float, bool, type(None))
_PUSH = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_NAMES_IN_ERRORS = 10
_MAX_REASON = 1000


def check_key(key: Any) -> None:
    """Refuses dictionary keys and set elements that take time to hash.

    A nested or shared tuple can exhaust the C stack or take forever. Integers hash to themselves
    modulo 2**61 - 1, so that wide ones can be made to collide by the million.

    Raises:
      TypeError: another type than text, bytes, a number or None.
      ValueError: an integer of more than 64 bits.
    """
    if not isinstance(key, _SCALARS):
        raise TypeError(f"a dictionary key of type {type(key).__name__}")
    if isinstance(key, int) and key.bit_length() > 64:
        raise ValueError("a dictionary key that is an integer of more than 64 bits")


class _Machine:
    """The stack, the memo and one method per kind of opcode."""

    def __init__(self, vocabulary: Vocabulary, budget: Budget):
        self.vocabulary = vocabulary
        self.budget = budget
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                return items[::-1]
            items.append(item)
        raise ValueError("no mark on the stack")

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"a {kind.__name__} was expected on the stack")
        return self.stack[-1]

    def remember(self, index: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("nothing to put into the memo")
        self.memo[index] = self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            check_key(key)
            target[key] = value

    def push_global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a global whose name is not text")
        dotted = f"{module}.{name}"
        if dotted not in self.vocabulary.globals and dotted not in self.vocabulary.classes:
            known = sorted(self.vocabulary.globals.keys() | self.vocabulary.classes)
            reason = self.vocabulary.reasons.get(dotted)
            if reason is None and len(known) <= _NAMES_IN_ERRORS:
                reason = f"allowed: {', '.join(known) or 'none'}"
            suffix = "" if reason is None else f" ({reason})"
            raise ValueError(f"global {quoted(dotted)} is not allowed{suffix}")
        self.stack.append(GlobalName(dotted))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, GlobalName) or not isinstance(arguments, tuple):
            raise TypeError("a call of something that is not an allowed global")
        handler = self.vocabulary.globals.get(function.name)
        if handler is None:
            raise ValueError(f"global {function.name!r} may be an argument but not called")
        self.stack.append(handler(arguments, self.budget))

    def new_record(self) -> None:
        arguments, cls = self.pop(), self.pop()
        if not isinstance(cls, GlobalName) or cls.name not in self.vocabulary.classes:
            raise TypeError("an object of something that is not an allowed class")
        if type(arguments) is not tuple or arguments:
            raise ValueError(f"a {cls.name} that is made with arguments")
        self.stack.append(Record(cls.name))

    def fill_record(self, record: Record, state: Any) -> None:
        if type(state) is not dict:
            raise TypeError(f"attributes of a {record.name} that are not a dictionary")
        # Copying one large dictionary into each of many records would be quadratic.
        self.budget.spend(len(state))
        if not all(isinstance(key, str) for key in state):
            raise TypeError(f"an attribute of a {record.name} whose name is not text")
        record.fields.update(state)

    def build(self) -> None:
        state = self.pop()
        target = self.pop()
        if isinstance(target, Record):
            self.fill_record(target, state)
        else:
            builder = self.vocabulary.builders.get(type(target))
            if builder is None:
                raise ValueError(f"state for an object of type {type(target).__name__}")
            builder(target, state, self.budget)
        self.stack.append(target)

    def step(self, name: str, argument: Any) -> None:
        """Interprets one opcode; ValueError or TypeError on anything outside the list."""
        if name in _PUSH:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name == "TUPLE":
            self.stack.append(tuple(self.pop_to_mark()))
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.remember(argument)
        elif name == "MEMOIZE":
            self.remember(len(self.memo))
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise ValueError(f"memo entry {argument} was never stored")
            self.stack.append(self.memo[argument])
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            self.set_items([key, value])
        elif name == "SETITEMS":
            self.set_items(self.pop_to_mark())
        elif name == "APPEND":
            value = self.pop()
            self.top(list).append(value)
        elif name == "APPENDS":
            values = self.pop_to_mark()
            self.top(list).extend(values)
        elif name == "GLOBAL":
            self.push_global(*argument.split(" ", 1))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            self.push_global(module, attribute)
        elif name == "REDUCE":
            self.reduce()
        elif name == "NEWOBJ" and self.vocabulary.classes:
            self.new_record()
        elif name == "BUILD":
            self.build()
        elif name == "BINPERSID" and self.vocabulary.persistent is not None:
            self.stack.append(self.vocabulary.persistent(self.pop(), self.budget))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"opcode {name} is not allowed")


def children(value: Any) -> Collection[Any]:
    """What a dict, list, tuple or `Record` holds; nothing for anything else."""
    if isinstance(value, Record):
        return value.fields.values()
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def check_tree(value: Any, *, max_depth: int, max_items: int) -> None:
    """Checks that a result can be walked by plain recursion, as if nothing in it were shared.

    Raises:
      ValueError: cyclic, nested deeper than `max_depth`, or more than `max_items` items when shared
        ones count as often as they are met.
    """
    pending, items = [(value, 0)], 0
    while pending:
        item, depth = pending.pop()
        if depth > max_depth:
            raise ValueError(f"nested more than {max_depth} levels deep, or within itself")
        held = children(item)
        items += len(held)
        if items > max_items:
            raise ValueError(f"more than {max_items} items, each shared one counted again")
        pending.extend((child, depth + 1) for child in held)


def _check_result(value: Any, allowed: tuple[type, ...]) -> None:
    """Refuses half-built helpers in the result; visits every shared object once."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict | list | tuple | Record):
            pending.extend(children(item))
        elif not isinstance(item, _SCALARS + allowed):
            raise TypeError(f"the result contains a {type(item).__name__}")


def loads(
    data: bytes,
    vocabulary: Vocabulary,
    *,
    source: str = "pickle",
    max_array_bytes: int | None = None,
) -> Any:
    """Interprets one pickle.

    Args:
      data: the pickle stream.
      vocabulary: the globals it may name, e.g. `NUMPY`.
      source: what to call it in errors, usually the path.
      max_array_bytes: array bytes allowed in total, the length of `data` if None (give it where
        the arrays' bytes are stored outside the stream).

    Returns:
      The dict, list, tuple or scalar the stream describes.

    Raises:
      PickleRefused: damaged stream, or anything outside the vocabulary; names the source, the byte
        position, the opcode or global, and what to do.
    """
    machine = _Machine(
        vocabulary, Budget(len(data) if max_array_bytes is None else max_array_bytes)
    )
    position, opcode = 0, "start"
    try:
        for operation, argument, at in pickletools.genops(io.BytesIO(data)):
            position, opcode = at or 0, operation.name
            machine.step(opcode, argument)
        if len(machine.stack) != 1 or machine.stack[0] is _MARK:
            raise ValueError(f"{len(machine.stack)} objects are left on the stack, not one")
        _check_result(machine.stack[0], vocabulary.results)
    # Decoding may warn of odd escapes, which is an error where the user made warnings errors.
    except (ValueError, TypeError, Warning) as error:
        reason = str(error)
        if len(reason) > _MAX_REASON:  # pickletools quotes what it cannot decode
            reason = f"{reason[:_MAX_REASON]}..."
        raise PickleRefused(
            f"{source}: refused at byte {position} ({opcode}): {reason}. {_ADVICE}"
        ) from error
    return machine.stack[0]


def load(path: str | Path, vocabulary: Vocabulary) -> Any:
    """`loads` of a file."""
    return loads(Path(path).read_bytes(), vocabulary, source=str(path))


_MAX_AXES = 32
_DTYPES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})


@dataclass
class NumpyDtype:
    """A numpy dtype as a file spells it: a letter and a size, and (set in a second step) an order."""

    code: str
    order: str = "|"


def _make_array(arguments: tuple[Any, ...], budget: Budget) -> np.ndarray:
    """Stands for numpy's `_reconstruct(ndarray, (0,), b"b")`: an empty array to be filled."""
    if arguments != (GlobalName("numpy.ndarray"), (0,), b"b"):
        raise ValueError("numpy._reconstruct with other arguments than numpy writes")
    return np.empty(0, np.int8)


def _make_dtype(arguments: tuple[Any, ...], budget: Budget) -> NumpyDtype:
    code = arguments[0] if arguments else None
    # Only text is quoted in errors here: the repr of a nested, shared tuple can take forever.
    if not isinstance(code, str):
        raise TypeError("a numpy dtype that is not named by text")
    if code not in _DTYPES:
        raise ValueError(f"numpy dtype {quoted(code)} (allowed: {', '.join(sorted(_DTYPES))})")
    return NumpyDtype(code)


def _build_dtype(dtype: NumpyDtype, state: Any, budget: Budget) -> None:
    if (
        not isinstance(state, tuple)
        or len(state) < 8
        or state[1] not in ("<", ">", "|", "=")
        or any(entry is not None for entry in state[2:5])
    ):
        raise ValueError("the state of a numpy dtype other than a plain number")
    dtype.order = state[1]


def _build_array(array: np.ndarray, state: Any, budget: Budget) -> None:
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("the state of a numpy array does not have five parts")
    _, shape, dtype, fortran, raw = state
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MAX_AXES
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise ValueError(f"the shape of a numpy array is not a tuple of up to {_MAX_AXES} sizes")
    if type(dtype) is not NumpyDtype or type(fortran) is not bool or type(raw) is not bytes:
        raise ValueError("a numpy array without plain dtype, order and bytes")
    kind = np.dtype(dtype.order + dtype.code)
    # Python integers: the product cannot overflow, however large the sizes claim to be.
    needed = math.prod(shape) * kind.itemsize
    if needed != len(raw):
        raise ValueError(f"an array of shape {shape} needs {needed} bytes, {len(raw)} are there")
    if array.size:
        raise ValueError("a numpy array that is filled twice")
    budget.spend(needed)
    # In place, because the memo may refer to this array already. (numpy's type stub asks for a numpy
    # boolean, which numpy itself refuses.)
    fill: Any = array.__setstate__
    fill((1, shape, kind, fortran, raw))


NUMPY = Vocabulary(
    globals={
        "numpy.core.multiarray._reconstruct": _make_array,
        "numpy._core.multiarray._reconstruct": _make_array,
        "numpy.ndarray": None,
        "numpy.dtype": _make_dtype,
    },
    builders={np.ndarray: _build_array, NumpyDtype: _build_dtype},
    results=(np.ndarray,),
)
"""Nested containers of numpy arrays of booleans, integers and floats, as `pickle.dump` writes them."""
