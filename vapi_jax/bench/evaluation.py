"""Times what evaluation computes: features of images through its own loop, and what is made of them.

What --json holds beside name, device, versions and notes (each median has its quartiles beside it as
[low, high]):

  features, dims, image_size, batch_size, batches    what was asked for
  seconds_per_batch, seconds_quartiles               of the loop, see `stream_seconds`
  network_seconds_per_batch, network_seconds_quartiles  resize and network alone
  images_per_second            batch_size / seconds_per_batch
  compile_seconds              of the extractor, tracing included
  compilations                 programs compiled in the timed batches: 0, or the command fails
  flops_per_image, flops_exact   matrix products and convolutions of the compiled extractor
  achieved_flops_per_second    of the network alone
  peak_flops_per_second, peak_source, peak_share   of float32 products at the default precision, which
                               on GPUs is TF32: beyond Inception, which computes in full float32
  peak_memory_bytes, peak_memory_source
  vectors, judgement_seconds   see `judgement_seconds`
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vapi_jax.bench.batches import (
    Compilations,
    common_lines,
    heading,
    rounded,
    seconds_of,
    seconds_text,
)
from vapi_jax.bench.devices import peak, peak_memory
from vapi_jax.bench.hlo_flops import matmul_flops
from vapi_jax.bench.measure import WARM_UP, environment, say
from vapi_jax.bench.report import quantity
from vapi_jax.bench.setup import spread, timed
from vapi_jax.common.tables import format_table
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.evaluation import features as F
from vapi_jax.evaluation.collect import Engine, collect
from vapi_jax.evaluation.frechet import frechet_distance
from vapi_jax.evaluation.images import Batch, ImageSet
from vapi_jax.evaluation.precision_recall import precision_recall
from vapi_jax.evaluation.reference import Network
from vapi_jax.evaluation.statistics import Moments, merge
from vapi_jax.methods.config import TrainConfig
from vapi_jax.models import inception
from vapi_jax.parallel import compiler
from vapi_jax.parallel.sharding import replicated, shard_whole

BATCH = 64
"""Images at once, as `vapi_jax.evaluate` takes them."""

_SEED = 0
_DTYPE = "float32"  # in which features are computed, whatever a recipe's generator computes in


def extractor_name(name: str) -> str:
    """ "vgg" -> "lpips_vgg"; other names stay."""
    longer = f"lpips_{name}"
    return longer if name not in F.EXTRACTORS and longer in F.EXTRACTORS else name


def random_inception() -> F.Weights:
    """Weights of Inception's shapes under which features stay finite; FID they do not give."""
    rng, leaves = np.random.default_rng(_SEED), {}
    for path, shape in flatten(inception.inception_shapes()).items():
        if path.endswith("kernel"):
            scale = np.sqrt(2.0 / np.prod(shape.shape[:-1]))
            leaves[path] = scale * rng.normal(size=shape.shape).astype(np.float32)
        else:
            leaves[path] = np.full(shape.shape, path.endswith(("scale", "var")), np.float32)
    return F.Weights(inception.fold_batch_norm(unflatten(leaves)))


def make_engine(
    name: str, side: int, mesh: Mesh, batch: int, file: str | None
) -> tuple[Engine, str]:
    """The extractor for square images, and what its weights are.

    Args:
      name: as for `find_extractor`, or without "lpips_".
      side: of the images in pixels.
      mesh: devices.
      batch: images at once.
      file: of weights, for an extractor that needs one; None gives Inception random weights.

    Raises:
      FeaturesError, PerceptualWeightsError: no such extractor, weights, or fit.
    """
    name = extractor_name(name)
    extractor = F.find_extractor(name)
    if file is not None and not extractor.needs_file:
        raise F.FeaturesError(f"features {name!r} take no file of weights: leave --inception out")
    if name == "inception" and file is None:
        weights, note = random_inception(), "random weights; speed does not depend on their values"
    else:
        weights = extractor.load(file, True)
        note = weights.file or "bundled"
    dims = F.feature_dims(extractor, weights.params, side, side)
    network = Network(name, extractor.label, "", weights.published, dims)
    return Engine(extractor, weights, network, mesh, batch), note


