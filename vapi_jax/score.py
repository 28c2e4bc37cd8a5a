"""Scores of generated images: by a detector's boxes, or by a reward model that reads images and prompts.

  python -m vapi_jax.score geneval --detections=detections.jsonl --metadata=evaluation_metadata.jsonl \\
      --out=scores.jsonl
  python -m vapi_jax.score geneval --detections=results.jsonl --metadata=evaluation_metadata.jsonl \\
      --out=scores.jsonl --against=base.jsonl

Detections are one JSON object an image:

  {"filename": "00000/samples/0000.png",
   "detections": {"dog": {"boxes": [[x0, y0, x1, y1, score], ...], "colors": ["brown", ...]}}}

with every box of the detector, whatever its score, and a colour for each where a prompt asks for one; or the
results.jsonl of GenEval's own evaluator, whose boxes are judged again. --out gets a line an image: whether
it is right, and what is wrong; beside it a .json has the six tasks, their mean, and 95 % intervals by
bootstrap over prompts. --against takes a second set, scored or to be scored, and adds the paired
differences. docs/text.md says how to make detections. --samples is the folder that `vapi_jax.sample` has
made: where its images are not of `--protocol geneval`, whose figures are published, that is said.

  python -m vapi_jax.score scenes --images=DIR --metadata=metadata.jsonl --out=scores.jsonl

does the same for images of drawn scenes (`data.name="scenes"`), which need no detector of yours: what is
found in DIR is written to scores.detections.jsonl first.

  python -m vapi_jax.score clip --weights=PATH --images=DIR --prompts=FILE --out=scores.jsonl

and `hpsv2`, `pickscore`, `aesthetic` score each image with its prompt (docs/rewards.md): a line an image in
scores.jsonl; the mean, its interval by bootstrap over prompts, and what it depends on in scores.json.

  python -m vapi_jax.score colors --weights=PATH --detections=boxes.jsonl --images=DIR \\
      --metadata=evaluation_metadata.jsonl --out=detections.jsonl

adds to boxes the colours that `geneval` wants, by a CLIP (the published one: OpenAI's L/14).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from vapi_jax.common.digests import sha256_file
from vapi_jax.common.errors import ExpectedError, exit_status
from vapi_jax.common.files import make_room, write_atomically
from vapi_jax.common.options import Errors, build
from vapi_jax.common.paths import local_path, local_text
from vapi_jax.common.process_flags import add_process_flags, process_flags
from vapi_jax.common.tables import format_table
from vapi_jax.evaluation.geneval_files import PUBLISHED, Image, judge_file, read_prompts
from vapi_jax.evaluation.geneval_scores import (
    RESAMPLES,
    Estimate,
    Scores,
    check_complete,
    difference,
    score,
)
from vapi_jax.generation.protocols import departures_from_geneval
from vapi_jax.rewards.geneval import GenevalError, Prompt, Rules

MODELS = {
    "clip": "cosine of image and prompt by a CLIP",
    "hpsv2": "Human Preference Score v2 or v2.1, a cosine",
    "pickscore": "PickScore v1, exp(logit_scale) times a cosine",
    "aesthetic": "LAION's aesthetic predictor; needs no prompts",
}
"""Reward models of `vapi_jax.rewards`, by their names there."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vapi_jax.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    geneval = commands.add_parser("geneval", help="objects, counts, colors and places")
    scenes = commands.add_parser("scenes", help="the same of drawn scenes, detected here")
    geneval.add_argument("--detections", type=local_path, required=True, metavar="FILE.jsonl")
    scenes.add_argument("--images", type=local_path, required=True, metavar="DIR")
    colors = commands.add_parser("colors", help="GenEval's colors of detected objects, by a CLIP")
    colors.add_argument("--detections", type=local_path, required=True, metavar="FILE.jsonl")
    colors.add_argument("--metadata", type=local_path, required=True, metavar="FILE.jsonl")
    colors.add_argument(
        "--background", choices=("grey", "original"), default="grey",
        help="around an object's mask (default: %(default)s, as published)",
    )  # fmt: skip
    _add_network(colors)
    for name, text in MODELS.items():
        _add_model(commands.add_parser(name, help=text), name)
    _add_shared(geneval)
    _add_shared(scenes)
    args = parser.parse_args(argv)
    if args.out.suffix != ".jsonl":
        parser.error(f"--out {args.out}: wants a name that ends in .jsonl")
    return args


