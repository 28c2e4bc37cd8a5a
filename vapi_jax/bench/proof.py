"""Whether a device computes what it should, and the table of `launch/gpu_proof.sh`.

  python -m vapi_jax.bench.proof --config=configs/c2i_xxl.py:tiny --checks=OUT/checks.json
  python -m vapi_jax.bench.proof --table=OUT

The first compares the recipe's step on the first device with the CPU's, bfloat16 with float32, the fused
kernels with plain ones, and a restored state with the one that was saved. The second reads what
the script's parts have left in a folder.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict
from scipy.stats import spearmanr

from vapi_jax.bench import setup as setups
from vapi_jax.bench.measure import environment
from vapi_jax.bench.report import markdown, quantity
from vapi_jax.common import recipe_flags
from vapi_jax.common.errors import ExpectedError, exit_status
from vapi_jax.common.paths import FOLDER, PATH
from vapi_jax.common.recipe_flags import CONFIG, parse_flags
from vapi_jax.common.tables import format_table
from vapi_jax.methods.resolve import resolve
from vapi_jax.models.attention import attend, attention_implementation
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.rewards import total
from vapi_jax.training import resume, train
from vapi_jax.training.checkpoint import Checkpointer

flags.adopt_module_key_flags(recipe_flags)
_JSON = flags.DEFINE(PATH, "checks", None, "File that receives the checks")
_TABLE = flags.DEFINE(FOLDER, "table", None, "Folder of JSON files: write proof.json and proof.md")

STEP = ("reward", "ce", "entropy", "grad_norm")


@dataclasses.dataclass(frozen=True)
class Check:
    """A figure and how large it may be."""

    name: str
    figure: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.figure <= self.allowed)


def in_precision(recipe: ConfigDict, dtype: str) -> ConfigDict:
    """The recipe with generator, decoder and LPIPS in a dtype, its encoder in float32."""
    changed = ConfigDict(recipe.to_dict())
    changed.policy.dtype = changed.tokenizer.decoder_dtype = dtype
    changed.rewards = ({"name": "mse"}, {"name": "lpips", "options": {"dtype": dtype}})
    return changed


def off(got: dict[str, Any], want: dict[str, Any]) -> float:
    """The largest relative difference of a step's metrics."""
    return max(abs(float(got[n]) - float(want[n])) / abs(float(want[n])) for n in STEP)


def attention_off() -> Check:
    """In bfloat16, the device's fused attention against XLA's, value and gradients, at XXL's sizes."""
    kind = attention_implementation("auto", "bfloat16", 64, jax.devices()[0], alone=True)
    rng = np.random.default_rng(0)
    q, k, v, w = (jnp.asarray(rng.normal(size=(2, 576, 8, 64)), jnp.bfloat16) for _ in range(4))

    def run(kind: Any, q: Any, k: Any, v: Any) -> Any:
        def loss(q: Any, k: Any, v: Any) -> Any:
            return (attend(q, k, v, None, kind) * w).astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    run = jax.jit(run, static_argnums=0)
    pairs = zip(run(kind, q, k, v), run("xla", q, k, v), strict=True)
    worst = max(
        float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32)))
        for a, b in pairs
    )
    return Check(f"attention in bfloat16: {kind} against XLA's, gradients", worst, 0.02)


def true_tokens(one: setups.Setup) -> Any:
    """What the recipe's tokenizer makes of its images."""
    return np.asarray(jax.jit(one.method.true_tokens)(one.frozen, one.batch))


def rank_disagreement(exact: setups.Setup, narrow: setups.Setup) -> float:
    """1 - the mean rank correlation, inside groups, of two precisions' rewards of the same samples."""
    method = exact.method
    tokens = true_tokens(exact)
    shape = (tokens.shape[0], method.samples_per_image, tokens.shape[1])
    rng, vocab = np.random.default_rng(0), method.policy.vocab_size
    noise = rng.uniform(size=shape) < 0.3
    samples = jnp.asarray(np.where(noise, rng.integers(0, vocab, shape), tokens[:, None]))

    def rewards(one: setups.Setup) -> Any:
        method = one.method

        def judged(frozen: Any, samples: Any, batch: Any) -> Any:
            return total(method.parts(frozen)["judge"](samples, batch), method.terms)

        return np.asarray(jax.jit(judged)(one.frozen, samples, one.batch))

    pairs = zip(rewards(exact), rewards(narrow), strict=True)
    return 1.0 - float(np.mean([spearmanr(a, b).statistic for a, b in pairs]))


