"""Train what a recipe describes: `python -m vapi_jax.main --config=configs/c2i_demo.py --workdir=DIR`.

Flags and devices only; the work begins in `vapi_jax.run`. Recipes are under configs/; a variant
follows a colon, and any option can be overridden:

  python -m vapi_jax.main --config=configs/c2i_demo.py:tiny --workdir=/tmp/tiny
  python -m vapi_jax.main --config=configs/c2i_xxl.py --workdir=runs/xxl --config.vapi.ce_weight=0.2

Everything a run makes is in its workdir: report.html (open it), summary.json, metrics.jsonl,
tensorboard/, weights/*.safetensors and checkpoints/. The same command goes on from the last
checkpoint there.
"""

import logging
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A recipe and its variant, such as configs/c2i_demo.py:tiny", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run writes; made if absent")
_CHECK = flags.DEFINE_bool("check", False, "Print the resolved configuration and stop")


def main(argv: list[str]) -> int:
    """Sets devices up before JAX starts, then hands over."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if _CONFIG.value is None or (_WORKDIR.value is None and not _CHECK.value):
        raise app.UsageError("--config and --workdir are needed; see --help")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vapi_jax").setLevel(logging.INFO)

    from vapi_jax import run  # after the flags, so that --help needs no JAX
    from vapi_jax.config import ConfigError, resolve

    try:
        config = resolve(_CONFIG.value)
        if _CHECK.value:
            run.print_plan(config)
        else:
            run.run(config, Path(_WORKDIR.value))
    except (ConfigError, *run.EXPECTED_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    app.run(main)
