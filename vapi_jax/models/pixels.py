"""From images to tokens and back, on every device alone.

The tokenizer is frozen and replicated; each device encodes, decodes and judges its own images in chunks,
under `jax.shard_map`, so this part of a step communicates nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from vapi_jax.models.vq import VQConfig, VQModel
from vapi_jax.parallel.sharding import BATCH_AXES

Frozen = Mapping[str, Any]
"""Frozen weights by role, "tokenizer" among them."""

MAPS = 4
"""Full-size maps that are alive at once while an image is decoded or judged (measured)."""

KEPT = 8
"""How many times as many maps a backward pass through decoder and judges keeps: counted from their layers
at full resolution, not measured."""

CHUNK_BYTES = 5 << 30
"""Most memory that the maps of a chunk may take on a device, where nobody has chosen; half of it in
bfloat16. 16 images of 384 pixels: a GPU's multiprocessors all have a tile of the smallest maps.
"""


def map_width(config: VQConfig) -> int:
    """Channels of the decoder's widest maps at full resolution.

    The first layer after the last doubling still has the width of the level below.
    """
    return config.ch * max(config.decoder_ch_mult[:2])


def fitting_chunk(config: VQConfig, side: int, width: int = 0) -> int:
    """Images that are decoded and judged at once: as many as keep their maps within `CHUNK_BYTES`.

    Args:
      config: the tokenizer's sizes.
      side: of an image in pixels.
      width: channels of the widest full-size map of what judges them.
    """
    one = MAPS * 4 * side**2 * max(map_width(config), width)
    return max(1, CHUNK_BYTES // one)


@dataclasses.dataclass(frozen=True)
class PixelSpace:
    """The frozen way between images and tokens.

    Attributes:
      tokenizer: E, Q and D.
      mesh: devices; the batch axis is split over all of them. None where that has happened already,
        inside `jax.shard_map`.
      chunk: images that a device encodes, decodes or judges at once; 0 for as many as fit.
      judge_width: channels of the widest full-size map of what judges decoded images.
    """

    tokenizer: VQModel
    mesh: Mesh | None
    chunk: int = 0
    judge_width: int = 0

    def _per_device(self, function: Any, batched_arguments: int) -> Any:
        if self.mesh is None:
            return function
        batch = PartitionSpec(BATCH_AXES)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), *[batch] * batched_arguments),
            out_specs=batch,
            check_vma=False,
        )

    def _rows_at_once(self, rows: int, group: int, side: int) -> int:
        """Rows of a chunk, each of one image (group 0) or of a group of decoded and judged samples."""
        width = self.judge_width if group else 0
        chunk = self.chunk or fitting_chunk(self.tokenizer.config, side, width)
        most = max(chunk // max(group, 1), 1)
        if rows <= most:
            return rows
        # Whatever the rows, even a prime number of them, at least half of what fits; the last chunk is
        # filled up with rows whose results go.
        return min(
            range(most // 2 + 1, most + 1), key=lambda size: (-(-rows // size) * size, -size)
        )

    def at_once(self, rows: int, group: int, side: int) -> tuple[int, int]:
        """(samples decoded and judged at once on a device, bytes of their maps) of `rows` images."""
        images = self._rows_at_once(rows, group, side) * group
        width = max(map_width(self.tokenizer.config), self.judge_width)
        return images, MAPS * 4 * images * side**2 * width

    def _in_chunks(self, function: Any, side: int, group: int, *arrays: Any) -> Any:
        """`function` of batched trees, so many rows at a time that a chunk holds no more images."""
        rows = jax.tree.leaves(arrays)[0].shape[0]
        size = self._rows_at_once(rows, group, side)
        if size == rows:
            return function(*arrays)
        count = -(-rows // size)

        def split(x: Array) -> Array:
            if count * size > rows:
                x = x[jnp.minimum(jnp.arange(count * size), rows - 1)]
            return x.reshape(count, size, *x.shape[1:])

        out = jax.lax.map(lambda args: function(*args), jax.tree.map(split, arrays))
        return jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:])[:rows], out)

    def _side(self, tokens: Int[Array, "*B T"]) -> int:
        return round(tokens.shape[-1] ** 0.5) * self.tokenizer.config.downsample_factor

    def encode(self, frozen: Frozen, images: Float[Array, "B H W 3"]) -> Int[Array, "B T"]:
        """x* = Q(E(I)), Eq. 1."""

        def local(params: Any, images: Array) -> Array:
            def encode(x: Array) -> Array:
                return self.tokenizer.apply({"params": params}, x, method="encode")

            with jax.named_scope("encode"):
                return self._in_chunks(encode, images.shape[1], 0, images)

        return self._per_device(local, 1)(frozen["tokenizer"], images)

    def decode(self, frozen: Frozen, tokens: Int[Array, "B T"]) -> Float[Array, "B H W 3"]:
        """Î = D(x), Eq. 1, in float32 and unclamped."""

        def local(params: Any, tokens: Array) -> Array:
            codes = self._projected_codes(params)
            side = self._side(tokens)
            return self._in_chunks(lambda x: self._decode(params, codes, x), side, 0, tokens)

        return self._per_device(local, 1)(frozen["tokenizer"], tokens)

    def _projected_codes(self, params: Any) -> Array:
        """Once for all chunks of a step."""
        return self.tokenizer.apply({"params": params}, method="projected_codes")

    def _decode(self, params: Any, codes: Array, tokens: Array) -> Array:
        with jax.named_scope("decode"):
            images = self.tokenizer.apply(
                {"params": params}, tokens, None, codes, method="decode_tokens"
            )
            return images.astype(jnp.float32)

    def judge(
        self,
        frozen: Frozen,
        samples: Int[Array, "B G T"],
        batch: Mapping[str, Any],
        judges: Mapping[str, Callable[..., Float[Array, "B G"]]],
    ) -> dict[str, Float[Array, "B G"]]:
        """Decodes the samples of every image and has them judged, G at a time at least.

        Args:
          frozen: "tokenizer", and what the judges take.
          samples: tokens.
          batch: what is known of the images, every leaf with the leading axis B.
          judges: name -> function of (frozen, pixels [B, G, H, W, 3], batch with "samples").

        Returns:
          What each says, float32.
        """

        def local(frozen: Frozen, samples: Array, batch: Any) -> Any:
            codes = self._projected_codes(frozen["tokenizer"])

            def chunk(samples: Array, batch: Any) -> dict[str, Array]:
                flat = rearrange(samples, "b g t -> (b g) t")
                decoded = self._decode(frozen["tokenizer"], codes, flat)
                pixels = rearrange(decoded, "(b g) h w c -> b g h w c", b=samples.shape[0])
                known = {**batch, "samples": samples}
                return {name: judge(frozen, pixels, known) for name, judge in judges.items()}

            return self._in_chunks(chunk, self._side(samples), samples.shape[1], samples, batch)

        return self._per_device(local, 2)(dict(frozen), samples, dict(batch))

    def judge_latents(
        self,
        frozen: Frozen,
        latents: Float[Array, "B T D"],
        samples: Int[Array, "B T"],
        batch: Mapping[str, Any],
        judges: Mapping[str, Callable[..., Float[Array, "B G"]]],
    ) -> dict[str, Float[Array, " B"]]:
        """Decodes what the decoder would get for tokens, and has it judged; differentiable in `latents`.

        Chunks are an eighth of `judge`'s, for a chunk's maps are kept while its gradient is computed; every
        chunk is decoded again for it.

        Args:
          frozen, batch, judges: as for `judge`.
          latents: a code for each token, or what stands for one.
          samples: the tokens, for judges that ask.
        """

        def local(frozen: Frozen, latents: Array, samples: Array, batch: Any) -> Any:
            @jax.checkpoint
            def chunk(latents: Array, samples: Array, batch: Any) -> dict[str, Array]:
                grid = round(latents.shape[1] ** 0.5)
                images = self.tokenizer.apply(
                    {"params": frozen["tokenizer"]},
                    latents.reshape(-1, grid, grid, latents.shape[-1]),
                    method="decode",
                )
                known = {**batch, "samples": samples[:, None]}
                pixels = images.astype(jnp.float32)[:, None]
                return {name: judge(frozen, pixels, known)[:, 0] for name, judge in judges.items()}

            return self._in_chunks(chunk, self._side(samples), KEPT, latents, samples, batch)

        return self._per_device(local, 3)(dict(frozen), latents, samples, dict(batch))
