"""Tables for a terminal."""

import pytest

from vapi_jax.common import tables


def test_table_is_aligned():
    text = tables.format_table(
        [["base, T=1", -0.50512, "471.6 ± 1.8"], ["VA-π", None, "458.4 ± 1.0"]],
        ["model", "reward", "distance"],
    )
    assert text.splitlines() == [
        "model       reward     distance",
        "---------  -------  -----------",
        "base, T=1  -0.5051  471.6 ± 1.8",
        "VA-π             -  458.4 ± 1.0",
    ]
    with pytest.raises(ValueError, match="cells"):
        tables.format_table([[1]], ["a", "b"])
