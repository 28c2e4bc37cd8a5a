"""Tasks that train an autoregressive generator over a frozen tokenizer: VA-π and the base."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vapi_jax.common.digests import params_digest
from vapi_jax.data.pipeline import encoder_of
from vapi_jax.data.sources import Encoder
from vapi_jax.methods import grpo, vapi
from vapi_jax.methods.task import Aux, HealthError, Scalars, Task, mean_of, tokenizer_source
from vapi_jax.models import categorical
from vapi_jax.models.discriminator import PatchGAN
from vapi_jax.models.loading import WeightsSource, load_weights
from vapi_jax.models.lpips import load_lpips_params
from vapi_jax.models.policy import Policy, drop_condition, make_policy
from vapi_jax.models.vq import VQModel
from vapi_jax.rewards.pixels import PixelSpace
from vapi_jax.weights.names import WeightsError, check_like
from vapi_jax.weights.store import load_safetensors

# A bf16 update forward over B·G rows may round unlike its sampling forward over B rows.
_RATIO_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class GeneratorTask(Task):
    """What the two have in common: a policy, and a frozen tokenizer to see images through."""

    independent_images: ClassVar[bool] = True

    @property
    def compute_dtype(self) -> str:
        return self.policy.compute_dtype

    @cached_property
    def policy(self) -> Policy:
        """The generator, with sizes it takes from the data and the tokenizer where not given."""
        config, options = self.config, dict(self.config.policy)
        options.setdefault("vocab_size", config.tokenizer.codebook_size)
        length = "num_tokens" if options["kind"] == "janus" else "block_size"
        options.setdefault(
            length, (config.data.image_size // config.tokenizer.downsample_factor) ** 2
        )
        return make_policy(**options)

    @cached_property
    def pixels(self) -> PixelSpace:
        """The frozen tokenizer and the reward's terms."""
        config = self.config
        return PixelSpace(
            tokenizer=VQModel(config.tokenizer),
            mesh=None if self.local else self.mesh,
            weights=config.reward,
            perceptual_net=config.perceptual_net,
            mse_reduction=config.vapi.mse_reduction,
            chunk=config.decode_chunk,
            dtype=config.tokenizer.decoder_dtype,
            discriminator=self._discriminator,
        )

    @property
    def _discriminator(self) -> PatchGAN | None:
        """The frozen network of the GAN reward, where it is asked for."""
        training = self.config.tokenizer_training
        if self.config.reward.gan == 0.0:
            return None
        return PatchGAN(ndf=training.discriminator_ndf, n_layers=training.discriminator_layers)

    @property
    def init_from(self) -> WeightsSource | None:
        init, policy = self.config.init, self.policy
        if not init.gpt:
            return None
        config = getattr(policy, "config", None)
        return WeightsSource(
            init.gpt, "gpt", policy.name_rules, policy.ignored_names, config, init.verify
        )

    def init(self, rng: PRNGKeyArray) -> Any:
        return self.policy.init(rng)

    def load_tokenizer(self) -> Any:
        """The frozen tokenizer's weights, checked against its configuration.

        Raises:
          WeightsError: if none are named, or they do not fit.
        """
        source = tokenizer_source(self.config)
        if source is None:
            raise WeightsError(
                "config.init.vq: name weights of a tokenizer (a released file, a converted directory, "
                "a run of configs/demo_tokenizer.py), or 'demo' for the shipped ones"
            )
        side = self.config.data.image_size

        def fresh() -> Any:
            key = jax.random.key(0)
            return self.pixels.tokenizer.init(key, jnp.zeros((1, side, side, 3)))["params"]

        params = load_weights(source, jax.eval_shape(fresh))
        if (made := encoder_of(self.config.data)) is not None:
            own = Encoder(params_digest(params), self.config.tokenizer.encoder_dtype)
            if made != own:
                raise WeightsError(
                    f"config.init.vq={source.path}, config.tokenizer.encoder_dtype={own.dtype!r}: "
                    f"the images in {self.config.data.path} were encoded with {made}, and this run "
                    f"has {own}. Choose the same, or encode them again"
                )
        return params

    def load_frozen(self) -> dict[str, Any]:
        return {"tokenizer": self.load_tokenizer()}

    def weights_of(self, params: Any, extra: Any) -> dict[str, Any]:
        del extra
        return {"policy": params}


