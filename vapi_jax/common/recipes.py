"""Recipes are files, not a package, so that one can be copied anywhere; this finds and reads them.

A recipe has a function `get_config(variant)` that gives a ConfigDict or a dict. It may build on another, of
its own folder or of those that ship with the package (`load_recipe`).
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.paths import local_path

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = _PACKAGE / "configs"

RECIPES = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.with_name("configs")
"""The recipes that come with the package: inside it where it was installed, beside it in a clone."""


class RecipeError(ExpectedError, ValueError):
    """A recipe that is not there or cannot be used; the message says why, and where in it."""


def shipped() -> dict[str, str]:
    """Name -> first line of the docstring, of the recipes that come with the package."""
    found = {}
    for path in sorted(RECIPES.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = text.partition("\n")[0]
    return found


def find_recipe(name: str) -> Path:
    """The file that a recipe's name or path means; the ending may be left out.

    What is not there is looked for among those that ship with the package, wherever one stands.

    Raises:
      RecipeError: there is none.
    """
    path = local_path(name if name.endswith(".py") else f"{name}.py")
    if not path.exists() and path.parent in (Path(), Path("configs")):
        path = RECIPES / path.name
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.py"))) or "none"
        raise RecipeError(f"there is no recipe {name!r}; known by name: {known}")
    return path


def read_recipe(text: str) -> ConfigDict:
    """The recipe NAME or PATH, and its variant after a colon.

    Raises:
      RecipeError: there is none, or it raises something, with what and where.
      PathError: the text is a URI, or empty.
    """
    from ml_collections import ConfigDict, FrozenConfigDict

    name, _, variant = str(local_path(text)).partition(":")
    path = find_recipe(name)
    found = call(path, "get_config", variant)
    if isinstance(found, FrozenConfigDict):
        return ConfigDict(found)
    if isinstance(found, Mapping):
        return ConfigDict(dict(found))
    if not isinstance(found, ConfigDict):
        raise RecipeError(
            f"{path}: get_config gives a {type(found).__name__}; wants a ConfigDict or a dict"
        )
    return found


def call(path: Path, function: str, variant: str) -> object:
    """What a function of a recipe's file gives for a variant.

    Raises:
      RecipeError: the file has no such function or no variants, or raises something; with what and where.
    """
    try:
        make = getattr(_load(path), function, None)
        if make is None:
            raise RecipeError(f"{path} is no recipe: it has no function {function}")
        takes = len(inspect.signature(make).parameters)
        if variant and not takes:
            raise RecipeError(f"{path} has no variants, and {variant!r} is asked for")
        return make(variant) if takes else make()
    except RecipeError:
        raise
    except Exception as error:  # a recipe is a program, and its author wants to know
        raise RecipeError(f"{path} cannot be used: {_cause(error, path)}") from error


def _cause(error: Exception, path: Path) -> str:
    """What was raised, and where in a recipe."""
    if isinstance(error, ExpectedError):
        return str(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    folder = path.absolute().parent
    own = [frame for frame in frames if Path(frame.filename).parent == folder] or frames
    line = f" ({own[-1].filename}, line {own[-1].lineno}: {own[-1].line})" if own else ""
    return f"{type(error).__name__}: {error}{line}"


def load_recipe(beside: str, name: str) -> ModuleType:
    """The recipe `name`.py in the folder of the file `beside` (a recipe's own `__file__`).

    A recipe that was copied elsewhere finds those that it builds on where they ship.

    Raises:
      RecipeError: if there is none.
    """
    path = Path(beside).with_name(f"{name}.py")
    if not path.exists():
        path = RECIPES / path.name
    if not path.exists():
        raise RecipeError(
            f"{beside} builds on {name}.py, which is neither beside it nor in {RECIPES}"
        )
    return _load(path)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def change(config: ConfigDict, changes: Mapping[str, object]) -> ConfigDict:
    """Sets options by their dotted paths, as "vapi.ce_weight"; sections that are missing are made.

    Raises:
      RecipeError: a path leads through a value.
    """
    from ml_collections import ConfigDict

    for option, value in changes.items():
        *sections, last = option.split(".")
        place = config
        with config.unlocked(), config.ignore_type():
            for section in sections:
                if section not in place:
                    place[section] = ConfigDict()
                place = place[section]
                if not isinstance(place, ConfigDict):
                    raise RecipeError(
                        f"{option}: {section} is a value, and has no options of its own"
                    )
            place[last] = value
    return config
