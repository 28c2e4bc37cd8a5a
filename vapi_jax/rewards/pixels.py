"""From images to tokens and from sampled tokens to the terms of the reward, on every device alone.

Tokenizer and perceptual network are frozen and replicated; each device encodes, decodes and judges
its own images in chunks, under `jax.shard_map`, so this part of a step communicates nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from vapi_jax.models import lpips
from vapi_jax.models.discriminator import PatchGAN
from vapi_jax.models.vq import VQModel
from vapi_jax.parallel.sharding import BATCH_AXES
from vapi_jax.rewards import reconstruction as reward

Frozen = Mapping[str, Any]
"""Frozen weights by role: "tokenizer", "perceptual", and "discriminator" for the GAN term."""


@dataclasses.dataclass(frozen=True)
class PixelSpace:
    """The frozen way between images and tokens, and the judgement of decoded samples.

    Attributes:
      tokenizer: E, Q and D.
      mesh: devices; the batch axis is split over all of them. None where that has happened already,
        inside `jax.shard_map`.
      weights: which terms of the reward are computed.
      perceptual_net: "vgg" (the paper) or "alex" (the reference implementation, for Janus).
      mse_reduction: "mean" or "sum".
      chunk: images whose G samples are decoded and judged at once on a device; 0 for all.
      dtype: compute dtype of the perceptual network.
      discriminator: the network of the GAN term, where its weight is not 0.
    """

    tokenizer: VQModel
    mesh: Mesh | None
    weights: reward.RewardWeights = reward.RewardWeights()
    perceptual_net: str = "vgg"
    mse_reduction: str = "mean"
    chunk: int = 0
    dtype: str = "float32"
    discriminator: PatchGAN | None = None

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

    def _in_chunks(self, function: Any, *arrays: Array) -> Any:
        """`function` of batched arrays, at most `chunk` rows at a time."""
        rows = arrays[0].shape[0]
        if not self.chunk or rows <= self.chunk:
            return function(*arrays)
        size = max(n for n in range(1, self.chunk + 1) if rows % n == 0)
        split = [x.reshape(rows // size, size, *x.shape[1:]) for x in arrays]
        out = jax.lax.map(lambda args: function(*args), tuple(split))
        return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), out)

    def encode(self, frozen: Frozen, images: Float[Array, "B H W 3"]) -> Int[Array, "B T"]:
        """x* = Q(E(I)), Eq. 1."""

        def local(params: Any, images: Array) -> Array:
            def encode(x: Array) -> Array:
                return self.tokenizer.apply({"params": params}, x, method="encode")

            with jax.named_scope("encode"):
                return self._in_chunks(encode, images)

        return self._per_device(local, 1)(frozen["tokenizer"], images)

    def decode(self, frozen: Frozen, tokens: Int[Array, "B T"]) -> Float[Array, "B H W 3"]:
        """Î = D(x), Eq. 1, in float32 and unclamped."""

        def local(params: Any, tokens: Array) -> Array:
            codes = self._projected_codes(params)
            return self._in_chunks(lambda x: self._decode(params, codes, x), tokens)

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

    def losses(
        self,
        frozen: Frozen,
        samples: Int[Array, "B G T"],
        images: Float[Array, "B H W 3"],
    ) -> dict[str, Float[Array, "B G"]]:
        """The reward's terms of every sample against its image (Eq. 10 and the extras).

        The image's perceptual features are computed once, not once per sample.
        """

        def local(frozen: Frozen, samples: Array, images: Array) -> Any:
            codes = self._projected_codes(frozen["tokenizer"])
            return self._in_chunks(lambda s, i: self._losses(frozen, codes, s, i), samples, images)

        return self._per_device(local, 2)(dict(frozen), samples, images)

    def _losses(
        self, frozen: Frozen, projected: Array, samples: Array, images: Array
    ) -> dict[str, Array]:
        batch, _, length = samples.shape
        decoded = self._decode(
            frozen["tokenizer"], projected, rearrange(samples, "b g t -> (b g) t")
        )
        grouped = rearrange(decoded, "(b g) h w c -> b g h w c", b=batch)
        target, used = images[:, None], self.weights.used()
        terms = {}
        if "mse" in used:
            terms["mse"] = reward.mse(grouped, target, self.mse_reduction)
        if "l1" in used:
            terms["l1"] = reward.l1(grouped, target)
        if "lpips" in used:
            with jax.named_scope("lpips"):
                net, params = self.perceptual_net, frozen["perceptual"]
                real = lpips.lpips_features(params, images, net, self.dtype)
                fake = lpips.lpips_features(params, decoded, net, self.dtype)
                terms["lpips"] = lpips.lpips_from_features(
                    params,
                    tuple(f[:, None] for f in real),
                    tuple(rearrange(f, "(b g) h w c -> b g h w c", b=batch) for f in fake),
                    net,
                )
        if "codebook_cosine" in used:
            params = {"params": frozen["tokenizer"]}
            codes = self.tokenizer.apply(params, method="codes")
            latents = self.tokenizer.apply(params, images, method="encode_latents")
            latents = latents.reshape(batch, 1, length, -1)
            terms["codebook_cosine"] = reward.codebook_cosine(codes[samples], latents)
        if "gan" in used:
            if self.discriminator is None:
                raise ValueError("the GAN reward needs a discriminator and its weights")
            logits = self.discriminator.apply(frozen["discriminator"], decoded, train=False)
            terms["gan"] = reward.gan(rearrange(logits, "(b g) h w c -> b g h w c", b=batch))
        return terms
