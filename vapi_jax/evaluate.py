"""Measure generated images: `python -m vapi_jax.evaluate --samples S --reference R`.

S is a folder of PNG, JPEG or WebP files, an .npz with uint8 `arr_0` (as the ADM evaluator reads), or
the output directory of vapi_jax.sample. R is the like, or an .npz of statistics (`mu`, `sigma`; an ADM
reference batch; or what --precompute has written).

  python -m vapi_jax.evaluate --samples out/samples.npz --reference imagenet256.npz \\
      --inception pt_inception-2015-12-05-6726825d.pth
  python -m vapi_jax.real_images --config=configs/c2i_demo.py --num=1024 --out=photos
  python -m vapi_jax.evaluate --samples out --reference photos --features lpips_vgg --metrics fid,kid
  python -m vapi_jax.evaluate --samples reconstructions --reference originals --paired
  python -m vapi_jax.evaluate --precompute photos_stats.npz --reference photos
  python -m vapi_jax.evaluate --verify out/samples.npz.receipt.json

FID, sFID and Inception Score exist in one network only, whose weights are a file that you bring
(--inception, or the environment variable VAPI_INCEPTION). Without it distances are taken in LPIPS
features and named so. Every number goes into a JSON receipt with digests of images and weights, settings
and the sampler's recipe; --verify recomputes a receipt, compares, and exits with 0 or 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from vapi_jax.common.errors import exit_status
from vapi_jax.common.paths import local_path, local_text
from vapi_jax.common.process_flags import NAMES, add_process_flags, process_flags
from vapi_jax.common.progress import announce
from vapi_jax.evaluation.features import EXTRACTORS, find_extractor
from vapi_jax.evaluation.measure import (
    DEFAULT_METRICS,
    DEFAULT_PAIRED,
    FEATURE_METRICS,
    MeasureError,
    Settings,
    locate,
    measure,
)
from vapi_jax.evaluation.measure import (
    precompute as write_statistics,
)
from vapi_jax.evaluation.receipt import (
    ReceiptError,
    check_writable,
    compare_receipts,
    free_path,
    read_receipt,
    show_comparison,
    show_receipt,
    write_receipt,
)
from vapi_jax.library import callable_door
from vapi_jax.models.inception import FILE_NAME, SHA256
from vapi_jax.parallel import compiler, distributed

ENVIRONMENT = "VAPI_INCEPTION"
_BATCH, _SEED, _PR_IMAGES = 64, 0, 10_000

# Flags that a mode reads besides its own; another one given would silently mean nothing.
_MODES = {
    "verify": {"samples", "reference", "features", "inception", "any_weights", "batch"},
    "precompute": {
        "reference", "features", "inception", "any_weights", "batch", "seed", "pr_images",
    },
    "evaluate": {
        "samples", "reference", "features", "inception", "any_weights", "batch", "seed",
        "pr_images", "metrics", "paired", "out",
    },
}  # fmt: skip
_NEEDED = {"verify": (), "precompute": ("reference",), "evaluate": ("samples", "reference")}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, and `mode`: evaluate, precompute or verify. None stands for a flag not given."""
    parser = argparse.ArgumentParser(
        prog="python -m vapi_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--samples", type=local_text, metavar="PATH", help="images to judge")
    add(
        "--reference",
        type=local_text,
        metavar="PATH",
        help="images or statistics to judge them against",
    )
    add(
        "--features",
        metavar="NAME",
        help="inception, efficientnet_lite0, lpips_vgg, lpips_alex, or MODULE:ATTRIBUTE of an Extractor"
        " of your own; default: inception where its weights are named, otherwise lpips_vgg",
    )
    add(
        "--inception",
        type=local_text,
        metavar="FILE",
        help=f"FID's Inception weights; default: ${ENVIRONMENT}",
    )
    add(
        "--any_weights",
        action="store_true",
        default=None,
        help="accept other Inception weights than the published file; nothing is called FID then",
    )
    add(
        "--metrics",
        metavar="LIST",
        help="of fid,sfid,is,precision,recall,kid (all by default); with --paired also psnr,ssim,"
        "ssim_llamagen,lpips_vgg,lpips_alex (default: fid,psnr,ssim,lpips_vgg)",
    )
    add(
        "--paired",
        action="store_true",
        default=None,
        help="samples are reconstructions of the reference images, by name or by order",
    )
    add("--batch", type=int, help=f"images at once (default: {_BATCH})")
    add("--seed", type=int, help=f"of shuffling and random subsets (default: {_SEED})")
    add(
        "--pr_images",
        type=int,
        help="reference images at most for precision, recall and KID, drawn at random; all samples are"
        f" used (default: {_PR_IMAGES})",
    )
    add(
        "--out",
        type=local_path,
        metavar="FILE",
        help="receipt to write (default: beside the samples)",
    )
    add(
        "--precompute",
        type=local_path,
        metavar="FILE",
        help="write statistics of the reference and stop",
    )
    add("--verify", type=local_path, metavar="FILE", help="recompute a receipt and compare")
    add_process_flags(parser)
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value is not None} - NAMES.keys()
    modes = given & {"verify", "precompute"}
    if len(modes) > 1:
        parser.error("--verify and --precompute are two commands; give one of them")
    args.mode = modes.pop() if modes else "evaluate"
    if lacking := [f"--{name}" for name in _NEEDED[args.mode] if name not in given]:
        parser.error(f"{' and '.join(lacking)} must be given")
    if unread := sorted(given - _MODES[args.mode] - {args.mode}):
        parser.error(f"--{args.mode} does not read {', '.join(f'--{name}' for name in unread)}")
    return args


