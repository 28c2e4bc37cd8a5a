"""Post-training of the tokenizer's decoder on what a frozen generator draws (paper, 5.2 and C.2).

    forced   x_t ~ π(. | x*_<t, c)                                (Eq. 36)
    mixed    x_t = x*_t with probability σ, else x_t ~ π(. | x_<t, c)
    L = w_r |D(x) - I|² + λ_p LPIPS(D(x), I) [+ adversarial]      (Eq. 38, which has no adversary)

Encoder, quantiser, codebook and generator are frozen. The target is the image that x* = Q(E(I)) is from.
"mixed" is RobusTok's way (arXiv 2509.12474: σ 0.7; here the mixed grid is decoded directly), which trains
with an adversary from the first step; `preset="robustok"` has both. That the paper's longer training blurs
may be a property of its loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.common.options import Errors, Natural, NotNegative, Positive, Share
from vapi_jax.data.pipeline import encoder_of
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import GeneratorMethod, generator_source, logits_bytes
from vapi_jax.methods.method import Curve, Flops, Network, SampledPolicy, Scalars
from vapi_jax.methods.tokenizer import ReconstructionOptions, TokenizerTraining
from vapi_jax.methods.tokenizer_loss import LossWeights
from vapi_jax.models.categorical import num_choices, uniforms_24
from vapi_jax.models.head import block_length, draw
from vapi_jax.models.loading import load_weights
from vapi_jax.models.lpips import lpips
from vapi_jax.models.sampling import generate
from vapi_jax.models.vq import VQOutput
from vapi_jax.parallel.sharding import replicated
from vapi_jax.rewards import reconstruction as reward
from vapi_jax.weights.names import WeightsError

FROZEN = ("encoder", "quant_conv", "codebook")
"""Parts of the tokenizer that stay as they are."""


@dataclasses.dataclass(frozen=True)
class TokenizerPostOptions(ReconstructionOptions):
    """Section `tokenizer_post` of a recipe; what the paper leaves open is LlamaGen's."""

    loss: LossWeights = LossWeights(codebook=0.0, adversarial=0.0)
    discriminator_start: Natural = 0
    rollout: Literal["forced", "mixed"] = "forced"
    true_share: Share = 0.7  # σ of "mixed"
    temperature: Positive = 1.0
    cfg_scale: NotNegative = 1.0  # guidance of "mixed"; 1 is none
    post_quant_conv: bool = True  # train the map before the decoder, too