def noise_images(count: int, side: int, pulled: Callable[[], None]) -> ImageSet:
    """`count` images of noise, all batches the same; `pulled()` is called when one is asked for."""

    def read(size: int) -> Iterator[Batch]:
        rng = np.random.default_rng(_SEED)
        images = rng.integers(0, 256, (size, side, side, 3), np.uint8)
        for start in range(0, count, size):
            pulled()
            yield images[: count - start]

    return ImageSet(Path("noise"), count, side, side, None, read)


def stream_seconds(engine: Engine, side: int, batches: int) -> tuple[list[float], int]:
    """Seconds of each of some batches in the loop of `collect`, and programs compiled in them.

    From the moment that the loop asks for a batch until it asks for the next: digest, transfer, resize
    and network, and fetching and taking in the features of the batch before it.
    """
    # The first batch compiles, and the last one is followed by no other.
    count, times = WARM_UP + batches + 1, []
    compilations = Compilations()
    before = 0

    def pulled() -> None:
        nonlocal before
        times.append(time.perf_counter())
        if len(times) == WARM_UP + 1:
            before = compilations.count

    images = noise_images(count * engine.batch, side, pulled)
    names = [name for name in ("pool", "spatial") if name in engine.network.dims]
    with compilations:
        collect(engine, images, "features", names, {})
    laps = np.diff(times)[WARM_UP:]
    return [float(one) for one in laps], compilations.count - before


def _compiled(engine: Engine, side: int) -> tuple[Any, tuple[Any, Any], float]:
    """The extractor as one program, what it takes, and the seconds of tracing and compiling it.

    As `FeatureStream` has it, but with its arguments in the caller's hands.
    """
    shape = (engine.batch, side, side, 3)
    images = np.random.default_rng(_SEED).integers(0, 256, shape, np.uint8)
    placed = shard_whole(images, engine.mesh)
    params = jax.device_put(engine.weights.params, replicated(engine.mesh))
    wanted = [name for name in ("pool", "spatial") if name in engine.network.dims]

    def apply(params: Any, images: Any) -> dict[str, Any]:
        found = engine.extractor.apply(params, images)
        return {name: found[name].astype(jnp.float32) for name in wanted}

    start = time.perf_counter()
    options = compiler.options(engine.mesh)
    compiled = jax.jit(apply, compiler_options=options).lower(params, placed).compile()
    return compiled, (params, placed), time.perf_counter() - start


def judgement_seconds(dim: int, vectors: int) -> dict[str, float]:
    """Seconds of each thing that evaluation makes of features, once, over normal random vectors.

    Args:
      dim: of a vector.
      vectors: in each of two sets, of at least four.

    Returns:
      "moments" (mean and covariance of a set), "merge" (of the moments of two halves), "frechet",
      and "precision_recall", whose programs have been compiled before.
    """
    rng = np.random.default_rng(_SEED)
    ours, other = (rng.normal(size=(vectors, dim)).astype(np.float32) for _ in range(2))
    found = {}

    def clock(name: str, function: Callable[[], Any]) -> Any:
        out, found[name] = timed(function)
        return out

    def moments(rows: np.ndarray) -> Moments:
        made = Moments(dim)
        made.update(rows)
        made.covariance()  # rows wait in blocks until something is asked
        return made

    halves = [moments(part) for part in np.array_split(ours, 2)]
    clock("merge", lambda: merge(*halves).gaussian())
    one, two = clock("moments", lambda: moments(ours)).gaussian(), moments(other).gaussian()
    clock(
        "frechet",
        lambda: frechet_distance(one.mean, one.covariance, two.mean, two.covariance),
    )
    precision_recall(ours, other)
    clock("precision_recall", lambda: precision_recall(ours, other))
    return found


