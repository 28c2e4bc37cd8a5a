"""What can be wrong with checkpoints, in words."""

from __future__ import annotations

import re
from pathlib import Path

from vapi_jax.common.errors import ExpectedError


class CheckpointError(ExpectedError, RuntimeError):
    """No usable checkpoint, or none could be written: says what is wrong and what to do."""


class Damage(Exception):
    """A step that cannot be used; turned into a warning or a `CheckpointError`."""


def files_named(error: BaseException, directory: Path) -> str:
    """The files of a step that an error, or what caused it, names."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    pattern = re.escape(str(directory)) + r"/[\w./-]*\w"
    found = {match for text in texts for match in re.findall(pattern, text)}
    return ", ".join(sorted(path for path in found if not Path(path).is_dir())[:3])


def brief(error: BaseException) -> str:
    """The kind of an error and the beginning of its message."""
    first_line = (str(error).splitlines() or [""])[0][:160]
    return f"{type(error).__name__}: {first_line}"
