"""Images encoded once: the same pixels and tokens, the same steps, and nothing else taken for them."""

import collections
import dataclasses
import itertools
import json
import shutil
from contextlib import nullcontext

import jax
import numpy as np
import pytest

from tests.helpers import image_text
from tests.helpers.compare import assert_close
from tests.helpers.paths import GOLDEN
from tests.helpers.tiny import BATCH, SIDE, make_tiny_config, policy_file, with_random_head
from vapi_jax.common import locks
from vapi_jax.common.files import FolderExistsError
from vapi_jax.common.trees import flatten
from vapi_jax.data import DataError, class_names, fixed_batch, make_dataset
from vapi_jax.data.encoded import write_part
from vapi_jax.data.image_text import source
from vapi_jax.evaluation.held_out import HeldOut
from vapi_jax.generation import encoding
from vapi_jax.generation.encoding import encode_dataset
from vapi_jax.methods import METHODS, make_method
from vapi_jax.methods.config import ConfigError
from vapi_jax.models.pixels import PixelSpace
from vapi_jax.parallel.sharding import make_mesh, replicate, shard_batch
from vapi_jax.training import train
from vapi_jax.training.loop import fit
from vapi_jax.weights.names import WeightsError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    config = make_tiny_config("vapi")
    out = tmp_path_factory.mktemp("data") / "encoded"
    method = make_method(config, make_mesh())
    assert encode_dataset(method, out, 40, part=32) == {"train": 40, "val": 8}
    return config, out


def encoded(config, out, **changes):
    data = dataclasses.replace(config.data, name="encoded", path=str(out), shuffle=False, **changes)
    return dataclasses.replace(config, data=data)


def test_what_is_read_is_what_the_recipe_would_have_seen(made):
    config, out = made
    again = encoded(config, out)
    plain = iter(make_dataset(config.data, "train", BATCH, config.seed))
    stored = iter(make_dataset(again.data, "train", BATCH, config.seed))
    method = make_method(config, make_mesh())
    frozen, encode = train.load_frozen(method), jax.jit(method.pixels.encode)
    for _ in range(2):
        want, got = next(plain), next(stored)
        np.testing.assert_array_equal(got["image"], want["image"])
        np.testing.assert_array_equal(got["condition"], want["condition"])
        np.testing.assert_array_equal(got["tokens"], encode(frozen, want["image"]))
        assert got["tokens"].dtype == np.int32
    assert class_names(again.data) == class_names(config.data)
    held_out = fixed_batch(config.data, "val", 8, config.seed)
    found = fixed_batch(again.data, "val", 8, config.seed)
    np.testing.assert_array_equal(found["tokens"], encode(frozen, held_out["image"]))
    for name, value in held_out.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("kind", ["vapi", "base"])
def test_held_out_metrics_are_the_same_to_the_bit_and_nothing_is_encoded(made, kind, monkeypatch):
    config, out = made
    found = []
    for one in (config, encoded(config, out)):
        own = METHODS[kind]
        one = dataclasses.replace(one, method=kind, options=own.Options(), section=own.section)
        method = make_method(one, make_mesh())
        params = with_random_head(jax.jit(method.policy.init)(jax.random.key(0)), seed=1)
        found.append(HeldOut(method, train.load_frozen(method))(replicate(params, method.mesh)))
        monkeypatch.setattr(PixelSpace, "encode", lambda *_: pytest.fail("encoded again"))
    assert found[0] == found[1]
    assert found[0]["ce"] != pytest.approx(np.log(16), rel=1e-3)  # an untrained head is uniform


@pytest.mark.slow
def test_a_step_takes_stored_tokens_for_its_own(made):
    config, out = made
    done = []
    for one in (config, encoded(config, out)):
        method = make_method(one, make_mesh(devices=jax.devices()[:1]))
        optimizer = train.make_optimizer(one.optimizer, 2)
        state, shardings = train.init_state(method, optimizer, 0)
        batch = next(iter(make_dataset(one.data, "train", BATCH, one.seed)))
        step = train.make_train_step(method, optimizer, shardings)
        state, metrics = step(state, train.load_frozen(method), shard_batch(batch, method.mesh))
        done.append((flatten(jax.device_get(state.params)), jax.device_get(metrics)))
    (params, metrics), (stored_params, stored_metrics) = done
    assert metrics.keys() == stored_metrics.keys()
    for name, value in metrics.items():
        assert_close(stored_metrics[name], value, 1e-5, scale=max(abs(value), 0.1))
    for name, value in params.items():
        assert_close(stored_params[name], value, 1e-5)


