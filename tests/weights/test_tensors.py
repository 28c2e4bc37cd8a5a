"""Named tensors in files of every layout, read one at a time; and files written piece by piece."""

import argparse
import contextlib
import errno
import json
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vapi_jax.common.digests import sha256_file
from vapi_jax.weights.names import WeightsError
from vapi_jax.weights.tensors import Outgoing, open_tensors, write_safetensors, write_sharded

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.bias": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "steps": np.array(7, np.int64),
}


def read_all(path):
    with open_tensors(path) as file:
        return {name: tensor.read() for name, tensor in file.tensors.items()}, file.ignored


def assert_same(found, wanted=ARRAYS):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def state_dict(prefix=""):
    """The same tensors as PyTorch keeps them."""
    return OrderedDict(
        {
            f"{prefix}a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
            f"{prefix}b.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            f"{prefix}steps": torch.tensor(7),
        }
    )


LAYOUTS = {
    "bare": (state_dict(), ()),
    "model": ({"model": state_dict()}, ()),
    "ddp": (
        {"model": state_dict("module."), "optimizer": {"state": {}}, "steps": 3,
         "args": argparse.Namespace(lr=1e-4, gpt_model="GPT-B")},
        ("optimizer", "steps", "args"),
    ),
    "module": ({"module": state_dict(), "ema": state_dict()}, ("ema",)),
    "state_dict": ({"state_dict": state_dict("_orig_mod."), "epoch": 1}, ("epoch",)),
    "lightning": ({"state_dict": {"model": state_dict()}, "epoch": 1}, ("epoch",)),
    "wrapped twice": ({"model": state_dict("_orig_mod.module.")}, ()),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dicts_are_found_wherever_training_scripts_put_them(tmp_path, layout):
    value, ignored = LAYOUTS[layout]
    torch.save(value, tmp_path / "x.pt")
    found, others = read_all(tmp_path / "x.pt")
    assert_same(found)
    assert others == ignored


def test_a_part_of_a_tensor_can_be_read(tmp_path):
    torch.save(state_dict(), tmp_path / "x.pt")
    save_file(ARRAYS, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        with open_tensors(tmp_path / name) as file:
            tensor = file.tensors["a.weight"]
            assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((3, 4), np.float32, 48)
            part = tensor.read((slice(1, 3), slice(0, 2)))
            np.testing.assert_array_equal(part, [[4, 5], [8, 9]])


def write_shards(folder, prefix=""):
    """Two shards and their index, which is returned."""
    arrays = {prefix + name: array for name, array in ARRAYS.items()}
    first = prefix + "a.weight"
    save_file({first: arrays[first]}, folder / "model-00001-of-00002.safetensors")
    rest = {name: array for name, array in arrays.items() if name != first}
    save_file(rest, folder / "model-00002-of-00002.safetensors")
    where = {name: f"model-0000{1 + (name != first)}-of-00002.safetensors" for name in arrays}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    return index


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_an_index_gathers_its_shards_and_their_folder_finds_it(tmp_path, prefix):
    index = write_shards(tmp_path, prefix)
    (tmp_path / "config.json").write_text("{}")
    for path in (index, tmp_path):
        assert_same(read_all(path)[0])


def test_a_shard_that_is_not_there_is_named(tmp_path):
    index = write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors"):
        read_all(index)


@pytest.mark.parametrize("name", ["model.safetensors", "c2i_B_256.pt", "pytorch_model.bin"])
def test_a_folder_of_one_file_is_that_file(tmp_path, name):
    if name.endswith(".safetensors"):
        save_file(ARRAYS, tmp_path / name)
    else:
        torch.save(state_dict(), tmp_path / name)
    (tmp_path / "README.md").write_text("x")
    assert_same(read_all(tmp_path)[0])


def test_a_folder_that_leaves_a_choice_names_it(tmp_path):
    with pytest.raises(WeightsError, match="without weights"):
        read_all(tmp_path)
    write_shards(tmp_path).unlink()
    with pytest.raises(WeightsError, match=r"2 files.*00001-of-00002.*index"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod."]
)
def test_prefixes_of_wrappers_are_taken_off_whatever_the_file(tmp_path, prefix):
    save_file({prefix + name: array for name, array in ARRAYS.items()}, tmp_path / "x.safetensors")
    torch.save(state_dict(prefix), tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        assert_same(read_all(tmp_path / name)[0])


def of_zeros(prefix=""):
    return {f"{prefix}{name}": torch.zeros_like(value) for name, value in state_dict().items()}


def test_one_of_several_models_can_be_chosen(tmp_path):
    torch.save(
        {"model": of_zeros("module."), "ema": state_dict("module."), "steps": 3}, tmp_path / "x.pt"
    )
    both = {f"ema.{name}": array for name, array in ARRAYS.items()}
    both |= {f"model.{name}": np.zeros_like(array) for name, array in ARRAYS.items()}
    save_file(both, tmp_path / "x.safetensors")
    for name, others in (("x.pt", {"model", "steps"}), ("x.safetensors", {"model"})):
        with open_tensors(tmp_path / name, "ema") as file:
            assert_same({key: tensor.read() for key, tensor in file.tensors.items()})
            assert set(file.ignored) == others
        found, ignored = read_all(tmp_path / name)
        assert "ema" in ignored
        assert not found["a.weight"].any(), "without a choice it is the model, not its average"
        with (
            pytest.raises(WeightsError, match="'emma'.*ema"),
            open_tensors(tmp_path / name, "emma"),
        ):
            pass


def test_averages_alone_have_to_be_chosen(tmp_path):
    torch.save({"ema": state_dict(), "steps": 3}, tmp_path / "x.pt")
    save_file({f"ema.{name}": array for name, array in ARRAYS.items()}, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        with pytest.raises(WeightsError, match=r"ema.*--entry"):
            read_all(tmp_path / name)
        with open_tensors(tmp_path / name, "ema") as file:
            assert_same({key: tensor.read() for key, tensor in file.tensors.items()})


@pytest.mark.parametrize(
    "index, message",
    [
        ("[]", "no JSON object"),
        ("{}", "no index of safetensors shards"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "which is no file beside it"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "which is no file beside it"),
        ('{"weight_map": {"a": "x.pt"}}', "which is no file beside it"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "promises absent.safetensors"),
        ('{"weight_map": {"zzz": "one.safetensors"}}', "promises zzz, absent from its shards"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, index, message):
    save_file(ARRAYS, tmp_path / "one.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(WeightsError, match=message):
        read_all(path)


def test_torch_shards_by_their_index(tmp_path):
    for name in "ab":
        torch.save({name: torch.full((2,), ord(name))}, tmp_path / f"{name}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "a.bin", "b": "b.bin"}}')
    found, _ = read_all(index)
    assert {name: array.tolist() for name, array in found.items()} == {"a": [97] * 2, "b": [98] * 2}
    for wrong, message in (
        ('{"weight_map": {"a": "../a.bin"}}', "no file beside it"),
        ('{"weight_map": {"a": "b.bin"}}', "promises a"),
        ('{"weight_map": {"a": "c.bin"}}', "c.bin"),
        ('{"weight_map": {"a": ["a.bin"]}}', "no index"),
        ('{"weight_map": {"a": 3}}', "names 3"),
        ('{"weights": {}}', "no index"),
    ):
        index.write_text(wrong)
        with pytest.raises(WeightsError, match=message):
            read_all(index)


def test_torch_shards_lose_the_prefix_that_all_of_them_have(tmp_path):
    torch.save({"module.a.x": torch.zeros(1)}, tmp_path / "1.bin")
    torch.save({"module.b": torch.ones(1)}, tmp_path / "2.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"module.a.x": "1.bin", "module.b": "2.bin"}}')
    assert read_all(index)[0].keys() == {"a.x", "b"}


def test_what_goes_wrong_while_a_file_is_open_is_not_its_fault(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(OSError, match="No space left"), open_tensors(tmp_path / "a.pt"):
        raise OSError(errno.ENOSPC, "No space left on device")


NAMES = st.sampled_from(["a", "a.bin", "b.bin", "../a.bin", "a.safetensors", "weight_map", ""])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@settings(max_examples=60)
@given(value=JSON)
def test_any_index_is_refused_or_names_files_beside_it(kind, value, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    torch.save({"a": torch.zeros(1)}, folder / "a.bin")
    save_file({"a": np.zeros(1, np.float32)}, folder / "a.safetensors")
    index = folder / f"model.{kind}.index.json"
    for written in (value, {"weight_map": value}):
        index.write_text(json.dumps(written))
        with contextlib.suppress(WeightsError):
            assert set(read_all(index)[0]) <= {"a"}


def test_files_without_a_state_dict_say_what_they_have(tmp_path):
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="epoch, loss"):
        read_all(tmp_path / "x.pt")
    torch.save([torch.zeros(1)], tmp_path / "y.pt")
    with pytest.raises(WeightsError, match="list"):
        read_all(tmp_path / "y.pt")


def test_one_storage_cannot_pass_for_many_tensors(tmp_path):
    storage = torch.zeros(1000)
    torch.save({f"layers.{i}": storage.view(10, 100) for i in range(50)}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="share"):
        read_all(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("content", [b"", b"hello", b"<html>404</html>", b"\xff" * 64])
def test_what_is_no_weights_is_refused_by_name(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=name):
        read_all(path)
    with pytest.raises(WeightsError, match=r"absent\.pt"):
        read_all(tmp_path / "absent.pt")


# --- writing --------------------------------------------------------------------------------------


def outgoing(arrays=ARRAYS):
    """Tensors to write, row by row where there are rows."""
    return [
        Outgoing(
            name,
            array.shape,
            array.dtype,
            lambda array=array: iter(array if array.ndim else [array]),
        )
        for name, array in arrays.items()
    ]


def test_a_file_written_in_pieces_is_read_by_the_library(tmp_path):
    path, told = tmp_path / "x.safetensors", []
    digest = write_safetensors(path, outgoing(), {"format": "pt"}, told.append)
    assert digest == sha256_file(path)
    assert sum(told) == sum(array.nbytes for array in ARRAYS.values())
    assert_same(load_file(path))
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_tensor_that_is_not_what_was_announced_leaves_no_file(tmp_path):
    wrong = Outgoing("a", (4,), np.dtype(np.float32), lambda: iter([np.zeros(3, np.float32)]))
    with pytest.raises(ValueError, match="12.*16"):
        write_safetensors(tmp_path / "x.safetensors", [wrong])
    assert not (tmp_path / "x.safetensors").exists()


def test_large_weights_go_into_shards_with_an_index(tmp_path):
    arrays = {f"t{i}": np.full(5, i, np.float32) for i in range(5)}
    digests = write_sharded(tmp_path, "model", outgoing(arrays), limit=45)
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert list(digests) == [*shards, "model.safetensors.index.json"]
    for name, digest in digests.items():
        assert sha256_file(tmp_path / name) == digest
    assert [len(load_file(tmp_path / name)) for name in shards] == [2, 2, 1]
    assert_same(read_all(tmp_path / "model.safetensors.index.json")[0], arrays)


def test_a_tensor_beyond_the_limit_gets_a_shard_of_its_own(tmp_path):
    arrays = {"big": np.zeros(100, np.float32), "small": np.zeros(1, np.float32)}
    assert len(write_sharded(tmp_path, "model", outgoing(arrays), limit=50)) == 3
    assert list(write_sharded(tmp_path, "all", outgoing(arrays), limit=404)) == ["all.safetensors"]
