"""`python -m vapi_jax.convert`, from a clone that need not be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vapi_jax.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    sys.exit(main())
