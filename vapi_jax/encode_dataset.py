"""Encodes the images of a recipe to tokens once: `python -m vapi_jax.encode_dataset --config=... --out=DIR`.

  python -m vapi_jax.encode_dataset --config=configs/c2i_xxl.py --out=encoded/imagenet
  python -m vapi_jax.main --config=configs/c2i_xxl.py --workdir=runs/xxl \\
      --config.data.name=encoded --config.data.path=encoded/imagenet --config.data.shuffle=false

The images are those that the recipe would train on, in its order and with its crops and flips; so the
second command takes the very steps that it would take without, less the encoder and the decoding
of image files. --num fixes how many (default: as many as the recipe's steps see). Its held-out images
are encoded too.
"""

from pathlib import Path
from typing import Any

from absl import app, flags

from vapi_jax.common import output_flags, recipe_flags
from vapi_jax.common.errors import exit_status
from vapi_jax.common.output_flags import NUM, OUT
from vapi_jax.common.recipe_flags import CONFIG, parse_flags
from vapi_jax.generation.encoding import encode_dataset
from vapi_jax.methods import make_method
from vapi_jax.methods.resolve import resolve
from vapi_jax.parallel import compiler
from vapi_jax.training.run import prepare_devices

flags.adopt_module_key_flags(recipe_flags)
flags.adopt_module_key_flags(output_flags)


def main(argv: list[str]) -> int:
    """The command."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    recipe, out = CONFIG.value, OUT.value
    if recipe is None or out is None:
        raise app.UsageError("--config and --out are needed; see --help")
    compiler.reserve_memory()
    return exit_status(lambda: _encode(recipe, out))


def _encode(recipe: Any, out: Path) -> None:
    config = resolve(recipe)
    counts = encode_dataset(make_method(config, prepare_devices(config)), out, NUM.value)
    told = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(
        f"{out}: {told} images. Use them with --config.data.name=encoded --config.data.path={out} "
        "--config.data.shuffle=false"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
