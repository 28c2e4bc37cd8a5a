"""Draw images from a checkpoint: `python -m vapi_jax.sample --ckpt CHECKPOINT --out DIR`.

CHECKPOINT is "demo" (photographs) or "scenes" (drawn scenes, from captions) for weights that ship with the
package, or the directory of a run:

  python -m vapi_jax.sample --ckpt demo --num 96 --grid --out /tmp/demo_samples
  python -m vapi_jax.sample --ckpt scenes --prompts "a photo of a ring" --cfg 2 --grid --out /tmp/rings
  python -m vapi_jax.sample --ckpt runs/demo --num 16 --labels chelsea,coffee --out /tmp/two

The published protocol (50,000 images of random classes at 384 px, judged at 256 px):

  python -m vapi_jax.sample --ckpt runs/xxl --protocol adm50k --dtype bfloat16 --out samples/xxl

Images for prompts, from a text-conditional checkpoint, and GenEval's 4 of each by the published protocol:

  python -m vapi_jax.sample --ckpt weights/t2i_xl --text_encoder flan-t5-xl --prompts "a red cat" \\
      --cfg 7.5 --top_k 1000 --out samples/cat
  python -m vapi_jax.sample --ckpt weights/t2i_xl --text_encoder flan-t5-xl --protocol geneval \\
      --prompts evaluation_metadata.jsonl --out samples/geneval
  python -m vapi_jax.sample --ckpt weights/janus_pro_1b --protocol geneval_janus --dtype bfloat16 \\
      --prompts evaluation_metadata.jsonl --out samples/geneval_janus

The same command after an interruption goes on where it was, with another --batch or a larger --num too:
sample i depends on --seed, i and its label alone, whatever the batch and the number of devices.
DIR/recipe.json says how the images were made; DIR/images and DIR/samples.npz (ADM's layout) are what
evaluators take.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from vapi_jax.common.errors import ExpectedError, exit_status
from vapi_jax.common.paths import local_folder, local_path, local_text
from vapi_jax.common.process_flags import add_process_flags, process_flags
from vapi_jax.common.progress import ProgressBar, format_duration
from vapi_jax.evaluation.receipt import environment
from vapi_jax.generation.files import (
    FORMATS,
    RECIPE,
    SampleFiles,
    settle_recipe,
    write_recipe,
)
from vapi_jax.generation.generator import Generator
from vapi_jax.generation.loading import load_generator
from vapi_jax.generation.prompt_lists import prompts_at
from vapi_jax.generation.prompts import (
    LAYOUTS,
    MOST_SAMPLES,
    PromptFiles,
    PromptRequests,
    request_prompts,
)
from vapi_jax.generation.protocols import PROTOCOLS
from vapi_jax.generation.requests import Requests, make_requests
from vapi_jax.generation.sampler import Sampler, most_at_once
from vapi_jax.library import callable_door
from vapi_jax.parallel import compiler, distributed
from vapi_jax.parallel.sharding import all_devices, make_mesh
from vapi_jax.report.pictures import overview

SCHEDULES = ("constant", "interval", "cosine")
UINT8_RULE = "truncate(clamp(127.5 x + 128, 0, 255))"
RESIZE_RULE = "bicubic, a = -0.75, half-pixel centres, no antialias"
STOPPED = "stopped; the same command goes on from here"
GRID_ROWS, GRID_COLUMNS, GRID_LETTERS = 12, 8, 14


class SampleError(ExpectedError, ValueError):
    """A request that cannot be met; the message says why and what to do."""


# --- what is asked for ----------------------------------------------------------------------------


def _at_least(least: int, most: int = 1 << 31) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value < most:
            raise argparse.ArgumentTypeError(f"{value}: wants {least} to {most - 1}")
        return value

    parse.__name__ = "whole number"  # argparse: "invalid whole number value: 'many'"
    return parse


def _number(low: float, high: float = math.inf) -> Any:
    def parse(text: str) -> float:
        value = float(text)
        if not low < value <= high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text}: wants more than {low}, at most {high}")
        return value

    parse.__name__ = "number"
    return parse


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vapi_jax.sample",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--ckpt",
        type=local_text,
        required=True,
        help="'demo' or 'scenes' (shipped; a folder of that name is ./demo), or the directory of a run or "
        "of converted weights",
    )
    add("--out", required=True, type=local_folder, metavar="DIR", help="where the images go")
    add("--num", type=_at_least(1), default=50_000, help="how many (default %(default)s)")
    add(
        "--batch", type=_at_least(1),
        help="drawn at once (default: 64 on every device, or as many as it has room for)",
    )  # fmt: skip
    add("--seed", type=_at_least(0, 1 << 32), default=0, help="default %(default)s")
    add(
        "--labels", type=local_text, metavar="RULE",
        help="'balanced' (0, 1, 2, ... in turn; the default), 'random', a list such as 0,1,5 or of "
        "class names, or a FILE with one a line; lists are repeated as often as needed",
    )  # fmt: skip
    add(
        "--conditions", type=local_path, metavar="FILE",
        help="for a text-conditional checkpoint: .npz of features [N, P, W] and mask [N, P], left "
        "padded; sample i takes row i mod N",
    )  # fmt: skip
    prompting = parser.add_argument_group("prompts")
    add = prompting.add_argument
    add(
        "--prompts", type=prompts_at, metavar="FILE|TEXT",
        help="for a text-conditional checkpoint: .txt (a prompt a line), .jsonl, .json, .tsv, .csv, or "
        "the prompt itself; the images of a prompt depend on --seed and its place in the file",
    )  # fmt: skip
    add(
        "--text_encoder", type=local_path, metavar="DIR",
        help="of Hugging Face, such as flan-t5-xl (default: the one that a run was trained with)",
    )  # fmt: skip
    add(
        "--per_prompt",
        type=_at_least(1, MOST_SAMPLES + 1),
        help="images of each (default 4; hps 1)",
    )
    add(
        "--layout", choices=LAYOUTS, default="flat",
        help="images/000000.png, ... (default); geneval's 00000/samples/0000.png; hps's STYLE/00000.jpg",
    )  # fmt: skip
    add("--no-clean", action="store_true", help="leave prompts as they are, but for the case")
    add = parser.add_argument
    shown = "; ".join(
        f"{name} is {' '.join(f'--{flag} {value}' for flag, value in flags.items())}"
        for name, flags in PROTOCOLS.items()
    )
    add("--protocol", choices=PROTOCOLS, help=f"flags that published numbers are of: {shown}")
    drawing = parser.add_argument_group("drawing")
    add = drawing.add_argument
    add("--temperature", type=_number(0.0), default=1.0, help="default %(default)s")
    add("--top_k", type=_at_least(0), default=0, help="keep the k likeliest tokens; 0 keeps all")
    add("--top_p", type=_number(0.0, 1.0), default=1.0, help="nucleus; 1 keeps all")
    add("--greedy", action="store_true", help="take the likeliest token")
    add(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="what generator and decoder compute in, whatever the checkpoint was trained in "
        "(default %(default)s)",
    )  # fmt: skip
    drawing = parser.add_argument_group("guidance")
    add = drawing.add_argument
    add("--cfg", type=_number(-math.inf), default=1.0, help="scale; 1 (the default) is none")
    add(
        "--cfg_schedule", choices=SCHEDULES, default="constant",
        help="the same for all tokens (default), for the first ones only, or rising along a cosine",
    )  # fmt: skip
    add("--cfg_interval", type=_at_least(0), metavar="N", help="interval: tokens 0 .. N + 1")
    add(
        "--cfg_power", type=_number(0.0), metavar="P", help="cosine: 1 + (cfg-1)(1-cos(π(t/T)^P))/2"
    )
    output = parser.add_argument_group("output")
    add = output.add_argument
    add(
        "--resize",
        type=_at_least(1, 1 << 14),
        metavar="PX",
        help=f"side to resize to: {RESIZE_RULE}",
    )
    add("--format", choices=FORMATS, default="png", help="default %(default)s")
    add(
        "--grid", action="store_true",
        help="also DIR/grid.png: a few samples, a row for each class; or a grid of each prompt",
    )  # fmt: skip
    add("--cpu_devices", type=_at_least(1, 257), default=1, help="virtual devices on a CPU")
    add_process_flags(parser)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, checked against each other; exits with status 2 and a sentence where they clash."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for_prompts = args.protocol is not None and "per_prompt" in PROTOCOLS[args.protocol]
    if for_prompts and args.prompts is None:
        parser.error(f"--protocol {args.protocol} wants --prompts evaluation_metadata.jsonl")
    if args.protocol is not None and args.prompts is not None and not for_prompts:
        parser.error(f"--protocol {args.protocol} is of class labels: leave --prompts out")
    protocol = PROTOCOLS.get(args.protocol, {})
    # argparse leaves what is there already alone: None, where nothing was given.
    said = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(protocol)))
    for name, value in protocol.items():
        if getattr(said, name) not in (None, value):
            parser.error(f"--protocol {args.protocol} is --{name} {value}: leave --{name} out")
        setattr(args, name, value)
    for name, schedule in (("cfg_interval", "interval"), ("cfg_power", "cosine")):
        given, wanted = getattr(args, name) is not None, args.cfg_schedule == schedule
        if given and not wanted:
            parser.error(f"--{name} belongs to --cfg_schedule {schedule}")
        if wanted and not given:
            parser.error(f"--cfg_schedule {schedule} wants --{name}")
    _check_prompts(parser, args)
    for name in ("temperature", "top_k", "top_p") if args.greedy else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--greedy draws nothing: leave --{name} out")
    return args


def _check_prompts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Settles how many samples there are for prompts, and refuses flags of the other kind."""
    with_prompts = ("text_encoder", "per_prompt", "layout", "no_clean")
    without = ("labels", "conditions", "num")
    for name in with_prompts if args.prompts is None else without:
        if getattr(args, name) != parser.get_default(name):
            flag = name.replace("no_", "no-")
            how = "belongs to" if args.prompts is None else "does not go with"
            parser.error(f"--{flag} {how} --prompts")
    if args.prompts is None:
        return
    if args.layout != "flat" and args.format != "png":
        parser.error(f"--layout {args.layout} has a format of its own: leave --format out")
    if args.layout == "hps" and (args.per_prompt not in (None, 1) or args.grid):
        parser.error("--layout hps is one image a prompt: leave --per_prompt and --grid out")
    args.per_prompt = args.per_prompt or (1 if args.layout == "hps" else 4)


