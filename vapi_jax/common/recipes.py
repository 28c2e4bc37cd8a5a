"""Recipes are files, not a package, so that one can be copied anywhere; this lets one build on another."""

import importlib.util
from pathlib import Path
from types import ModuleType

from vapi_jax.common.errors import ExpectedError

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = _PACKAGE / "configs"

RECIPES = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.with_name("configs")
"""The recipes that come with the package: inside it where it was installed, beside it in a clone."""


def load_recipe(beside: str, name: str) -> ModuleType:
    """The recipe `name`.py in the folder of the file `beside` (a recipe's own `__file__`).

    Raises:
      ExpectedError: if there is none.
    """
    path = Path(beside).with_name(f"{name}.py")
    if not path.exists():
        raise ExpectedError(f"{beside} builds on {path}, which does not exist")
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
