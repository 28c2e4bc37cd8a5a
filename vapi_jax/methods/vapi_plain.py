"""VA-π over B·G sequences, as the reference implementation runs it: what the page is held against."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vapi_jax.methods.corruption import make_context, purpose_keys
from vapi_jax.methods.method import Aux
from vapi_jax.methods.objective import kl_to_base, objective
from vapi_jax.methods.vapi import (
    Encode,
    Judge,
    VAPiOptions,
    judge_samples,
    token_mask,
    true_tokens,
    with_prior,
)
from vapi_jax.models import categorical
from vapi_jax.models.categorical import sample_group
from vapi_jax.models.conditions import drop
from vapi_jax.models.head import project
from vapi_jax.models.policy import Policy
from vapi_jax.rewards import Term


def plain_vapi_loss(
    params: Any,
    batch: dict[str, Any],
    rng: PRNGKeyArray,
    *,
    policy: Policy,
    encode: Encode,
    judge: Judge,
    terms: Sequence[Term],
    config: VAPiOptions,
    base_params: Any = None,
    entropy_weight: None = None,
    axes: Sequence[str] = (),
    dropout_rng: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], Aux]:
    """The same objective over B·G sequences, as the reference implementation runs it: the oracle.

    With `dropout_rng` the update forward drops activations and labels while sampling does not, so
    ρ differs from 1 at once. Arguments and results as `vapi_loss`.
    """
    del entropy_weight  # the fused step's alone
    keys = purpose_keys(rng, batch["index"])
    tokens = true_tokens(batch, encode)
    context = make_context(keys[0], tokens, config.noise_rate, policy.vocab_size, config.corruption)
    fed = context[:, : policy.context_length]
    old_logits = policy.logits(jax.lax.stop_gradient(params), batch["condition"], fed)
    samples = jax.vmap(
        lambda key, row: sample_group(key, row, config.group_size, config.temperature)
    )(keys[1], old_logits)
    judged = judge_samples(samples, tokens, context, batch, keys, config, terms, judge, axes)
    old_logps = categorical.token_log_probs(old_logits, judged.samples, config.temperature)

    def per_sample(x: Array) -> Array:  # [B, ...] -> [B·G, ...], image-major
        return jnp.repeat(x, config.group_size, axis=0)

    condition = jax.tree.map(per_sample, batch["condition"])
    if dropout_rng is not None:
        label_rng, dropout_rng = jax.random.split(dropout_rng)
        label_keys = jax.vmap(lambda key: jax.random.split(key, config.group_size))(
            jax.vmap(lambda i: jax.random.fold_in(label_rng, i))(batch["index"])
        ).reshape(-1)
        condition = drop(policy.condition, label_keys, condition, config.label_dropout)
    hidden = policy.hidden(params, condition, per_sample(fed), dropout_rng=dropout_rng)
    head = policy.head(params)
    logits = project(hidden, head)
    sequences = judged.samples.reshape(-1, 1, judged.samples.shape[-1])
    logps = categorical.token_log_probs(logits, sequences, config.temperature)
    logps = logps.reshape(judged.samples.shape)
    ce = categorical.cross_entropy(logits, per_sample(tokens))
    ce = ce.reshape(judged.rewards.shape).mean(axis=1)
    entropy = categorical.entropy(jax.lax.stop_gradient(old_logits), config.temperature)
    kl = None
    if config.needs_base:
        where = batch["condition"], fed, hidden, head, judged.samples, logps
        kl = kl_to_base(config, policy, base_params, *where)
    loss, aux = objective(
        logps, old_logps, entropy, judged.advantages, config, kl=kl,
        mask=token_mask(keys[3], judged.samples, config),
    )  # fmt: skip
    loss, aux = with_prior(loss, aux, ce, judged, config)
    return loss, {**aux, "ratio": jnp.exp(jax.lax.stop_gradient(logps) - old_logps)}