@dataclasses.dataclass(frozen=True)
class TokenizerPost(TokenizerTraining, GeneratorMethod):
    """The equations above. Trained parameters hold the whole tokenizer, of which the frozen parts come back
    after every update from a copy in the extra state.
    """

    title: ClassVar[str] = "post-training of a tokenizer's decoder"
    section: ClassVar[str] = "tokenizer_post"
    Options: ClassVar[type] = TokenizerPostOptions
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "robustok": {
            "tokenizer_post": {
                "rollout": "mixed",
                "loss": {"adversarial": 0.5},
                "temperature": 1.02,
                "cfg_scale": 6.0,
            }
        },
    }
    headline: ClassVar[tuple[str, ...]] = ("loss", "reconstruction_loss", "perceptual_loss")
    curves: ClassVar[tuple[Curve, ...]] = (
        ("loss", "Loss on drawn tokens", "loss"),
        ("held_out/mse", "Reconstruction error of drawn tokens, held-out", "MSE"),
        ("held_out/lpips", "Perceptual error of drawn tokens, held-out", "LPIPS"),
        ("held_out/true_mse", "Reconstruction error of true tokens, held-out", "MSE"),
        ("grad_norm", "Gradient norm", "L2 norm, unclipped"),
    )
    independent_images: ClassVar[bool] = False
    compares: ClassVar[bool] = True

    @property
    def options(self) -> Any:
        return self.config.options

    @property
    def temperature(self) -> float:
        return float(self.options.temperature)

    @classmethod
    def flops(cls, config: TrainConfig, one: Flops) -> float:
        options = config.options
        forwards = 1 + (options.rollout == "mixed" and options.cfg_scale != 1.0)
        decoded = 3 * one.decode + 3 * one.perceptual(options.perceptual_net)
        return config.batch_size * (one.encode + forwards * one.policy + decoded)

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        super().check(config, errors)
        for option, what in (("gpt", "generator"), ("vq", "tokenizer")):
            if not getattr(config.init, option):
                errors.append(f"init.{option}='': name the {what}, which stays frozen")

    def networks(self) -> list[Network]:
        policy = partial(jax.eval_shape, self.policy.init, jax.random.key(0))
        source = generator_source(self.config, self.policy)
        return [*super().networks(), Network("policy", "init.gpt", policy, source)]

    def load_frozen(self) -> dict[str, Any]:
        source = generator_source(self.config, self.policy)
        if source is None:
            raise WeightsError("config.init.gpt: name weights of the generator")
        if encoder_of(self.config.data) is not None:
            self.load_tokenizer()  # is it the one that made the tokens of the data?
        policy = load_weights(source, self.frozen_shapes()["policy"])
        return {**super().load_frozen(), "policy": policy}

    def frozen_shapes(self) -> dict[str, Any]:
        policy = jax.eval_shape(self.policy.init, jax.random.key(0))
        return {**super().frozen_shapes(), "policy": policy}

    def init_extra(self, params: Any) -> Any:
        extra = super().init_extra(params)
        names = FROZEN if self.options.post_quant_conv else (*FROZEN, "post_quant_conv")
        kept = {name: params["tokenizer"][name] for name in names}
        return {**extra, "frozen": jax.tree.map(jnp.copy, kept)}

    def after_update(
        self,
        params: Any,
        extra: Any,
        rng: PRNGKeyArray,
        step: Array,
        metrics: Mapping[str, Array],
    ) -> tuple[Any, Any]:
        del rng, step, metrics
        tokenizer = {**params["tokenizer"], **extra["frozen"]}  # weight decay moved them
        return {**params, "tokenizer": tokenizer}, extra

    def drawn(
        self,
        tokens: Int[Array, "B T"],
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: float | Float[Array, ""],
    ) -> Int[Array, "B T"]:
        """x of the module's equations."""
        options, policy, params = self.options, self.policy, frozen["policy"]
        each = jax.vmap(jax.random.fold_in, (None, 0))
        if options.rollout == "mixed":
            # One gather, in place of one for every token.
            params = policy.narrowed(params)
            if not self.local:
                params = jax.lax.with_sharding_constraint(params, replicated(self.mesh))
            # Of one key the mask's would be those that `generate` makes for its draws.
            mask_rng, draw_rng = jax.random.split(rng)
            kept = jax.vmap(
                lambda key: jax.random.bernoulli(key, options.true_share, tokens.shape[1:])
            )(each(mask_rng, batch["index"]))
            return generate(
                policy, params, batch["condition"], draw_rng, temperature=temperature,
                cfg_scale=options.cfg_scale, sample_ids=batch["index"],
                given=jnp.where(kept, tokens, -1),
            )  # fmt: skip
        hidden = policy.hidden(params, batch["condition"], tokens[:, : policy.context_length])
        shape = tokens.shape[1], 1, num_choices(policy.vocab_size)
        keys = each(rng, batch["index"])
        uniforms = jax.vmap(lambda key: uniforms_24(key, shape))(keys)
        return draw(hidden, policy.head(params), uniforms, temperature)[0][:, 0]

    def training_pass(
        self, params: Any, frozen: Mapping[str, Any], batch: Mapping[str, Any], rng: PRNGKeyArray
    ) -> Callable[[Any, Array], VQOutput]:
        still = jax.lax.stop_gradient(params["tokenizer"])
        tokens = self.true_tokens({"tokenizer": still}, batch)
        drawn = self.drawn(tokens, frozen, batch, rng, self.temperature)
        samples = jax.lax.stop_gradient(drawn)
        deterministic = self.config.tokenizer.dropout_p == 0.0
        rngs = {} if deterministic else {"dropout": jax.random.fold_in(rng, batch["index"][0])}

        def decode(trained: Any, images: Array) -> VQOutput:
            del images
            if not self.options.post_quant_conv:
                trained = {**trained, "post_quant_conv": still["post_quant_conv"]}
            found: VQOutput = self.tokenizer.apply(
                {"params": trained}, samples, deterministic, method="from_tokens", rngs=rngs
            )
            return found

        return decode

    def held_out(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: Float[Array, ""],
    ) -> Scalars:
        """Of tokens drawn with the same key at every call, and the error of the true ones."""
        seen = {"tokenizer": params["tokenizer"]}
        batch = {**batch, "index": jnp.arange(batch["image"].shape[0])}
        tokens = self.true_tokens(seen, batch)
        images = self.pixels.decode(seen, self.drawn(tokens, frozen, batch, rng, temperature))
        mse = reward.mse(images, batch["image"])
        net = self.options.perceptual_net
        distance = lpips(frozen["perceptual"], batch["image"], images, net)
        true = reward.mse(self.pixels.decode(seen, tokens), batch["image"])
        return {
            "reward": -(mse + distance).mean(),
            "mse": mse.mean(),
            "lpips": distance.mean(),
            "true_mse": true.mean(),
        }

    def narrowed(self, params: Any) -> Any:
        return params

    def sampled(self) -> SampledPolicy:
        """The frozen generator, whose tokens the trained decoder turns into images."""
        return SampledPolicy(
            self.policy.for_sampling(),
            lambda params, frozen: frozen["policy"],
            self.pixels,
            lambda params: params["tokenizer"],
        )

    def memory(self, rows: int) -> Sequence[tuple[str, int, str]]:
        policy = self.policy
        at_once = block_length(rows, policy.num_tokens, policy.vocab_size)
        logits = logits_bytes(rows, at_once, policy.vocab_size)
        own = ("logits", logits, f"float32, of {at_once} position(s) at a time")
        return [*super().memory(rows), own]
