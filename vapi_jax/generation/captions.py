"""Captions encoded once, in a file that sampling takes as conditions."""

from __future__ import annotations

import collections
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vapi_jax.common.files import new_file, require_space, write_atomically
from vapi_jax.common.npz import npy_header, npy_member
from vapi_jax.common.progress import ProgressBar
from vapi_jax.models.conditions import CAPTION_FLAGS
from vapi_jax.models.text_encoder import EncodedCaptions, TextEncoder

LISTED = 3
"""Captions that are shown of many."""


def flagged(rows: Mapping[str, Sequence[int]], texts: Sequence[str], one: str) -> str:
    """How many captions are empty, cut and so on, and the first of each.

    Args:
      rows: numbers of captions by flag.
      texts: the captions.
      one: what a caption is called, before its number.
    """
    lines = []
    for flag, found in rows.items():
        lines.append(f"{flag.replace('_', ' ')}: {len(found)}")
        lines += [f"  {one} {row + 1}: {texts[row]:.70}" for row in found[:LISTED]]
        lines += [f"  and {len(found) - LISTED} more"] if len(found) > LISTED else []
    return "\n".join(lines)


def encode_batches(
    encoder: TextEncoder, captions: Sequence[str], batch: int
) -> Iterator[EncodedCaptions]:
    """Captions encoded in order, with progress."""
    with ProgressBar(len(captions), "captions") as progress:
        for start in range(0, len(captions), batch):
            part = captions[start : start + batch]
            yield encoder(part, rows=batch)
            progress.update(start + len(part), len(part))


def encode_captions(
    encoder: TextEncoder,
    captions: Sequence[str],
    out: Path,
    *,
    batch: int = 32,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes features and all else of captions to `out`, an .npz, and a record to `out` as .json.

    The file holds ids int32 [N, P] and mask bool [N, P], padded on the right; left_features float32
    [N, P, W] and left_mask bool [N, P], padded on the left; and cleaned, the texts [N]. Features are written
    as they come, so memory holds a batch of them. Every process computes, and process 0 writes.

    Args:
      encoder: of the captions.
      captions: at least one.
      out: the file.
      batch: captions that are encoded at once.
      facts: more for the record.

    Returns:
      The record: what the features depend on, and which captions are empty, cut or in another script.
      In processes that do not write it, nothing.
    """
    count, done = len(captions), 0
    kept: dict[str, list[np.ndarray]] = {
        name: [] for name in ("ids", "mask", "left_mask", *CAPTION_FLAGS)
    }
    cleaned: list[str] = []
    batches = encode_batches(encoder, captions, batch)
    if jax.process_index() > 0:  # its devices are wanted all the same
        collections.deque(batches, maxlen=0)
        return {}
    require_space(
        out.parent, 4 * count * encoder.length * encoder.width, f"features of {count:,} captions"
    )
    with new_file(out) as partial, zipfile.ZipFile(partial, "w", allowZip64=True) as archive:
        with archive.open(npy_member("left_features"), "w", force_zip64=True) as file:
            file.write(npy_header(np.float32, (count, encoder.length, encoder.width)))
            for part in batches:
                file.write(np.asarray(part.features, "<f4", order="C").data)
                cleaned += part.cleaned
                done += len(part.cleaned)
                for name, arrays in kept.items():
                    arrays.append(getattr(part, name))
        assert done == count
        for name in ("ids", "mask", "left_mask"):
            array = np.concatenate(kept[name])
            with archive.open(npy_member(name), "w", force_zip64=True) as file:
                file.write(npy_header(array.dtype, array.shape))
                file.write(array.data)
        _write_texts(archive, cleaned)
    record = {
        "captions": count,
        **(facts or {}),
        **encoder.describe(),
        **{name: np.flatnonzero(np.concatenate(kept[name])).tolist() for name in CAPTION_FLAGS},
    }
    write_atomically(out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    return record


def _write_texts(archive: zipfile.ZipFile, texts: Sequence[str]) -> None:
    """The texts as NumPy keeps them, as wide as the longest, compressed and never all at once."""
    dtype = np.dtype(f"<U{max(1, *map(len, texts))}")
    member = npy_member("cleaned")
    member.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(member, "w", force_zip64=True) as file:
        file.write(npy_header(dtype, (len(texts),)))
        for text in texts:
            file.write(np.array([text], dtype).view(np.uint8).data)
