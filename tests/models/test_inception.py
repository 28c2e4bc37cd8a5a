"""FID's Inception network against the same network in torch, block by block and whole, and its weights."""

import hashlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from torch.nn import functional as F

from tests.helpers.compare import assert_close
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.models import inception
from vapi_jax.models.inception import (
    IGNORED_NAMES,
    NAME_RULES,
    fold_batch_norm,
    inception_features,
    inception_shapes,
    load_inception,
    preprocess,
)
from vapi_jax.weights.names import WeightsError, from_reference, to_reference

# --- the network in torch, as published, NCHW and with its batch normalisation ----------------------


class Basic(torch.nn.Module):
    def __init__(self, inputs, outputs, window=1, stride=1, padding=0):
        super().__init__()
        self.conv = torch.nn.Conv2d(inputs, outputs, window, stride, padding, bias=False)
        self.bn = torch.nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def average_pool(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class Stem(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Basic(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Basic(32, 32, 3)
        self.Conv2d_2b_3x3 = Basic(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Basic(64, 80)
        self.Conv2d_4a_3x3 = Basic(80, 192, 3)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        return F.max_pool2d(x, 3, stride=2)


class BlockA(torch.nn.Module):
    def __init__(self, inputs, pooled):
        super().__init__()
        self.branch1x1 = Basic(inputs, 64)
        self.branch5x5_1 = Basic(inputs, 48)
        self.branch5x5_2 = Basic(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Basic(inputs, 64)
        self.branch3x3dbl_2 = Basic(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Basic(96, 96, 3, padding=1)
        self.branch_pool = Basic(inputs, pooled)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average_pool(x))], 1)


class BlockB(torch.nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.branch3x3 = Basic(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Basic(inputs, 64)
        self.branch3x3dbl_2 = Basic(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Basic(96, 96, 3, stride=2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(torch.nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        row, column = {"window": (1, 7), "padding": (0, 3)}, {"window": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Basic(inputs, 192)
        self.branch7x7_1 = Basic(inputs, width)
        self.branch7x7_2 = Basic(width, width, **row)
        self.branch7x7_3 = Basic(width, 192, **column)
        self.branch7x7dbl_1 = Basic(inputs, width)
        self.branch7x7dbl_2 = Basic(width, width, **column)
        self.branch7x7dbl_3 = Basic(width, width, **row)
        self.branch7x7dbl_4 = Basic(width, width, **column)
        self.branch7x7dbl_5 = Basic(width, 192, **row)
        self.branch_pool = Basic(inputs, 192)

    def forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pooled = self.branch_pool(average_pool(x))
        return torch.cat([self.branch1x1(x), single, double, pooled], 1)


class BlockD(torch.nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.branch3x3_1 = Basic(inputs, 192)
        self.branch3x3_2 = Basic(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Basic(inputs, 192)
        self.branch7x7x3_2 = Basic(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Basic(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Basic(192, 192, 3, stride=2)

    def forward(self, x):
        wide = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(wide), F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(torch.nn.Module):
    def __init__(self, inputs, pool):
        super().__init__()
        self.pool = pool
        row, column = {"window": (1, 3), "padding": (0, 1)}, {"window": (3, 1), "padding": (1, 0)}
        self.branch1x1 = Basic(inputs, 320)
        self.branch3x3_1 = Basic(inputs, 384)
        self.branch3x3_2a = Basic(384, 384, **row)
        self.branch3x3_2b = Basic(384, 384, **column)
        self.branch3x3dbl_1 = Basic(inputs, 448)
        self.branch3x3dbl_2 = Basic(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Basic(384, 384, **row)
        self.branch3x3dbl_3b = Basic(384, 384, **column)
        self.branch_pool = Basic(inputs, 192)

    def forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, 1)


class Network(Stem):
    def __init__(self):
        super().__init__()
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, average_pool)
        self.Mixed_7c = BlockE(2048, max_pool)
        self.fc = torch.nn.Linear(2048, 1008)

    def forward(self, x):
        """Pool features, the output of Mixed_6d's 1x1 branch, and logits with bias."""
        x = super().forward(x)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c"):
            x = getattr(self, f"Mixed_{name}")(x)
        branch = self.Mixed_6d.branch1x1(x)
        for name in ("6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        pool = x.mean((2, 3))
        return pool, branch, self.fc(pool)


def randomise(module, seed=0):
    """Weights that keep activations near one, statistics far from (0, 1), scales of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        with torch.no_grad():
            tensor.uniform_(low, high, generator=generator)

    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d):
            reach = (2 / part.weight[0].numel()) ** 0.5
            uniform(part.weight, -reach, reach)
        elif isinstance(part, torch.nn.BatchNorm2d):
            uniform(part.weight, 0.5, 1.5)
            part.weight.data[::7] *= -1
            uniform(part.bias, -0.2, 0.4)
            uniform(part.running_mean, -0.3, 0.3)
            uniform(part.running_var, 0.05, 1.0)
    return module.eval()


def arrays(module):
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def params_of(module, target=None):
    """Our folded parameters of a torch module, through the name table."""
    if target is None:  # of a block, whose number of input channels is not the network's
        target = {}
        for name, array in arrays(module).items():
            if name.endswith("conv.weight"):
                layer = name.removesuffix(".conv.weight").replace(".", "/")
                outputs, inputs, height, width = array.shape
                shapes = {"conv/kernel": (height, width, inputs, outputs)}
                shapes |= {f"bn/{leaf}": (outputs,) for leaf in ("scale", "bias", "mean", "var")}
                for leaf, shape in shapes.items():
                    target[f"{layer}/{leaf}"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        target = unflatten(target)
    return fold_batch_norm(from_reference(arrays(module), target, NAME_RULES, IGNORED_NAMES))


def run_torch(module, images, dtype=torch.float64):
    """A torch module on NHWC images, NHWC again; float64 leaves our own rounding only."""
    with torch.no_grad():
        out = module.to(dtype)(torch.from_numpy(np.moveaxis(images, -1, 1).copy()).to(dtype))
    return np.moveaxis(out.numpy(), 1, -1)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- blocks ---------------------------------------------------------------------------------------


def e_with(pool):
    return lambda params, x: inception._mixed_e(params, x, pool(x))


BLOCKS = {
    "stem": (inception._stem, Stem, (43, 51, 3), (3, 4, 192)),
    "a": (inception._mixed_a, lambda: BlockA(12, 32), (7, 9, 12), (7, 9, 256)),
    "b": (inception._mixed_b, lambda: BlockB(12), (9, 12, 12), (4, 5, 492)),
    "c": (inception._mixed_c, lambda: BlockC(12, 16), (9, 8, 12), (9, 8, 768)),
    "d": (inception._mixed_d, lambda: BlockD(12), (9, 12, 12), (4, 5, 524)),
    "e, average": (
        e_with(inception._average_pool),
        lambda: BlockE(12, average_pool),
        (5, 6, 12),
        (5, 6, 2048),
    ),
    "e, maximum": (
        e_with(lambda x: inception._max_pool(x, 1, "SAME")),
        lambda: BlockE(12, max_pool),
        (5, 6, 12),
        (5, 6, 2048),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_torch_in_values_and_order_of_channels(name):
    """Height, width and channels all differ, so that no two axes or kernels can be confused."""
    ours, make, shape, out_shape = BLOCKS[name]
    module = randomise(make())
    x = noise(2, *shape)
    got = jax.jit(ours)(params_of(module), x)
    assert got.dtype == jnp.float32 and got.shape == (2, *out_shape)
    want = run_torch(module, x)
    assert (want > 0).mean() > 0.3  # the ReLUs leave something to compare
    assert_close(got, want, 2e-6)


def test_average_pool_divides_by_the_pixels_inside_and_maximum_ignores_padding():
    x = jnp.asarray([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])[None, :, :, None]
    assert_close(
        inception._average_pool(x)[0, :, :, 0], [[3, 3.5, 4], [4.5, 5, 5.5], [6, 6.5, 7]], 1e-6
    )
    np.testing.assert_array_equal(  # negative everywhere: a padding of zeros would win
        inception._max_pool(x - 10, 1, "SAME")[0, :, :, 0],
        [[-5, -4, -4], [-2, -1, -1], [-2, -1, -1]],
    )


def test_batch_norm_folds_into_the_convolution():
    tree = {
        "layer": {
            "conv": {"kernel": np.array([[[[2.0, 2.0]]]], np.float32)},
            "bn": {
                "scale": np.array([3.0, 1.0], np.float32),
                "bias": np.array([1.0, 0.5], np.float32),
                "mean": np.array([4.0, 100.0], np.float32),
                "var": np.array([9 - 1e-3, 0.0], np.float32),  # + 1e-3: spreads 3 and 0.0316
            },
        },
        "fc": {"kernel": np.ones((2, 2), np.float32)},
    }
    folded = fold_batch_norm(tree)
    assert folded["fc"]["kernel"] is tree["fc"]["kernel"]
    assert folded["layer"].keys() == {"kernel", "bias"}
    root = 1000**0.5
    assert_close(folded["layer"]["kernel"].ravel(), [2, 2 * root], 1e-6)
    assert_close(folded["layer"]["bias"], [-3, 0.5 - 100 * root], 1e-6)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(folded))


def test_a_block_gives_the_same_on_one_device_and_on_eight():
    params = params_of(randomise(BlockA(12, 32)))
    x = noise(16, 7, 9, 12)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    block = jax.jit(inception._mixed_a)
    split = block(params, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert len(split.sharding.device_set) == 8
    assert_close(split, block(params, x), 1e-6)


# --- the whole network ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    return randomise(Network())


@pytest.fixture(scope="module")
def compared(network):
    """Our features and torch's of two images, and the classifier's matrix."""
    images = np.random.default_rng(3).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    x = np.asarray(preprocess(images))
    got = jax.jit(inception_features)(params_of(network, inception_shapes()), x)
    with torch.no_grad():
        pool, branch, logits = network(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    return got, pool.numpy(), branch.numpy(), logits.numpy(), network.fc.weight.detach().numpy()


def test_whole_network_equals_torch(compared):
    got, pool, _, _, _ = compared
    assert {k: (v.shape, str(v.dtype)) for k, v in got.items()} == {
        "pool": ((2, 2048), "float32"),
        "spatial": ((2, 2023), "float32"),
        "logits": ((2, 1008), "float32"),
    }
    assert pool.std() > 0.05 and np.abs(pool[0] - pool[1]).max() > 1e-2  # it does see the images
    assert_close(got["pool"], pool, 3e-6)


def test_spatial_features_are_seven_channels_in_the_order_height_width_channel(compared):
    got, _, branch, _, _ = compared
    assert branch.shape == (2, 192, 17, 17) and (branch[:, :7] > 0).any() and branch.min() == 0
    assert_close(got["spatial"], np.moveaxis(branch[:, :7], 1, -1).reshape(2, -1), 1e-5)
    # The place of one number, spelt out: that of the strongest response.
    n, c, row, column = np.unravel_index(branch[:, :7].argmax(), (2, 7, 17, 17))
    place = (row * 17 + column) * 7 + c
    assert got["spatial"][n].argmax() == place
    assert_close(got["spatial"][n, place], branch[n, c, row, column], 1e-5)


def test_logits_have_no_bias(compared, network):
    got, pool, _, logits, matrix = compared
    bias = network.fc.bias.detach().numpy()
    assert np.abs(bias).max() > 1e-2
    assert_close(got["logits"], logits - bias, 5e-6)
    assert_close(got["logits"], pool @ matrix.T, 1e-5, scale=np.abs(logits).max())


def test_every_product_runs_in_full_precision():
    """Accelerators otherwise take 10 or 8 bits of the factors; a CPU does not show it."""
    shapes = {"fc": inception_shapes()["fc"]}
    for path, leaf in flatten(inception_shapes()).items():
        name, _, kind = path.rpartition("/conv/")
        if kind:
            bias = jax.ShapeDtypeStruct(leaf.shape[-1:], jnp.float32)
            shapes |= {f"{name}/kernel": leaf, f"{name}/bias": bias}
    images = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    program = jax.make_jaxpr(inception_features)(unflatten(flatten(shapes)), images)
    products = [
        equation.params["precision"]
        for equation in program.eqns
        if equation.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    highest = jax.lax.Precision.HIGHEST
    assert len(products) == 95 and all(set(p) == {highest} for p in products)


def test_preprocess_places_pixels_on_tf1s_grid_and_centres_at_128():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (1, 100, 256, 3))
    positions = np.minimum(np.arange(299) * 256 / 299, 255)  # of a ramp the value is the position
    got = preprocess(jnp.asarray(ramp))
    assert got.shape == (1, 299, 299, 3) and got.dtype == jnp.float32
    assert_close(got[0, 150, :, 1], (positions - 128) / 128, 1e-6)
    for value, wanted in ((0, -1.0), (128, 0.0), (255, 127 / 128)):
        image = jnp.full((1, 7, 5, 3), value, jnp.uint8)
        np.testing.assert_array_equal(preprocess(image), np.float32(wanted))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 4), np.uint8),
    ],
)
def test_images_that_are_no_bytes_are_refused(images):
    with pytest.raises(ValueError, match=r"uint8 .*\[N, H, W, 3\].*to_uint8"):
        preprocess(images)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[N, 299, 299, 3\].*\(1, 256, 256, 3\)"):
        inception_features({}, np.zeros((1, 256, 256, 3), np.float32))


# --- the name table and the file --------------------------------------------------------------------


def test_name_table_covers_the_released_file_in_both_directions(network):
    state = arrays(network)
    trained = {name: array for name, array in state.items() if "num_batches" not in name}
    assert len(state) == 94 * 6 + 2 and len(trained) == 94 * 5 + 2
    assert sum(array.size for array in trained.values()) == 23_885_392
    auxiliary = {"AuxLogits.fc.weight": np.zeros((1008, 768), np.float32)}
    ours = from_reference(state | auxiliary, inception_shapes(), NAME_RULES, IGNORED_NAMES)
    again = to_reference(ours, NAME_RULES)
    assert again.keys() == trained.keys()
    for name, array in trained.items():
        np.testing.assert_array_equal(again[name], array)
    # One element by hand: kernel[row, column, in, out] is weight[out, in, row, column] there.
    kernel = ours["Mixed_6b"]["branch7x7_2"]["conv"]["kernel"]
    assert kernel.shape == (1, 7, 128, 128)
    assert kernel[0, 5, 3, 2] == state["Mixed_6b.branch7x7_2.conv.weight"][2, 3, 0, 5]
    assert ours["fc"]["kernel"][7, 1000] == state["fc.weight"][1000, 7]


def test_misfits_are_all_listed(network):
    state = arrays(network)
    del state["Mixed_7c.branch_pool.bn.running_var"]
    state["Mixed_7d.branch1x1.conv.weight"] = state["fc.bias"]
    state["fc.weight"] = state["fc.weight"][:1000]
    with pytest.raises(WeightsError) as caught:
        from_reference(state, inception_shapes(), NAME_RULES, IGNORED_NAMES)
    for line in (
        "missing: Mixed_7c.branch_pool.bn.running_var\n",
        r"wrong shape: fc.weight (1000, 2048), fc/kernel wants (2048, 1008)" + "\n",
        "unexpected: Mixed_7d.branch1x1.conv.weight",
    ):
        assert line in str(caught.value)


@pytest.fixture
def small(monkeypatch):
    """State of a network of two convolutions and a classifier, taken for the whole one."""
    module = torch.nn.Module()
    module.Conv2d_1a_3x3 = Basic(3, 4, 3)
    module.Mixed_5b = torch.nn.Module()
    module.Mixed_5b.branch1x1 = Basic(4, 5)
    module.fc = torch.nn.Linear(5, 6)
    state = arrays(randomise(module))
    shapes = {"fc/kernel": (5, 6), "fc/bias": (6,)}
    for name, kernel in (("Conv2d_1a_3x3", (3, 3, 3, 4)), ("Mixed_5b/branch1x1", (1, 1, 4, 5))):
        shapes[f"{name}/conv/kernel"] = kernel
        shapes |= {f"{name}/bn/{leaf}": kernel[-1:] for leaf in ("scale", "bias", "mean", "var")}
    tree = unflatten({k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()})
    monkeypatch.setattr(inception, "inception_shapes", lambda: tree)
    return state


def equal_to_the_state(weights, state):
    conv, norm = state["Conv2d_1a_3x3.conv.weight"], "Conv2d_1a_3x3.bn."
    factor = state[f"{norm}weight"] / np.sqrt(state[f"{norm}running_var"] + 1e-3)
    assert_close(
        weights.params["Conv2d_1a_3x3"]["kernel"][1, 2, 0], conv[:, 0, 1, 2] * factor, 1e-6
    )
    np.testing.assert_array_equal(weights.params["fc"]["kernel"], state["fc.weight"].T)


def test_the_digest_decides_what_is_the_released_file(small, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_file(small, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=f"{digest}.*6726825d"):
        load_inception(path)
    own = load_inception(path, any_weights=True)
    assert own.sha256 == digest
    equal_to_the_state(own, small)
    monkeypatch.setattr(inception, "SHA256", digest)
    equal_to_the_state(load_inception(str(path)), small)
    with path.open("r+b") as file:  # one flipped bit in the last tensor
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(WeightsError, match=f"{digest}"):
        load_inception(path)


def test_the_pinned_digest_belongs_to_the_file_name():
    assert len(inception.SHA256) == 64
    assert f"-{inception.SHA256[:8]}.pth" in inception.FILE_NAME


def test_a_missing_file_says_what_to_get_and_what_happens_without_it(tmp_path):
    with pytest.raises(WeightsError) as caught:
        load_inception(tmp_path / "nothing.pth")
    for words in (
        "nothing.pth: no such file",
        "pt_inception-2015-12-05-6726825d.pth",
        "SHA-256 begins with 6726825d",
        "pytorch-fid project",
        "LPIPS features and names them so",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, -0.5])
def test_statistics_that_give_no_number_are_named(value, small, tmp_path):
    small["Mixed_5b.branch1x1.bn.running_var"][2] = value
    save_file(small, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match="Mixed_5b/branch1x1/bias, .*/kernel$"):
        load_inception(tmp_path / "weights.safetensors", any_weights=True)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pytorch_file_gives_the_same_as_safetensors(zipped, small, tmp_path):
    tensors = {name: torch.from_numpy(array) for name, array in small.items()}
    save = partial(torch.save, _use_new_zipfile_serialization=zipped)
    save(tensors, tmp_path / "weights.pth")
    equal_to_the_state(load_inception(tmp_path / "weights.pth", any_weights=True), small)
    for value in ({"model": tensors}, list(tensors.values())):
        save(value, tmp_path / "other.pth")
        with pytest.raises(WeightsError, match="other.pth"):
            load_inception(tmp_path / "other.pth", any_weights=True)


def test_weights_that_are_cut_off_or_incomplete_are_refused(small, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(small, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_inception(path, any_weights=True)
    del small["fc.bias"]
    save_file(small, path)
    with pytest.raises(WeightsError, match="fc.bias"):
        load_inception(path, any_weights=True)
