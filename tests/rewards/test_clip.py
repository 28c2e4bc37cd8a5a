"""Rewards by CLIP against transformers' CLIPModel, from pixels and prompts to the number."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTokenizerFast

import vapi_jax as vj
from tests.helpers.clip_files import MERGES, as_open_clip, make_model, vocabulary, write_tokenizer
from tests.helpers.compare import assert_close
from vapi_jax.common.options import Errors
from vapi_jax.models import clip
from vapi_jax.models.classes import read_class_list
from vapi_jax.models.clip_files import CLIPTokenizer, open_clip
from vapi_jax.rewards import make_terms, parse
from vapi_jax.rewards.clip import Aesthetic, CLIPScore, HPSv2, PickScore
from vapi_jax.weights.names import WeightsError

PROMPTS = ["the cat", "a photo of the cat's photo", "1, 2", ""]
SIDE = 32


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 2, 40, 56, 3), np.uint8)


@pytest.fixture(scope="module")
def theirs(model, folder, images):
    """(embeddings [2, 2, 8], those of `PROMPTS`), of length 1, by transformers."""
    size = {"shortest_edge": SIDE}
    processor = CLIPImageProcessor(size=size, crop_size={"height": SIDE, "width": SIDE})
    pixels = processor([Image.fromarray(x) for x in images.reshape(-1, 40, 56, 3)])["pixel_values"]
    words = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    ids = words(PROMPTS, padding="max_length", max_length=12, truncation=True)["input_ids"]
    with torch.no_grad():
        seen = model.get_image_features(torch.from_numpy(np.stack(pixels))).numpy()
        read = model.get_text_features(torch.tensor(ids)).numpy()
    return np.asarray(clip.unit(seen)).reshape(2, 2, -1), np.asarray(clip.unit(read))


def floats(images):
    return images.astype(np.float32) / 127.5 - 1


def score(reward, images, batch):
    return jax.jit(lambda w, x, b: reward(w, x, b))(reward.load(), floats(images), batch)


def test_scores_of_captions(folder, images, theirs):
    want = np.einsum("bge,be->bg", theirs[0], theirs[1][:2])
    assert np.ptp(want) > 0.05
    reward = CLIPScore(weights=str(folder), dtype="float32", chunk=3)
    batch = {"prompt": reward.prepare(np.array(PROMPTS[:2]))}
    assert batch["prompt"].shape == reward.example(2).shape
    options = {"weights": str(folder), "dtype": "float32", "chunk": 3}
    judge = vj.reward([{"name": "clip", "weight": 2.0, "options": options}])
    found = judge(floats(images), None, PROMPTS[:2])
    assert_close(found["clip"], want, 2e-5)
    assert_close(found["total"], 2 * want, 2e-5)
    factor = PickScore(weights=str(folder)).factor(reward.load())
    assert float(factor) == pytest.approx(1 / 0.07, rel=1e-3)
    with pytest.raises(ValueError, match="prompts='imagenet'"):
        score(reward, images, {"condition": np.zeros(2, np.int32)})
    with pytest.raises(WeightsError, match="prompts='imagenet'"):
        reward.prepare(np.zeros(2, np.int32))


def test_scores_of_classes_in_bfloat16(folder, images, theirs, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("1, 2\nthe cat's photo\nthe cat\n")
    reward = CLIPScore(weights=str(folder), prompts=str(names), template="{}")
    weights = reward.load()
    assert jax.tree.map(lambda a: (a.shape, a.dtype), weights) == jax.tree.map(
        lambda s: (s.shape, s.dtype), reward.shapes()
    )
    found = score(reward, images, {"condition": np.array([2, 3], np.int32)})
    want = np.einsum("ge,e->g", theirs[0][0], theirs[1][0])
    assert_close(found[0], want, 0.1)
    assert np.isnan(found[1]).all()  # there is no label 3
    shown = dataclasses.replace(reward, prompts="imagenet", template="a photo of {}")
    assert len(shown.class_prompts()) == 1000
    assert shown.class_prompts()[0] == "a photo of tench, Tinca tinca"


def test_imagenets_words_are_in_the_order_of_its_ids():
    words, ids = (read_class_list(name).names for name in ("imagenet_words", "imagenet"))
    assert len(words) == 1000
    for identity, word in (("n02123045", "tabby, tabby cat"), ("n07920052", "espresso")):
        assert words[ids.index(identity)] == word


@pytest.fixture(scope="module")
def released(model, tmp_path_factory):
    """As HPSv2 is released: a file of open_clip's names, and OpenAI's merges beside it."""
    path = tmp_path_factory.mktemp("hps")
    torch.save(
        {"epoch": 1, "state_dict": as_open_clip(model)}, path / "open_clip_pytorch_model.bin"
    )
    sizes = {"vision_cfg": {"width": 16, "head_width": 8}, "text_cfg": {"heads": 2}}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
    write_tokenizer(path, "openai")
    return path


def test_hpsv2_sees_the_whole_image(released, model, images, theirs):
    reward = HPSv2(weights=str(released), dtype="float32")
    x = torch.from_numpy(images.reshape(-1, 40, 56, 3).transpose(0, 3, 1, 2)).float() / 255
    small = torch.nn.functional.interpolate(x, (23, 32), mode="bicubic", antialias=True)
    padded = torch.nn.functional.pad(small, (0, 0, 4, 5))
    mean, std = (torch.from_numpy(x)[:, None, None] for x in (clip.MEAN, clip.STD))
    with torch.no_grad():
        seen = model.get_image_features((padded - mean) / std).numpy()
    want = np.einsum("bge,be->bg", clip.unit(seen).reshape(2, 2, -1), theirs[1][:2])
    found = score(reward, images, {"prompt": reward.prepare(np.array(PROMPTS[:2]))})
    assert_close(found, want, 3e-5)


@pytest.mark.parametrize("antialias", [True, False])
def test_resizes_of_tensors_are_torchs(antialias):
    images = np.random.default_rng(1).integers(0, 256, (1, 50, 33, 3), np.uint8)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 255
    size = int(24 * 50 / 33), 24
    small = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=antialias)
    top = round((size[0] - 24) / 2)
    want = small.numpy().transpose(0, 2, 3, 1)[:, top : top + 24]
    kind = "torch_antialias" if antialias else "torch"
    found = jax.jit(lambda x: clip.preprocess(x, 24, "crop", kind))(images)
    assert_close(found * clip.STD + clip.MEAN, want, 3e-6)


def test_the_aesthetic_head_is_five_layers_in_one(folder, images, theirs, tmp_path):
    torch.manual_seed(0)
    sizes = (8, 6, 5, 4, 3, 1)
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    state = {
        f"layers.{place}.{name}": leaf
        for place, layer in zip((0, 2, 4, 6, 7), layers, strict=True)
        for name, leaf in layer.state_dict().items()
    }
    torch.save(state, tmp_path / "head.pth")
    reward = Aesthetic(weights=str(folder), head=str(tmp_path / "head.pth"), dtype="float32")
    with torch.no_grad():
        want = torch.nn.Sequential(*layers)(torch.from_numpy(theirs[0].copy()))[..., 0].numpy()
    assert_close(score(reward, images, {}), want, 2e-5)
    other = dataclasses.replace(reward, head=str(tmp_path / "other.pth"))
    for spoilt, told in (
        ({"layers.0.weight": torch.zeros(2, 8)}, r"other\.pth.*layers"),
        ({"layers.norm.weight": torch.zeros(2, 8)}, r"other\.pth.*layers"),
        ({**state, "layers.7.bias": torch.tensor([torch.nan])}, r"layers\.7\.bias.*not finite"),
    ):
        torch.save(spoilt, tmp_path / "other.pth")
        with pytest.raises(WeightsError, match=told):
            other.load()


def test_tokens_are_those_of_transformers_from_either_file(folder, released):
    vocab = len(vocabulary())
    words = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    texts = [*PROMPTS, "THE  Cat\tof Zürich!! it's £5", "the " * 30, "猫 and 🐈"]
    want = words(texts, padding="max_length", max_length=12, truncation=True)["input_ids"]
    words.save_pretrained(folder / "saved")
    for place in (folder, released, folder / "saved" / "tokenizer.json"):
        found = CLIPTokenizer(place, 12, vocab)
        np.testing.assert_array_equal(found(texts), want)
        assert found.cut(texts) == 2
    with pytest.raises(WeightsError, match=f"{vocab - 1}.*{vocab + 1} rows"):
        CLIPTokenizer(folder, 12, vocab + 1)
    assert len(MERGES) + 2 * 256 + 2 == vocab


def test_both_kinds_of_names_are_one_network_and_others_are_refused(folder, released, tmp_path):
    read = []
    for path in (folder, released):
        with open_clip(path) as file:
            file.check()
            read.append(
                (file.config, file.read("vision", np.float32), file.read("text", np.float32))
            )
    assert read[0][0] == read[1][0]
    jax.tree.map(np.testing.assert_array_equal, read[0][1:], read[1][1:])
    (tmp_path / "hps.pt").write_bytes((released / "open_clip_pytorch_model.bin").read_bytes())
    with (
        pytest.raises(WeightsError, match=r"hps\.pt.*16 and 12.*heads"),
        open_clip(tmp_path / "hps.pt"),
    ):
        pass
    (tmp_path / "open_clip_config.json").write_text(
        (released / "open_clip_config.json").read_text()
    )
    torch.save({"a": torch.zeros(2)}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(WeightsError, match="no CLIP"), open_clip(tmp_path):
        pass


def test_options_are_checked_before_anything_is_read(tmp_path):
    errors = Errors()
    specs = parse([{"name": "clip", "options": {"template": "a cat", "dtype": "int8"}}], errors)
    assert any("dtype" in line for line in errors)
    errors = Errors()
    specs = parse(["clip", {"name": "aesthetic", "options": {"weights": str(tmp_path)}}], errors)
    assert not errors
    terms = make_terms(specs)
    assert "weights" in terms[0].reward.problems(32)[0]
    assert "head" in terms[1].reward.problems(32)[0]
    assert "template" in CLIPScore(weights=str(tmp_path), template="x").problems(32)[0]
