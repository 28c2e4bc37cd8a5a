"""EfficientNet-Lite0 with its package's weights, against PyTorch and Pillow."""

import jax
import pytest

from tests.helpers.compare import assert_close
from vapi_jax.models import efficientnet as E


@pytest.fixture(scope="module")
def arrays(golden):
    return golden.npz("efficientnet_lite0")


@pytest.fixture(scope="module")
def found(arrays):
    def run(params, images):
        small = E.preprocess(images)
        with jax.default_matmul_precision("highest"):
            last = E.feature_map(params, small)
        return small, last, E.efficientnet_features(params, small)

    return jax.jit(run)(E.load_efficientnet(), arrays["images"])


def test_the_resize_is_pillows_bit_for_bit(arrays, found):
    assert (found[0] * 128 + 127 == arrays["resized_uint8"]).all()


def test_features_and_logits(arrays, found):
    assert_close(found[1], arrays["feature_map"], 1e-3)  # stored as float16
    assert_close(found[2]["pool"], arrays["pooled"], 1e-5)
    assert_close(found[2]["logits"], arrays["logits"], 1e-5)