def copy(out, to, split="", **changes):
    """The encoded images with other facts, of one split or of both."""
    shutil.copytree(out, to)
    for path in to.glob(f"{split or '*'}/encoded.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return to


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer": 64 * "0"}, "the tokenizer 000000000000 in float32"),
        ({"encoder_dtype": "bfloat16"}, "in bfloat16, and this run has .* in float32"),
        (
            {"encoder_patches": True},
            "of single patches in float32, and this run has .* [0-9a-f]+ in",
        ),
    ],
)
def test_tokens_of_another_encoder_are_refused_and_both_are_named(made, tmp_path, changes, named):
    config, out = made
    method = make_method(encoded(config, copy(out, tmp_path / "other", **changes)), make_mesh())
    with pytest.raises(WeightsError, match=f"init.vq=.*tokenizer.encoder_dtype='float32'.*{named}"):
        method.load_frozen()


def test_a_decoder_is_not_trained_on_tokens_of_another_tokenizer(made, tmp_path):
    config, out = made
    other = copy(out, tmp_path / "other", tokenizer=64 * "0")
    own, init = METHODS["tokenizer_post"], dataclasses.replace(config.init, gpt=policy_file())
    for data, message in ((out, ""), (other, "init.vq=.*the tokenizer 000000000000 in float32")):
        method = make_method(
            dataclasses.replace(
                encoded(config, data), method="tokenizer_post", options=own.Options(),
                section=own.section, init=init,
            ), make_mesh(),
        )  # fmt: skip
        with pytest.raises(WeightsError, match=message) if message else nullcontext():
            method.load_frozen()


def test_the_dtype_of_the_encoder_is_written_down(made, tmp_path):
    config, _ = made
    narrow = dataclasses.replace(config.tokenizer, encoder_dtype="bfloat16")
    narrow = dataclasses.replace(config, tokenizer=narrow)
    encode_dataset(make_method(narrow, make_mesh()), tmp_path / "narrow", 8)
    make_method(encoded(narrow, tmp_path / "narrow"), make_mesh()).load_frozen()
    with pytest.raises(WeightsError, match="bfloat16.*float32"):
        make_method(encoded(config, tmp_path / "narrow"), make_mesh()).load_frozen()


def test_splits_of_two_encoders_are_not_one_data_set(made, tmp_path):
    config, out = made
    mixed = copy(out, tmp_path / "mixed", "val", encoder_dtype="bfloat16")
    with pytest.raises(DataError, match="val.*bfloat16.*float32"):
        fixed_batch(encoded(config, mixed).data, "val", 8, 0)


def test_what_is_missing_or_does_not_fit_is_named(made, tmp_path):
    config, out = made
    with pytest.raises(DataError, match="encode dataset"):
        make_dataset(encoded(config, tmp_path).data, "train", 4, 0)
    with pytest.raises(DataError, match=f"{SIDE}"):
        make_dataset(encoded(config, out, image_size=2 * SIDE).data, "train", 4, 0)
    broken = tmp_path / "broken" / "train"
    broken.mkdir(parents=True)
    broken.rmdir()
    shutil.copytree(out / "train", broken)
    np.save(broken / "00000" / "labels.npy", np.zeros(3, np.int32))
    with pytest.raises(DataError, match=r"labels\.npy.*int32 \(3,\).*32"):
        make_dataset(encoded(config, tmp_path / "broken").data, "train", 4, 0)
    (broken / "00000" / "labels.npy").write_bytes(b"\x80\x04N.")  # a pickle
    with pytest.raises(DataError, match=r"labels\.npy"):
        make_dataset(encoded(config, tmp_path / "broken").data, "train", 4, 0)


