"""Figures that a right installation must meet before anything is trained, cheapest first."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vapi_jax.common.digests import digest_of
from vapi_jax.common.files import make_folder, new_folder, read_json, write_atomically
from vapi_jax.common.images import to_uint8
from vapi_jax.common.progress import announce
from vapi_jax.common.recipes import change, read_recipe
from vapi_jax.common.tables import format_table
from vapi_jax.data.real_images import write_images
from vapi_jax.evaluation.held_out import HeldOut
from vapi_jax.evaluation.images import open_images
from vapi_jax.evaluation.measure import Settings, measure
from vapi_jax.evaluation.samples import SampleJudge, even_batch, on_judging_devices
from vapi_jax.models.loading import MANIFEST
from vapi_jax.study.files import draw_files
from vapi_jax.study.judge import settled_method, start_of
from vapi_jax.study.spec import Draw, Files, StudyError
from vapi_jax.training import train
from vapi_jax.training.preflight import require
from vapi_jax.weights.store import SHIPPED

Figures = dict[str, float]
RESULTS = "acceptance.json"
_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a check looks at.

    Attributes:
      look: (changes of the recipes, a folder to work in) -> metric -> value.
      reads: changes -> weights and other files that it reads, as they are named, beside a recipe's data.
    """

    look: Callable[[Mapping[str, Any], Path], Figures]
    reads: Callable[[Mapping[str, Any]], Iterable[str]] = lambda changes: ()


