"""A file of captions becomes a file of features that sampling takes."""

import json

import numpy as np
import pytest

from tests.helpers.paths import GOLDEN
from vapi_jax import encode
from vapi_jax.data.caption_files import LONGEST, read_captions
from vapi_jax.data.config import DataError
from vapi_jax.generation.requests import _by_caption
from vapi_jax.generation.shipped import MODELS
from vapi_jax.models.conditions import Caption
from vapi_jax.models.text_encoder import TextEncoder
from vapi_jax.parallel.sharding import make_mesh

LINES = ["A red circle, 640x480", "", "犬 かな", "word " * 150, 'she said "no" [sic]']


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder with what the command wrote, and what it printed, for LINES in a .txt."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "captions.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    assert run(folder, "captions.txt", "--fsdp=4", "--batch=2") == 0
    return folder


def run(folder, name, *more):
    return encode.main([
        "captions", f"--text_encoder={GOLDEN / 't5'}", f"--captions={folder / name}",
        f"--out={folder / 'out.npz'}", *more,
    ])  # fmt: skip


def test_the_file_holds_what_the_encoder_makes(written):
    want = TextEncoder(GOLDEN / "t5", make_mesh(2, 4))(LINES, rows=2)
    with np.load(written / "out.npz", allow_pickle=False) as got:
        assert set(got.files) == {"ids", "mask", "left_features", "left_mask", "cleaned"}
        assert tuple(got["cleaned"]) == want.cleaned
        np.testing.assert_array_equal(got["ids"], want.ids)
        np.testing.assert_array_equal(got["mask"], want.mask)
        np.testing.assert_array_equal(got["left_mask"], want.left_mask)
        np.testing.assert_allclose(got["left_features"], want.features, atol=1e-5)


def test_the_record_counts_what_is_odd_and_names_what_it_depends_on(written):
    record = json.loads((written / "out.json").read_text())
    assert record["captions"] == 5
    assert (record["empty"], record["cut"], record["other_script"]) == ([1], [3], [2])
    assert record["unknown"] == [2]
    assert record["clean"] and record["lower"] and record["dtype"] == "float32"
    assert set(record["text_encoder"]) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert set(record["libraries"]) == {"tokenizers", "ftfy", "beautifulsoup4"}


def test_sampling_takes_the_side_that_is_padded_on_the_left(written):
    requests = _by_caption(written / "out.npz", 7, Caption(length=120, width=32))
    with np.load(written / "out.npz") as arrays:
        taken = requests.of(np.array([0, 6]))
        np.testing.assert_array_equal(taken["features"], arrays["left_features"][[0, 1]])
        np.testing.assert_array_equal(taken["mask"], arrays["left_mask"][[0, 1]])


def test_captions_as_they_are(tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text('"Two  DOGS (sic)\\nand a cat"\n')
    assert run(tmp_path, "c.jsonl", "--no-clean", "--no-lower") == 0
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["cleaned"].tolist() == ["Two  DOGS (sic)\nand a cat"]
    told = capsys.readouterr().out
    assert "empty: 0" in told and "other script: 0" in told
    assert "libraries" in (tmp_path / "out.json").read_text()


def test_lines_are_captions(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes("\ufeffone\r\n\u2028two\x0b\n\nlast".encode())
    assert read_captions(path) == ["one", "\u2028two\x0b", "", "last"]
    path = tmp_path / "c.JSONL"
    path.write_text('"one\\ntwo"\n"\\u00e9"\n')
    assert read_captions(path) == ["one\ntwo", "é"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.txt", None, "absent.txt"),
        ("c.txt", b"", "holds no captions"),
        ("c.txt", b"ok\n\xff\xfe", "UTF-8"),
        ("c.txt", b"ok\n" + b"x" * (LONGEST + 1), "line 2: 20001"),
        ("c.jsonl", b'"a"\nplain\n', "line 2"),
        ("c.jsonl", b'"a"\n{"text": "b"}\n', "line 2: a dict"),
        ("c.jsonl", b'"\\ud800"\n', "line 1.*surrogate"),
        ("c.jsonl", b"[" * 100_000, "line 1"),
    ],
)
def test_a_file_that_holds_no_captions_is_refused(name, content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_captions(tmp_path / name)
    assert run(tmp_path, name) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out.npz").exists()


def test_scenes_are_served_at_their_own_length(tmp_path):
    (tmp_path / "c.txt").write_text("a photo of a ring\n")
    out = tmp_path / "new" / "folder" / "out.npz"
    assert encode.main([
        "captions", "--text_encoder=scenes", f"--captions={tmp_path / 'c.txt'}", "--length=12",
        f"--out={out}", "--no-clean",
    ]) == 0  # fmt: skip
    condition = MODELS["scenes"].policy
    kind = Caption(length=condition["cls_token_num"], width=condition["caption_dim"])
    assert _by_caption(out, 1, kind).of(np.array([0]))["features"].shape[1] == 12


@pytest.mark.parametrize("name", ["c.txt", "out.txt", "out.jsonl"])
def test_what_is_read_is_not_replaced(name, tmp_path, capsys):
    """Nor is a file of another kind taken for lines: a list in JSON, say."""
    (tmp_path / name).write_text('"a"\n')
    for place in ("out.npz", "out.json"):
        (tmp_path / place).symlink_to(tmp_path / name)
        assert run(tmp_path, name) == 1
        assert f"{place} is read" in capsys.readouterr().err
        (tmp_path / place).unlink()
    (tmp_path / name).rename(tmp_path / "c.json")
    assert run(tmp_path, "c.json") == 1
    assert "c.json: captions are read from .txt" in capsys.readouterr().err


def test_options_that_make_no_sense(tmp_path, capsys):
    (tmp_path / "c.txt").write_text("a\n")
    assert run(tmp_path, "c.txt", "--fsdp=3") == 1
    assert "--fsdp 3" in capsys.readouterr().err
    for wrong in ("--batch=0", "--length=1"):
        with pytest.raises(SystemExit):
            run(tmp_path, "c.txt", wrong)
    with pytest.raises(SystemExit):
        encode.main(["captions", "--captions=c", "--text_encoder=t", "--out=x.npy"])
    assert encode.main([]) == 2
    assert encode.main(["--help"]) == 0
