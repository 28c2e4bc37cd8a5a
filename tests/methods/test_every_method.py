"""What holds of every method: it takes the same steps on any mesh, and is taken up again bit for bit."""

import jax
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from tests.helpers.tiny import Machine, make_tiny_method
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.training.loop import fit

MANY = {
    "advantage_scale": "batch", "kl": "reverse", "kl_weight": 0.3, "entropy_share": 0.5,
    "entropy_target": 2.0, "entropy_rate": 0.01, "entropy_limit": 0.015, "ema_decay": 0.75,
}  # fmt: skip
CASES = {
    "sft": ("sft", {"sft": {"noise_rate": 0.3}}),
    "vapi with options": ("vapi", {"vapi": MANY}),
    "vapi, energy by cell": ("vapi", {"vapi": {"credit": "spatial", "score": "energy"}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_same_steps_on_one_device_and_on_eight(case):
    method, changes = CASES[case]
    one, many = (Machine(*mesh, changes, method).run() for mesh in ((1, 1), (2, 4)))
    for got, want in zip(many.metrics, one.metrics, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=3e-5, atol=3e-6, err_msg=name)
    assert_close(many.params, one.params, 1e-5)
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
    method, changes = CASES[case]
    mesh = make_mesh(2, 2, jax.devices()[:4])

    def trained(folder, steps):
        more = {**changes, "steps": steps, "checkpoint": {"every": 0}, "eval": {"every": 9}}
        return fit(make_tiny_method(method, mesh, **more), tmp_path / folder).params

    whole = trained("whole", 2)
    trained("parts", 1)
    parts = trained("parts", 2)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
