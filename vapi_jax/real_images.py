"""Writes real images of a recipe's data, to evaluate samples against: `python -m vapi_jax.real_images`.

  python -m vapi_jax.real_images --config=configs/c2i_demo.py --split=train --num=1024 --out=real/demo
  python -m vapi_jax.evaluate --samples samples/demo --reference real/demo

OUT gets OUT/000000.png and so on: --num images of the recipe's held-out split (or --split), at its
size, drawn as for its evaluation in training and the same at every call.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

from vapi_jax.common import output_flags, recipe_flags
from vapi_jax.common.errors import exit_status
from vapi_jax.common.output_flags import NUM, OUT
from vapi_jax.common.recipe_flags import CONFIG, parse_flags

if TYPE_CHECKING:
    from vapi_jax.data import DataConfig

flags.adopt_module_key_flags(recipe_flags)
flags.adopt_module_key_flags(output_flags)
_SPLIT = flags.DEFINE_enum(
    "split", None, ["train", "val", "test"], "Whose images; the recipe's eval.split if not given"
)


def write_images(data: "DataConfig", split: str, num: int, seed: int, out: Path) -> None:
    """Writes `num` images of a split as PNGs.

    Args:
      data: where the images come from, and their size.
      split: "train", "val" or "test".
      num: how many; at most as many as the split has.
      seed: of their choice and of random crops.
      out: must not exist; appears when complete.

    Raises:
      ConfigError: if `out` exists.
      DataError: if there are fewer images, or too many cannot be read.
    """
    from PIL import Image

    from vapi_jax.common.images import to_uint8
    from vapi_jax.common.progress import Progress
    from vapi_jax.data import fixed_samples
    from vapi_jax.methods.config import ConfigError

    if out.exists():
        raise ConfigError(f"--out: {out} exists; choose another place")
    samples = fixed_samples(data, split, num, seed)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():  # of an interrupted call
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    with Progress(num, f"images of {split}") as progress:
        for number, sample in enumerate(samples):
            Image.fromarray(to_uint8(sample["image"])).save(partial / f"{number:06d}.png")
            progress.update(number + 1, 1)
    partial.rename(out)


def main(argv: list[str]) -> int:
    """The command."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if CONFIG.value is None or OUT.value is None:
        raise app.UsageError("--config and --out are needed; see --help")
    return exit_status(_write)


def _write() -> None:
    from vapi_jax.methods.resolve import resolve  # after the flags, so that --help needs no JAX

    out, config = Path(str(OUT.value)), resolve(CONFIG.value)
    split, num = _SPLIT.value or config.eval.split, NUM.value or config.eval.images
    write_images(config.data, split, num, config.seed, out)
    print(f"{out}: {num} images of {split} at {config.data.image_size} px")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
