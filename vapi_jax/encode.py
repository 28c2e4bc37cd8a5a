"""Encodes captions, or the data of a recipe, once: `python -m vapi_jax.encode captions|dataset ...`.

  python -m vapi_jax.encode captions --text_encoder=flan-t5-xl --captions=captions.txt --out=captions.npz
  python -m vapi_jax.encode dataset --config=configs/c2i_xxl.py --out=encoded/imagenet

`captions` takes a text file with a caption on each line (JSON strings in a .jsonl) and the folder of a
T5 v1.1 encoder as Hugging Face keeps it. It writes ids, mask, left_features, left_mask and cleaned,
and beside them a .json that counts and lists the captions that are empty, too long or not Latin.
`python -m vapi_jax.sample --conditions=captions.npz` draws images for them.

`dataset` encodes the images that a recipe would train on, in its order and with its crops and flips:

  python -m vapi_jax.main --config=configs/c2i_xxl.py --workdir=runs/xxl \\
      --config.data.name=encoded --config.data.path=encoded/imagenet --config.data.shuffle=false

takes the very steps that it would take without, less the encoder and the decoding of image files.
--num fixes how many (default: as many as the recipe's steps see). Its held-out images are encoded too.
Captions become features at their own length in bfloat16, which configs/t2i_xl.py:precomputed reads;
--notokens leaves the images to the run. The same command goes on after an interruption, and several
processes share the work.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from vapi_jax.common.errors import exit_status
from vapi_jax.common.paths import local_path, local_text
from vapi_jax.common.process_flags import add_process_flags, process_flags
from vapi_jax.common.progress import announce

# --- captions -------------------------------------------------------------------------------------


def parse_captions(argv: list[str]) -> argparse.Namespace:
    """The command line of `captions`."""
    parser = argparse.ArgumentParser(
        prog="python -m vapi_jax.encode captions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    add(
        "--text_encoder", type=local_text, required=True, metavar="DIR",
        help="of Hugging Face, such as flan-t5-xl; scenes for the one that ships",
    )  # fmt: skip
    add("--captions", type=local_path, required=True, metavar="FILE.txt|FILE.jsonl")
    add("--out", type=local_path, required=True, metavar="FILE.npz", help="replaced if it is there")
    add("--clean", action=switch, default=True, help="LlamaGen's cleaning of captions, twice")
    add("--lower", action=switch, default=True, help="in lower case")
    add(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the encoder; LlamaGen's features are bfloat16's (default %(default)s)",
    )  # fmt: skip
    add(
        "--length", type=int, default=120,
        help="tokens of a caption, as the generator takes them: LlamaGen's 120 (the default), 12 of scenes",
    )  # fmt: skip
    add("--batch", type=int, default=32, help="captions at once (default %(default)s)")
    add("--fsdp", type=int, default=1, help="devices that share one copy of the encoder")
    add_process_flags(parser)
    args = parser.parse_args(argv)
    for name, least in (("batch", 1), ("length", 2)):  # the end token takes one
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name} {value}: wants at least {least}")
    if args.out.suffix != ".npz":
        parser.error(f"--out {args.out}: wants a name that ends in .npz")
    return args


def captions(argv: list[str]) -> int:
    """`captions`: from a text file to features."""
    args = parse_captions(argv)
    # After the command line, so that --help needs no JAX.
    from vapi_jax.parallel import compiler, distributed

    compiler.reserve_memory()
    return distributed.as_one(lambda: _encode_captions(args), **process_flags(args))


def _encode_captions(args: argparse.Namespace) -> None:
    from vapi_jax.common.digests import sha256_file
    from vapi_jax.common.files import make_room
    from vapi_jax.data.caption_files import read_captions
    from vapi_jax.data.config import DataError
    from vapi_jax.generation.captions import encode_captions, flagged
    from vapi_jax.models.conditions import CAPTION_FLAGS
    from vapi_jax.models.text_encoder import TextEncoder, folder_of
    from vapi_jax.parallel.sharding import make_mesh

    make_room((args.out, args.out.with_suffix(".json")), (args.captions,))
    texts = read_captions(args.captions)
    try:
        mesh = make_mesh(fsdp=args.fsdp)
    except ValueError as error:
        raise DataError(f"--fsdp {args.fsdp}: {error}") from error
    encoder = TextEncoder(
        folder_of(args.text_encoder), mesh, dtype=args.dtype, length=args.length, clean=args.clean,
        lower=args.lower,
    )  # fmt: skip
    facts = {"source": {"file": args.captions.name, "sha256": sha256_file(args.captions)}}
    record = encode_captions(encoder, texts, args.out, batch=args.batch, facts=facts)
    if not record:  # another process has it
        return
    print(f"{args.out}: {len(texts)} captions, features {encoder.length} x {encoder.width} each")
    print(flagged({name: record[name] for name in CAPTION_FLAGS}, texts, "line"))
    print(f"all of them are listed in {args.out.with_suffix('.json')}")


# --- a recipe's images ----------------------------------------------------------------------------


def dataset(argv: list[str]) -> int:
    """`dataset`: from a recipe to tokens. Recipes need absl's flags, which are defined on import."""
    from vapi_jax.common import output_flags, recipe_flags
    from vapi_jax.common import process_flags as several

    flags.adopt_module_key_flags(recipe_flags)
    flags.adopt_module_key_flags(output_flags)
    flags.adopt_module_key_flags(several)
    flags.DEFINE_boolean("tokens", True, "also encode the images with the recipe's tokenizer")
    app.run(_dataset, [sys.argv[0], *argv], flags_parser=recipe_flags.parse_flags)


def _dataset(argv: list[str]) -> int:
    from vapi_jax.common.output_flags import NUM, OUT
    from vapi_jax.common.recipe_flags import CONFIG
    from vapi_jax.parallel import compiler, distributed

    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    recipe, out = CONFIG.value, OUT.value
    if recipe is None or out is None:
        raise app.UsageError("--config and --out are needed; see --help")
    compiler.reserve_memory()
    return distributed.as_one(
        lambda: _encode(recipe, out, NUM.value, flags.FLAGS.tokens), **process_flags()
    )


def _encode(recipe: Any, out: Path, num: int, tokens: bool) -> None:
    from vapi_jax.generation.encoding import encode_dataset
    from vapi_jax.methods import make_method
    from vapi_jax.methods.resolve import resolve
    from vapi_jax.training.run import prepare_devices

    config = resolve(recipe)
    method = make_method(config, prepare_devices(config))
    counts = encode_dataset(method, out, num, tokens=tokens)
    told = ", ".join(f"{count} {split}" for split, count in counts.items())
    announce(
        f"{out}: {told} images. Use them with --config.data.name=encoded --config.data.path={out} "
        "--config.data.shuffle=false"
    )


COMMANDS = {"captions": captions, "dataset": dataset}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(lambda: _choose(sys.argv[1:] if argv is None else argv))


def _choose(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        (sys.stdout if asked else sys.stderr).write(__doc__ or "")
        return 0 if asked else 2
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main())
