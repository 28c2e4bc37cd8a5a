"""Encodes the images of a recipe to tokens once, for runs that read them back (`data.encoded`)."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from vapi_jax.common.digests import params_digest
from vapi_jax.common.files import new_folder
from vapi_jax.data import class_names, fixed_batch, make_dataset
from vapi_jax.data.classes import SORTED
from vapi_jax.data.encoded import write_encoded
from vapi_jax.data.sources import Encoder, source_class
from vapi_jax.methods import Method
from vapi_jax.methods.config import ConfigError
from vapi_jax.methods.generator import GeneratorMethod
from vapi_jax.parallel import compiler
from vapi_jax.parallel.sharding import host_array, replicate, shard_whole


def encode_dataset(method: Method, out: Path, num: int = 0) -> dict[str, int]:
    """Writes `out`/train and the recipe's held-out split; returns how many images each has.

    Args:
      method: of the recipe; its mesh does the encoding.
      out: must not exist; appears when complete.
      num: training images, 0 for as many as the run sees.

    Raises:
      ConfigError: if the recipe has no generator to train, or its data bring tokens already.
      FolderExistsError: if `out` exists.
      DataError, WeightsError: if its data or its tokenizer cannot be had.
    """
    config = method.config
    if not isinstance(method, GeneratorMethod):
        raise ConfigError(f"config.method={config.method!r}: only generators read tokens")
    if source_class(config.data.name).brings_tokens:
        raise ConfigError(f"config.data.name={config.data.name!r}: it brings tokens already")
    # Written under the names and numbers of the source; the run that reads them maps them.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, classes=SORTED))
    num = num or config.steps * config.batch_size
    first = jax.process_index() == 0
    with new_folder(out) if first else contextlib.nullcontext(out) as folder:
        held_out = fixed_batch(config.data, config.eval.split, config.eval.images, config.seed)
        train = make_dataset(config.data, "train", config.batch_size, config.seed)
        splits: dict[str, tuple[int, Iterable[Any]]] = {
            "train": (num, train),
            config.eval.split: (config.eval.images, [held_out]),
        }
        params = method.load_tokenizer()
        write = partial(
            write_encoded,
            encoder=Encoder(params_digest(params), config.tokenizer.encoder_dtype),
            class_names=class_names(config.data),
            more={"data": dataclasses.asdict(config.data), "seed": config.seed},
        )
        encode = _encoding(method, params)
        for split, (count, batches) in splits.items():
            with_tokens = ({**batch, "tokens": encode(batch["image"])} for batch in batches)
            if first:
                write(folder / split, with_tokens, count)
            else:  # its devices are wanted all the same
                encoded = itertools.accumulate(len(batch["tokens"]) for batch in with_tokens)
                next(filter(lambda done: done >= count, encoded))
    return {split: count for split, (count, _) in splits.items()}


def _encoding(
    method: GeneratorMethod, params: Any
) -> Callable[[Float[np.ndarray, "B H W 3"]], Int[np.ndarray, "B T"]]:
    """The frozen tokenizer on the task's mesh; the last rows are padded to the devices."""
    frozen, mesh = {"tokenizer": replicate(params, method.mesh)}, method.mesh
    encode = jax.jit(method.pixels.encode, compiler_options=compiler.options(mesh))

    def tokens(images: np.ndarray) -> np.ndarray:
        padded = np.pad(images, ((0, -len(images) % mesh.size), (0, 0), (0, 0), (0, 0)))
        return host_array(encode(frozen, shard_whole(padded, mesh)))[: len(images)]

    return tokens
