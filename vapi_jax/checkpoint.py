"""Look into the checkpoints of a run: `python -m vapi_jax.checkpoint inspect|verify DIR`.

  python -m vapi_jax.checkpoint inspect runs/demo           what is there: steps, digests, sizes
  python -m vapi_jax.checkpoint inspect runs/demo --json    the same for programs
  python -m vapi_jax.checkpoint verify runs/demo            reads everything, compares every digest

DIR is the workdir of a run or its checkpoints folder. `inspect` reads manifests only. `verify` exits
with 1 where anything is damaged, and says which step, file and array; both exit with 2 where DIR holds
no checkpoints.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
from absl import logging

from vapi_jax.common.errors import exit_status
from vapi_jax.common.paths import local_path
from vapi_jax.common.tables import format_table
from vapi_jax.training.checkpoint import Checkpointer
from vapi_jax.training.checkpoint.manifest import Manifest, ManifestError, read_manifest

_UNFINISHED = "*.orbax-checkpoint-tmp*"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(lambda: _look(parse(argv)))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vapi_jax.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("inspect", "what is there"), ("verify", "whether it is whole")):
        command = commands.add_parser(name, help=text)
        command.add_argument("directory", type=local_path, metavar="DIR")
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def _look(options: argparse.Namespace) -> int:
    directory = _checkpoints(options.directory)
    steps = (
        sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit()) if directory else []
    )
    if directory is None or not steps:
        print(f"error: {options.directory} holds no checkpoints", file=sys.stderr)
        return 2
    found = [inspect_step(directory / str(step)) for step in steps]
    if options.command == "verify":
        for entry in found:
            entry["damage"] = entry["damage"] or verify_step(directory, entry["step"])
    unfinished = sorted(path.name for path in directory.glob(_UNFINISHED))
    if options.json:
        document = {"directory": str(directory), "steps": found, "unfinished": unfinished}
        print(json.dumps(document, indent=2))
    elif options.command == "inspect":
        _print_steps(found, unfinished)
    else:
        for entry in found:
            state = f"DAMAGED: {entry['damage']}" if entry["damage"] else "whole"
            print(f"step {entry['step']}: {entry['arrays']} arrays, {state}")
    return int(any(entry["damage"] for entry in found))


def _checkpoints(directory: Path) -> Path | None:
    """The folder of steps in a workdir, or the directory itself."""
    inside = directory / "checkpoints"
    chosen = inside if inside.is_dir() else directory
    return chosen if chosen.is_dir() else None


def inspect_step(directory: Path) -> dict[str, Any]:
    """What the manifest of a step says and how large its files are."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    facts: dict[str, Any] = {
        "step": int(directory.name),
        "bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
    }
    try:
        manifest = read_manifest(directory)
    except ManifestError as error:
        nothing: dict[str, Any] = {"saved": None, "digest": None, "arrays": 0, "items": {}}
        return facts | nothing | {"damage": str(error)}
    return facts | {
        "saved": manifest.saved,
        "digest": manifest.digest,
        "arrays": len(manifest.arrays),
        "items": {item: _item(manifest, item) for item in manifest.items},
        "damage": "",
    }


def _item(manifest: Manifest, item: str) -> dict[str, Any]:
    if item in manifest.facts:
        return {"kind": "facts", "sha256": manifest.facts[item]}
    arrays = [value for name, value in manifest.arrays.items() if name.split("/")[0] == item]
    return {
        "kind": "arrays",
        "arrays": len(arrays),
        "numbers": sum(math.prod(array.shape) for array in arrays),
        "bytes": sum(array.nbytes for array in arrays),
    }


def verify_step(directory: Path, step: int) -> str:
    """Reads every array and fact of a step; what is wrong with it, or ""."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be at work on the run itself
    logging.set_verbosity(logging.ERROR)
    with Checkpointer(directory) as checkpointer:
        return checkpointer.damage(step)


def _print_steps(found: list[dict[str, Any]], unfinished: list[str]) -> None:
    rows = [
        [str(e["step"]), e["saved"] or "-", f"{e['bytes'] / 1e6:.1f}", (e["digest"] or "-")[:16]]
        for e in found
    ]
    print(format_table(rows, ["step", "saved", "MB on disk", "digest of all arrays"]))
    whole = [entry for entry in found if not entry["damage"]]
    if whole:
        latest = whole[-1]
        print(f"\nitems of step {latest['step']}:")
        items = [
            [name, item.get("arrays"), item.get("numbers"), item.get("bytes", 0) / 1e6 or None]
            for name, item in latest["items"].items()
        ]
        print(format_table(items, ["item", "arrays", "numbers", "MB"]))
    for entry in found:
        if entry["damage"]:
            print(f"\nstep {entry['step']} is DAMAGED: {entry['damage']}")
    if unfinished:
        print(f"\nleft by saves that did not finish, ignored: {', '.join(unfinished)}")


if __name__ == "__main__":
    sys.exit(main())