def choose_features(args: argparse.Namespace, needed: bool) -> tuple[str, str | None]:
    """The name of the features and the Inception file; says so where LPIPS stands in for Inception.

    Raises:
      MeasureError: a file of weights that the features named do not read.
    """
    file = args.inception
    if file is None and (named := os.environ.get(ENVIRONMENT)):
        file = local_text(named)
    if args.features is not None:
        takes_file = find_extractor(args.features).needs_file
        if (args.inception or args.any_weights) and not takes_file:
            raise MeasureError(f"--inception: the features {args.features!r} read no such file")
        return args.features, file if takes_file else None
    if file is not None:
        return "inception", file
    if args.any_weights:
        raise MeasureError("--any_weights: name the weights with --inception")
    if needed:
        print(
            f"FID's Inception weights are not named: give {FILE_NAME} (its SHA-256 begins with"
            f" {SHA256[:8]}) as --inception FILE or in ${ENVIRONMENT}. Going on in"
            f" {EXTRACTORS['lpips_vgg'].label} features, whose distances are not FID.",
            file=sys.stderr,
        )
    return "lpips_vgg", None


def settings_from(args: argparse.Namespace) -> Settings:
    """What the flags ask for, in modes evaluate and precompute."""
    metrics = DEFAULT_PAIRED if args.paired else DEFAULT_METRICS
    if args.metrics is not None:
        listed = (name.strip() for name in args.metrics.split(","))
        metrics = tuple(dict.fromkeys(name for name in listed if name))
    needed = bool(set(metrics) & set(FEATURE_METRICS))
    features, inception = choose_features(args, needed)
    return Settings(
        samples=args.samples or "",
        reference=args.reference,
        features=features,
        inception=inception,
        any_weights=bool(args.any_weights),
        metrics=metrics,
        batch=_BATCH if args.batch is None else args.batch,
        seed=_SEED if args.seed is None else args.seed,
        pr_images=_PR_IMAGES if args.pr_images is None else args.pr_images,
        paired=bool(args.paired),
    )


def settings_of_receipt(receipt: dict[str, Any], args: argparse.Namespace) -> Settings:
    """The recorded settings, with the paths that the flags put in place of the recorded ones.

    A receipt is a file and may come from anywhere: features that are not registered here are imported
    only where the user names them.

    Raises:
      ReceiptError: settings that are missing or of another type, or features of a foreign module.
    """
    recorded, features = receipt["settings"], receipt.get("features") or {}
    metrics, paired = recorded.get("metrics"), recorded.get("paired")
    numbers = {name: recorded.get(name) for name in ("batch", "seed", "pr_images")}
    name = features.get("name", "lpips_vgg")
    texts = [name, receipt["samples"].get("path"), receipt["reference"].get("path")]
    if not (
        isinstance(metrics, list)
        and all(isinstance(text, str) for text in [*metrics, *texts])
        and all(type(number) is int for number in numbers.values())
        and isinstance(paired, bool)
    ):
        raise ReceiptError(
            f"{args.verify} is damaged: its paths or settings are not what they were"
        )
    if args.features is None and name not in EXTRACTORS:
        raise ReceiptError(
            f"{args.verify} names the features {name!r}, which are not registered here; if you trust"
            f" that module, add --features {name}"
        )
    settings = Settings(
        samples=args.samples or texts[1],
        reference=args.reference or texts[2],
        features=args.features or name,
        inception=args.inception or features.get("file"),
        any_weights=bool(args.any_weights) or not features.get("published", True),
        metrics=tuple(metrics),
        paired=paired,
        **numbers,
    )
    return settings if args.batch is None else dataclasses.replace(settings, batch=args.batch)


def verify(args: argparse.Namespace) -> int:
    """Recomputes a receipt; 0 where everything agrees, 1 where something differs."""
    recorded = read_receipt(args.verify)
    comparison = compare_receipts(recorded, measure(settings_of_receipt(recorded, args)))
    announce(show_comparison(comparison))
    return 0 if comparison.equal else 1


def evaluate(args: argparse.Namespace) -> int:
    """Measures, writes the receipt, and shows what is in it."""
    settings = settings_from(args)
    path = args.out or free_path(locate(settings.samples))
    check_writable(path)
    receipt = measure(settings)
    if jax.process_index() == 0:
        write_receipt(path, receipt)
        announce(show_receipt(path))
    return 0


def precompute(args: argparse.Namespace) -> int:
    """Writes statistics of the reference."""
    out = args.precompute
    if out.suffix != ".npz":
        raise MeasureError(f"--precompute {out}: the name of the file must end in .npz")
    facts = write_statistics(settings_from(args), out)
    images = facts["images"]
    announce(
        f"{out}: statistics of {images['count']} images (SHA-256 {images['digest'][:16]}) in"
        f" {facts['label']} features, and {facts['vectors']['count']} feature vectors"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    compiler.reserve_memory()
    commands = {"evaluate": evaluate, "precompute": precompute, "verify": verify}

    def command() -> int:
        args = parse(argv)
        return distributed.as_one(lambda: commands[args.mode](args), **process_flags(args))

    return exit_status(command)


callable_door(__name__)

if __name__ == "__main__":
    sys.exit(main())
