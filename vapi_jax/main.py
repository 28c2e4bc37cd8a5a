"""Train what a recipe describes: `python -m vapi_jax.main --config=RECIPE --workdir=DIR`.

Flags and devices only; the work begins in `vapi_jax.run`. Recipes are under configs/; a variant
follows a colon, and any option can be overridden:

  python -m vapi_jax.main --config=configs/c2i_demo.py:tiny --workdir=/tmp/tiny
  python -m vapi_jax.main --config=configs/c2i_xxl.py --workdir=runs/xxl --config.vapi.ce_weight=0.2

Everything a run makes is in its workdir: report.html (open it), summary.json, metrics.jsonl,
tensorboard/, weights/*.safetensors and checkpoints/. The same command goes on from the last
checkpoint there.
"""

import logging
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

_SECTIONS = (
    "mesh", "data", "tokenizer", "tokenizer_training", "policy", "vapi", "reward", "optimizer",
    "init", "eval", "checkpoint",
)  # fmt: skip


class _RecipeParser(flags.ArgumentParser):
    """Adds the sections that a recipe leaves out, so that their options can be overridden too."""

    def __init__(self, loader: flags.ArgumentParser):
        self._loader = loader

    def parse(self, path: str) -> ConfigDict:
        recipe = self._loader.parse(path)
        if not isinstance(recipe, ConfigDict):  # ml_collections keeps a failure to load for later
            raise ValueError(f"no recipe can be read from {path.partition(':')[0]}")
        for section in _SECTIONS:
            if section not in recipe:
                recipe[section] = ConfigDict()
        return recipe


# A recipe names only what it changes, yet every option can be overridden, so new names are taken
# here; `vapi_jax.config.resolve` refuses those that no option has.
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A recipe and its variant, such as configs/c2i_demo.py:tiny",
    lock_config=False,
    accept_new_attributes=True,
)
flags.FLAGS["config"].parser = _RecipeParser(flags.FLAGS["config"].parser)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run writes; made if absent")
_CHECK = flags.DEFINE_bool("check", False, "Print the resolved configuration and stop")


def main(argv: list[str]) -> int:
    """Sets devices up before JAX starts, then hands over."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if _CONFIG.value is None or (_WORKDIR.value is None and not _CHECK.value):
        raise app.UsageError("--config and --workdir are needed; see --help")
    logging.getLogger("vapi_jax").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells every rename at INFO

    from vapi_jax import run  # after the flags, so that --help needs no JAX
    from vapi_jax.config import ConfigError, resolve

    try:
        config = resolve(_CONFIG.value)
        if _CHECK.value:
            run.print_plan(config)
        else:
            run.run(config, Path(str(_WORKDIR.value)))
    except (ConfigError, *run.EXPECTED_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_flags(argv: list[str]) -> list[str]:
    """The flags, with a sentence instead of a stack where an override names no section."""
    try:
        return app.parse_flags_with_usage(argv)
    except KeyError as error:
        sys.exit(
            f"error: an override names no section of the configuration: {error.args[0]}; known: "
            f"{', '.join(_SECTIONS)}"
        )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
