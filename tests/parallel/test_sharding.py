"""The partition table covers every parameter there is, and nothing is laid out that need not be."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.policies import CASES, LLAMA
from tests.helpers.tiny import make_tiny_method, with_random_head
from vapi_jax.common.trees import flatten
from vapi_jax.methods.config import OptimizerConfig
from vapi_jax.models.loading import load_weights
from vapi_jax.models.policies import make_policy
from vapi_jax.parallel.sharding import (
    PARTITION_RULES,
    local_rows,
    make_mesh,
    put_sharded,
    replicated,
    shard_batch,
    spec_of,
    tree_shardings,
)
from vapi_jax.training import train
from vapi_jax.weights.names import WeightsError
from vapi_jax.weights.store import save_safetensors


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 4)


def specs(tree, mesh):
    return {name: s.spec for name, s in flatten(tree_shardings(tree, mesh)).items()}


# --- the mesh -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "shape"),
    [((-1, 1), (8, 1)), ((1, -1), (1, 8)), ((2, 4), (2, 4)), ((-1, 4), (2, 4)), ((4, -1), (4, 2))],
)
def test_minus_one_takes_what_is_left(axes, shape):
    assert dict(make_mesh(*axes).shape) == dict(zip(("data", "fsdp"), shape, strict=True))


@pytest.mark.parametrize("axes", [(3, -1), (2, 2), (16, 1), (-1, -1), (0, 8), (-2, -4), (-1, 0)])
def test_axes_that_do_not_fit_the_devices(axes):
    with pytest.raises(ValueError, match=r"8 device\(s\)"):
        make_mesh(*axes)


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_parameter_of_every_policy_has_a_row_and_matrices_are_split(case, mesh):
    kind, config = CASES[case]
    # Widths that four devices divide; what else happens to 11 codes is the next test's matter.
    config = {**config, "vocab_size": 16}
    if kind == "janus":
        config |= {"text_vocab_size": 16, "image_embed_dim": 8}
    if kind == "text":
        config |= {"caption_dim": 8}
    shapes = jax.eval_shape(make_policy(kind, **config).init, jax.random.key(0))
    found = specs(shapes, mesh)
    assert found.keys() == flatten(shapes).keys()
    for name, leaf in flatten(shapes).items():
        is_matrix = name.endswith(("/kernel", "/embedding"))
        assert ("fsdp" in found[name]) == is_matrix, f"{name} {leaf.shape} is {found[name]}"
        if name.startswith("layers/"):
            assert not found[name] or found[name][0] is None, f"{name}: the layer axis is split"


def test_optimizer_moments_lie_as_their_parameters(mesh):
    params = jax.eval_shape(make_policy("class", **CASES["class"][1]).init, jax.random.key(0))
    config = OptimizerConfig(schedule="cosine", warmup_steps=2)
    state = jax.eval_shape(train.make_optimizer(config, 9).init, params)
    layout = {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(tree_shardings(state, mesh))
    }
    wanted = specs(params, mesh)
    for moment in ("mu", "nu"):
        found = {
            name.split(f"/{moment}/")[1]: spec
            for name, spec in layout.items()
            if f"/{moment}/" in name
        }
        assert found == wanted
    scalars = {name for name in layout if not re.search("/(mu|nu)/", name)}
    assert scalars
    assert all(layout[name] == P() for name in scalars)


def test_tokenizer_and_discriminator_stay_whole(mesh):
    task = make_tiny_method("tokenizer", mesh, image_size=16)
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert set(params) == {"tokenizer", "discriminator"}
    assert all(not any(spec) for spec in specs(params, mesh).values())
    state = train.abstract_state(task, train.make_optimizer(task.config.optimizer, 2), 0)
    shardings = train.state_shardings(state, mesh)  # raises where a name has no row
    assert "batch_stats" in state.extra
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings.extra))


def test_an_axis_that_does_not_divide_stays_whole(mesh):
    assert spec_of("output/kernel", (32, 11), mesh) == P("fsdp", None)
    assert spec_of("output/kernel", (30, 11), mesh) == P(None, None)
    assert spec_of("layers/attention/wo/kernel", (2, 32, 32), mesh) == P(None, None, "fsdp")
    assert spec_of("layers/attention/wo/kernel", (2, 32, 30), mesh) == P(None, None, None)


def test_unknown_names_and_ranks_are_errors(mesh):
    with pytest.raises(ValueError, match="'layers/gate/weights'"):
        spec_of("layers/gate/weights", (4, 4), mesh)
    with pytest.raises(ValueError, match=r"other/kernel.*\(2, 4, 4\)"):
        spec_of("other/kernel", (2, 4, 4), mesh)


def test_no_row_is_dead(mesh):
    """Each row of the table is the first match of some parameter of some model."""
    names = {"tokenizer/x", "a/count"}
    adapted = ("class", {**LLAMA, "lora": {"rank": 2}})
    for kind, config in (*CASES.values(), adapted):
        names |= flatten(jax.eval_shape(make_policy(kind, **config).init, jax.random.key(0))).keys()
    first = {
        next(pattern for pattern, _ in PARTITION_RULES if re.search(pattern, name))
        for name in names
    }
    assert first == {pattern for pattern, _ in PARTITION_RULES}


# --- arrays ---------------------------------------------------------------------------------------


def test_put_sharded_reads_each_slice_and_nothing_more(mesh):
    whole = np.arange(8 * 12, dtype=np.float16).reshape(8, 12)
    target = {"a": {"kernel": jax.ShapeDtypeStruct((8, 12), jnp.float32)}}
    reads = []

    def read(name, index):
        assert name == "a/kernel"
        part = whole[index]
        reads.append(part.shape)
        return part

    shardings = {"a": {"kernel": NamedSharding(mesh, P("fsdp", None))}}
    placed = put_sharded(read, target, shardings)["a"]["kernel"]
    assert set(reads) == {(2, 12)}
    assert placed.dtype == jnp.float32
    np.testing.assert_array_equal(placed, whole)
    again = put_sharded({"a/kernel": whole}, target, shardings)["a"]["kernel"]
    np.testing.assert_array_equal(again, whole)


def test_weights_are_born_and_loaded_in_slices(mesh, tmp_path):
    """After init and after loading a file no device holds more than its share of a split array."""
    path = tmp_path / "policy.safetensors"
    scratch = make_tiny_method("base", mesh)
    wanted = with_random_head(jax.jit(scratch.init)(jax.random.key(5)), 1)
    save_safetensors(path, wanted, dtype=np.float16)
    task = make_tiny_method("base", mesh, init={"gpt": str(path)})
    optimizer = train.make_optimizer(task.config.optimizer, 2)
    for made in (scratch, task):
        state, _ = train.init_state(made, optimizer, seed=0)
        moments = state.opt_state[1][0].mu
        for tree in (state.params, moments):
            for name, leaf in flatten(tree).items():
                split = name.endswith(("/kernel", "/embedding"))
                share = leaf.size // 4 if split else leaf.size
                sizes = {shard.data.size for shard in leaf.addressable_shards}
                assert sizes == {share}, name
                assert not split or leaf.ndim > 1
    for name, leaf in flatten(state.params).items():
        half = np.asarray(flatten(wanted)[name]).astype(np.float16)
        np.testing.assert_array_equal(leaf, half.astype(np.float32))


def test_a_file_of_another_model_or_a_damaged_one_is_refused(mesh, tmp_path):
    path = tmp_path / "policy.safetensors"
    task = make_tiny_method("base", mesh, init={"gpt": str(path)})
    target = jax.eval_shape(task.init, jax.random.key(0))
    layout = tree_shardings(target, mesh)
    source = task.init_from
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), target)
    save_safetensors(path, {**zeros, "output": {"kernel": np.zeros((3, 3), np.float32)}})
    with pytest.raises(WeightsError, match=r"output/kernel \(3, 3\)"):
        load_weights(source, target, layout)
    save_safetensors(path, zeros)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="policy.safetensors"):
        load_weights(source, target, layout)
    path.unlink()
    with pytest.raises(WeightsError, match="policy.safetensors"):
        load_weights(source, target, layout)


def test_microbatches_move_no_image_between_devices(mesh):
    count, batch = 4, 32
    images = np.arange(batch, dtype=np.int32)
    placed = shard_batch({"x": images}, mesh)["x"]
    home = {i: s.device for s in placed.addressable_shards for i in np.asarray(s.data).tolist()}
    split = jax.jit(lambda x: train.split_microbatches(x, count, mesh))
    micro = split(placed)
    np.testing.assert_array_equal(micro, images.reshape(-1, count).T)
    for shard in micro.addressable_shards:
        assert shard.data.shape == (count, batch // count // 8)
        assert {home[i] for i in np.asarray(shard.data).ravel().tolist()} == {shard.device}
    text = split.lower(placed).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute|all-reduce", text)


class OnAccelerator:
    """An array of a device whose transfers to the host have to be asked for, as CPUs' have not."""

    def __init__(self, values):
        self.values, self.asked = np.array(values), False

    def copy_to_host_async(self):
        self.asked = True

    def __array__(self, dtype=None, copy=None):
        assert self.asked, "an implicit transfer from device to host"
        return self.values


def test_local_rows_are_asked_for_and_in_order():
    shards = [
        SimpleNamespace(index=(slice(start, start + 2),), data=OnAccelerator([start, start + 1]))
        for start in (2, 0)
    ]
    rows = local_rows(SimpleNamespace(addressable_shards=shards))
    np.testing.assert_array_equal(rows, [0, 1, 2, 3])


def test_batches_are_split_over_both_axes(mesh):
    placed = shard_batch({"image": np.zeros((16, 2, 2, 3), np.float32)}, mesh)["image"]
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 2, 2, 3)}
    assert replicated(mesh).is_fully_replicated
