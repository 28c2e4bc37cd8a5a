"""Puts trained weights into the package, in half precision and with digests.

    python launch/ship.py /tmp/demo_tokenizer /tmp/demo_base
    python launch/ship.py /tmp/scenes_tokenizer
    python launch/ship.py /tmp/scenes_base

Each RUN is the workdir of a finished run of configs/demo_tokenizer.py, demo_base.py, scenes_tokenizer.py or
scenes_base.py. Writes vapi_jax/assets/<model>_<kind>.safetensors, an encoder of captions as a folder of
Hugging Face's layout, and their SHA-256 into vapi_jax/assets/digests.json, which is checked whenever they are
loaded.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from vapi_jax.common.digests import digest_of
from vapi_jax.common.paths import local_path
from vapi_jax.models import text_encoder
from vapi_jax.weights.store import DIGESTS, SHIPPED, load_safetensors, save_safetensors


def ship(run: Path) -> list[Path]:
    """Writes what a run has trained; the files."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    facts = {
        "trained_by": f"configs/{summary['name']}.py",
        "steps": summary["steps"],
        "versions": summary["versions"],
    }
    written = []
    for kind, target in SHIPPED[summary["name"].partition("_")[0]].items():
        weights = run / "weights" / f"{kind}.safetensors"
        if not weights.exists():
            continue
        params = load_safetensors(weights)
        if target.is_dir():
            written.append(text_encoder.write_weights(target, params, np.float16))
            written += [target / text_encoder.CONFIG, target / "tokenizer.json"]
        else:
            save_safetensors(target, params, facts, np.float16)
            written.append(target)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=local_path, nargs="+", metavar="RUN")
    digests = json.loads(DIGESTS.read_text(encoding="utf-8"))
    for path in [path for run in parser.parse_args().runs for path in ship(run)]:
        name = path.relative_to(DIGESTS.parent).as_posix()
        digests[name] = digest_of(path)
        print(f"{path} {path.stat().st_size / 1e6:.2f} MB {digests[name]}")
    DIGESTS.write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