def _add_shared(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--metadata", type=local_path, required=True, metavar="FILE.jsonl")
    add(
        "--out",
        type=local_path,
        required=True,
        metavar="FILE.jsonl",
        help="replaced if it is there",
    )
    add("--against", type=local_path, metavar="FILE.jsonl", help="a set to compare with, by prompt")
    of_geneval = command.prog.endswith("geneval")
    place = "that of --detections" if of_geneval else "--images"
    add(
        "--samples", type=local_path, metavar="DIR",
        help=f"the folder of the images, with the recipe of their making (default: {place})",
    )  # fmt: skip
    whole = "than 4 of each of 553 prompts" if of_geneval else "than were asked for"
    add("--allow_incomplete", action="store_true", help=f"images may be fewer {whole}")
    for field in dataclasses.fields(Rules):
        kind = int if field.name == "max_objects" else float
        add(f"--{field.name}", type=kind, default=field.default, help="default %(default)s")
    add_process_flags(command)


def _add_network(command: argparse.ArgumentParser, reads: bool = True) -> None:
    add = command.add_argument
    add(
        "--weights",
        type=local_text,
        required=True,
        metavar="PATH",
        help="of a CLIP: docs/rewards.md",
    )
    add("--images", type=local_path, required=True, metavar="DIR")
    add(
        "--out",
        type=local_path,
        required=True,
        metavar="FILE.jsonl",
        help="replaced if it is there",
    )
    add("--activation", choices=("auto", "quick_gelu", "gelu"), default="auto")
    add("--dtype", choices=("bfloat16", "float32"), default="float32", help="default %(default)s")
    if reads:
        add(
            "--tokenizer", type=local_text, metavar="PATH",
            help="folder or file (default: beside the weights)",
        )  # fmt: skip
    add_process_flags(command)


def _add_model(command: argparse.ArgumentParser, name: str) -> None:
    add = command.add_argument
    _add_network(command, reads=name != "aesthetic")
    if name == "aesthetic":
        add("--head", type=local_text, required=True, metavar="FILE", help="the predictor's layers")
    else:
        add(
            "--prompts", type=local_path, required=True, metavar="FILE",
            help="a prompt a line, GenEval's or HPSv2's, or .jsonl with filename and prompt",
        )  # fmt: skip
    add("--fit", choices=("auto", "crop", "crop_floor", "pad"), help="default: the model's own")
    add("--resize", choices=("pillow", "torch_antialias", "torch"), help="default: the model's own")


def _reward(args: argparse.Namespace, name: str) -> Any:
    """The reward model of a command line, which loads nothing yet."""
    from vapi_jax.rewards import RewardSpec, make_terms

    names = {"tokenizer": "tokenizer_path"}
    asked = ("weights", "head", "tokenizer", "activation", "fit", "resize", "dtype")
    given = {names.get(option, option): getattr(args, option, None) for option in asked}
    options = {option: value for option, value in given.items() if value is not None}
    reward = make_terms([RewardSpec(name, options=options)])[0].reward
    if problems := reward.problems(1 << 10):
        raise ExpectedError(f"score {args.command}: " + "; ".join(problems))
    return reward


def colors(args: argparse.Namespace) -> None:
    """Adds colours to detections, and says what by."""
    from vapi_jax.evaluation.geneval_colors import ColorClassifier, color_detections

    path = args.out.with_suffix(".json")
    make_room((args.out, path), (args.detections, args.metadata))
    reward = _reward(args, "clip")
    prompts, classifier = read_prompts(args.metadata), ColorClassifier(reward)
    found = color_detections(args.detections, args.images, prompts, classifier, args.background)
    write_atomically(args.out, "".join(found))
    record = {
        "model": reward.describe(),
        "background": args.background,
        "detections": {"file": args.detections.name, "sha256": sha256_file(args.detections)},
        "metadata": {"file": args.metadata.name, "sha256": sha256_file(args.metadata)},
    }
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    print(f"detections with colors are in {args.out}, what they depend on in {path}")


def by_model(args: argparse.Namespace) -> None:
    """Scores images by a reward model, and writes them and what they depend on."""
    import numpy as np

    from vapi_jax.evaluation.prompt_scores import find_pictures, receipt, score_pictures

    prompts, path = getattr(args, "prompts", None), args.out.with_suffix(".json")
    lists = prompts.glob("*.json") if prompts and prompts.is_dir() else [prompts]
    make_room((args.out, path), lists)
    reward = _reward(args, args.command)
    pictures = find_pictures(args.images, prompts)
    lines, scores = [], []
    for name, prompt, value in score_pictures(reward, pictures):
        line = {"filename": name, **({"prompt": prompt} if prompts else {}), "score": value}
        lines.append(json.dumps(line) + "\n")
        scores.append(value)
    found = receipt(args.command, reward, pictures, prompts, np.array(scores))
    write_atomically(args.out, "".join(lines))
    write_atomically(path, json.dumps(found, indent=2) + "\n")
    print(
        f"{args.command}: {found['mean']:.5g} ({found['low']:.5g} to {found['high']:.5g}, 95 %) over "
        f"{found['images']} images of {found['prompts']} prompts; {found['model']['resize']}, "
        f"{found['model']['fit']}\nscores are in {args.out}, what they depend on in {path}"
    )


def geneval(args: argparse.Namespace) -> None:
    """Judges, writes verdicts and scores, and shows the table."""
    # With JAX, which --help does without.
    from vapi_jax.evaluation.receipt import ReceiptError, find_recipe

    rules, path = _rules(args), args.out.with_suffix(".json")
    make_room((args.out, path), (args.detections, *_inputs(args)))
    prompts = read_prompts(args.metadata)
    digest = sha256_file(args.metadata)
    images = judge_file(args.detections, prompts, rules)
    others = judge_file(args.against, prompts, rules) if args.against else None
    for found in (images, others):
        if found is not None and not args.allow_incomplete:
            check_complete(found, prompts)
    recipe = find_recipe(args.samples or args.detections.parent)
    if args.samples and recipe is None:
        raise ReceiptError(f"--samples {args.samples} has no recipe.json of vapi_jax.sample")
    scores = score(images, prompts)
    gaps = difference(images, others, prompts) if others else None
    changed = [image.file for image in images if image.given not in (None, image.verdict.correct)]
    write_atomically(args.out, "".join(_line(image, prompts[image.prompt]) for image in images))
    record = {
        "metadata": {
            "file": args.metadata.name,
            "sha256": digest,
            "published": digest == PUBLISHED,
        },
        "detections": {"file": args.detections.name, "sha256": sha256_file(args.detections)},
        "sampling": recipe,
        "rules": dataclasses.asdict(rules),
        "scores": dataclasses.asdict(scores),
        "intervals": f"95 %, bootstrap over prompts, {RESAMPLES} resamples",
        "verdicts_unlike_the_file's": changed,
    }
    if args.against and gaps:
        record["against"] = {
            "file": args.against.name,
            "sha256": sha256_file(args.against),
            "difference": {name: dataclasses.asdict(gap) for name, gap in gaps.items()},
        }
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    print(_table(scores, gaps))
    if recipe is None:
        print("how the images were made is not known: --samples DIR names their folder")
    if args.command == "geneval":  # scenes have no published prompts, nor a published protocol
        if digest != PUBLISHED:
            print(f"{args.metadata} is not the published evaluation_metadata.jsonl")
        if recipe is not None and (other := departures_from_geneval(recipe)):
            print(f"warning: {other}")
    if changed:
        print(f"{len(changed)} verdicts differ from the file's own, the first of {changed[0]}")
    print(f"verdicts and reasons are in {args.out}, all numbers in {path}")


def scenes(args: argparse.Namespace) -> None:
    """Detects, and does as `geneval` does with any detections."""
    from vapi_jax.evaluation.receipt import find_recipe
    from vapi_jax.evaluation.scene_files import detect_folder, read_scene_prompts

    args.detections = args.out.with_suffix(".detections.jsonl")
    _rules(args)  # that anything wrong with them comes first
    make_room((args.detections, args.out, args.out.with_suffix(".json")), _inputs(args))
    prompts = read_scene_prompts(args.metadata)
    detect_folder(args.images, args.detections, prompts, args.allow_incomplete)
    if args.samples is None and find_recipe(args.images) is not None:
        args.samples = args.images
    args.allow_incomplete = True  # The size of GenEval's set is not that of these prompts.
    geneval(args)


def _rules(args: argparse.Namespace) -> Rules:
    given, errors = (
        {field.name: getattr(args, field.name) for field in dataclasses.fields(Rules)},
        Errors(),
    )
    rules = build(Rules, given, "--", errors)
    if errors:
        raise GenevalError("; ".join(errors))
    return rules


def _inputs(args: argparse.Namespace) -> tuple[Any, ...]:
    """What `geneval` and `scenes` read beside detections, the record of another set included."""
    other = args.against
    return args.metadata, other, other and other.with_suffix(".json")


def _line(image: Image, prompt: Prompt) -> str:
    verdict: dict[str, Any] = {"filename": image.file, "tag": prompt.tag, "prompt": prompt.text}
    return json.dumps({**verdict, **dataclasses.asdict(image.verdict)}) + "\n"


def _table(scores: Scores, gaps: dict[str, Estimate] | None) -> str:
    def cells(estimate: Estimate) -> list[str]:
        return [f"{estimate.value:.3f}", f"{estimate.low:.3f} to {estimate.high:.3f}"]

    headers = ["task", "score", "95 %", *(["difference", "95 %"] if gaps else [])]
    rows = [
        [name, *cells(estimate), *(cells(gaps[name]) if gaps else [])]
        for name, estimate in scores.tasks.items()
    ]
    return (
        f"{format_table(rows, headers)}\n{scores.images} images of {scores.prompts} prompts: "
        f"{scores.images_correct:.1%} of the images right, {scores.prompts_solved:.1%} of the prompts "
        "with a right one"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""

    def run() -> int:
        args = parse(argv)
        command = {"geneval": geneval, "scenes": scenes, "colors": colors}.get(
            args.command, by_model
        )
        # After the command line, so that --help needs no JAX.
        from vapi_jax.parallel import distributed

        return distributed.as_one(
            lambda: distributed.by_one(lambda: command(args)), **process_flags(args)
        )

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
