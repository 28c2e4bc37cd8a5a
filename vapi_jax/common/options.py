"""Options that carry their own limits: frozen dataclasses built from a recipe's nested mappings.

A field says all there is to say of an option, once: its type, what values it may have, its default.

    @dataclasses.dataclass(frozen=True)
    class Options:
        noise_rate: Share = 0.0                          # Annotated[float, Limits(0, 1)]
        corruption: Literal["paper", "full"] = "paper"   # a choice
        sides: tuple[Count, ...] = ()                    # a limit for each part

`build` reports everything that is wrong with a mapping at once, a line an option.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

Kind = TypeVar("Kind")


@dataclasses.dataclass(frozen=True)
class Limits:
    """An interval for an option; an end that is left out is infinite."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def allow(self, value: Any) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low, high = (f"{end:.10g}" for end in (self.low, self.high))
        if self.high == math.inf:
            return f"more than {low}" if self.open_low else f"at least {low}"
        return f"[{low}, {high})" if self.open_high else f"{low} to {high}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A limit that is no interval, or wants a reason: what it wants in words, after "wants"."""

    allow: Callable[[Any], bool]
    words: str

    def __str__(self) -> str:
        return self.words


@dataclasses.dataclass(frozen=True)
class Convert:
    """What a text means; a ValueError says what is wrong with it, beginning with its repr."""

    function: Callable[[Any], Any]


Count = Annotated[int, Limits(1)]
Natural = Annotated[int, Limits(0)]
NotNegative = Annotated[float, Limits(0)]
Positive = Annotated[float, Limits(0, open_low=True)]
Share = Annotated[float, Limits(0, 1)]
Rate = Annotated[float, Limits(0, 1, open_high=True)]
Vocabulary = Annotated[int, Limits(2)]  # noise replaces a token by another one
Dtype = Literal["float32", "bfloat16"]


class Errors(list[str]):
    """Lines "path: what is wrong", and which options they are about."""

    def concern(self, *paths: str) -> bool:
        """Whether one of these options, or one below or above it, has an error already.

        What is derived from a value that is itself wrong would only mislead.
        """
        named = [line.partition(":")[0].partition("=")[0] for line in self]
        return any(
            path == name or path.startswith(f"{name}.") or name.startswith(f"{path}.")
            for path in paths
            for name in named
        )


def hints_of(kind: type) -> dict[str, Any]:
    """Option -> annotation, limits included, of a dataclass; fields that no recipe sets left out."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if "given" not in f.metadata}


def given(default: Any = None) -> Any:
    """A field that code sets and no recipe can."""
    return dataclasses.field(default=default, kw_only=True, metadata={"given": True})


def build(
    kind: type[Kind],
    values: Any,
    where: str,
    errors: Errors,
    start: Kind | None = None,
    **more: Any,
) -> Kind:
    """A dataclass from a mapping, collecting errors instead of stopping at the first.

    A value that cannot be used is left at its default, so that the rest can be judged as well.

    Args:
      kind: a frozen dataclass whose fields carry their limits.
      values: option -> value; nested mappings for fields that are dataclasses.
      where: path of these options in the configuration, "" or ending in a full stop.
      errors: added to.
      start: has the options that `values` leaves out; None for the defaults of `kind`.
      more: fields that are settled already.
    """
    make: Callable[..., Kind] = kind
    if start is not None:
        make = partial(dataclasses.replace, start)  # type: ignore[type-var]
    if not isinstance(values, Mapping):
        errors.append(f"{where.rstrip('.')}={values!r}: wants options of its own, not a value")
        return make(**more)
    hints, kept = hints_of(kind), dict(more)
    for name, value in values.items():
        if name not in hints:
            errors.append(f"{where}{name}: nothing reads this option{nearest(name, hints, where)}")
        elif dataclasses.is_dataclass(hints[name]):
            own = getattr(kind if start is None else start, name, None)
            kept[name] = build(hints[name], value, f"{where}{name}.", errors, own)
        else:
            before = len(errors)
            found = coerce(value, hints[name], f"{where}{name}", errors)
            if len(errors) == before:
                kept[name] = found
    try:
        return make(**kept)
    except ValueError as error:  # the dataclass's own check, one line for each finding
        path = where.rstrip(".")
        errors += [f"{path}: {line}" if path else line for line in str(error).splitlines()]
        return make(**more)


def nearest(name: str, known: Iterable[str], where: str = "") -> str:
    """ "; did you mean ...?" of the nearest known name, or the known names."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {where}{near[0]}?" if near else f"; known: {', '.join(known)}"


def coerce(value: Any, hint: Any, where: str, errors: list[str], whole: Any = None) -> Any:
    """A value of the annotated type and within its limits, or a line in `errors`.

    Whole floats pass for ints and ints for floats. `whole` is the tuple that the value is a part of.
    """
    before = len(errors)
    if typing.get_origin(hint) is Annotated:
        plain, *limits = typing.get_args(hint)
        value = coerce(value, plain, where, errors)
        for limit in limits if len(errors) == before else ():
            if isinstance(limit, Convert):
                try:
                    value = limit.function(value)
                except ValueError as error:
                    errors.append(f"{where}={error}")
            elif not limit.allow(value):
                errors.append(f"{where}={value if whole is None else whole}: wants {limit}")
                break
        return value
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
            errors.append(f"{where}={value!r}: choose one of {choices}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        found = Errors()
        made = build(hint, value, f"{where}.", found)
        errors += found
        return made
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            errors.append(f"{where}={value!r}: wants a tuple, not {type(value).__name__}")
            return value
        inner = typing.get_args(hint)[0]
        return tuple(coerce(item, inner, where, errors, value) for item in value)
    if typing.get_origin(hint) is Mapping or hint is Mapping:
        if not isinstance(value, Mapping):
            errors.append(f"{where}={value!r}: wants options of its own, not a value")
            return value
        return dict(value)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # "int | None"
        return value if value is None else coerce(value, typing.get_args(hint)[0], where, errors)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        errors.append(f"{where}={value!r}: wants {hint.__name__}, not {type(value).__name__}")
    elif isinstance(value, float) and not math.isfinite(value):
        errors.append(f"{where}={value}: wants a finite number")
    return value