def draw_options(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `sampling.generate`."""
    return {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "greedy": args.greedy,
        "cfg_scale": args.cfg,
        "cfg_schedule": args.cfg_schedule,
        "cfg_interval": -1 if args.cfg_interval is None else args.cfg_interval,
        "cfg_power": 1.0 if args.cfg_power is None else args.cfg_power,
    }


# --- drawing --------------------------------------------------------------------------------------


def write_samples(
    sampler: Sampler,
    params: Any,
    conditions: Requests,
    seed: int,
    files: SampleFiles,
    todo: Sequence[int],
) -> None:
    """Draws and writes these chunks.

    Images of one chunk are encoded and written while the devices draw the next.
    """
    total = sum(len(files.ids(chunk)) for chunk in todo)
    done = 0
    drawn = sampler(params, conditions.of, map(files.ids, todo), seed)
    with ProgressBar(total, "samples") as progress:
        for chunk, batch in zip(todo, drawn, strict=True):
            files.write(chunk, batch.images)
            done += len(batch.images)
            progress.update(done, len(batch.images))


def grid(files: SampleFiles, conditions: Requests) -> np.ndarray:
    """A row of samples for each of the first classes (or captions), uint8 [h, w, 3]."""
    rows, first = np.unique(conditions.rows, return_index=True)
    shown = rows[np.argsort(first)][:GRID_ROWS]
    members = [np.flatnonzero(conditions.rows == row)[:GRID_COLUMNS] for row in shown]
    columns = max(len(found) for found in members)
    names = [conditions.name(int(row)) for row in shown]
    strips = {}
    for row, name, found in zip(shown, names, members, strict=True):
        strip = np.full((columns, files.size, files.size, 3), 255, np.uint8)
        strip[: len(found)] = files.read([int(sample) for sample in found])
        unclear = len(name) > GRID_LETTERS or names.count(name) > 1
        strips[f"{row} {name}"[:GRID_LETTERS] if unclear else name] = strip
    return overview(strips)


# --- the command ----------------------------------------------------------------------------------


def make_recipe(
    args: argparse.Namespace, generator: Generator, conditions: Requests, side: int
) -> dict[str, Any]:
    """What recipe.json says of these samples."""
    return {
        "checkpoint": generator.facts,
        "sampling": draw_options(args),
        "seed": args.seed,
        "count": len(conditions.rows),
        "batch": args.batch,
        "labels" if conditions.labels else "captions": conditions.facts,
        "image_size": side,
        "decoded_size": generator.image_size,
        "resize": None if side == generator.image_size else RESIZE_RULE,
        "uint8": UINT8_RULE,
        "format": args.format,
        **_environment(),
    }


def _environment() -> dict[str, Any]:
    """With what, on what and when."""
    found = environment()
    return {"versions": found["versions"], "devices": found["devices"], "started": found["date"]}


def _mesh(cpu_devices: int) -> Any:
    """This process's devices: no sample needs those of another."""
    if cpu_devices > 1:
        try:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        except RuntimeError:  # the backend is up already: a test, a notebook
            logging.getLogger(__name__).info("devices are fixed already: %d", jax.device_count())
    mine = [device for device in all_devices() if device.process_index == jax.process_index()]
    return make_mesh(devices=mine)


def _settle(
    args: argparse.Namespace, files: SampleFiles, recipe_of: Callable[[int], dict[str, Any]]
) -> list[int]:
    """Process 0: the directory is of this recipe and no other; the chunks that are still to be drawn."""
    asked = recipe_of(files.count)
    fewer = None if args.prompts else recipe_of
    recipe, todo = settle_recipe(args.out, asked, fewer, files.grow), files.todo()
    if recipe["started"] != asked["started"] and todo:
        again = {name: asked[name] for name in ("started", "devices", "versions", "batch")}
        write_recipe(args.out, {**recipe, "resumed": [*recipe.get("resumed", []), again]})
    return todo


def run(args: argparse.Namespace) -> None:
    """Draws, writes and pictures the samples; goes on where an earlier run was stopped.

    Several processes draw a chunk each in turn, and process 0 does all that is done once.
    """
    generator = load_generator(args.ckpt, _mesh(args.cpu_devices), dtype=args.dtype)
    if args.prompts is None:
        conditions = make_requests(generator, args.num, args.seed, args.labels, args.conditions)
    else:
        conditions = request_prompts(
            generator,
            args.prompts,
            args.per_prompt,
            args.layout,
            args.text_encoder,
            dtype=args.dtype,
            **({"clean": False} if args.no_clean else {}),
        )
    if args.cfg != 1.0:
        try:
            generator.policy.unconditional(generator.policy.example_condition(1))
        except ValueError as error:
            raise SampleError(f"--cfg {args.cfg:g}: {error}") from error
    if args.batch is None:
        devices = generator.mesh.devices
        most = most_at_once(generator.policy, args.cfg != 1.0, devices.flat[0])
        args.batch = devices.size * min(64, most)
    side = args.resize or generator.image_size
    count = len(conditions.rows)
    files = SampleFiles(args.out, count, args.batch, side, args.format)
    if isinstance(conditions, PromptRequests):
        files = conditions.files(files, args.layout)
    first, start = jax.process_index() == 0, time.monotonic()

    def recipe_of(number: int) -> dict[str, Any]:
        held = conditions if number == count else conditions.first(number)
        return make_recipe(args, generator, held, side)

    with files.locked() if first else contextlib.nullcontext():
        todo = _settle(args, files, recipe_of) if first else []
        mine = distributed.deal(np.asarray(todo, int), files.chunks)
        batch = min(args.batch, count)
        sampler = Sampler(
            generator.policy,
            generator.pixels,
            generator.frozen,
            batch,
            draw_options(args),
            side,
            conditions.numbers,
        )
        if first and isinstance(files, PromptFiles):
            files.describe()
        write_samples(sampler, generator.params, conditions, args.seed, files, mine)
        multihost_utils.sync_global_devices("all samples are drawn")
        if not first:
            return
        if jax.process_count() > 1:
            files.await_all()
        files.finish(conditions.rows if conditions.labels else None)
        if args.grid and isinstance(files, PromptFiles):
            files.grids()
        elif args.grid:
            Image.fromarray(grid(files, conditions)).save(args.out / "grid.png")
    places = [str(path) for path in (files.images, files.npz) if path.exists()]
    drawn = sum(len(files.ids(chunk)) for chunk in todo)
    print(
        f"{count} samples in {' and '.join(places)}, {drawn} of them drawn in "
        f"{format_duration(time.monotonic() - start)}. How they were made is in {args.out / RECIPE}"
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    compiler.reserve_memory()

    def command() -> int:
        args = parse(argv)
        return distributed.as_one(lambda: run(args), stopped=STOPPED, **process_flags(args))

    return exit_status(command)


callable_door(__name__)

if __name__ == "__main__":
    sys.exit(main())
