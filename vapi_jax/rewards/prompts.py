"""Captions on their way from the data to a reward, through a compiled step where it must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vapi_jax.weights.names import WeightsError

LETTERS = 1024
"""Bytes of a prompt on its way through a compiled step; longer ones lose their end."""


def texts_of(raw: Any) -> list[str]:
    """The captions among raw conditions of the data.

    Raises:
      WeightsError: they are none.
    """
    raw = np.asarray(raw)
    if raw.dtype.names and "caption" in raw.dtype.names:
        raw = raw["caption"]
    if raw.dtype.kind == "O" and all(isinstance(text, str) for text in raw):
        raw = raw.astype(str)
    if raw.dtype.kind != "U":
        raise WeightsError(
            f"a reward by prompts wants captions, and the data bring {raw.dtype} conditions. Where it has "
            "an option prompts, say there what labels are called: prompts='imagenet', or a file of names"
        )
    return raw.tolist()


def to_bytes(texts: Sequence[str]) -> UInt8[np.ndarray, "B L"]:
    """Texts as UTF-8, zeros behind them: texts cannot go through a compiled step."""
    return np.stack([_bytes(text) for text in texts])


def from_bytes(rows: UInt8[np.ndarray, "B L"]) -> list[str]:
    """The texts of `to_bytes`."""
    return [bytes(row).rstrip(b"\0").decode("utf-8") for row in rows]


def _bytes(text: str) -> UInt8[np.ndarray, " L"]:
    data = text.encode("utf-8").replace(b"\0", b" ")[:LETTERS]
    data = data.decode("utf-8", "ignore").encode("utf-8")  # no half letter at the end
    return np.frombuffer(data.ljust(LETTERS, b"\0"), np.uint8)
