"""Things chosen by name: one of a table, or a user's own as "module:attribute"."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TypeVar

from vapi_jax.common.options import nearest

Thing = TypeVar("Thing")


class UnknownNameError(ValueError):
    """No table has the name, and no module of it can be imported."""


def find(name: str, table: Mapping[str, Thing], what: str) -> Thing:
    """The entry of a table, or what "module:attribute" names.

    Only the configuration or the command line of whoever runs the program names modules; a name that
    came with a file of weights or data must never get here.

    Args:
      name: a key of the table, or "module:attribute".
      table: the known ones.
      what: of what kind they are, for the message.

    Raises:
      UnknownNameError: saying which names are known, or why the module gives no such attribute.
    """
    if name in table:
        return table[name]
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UnknownNameError(
            f"there is no {what} {name!r}{nearest(name, table)}; or give your own as "
            "'module:attribute'"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it needs is not
        raise UnknownNameError(f"{what} {name!r}: there is no module {error.name!r}") from error
    except AttributeError as error:
        raise UnknownNameError(f"{what} {name!r}: {error}") from error
