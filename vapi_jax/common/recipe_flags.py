"""The flag --config=RECIPE.py:VARIANT with its overrides, for every command that takes a recipe.

Importing this module defines the flag. It imports no JAX, so that --help is quick.
"""

import sys

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from vapi_jax.common.errors import ExpectedError, forgive_letters, nobody_reads
from vapi_jax.common.paths import local_text

SECTIONS = (
    "mesh", "data", "tokenizer", "tokenizer_training", "policy", "condition", "vapi", "base",
    "method_options", "optimizer", "init", "eval", "checkpoint",
)  # fmt: skip


class _RecipeParser(flags.ArgumentParser):
    """Adds the sections that a recipe leaves out, so that their options can be overridden too."""

    def __init__(self, loader: flags.ArgumentParser):
        self._loader = loader

    def parse(self, path: str) -> ConfigDict:
        recipe = self._loader.parse(local_text(path))
        if not isinstance(recipe, ConfigDict):  # ml_collections keeps a failure to load for later
            raise ValueError(f"no recipe can be read from {path.partition(':')[0]}")
        for section in SECTIONS:
            if section not in recipe:
                recipe[section] = ConfigDict()
        if "options" not in recipe.data:  # of a data source of one's own
            recipe.data.options = ConfigDict()
        return recipe


# A recipe names only what it changes, yet every option can be overridden, so new names are taken
# here; `vapi_jax.methods.resolve.resolve` refuses those that no option has.
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A recipe and its variant, such as configs/c2i_demo.py:tiny",
    lock_config=False,
    accept_new_attributes=True,
)
flags.FLAGS["config"].parser = _RecipeParser(flags.FLAGS["config"].parser)


def parse_flags(argv: list[str]) -> list[str]:
    """The flags, with a sentence instead of a stack where an override names no section."""
    forgive_letters()
    try:
        return app.parse_flags_with_usage(argv)
    except BrokenPipeError:  # --help | head
        sys.exit(nobody_reads())
    except ExpectedError as error:  # a recipe that builds on one that is not there
        sys.exit(f"error: {error}")
    except KeyError as error:
        sys.exit(
            f"error: an override names no section of the configuration: {error.args[0]}; known: "
            f"{', '.join(SECTIONS)}"
        )
