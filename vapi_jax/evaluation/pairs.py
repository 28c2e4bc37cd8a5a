"""Metrics of pairs of images, reconstructions against originals: PSNR, SSIM and LPIPS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.progress import ProgressBar
from vapi_jax.evaluation.collect import digested
from vapi_jax.evaluation.fidelity import WINDOW, psnr, ssim
from vapi_jax.evaluation.images import ImageSet, PixelDigest
from vapi_jax.models.lpips import load_lpips_params, lpips
from vapi_jax.parallel.sharding import host_array, replicated, shard_whole

PAIR_METRICS = {
    "psnr": "PSNR in dB",
    "ssim": "SSIM",
    "ssim_llamagen": "SSIM with twice the data range, as LlamaGen publishes it",
    "lpips_vgg": "LPIPS (VGG)",
    "lpips_alex": "LPIPS (AlexNet)",
}
"""Their names in print; each is a mean over pairs."""

_SSIM = {"ssim": 255, "ssim_llamagen": 510}  # -> data range


class PairsError(ExpectedError, ValueError):
    """Pairs that a metric cannot take."""


def _lpips_of(
    net: str, mesh: Mesh, images: ImageSet
) -> Callable[[jax.Array, jax.Array], np.ndarray]:
    params = jax.device_put(load_lpips_params(net), replicated(mesh))

    @jax.jit
    def apply(params: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = (x.astype(jnp.float32) / 127.5 - 1 for x in (a, b))
        return lpips(params, a, b, net)

    one = jax.ShapeDtypeStruct((1, images.height, images.width, 3), np.uint8)
    try:
        jax.eval_shape(apply, params, one, one)
    except ValueError as error:
        raise PairsError(f"lpips_{net}: {error}") from error
    return lambda a, b: host_array(apply(params, a, b)).astype(np.float64)


def pair_metrics(
    wanted: Sequence[str], samples: ImageSet, reference: ImageSet, *, mesh: Mesh, batch: int
) -> tuple[dict[str, Float[np.ndarray, " N"]], tuple[str, str]]:
    """Metrics of image i of one set against image i of the other.

    Args:
      wanted: of `PAIR_METRICS`.
      samples, reference: as `check_pairs` wants them.
      mesh: the devices that share a batch.
      batch: pairs at once.

    Returns:
      {metric: float64 values, one per pair}, and the digests of both sets.

    Raises:
      ImagesError: an unreadable image.
      PairsError: images too small for a metric.
    """
    if _SSIM.keys() & set(wanted) and min(samples.height, samples.width) < WINDOW:
        raise PairsError(
            f"ssim: images of {samples.width}x{samples.height} pixels are smaller than its window of"
            f" {WINDOW}x{WINDOW}"
        )
    compute: dict[str, Callable[[jax.Array, jax.Array], np.ndarray]] = {"psnr": psnr}
    for net in ("vgg", "alex"):
        if f"lpips_{net}" in wanted:
            compute[f"lpips_{net}"] = _lpips_of(net, mesh, samples)
    values: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    digests = PixelDigest(samples), PixelDigest(reference)
    size = -(-batch // mesh.size) * mesh.size
    pairs = zip(
        *(
            digested(images, batch, digest)
            for images, digest in zip((samples, reference), digests, strict=True)
        ),
        strict=True,
    )
    with ProgressBar(-(-samples.count // batch), "pairs") as progress:
        for done, pair in enumerate(pairs, 1):
            count = len(pair[0])
            # Padded pairs are dropped again, so that one program serves all batches.
            a, b = (
                shard_whole(np.pad(x, ((0, size - count), (0, 0), (0, 0), (0, 0))), mesh)
                for x in pair
            )
            for name in wanted:
                if name in _SSIM:
                    values[name].append(ssim(pair[0], pair[1], _SSIM[name]))
                else:
                    values[name].append(compute[name](a, b)[:count])
            progress.update(done, count)
    whole = {name: np.concatenate(parts) for name, parts in values.items()}
    return whole, (digests[0].hexdigest(), digests[1].hexdigest())
