"""Training of the tokenizer with its discriminator, as LlamaGen does it (Eq. 30-33)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.common.options import Count, Errors, Natural, NotNegative, Share
from vapi_jax.common.paths import PathText
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.method import Aux, Curve, Method, Network, Scalars, tokenizer_source
from vapi_jax.methods.tokenizer_loss import (
    AdversarialKind,
    DiscriminatorKind,
    LossWeights,
    discriminator_step_loss,
    tokenizer_loss,
)
from vapi_jax.models.conversion import model_shapes
from vapi_jax.models.discriminator import PatchGAN, apply_train
from vapi_jax.models.loading import WeightsSource
from vapi_jax.models.lpips import least_side, load_lpips_params, lpips, lpips_shapes
from vapi_jax.models.quantize import codebook_usage, restart_dead_codes
from vapi_jax.models.vq import VQModel, VQOutput
from vapi_jax.rewards import reconstruction as reward
from vapi_jax.rewards.reconstruction import patches, perceptual_origin

_USAGE_DECAY = 0.98


@dataclasses.dataclass(frozen=True)
class ReconstructionOptions:
    """Losses of images that a decoder makes, and the adversary (Eq. 30-33)."""

    loss: LossWeights = LossWeights()
    perceptual_net: Literal["vgg", "alex"] = "vgg"  # LPIPS backbone
    perceptual_files: tuple[
        PathText, ...
    ] = ()  # its files, backbone and heads; () for the bundled ones
    discriminator_kind: DiscriminatorKind = "hinge"
    adversarial_kind: AdversarialKind = "hinge"
    discriminator_start: Natural = 20_000  # step at which the adversarial term sets in
    discriminator_ndf: Count = 64  # width of its first layer
    discriminator_layers: Count = 3


@dataclasses.dataclass(frozen=True)
class TokenizerOptions(ReconstructionOptions):
    """Section `tokenizer_training` of a recipe, beside the tokenizer's sizes."""

    restart_below: NotNegative = (
        0.0  # restart codes used less than this share of the mean use; 0 never
    )
    restart_every: Count = 50  # steps
    restart_until: Share = 0.5  # share of the run after which codes are left alone


