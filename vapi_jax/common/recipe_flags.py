"""The flag --config=RECIPE:VARIANT with its overrides, for every command that takes a recipe.

Importing this module defines the flag. It imports no JAX, so that --help is quick.
"""

import sys

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from vapi_jax.common.errors import ExpectedError, nobody_reads, prepare_streams
from vapi_jax.common.recipes import read_recipe, shipped

SECTIONS = (
    "mesh", "data", "tokenizer", "tokenizer_training", "policy", "condition", "vapi", "base",
    "sft", "ste", "text_base", "cca", "tokenizer_post", "ar_grpo", "method_options", "optimizer",
    "init", "eval", "checkpoint",
)  # fmt: skip


class _RecipeParser(flags.ArgumentParser):
    """Reads a recipe, and adds the sections that it leaves out, so that they can be overridden too.

    ml_collections' own reader swallows why a recipe cannot be read.
    """

    def parse(self, text: str) -> ConfigDict:
        try:
            recipe = read_recipe(text)
        except ValueError as error:  # of which absl would print all of the help
            raise ExpectedError(f"--config={text}: {error}") from error
        recipe.unlock()
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
    "A recipe, by its path or by the name of one that ships with the package, and its variant, such as "
    "c2i_demo:tiny.\n" + "\n".join(f"{name}: {line}" for name, line in shipped().items()),
    lock_config=False,
    accept_new_attributes=True,
)
flags.FLAGS["config"].parser = _RecipeParser()


def parse_flags(argv: list[str]) -> list[str]:
    """The flags, with a sentence instead of a stack where an override names no section."""
    prepare_streams()
    try:
        return app.parse_flags_with_usage(argv)
    except BrokenPipeError:  # --help | head
        sys.exit(nobody_reads())
    except ExpectedError as error:  # of the recipe
        sys.exit(f"error: {error}")
    except KeyError as error:
        sys.exit(
            f"error: an override names no section of the configuration: {error.args[0]}; known: "
            f"{', '.join(SECTIONS)}"
        )
