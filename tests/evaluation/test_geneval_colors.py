"""Colours of detected objects by a CLIP, through the command to GenEval's table."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTokenizerFast

from tests.helpers.clip_files import make_model, write_tokenizer
from vapi_jax import score
from vapi_jax.evaluation import geneval_colors as G
from vapi_jax.rewards.geneval import COLORS, GenevalError

SIDE = 32


@pytest.fixture(scope="module")
def model():
    return make_model(activation="quick_gelu", side=SIDE)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


def as_runs(mask):
    """COCO's run lengths of a mask."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, len(flat)]).tolist()
    return [0, *runs] if flat[0] else runs


def as_text(runs):
    """The same as COCO writes it."""
    text = ""
    for i, run in enumerate(runs):
        number, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            bits = number & 31
            number >>= 5
            more = number != (-1 if bits & 16 else 0)
            text += chr((bits | 32 * more) + 48)
    return text


@pytest.mark.parametrize("seed", range(3))
def test_masks_come_back_from_both_ways_of_writing_them(seed):
    mask = np.random.default_rng(seed).random((13, 70)) > (0.5, 0.99, 0.01)[seed]
    mask[0, 0] = seed == 0
    runs = as_runs(mask)
    for counts in (runs, as_text(runs)):
        found = G.decode_mask({"size": [13, 70], "counts": counts}, 13, 70)
        np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [70, 13], "counts": [910]},
        {"size": [13, 70], "counts": [911]},
        {"size": [13, 70], "counts": [10**12]},
        {"size": [13, 70], "counts": [920, -10]},
        {"size": [13, 70], "counts": "P" * 20},
        {"size": [13, 70], "counts": "\x7f"},
        {"size": [13, 70], "counts": []},
        {"counts": [910]},
        [910],
    ],
)
def test_other_masks_are_refused(mask):
    with pytest.raises(GenevalError, match="mask"):
        G.decode_mask(mask, 13, 70)


def test_the_command_asks_the_clip_about_what_the_mask_shows(model, folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 3), np.uint8)
    boxes = [[3.2, 4.6, 50.4, 37.5, 0.9], [10, 20, 70, 58, 0.5]]
    masks = [rng.random((60, 80)) > share for share in (0.2, 0.8)]
    (tmp_path / "00000/samples").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "00000/samples/0000.png")
    of_cat = {
        "boxes": boxes,
        "masks": [{"size": [60, 80], "counts": as_text(as_runs(mask))} for mask in masks],
    }
    line = {"filename": "00000/samples/0000.png", "detections": {"cat": of_cat, "dog": boxes}}
    (tmp_path / "boxes.jsonl").write_text(json.dumps(line) + "\n")
    clause = {"class": "cat", "count": 1, "color": "red"}
    prompt = {"tag": "colors", "prompt": "a photo of a red cat", "include": [clause]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(prompt) + "\n")
    out = tmp_path / "colored.jsonl"
    argv = [
        f"--weights={folder}",
        f"--images={tmp_path}",
        f"--metadata={tmp_path / 'metadata.jsonl'}",
    ]
    argv += [f"--detections={tmp_path / 'boxes.jsonl'}", f"--out={out}"]
    assert score.main(["colors", *argv]) == 0

    size = {"shortest_edge": SIDE}
    processor = CLIPImageProcessor(size=size, crop_size={"height": SIDE, "width": SIDE})
    words = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    want = []
    with torch.no_grad():
        texts = []
        for color in COLORS:
            asked = [f"a photo of a {color} cat", f"a photo of a {color}-colored cat"]
            asked.append(f"a photo of a {color} object")
            ids = words(asked, padding="max_length", max_length=12, truncation=True)["input_ids"]
            three = torch.nn.functional.normalize(model.get_text_features(torch.tensor(ids)))
            texts.append(torch.nn.functional.normalize(three.mean(0), dim=0))
        for box, mask in zip(boxes, masks, strict=True):
            shown = np.where(mask[..., None], pixels, 153).astype(np.uint8)
            x0, y0, x1, y1 = map(round, box[:4])
            cut = Image.fromarray(shown[y0:y1, x0:x1])
            seen = torch.from_numpy(np.stack(processor([cut])["pixel_values"]))
            near = (
                torch.stack(texts)
                @ torch.nn.functional.normalize(model.get_image_features(seen))[0]
            )
            best = near.sort(descending=True)
            assert best.values[0] - best.values[1] > 1e-4  # no draw
            want.append(COLORS[best.indices[0]])

    found = json.loads(out.read_text())["detections"]
    assert found["cat"]["colors"] == want
    assert "colors" not in found["dog"]
    record = json.loads(out.with_suffix(".json").read_text())
    assert (
        record["background"] == "grey" and record["model"]["network"]["activation"] == "quick_gelu"
    )
    judged = [f"--metadata={tmp_path / 'metadata.jsonl'}", f"--out={tmp_path / 's.jsonl'}"]
    assert score.main(["geneval", f"--detections={out}", "--allow_incomplete", *judged]) == 0
    verdict = json.loads((tmp_path / "s.jsonl").read_text())
    assert verdict["correct"] == (want[0] == "red")

    for place in (f"{tmp_path}/", "../x/"):  # names must not lead out of the folder
        elsewhere = {**line, "filename": f"{place}00000/samples/0000.png"}
        (tmp_path / "boxes.jsonl").write_text(json.dumps(elsewhere) + "\n")
        assert score.main(["colors", *argv]) != 0
        assert "leads out" in capsys.readouterr().err
    del of_cat["masks"]
    (tmp_path / "boxes.jsonl").write_text(json.dumps(line) + "\n")
    assert score.main(["colors", *argv]) != 0
    assert "masks" in capsys.readouterr().err