@dataclasses.dataclass(frozen=True)
class Check:
    """One of them.

    Attributes:
      name: what is looked at.
      measure: of it.
      wants: metric -> least and most that are right.
      miss: what it usually means when one of them is missed.
    """

    name: str
    measure: Measure
    wants: Mapping[str, tuple[float, float]]
    miss: str

    def missed(self, found: Figures) -> list[str]:
        """Metrics that are outside."""
        return [n for n, (low, high) in self.wants.items() if not low <= found[n] <= high]


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Checks in their order.

    Attributes:
      name: of the whole.
      checks: cheapest first.
      changes: of the recipes, option by dotted path.
    """

    name: str
    checks: tuple[Check, ...]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def told(self) -> str:
        """What would be looked at, and nothing else."""
        lines = [f"{self.name}, up to the first miss:"]
        for check in self.checks:
            limits = ", ".join(f"{n} {low:g} to {high:g}" for n, (low, high) in check.wants.items())
            lines += [f"- {check.name}: {limits}", f"    A miss: {check.miss}"]
        return "\n".join(lines)

    def missing(self) -> str:
        """What the checks read and is not there, with the first check that does; "" for nothing."""
        gone = {
            file: check.name
            for check in reversed(self.checks)
            for file in check.measure.reads(self.changes)
            if file not in SHIPPED and not Path(file).exists()
        }
        lines = [f"- {file}, from “{name}” on" for file, name in sorted(gone.items())]
        return "\n".join([f"{self.name} wants files that are not there:", *lines]) if lines else ""

    def run(self, workdir: Path) -> bool:
        """Does what is not done yet, up to the first miss; whether all was right.

        What was right is kept in WORKDIR/acceptance.json and not measured again under the same changes and of
        the same files; what was not may have been repaired since.

        Raises:
          StudyError: a file is not there that the next check reads; said at the beginning, too. Or
            acceptance.json is damaged.
        """
        if missing := self.missing():
            announce(missing)
        make_folder(workdir)
        path, changes = workdir / RESULTS, json.loads(json.dumps(dict(self.changes), default=str))
        known = read_json(path, StudyError) if path.exists() else {}
        for check in self.checks:
            one = known.get(check.name, {})
            of = {"changes": changes, "files": _state(check.measure.reads(self.changes))}
            if {**one, **of} != one or check.missed(one["figures"]):
                if missing := dataclasses.replace(self, checks=(check,)).missing():
                    raise StudyError(missing)
                announce(f"{self.name}: {check.name}")
                figures = check.measure.look(self.changes, workdir / "images")
                known[check.name] = {**of, "figures": figures}
                write_atomically(path, json.dumps(known, indent=1) + "\n")
            found = known[check.name]["figures"]
            print(render(check, found), flush=True)
            if missed := check.missed(found):
                print(f"MISSED: {', '.join(missed)}. {check.miss}")
                return False
        return True


def _state(paths: Iterable[str]) -> dict[str, str]:
    """What tells whether files are still the same, without reading them: a conversion's manifest has their
    digests; of others, sizes and times.
    """
    found = {}
    for path in paths:
        place = Path(path)
        if path in SHIPPED or not place.exists():
            continue
        if (place / MANIFEST).is_file():
            found[path] = digest_of(place / MANIFEST)
            continue
        files = sorted(f for f in (place, *place.rglob("*")) if f.is_file())
        facts = [(str(file), (s := file.stat()).st_size, s.st_mtime_ns) for file in files]
        found[path] = hashlib.sha256(repr(facts).encode()).hexdigest()
    return found


def render(check: Check, found: Figures) -> str:
    """The table of a check."""
    rows = [
        [metric, low, high, found[metric], "right" if low <= found[metric] <= high else "MISSED"]
        for metric, (low, high) in check.wants.items()
    ]
    return format_table(rows, [check.name, "at least", "at most", "here", ""])


def reconstructions(
    recipe: str,
    count: int,
    metrics: tuple[str, ...],
    files: Files,
    own: Mapping[str, Any] | None = None,
) -> Measure:
    """Held-out images through the tokenizer and back, pair by pair.

    Args:
      recipe: whose data and tokenizer.
      count: of images.
      metrics: "psnr", "ssim", "fid", ...
      files: network of the Fréchet distance, and its weights.
      own: changes of the recipe, under those of the command line.
    """

    def found(changes: Mapping[str, Any], folder: Path) -> Figures:
        config = require(_recipe(recipe, changes, own))
        method = settled_method(config)
        method, frozen = on_judging_devices(method, train.load_frozen(method))
        real, again = (folder / f"{name}_{count}" for name in ("real", "reconstructed"))
        for left in (real, again):  # by an earlier call, perhaps of other data or weights
            shutil.rmtree(left, ignore_errors=True)
        write_images(config.data, config.eval.split, count, config.seed, real)
        batch = even_batch(count, method.mesh.size, _AT_ONCE)
        judge = SampleJudge(method, frozen, batch, ())
        number = 0
        with new_folder(again) as place:
            for images in open_images(real).batches(batch):
                floats = images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
                for image in to_uint8(judge.reconstruct(floats)):
                    Image.fromarray(image).save(place / f"{number:06d}.png")
                    number += 1
        settings = Settings(
            str(again), str(real), features=files.features, inception=files.inception or None,
            metrics=metrics, paired=True,
        )  # fmt: skip
        return {name: one["value"] for name, one in measure(settings)["metrics"].items()}

    def reads(changes: Mapping[str, Any]) -> list[str]:
        judged = [files.inception] if files.inception and "fid" in metrics else []
        return [*_weights(recipe, changes, own), *judged]

    return Measure(found, reads)


def teacher_forced(recipe: str, own: Mapping[str, Any] | None = None) -> Measure:
    """Cross-entropy of held-out images under their own tokens, and how far below a uniform guess it is."""

    def found(changes: Mapping[str, Any], folder: Path) -> Figures:
        del folder
        method = settled_method(require(_recipe(recipe, changes, own)))
        ce = HeldOut(*on_judging_devices(method, train.load_frozen(method)))(start_of(method))["ce"]
        return {"ce": ce, "below ln V": math.log(method.config.tokenizer.codebook_size) - ce}

    return Measure(found, lambda changes: _weights(recipe, changes, own))


def sampled(files: Files, draw: Draw, real: int = 0) -> Measure:
    """The base by a published protocol; against so many of the real images of `reconstructions`, where the
    protocol's reference is not at hand.
    """

    def found(changes: Mapping[str, Any], folder: Path) -> Figures:
        against = files.reference or str(folder / f"real_{real}")
        asked = dataclasses.replace(files.under(changes), reference=against)
        return draw_files(asked, asked.checkpoint, folder / f"cfg_{draw.cfg_scale:g}", draw, 1.0, 0)

    return Measure(found, lambda changes: files.under(changes).paths)


def _recipe(recipe: str, changes: Mapping[str, Any], own: Mapping[str, Any] | None) -> Any:
    return change(read_recipe(recipe), {**(own or {}), **changes})


def _weights(
    recipe: str, changes: Mapping[str, Any], own: Mapping[str, Any] | None
) -> tuple[str, ...]:
    begun = _recipe(recipe, changes, own).get("init", {})
    return tuple(filter(None, (begun.get("gpt"), begun.get("vq"))))
