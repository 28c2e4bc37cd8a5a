"""Puts the trained weights of the text demo into the package, in half precision and with digests.

    python launch/ship_scenes.py --tokenizer=/tmp/scenes_tokenizer
    python launch/ship_scenes.py --base=/tmp/scenes_base

Each argument is the workdir of a finished run of configs/scenes_tokenizer.py or configs/scenes_base.py.
Writes vapi_jax/assets/scenes_*, the encoder as a
folder of Hugging Face's layout, and notes SHA-256 in vapi_jax/assets/digests.json, which are checked
whenever the weights are loaded.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from vapi_jax.common.digests import digest_of
from vapi_jax.common.paths import local_path
from vapi_jax.models.text_encoder import write_weights
from vapi_jax.weights.store import DIGESTS, SCENES, SHIPPED, load_safetensors, save_safetensors

ENCODER = SHIPPED[SCENES]["encoder"]


def facts_of(workdir: Path) -> dict[str, Any]:
    """What a file of weights says of its origin."""
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    return {
        "trained_by": f"configs/{summary['name']}.py",
        "steps": summary["steps"],
        "versions": summary["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=local_path)
    parser.add_argument("--base", type=local_path)
    args = parser.parse_args()
    written: list[Path] = []
    runs = {"tokenizer": args.tokenizer, "policy": args.base}
    for kind, workdir in runs.items():
        if workdir is not None:
            target = SHIPPED[SCENES][kind]
            params = load_safetensors(workdir / "weights" / f"{kind}.safetensors")
            save_safetensors(target, params, facts_of(workdir), np.float16)
            written.append(target)
    if args.base is not None:
        params = load_safetensors(args.base / "weights" / "encoder.safetensors")
        written.append(write_weights(ENCODER, params, np.float16))
        written += [ENCODER / name for name in ("config.json", "tokenizer.json")]
    digests = json.loads(DIGESTS.read_text(encoding="utf-8"))
    for path in written:
        name = path.relative_to(DIGESTS.parent).as_posix()
        digests[name] = digest_of(path)
        print(f"{path} {path.stat().st_size / 1e6:.2f} MB {digests[name]}")
    DIGESTS.write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
