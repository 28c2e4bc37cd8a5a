"""Writes a trained or converted model under LlamaGen's names, for the PyTorch world.

    python -m vapi_jax.export --ckpt runs/xxl --out vapi_XXL_384.safetensors
    python -m vapi_jax.export --ckpt runs/xxl --step 50 --out step50.pt
    python -m vapi_jax.export --ckpt weights/c2i_xxl --part vq --out vq_ds16_c2i.pt

--ckpt is the workdir of a run (its final weights, or with --step a checkpoint) or a directory of
vapi_jax.convert. A `.pt` is written in the release layout {"model": state dict}, without
PyTorch; `torch.load(FILE, weights_only=True)` reads it. What was converted comes back bit for bit.

    python -m vapi_jax.export janus --ckpt runs/janus --out exported/janus

writes a folder of Janus instead; `janus --help` tells what it takes.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from vapi_jax.common.errors import exit_status
from vapi_jax.common.files import OutputError
from vapi_jax.common.paths import local_folder, local_path


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vapi_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ckpt", type=local_path, required=True, metavar="DIR")
    parser.add_argument("--out", type=local_path, required=True, metavar="FILE.safetensors|FILE.pt")
    parser.add_argument(
        "--part",
        choices=("gpt", "vq"),
        help="generator or tokenizer (default: what the run trained, or the generator)",
    )
    parser.add_argument(
        "--step",
        type=int,
        help="a checkpoint of the run in place of its final weights; -1 is the newest",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the file (default: as the weights are, bit for bit)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export at FILE"
    )
    return parser.parse_args()


def export_weights(args: argparse.Namespace) -> None:
    """Exports, and says what was written."""
    # After the command line, so that --help needs no JAX.
    import jax

    from vapi_jax.training.export import export, open_trained

    if args.out.resolve().is_relative_to(args.ckpt.resolve()):
        raise OutputError(f"{args.out} lies in {args.ckpt}, which is exported: name another --out")
    if args.out.exists() and not args.overwrite:
        raise OutputError(f"{args.out} exists: choose another place, or say --overwrite")
    jax.config.update("jax_platforms", "cpu")  # needs no accelerator, which others may be using
    with open_trained(args.ckpt, args.part, args.step) as (weights, rules):
        digest = export(args.out, weights, rules, args.dtype)
    print(f"{args.out}  {args.out.stat().st_size / 1e6:,.1f} MB  SHA-256 {digest}")


# --- Janus ----------------------------------------------------------------------------------------

JANUS = """Writes a trained or converted Janus as a folder, in the layout in which it was published.

    python -m vapi_jax.export janus --ckpt runs/janus --out exported/janus
    python -m vapi_jax.export janus --ckpt runs/janus --step 50 --dtype float32 --out exported/step50

--ckpt is the workdir of a run or a directory of `python -m vapi_jax.convert janus`. What training leaves
alone (the VQ tokenizer, and the side that looks at images if it was carried along) comes from the
directory that the run began with. Steps at a small learning rate are less than bfloat16 resolves: what
share of the weights such a file leaves unchanged is said at the end. Keep float32 to go on from it."""


def parse_janus(argv: list[str]) -> argparse.Namespace:
    """The command line of `janus`."""
    parser = argparse.ArgumentParser(
        prog="python -m vapi_jax.export janus",
        description=JANUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt", type=local_path, required=True, metavar="DIR")
    add("--out", type=local_folder, required=True, metavar="DIR", help="whole or not at all")
    add(
        "--source", type=local_path, metavar="DIR",
        help="the converted directory that the run began with (default: what its recipe names)",
    )  # fmt: skip
    add("--step", type=int, help="a checkpoint of the run; -1 is the newest")
    add(
        "--dtype", choices=("float32", "bfloat16"),
        help="of the weights (default: each as it is, bit for bit)",
    )  # fmt: skip
    add(
        "--adapters", action="store_true",
        help="of a run with policy.lora: its adapters apart, as PEFT reads them, in place of the whole model",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace an earlier export at DIR")
    args = parser.parse_args(argv)
    if args.adapters and args.dtype:
        parser.error("--adapters are written in float32: leave --dtype out")
    return args


def export_folder(args: argparse.Namespace) -> None:
    """Exports a folder of Janus, and says what was written."""
    import jax

    from vapi_jax.training.export_janus import export_adapters, export_janus

    jax.config.update("jax_platforms", "cpu")
    where = {"source": args.source, "step": args.step, "overwrite": args.overwrite}
    if args.adapters:
        _tell(export_adapters(args.ckpt, args.out, **where), args.out)
        return
    done = export_janus(args.ckpt, args.out, dtype=args.dtype, **where)
    _tell(done.digests, args.out)
    if done.unchanged is not None:
        print(done.unchanged.describe())
    if not done.complete:
        print("It draws images and does not look at them: convert with --understanding for that")


def _tell(digests: Mapping[str, str], out: Path) -> None:
    for name, digest in digests.items():
        size = (out / name).stat().st_size / 1e6
        print(f"{out / name}  {size:,.1f} MB  SHA-256 {digest}")


def main() -> int:
    """The command; returns its exit status."""
    if sys.argv[1:2] == ["janus"]:
        return exit_status(lambda: export_folder(parse_janus(sys.argv[2:])))
    return exit_status(lambda: export_weights(parse()))


if __name__ == "__main__":
    sys.exit(main())
