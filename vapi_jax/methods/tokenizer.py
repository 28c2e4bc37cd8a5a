"""The task that trains the tokenizer with its discriminator, as LlamaGen does (Eq. 30-33)."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.methods.task import Aux, Scalars, Task, tokenizer_source
from vapi_jax.methods.tokenizer_loss import discriminator_step_loss, generator_loss
from vapi_jax.models.discriminator import PatchGAN, apply_train
from vapi_jax.models.loading import WeightsSource
from vapi_jax.models.lpips import load_lpips_params, lpips
from vapi_jax.models.quantize import codebook_usage, restart_dead_codes
from vapi_jax.models.vq import VQModel, VQOutput
from vapi_jax.rewards import reconstruction as reward

_USAGE_DECAY = 0.98


@dataclasses.dataclass(frozen=True)
class TokenizerTask(Task):
    """Tokenizer and discriminator updated at once from one pass.

    Each sees the other as it was before the update, and the discriminator sees reconstructions of
    before the update: the order of LlamaGen's two optimizers, in one gradient of a sum whose two
    parts share no parameter.
    """

    headline: tuple[str, ...] = dataclasses.field(
        default=("loss", "reconstruction_loss", "perceptual_loss", "codebook_usage"), init=False
    )

    @cached_property
    def tokenizer(self) -> VQModel:
        """E, Q and D."""
        return VQModel(self.config.tokenizer)

    @cached_property
    def discriminator(self) -> PatchGAN | None:
        """The adversary, or None where its weight is 0."""
        training = self.config.tokenizer_training
        if training.loss.adversarial == 0.0:
            return None
        return PatchGAN(ndf=training.discriminator_ndf, n_layers=training.discriminator_layers)

    @property
    def init_from(self) -> WeightsSource | None:
        return tokenizer_source(self.config)

    def start_like(self, params: Any) -> Any:
        return params["tokenizer"]

    def with_start(self, loaded: Any, fresh: Callable[[], Any]) -> Any:
        if self.discriminator is None:
            return {"tokenizer": loaded}
        return {**fresh(), "tokenizer": loaded}

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
        config, extra = self.config, {}
        if self.discriminator is not None:
            # Zeros and ones whatever the key: no batch has been seen.
            variables = self.discriminator.init(jax.random.key(0), self._example(), train=False)
            extra["batch_stats"] = variables["batch_stats"]
        if config.tokenizer_training.restart_below > 0.0:
            codes = params["tokenizer"]["codebook"]["embedding"]
            extra["usage"] = jnp.ones(codes.shape[0], jnp.float32)
            extra["latents"] = jnp.zeros_like(codes)
        return extra

    def load_frozen(self) -> dict[str, Any]:
        return {
            "perceptual": load_lpips_params(self.config.perceptual_net, self.config.init.perceptual)
        }

    def _apply(self, rng: PRNGKeyArray, params: Any, images: Array) -> VQOutput:
        deterministic = self.config.tokenizer.dropout_p == 0.0
        rngs = {} if deterministic else {"dropout": rng}
        return self.tokenizer.apply({"params": params}, images, deterministic, rngs=rngs)

    def loss(
        self,
        params: Any,
        extra: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        step: Array,
    ) -> tuple[Float[Array, ""], tuple[Aux, Any]]:
        config, training = self.config, self.config.tokenizer_training
        on = (step >= training.discriminator_start).astype(jnp.float32)
        extra, images = dict(extra), batch["image"]

        discriminate = fool = None
        if self.discriminator is not None:
            discriminate = partial(apply_train, self.discriminator)
            now = jax.lax.stop_gradient(params["discriminator"]), extra["batch_stats"]
            fool = lambda x: discriminate(*now, x)[0]  # noqa: E731
        loss, aux = generator_loss(
            params["tokenizer"],
            images,
            apply_tokenizer=partial(self._apply, jax.random.fold_in(rng, batch["index"][0])),
            perceptual_fn=lambda a, b: lpips(frozen["perceptual"], a, b, config.perceptual_net),
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
        self, params: Any, extra: Any, rng: PRNGKeyArray, step: Array
    ) -> tuple[Any, Any]:
        training = self.config.tokenizer_training
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

    def summarize(self, aux: Aux) -> Scalars:
        return {name: jnp.mean(value) for name, value in aux.items()}

    def held_out(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: Float[Array, ""],
    ) -> Scalars:
        del temperature
        output = self._apply(rng, params["tokenizer"], batch["image"])
        mse = reward.mse(output.reconstruction, batch["image"])
        distance = lpips(
            frozen["perceptual"], batch["image"], output.reconstruction, self.config.perceptual_net
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
