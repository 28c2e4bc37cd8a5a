"""Which of a record's texts is the caption, and which records are wanted at all."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vapi_jax.data.caption_files import fault_of
from vapi_jax.data.config import DataError

Record = Mapping[str, Any]
"""What is known of an image: "txt" is the text beside it, everything else is of its JSON or columns."""

TXT = "txt"

# LlamaGen's lists "text": captions of BLIP, of LLaVA, and the first sentence of the latter.
_LLAMAGEN = {"blip": "text[0]", "llava": "text[1]", "llava_first": "text[2]"}
_ELEMENT = re.compile(r"(.+)\[([0-9]{1,4})\]")
_COMPARISON = re.compile(r"\s*([^<>=]+?)\s*(>=|<=|==|>|<)\s*([^<>=]+?)\s*")
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def _value(record: Record, field: str) -> Any:
    name = field.removeprefix("json:")
    if name in record:
        return record[name]
    found = _ELEMENT.fullmatch(_LLAMAGEN.get(name, name))
    if found is None:
        return None
    values, place = record.get(found[1]), int(found[2])
    return values[place] if isinstance(values, list) and place < len(values) else None


def column_of(field: str) -> str:
    """The name in a record that a field is looked up by, where that is not the field's own."""
    name = field.removeprefix("json:")
    found = _ELEMENT.fullmatch(_LLAMAGEN.get(name, name))
    return found[1] if found else name


def text_of(record: Record, field: str) -> str:
    """A text of a record without white space around it; "" where there is none that can be a caption."""
    value = _value(record, field)
    text = value.strip() if isinstance(value, str) else ""
    return "" if fault_of(text) else text


def texts_in(record: Record) -> dict[str, str]:
    """All texts of a record under the names that a caption is chosen by."""
    found = {}
    for name, value in record.items():
        prefix = "" if name == TXT else "json:"
        if isinstance(value, str):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, list):
            found |= {f"{prefix}{name}[{i}]": v for i, v in enumerate(value) if isinstance(v, str)}
    return found


@dataclasses.dataclass(frozen=True)
class CaptionFields:
    """Texts of which one is taken, with their probabilities."""

    names: tuple[str, ...]
    shares: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> CaptionFields:
        """From "json:top_caption", or "blip:0.7,llava:0.3".

        Raises:
          DataError: a share is missing, or they do not add up to 1.
        """
        names, shares = [], []
        for part in text.split(","):
            name, _, share = part.strip().rpartition(":")
            try:
                shares.append(float(share))
            except ValueError:
                name = part.strip()
            if not name:
                raise DataError(f"data.options.caption_field={text!r}: a name is missing")
            names.append(name)
        if not shares and len(names) == 1:
            shares = [1.0]
        if len(shares) != len(names) or min(shares) <= 0 or not math.isclose(sum(shares), 1.0):
            raise DataError(
                f"data.options.caption_field={text!r}: of several, each wants a share, and together "
                'they make 1, as in "blip:0.7,llava:0.3"'
            )
        return cls(tuple(names), tuple(shares))

    def any_in(self, record: Record) -> str:
        """The first text that is not empty, or ""."""
        return next(filter(None, (text_of(record, name) for name in self.names)), "")

    def in_record(self, record: Record) -> set[str]:
        """The names that a record has something under."""
        return {name for name in self.names if _value(record, name) is not None}

    def faults(self, record: Record) -> list[str]:
        """What is wrong with texts of a record that are no captions."""
        values = (_value(record, name) for name in self.names)
        found = (fault_of(value.strip()) for value in values if isinstance(value, str))
        return [fault for fault in found if fault]

    def choose(self, record: Record, rng: np.random.Generator) -> str:
        """One of the texts that are not empty, by their shares; "" where all are."""
        texts = [text_of(record, name) for name in self.names]
        shares = np.array([s if t else 0.0 for s, t in zip(self.shares, texts, strict=True)])
        if not shares.any():
            return ""
        return texts[int(rng.choice(len(texts), p=shares / shares.sum()))]


@dataclasses.dataclass(frozen=True)
class Where:
    """A comparison that a record's number must pass."""

    field: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> tuple[Where, ...]:
        """From "score_image_clarity>=6, punsafe<0.5"; "" is none.

        Raises:
          DataError: it is no list of comparisons.
        """
        found = []
        for part in filter(str.strip, text.split(",")):
            match = _COMPARISON.fullmatch(part)
            try:
                if match is None:
                    raise ValueError("no comparison")
                found.append(cls(match[1], match[2], float(match[3])))
            except ValueError as error:
                raise DataError(
                    f'data.options.where={text!r}: {part.strip()!r} is not like "score>=6" ({error})'
                ) from error
        return tuple(found)

    def __str__(self) -> str:
        return f"{self.field}{self.sign}{self.bound:g}"

    def fails(self, record: Record) -> str:
        """Why a record is not wanted, or ""."""
        value = _value(record, self.field)
        try:
            value = float(value) if isinstance(value, int | float | str) else math.nan
        except (ValueError, OverflowError):
            value = math.nan
        if math.isnan(value):
            return f"record(s) without a number {self.field}"
        return "" if _OPERATORS[self.sign](value, self.bound) else f"record(s) not {self}"
