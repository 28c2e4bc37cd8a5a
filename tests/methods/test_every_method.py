"""What holds of every method: it takes the same steps on any mesh, is taken up again, and learns."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.tiny import Machine, make_tiny_method, policy_file
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training.loop import fit

MANY = {
    "advantage_scale": "batch", "kl": "reverse", "kl_weight": 0.3, "entropy_share": 0.5,
    "entropy_target": 2.0, "entropy_rate": 0.01, "entropy_limit": 0.015, "ema_decay": 0.75,
}  # fmt: skip
STE = {"choice": "gumbel", "tau": 0.7, "noise_rate": 0.3}
CCA = {"negative_weight": 2.0, "unconditional": 0.3, "beta": 0.1}
POST = {
    "loss": {"adversarial": 0.5, "codebook": 0.0}, "discriminator_ndf": 4, "discriminator_layers": 1,
}  # fmt: skip
AR = {
    "group_size": 3, "updates": 2, "cfg_scale": 1.5, "kl": "forward", "kl_weight": 0.02,
}  # fmt: skip
LOW = {"name": "tests.helpers.toys:low_tokens", "options": {"wants_image": False}}
CASES = {
    "sft": ("sft", {"sft": {"noise_rate": 0.3}}),
    "vapi with options": ("vapi", {"vapi": MANY}),
    "vapi, energy by cell": ("vapi", {"vapi": {"credit": "spatial", "score": "energy"}}),
    "ste": ("ste", {"ste": STE, "rewards": "mse, 0.5*l1"}),
    "cca": ("cca", {"cca": CCA}),
    "tokenizer_post": (
        "tokenizer_post",
        {"tokenizer_post": POST, "image_size": 16, "init": {"gpt": lambda: policy_file(16)}},
    ),
    # Slow, so that the second update of a rollout has ratios that rounding does not move.
    "ar_grpo": (
        "ar_grpo",
        {"ar_grpo": AR, "rewards": (LOW,), "optimizer": {"learning_rate": 1e-3}},
    ),
}


def case_of(name):
    method, changes = CASES[name]
    if "init" in changes:  # made when it is asked for
        changes = {**changes, "init": {"gpt": changes["init"]["gpt"]()}}
    return method, changes


@functools.cache
def machine(name, data, fsdp):
    method, changes = case_of(name)
    return Machine(data, fsdp, changes, method)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_same_steps_on_one_device_and_on_eight(case):
    one, many = (machine(case, *mesh).run() for mesh in ((1, 1), (2, 4)))
    for got, want in zip(many.metrics, one.metrics, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=3e-5, atol=3e-6, err_msg=name)
    assert_close(many.params, one.params, 3e-5)  # as tests/training/test_train.py has it
    assert_close(many.extra, one.extra, 1e-5)
    if case == "vapi with options":
        assert one.metrics[0]["entropy_weight"] == 0.0
        missing = [2.0 - metrics["entropy"] for metrics in one.metrics]
        weight = np.clip(0.01 * missing[0], -0.015, 0.015)
        assert one.metrics[1]["entropy_weight"] == pytest.approx(weight, rel=1e-5)
        assert one.metrics[1]["kl_to_base"] > one.metrics[0]["kl_to_base"] > -1e-6
        kernel = one.extra["ema/output/kernel"]
        assert np.abs(kernel - one.params["output/kernel"]).max() > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_taken_up_bit_for_bit(case, tmp_path):
    method, changes = case_of(case)
    mesh = make_mesh(2, 4)  # of the test above, whose step is in the cache

    def trained(folder, steps):
        more = {**changes, "steps": steps, "checkpoint": {"every": 0}, "eval": {"every": 9}}
        return fit(make_tiny_method(method, mesh, **more), tmp_path / folder).params

    whole = trained("whole", 2)
    trained("parts", 1)
    parts = trained("parts", 2)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


CALM = {"eps": 1e-8, "learning_rate": 3e-3}  # above, its path hangs on rounding


def images_of_classes(method, labels):
    """What the decoder makes of one grid of tokens for each class: images that can be learned."""
    length, codes = method.policy.num_tokens, method.policy.vocab_size
    grids = np.random.default_rng(1).integers(0, codes, (12, length)).astype(np.int32)
    frozen = {"tokenizer": method.load_tokenizer()}
    return jax.jit(method.pixels.decode)(frozen, grids[np.asarray(labels)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "metric", "sign", "more"),
    [
        ("sft", "ce", -1, {}),
        ("ste", "reward", 1, {"ste": {"ce_weight": 0.0}, "rewards": "mse", "optimizer": CALM}),
        ("cca", "margin", 1, {"cca": {"unconditional": 0.0}}),
        ("tokenizer_post", "reconstruction_loss", -1, {}),
        ("ar_grpo", "reward", 1, {}),
    ],
)
def test_it_gets_better_at_what_it_is_for(case, metric, sign, more):
    """Of one batch, over and over, on one device: beyond the noise of single steps."""
    method, changes = case_of(case)
    here = Machine(1, 1, {**changes, "optimizer": {"eps": 1e-8}, **more}, method)
    batch, state, found = dict(here.batch), here.state(), []
    if "image" in batch:
        batch["image"] = images_of_classes(here.task, batch["condition"])
    for _ in range(40):
        state, metrics = here.step(state, here.frozen, batch)
        found.append(float(metrics[metric]))
    first, last = np.array(found[:4]), np.array(found[-12:])
    noise = np.median(np.abs(last - np.median(last)))
    assert sign * (np.median(last) - np.median(first)) > 3 * noise
