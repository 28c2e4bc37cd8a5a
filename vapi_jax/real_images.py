"""Writes real images of a recipe's data, to evaluate samples against: `python -m vapi_jax.real_images`.

  python -m vapi_jax.real_images --config=configs/c2i_demo.py --split=train --num=1024 --out=real/demo
  python -m vapi_jax.evaluate --samples samples/demo --reference real/demo

OUT gets OUT/000000.png and so on: --num images of the recipe's held-out split (or --split), at its
size, drawn as for its evaluation in training and the same at every call. Of several processes the first
writes them.
"""

from pathlib import Path
from typing import Any

from absl import app, flags

from vapi_jax.common import output_flags, recipe_flags
from vapi_jax.common import process_flags as several
from vapi_jax.common.output_flags import NUM, OUT
from vapi_jax.common.process_flags import process_flags
from vapi_jax.common.progress import announce
from vapi_jax.common.recipe_flags import CONFIG, parse_flags
from vapi_jax.data.real_images import write_images
from vapi_jax.methods.resolve import resolve
from vapi_jax.parallel import distributed

flags.adopt_module_key_flags(recipe_flags)
flags.adopt_module_key_flags(output_flags)
flags.adopt_module_key_flags(several)
_SPLIT = flags.DEFINE_enum(
    "split", None, ["train", "val", "test"], "Whose images; the recipe's eval.split if not given"
)


def main(argv: list[str]) -> int:
    """The command."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    recipe, out = CONFIG.value, OUT.value
    if recipe is None or out is None:
        raise app.UsageError("--config and --out are needed; see --help")
    return distributed.as_one(
        lambda: distributed.by_one(lambda: _write(recipe, out)), **process_flags()
    )


def _write(recipe: Any, out: Path) -> None:
    config = resolve(recipe)
    split, num = _SPLIT.value or config.eval.split, NUM.value or config.eval.images
    write_images(config.data, split, num, config.seed, out)
    announce(f"{out}: {num} images of {split} at {config.data.image_size} px")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