def test_what_cannot_be_encoded_is_said_before_anything_is_written(made, tmp_path):
    config, out = made
    before = sorted(out.rglob("*"))
    with pytest.raises(FolderExistsError, match=str(out)):
        encode_dataset(make_method(config, make_mesh()), out)
    assert sorted(out.rglob("*")) == before
    for wrong, message in (
        (encoded(config, out), "data.name='encoded'"),
        (make_tiny_config("tokenizer", image_size=16), "method='tokenizer'"),
    ):
        with pytest.raises(ConfigError, match=message):
            encode_dataset(make_method(wrong, make_mesh()), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_call_is_gone_on_with_and_another_one_is_refused(
    made, tmp_path, monkeypatch
):
    config, out = made
    method, again = make_method(config, make_mesh()), tmp_path / "again"
    write, written = encoding.write_part, []

    def write_one(folder, batches):
        if written:
            raise KeyboardInterrupt
        written.append(folder)
        write(folder, batches)

    monkeypatch.setattr(encoding, "write_part", write_one)
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(method, again, 40, part=32)
    monkeypatch.undo()
    with pytest.raises(DataError, match="encode dataset"):
        make_dataset(encoded(config, again).data, "train", 4, 0)
    with pytest.raises(FolderExistsError, match="asked.json"):
        encode_dataset(method, again, 41, part=32)
    first = written[0] / "images.npy"
    made_at = first.stat().st_mtime_ns
    encode_dataset(method, again, 40, part=32)
    assert first.stat().st_mtime_ns == made_at
    files, others = (
        [p.relative_to(top) for p in sorted(top.rglob("*")) if p.is_file() and p.name != locks.LOCK]
        for top in (out, again)
    )
    assert files == others
    assert all((out / path).read_bytes() == (again / path).read_bytes() for path in files)


def test_two_calls_do_not_write_to_one_folder(made, tmp_path):
    method = make_method(made[0], make_mesh())
    with locks.hold(tmp_path / "out"), pytest.raises(locks.LockedError, match="another --out"):
        encode_dataset(method, tmp_path / "out", 8, tokens=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [locks.LOCK]
    assert encode_dataset(method, tmp_path / "out", 8, tokens=False) == {"train": 8, "val": 8}


def test_a_call_is_not_gone_on_with_on_other_data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = image_text.write("tar", tmp_path / "data", image_text.pairs(24))
    options = {"caption_field": "txt"}
    data = {"name": "image_text", "path": str(root), "flip": False, "options": options}
    config = make_tiny_config("vapi", data=data, batch_size=4, eval={"images": 2})
    out = tmp_path / "out"

    def begin():
        source._open.cache_clear()  # as another process does
        return encode_dataset(make_method(config, make_mesh()), out, 16, tokens=False)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding, "write_part", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            begin()
    image_text.write_tar(root / "00002.tar", image_text.members(image_text.pairs(2, 90)))
    with pytest.raises(FolderExistsError, match="what the data were before.*asked.json"):
        begin()


def test_images_that_are_no_whole_levels_are_kept_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (2, 4, 4, 3)).astype(np.float32)
    whole = levels / np.float32(127.5) - np.float32(1)
    drawn = (levels + np.float32(0.25)) / np.float32(127.5) - np.float32(1)
    labels = np.zeros(2, np.int32)
    for name, batches in (("files", [whole, whole]), ("scenes", [whole, drawn])):
        write_part(tmp_path / name, ({"image": x, "condition": labels} for x in batches))
        kept = np.load(tmp_path / name / "images.npy")
        assert kept.dtype == (np.uint8 if name == "files" else np.float32)
        if name == "scenes":
            np.testing.assert_array_equal(kept, np.concatenate(batches))


# --- captions -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    found = image_text.pairs(60)
    found[0] = (*found[0][:2], "日本")  # of which nothing is left
    found[1] = (*found[1][:2], "word " * 40)
    data = {
        "name": "image_text", "path": str(image_text.write("folder", folder / "data", found)),
        "flip": False, "folder_holdout": 0.5,
    }  # fmt: skip
    options = {"encoder": str(GOLDEN / "t5"), "dtype": "bfloat16"}
    policy = {"kind": "text", "cls_token_num": 24, "caption_dim": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        config = make_tiny_config(
            "base", data=data, policy=policy, condition={"name": "caption", "options": options},
            batch_size=8,
        )  # fmt: skip
        out = folder / "encoded"
        encode_dataset(make_method(config, make_mesh()), out, 44, tokens=False, part=16)
        yield config, out


def without_encoder(config, out):
    condition = dataclasses.replace(config.condition, options={})
    return dataclasses.replace(encoded(config, out), condition=condition)


def test_stored_features_are_what_a_t5_in_front_makes_of_the_captions(captioned):
    config, out = captioned
    again = without_encoder(config, out)
    front, stored = (make_method(one, make_mesh()) for one in (config, again))
    batches = [iter(make_dataset(one.data, "train", 8, one.seed)) for one in (config, again)]
    more = iter(make_dataset(config.data, "train", 8, config.seed))
    for _ in range(5):
        want, got = (m.prepare(next(b)) for m, b in zip((front, stored), batches, strict=True))
        assert got.keys() == want.keys() == {"image", "condition"}
        for name, value in want["condition"].items():
            assert got["condition"][name].dtype == value.dtype
            np.testing.assert_array_equal(got["condition"][name], value)
        np.testing.assert_array_equal(got["image"], want["image"])
    rows = fixed_batch(again.data, "val", 8, 0)["condition"]
    texts = fixed_batch(config.data, "val", 8, 0)["condition"]
    assert [stored.raw_name(row) for row in rows] == texts.tolist()
    facts = json.loads((out / "train" / "encoded.json").read_text())
    assert facts["captions"]["empty"] == facts["captions"]["other_script"] > 0
    assert facts["captions"]["cut"] > 0
    lines = [p.read_text().splitlines() for p in sorted((out / "train").glob("*/listed.jsonl"))]
    found = [(part, json.loads(line)) for part, rows in enumerate(lines) for line in rows]
    whys = collections.Counter(why for _, one in found for why in one["why"])
    assert whys == {why: facts["captions"][why] for why in whys}
    texts = itertools.chain.from_iterable(batch["condition"] for batch in more)
    in_order = list(itertools.islice(texts, 44))
    assert all(one["caption"] == in_order[16 * part + one["row"]] for part, one in found)
    assert facts["condition"]["text_encoder"].keys() >= {"config.json", "model.safetensors"}
    sizes = [np.load(p, mmap_mode="r").shape for p in sorted(out.rglob("features.npy"))]
    lengths = [np.load(p).sum() for p in sorted(out.rglob("lengths.npy"))]
    assert sizes == [(n, 32) for n in lengths]  # no padding is kept


@pytest.mark.slow
def test_training_on_stored_features_is_training_with_a_t5_in_front(captioned, tmp_path):
    config, out = captioned
    done = [
        fit(make_method(one, make_mesh()), tmp_path / str(i)).params
        for i, one in enumerate((config, without_encoder(config, out)))
    ]
    for a, b in zip(*map(jax.tree.leaves, done), strict=True):
        np.testing.assert_array_equal(a, b)


def test_conditions_that_cannot_be_kept_are_named(tmp_path):
    batch = {"image": np.zeros((2, 4, 4, 3), np.float32), "condition": np.array(["a", "b"])}
    with pytest.raises(DataError, match="<U1.*condition.name='caption'"):
        write_part(tmp_path / "part", [batch])
    assert list(tmp_path.iterdir()) == []


def test_stored_features_of_another_size_are_refused(captioned):
    config, out = captioned
    other = without_encoder(config, out)
    other = dataclasses.replace(other, policy={**other.policy, "caption_dim": 48})
    batch = next(iter(make_dataset(other.data, "train", 8, 0)))
    with pytest.raises(WeightsError, match="24 features of width 32.*24 of width 48"):
        make_method(other, make_mesh()).prepare(batch)


@pytest.mark.parametrize("name", ["features", "lengths", "captions"])
def test_damaged_captions_are_named(captioned, name, tmp_path):
    config, out = captioned
    path = copy(out, tmp_path / "broken") / "train" / "00000" / f"{name}.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(DataError, match=rf"{name}\.npy"):
        make_dataset(encoded(config, tmp_path / "broken").data, "train", 4, 0)
