"""What is said of a configuration that is wrong."""

import pytest

from vapi_jax.methods.config import ConfigError
from vapi_jax.methods.resolve import resolve

MINIMAL = {"name": "x", "method": "vapi", "policy": {"kind": "class", "size": "GPT-B"}}


def lines(**changes):
    """The errors of a configuration, one a line, without the prefix."""
    with pytest.raises(ConfigError) as error:
        resolve({**MINIMAL, **changes})
    count, *rest = str(error.value).splitlines()
    assert count.startswith(f"{len(rest)} error(s)")
    assert all(line.startswith("  - config.") for line in rest)
    return [line.removeprefix("  - config.") for line in rest]