@dataclasses.dataclass(frozen=True)
class BaseTask(GeneratorTask):
    """Next-token cross-entropy with label dropout: how LlamaGen trains its generators."""

    def loss(
        self,
        params: Any,
        extra: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        step: Array,
    ) -> tuple[Float[Array, ""], tuple[Aux, Any]]:
        del step
        tokens = vapi.true_tokens(dict(batch), partial(self.pixels.encode, frozen))
        label_rng, dropout_rng = jax.random.split(rng)
        label_keys = jax.vmap(partial(jax.random.fold_in, label_rng))(batch["index"])
        condition = drop_condition(
            self.policy, label_keys, batch["condition"], self.config.label_dropout
        )
        dropout_rng = jax.random.fold_in(dropout_rng, batch["index"][0])
        context = tokens[:, : self.policy.context_length]
        logits = self.policy.logits(params, condition, context, dropout_rng=dropout_rng)
        ce = categorical.cross_entropy(logits, tokens)
        entropy = categorical.entropy(jax.lax.stop_gradient(logits)).mean(axis=-1)
        return ce.mean(), ({"ce": ce, "entropy": entropy}, extra)

    def summarize(self, aux: Aux) -> Scalars:
        scalars = mean_of(aux, "ce", "entropy")
        return {"loss": scalars["ce"], **scalars}

    def held_out(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: Float[Array, ""],
    ) -> Scalars:
        del rng
        tokens = vapi.true_tokens(dict(batch), partial(self.pixels.encode, frozen))
        context = tokens[:, : self.policy.context_length]
        logits = self.policy.logits(params, batch["condition"], context)
        ce, entropy = (
            categorical.cross_entropy(logits, tokens),
            categorical.entropy(logits, temperature),
        )
        return {"ce": ce.mean(), "entropy": entropy.mean()}


@dataclasses.dataclass(frozen=True)
class VAPiTask(GeneratorTask):
    """VA-π: `vapi_jax.methods.vapi` with its parts bound to a policy, a tokenizer and a mesh."""

    headline: tuple[str, ...] = dataclasses.field(default=("reward", "ce", "entropy"), init=False)

    def load_frozen(self) -> dict[str, Any]:
        frozen = super().load_frozen()
        if self.config.reward.lpips:
            frozen["perceptual"] = load_lpips_params(
                self.config.perceptual_net, self.config.init.perceptual
            )
        if self._discriminator is not None:
            path, side = self.config.init.discriminator, self.config.data.image_size
            frozen["discriminator"] = load_safetensors(path, "float32")
            init = partial(self._discriminator.init, train=False)
            example = jnp.zeros((1, side, side, 3))
            wanted = jax.eval_shape(init, jax.random.key(0), example)
            check_like(frozen["discriminator"], wanted, f"the discriminator weights {path}")
        return frozen

    def _parts(self, frozen: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "encode": partial(self.pixels.encode, frozen),
            "reward_losses": partial(self.pixels.losses, frozen),
            "weights": self.config.reward,
            "config": self.config.vapi,
        }

    def loss(
        self,
        params: Any,
        extra: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        step: Array,
    ) -> tuple[Float[Array, ""], tuple[Aux, Any]]:
        del step
        method, dropout_rng = (
            vapi.vapi_loss if self.config.vapi.fused else vapi.plain_vapi_loss,
            None,
        )
        if self.config.vapi.update_dropout:
            dropout_rng = jax.random.fold_in(jax.random.fold_in(rng, 1 << 20), batch["index"][0])
        loss, aux = method(
            params,
            dict(batch),
            rng,
            base_params=frozen.get("base"),
            dropout_rng=dropout_rng,
            **self._parts(frozen),
        )
        return loss, (aux, extra)

    def summarize(self, aux: Aux) -> Scalars:
        rewards, ratios = aux["reward"], aux["ratio"]
        group_std = jnp.std(rewards, axis=-1, ddof=1)
        low, median, high = jnp.quantile(ratios, jnp.array([0.01, 0.5, 0.99]))
        names = [name for name in aux if name.startswith("reward_")]
        names += [name for name in ("kl_to_base",) if name in aux]
        return {
            **mean_of(aux, "loss", "reward", "ce", "entropy", *names),
            "reward_std": jnp.std(rewards),
            "reward_group_std": group_std.mean(),
            "advantages_nonzero": jnp.mean(aux["advantage"] != 0.0),
            "ratio_p01": low,
            "ratio_p50": median,
            "ratio_p99": high,
            "ratio_max_deviation": jnp.abs(ratios - 1.0).max(),
            "clip_fraction": grpo.clip_fraction(ratios, self.config.vapi.clip_epsilon),
        }

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.config.vapi.policy_gradient and metrics["advantages_nonzero"] == 0.0:
            raise HealthError(
                f"step {step}: all samples of every group have the same reward, so there is no "
                "policy gradient. The policy may have collapsed to one token per position (look at "
                "the entropy), or the tokenizer decodes everything to the same image."
            )
        deviation = metrics["ratio_max_deviation"]
        if not self.config.vapi.update_dropout and not deviation <= _RATIO_TOLERANCE:
            raise HealthError(
                f"step {step}: the first ratio of new to old policy is off 1 by {deviation:.3g}. With "
                "one update per rollout and no dropout it must be 1: sampling and update forwards "
                "disagree."
            )
        super().check(step, metrics)

    def held_out(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: Float[Array, ""],
    ) -> Scalars:
        """Reward and entropy are those of sampling at this temperature, CE is the model's own."""
        batch = {**batch, "index": jnp.arange(batch["image"].shape[0])}
        traced = cast(float, temperature)  # a traced value does where a float does
        config = dataclasses.replace(
            self.config.vapi, temperature=traced, kl_weight=0.0, monitor_kl=False
        )
        parts = {**self._parts(frozen), "config": config}
        _, aux = vapi.vapi_loss(params, batch, rng, **parts)
        names = [name for name in aux if name.startswith("reward_")]
        return mean_of(aux, "reward", "ce", "entropy", *names)