@dataclasses.dataclass(frozen=True)
class TokenizerTraining(Method):
    """Tokenizer and discriminator updated at once from one pass.

    Each sees the other as it was before the update, and the discriminator sees reconstructions of
    before the update: the order of LlamaGen's two optimizers, in one gradient of a sum whose two
    parts share no parameter.
    """

    title: ClassVar[str] = "training of a tokenizer"
    section: ClassVar[str] = "tokenizer_training"
    Options: ClassVar[type] = TokenizerOptions
    headline: ClassVar[tuple[str, ...]] = (
        "loss", "reconstruction_loss", "perceptual_loss", "codebook_usage",
    )  # fmt: skip
    curves: ClassVar[tuple[Curve, ...]] = (
        ("loss", "Loss", "loss"),
        ("mse", "Reconstruction error", "MSE, images in [−1, 1]"),
        ("lpips", "Perceptual error", "LPIPS"),
        ("codebook_usage", "Codebook usage", "share of codes"),
        ("grad_norm", "Gradient norm", "L2 norm, unclipped"),
    )

    @property
    def options(self) -> TokenizerOptions:
        return self.config.options

    @classmethod
    def depends_on_steps(cls, options: Any) -> bool:
        return bool(getattr(options, "restart_below", 0.0) > 0.0)

    @classmethod
    def depends_on_cut(cls, config: TrainConfig) -> bool:
        """Batch normalisation, the adaptive weight and the use of codes are of a microbatch."""
        options = config.options
        counted = options.loss.adversarial > 0.0 or cls.depends_on_steps(options)
        return counted or config.tokenizer.dropout_p > 0.0

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        super().check(config, errors)
        options, side = config.options, config.data.image_size
        if config.eval.sampled_every and not cls.compares:
            errors.append("eval.sampled_every: a tokenizer draws no samples; set it to 0")
        least = least_side(options.perceptual_net)
        if side < least:
            net = options.perceptual_net
            errors.append(f"data.image_size={side}: LPIPS ({net}) wants at least {least} pixels")
        layers = options.discriminator_layers
        if options.loss.adversarial != 0.0 and patches(side, layers) < 1:
            errors.append(
                f"{cls.section}.discriminator_layers={layers}: nothing is left of {side} pixels; "
                "take fewer"
            )
        if len(options.perceptual_files) not in (0, 2):
            errors.append(
                f"{cls.section}.perceptual_files: wants two files, the backbone's and the heads' "
                f"(or none), not {len(options.perceptual_files)}"
            )

    def networks(self) -> list[Network]:
        options = self.options
        return [
            Network(
                "tokenizer",
                "init.vq",
                partial(model_shapes, self.config.tokenizer),
                tokenizer_source(self.config),
            ),
            Network(
                "perceptual",
                f"{self.section}.perceptual_files",
                partial(lpips_shapes, options.perceptual_net),
                origin=partial(perceptual_origin, options.perceptual_net, options.perceptual_files),
                load=partial(load_lpips_params, options.perceptual_net, options.perceptual_files),
            ),
        ]

    @cached_property
    def tokenizer(self) -> VQModel:
        """E, Q and D."""
        return VQModel(self.config.tokenizer)

    @cached_property
    def discriminator(self) -> PatchGAN | None:
        """The adversary, or None where its weight is 0."""
        if self.options.loss.adversarial == 0.0:
            return None
        return PatchGAN(
            ndf=self.options.discriminator_ndf, n_layers=self.options.discriminator_layers
        )

    @property
    def init_from(self) -> WeightsSource | None:
        return tokenizer_source(self.config)

    def start_like(self, params: Any) -> Any:
        return params["tokenizer"]

    def with_start(self, loaded: Any, fresh: Callable[[str], Any]) -> Any:
        if self.discriminator is None:
            return {"tokenizer": loaded}
        return {"tokenizer": loaded, "discriminator": fresh("discriminator")}

    def _example(self) -> Array:
        side = self.config.data.image_size
        return jnp.zeros((1, side, side, 3))

    def init(self, rng: PRNGKeyArray) -> Any:
        tokenizer_rng, discriminator_rng = jax.random.split(rng)
        params = {"tokenizer": self.tokenizer.init(tokenizer_rng, self._example())["params"]}
        if self.discriminator is not None:
            variables = self.discriminator.init(discriminator_rng, self._example(), train=False)
            params["discriminator"] = variables["params"]
        return params

    def init_extra(self, params: Any) -> Any:
        extra: dict[str, Any] = {}
        if self.discriminator is not None:
            # Zeros and ones whatever the key: no batch has been seen.
            variables = self.discriminator.init(jax.random.key(0), self._example(), train=False)
            extra["batch_stats"] = variables["batch_stats"]
        if self.depends_on_steps(self.options):
            codes = params["tokenizer"]["codebook"]["embedding"]
            extra["usage"] = jnp.ones(codes.shape[0], jnp.float32)
            extra["latents"] = jnp.zeros_like(codes)
        return extra

    def load_frozen(self) -> dict[str, Any]:
        options = self.options
        return {"perceptual": load_lpips_params(options.perceptual_net, options.perceptual_files)}

    def frozen_shapes(self) -> dict[str, Any]:
        return {"perceptual": lpips_shapes(self.options.perceptual_net)}

    def training_pass(
        self, params: Any, frozen: Mapping[str, Any], batch: Mapping[str, Any], rng: PRNGKeyArray
    ) -> Callable[[Any, Array], VQOutput]:
        """(tokenizer's parameters, images) -> what a training pass gives."""
        del params, frozen
        deterministic = self.config.tokenizer.dropout_p == 0.0
        rngs = {} if deterministic else {"dropout": jax.random.fold_in(rng, batch["index"][0])}
        return lambda params, images: self.tokenizer.apply(
            {"params": params}, images, deterministic, rngs=rngs
        )

    def loss(
        self,
        params: Any,
        extra: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        step: Array,
    ) -> tuple[Float[Array, ""], tuple[Aux, Any]]:
        config, training = self.config, self.options
        on = (step >= training.discriminator_start).astype(jnp.float32)
        extra, images = dict(extra), batch["image"]

        discriminate = fool = None
        if self.discriminator is not None:
            discriminate = partial(apply_train, self.discriminator)
            now = jax.lax.stop_gradient(params["discriminator"]), extra["batch_stats"]
            fool = lambda x: discriminate(*now, x)[0]  # noqa: E731
        perceptual = None
        if training.loss.perceptual:
            perceptual = partial(lpips, frozen["perceptual"], net=training.perceptual_net)
        loss, aux = tokenizer_loss(
            params["tokenizer"],
            images,
            apply_tokenizer=self.training_pass(params, frozen, batch, rng),
            perceptual_fn=perceptual,
            codebook_size=config.tokenizer.codebook_size,
            disc_logits_fn=fool,
            weights=training.loss,
            adversarial_kind=training.adversarial_kind,
            disc_on=on,
        )
        metrics, output = dict(aux.metrics), aux.output
        if discriminate is not None:
            adversary_loss, (adversary_metrics, stats) = discriminator_step_loss(
                params["discriminator"],
                extra["batch_stats"],
                images,
                output.reconstruction,
                apply_discriminator=discriminate,
                kind=training.discriminator_kind,
                weight=on * training.loss.adversarial,
            )
            loss += adversary_loss
            metrics |= adversary_metrics
            extra["batch_stats"] = stats
        if "usage" in extra:
            extra["usage"] = self._count(extra["usage"], output.indices)
            rows = jnp.arange(config.tokenizer.codebook_size) % output.indices.size
            latents = output.z.reshape(-1, output.z.shape[-1])
            order = jax.random.permutation(rng, latents.shape[0])
            extra["latents"] = jax.lax.stop_gradient(latents[order][rows])
        return loss, (metrics, extra)

    def _count(self, usage: Float[Array, " K"], indices: Int[Array, "B T"]) -> Float[Array, " K"]:
        """Running use of each code, in units of the mean use."""
        counts = jnp.zeros_like(usage).at[indices.reshape(-1)].add(1.0)
        return _USAGE_DECAY * usage + (1.0 - _USAGE_DECAY) * counts * usage.size / indices.size

    def after_update(
        self,
        params: Any,
        extra: Any,
        rng: PRNGKeyArray,
        step: Array,
        metrics: Mapping[str, Array],
    ) -> tuple[Any, Any]:
        del metrics
        training = self.options
        if "usage" not in extra:
            return params, extra
        last = training.restart_until * self.config.steps
        due = ((step + 1) % training.restart_every == 0) & (step < last)
        limit = jnp.where(due, training.restart_below, -1.0)  # below -1: no code
        codes = restart_dead_codes(
            rng,
            params["tokenizer"]["codebook"]["embedding"],
            extra["usage"],
            extra["latents"],
            limit,
        )
        usage = jnp.where(extra["usage"] < limit, 1.0, extra["usage"])
        tokenizer = {**params["tokenizer"], "codebook": {"embedding": codes}}
        return {**params, "tokenizer": tokenizer}, {**extra, "usage": usage}

    def held_out(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: Float[Array, ""],
    ) -> Scalars:
        """Without dropout."""
        del rng, temperature
        output = self.tokenizer.apply({"params": params["tokenizer"]}, batch["image"])
        mse = reward.mse(output.reconstruction, batch["image"])
        distance = lpips(
            frozen["perceptual"], batch["image"], output.reconstruction, self.options.perceptual_net
        )
        return {
            "reward": -(mse + distance).mean(),  # Eq. 10 of the true tokens: the ceiling of VA-π
            "mse": mse.mean(),
            "lpips": distance.mean(),
            "psnr": (10.0 * jnp.log10(4.0 / mse)).mean(),  # images span 2
            "codebook_usage": codebook_usage(output.indices, self.config.tokenizer.codebook_size),
        }

    def weights_of(self, params: Any, extra: Any) -> dict[str, Any]:
        found = {"tokenizer": params["tokenizer"]}
        if self.discriminator is not None:
            found["discriminator"] = {
                "params": params["discriminator"],
                "batch_stats": extra["batch_stats"],
            }
        return found

    def reconstruct(
        self, params: Any, frozen: Mapping[str, Any], images: Float[Array, "B H W 3"]
    ) -> Float[Array, "B H W 3"]:
        del frozen
        return self.tokenizer.apply({"params": params["tokenizer"]}, images).reconstruction