def measure(
    config: TrainConfig,
    mesh: Mesh,
    batches: int,
    name: str,
    batch: int | None,
    file: str | None,
    vectors: int,
) -> dict[str, Any]:
    """Times feature extraction at the recipe's image size, and what is made of the features.

    Args:
      config: of any task.
      mesh: devices.
      batches: timed ones.
      name, file: see `make_engine`.
      batch: images at once; None is `BATCH`.
      vectors: see `judgement_seconds`.

    Returns:
      What --json writes; the module's docstring tells of the keys.

    Raises:
      FeaturesError, PerceptualWeightsError: as `make_engine`.
    """
    say("weights")
    side = config.data.image_size
    rows = rounded(batch or BATCH, mesh.size)
    engine, note = make_engine(name, side, mesh, rows, file)
    say("compiling")
    compiled, arguments, compile_seconds = _compiled(engine, side)
    network = []
    for turn in range(-WARM_UP, batches):
        _, seconds = timed(compiled, *arguments)
        if turn >= 0:
            network.append(seconds)
    memory, memory_source = peak_memory(compiled)
    laps, compilations = stream_seconds(engine, side, batches)
    whole, alone = spread(laps), spread(network)
    say("statistics")
    judged = judgement_seconds(engine.network.dims["pool"], vectors)
    say("the device's peak")
    found = matmul_flops(compiled.as_text())
    flops = found.total * mesh.size
    most, peak_source = peak(_DTYPE, mesh.size)
    return {
        "name": config.name,
        "mode": "evaluate",
        **environment(mesh),
        "notes": {"weights": note, "images": "noise"},
        "features": engine.network.name,
        "dims": dict(engine.network.dims),
        "image_size": side,
        "batch_size": rows,
        "batches": batches,
        "compile_seconds": compile_seconds,
        "compilations": compilations,
        **seconds_of("seconds", whole),
        **seconds_of("network_seconds", alone),
        "images_per_second": rows / whole.median,
        "flops_per_image": flops / rows,
        "flops_exact": found.exact and not found.uncounted,
        "achieved_flops_per_second": flops / alone.median,
        "peak_flops_per_second": most,
        "peak_source": peak_source,
        "peak_share": flops / alone.median / most,
        "peak_memory_bytes": memory,
        "peak_memory_source": memory_source,
        "vectors": vectors,
        "judgement_seconds": judged,
    }


_JUDGED = {
    "moments": "mean and covariance",
    "merge": "merging two halves' statistics",
    "frechet": "Fréchet distance",
    "precision_recall": "precision and recall",
}


def text_report(result: Mapping[str, Any]) -> str:
    """Everything that was measured, for a terminal."""
    dims = ", ".join(f"{name} {dim}" for name, dim in result["dims"].items())
    rows = [[_JUDGED[name], f"{value:.3f}"] for name, value in result["judgement_seconds"].items()]
    least = "" if result["flops_exact"] else " at least"
    return "\n".join(
        [
            heading(result),
            f"features     {result['features']} ({dims}); {result['notes']['weights']}",
            f"batch        {result['batch_size']} images of {result['image_size']}x"
            f"{result['image_size']} pixels, noise",
            f"loop         {seconds_text(result, 'seconds')}, {result['images_per_second']:.4g} images/s",
            f"network      {seconds_text(result, 'network_seconds')}, "
            f"{quantity(result['flops_per_image'], 'FLOP')} an image{least}",
            f"speed        {quantity(result['achieved_flops_per_second'], 'FLOP/s')}, "
            f"{100 * result['peak_share']:.1f} % of "
            f"{quantity(result['peak_flops_per_second'], 'FLOP/s')} ({result['peak_source']})",
            *common_lines(result),
            "",
            format_table(rows, [f"over {result['vectors']} vectors, once", "seconds"]),
        ]
    )
