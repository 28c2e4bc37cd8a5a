"""Images encoded once: the same pixels and tokens, the same steps, and nothing else taken for them."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.helpers import commands
from tests.helpers.tiny import BATCH, SIDE, make_tiny_config
from vapi_jax.common.trees import flatten
from vapi_jax.data import DataError, class_names, fixed_batch, make_dataset
from vapi_jax.encode_dataset import encode_dataset
from vapi_jax.methods import make_task
from vapi_jax.methods.config import ConfigError
from vapi_jax.parallel.sharding import make_mesh, shard_batch
from vapi_jax.training import train
from vapi_jax.weights.names import WeightsError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = make_tiny_config("vapi")
    out = tmp_path_factory.mktemp("data") / "encoded"
    assert encode_dataset(config, out, 40) == {"train": 40, "val": 8}
    return config, out


def encoded(config, out, **changes):
    data = dataclasses.replace(config.data, name="encoded", path=str(out), shuffle=False, **changes)
    return dataclasses.replace(config, data=data)


def test_what_is_read_is_what_the_recipe_would_have_seen(made):
    config, out = made
    again = encoded(config, out)
    plain = iter(make_dataset(config.data, "train", BATCH, config.seed))
    stored = iter(make_dataset(again.data, "train", BATCH, config.seed))
    task = make_task(config, make_mesh())
    frozen, encode = train.load_frozen(task), jax.jit(task.pixels.encode)
    for _ in range(2):
        want, got = next(plain), next(stored)
        np.testing.assert_array_equal(got["image"], want["image"])
        np.testing.assert_array_equal(got["condition"], want["condition"])
        np.testing.assert_array_equal(got["tokens"], encode(frozen, want["image"]))
        assert got["tokens"].dtype == np.int32
    assert class_names(again.data) == class_names(config.data)
    held_out = fixed_batch(config.data, "val", 8, config.seed)["image"]
    found = fixed_batch(again.data, "val", 8, config.seed)["image"]
    # In another order, for a small split is drawn from as a whole.
    assert sorted(map(bytes, found)) == sorted(map(bytes, held_out))


@pytest.mark.slow
def test_a_step_takes_stored_tokens_for_its_own(made):
    config, out = made
    done = []
    for one in (config, encoded(config, out)):
        task = make_task(one, make_mesh(devices=jax.devices()[:1]))
        optimizer = train.make_optimizer(one.optimizer, 2)
        state, shardings = train.init_state(task, optimizer, 0)
        batch = next(iter(make_dataset(one.data, "train", BATCH, one.seed)))
        step = train.make_train_step(task, optimizer, shardings)
        state, metrics = step(state, train.load_frozen(task), shard_batch(batch, task.mesh))
        done.append((flatten(jax.device_get(state.params)), jax.device_get(metrics)))
    (params, metrics), (stored_params, stored_metrics) = done
    assert metrics.keys() == stored_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(stored_metrics[name], value, rtol=1e-5, err_msg=name)
    for name, value in params.items():
        np.testing.assert_allclose(stored_params[name], value, atol=1e-6, err_msg=name)


def test_tokens_of_another_tokenizer_are_refused(made, tmp_path):
    config, out = made
    facts = json.loads((out / "train" / "encoded.json").read_text())
    other = tmp_path / "other"
    for split in ("train", "val"):
        (other / split).mkdir(parents=True)
        for path in (out / split).iterdir():
            (other / split / path.name).write_bytes(path.read_bytes())
    facts["tokenizer"] = "0" * 64
    (other / "train" / "encoded.json").write_text(json.dumps(facts))
    task = make_task(encoded(config, other), make_mesh())
    with pytest.raises(WeightsError, match="encoded with another tokenizer"):
        task.load_frozen()


def test_what_is_missing_or_does_not_fit_is_named(made, tmp_path):
    config, out = made
    with pytest.raises(DataError, match="holds no encoded images.*encode_dataset"):
        make_dataset(encoded(config, tmp_path).data, "train", 4, 0)
    with pytest.raises(DataError, match=f"the images in .* have {SIDE} pixels"):
        make_dataset(encoded(config, out, image_size=2 * SIDE).data, "train", 4, 0)
    broken = tmp_path / "broken" / "train"
    broken.mkdir(parents=True)
    for path in (out / "train").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    np.save(broken / "labels.npy", np.zeros(3, np.int32))
    with pytest.raises(DataError, match=r"labels\.npy holds int32 \(3,\), .* says 40"):
        make_dataset(encoded(config, tmp_path / "broken").data, "train", 4, 0)
    (broken / "labels.npy").write_bytes(b"\x80\x04N.")  # a pickle
    with pytest.raises(DataError, match=r"labels\.npy cannot be read"):
        make_dataset(encoded(config, tmp_path / "broken").data, "train", 4, 0)


def test_what_cannot_be_encoded_is_said_before_anything_is_written(made, tmp_path):
    config, out = made
    with pytest.raises(ConfigError, match="exists; choose another place"):
        encode_dataset(config, out)
    with pytest.raises(ConfigError, match="reads encoded images already"):
        encode_dataset(encoded(config, out), tmp_path / "x")
    with pytest.raises(ConfigError, match="only generators read tokens"):
        encode_dataset(make_tiny_config("tokenizer", image_size=16), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command_says_how_to_use_what_it_wrote(tmp_path):
    out = tmp_path / "encoded"
    done = commands.module(
        "encode_dataset", "--config=configs/c2i_demo.py:tiny", f"--out={out}", "--num=12"
    )
    assert done.returncode == 0, done.stderr
    assert f"--config.data.path={out}" in done.stdout
    assert np.load(out / "train" / "tokens.npy").shape == (12, 64)
