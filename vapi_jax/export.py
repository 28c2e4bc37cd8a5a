"""Writes a trained or converted model under LlamaGen's names, for the PyTorch world.

    python -m vapi_jax.export --ckpt runs/xxl --out vapi_XXL_384.safetensors
    python -m vapi_jax.export --ckpt runs/xxl --step 50 --out step50.pt
    python -m vapi_jax.export --ckpt weights/c2i_xxl --part vq --out vq_ds16_c2i.pt

--ckpt is the workdir of a run (its final weights, or with --step a checkpoint) or a directory of
vapi_jax.convert. A `.pt` is written in the release layout {"model": state dict}, without
PyTorch; `torch.load(FILE, weights_only=True)` reads it. What was converted comes back bit for bit.
"""

import argparse
import sys

from vapi_jax.common.errors import exit_status
from vapi_jax.common.paths import local_path


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
    return parser.parse_args()


def export_weights(args: argparse.Namespace) -> None:
    """Exports, and says what was written."""
    # After the command line, so that --help needs no JAX.
    import jax

    from vapi_jax.training.export import export, open_trained

    jax.config.update("jax_platforms", "cpu")  # needs no accelerator, which others may be using
    with open_trained(args.ckpt, args.part, args.step) as (weights, rules):
        digest = export(args.out, weights, rules, args.dtype)
    print(f"{args.out}  {args.out.stat().st_size / 1e6:,.1f} MB  SHA-256 {digest}")


def main() -> int:
    """The command; returns its exit status."""
    return exit_status(lambda: export_weights(parse()))


if __name__ == "__main__":
    sys.exit(main())
