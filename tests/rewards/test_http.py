"""A reward on another machine, with a real server that answers, is slow, fails and lies."""

import jax
import numpy as np
import pytest

from tests.helpers.reward_server import serving
from vapi_jax.common.host_calls import raise_failure
from vapi_jax.models.classes import ClassesError
from vapi_jax.rewards.http import HTTP, HTTPRewardError
from vapi_jax.rewards.prompts import LETTERS


@pytest.fixture
def server():
    with serving() as found:
        yield found


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)
PROMPTS = ["a", "zwei", "", "ünï🐈", "a b"]
WANT = [image.mean() / 8 + len(text) for image, text in zip(IMAGES, PROMPTS, strict=True)]


def reward(server, **options):
    return HTTP(url=server.url, backoff=0.01, **options)


def test_scores_come_back_in_parts_and_in_order(server):
    found = reward(server, at_once=2).ask(IMAGES, PROMPTS)
    np.testing.assert_array_equal(found, np.float32(WANT))
    assert [count for count, _ in server.asked] == [2, 2, 1]


def test_captions_and_labels_go_through_a_compiled_step(server, tmp_path):
    pixels = IMAGES[:4].reshape(2, 2, 6, 7, 3).astype(np.float32) / 127.5 - 1
    asked = reward(server)
    texts = np.array(["a red cat", "ünï🐈"])
    batch = {"prompt": asked.prepare(texts)}
    assert batch["prompt"].shape == asked.example(2).shape
    found = jax.jit(lambda x, b: asked({}, x, b))(pixels, batch)
    means = IMAGES[:4].mean(axis=(1, 2, 3)).reshape(2, 2) / 8
    np.testing.assert_allclose(found, means + np.array([[9], [4]]), rtol=1e-6)
    (tmp_path / "names.txt").write_text("one\nthree\n")
    named = reward(server, prompts=str(tmp_path / "names.txt"), template="{}!")
    assert named.prepare(np.array([1, 0])) is None
    found = jax.jit(lambda x, b: named({}, x, b))(pixels, {"condition": np.array([1, 0])})
    np.testing.assert_allclose(found, means + np.array([[6], [4]]), rtol=1e-6)
    assert {text for _, texts in server.asked for text in texts} == {*texts, "one!", "three!"}


def test_names_of_classes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "names.txt").write_bytes("jalapeño\n".encode("latin-1"))
    named = HTTP(url="http://host/", prompts=str(tmp_path / "names.txt"))
    with pytest.raises(ClassesError, match=r"names\.txt is no text in UTF-8"):
        named.prepare(np.array([0]))


def test_a_long_prompt_loses_its_end_between_letters(server):
    row = reward(server).prepare(np.array(["ü" * LETTERS]))[0]
    assert bytes(row).decode() == "ü" * (LETTERS // 2)


def test_what_may_pass_is_tried_again(server):
    server.answers = [
        (503, b"busy"), (429, b"later"), ("slow", 0.4), ("stalls", 0.4), ("cut", 30),
    ]  # fmt: skip
    found = reward(server, timeout=0.2, retries=5).ask(IMAGES, PROMPTS)
    np.testing.assert_array_equal(found, np.float32(WANT))
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("answers", "told", "tries"),
    [
        ([(500, b"out of memory")] * 3, "3 tries.*500.*out of memory", 3),
        ([("slow", 0.4)] * 3, "3 tries.*(time|answer)", 3),
        ([("cut", 30)] * 3, "3 tries.*5 of 35 bytes", 3),
        ([(404, b"no such page")], "404.*no such page", 1),
        ([(302, b"")], "302", 1),
        ([(200, b"<html>")], "no JSON.*html", 1),
        ([(200, b'{"scores": [1, 2]}')], "5 images", 1),
        ([(200, b'{"scores": [1, 2, 3, NaN, 5]}')], "nan of image 3", 1),
        ([(200, b'{"scores": [1, 2, null, 4, 5]}')], "None of image 2", 1),
        ([(200, b'{"scores": [1, 2, true, 4, 5]}')], "True of image 2", 1),
        ([(200, b"[1, 2, 3, 4, 5]")], "5 images", 1),
        ([(200, b" " * 100_000)], "more than 65856 bytes", 1),
    ],
)
def test_no_failure_is_worth_nothing(server, answers, told, tries):
    server.answers = answers
    with pytest.raises(HTTPRewardError, match=f"(?is)127.0.0.1.*{told}"):
        reward(server, timeout=0.2, retries=2).ask(IMAGES, PROMPTS)
    assert len(server.asked) == tries


def test_a_failure_inside_a_compiled_step_is_told_by_its_reason(server):
    server.answers = [(404, b"no such page")]
    asked = reward(server)
    pixels = np.zeros((1, 1, 4, 4, 3), np.float32)
    batch = {"prompt": asked.prepare(np.array(["a"]))}
    step = jax.jit(lambda x, b: asked({}, x, b))
    assert np.isnan(step(pixels, batch))
    with pytest.raises(HTTPRewardError, match="404.*no such page"):
        raise_failure()
    assert step(pixels, batch) == 1 + 128 / 8


def test_a_server_that_is_not_there():
    with pytest.raises(HTTPRewardError, match="2 tries.*refused"):
        HTTP(url="http://127.0.0.1:9/", retries=1, backoff=0.01).ask(IMAGES, PROMPTS)
    for url in (
        "", "file:///etc/passwd", "ftp://host/x", "http://", "http://host:port/x", "http://host:0/x",
        "http://host:99999/x", "http://[::1:8000/x", "http://host/a b", "http://host/ü",
    ):  # fmt: skip
        assert "url" in HTTP(url=url).problems(8)[0]
    assert HTTP(url="http://[::1]:8000/score?model=a").problems(8) == []
    assert HTTP(url="https://host/score").problems(8) == []