def resumed_off(setup: setups.Setup, step: Any) -> float:
    """The largest difference of parameters between a step of a saved state and of the restored one."""
    method, state = setup.method, setup.state
    shapes = train.abstract_state(method, setup.optimizer, method.config.seed)
    with tempfile.TemporaryDirectory() as folder, Checkpointer(Path(folder)) as saver:
        facts = resume.facts_of(method.config, resume.Progress(step=1), origin={}, code={})
        saver.save(1, resume.items_of(state), facts)
        saver.wait()
        restored, _ = resume.restore(saver, shapes, setup.shardings)
    after = [step(one, setup.frozen, setup.batch)[0].params for one in (state, restored)]
    gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(a).max()), *after)
    return max(jax.tree.leaves(gaps))


def checks(recipe: ConfigDict) -> Iterator[Check]:
    """Runs them one after the other; the recipe is a small one with weights and images."""
    here = make_mesh(1, 1, jax.devices()[:1])
    there = make_mesh(1, 1, jax.devices("cpu")[:1])
    yield attention_off()
    exact = resolve(in_precision(recipe, "float32"))
    with jax.default_matmul_precision("highest"):
        setup = setups.build(exact, here)
        tokens = true_tokens(setup)
        plain = setup.step(False)(jax.tree.map(jnp.copy, setup.state), setup.frozen, setup.batch)[1]
        step = setup.step(True)
        setup.state, metrics = step(setup.state, setup.frozen, setup.batch)
        with jax.default_device(jax.devices("cpu")[0]):
            reference = setups.build(exact, there)
            wanted = true_tokens(reference)
            state, frozen, batch = reference.state, reference.frozen, reference.batch
            _, on_cpu = reference.step(True)(state, frozen, batch)
        yield Check("tokens that differ from the CPU's", float((tokens != wanted).mean()), 1e-3)
        yield Check("step in float32 against the CPU's", off(metrics, on_cpu), 2e-3)
        yield Check("plain step against the fused one, float32", off(plain, metrics), 2e-3)
    narrow = setups.build(resolve(in_precision(recipe, "bfloat16")), here)
    yield Check("1 - rank correlation, bfloat16 rewards", rank_disagreement(setup, narrow), 0.1)
    coarse = narrow.step(True)(narrow.state, narrow.frozen, narrow.batch)[1]
    yield Check("step in bfloat16 against float32", off(coarse, metrics), 0.1)
    yield Check("parameters after a resumed step", resumed_off(setup, step), 1e-6)


# --- the table ------------------------------------------------------------------------------------


def _step_row(name: str, found: dict[str, Any], seconds: float, flops: float) -> list[str]:
    share, memory = found.get("peak_flops_per_second"), found.get("peak_memory_bytes")
    share = "" if share is None else f"{100 * flops / seconds / share:.1f} %"
    return [
        name, f"{seconds:.3f}", f"{flops / seconds / 1e12:.1f}", share,
        "" if memory is None else quantity(memory, "B"),
    ]  # fmt: skip


def _steps(name: str, found: dict[str, Any]) -> list[list[str]]:
    if "rows" in found:
        best = min((row["seconds_per_step"] for row in found["rows"]), default=None)
        left_out = [
            [
                f"{name}, {one['varied']}",
                "no room",
                "",
                "",
                quantity(one["planned_memory_bytes"], "B"),
            ]
            for one in found.get("no_room", ())
        ]
        return [
            _step_row(
                f"{name}, {row['varied']}{', **fastest**' if row['seconds_per_step'] == best else ''}",
                {**found, "peak_memory_bytes": row["planned_memory_bytes"]},
                row["seconds_per_step"],
                row["model_flops"],
            )
            for row in found["rows"]
        ] + left_out
    rows = [_step_row(name, found, found["seconds_per_step"], found["model_flops"])]
    if found.get("ratio") is not None:
        ratio = f"{found['ratio']:.2f} times as long"
        rows.append([f"{name}, plain", f"{found['plain_seconds_per_step']:.3f}", "", ratio, ""])
    return rows


