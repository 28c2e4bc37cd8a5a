"""Commands in two processes: what one process makes, and one end for both."""

import json
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.helpers.clip_files import make_model, write_tokenizer
from tests.helpers.paths import CONFIGS, GOLDEN
from tests.helpers.processes import ends, free_port, one_run, started
from vapi_jax.common.locks import LOCK

pytestmark = pytest.mark.slow
SAMPLE = ["sample", "--ckpt=demo", "--batch=4", "--labels=random", "--format=both"]


def command(*words):
    return [sys.executable, "-m", "vapi_jax", *words]


def two(words):
    """The command lines of two processes."""
    port = free_port()
    common = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    return [command(*words, *common, f"--process_id={i}") for i in (0, 1)]


def both(words):
    with started(two(words)) as processes:
        found = [ends(process, within=300) for process in processes]
    assert [status for status, _ in found] == [0, 0], found
    return found[0][1]


def contents(directory, but=("recipe.json", LOCK)):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in but
    }


def test_two_processes_draw_and_judge_what_one_does(tmp_path):
    assert "18 of them drawn" in both([*SAMPLE, "--num=18", f"--out={tmp_path / 'two'}"])
    one_run(command(*SAMPLE, "--num=18", f"--out={tmp_path / 'one'}"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert json.loads((tmp_path / "two" / "recipe.json").read_text())["devices"]["count"] == 2

    judge = ["evaluate", f"--samples={tmp_path / 'two'}", f"--reference={tmp_path / 'one'}"]
    judge += ["--metrics=kid", "--features=lpips_alex"]
    told = both([*judge, f"--out={tmp_path / 'r2.json'}"])
    one_run(command(*judge, f"--out={tmp_path / 'r1.json'}"))
    assert "kernel distance" in told
    two_, one = (json.loads((tmp_path / f"r{i}.json").read_text()) for i in (2, 1))
    assert two_["metrics"] == one["metrics"]
    assert two_["samples"] == one["samples"]


def test_two_processes_encode_what_one_does(tmp_path):
    encode = ["encode", "dataset", f"--config={CONFIGS / 'demo_base.py'}:tiny", "--num=40"]
    assert "40 train" in both([*encode, f"--out={tmp_path / 'two'}"])
    one_run(command(*encode, f"--out={tmp_path / 'one'}"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_two_processes_encode_captions_as_one_does(tmp_path):
    (tmp_path / "c.txt").write_text("a red circle\na cat\n\n")
    encode = ["encode", "captions", f"--text_encoder={GOLDEN / 't5'}", "--batch=2"]
    encode.append(f"--captions={tmp_path / 'c.txt'}")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    assert "3 captions" in both([*encode, f"--out={tmp_path / 'two' / 'c.npz'}"])
    one_run(command(*encode, f"--out={tmp_path / 'one' / 'c.npz'}"))
    with np.load(tmp_path / "two" / "c.npz") as two_, np.load(tmp_path / "one" / "c.npz") as one:
        assert set(two_.files) == set(one.files)
        for name in set(one.files) - {"left_features"}:
            np.testing.assert_array_equal(two_[name], one[name])
        # A device computes a caption here and two there, and XLA sums in another order.
        np.testing.assert_allclose(two_["left_features"], one["left_features"], atol=1e-5)
    assert (tmp_path / "two" / "c.json").read_bytes() == (tmp_path / "one" / "c.json").read_bytes()


def test_what_needs_no_devices_is_done_by_one_of_two(tmp_path):
    real = ["real_images", f"--config={CONFIGS / 'c2i_demo.py'}:tiny", "--num=2"]
    assert "2 images" in both([*real, f"--out={tmp_path / 'real'}"])
    assert len(list((tmp_path / "real").iterdir())) == 2

    row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    row = {"filename": "00000/samples/0000.png", "detections": {"dog": [[0, 0, 9, 9, 0.8]]}}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    score = ["score", "geneval", "--allow_incomplete", f"--metadata={tmp_path / 'm.jsonl'}"]
    score += [f"--detections={tmp_path / 'd.jsonl'}", f"--out={tmp_path / 's.jsonl'}"]
    assert "1 images of 1 prompts" in both(score)
    assert json.loads((tmp_path / "s.jsonl").read_text())["correct"] is True


def test_a_reward_model_scores_on_the_devices_of_one_of_two(tmp_path):
    clip, images = tmp_path / "clip", tmp_path / "images"
    make_model().save_pretrained(clip)
    write_tokenizer(clip)
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(images / f"{i}.png")
    (tmp_path / "p.txt").write_text("the cat\n")
    words = ["score", "clip", f"--weights={clip}", f"--images={images}"]
    words.append(f"--prompts={tmp_path / 'p.txt'}")
    assert "3 images of 1 prompts" in both([*words, f"--out={tmp_path / 'two.jsonl'}"])
    one_run(command(*words, f"--out={tmp_path / 'one.jsonl'}"))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_ctrl_c_in_one_of_two_that_draw_ends_both(tmp_path):
    words = [*SAMPLE, "--num=4000", f"--out={tmp_path}"]
    with started(two(words)) as processes:
        deadline = time.monotonic() + 200
        while not list(tmp_path.rglob("*.png")) and time.monotonic() < deadline:
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGINT)
        found = [ends(process) for process in processes]
    assert [status for status, _ in found] == [1, 130]
    assert "error: process 1 on" in found[0][1]
    drawn = len(list(tmp_path.rglob("*.png")))
    assert 0 < drawn < 4000


def test_an_error_before_anything_is_drawn_ends_both(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with started(two([*SAMPLE, "--num=4", f"--out={tmp_path}"])) as processes:
        found = [ends(process, within=120) for process in processes]
    assert [status for status, _ in found] == [1, 1]
    assert all("thesis.tex" in output for _, output in found)
    assert all("Traceback" not in output for _, output in found)
