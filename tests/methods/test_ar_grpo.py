"""Free-running rollouts: what is trained is what was drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.tiny import make_tiny_method, with_random_head
from vapi_jax.methods import ar_grpo as module
from vapi_jax.methods.ar_grpo import ARGRPOOptions, drawn_log_probs, mixed_kl
from vapi_jax.models.head import Head
from vapi_jax.models.sampling import filter_logits, generate
from vapi_jax.parallel.sharding import make_mesh, tree_shardings

HEAD = Head(jax.random.normal(jax.random.key(1), (4, 9)))
HALVES = tuple(jax.random.normal(jax.random.key(k), (2, 5, 4)) for k in (2, 3))
TOKENS = jax.random.randint(jax.random.key(4), (2, 5), 0, 9)
FILTERED = ARGRPOOptions(cfg_scale=1.7, temperature=0.8, top_k=5, top_p=0.9)


def drawn_from(halves, options, filters=True):
    """The distribution written out: guided, tempered, filtered; the tokens stay in."""
    given, without = (x @ HEAD.kernel for x in halves)
    logits = (without + options.cfg_scale * (given - without)) / options.temperature
    if filters:
        kept = jnp.isfinite(filter_logits(logits, options.top_k, options.top_p))
        logits = jnp.where(kept | jax.nn.one_hot(TOKENS, 9, dtype=bool), logits, -jnp.inf)
    return jax.nn.log_softmax(logits)


def test_log_probabilities_are_of_what_was_drawn_from():
    @jax.jit
    def both(halves):
        at = lambda x: jnp.take_along_axis(x, TOKENS[..., None], axis=-1)[..., 0]  # noqa: E731
        want, plain = (drawn_from(halves, FILTERED, filters) for filters in (True, False))
        p = jnp.exp(want)
        entropy = -jnp.where(p > 0, p * jnp.where(p > 0, want, 0.0), 0.0).sum(-1)
        slopes = [
            jax.grad(lambda h: drawn_log_probs(h, HEAD, TOKENS, FILTERED, True)[0].sum())(halves),
            jax.grad(lambda h: at(drawn_from(h, FILTERED)).sum())(halves),
        ]
        found = drawn_log_probs(halves, HEAD, TOKENS, FILTERED, filters=True)
        return found, (at(want), at(plain), entropy), slopes

    found, want, (slope, wanted) = both(HALVES)
    for a, b in zip(found, want, strict=True):
        assert_close(a, b, 2e-6)
    assert_close(slope, wanted, 1e-5)
    assert float(jnp.abs(slope[1]).max()) > 0.01  # through the unconditional half, too


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_the_exact_kl_is_of_guided_distributions(kl):
    options = ARGRPOOptions(cfg_scale=1.7, temperature=0.8, kl=kl)

    @jax.jit
    def both(halves):
        base = tuple(jnp.flip(x, 0) for x in halves)
        own, start = (drawn_from(x, options, False) for x in (halves, base))
        p, q = (own, start) if kl == "reverse" else (start, own)
        return mixed_kl(halves, HEAD, base, HEAD, options), (jnp.exp(p) * (p - q)).sum(-1)

    assert_close(*both(HALVES), 5e-6)


def test_a_rollout_s_entropies_are_those_that_are_trained():
    """The sampler's own, token after token, against one teacher-forced forward of what it drew."""
    options = {"group_size": 2, "cfg_scale": 1.5, "top_k": 6, "temperature": 0.9}
    method = make_tiny_method("ar_grpo", make_mesh(1, 1, jax.devices()[:1]), ar_grpo=options)
    params = with_random_head(jax.jit(method.init)(jax.random.key(0)), 3)
    labels, rng = jnp.arange(4), jax.random.key(5)
    batch = {"condition": labels, "index": jnp.arange(4)}

    @jax.jit
    def trained(params):
        samples = method.draw(params, batch, rng, 2, 0.9)
        return samples, method.scores(params, {"condition": labels, "samples": samples}, True)

    samples, (logps, _, entropy) = trained(params)
    tokens, own = generate(
        method.policy, params, jnp.repeat(labels, 2), rng, temperature=0.9, top_k=6, cfg_scale=1.5,
        return_entropy=True,
    )  # fmt: skip
    np.testing.assert_array_equal(samples.reshape(tokens.shape), tokens)
    assert_close(entropy.reshape(own.shape), own, 1e-5)
    assert float(logps.max()) <= 0.0 and float(logps.min()) > -20.0  # nothing that filters forbid


def test_a_whole_copy_draws_what_the_training_layout_draws():
    mesh, drawn = make_mesh(1, 2, jax.devices()[:2]), []
    batch = {"condition": jnp.arange(4), "index": jnp.arange(4)}
    for layout in ("copy", "training"):
        options = {"group_size": 2, "rollout_layout": layout}
        method = make_tiny_method("ar_grpo", mesh, ar_grpo=options)
        params = with_random_head(jax.jit(method.init)(jax.random.key(0)), 3)
        params = jax.device_put(params, tree_shardings(params, mesh, method.partition_rules))
        assert not params["output"]["kernel"].sharding.is_fully_replicated
        draw = jax.jit(lambda p, method=method: method.draw(p, batch, jax.random.key(5), 2, 0.9))
        drawn.append(np.asarray(draw(params)))
    assert len(np.unique(drawn[0])) > 4
    np.testing.assert_array_equal(*drawn)


def test_auto_takes_the_copy_where_there_is_room(monkeypatch):
    mesh = make_mesh(1, 2, jax.devices()[:2])
    whole = make_tiny_method("ar_grpo", mesh, ar_grpo={"rollout_layout": "copy"})
    size = next(size for name, size, _ in whole.memory(1) if name == "rollout copy")
    for room, copied in ((None, True), (4 * size, True), (4 * size - 4, False)):
        monkeypatch.setattr(module, "memory_of", lambda device, room=room: room)
        method = make_tiny_method("ar_grpo", mesh)
        assert method.copied is copied
        assert ("rollout copy" in [name for name, *_ in method.memory(1)]) is copied


def test_images_come_only_where_a_reward_asks():
    mesh = make_mesh(1, 1, jax.devices()[:1])
    blind = {"name": "tests.helpers.toys:contrast", "options": {"wants_image": False}}
    for rewards, wanted in (((blind,), False), ((blind, "mse"), True)):
        method = make_tiny_method("ar_grpo", mesh, rewards=rewards)
        batch = {"image": np.zeros((1, 8, 8, 3), np.float32), "condition": np.zeros(1, np.int32)}
        assert ("image" in method.prepare(batch)) is wanted
        assert ("image" in method.example_batch(4)) is wanted
