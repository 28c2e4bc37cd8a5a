"""Encodes the images of a recipe to tokens once: `python -m vapi_jax.encode_dataset --config=... --out=DIR`.

  python -m vapi_jax.encode_dataset --config=configs/c2i_xxl.py --out=encoded/imagenet
  python -m vapi_jax.main --config=configs/c2i_xxl.py --workdir=runs/xxl \\
      --config.data.name=encoded --config.data.path=encoded/imagenet --config.data.shuffle=false

The images are those that the recipe would train on, in its order and with its crops and flips; so the
second command takes the very steps that it would take without, less the encoder and the decoding
of image files. --num fixes how many (default: as many as the recipe's steps see). Its held-out images
are encoded too.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from vapi_jax.common import output_flags, recipe_flags
from vapi_jax.common.errors import exit_status
from vapi_jax.common.output_flags import NUM, OUT
from vapi_jax.common.recipe_flags import CONFIG, parse_flags
from vapi_jax.parallel import compiler

if TYPE_CHECKING:
    from vapi_jax.methods.config import TrainConfig

flags.adopt_module_key_flags(recipe_flags)
flags.adopt_module_key_flags(output_flags)


def encode_dataset(config: "TrainConfig", out: Path, num: int = 0) -> dict[str, int]:
    """Writes `out`/train and the recipe's held-out split; returns how many images each has.

    Args:
      config: the recipe; its mesh does the encoding.
      out: must not exist; appears when complete.
      num: training images, 0 for as many as the run sees.

    Raises:
      ConfigError: if the recipe has no generator to train, or reads encoded images itself.
      DataError, WeightsError: if its data or its tokenizer cannot be had.
    """
    from vapi_jax.data import class_names, fixed_batch, make_dataset
    from vapi_jax.methods import make_task
    from vapi_jax.methods.config import ConfigError
    from vapi_jax.methods.generator import GeneratorTask
    from vapi_jax.training.run import prepare_devices

    if config.data.name == "encoded":
        raise ConfigError("config.data.name: the recipe reads encoded images already")
    if out.exists():
        raise ConfigError(f"--out: {out} exists; choose another place")
    mesh = prepare_devices(config)
    task = make_task(config, mesh)
    if not isinstance(task, GeneratorTask):
        raise ConfigError(f"config.task={config.task!r}: only generators read tokens")
    num = num or config.steps * config.batch_size
    held_out = fixed_batch(config.data, config.eval.split, config.eval.images, config.seed)
    splits: dict[str, tuple[int, Iterator[Any]]] = {
        "train": (num, iter(make_dataset(config.data, "train", config.batch_size, config.seed))),
        config.eval.split: (config.eval.images, iter([held_out])),
    }
    partial = out.with_name(out.name + ".partial")
    if partial.exists():  # of an interrupted call
        shutil.rmtree(partial)
    encode = _Encoder(task)
    facts = {
        "class_names": list(class_names(config.data)),
        "image_size": config.data.image_size,
        "tokenizer": encode.digest,
        "data": dataclasses.asdict(config.data),
        "seed": config.seed,
    }
    for split, (count, batches) in splits.items():
        _write(partial / split, split, count, batches, encode, facts)
    partial.rename(out)
    return {split: count for split, (count, _) in splits.items()}


class _Encoder:
    """The recipe's frozen tokenizer on its mesh."""

    def __init__(self, task: Any):
        import jax

        from vapi_jax.common.digests import params_digest
        from vapi_jax.parallel.sharding import replicate, shard_whole

        params = task.load_tokenizer()
        self.digest = params_digest(params)
        self.length = task.policy.num_tokens
        self._frozen = {"tokenizer": replicate(params, task.mesh)}
        self._mesh, self._put = task.mesh, shard_whole
        self._encode = jax.jit(task.pixels.encode)

    def __call__(self, images: Any) -> Any:
        """Tokens of any number of images; the last rows are padded to the devices."""
        import numpy as np

        from vapi_jax.parallel.sharding import host_array

        missing = -len(images) % self._mesh.size
        padded = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        tokens = self._encode(self._frozen, self._put(padded, self._mesh))
        return host_array(tokens)[: len(images)]


def _write(
    folder: Path, split: str, count: int, batches: Iterator[Any], encode: _Encoder, facts: Any
) -> None:
    import numpy as np

    from vapi_jax.common.progress import Progress
    from vapi_jax.data.encoded import ARRAYS, FACTS

    folder.mkdir(parents=True)
    side = facts["image_size"]
    shapes = {
        "images": (count, side, side, 3),
        "tokens": (count, encode.length),
        "labels": (count,),
    }
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shapes[name])
        for name, dtype in ARRAYS.items()
    }
    with Progress(count, f"encode {split}") as progress:
        done = 0
        while done < count:
            batch = next(batches)
            images = batch["image"][: count - done]
            rows = slice(done, done + len(images))
            # Pixels were 8 bit before they were floats: this brings them back exactly.
            arrays["images"][rows] = np.rint((images + 1.0) * 127.5).astype(np.uint8)
            arrays["tokens"][rows] = encode(images)
            arrays["labels"][rows] = batch["condition"][: len(images)]
            done += len(images)
            progress.update(done, len(images))
    for array in arrays.values():
        array.flush()
    text = json.dumps({**facts, "split": split, "count": count}, indent=2, sort_keys=True)
    (folder / FACTS).write_text(f"{text}\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """The command."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if CONFIG.value is None or OUT.value is None:
        raise app.UsageError("--config and --out are needed; see --help")
    compiler.apply_here()
    return exit_status(_encode)


def _encode() -> None:
    from vapi_jax.methods.resolve import resolve  # after the flags, so that --help needs no JAX

    counts = encode_dataset(resolve(CONFIG.value), Path(str(OUT.value)), NUM.value)
    told = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(
        f"{OUT.value}: {told} images. Use them with --config.data.name=encoded "
        f"--config.data.path={OUT.value} --config.data.shuffle=false"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
