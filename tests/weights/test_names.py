"""Name tables both ways, and safetensors files that are whole or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vapi_jax.common.digests import sha256_file
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.weights import store
from vapi_jax.weights.names import Rule, WeightsError, check_like, from_reference, to_reference
from vapi_jax.weights.store import load_metadata, load_safetensors, save_safetensors

RULES = (
    Rule(r"embed/embedding", r"tok.weight"),
    Rule(r"conv_(\d+)/kernel", r"convs.\1.weight", "conv"),
    Rule(r"layers/(\w+)/kernel", r"blocks.{layer}.\1.weight", "linear"),
    Rule(r"layers/norm/scale", r"blocks.{layer}.norm.weight"),
    Rule(r"out/kernel", r"out.weight", "linear"),
)
SHAPES = {  # ours -> (shape of ours, {theirs: shape of theirs})
    "embed/embedding": ((5, 3), {"tok.weight": (5, 3)}),
    "conv_7/kernel": ((3, 2, 4, 6), {"convs.7.weight": (6, 4, 3, 2)}),
    "layers/fc/kernel": (
        (2, 3, 4),
        {"blocks.0.fc.weight": (4, 3), "blocks.1.fc.weight": (4, 3)},
    ),
    "layers/norm/scale": ((2, 3), {"blocks.0.norm.weight": (3,), "blocks.1.norm.weight": (3,)}),
    "out/kernel": ((3, 5), {"out.weight": (5, 3)}),
}


@pytest.fixture
def target():
    return unflatten(
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, (shape, _) in SHAPES.items()}
    )


@pytest.fixture
def theirs():
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for _, names in SHAPES.values()
        for name, shape in names.items()
    }


def test_every_kind_of_rule_puts_each_element_in_its_place(theirs, target):
    ours = from_reference(theirs, target, RULES)
    np.testing.assert_array_equal(ours["embed"]["embedding"], theirs["tok.weight"])
    # y = x @ kernel here is y = weight @ x there.
    assert ours["out"]["kernel"][1, 4] == theirs["out.weight"][4, 1]
    # kernel[row, column, in, out] here is weight[out, in, row, column] there.
    assert ours["conv_7"]["kernel"][2, 1, 3, 5] == theirs["convs.7.weight"][5, 3, 2, 1]
    for layer in range(2):
        np.testing.assert_array_equal(
            ours["layers"]["fc"]["kernel"][layer], theirs[f"blocks.{layer}.fc.weight"].T
        )
        np.testing.assert_array_equal(
            ours["layers"]["norm"]["scale"][layer], theirs[f"blocks.{layer}.norm.weight"]
        )


def test_there_and_back_is_the_identity(theirs, target):
    again = to_reference(from_reference(theirs, target, RULES), RULES)
    assert again.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(again[name], theirs[name])


def test_the_first_matching_rule_wins(theirs, target):
    other = (Rule(r"out/kernel", r"elsewhere.weight", "linear"), *RULES)
    theirs["elsewhere.weight"] = theirs.pop("out.weight")
    ours = from_reference(theirs, target, other)
    np.testing.assert_array_equal(ours["out"]["kernel"], theirs["elsewhere.weight"].T)


def test_the_target_decides_the_dtype(theirs):
    target = {"out": {"kernel": jax.ShapeDtypeStruct((3, 5), jnp.float16)}}
    ours = from_reference({"out.weight": theirs["out.weight"]}, target, RULES)
    assert ours["out"]["kernel"].dtype == np.float16


def test_all_misfits_are_listed_at_once_and_by_name(theirs, target):
    del theirs["blocks.1.fc.weight"], theirs["tok.weight"]
    theirs["out.weight"] = np.zeros((5, 4), np.float32)
    theirs["convs.7.weight"] = np.zeros((6, 4, 3), np.float32)  # of another rank
    theirs["lora.a"] = theirs["lora.b"] = np.zeros(1, np.float32)
    with pytest.raises(WeightsError) as error:
        from_reference(theirs, target, RULES)
    missing, shapes, unexpected = str(error.value).splitlines()[1:]
    assert missing.split(": ")[0].strip() == "missing"
    assert "blocks.1.fc.weight" in missing
    assert "tok.weight" in missing
    assert "blocks.0.fc.weight" not in missing
    assert "wrong shape" in shapes
    assert "out.weight (5, 4), out/kernel wants (3, 5)" in shapes
    assert "convs.7.weight (6, 4, 3), conv_7/kernel wants (3, 2, 4, 6)" in shapes
    assert "unexpected" in unexpected
    assert "lora.a" in unexpected
    assert "lora.b" in unexpected


def test_ignored_names_are_whole_names(theirs, target):
    theirs["rope.table"] = np.zeros(1, np.float32)
    from_reference(theirs, target, RULES, ignore=(r"rope\.\w+",))
    with pytest.raises(WeightsError, match=r"rope\.table"):
        from_reference(theirs, target, RULES, ignore=(r"rope",))


def test_a_parameter_without_a_rule_is_an_error(theirs, target):
    target["extra"] = {"bias": jax.ShapeDtypeStruct((1,), jnp.float32)}
    with pytest.raises(WeightsError, match="extra/bias"):
        from_reference(theirs, target, RULES)
    with pytest.raises(WeightsError, match="extra/bias"):
        to_reference({"extra": {"bias": np.zeros(1)}}, RULES)


def test_flatten_sorts_and_unflatten_inverts():
    tree = {"b": {"y": 1, "x": {"z": 2}}, "a": 3}
    assert list(flatten(tree).items()) == [("a", 3), ("b/x/z", 2), ("b/y", 1)]
    assert unflatten(flatten(tree)) == tree


def test_check_like_lists_everything():
    have = {"a": np.zeros(2), "b": {"c": np.zeros((2, 3))}}
    want = {"a": np.zeros(3), "b": {"d": np.zeros(1)}}
    with pytest.raises(WeightsError) as error:
        check_like(have, want, "these weights")
    text = str(error.value)
    for line in ("missing: b/d", "unexpected: b/c", "a (2,), the model wants (3,)"):
        assert line in text
    check_like(have, have, "these weights")


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def params():
    rng = np.random.default_rng(1)
    return {
        "a": {"kernel": rng.normal(size=(4, 3)).astype(np.float32)},
        "b": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "c": np.asfortranarray(rng.normal(size=(2, 3)).astype(np.float32)),
        "steps": np.int32(7),
    }


def test_a_saved_tree_comes_back_bit_by_bit(params, tmp_path):
    path = tmp_path / "w.safetensors"
    digest = save_safetensors(path, params, {"name": "x", "steps": 3})
    assert digest == sha256_file(path)
    again = flatten(load_safetensors(path))
    for name, leaf in flatten(params).items():
        want = np.asarray(leaf)
        assert (again[name].dtype, again[name].shape) == (want.dtype, want.shape)
        assert again[name].tobytes() == want.tobytes()
    assert load_metadata(path) == {"name": "x", "steps": 3}
    assert sorted(load_file(path)) == ["a/kernel", "b", "c", "steps"]  # any reader sees our names
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_half_precision_storage(params, tmp_path):
    path = tmp_path / "half.safetensors"
    save_safetensors(path, {"a": params["a"]}, dtype=np.float16)
    stored = load_safetensors(path)["a"]["kernel"]
    assert stored.dtype == np.float16
    wide = load_safetensors(path, "float32")["a"]["kernel"]
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, params["a"]["kernel"].astype(np.float16).astype(np.float32))
    whole = tmp_path / "whole.safetensors"
    save_safetensors(whole, {"a": params["a"]})
    assert whole.stat().st_size - path.stat().st_size >= 2 * 12


def test_an_interrupted_save_leaves_the_old_file_or_none(params, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"

    def half_written(arrays, target, metadata):
        target.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", half_written)
        with pytest.raises(KeyboardInterrupt):
            save_safetensors(path, params)
        assert not path.exists()
    digest = save_safetensors(path, params)
    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", half_written)
        with pytest.raises(KeyboardInterrupt):
            save_safetensors(path, {"a": np.zeros(1)})
    assert sha256_file(path) == digest


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "missing", "folder"])
def test_a_file_that_cannot_be_read_is_named(params, tmp_path, damage):
    path = tmp_path / f"{damage}.safetensors"
    if damage == "truncated":
        save_safetensors(path, params)
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(b"not safetensors at all" if damage == "garbage" else b"")
    with pytest.raises(WeightsError, match=f"{damage}.safetensors"):
        load_safetensors(path)
    with pytest.raises(WeightsError, match=f"{damage}.safetensors"):
        load_metadata(path)
