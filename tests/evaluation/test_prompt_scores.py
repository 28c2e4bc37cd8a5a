"""Scores of folders of images by reward models, through the command."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.clip_files import make_model, write_tokenizer
from tests.helpers.compare import assert_close
from vapi_jax import score
from vapi_jax.evaluation import prompt_scores as S
from vapi_jax.evaluation.images import open_images
from vapi_jax.evaluation.measure import locate
from vapi_jax.rewards.clip import CLIPScore

PROMPTS = ("the cat", "a photo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    make_model().save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four images."""
    path, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 256, (40, 44, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{i:06d}.png")
    return path


def test_the_command_scores_each_image_with_its_prompt(folder, images, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    out = tmp_path / "scores.jsonl"
    argv = [f"--weights={folder}", f"--images={images}", f"--prompts={tmp_path / 'prompts.txt'}"]
    assert score.main(["clip", *argv, f"--out={out}"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    reward = CLIPScore(weights=str(folder), dtype="float32")
    pixels = [np.asarray(Image.open(images / row["filename"]), np.float32) for row in rows]
    pixels = np.stack(pixels)[:, None] / 127.5 - 1
    asked = {"prompt": reward.prepare(np.array([row["prompt"] for row in rows]))}
    want = jax.jit(lambda w, x, b: reward(w, x, b))(reward.load(), pixels, asked)
    assert_close([row["score"] for row in rows], np.asarray(want)[:, 0], 2e-5)
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["mean"] == pytest.approx(np.mean([row["score"] for row in rows]))
    assert record["low"] <= record["mean"] <= record["high"]
    assert (record["images"], record["prompts"]) == (4, 2)
    assert record["model"]["resize"] == "bicubic, pillow" and record["model"]["fit"] == "crop_floor"
    assert set(record["model"]["tokenizer"]) == {"vocab.json", "merges.txt"}
    assert f"{record['mean']:.5g}" in capsys.readouterr().out


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)


def test_prompts_find_their_images(tmp_path):
    lines = tmp_path / "p.txt"
    lines.write_text("one\ntwo\n")
    flat, geneval, styles = (tmp_path / name for name in ("flat", "geneval", "styles"))
    make(flat, *(f"{i}.png" for i in range(4)))
    found = S.find_pictures(flat, lines)
    assert (found.prompts, found.groups) == (("one", "one", "two", "two"), (0, 0, 1, 1))
    make(geneval, "00001/samples/0000.png", "00001/samples/0001.png", "00000/samples/0000.png")
    assert S.find_pictures(geneval, lines).prompts == ("one", "two", "two")
    make(styles, "anime/00001.jpg", "photo/00000.jpg")
    (tmp_path / "hps").mkdir()
    for style in ("anime", "photo"):
        (tmp_path / "hps" / f"{style}.json").write_text(json.dumps([f"{style} a", f"{style} b"]))
    assert S.find_pictures(styles, tmp_path / "hps").prompts == ("anime b", "photo a")
    named = tmp_path / "named.jsonl"
    rows = [{"filename": "3.png", "prompt": "x"}, {"filename": "0.png", "prompt": "x"}]
    named.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = S.find_pictures(flat, named)
    assert (found.files, found.groups) == (("3.png", "0.png"), (0, 0))
    assert S.find_pictures(flat, None).prompts == ("",) * 4


def test_images_and_prompts_that_do_not_belong_together(tmp_path):
    make(tmp_path / "a", "0.png", "1.png", "2.png")
    make(tmp_path / "b", "00002/samples/0000.png")
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    (tmp_path / "n.jsonl").write_text('{"filename": "../p.txt", "prompt": "x"}\n')
    (tmp_path / "empty").mkdir()
    for folder, prompts, told in [
        ("a", "p.txt", "3 images.*2 prompts"),
        ("b", "p.txt", "prompt 2"),
        ("a", "n.jsonl", r"\.\./p\.txt"),
        ("empty", "p.txt", "no images"),
    ]:
        with pytest.raises(S.ScoreError, match=told):
            S.find_pictures(tmp_path / folder, tmp_path / prompts)


def drawn(folder, layout, texts, per_prompt, count=None):
    """A folder as `vapi_jax.sample --grid` leaves it; with so few images where it was killed."""
    for i in range(len(texts) * per_prompt if count is None else count):
        prompt, sample = divmod(i, per_prompt)
        flat, geneval = f"images/{i:06d}.png", f"{prompt:05d}/samples/{sample:04d}.png"
        make(folder, {"flat": flat, "geneval": geneval, "hps": f"photo/{i:05d}.jpg"}[layout])
    for prompt in range(len(texts) if layout != "hps" else 0):
        flat = layout == "flat"
        make(folder, f"grids/{prompt:05d}.png" if flat else f"{prompt:05d}/grid.png")
    captions = {"per_prompt": per_prompt, "layout": layout}
    recipe = {"count": len(texts) * per_prompt, "captions": captions}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": text, "fed": text}) + "\n" for text in texts)
    )
    return folder


def listed(path, *texts):
    path.write_text("\n".join(texts))
    return path


@pytest.mark.parametrize("layout", ["flat", "geneval"])
def test_the_samplers_grids_are_no_samples(tmp_path, layout):
    folder = drawn(tmp_path / "cat", layout, ["one", "two", "three"], 4)
    prompts = listed(tmp_path / "p.txt", "one", "two", "three")
    found = S.find_pictures(folder, prompts)
    assert found.prompts == ("one",) * 4 + ("two",) * 4 + ("three",) * 4
    assert (
        found.files[4] == {"flat": "images/000004.png", "geneval": "00001/samples/0000.png"}[layout]
    )
    assert len(S.find_pictures(folder, None).files) == 12
    assert open_images(locate(str(folder))).count == 12
    assert S.find_pictures(folder, folder / "prompts.jsonl").prompts == found.prompts


def test_images_of_a_recipe_are_all_there_and_of_these_prompts(tmp_path):
    whole = drawn(tmp_path / "whole", "flat", ["one", "two"], 2)
    killed = drawn(tmp_path / "killed", "flat", ["a", "b", "c", "d"], 4, count=8)
    geneval = drawn(tmp_path / "geneval", "geneval", ["one", "two"], 2)
    for folder, texts, told in [
        (killed, "abcd", "8 images, and its recipe.json is of 16: go on"),
        (killed, None, "8 images, and its recipe.json is of 16"),
        (whole, ["two", "one"], "drawn for 'one', and .*p.txt has 'two' there"),
        (whole, "abcd", "4 images, 2 a prompt by its recipe.json, .* 4 prompts"),
        (geneval, ["one", "three"], "drawn for 'two', and .*p.txt has 'three' there"),
    ]:
        prompts = texts and listed(tmp_path / "p.txt", *texts)
        with pytest.raises(S.ScoreError, match=told):
            S.find_pictures(folder, prompts)
    # Who says which is which may leave some out.
    (tmp_path / "n.jsonl").write_text('{"filename": "images/000003.png", "prompt": "another"}')
    assert S.find_pictures(killed, tmp_path / "n.jsonl").prompts == ("another",)
    assert S.find_pictures(whole / "images", listed(tmp_path / "p.txt", "one", "two")).groups == (
        0,
        0,
        1,
        1,
    )


def test_samples_of_labels_have_a_prompt_each_or_none(tmp_path):
    folder = drawn(tmp_path / "labels", "flat", ["x"], 4)
    (folder / "recipe.json").write_text('{"count": 4, "labels": {"rule": "balanced"}}')
    (folder / "prompts.jsonl").unlink()
    with pytest.raises(S.ScoreError, match="4 images, 1 a prompt .* 2 prompts"):
        S.find_pictures(folder, listed(tmp_path / "p.txt", "one", "two"))
    assert S.find_pictures(folder, listed(tmp_path / "p.txt", *"abcd")).prompts == (
        "a",
        "b",
        "c",
        "d",
    )


def test_styles_are_compared_with_what_was_drawn(tmp_path):
    folder = drawn(tmp_path / "hps", "hps", ["one", "two"], 1)
    lists = tmp_path / "lists"
    lists.mkdir()
    for style, texts in (("photo", ["one", "two"]), ("anime", ["three"])):
        (lists / f"{style}.json").write_text(json.dumps(texts))
    assert S.find_pictures(folder, lists).prompts == ("one", "two")
    (lists / "photo.json").write_text('["one", "2"]')
    with pytest.raises(S.ScoreError, match="drawn for 'two'"):
        S.find_pictures(folder, lists)


def test_the_interval_is_over_prompts_and_not_over_their_images():
    scores, groups = np.repeat([1.0, 3.0], 50), np.repeat([0, 1], 50)
    found = S.mean_of_groups(scores, groups)
    assert found == {"mean": 2.0, "low": 1.0, "high": 3.0}
    alone = S.mean_of_groups(scores, np.arange(100))
    assert 1.5 < alone["low"] < 2.0 < alone["high"] < 2.5
