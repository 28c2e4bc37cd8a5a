"""Puts the demo's trained weights into the package, in half precision and with digests.

    python launch/ship_demo.py --tokenizer=/tmp/demo_tokenizer
    python launch/ship_demo.py --policy=/tmp/demo_base

Each argument is the workdir of a finished run of configs/demo_tokenizer.py or configs/demo_base.py.
Writes vapi_jax/assets/demo_<kind>.safetensors and notes its SHA-256 in vapi_jax/assets/digests.json,
which is checked whenever the demo's weights are loaded.
"""

import argparse
import json

import numpy as np

from vapi_jax.common.paths import local_path
from vapi_jax.weights.store import ASSETS, DIGESTS, load_safetensors, save_safetensors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for kind in ASSETS:
        parser.add_argument(
            f"--{kind}", type=local_path, help=f"workdir of the run that trained the {kind}"
        )
    args = parser.parse_args()
    digests = json.loads(DIGESTS.read_text(encoding="utf-8")) if DIGESTS.exists() else {}
    for kind, target in ASSETS.items():
        workdir = getattr(args, kind)
        if workdir is None:
            continue
        params = load_safetensors(workdir / "weights" / f"{kind}.safetensors")
        summary = json.loads((workdir / "summary.json").read_text())
        facts = {
            "trained_by": f"configs/{summary['name']}.py",
            "steps": summary["steps"],
            "versions": summary["versions"],
        }
        digests[target.name] = save_safetensors(target, params, facts, np.float16)
        print(f"{target} {target.stat().st_size / 1e6:.2f} MB {digests[target.name]}")
    DIGESTS.write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
