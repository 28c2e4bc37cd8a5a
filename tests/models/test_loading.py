"""Initial weights from whatever a user has, each device reading its own slices, damage refused."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
import torch

from vapi_jax.common.trees import flatten
from vapi_jax.models.conversion import convert, model_shapes, name_rules
from vapi_jax.models.llama import LlamaConfig
from vapi_jax.models.loading import WeightsSource, load_weights, reference_weights
from vapi_jax.models.policies import make_policy
from vapi_jax.parallel.sharding import make_mesh, tree_shardings
from vapi_jax.weights.names import WeightsError, from_reference, to_reference
from vapi_jax.weights.store import save_safetensors
from vapi_jax.weights.tensors import LazyTensor


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    """The golden generator: configuration, our parameters, and the same weights in every form."""
    args = golden.args("gpt_c2i")
    fields = {field.name for field in dataclasses.fields(LlamaConfig)}
    config = LlamaConfig(**{k: v for k, v in args.items() if k in fields})
    target = model_shapes(config)
    state = golden.tensors("gpt_c2i")
    folder = tmp_path_factory.mktemp("weights")
    torch.save({"model": {k: torch.from_numpy(v) for k, v in state.items()}}, folder / "x.pt")
    convert(folder / "converted", gpt=folder / "x.pt", gpt_args=args)
    params = from_reference(state, target, *name_rules("gpt"))
    (folder / "run" / "weights").mkdir(parents=True)
    save_safetensors(folder / "run" / "weights" / "policy.safetensors", params)
    return folder, config, target, params


def source(path, config=None, **changes):
    return WeightsSource(str(path), "gpt", *name_rules("gpt"), config, **changes)


FORMS = ("x.pt", "converted", "run", "run/weights/policy.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_sharded_arrays(model, form):
    folder, config, target, params = model
    mesh = make_mesh(2, 4)
    loaded = load_weights(source(folder / form, config), target, tree_shardings(target, mesh))
    wanted = flatten(params)
    for name, leaf in flatten(loaded).items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)
        if name.endswith("/kernel"):
            assert {s.data.size for s in leaf.addressable_shards} == {leaf.size // 4}


def test_the_dtype_can_be_chosen_on_load(model):
    folder, _, target, params = model
    loaded = load_weights(source(folder / "converted"), target, dtype="bfloat16")
    for name, leaf in flatten(loaded).items():
        assert leaf.dtype.name == "bfloat16"
        np.testing.assert_array_equal(leaf, flatten(params)[name].astype(leaf.dtype))


def test_the_shipped_weights_load_by_name():
    policy = make_policy(
        "class", dim=192, n_layer=4, n_head=6, n_kv_head=2, multiple_of=64, num_classes=12,
        vocab_size=1024, block_size=64,
    )  # fmt: skip
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    wrong = dataclasses.replace(policy.config, n_layer=5)
    assert load_weights(source("demo"), shapes)
    with pytest.raises(WeightsError, match="demo"):
        load_weights(source("demo"), model_shapes(wrong))


def test_only_the_layers_and_rows_asked_for_are_read(model):
    """A device that keeps a part of a stacked parameter touches no other layer's tensor."""
    _, _, target, params = model
    rules, ignored = name_rules("gpt")
    state = {}
    touched = []
    for name, array in to_reference(params, rules).items():

        def fetch(index, name=name, array=array):
            touched.append(name)
            return array if index is None else array[index]

        state[name] = LazyTensor(array.shape, array.dtype, fetch)
    weights = reference_weights(state, target, rules, ignored)
    path = "layers/feed_forward/w1/kernel"
    part = weights.read(path, (slice(1, 2), slice(0, 16), slice(None)))
    np.testing.assert_array_equal(part, flatten(params)[path][1:2, :16])
    assert touched == ["layers.1.feed_forward.w1.weight"]


def test_damage_is_found_unless_the_check_is_switched_off(model, tmp_path, caplog):
    folder, config, target, _ = model
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (folder / "converted").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(WeightsError, match=r"model\.safetensors.*SHA-256"):
        load_weights(source(copy, config), target)
    with caplog.at_level(logging.WARNING):
        load_weights(source(copy, config, verify=False), target)
    assert "without comparing digests" in caplog.text
    weights.unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors.*missing"):
        load_weights(source(copy, config), target)


def test_a_manifest_that_names_files_elsewhere_is_refused(model, tmp_path):
    folder, config, target, _ = model
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (folder / "converted").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["outputs"]["../secret"] = {"size": 1, "sha256": ""}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WeightsError, match=r"\.\./secret \(missing\)"):
        load_weights(source(copy, config), target)
    of_a_word = json.dumps({**manifest, "outputs": {"model.safetensors": "whole"}})
    wrong = {
        "{}": "no files",
        "[]": "no JSON object",
        "{": "be read",
        of_a_word: "of model.*'whole'",
    }
    for text, message in wrong.items():
        (copy / "manifest.json").write_text(text)
        with pytest.raises(WeightsError, match=message):
            load_weights(source(copy, config), target)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_layer": 3}, "n_layer"),
        ({"num_classes": 11}, "11|class_rows"),
        ({"n_kv_head": 2}, "n_kv_head|kv_dim"),
        ({"multiple_of": 64}, "hidden_dim"),
    ],
)
@pytest.mark.parametrize("form", ["x.pt", "converted"])
def test_a_configuration_of_another_model_is_refused_with_the_difference(
    model, form, change, message
):
    folder, config, _, _ = model
    asked = dataclasses.replace(config, **change)
    with pytest.raises(WeightsError, match=message) as error:
        load_weights(source(folder / form, asked), model_shapes(asked))
    assert "missing" not in str(error.value)  # one cause, not its hundred symptoms


def test_weights_of_another_grid_are_refused_although_every_shape_fits(model, tmp_path):
    folder, config, target, _ = model
    larger = dataclasses.replace(config, block_size=576)
    with pytest.raises(WeightsError, match="block_size.*16.*576"):
        load_weights(source(folder / "converted", larger), target)
    named = tmp_path / "c2i_B_256.pt"
    named.write_bytes((folder / "x.pt").read_bytes())
    with pytest.raises(WeightsError, match=r"16.*256.*384.*24"):
        load_weights(source(named, larger), target)


def test_a_part_that_is_not_there_is_named(model, tmp_path):
    folder, _, target, _ = model
    tokenizer = WeightsSource(str(folder / "converted"), "vq", *name_rules("vq"))
    with pytest.raises(WeightsError, match="gpt.*--vq"):
        load_weights(tokenizer, target)
    with pytest.raises(WeightsError, match="manifest.json"):
        load_weights(source(tmp_path), target)
    with pytest.raises(WeightsError, match=r"absent\.pt"):
        load_weights(source(tmp_path / "absent.pt"), target)
