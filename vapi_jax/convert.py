"""Converts released LlamaGen weights into a directory that recipes load.

    python -m vapi_jax.convert --gpt c2i_XXL_384.pt --vq vq_ds16_c2i.pt --out weights/c2i_xxl
    python -m vapi_jax.convert --gpt t2i_XL_stage1_256.pt --vq vq_ds16_t2i.pt --out weights/t2i_xl
    python -m vapi_jax.convert --gpt my_model.pt --args my_model.json --out weights/mine

then --config.init.gpt=weights/c2i_xxl --config.init.vq=weights/c2i_xxl. Reads PyTorch checkpoints (zip
format, {"model" | "module" | "state_dict": ...} or a bare state dict), safetensors, and shards by their
index or their folder, without PyTorch and without running anything a file contains. Writes
model.safetensors (in shards above 4 GB), config.json and manifest.json with the digests of all.

    python -m vapi_jax.convert janus --src Janus-Pro-1B --out weights/janus_pro_1b

converts a published folder of Janus instead, tokenizers included; `janus --help` tells what it takes.

A file that holds several models, such as averaged weights beside the trained ones, is asked with
--entry=ema. Weights that are not finite are refused.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vapi_jax.common.errors import exit_status
from vapi_jax.common.files import read_json
from vapi_jax.common.paths import local_folder, local_path, local_text


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vapi_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--gpt", type=local_path, metavar="FILE|DIR", help="the generator's weights"
    )
    parser.add_argument("--vq", type=local_path, metavar="FILE|DIR", help="the tokenizer's weights")
    parser.add_argument(
        "--out", type=local_folder, required=True, metavar="DIR", help="written whole or not at all"
    )
    parser.add_argument(
        "--args",
        type=local_path,
        metavar="FILE.json",
        help="LlamaGen's arguments of a generator that is none of the released sizes",
    )
    parser.add_argument(
        "--vq-args", type=local_path, metavar="FILE.json", help="the same for the tokenizer"
    )
    parser.add_argument(
        "--entry",
        default="",
        metavar="NAME",
        help="of a file with several models, which is the generator (ema; default: model)",
    )
    parser.add_argument(
        "--vq-entry", default="", metavar="NAME", help="the same for the tokenizer's file"
    )
    parser.add_argument(
        "--classes",
        type=local_text,
        metavar="imagenet|FILE",
        help="names of the generator's classes, one a line in the order of their labels; training data "
        "are matched to them (default: ImageNet's for a thousand classes, else unknown)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        choices=(256, 384, 512),
        help="pixels a side the generator was trained on, where neither file nor file name tells",
    )
    parser.add_argument(
        "--t2i", action="store_true", help="refuse anything but a text-conditional generator"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of what is written (default: as in the files, bit for bit)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier conversion at DIR"
    )
    args = parser.parse_args()
    for part, names in (
        ("gpt", ("args", "entry", "classes", "image_size", "t2i")),
        ("vq", ("vq_args", "vq_entry")),
    ):
        for name in names if getattr(args, part) is None else ():
            if getattr(args, name):
                likely = f"; --vq-{name} is the tokenizer's" if name in ("args", "entry") else ""
                parser.error(
                    f"--{name.replace('_', '-')} is of --{part}, which is not given{likely}"
                )
    return args


def convert_files(args: argparse.Namespace) -> None:
    """Converts, and says what it found."""
    # After the command line, so that --help needs no JAX.
    import jax

    from vapi_jax.models.conversion import convert
    from vapi_jax.weights.names import WeightsError

    jax.config.update("jax_platforms", "cpu")  # needs no accelerator, which others may be using
    manifest = convert(
        args.out,
        gpt=args.gpt,
        vq=args.vq,
        gpt_args=read_json(args.args, WeightsError) if args.args else None,
        vq_args=read_json(args.vq_args, WeightsError) if args.vq_args else None,
        image_size=args.image_size,
        t2i=args.t2i,
        entry=args.entry,
        vq_entry=args.vq_entry,
        classes=args.classes or "",
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    _tell(manifest, args.out)


def _tell(manifest: Mapping[str, Any], out: Path) -> None:
    for part, description in manifest["architecture"].items():
        print(f"{part}: {description}; {manifest['parameters'][part]:,} parameters")
        if ignored := manifest["ignored"][part]:
            print(f"  not converted: {', '.join(ignored)}")
    for name, facts in manifest["outputs"].items():
        print(f"{out / name}  {facts['size'] / 1e6:,.1f} MB  {facts['sha256'][:16]}...")
    options = " ".join(f"--config.init.{part}={out}" for part in manifest["architecture"])
    print(f"Use it with: {options}")


# --- Janus ----------------------------------------------------------------------------------------

JANUS = """Converts a published folder of Janus into a directory that recipes load.

    python -m vapi_jax.convert janus --src Janus-Pro-1B --out weights/janus_pro_1b

The folder has config.json, tokenizer.json, tokenizer_config.json and weights (safetensors or .bin, whole or
in shards with their index), in DeepSeek's layout or in that of transformers. The language model and
the gen modules become "gpt", the VQ tokenizer inside becomes "vq". The side that looks at images
(vision_model, aligner) and the text head draw no image and are left out, unless --understanding carries
them along, so that `python -m vapi_jax.export janus` gives a complete model again."""


def parse_janus(argv: list[str]) -> argparse.Namespace:
    """The command line of `janus`."""
    parser = argparse.ArgumentParser(
        prog="python -m vapi_jax.convert janus",
        description=JANUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--src", type=local_path, required=True, metavar="DIR", help="as it was published")
    add("--out", type=local_folder, required=True, metavar="DIR", help="whole or not at all")
    add("--understanding", action="store_true", help="carry along what draws no image")
    add(
        "--dtype", choices=("float32", "bfloat16"),
        help="of what is written (default: as in the files, bit for bit)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace an earlier conversion at DIR")
    return parser.parse_args(argv)


def convert_folder(args: argparse.Namespace) -> None:
    """Converts a folder of Janus, and says what it found."""
    import jax

    from vapi_jax.models.janus_folder import convert_janus

    jax.config.update("jax_platforms", "cpu")
    manifest = convert_janus(
        args.src,
        args.out,
        understanding=args.understanding,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    _tell(manifest, args.out)


def main() -> int:
    """The command; returns its exit status."""
    if sys.argv[1:2] == ["janus"]:
        return exit_status(lambda: convert_folder(parse_janus(sys.argv[2:])))
    return exit_status(lambda: convert_files(parse()))


if __name__ == "__main__":
    sys.exit(main())
