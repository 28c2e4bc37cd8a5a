"""Encodes the images and captions of a recipe once, for runs that read them back (`data.encoded`).

The stream of training images is cut into parts. A part is there whole or not at all, so an interrupted call
goes on where it was, and processes take parts in turn, each with its own devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from vapi_jax.common import locks
from vapi_jax.common.files import (
    FolderExistsError,
    read_json,
    require_space,
    write_atomically,
)
from vapi_jax.common.progress import ProgressBar, announce
from vapi_jax.data import SkippedImages, class_names, fixed_batch, make_dataset
from vapi_jax.data.classes import SORTED
from vapi_jax.data.encoded import LISTED, finish_split, part_folder, stored_images, write_part
from vapi_jax.data.pipeline import make_source
from vapi_jax.data.sources import source_class
from vapi_jax.methods import Method
from vapi_jax.methods.config import ConfigError
from vapi_jax.methods.generator import GeneratorMethod
from vapi_jax.parallel import compiler, distributed
from vapi_jax.parallel.sharding import host_array, make_mesh, replicate, shard_whole

ASKED = "asked.json"
"""What a folder is being made of, so that another call of the same goes on with it."""

_PART, _PARTS = 1024, 8
"""Images of a part at most, about, which are held at once; and parts at least, for processes to share."""


def encode_dataset(
    method: Method, out: Path, num: int = 0, *, tokens: bool = True, part: int = 0
) -> dict[str, int]:
    """Writes `out`/train and the recipe's held-out split; returns how many images each has.

    Every process has to call it. A call that was interrupted is gone on with by the same call.

    Args:
      method: of the recipe.
      out: must not exist, but for what an interrupted call has left.
      num: training images, 0 for as many as the run sees.
      tokens: also what the tokenizer makes of the images; labels and features of captions always are.
      part: images of a part, about; 0 for what several processes can share.

    Raises:
      ConfigError: if the recipe has no generator to train, or its data are encoded already.
      FolderExistsError: if `out` is complete, or of something else.
      LockedError: if another process encodes to `out`.
      DataError, WeightsError: if its data, its tokenizer or its encoder of captions cannot be had.
    """
    config = method.config
    if not isinstance(method, GeneratorMethod):
        raise ConfigError(f"config.method={config.method!r}: only generators read tokens")
    if source_class(config.data.name).brings_tokens:
        raise ConfigError(f"config.data.name={config.data.name!r}: it brings tokens already")
    # Written under the names and numbers of the source; the run that reads them maps them.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, classes=SORTED))
    num = num or config.steps * config.batch_size
    method = dataclasses.replace(method, mesh=make_mesh(devices=jax.local_devices()))
    params = encoder = None
    if tokens:
        params = method.load_tokenizer()
        encoder = method.image_encoder(params)
    more = {
        "data": dataclasses.asdict(config.data),
        "seed": config.seed,
        "condition": method.describe(),
    }
    split, size, first = config.eval.split, config.batch_size, jax.process_index() == 0
    stride = max((part or min(_PART, num // _PARTS)) // size, 1) * size
    parts = -(-num // stride)
    held_out = fixed_batch(config.data, split, config.eval.images, config.seed)
    asked: dict[str, Any] = {}
    if first:
        sources = {name: make_source(config.data, name) for name in ("train", split)}
        there = {name: {"images": len(s), "sha256": s.digest()} for name, s in sources.items()}
        asked = {**more, "num": num, "part": stride, "held_out": [split, config.eval.images]}
        asked |= {"found": there, "tokens": encoder and dataclasses.asdict(encoder)}
    with locks.hold(out, "--out") if first else contextlib.nullcontext():
        if first:
            _settle(out, asked)
        missing = [i for i in range(parts) if not part_folder(out / "train", i).exists()]
        if first:  # captions' features and tokens come on top, which are a few per cent of it
            nbytes = len(missing) * stride * stored_images(held_out["image"][:1]).nbytes
            require_space(
                out, nbytes, f"{len(missing) * stride:,} images of {config.data.image_size} pixels"
            )
        encode = _encoding(method, params)

        at = 0  # the batch that comes next

        def of_part(number: int) -> Iterator[dict[str, np.ndarray]]:
            nonlocal at
            if at != (begin := number * stride // size):  # images that were read ahead are given up
                batches.set_state({"next_index": begin})
            left = min(stride, num - number * stride)
            at = begin + -(-left // size)
            for batch in itertools.islice(batches, -(-left // size)):
                yield encode({name: rows[:left] for name, rows in batch.items()})
                left -= size

        mine = distributed.deal(np.array(missing, int), parts)
        if mine:
            skipped = SkippedImages.of_process(out, jax.process_index())
            batches = iter(make_dataset(config.data, "train", size, config.seed, skipped=skipped))
            with ProgressBar(len(mine) * stride, "encode train") as progress:
                for done, number in enumerate(mine, 1):
                    write_part(part_folder(out / "train", number), of_part(number))
                    progress.update(done * stride, stride)
        if first and not part_folder(out / split, 0).exists():
            write_part(part_folder(out / split, 0), [encode(held_out)])
        multihost_utils.sync_global_devices("all parts are encoded")
        counts: dict[str, int] = {"train": num, split: config.eval.images}
        if first:
            names = class_names(config.data)
            for name, many in (("train", parts), (split, 1)):
                facts: dict[str, Any] = {"encoder": encoder, "class_names": names, "more": more}
                if found := finish_split(out / name, many, count=counts[name], **facts):
                    listed = ", ".join(f"{n} {flag.replace('_', ' ')}" for flag, n in found.items())
                    announce(f"captions of {name}: {listed} (in {out / name}/*/{LISTED})")
            (out / ASKED).unlink()
        return counts


def _settle(out: Path, asked: Mapping[str, Any]) -> None:
    """Begins a folder, or goes on with one of the same."""
    text = json.dumps(asked, indent=2, sort_keys=True)
    if not (out / ASKED).exists():
        if any(path.name != locks.LOCK for path in out.iterdir()):
            raise FolderExistsError(f"{out} exists; choose another place")
        write_atomically(out / ASKED, f"{text}\n")
        return
    begun, now = read_json(out / ASKED, FolderExistsError), json.loads(text)
    if begun != now and {**begun, "found": now["found"]} == now:
        raise FolderExistsError(
            f"{out} holds a part of what the data were before: files have come, gone or changed since "
            f"({ASKED} says how many images there were). Choose another place, or remove it"
        )
    if begun != now:
        raise FolderExistsError(
            f"{out} holds a part of other data, or of the same encoded otherwise ({ASKED} says what). Go on "
            "with the command that began it, choose another place, or remove it"
        )


def _encoding(
    method: GeneratorMethod, params: Any
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """What makes a batch of the data into one to be written."""
    mesh, frozen = method.mesh, None
    if params is not None:
        frozen = {"tokenizer": replicate(params, mesh)}
    program = jax.jit(method.pixels.encode, compiler_options=compiler.options(mesh))

    def tokens(images: Float[np.ndarray, "B H W 3"]) -> Int[np.ndarray, "B T"]:
        padded = np.pad(images, ((0, -len(images) % mesh.size), (0, 0), (0, 0), (0, 0)))
        return host_array(program(frozen, shard_whole(padded, mesh)))[: len(images)]

    def encode(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = {"image": batch["image"], "condition": method.condition.store(batch["condition"])}
        return found if frozen is None else {**found, "tokens": tokens(batch["image"])}

    return encode
