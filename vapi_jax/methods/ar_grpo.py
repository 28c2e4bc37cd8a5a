"""GRPO on free-running rollouts: the generator draws whole grids on its own, and rewards judge the images.

    x_g ~ q(. | c), g = 1..G          drawn token after token with a KV cache
    R_g = Σ weight · reward(D(x_g)),  A as of `vapi_jax.methods.objective`
    L   = mean_g mean_t -min(ρ A, clip(ρ, 1 ± ε) A) + kl_weight · KL

AR-GRPO (arXiv 2508.06924) is this with 8 rewards, G 8, k3 and one update on a rollout.

What is sampled from is q: guided, u + s (l - u), over the temperature, then top-k and top-p. `likelihood`
says whose log-probabilities are trained:

- "sampled" (default): those of q itself, through both halves of the guidance. On-policy, so a policy
  gradient. A token that the filters would leave out by now stays in.
- "conditional": those of softmax(l / temperature), as most released code has it. It is not what was drawn
  from; each token is weighted with min(π/q, `importance_cap`), no gradient (truncated importance sampling),
  and `preset="reference"` leaves that out as the released AR-GRPO does. The two are one without guidance
  and filters.

With `updates` k > 1, ρ is of the policy before the first of them. The KL is to the generator that the run
starts from, of the same distributions without the filters. Batches bring images only where a reward asks for
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.common.options import Count, Errors, Limits, Natural, NotNegative
from vapi_jax.methods import grpo
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import logits_bytes, sized_policy
from vapi_jax.methods.method import Aux, Curve, Flops, Scalars
from vapi_jax.methods.objective import GRPOOptions, advantages_of, objective
from vapi_jax.methods.rewarded import ENTROPY_WEIGHT, GroupMethod
from vapi_jax.models import categorical
from vapi_jax.models.head import Head, block_length, blockwise, project
from vapi_jax.models.policies import make_policy
from vapi_jax.models.sampling import filter_logits, generate
from vapi_jax.parallel.sharding import replicated
from vapi_jax.parallel.targets import memory_of
from vapi_jax.rewards import total

_COPY_SHARE = 0.25
_OUT = -1e9
"""A logit that no exponential tells from -inf, and whose gradient is a number."""


@dataclasses.dataclass(frozen=True)
class ARGRPOOptions(GRPOOptions):
    """Section `ar_grpo` of a recipe."""

    updates: Count = 1  # on each rollout
    cfg_scale: NotNegative = 1.0  # s; 1 is no guidance
    top_k: Natural = 0  # 0 for all
    top_p: Annotated[float, Limits(0, 1, open_low=True)] = 1.0
    likelihood: Literal["sampled", "conditional"] = "sampled"  # of what was drawn from | of l alone
    importance_cap: NotNegative = 2.0  # C of "conditional"; 0 for no weights
    through_unconditional: bool = True  # the guided gradient also through u
    rollout_layout: Literal["auto", "copy", "training"] = (
        "auto"  # copy, if it takes little room | a whole narrow copy on each device | as split
    )

    @property
    def plain(self) -> bool:
        """Whether q is softmax(l / temperature)."""
        return self.cfg_scale == 1.0 and self.top_k == 0 and self.top_p == 1.0

    @property
    def guided(self) -> bool:
        """Whether what is trained has two halves."""
        return self.likelihood == "sampled" and self.cfg_scale != 1.0

    @property
    def weighted(self) -> bool:
        """Whether tokens have importance weights."""
        return self.likelihood == "conditional" and self.importance_cap > 0.0 and not self.plain


Halves = tuple[Float[Array, "N T D"], ...]
"""What the output layer sees under the condition, and where it is guided without one."""


def mixed_logits(halves: Halves, head: Head, options: ARGRPOOptions) -> Float[Array, "N T V"]:
    """Guided and tempered logits, before the filters."""
    logits = project(halves[0], head)
    if len(halves) == 2:
        without = project(halves[1], head)
        logits = without + options.cfg_scale * (logits - without)
    return logits / options.temperature


def drawn_log_probs(
    halves: Halves,
    head: Head,
    tokens: Int[Array, "N T"],
    options: ARGRPOOptions,
    filters: bool,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"], Float[Array, "N T"]]:
    """log q of tokens, the same without the filters, and the entropy of q; in blocks of positions."""

    def block(tokens: Array, *halves: Array) -> tuple[Array, Array, Array]:
        logits = mixed_logits(halves, head, options)
        whole = categorical.token_log_probs(logits, tokens[:, None])[:, 0]
        if not filters or (options.top_k == 0 and options.top_p == 1.0):
            return whole, whole, categorical.entropy(logits)
        kept = filter_logits(jax.lax.stop_gradient(logits), options.top_k, options.top_p) > -jnp.inf
        kept |= jax.nn.one_hot(tokens, logits.shape[-1], dtype=bool)
        logits = jnp.where(kept, logits, _OUT)
        found = categorical.token_log_probs(logits, tokens[:, None])[:, 0]
        return found, whole, categorical.entropy(logits)

    vocab = head.kernel.shape[1] * len(halves)
    return blockwise(block, vocab, tokens, *halves)


def mixed_kl(
    halves: Halves, head: Head, base: Halves, base_head: Head, options: ARGRPOOptions
) -> Float[Array, "N T"]:
    """The exact KL of the distributions before the filters, in the direction that the options name."""
    count = len(halves)

    def block(*both: Array) -> Array:
        own, start = (
            jax.nn.log_softmax(mixed_logits(part, h, options), axis=-1)
            for part, h in ((both[:count], head), (both[count:], base_head))
        )
        p, q = (own, start) if options.kl == "reverse" else (start, own)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    return blockwise(block, 2 * count * head.kernel.shape[1], *halves, *base)


@dataclasses.dataclass(frozen=True)
class ARGRPO(GroupMethod):
    """The equations above. A batch is of conditions, G samples each."""

    title: ClassVar[str] = "GRPO on free-running rollouts"
    label: ClassVar[str] = "AR-GRPO"
    section: ClassVar[str] = "ar_grpo"
    Options: ClassVar[type] = ARGRPOOptions
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "reference": {"ar_grpo": {"likelihood": "conditional", "importance_cap": 0.0}},
    }
    headline: ClassVar[tuple[str, ...]] = ("reward", "entropy")
    curves: ClassVar[tuple[Curve, ...]] = (
        ("reward", "Reward", "reward"),
        ("held_out/reward", "Reward of held-out conditions", "reward"),
        ("entropy", "Policy entropy", "nats per token"),
        ("kl_to_base", "KL to the base", "nats per token"),
        ("grad_norm", "Gradient norm", "L2 norm, unclipped"),
    )
    compares: ClassVar[bool] = True
    rolls_out: ClassVar[bool] = True
    patience: ClassVar[int] = 20  # samples of a few conditions may all be right, or all wrong

    @property
    def options(self) -> ARGRPOOptions:
        return self.config.options

    @property
    def updates(self) -> int:
        return self.options.updates

    @property
    def wants_images(self) -> bool:
        return any(term.reward.wants_image for term in self.terms)

    @classmethod
    def flops(cls, config: TrainConfig, one: Flops) -> float:
        options = config.options
        drawn = 1 + (options.cfg_scale != 1.0)
        trained = options.updates * (1 + options.guided) * (3 + options.needs_base)
        each = (drawn + trained) * one.policy + one.decode + 2 * one.rewards
        return config.batch_size * options.group_size * each

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        super().check(config, errors)
        if errors.concern("policy", "condition", "tokenizer", "data.image_size"):
            return
        policy = make_policy(**sized_policy(config))
        if config.options.cfg_scale != 1.0 and not policy.condition.droppable:
            errors.append(
                f"ar_grpo.cfg_scale={config.options.cfg_scale}: this generator has no unconditional half "
                "(policy.class_dropout_prob=0.0); set it to 1"
            )

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        found = super().prepare(batch)
        if not self.wants_images:
            found = {k: v for k, v in found.items() if k not in ("image", "tokens")}
        return found

    def rollout(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        step: Array,
    ) -> dict[str, Any]:
        """Samples, their rewards and advantages, and the log-probabilities that later updates ask for."""
        del step
        options = self.options
        samples = self.draw(params, batch, rng, options.group_size, options.temperature)
        values = self.judge(frozen, self.judges)(samples, batch)
        advantages = advantages_of(values, self.terms, options)
        if options.shuffle_advantages:
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(rng, 1)))
            advantages = jax.vmap(grpo.shuffled)(keys(batch["index"]), advantages)
        found = {
            "condition": batch["condition"],
            "samples": samples,
            "advantage": advantages,
            "reward": total(values, self.terms),
            **{f"reward_{name}": value for name, value in values.items()},
        }
        if options.updates > 1:
            found["old_logps"] = self.scores(params, found, self.options.guided)[0]
        if options.weighted:
            found["sampler_logps"] = self.scores(params, found, options.cfg_scale != 1.0, True)[0]
        return found

    def draw(
        self,
        params: Any,
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        group: int,
        temperature: float | Float[Array, ""],
    ) -> Int[Array, "B G T"]:
        """G grids of each condition, sample g of condition i from a key of its own."""
        options = self.options
        params = self.policy.narrowed(params)
        if self.copied and not self.local:
            params = jax.lax.with_sharding_constraint(params, replicated(self.mesh))
        ids = batch["index"][:, None] * group + jnp.arange(group)
        tokens = generate(
            self.policy, params, self._each(batch["condition"], group), rng,
            temperature=temperature, top_k=options.top_k, top_p=options.top_p,
            cfg_scale=options.cfg_scale, sample_ids=ids.reshape(-1),
        )  # fmt: skip
        return tokens.reshape(*ids.shape, -1)

    @cached_property
    def copied(self) -> bool:
        """Whether rollouts are drawn from a whole copy: one gather in place of one for every token.

        "auto" wants it to take no more than a quarter of a device's memory, where that is known.
        """
        layout, room = self.options.rollout_layout, memory_of(self.mesh.devices.flat[0])
        if layout != "auto" or room is None:
            return layout != "training"
        return _bytes(self._narrow) <= _COPY_SHARE * room

    @property
    def _narrow(self) -> Any:
        """Shapes of the parameters that are drawn from."""
        return jax.eval_shape(
            self.policy.narrowed, jax.eval_shape(self.policy.init, jax.random.key(0))
        )

    def _each(self, condition: Any, group: int) -> Any:
        return jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), condition)

    def halves(self, params: Any, experience: Mapping[str, Any], guided: bool) -> Halves:
        """The forward of every sample, and its other half."""
        samples = experience["samples"]
        condition = self._each(experience["condition"], samples.shape[1])
        fed = samples.reshape(-1, samples.shape[-1])[:, : self.policy.context_length]
        given = self.policy.hidden(params, condition, fed)
        if not guided:
            return (given,)
        without = self.policy.hidden(params, self.policy.unconditional(condition), fed)
        if not self.options.through_unconditional:
            without = jax.lax.stop_gradient(without)
        return given, without

    def scores(
        self, params: Any, experience: Mapping[str, Any], guided: bool, filters: bool | None = None
    ) -> tuple[Float[Array, "B G T"], ...]:
        """What `drawn_log_probs` says of the samples; filters as trained unless told otherwise."""
        halves, samples = self.halves(params, experience, guided), experience["samples"]
        if filters is None:
            filters = self.options.likelihood == "sampled"
        tokens = samples.reshape(-1, samples.shape[-1])
        found = drawn_log_probs(halves, self.policy.head(params), tokens, self.options, filters)
        return tuple(x.reshape(samples.shape) for x in found)

    def loss(
        self,
        params: Any,
        extra: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        step: Array,
    ) -> tuple[Float[Array, ""], tuple[Aux, Any]]:
        del rng, step
        options, samples = self.options, batch["samples"]
        halves, head = self.halves(params, batch, options.guided), self.policy.head(params)
        tokens = samples.reshape(-1, samples.shape[-1])
        filters = options.likelihood == "sampled"
        found = drawn_log_probs(halves, head, tokens, options, filters)
        logps, whole, entropy = (x.reshape(samples.shape) for x in found)
        old_logps = batch.get("old_logps", jax.lax.stop_gradient(logps))
        weights = None
        if options.weighted:
            weights = grpo.importance_weights(
                old_logps, batch["sampler_logps"], options.importance_cap
            )
        kl = None
        if options.needs_base:
            kl = self._kl(frozen["base"], batch, halves, head, whole)
        bonus = extra.get(ENTROPY_WEIGHT)
        if bonus is None:
            entropy = jax.lax.stop_gradient(entropy)
        loss, aux = objective(
            logps, old_logps, entropy.reshape(tokens.shape), batch["advantage"], options,
            kl=kl, weights=weights, entropy_weight=bonus,
        )  # fmt: skip
        rewards = {name: value for name, value in batch.items() if name.startswith("reward")}
        aux |= {**rewards, "advantage": batch["advantage"]}
        aux["loss"] = jnp.broadcast_to(loss, samples.shape[:1])
        aux["ratio"] = jnp.exp(jax.lax.stop_gradient(logps) - old_logps)
        if weights is not None:
            aux["importance"] = weights
        if bonus is not None:
            aux[ENTROPY_WEIGHT] = jnp.broadcast_to(bonus, samples.shape[:1])
        return loss, (aux, extra)

    def _kl(
        self,
        base_params: Any,
        batch: Mapping[str, Any],
        halves: Halves,
        head: Head,
        logps: Float[Array, "B G T"],
    ) -> Float[Array, "B G T"]:
        options = self.options
        base = jax.lax.stop_gradient(self.halves(base_params, batch, options.guided))
        base_head = jax.lax.stop_gradient(self.policy.head(base_params))
        if options.kl in ("forward", "reverse"):
            return mixed_kl(halves, head, base, base_head, options).reshape(logps.shape)
        tokens = batch["samples"].reshape(-1, logps.shape[-1])
        found = drawn_log_probs(base, base_head, tokens, options, filters=False)[0]
        estimate = grpo.k3_kl if options.kl == "k3" else grpo.k2_kl
        return estimate(logps, found.reshape(logps.shape))

    def summarize(self, aux: Aux) -> Scalars:
        found = super().summarize(aux)
        return (
            {**found, "importance": jnp.mean(aux["importance"])} if "importance" in aux else found
        )

    def held_out(
        self,
        params: Any,
        frozen: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: PRNGKeyArray,
        temperature: Float[Array, ""],
    ) -> Scalars:
        """The reward of one sample for each held-out condition, drawn as in training."""
        rows = jax.tree.leaves(batch["condition"])[0].shape[0]
        batch = {**batch, "index": jnp.arange(rows)}
        samples = self.draw(params, batch, rng, 1, temperature)
        values = self.judge(frozen, self.judges)(samples, batch)
        found = {"condition": batch["condition"], "samples": samples}
        entropy = self.scores(params, found, self.options.cfg_scale != 1.0, True)[2]
        means = {f"reward_{name}": value.mean() for name, value in values.items()}
        return {"reward": total(values, self.terms).mean(), "entropy": entropy.mean(), **means}

    def memory(self, rows: int) -> Sequence[tuple[str, int, str]]:
        policy, options, side = self.policy, self.options, self.config.data.image_size
        sequences = rows * options.group_size
        twice = 2 if options.guided else 1
        vocab = policy.vocab_size * twice
        at_once = block_length(sequences, policy.num_tokens, vocab)
        images, maps = self.judged_pixels.at_once(rows, options.group_size, side)
        params = self._narrow
        drawn = self.config.batch_size // self.mesh.size * options.group_size
        drawn = max(drawn, 1) * (2 if options.cfg_scale != 1.0 else 1)

        def full_cache(params: Any) -> Any:
            cache = policy.prefill(params, policy.example_condition(drawn))[1]
            return policy.with_room(cache, policy.num_tokens - 1)

        found = [
            *super().memory(rows),
            ("logits", logits_bytes(sequences, at_once, vocab), f"{at_once} position(s) at a time"),
            ("decoding", maps, f"{images} sample(s) at a time, and their reward"),
            ("cache", _bytes(jax.eval_shape(full_cache, params)), f"of {drawn} rows of a rollout"),
        ]
        if self.copied:
            found.append(("rollout copy", _bytes(params), "of the generator, whole and narrow"))
        return found


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