def _parts(found: dict[str, Any]) -> Iterator[str]:
    if found.get("phases"):
        yield markdown([[k, f"{v:.4f}"] for k, v in found["phases"].items()], ["phase", "seconds"])
    if found.get("kernels"):
        rows = [
            [f"`{one['name'][:80]}`", one["calls"], f"{one['seconds']:.4f}",
             f"{100 * one['share']:.1f} %"]
            for one in found["kernels"]
        ]  # fmt: skip
        yield markdown(rows, ["kernel", "calls", "seconds", "share"])


def write_table(folder: Path) -> Path:
    """proof.json and proof.md of all that the script's parts have left; what is missing is named.

    Raises:
      ExpectedError: there is nothing.
    """
    parts = [path.stem for path in sorted(folder.glob("*.json")) if path.stem != "proof"]
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in parts}
    if not found:
        raise ExpectedError(f"--table={folder}: no part has left a JSON file there")
    first = next(iter(found.values()))
    device, versions = first["device"], first["versions"]
    told = [
        f"{device['count']} x {device['kind']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    ]
    if "checks" in found:
        rows = [
            [one["name"], f"{one['figure']:.2g}", f"{one['allowed']:.2g}",
             "yes" if one["passed"] else "**NO**"]
            for one in found["checks"]["checks"]
        ]  # fmt: skip
        told.append(markdown(rows, ["check", "found", "allowed", "passed"]))
    steps = [
        row
        for name, one in found.items()
        if "seconds_per_step" in one or "rows" in one
        for row in _steps(name, one)
    ]
    if steps:
        told.append(markdown(steps, ["step", "seconds", "TFLOP/s", "of the peak", "memory"]))
    drawn = [
        [name, one["batch_size"], one["cfg_scale"], f"{one['tokens_per_second']:.0f}",
         f"{one['images_per_second']:.2f}"]
        for name, one in found.items()
        if one.get("mode") == "sample"
    ]  # fmt: skip
    if drawn:
        told.append(markdown(drawn, ["sampling", "batch", "guidance", "tokens/s", "images/s"]))
    for name, one in found.items():
        told += [f"{name}:\n\n{part}" for part in _parts(one)]
    if (ended := folder / "missing.txt").exists():
        told.append(f"Not measured: {ended.read_text().strip()}")
    (folder / "proof.json").write_text(json.dumps(found, indent=2) + "\n")
    path = folder / "proof.md"
    path.write_text("\n\n".join(told) + "\n")
    return path


def _check() -> None:
    recipe = CONFIG.value
    if recipe.get("cpu_devices") and jax.default_backend() == "cpu":
        recipe.cpu_devices = 1
    found = []
    for one in checks(recipe):
        found.append(one)
        print(format_table([[one.name, f"{one.figure:.2g}", one.passed]], ["", "", ""]), flush=True)
    if _JSON.value is not None:
        rows = [{**dataclasses.asdict(one), "passed": one.passed} for one in found]
        mesh = make_mesh(1, 1, jax.devices()[:1])
        text = json.dumps({**environment(mesh), "checks": rows}, indent=2)
        _JSON.value.write_text(f"{text}\n")
    if wrong := [one.name for one in found if not one.passed]:
        raise ExpectedError(f"{len(wrong)} check(s) failed: {'; '.join(wrong)}")


def main(argv: list[str]) -> int:
    """The checks, or the table."""
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax tells of every file
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if (CONFIG.value is None) == (_TABLE.value is None):
        raise app.UsageError("give --config for the checks, or --table for the table")
    if (folder := _TABLE.value) is not None:
        return exit_status(lambda: print(f"wrote {write_table(folder)}"))
    return exit_status(_check)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
