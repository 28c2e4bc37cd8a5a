"""`python -m vapi_jax.convert janus`, from a clone that need not be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vapi_jax.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "janus"]
    sys.exit(main())
