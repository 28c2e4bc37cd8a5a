"""Places in this repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
"""The golden arrays that are in the repository."""

CONFIGS = ROOT / "configs"
"""The recipes."""
