"""What samples are drawn for: labels by rule, by name or from a file, and captions from an archive."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from vapi_jax.generation.files import SampleFilesError
from vapi_jax.generation.loading import load_generator
from vapi_jax.generation.requests import RequestError, make_requests, random_labels
from vapi_jax.models.policies import make_policy
from vapi_jax.parallel.sharding import make_mesh


@pytest.fixture(scope="module")
def classes():
    """The shipped generator of twelve classes."""
    return load_generator("demo", make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def captioned(classes):
    """As if it took captions of four tokens of width six."""
    policy = make_policy(
        "text", dim=32, n_head=4, n_layer=2, vocab_size=64, block_size=16, multiple_of=16,
        cls_token_num=4, caption_dim=6,
    )  # fmt: skip
    return dataclasses.replace(classes, policy=policy, facts={"policy": {"kind": "text"}})


def test_balanced_labels_go_through_the_classes_in_turn(classes):
    conditions = make_requests(classes, 26, 0, None, None)
    np.testing.assert_array_equal(conditions.rows, [*range(12), *range(12), 0, 1])
    assert conditions.facts["rule"] == "balanced"


def test_random_labels_depend_on_seed_and_number_alone():
    few, more = random_labels(0, 100, 1000), random_labels(0, 5000, 1000)
    np.testing.assert_array_equal(few, more[:100])
    assert few.dtype == np.int64
    assert np.mean(few == random_labels(1, 100, 1000)) < 0.1
    counts = np.bincount(more, minlength=1000)
    assert len(counts) == 1000
    assert np.sum((counts - 5) ** 2 / 5) < 999 + 5 * np.sqrt(2 * 999)


def test_random_labels_stay_what_they_were():
    """Published numbers rest on them: another release must not draw other classes."""
    np.testing.assert_array_equal(
        random_labels(0, 8, 1000), [342, 117, 25, 355, 900, 503, 719, 253]
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_labels_of_a_windows_editor_are_read(classes, tmp_path, encoding):
    path = tmp_path / "labels.txt"
    path.write_text("3\r\ncoffee\r\n", encoding=encoding)
    rows = make_requests(classes, 3, 0, str(path), None).rows
    np.testing.assert_array_equal(rows, [3, classes.class_names.index("coffee"), 3])


def test_lists_files_and_names_are_repeated(classes, tmp_path):
    (tmp_path / "labels.txt").write_text("3\ncoffee\n\n 0 \n")
    for rule, want in (
        ("5", [5, 5, 5, 5]),
        ("0,11,rocket", [0, 11, 11, 0]),
        (str(tmp_path / "labels.txt"), [3, 4, 0, 3]),
        ("7," * 5000, [7, 7, 7, 7]),
    ):
        np.testing.assert_array_equal(make_requests(classes, 4, 0, rule, None).rows, want)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("12", "'12'.*0 to 11.*astronaut, camera"),
        ("-1", "'-1'"),
        ("dog", "'dog'"),
        ("1.5", "'1.5'"),
        ("²", "'²'"),
        (" , ", "holds no label"),
        ("", "holds no label"),
    ],
)
def test_a_label_that_does_not_exist_is_named(classes, rule, message):
    with pytest.raises(RequestError, match=message):
        make_requests(classes, 4, 0, rule, None)


def test_an_ambiguous_name_asks_for_a_number(classes):
    twice = dataclasses.replace(classes, class_names=("crane", "owl", "crane", *"abcdefghi"))
    with pytest.raises(RequestError, match=r"'crane'.*\[0, 2\]"):
        make_requests(twice, 4, 0, "crane", None)
    unknown = dataclasses.replace(classes, class_names=None)
    with pytest.raises(RequestError, match="class names"):
        make_requests(unknown, 4, 0, "crane", None)


def captions(path, count=3, mask=None, **changes):
    rng = np.random.default_rng(1)
    mask = np.arange(4) >= np.array([[0], [3], [1]])[:count] if mask is None else mask
    arrays = {
        "features": rng.normal(size=(count, 4, 6)).astype(np.float32),
        "mask": mask,
        **changes,
    }
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return arrays


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((3, 4, 5), np.float32)}, r"features \(3, 4, 5\)"),
        ({"mask": np.ones((2, 4), bool)}, r"mask \(2, 4\)"),
        ({"features": np.zeros((3, 4, 6), np.int64)}, "features.*int64"),
        ({"mask": np.arange(4) < np.array([[2], [3], [4]])}, "left"),
        ({"mask": np.zeros((3, 4), bool)}, "left.*token each"),
        ({"mask": np.full((3, 4), 0.5)}, "booleans or 0 and 1"),
    ],
)
def test_captions_that_do_not_fit_are_refused(tmp_path, captioned, changes, message):
    captions(tmp_path / "c.npz", **changes)
    with pytest.raises(RequestError, match=message):
        make_requests(captioned, 5, 0, None, tmp_path / "c.npz")


def test_conditions_of_the_wrong_kind_are_refused(classes, captioned):
    with pytest.raises(RequestError, match="--labels"):
        make_requests(classes, 5, 0, None, Path("c.npz"))
    with pytest.raises(RequestError, match="--conditions"):
        make_requests(captioned, 5, 0, "random", None)
    with pytest.raises(RequestError, match="--conditions FILE.npz"):
        make_requests(captioned, 5, 0, None, None)
    policy = make_policy(
        "janus", dim=32, n_head=4, n_layer=2, vocab_size=11, num_tokens=9, hidden_dim=48
    )
    janus = dataclasses.replace(captioned, policy=policy, facts={"policy": {"kind": "janus"}})
    with pytest.raises(RequestError, match="'janus'"):
        make_requests(janus, 5, 0, None, None)


def test_captions_are_read_a_row_at_a_time(tmp_path, captioned):
    arrays = captions(tmp_path / "c.npz", features=np.full((3, 4, 6), 0.5, np.float16))
    conditions = make_requests(captioned, 5, 0, None, tmp_path / "c.npz")
    assert isinstance(conditions.features, np.memmap)
    got = conditions.of(np.array([4, 2]))
    assert {name: x.dtype.name for name, x in got.items()} == {
        "features": "float32", "mask": "bool", "dropped": "bool",
    }  # fmt: skip
    np.testing.assert_array_equal(got["mask"], arrays["mask"][[1, 2]])
    assert conditions.name(2) == "caption 2"


def test_a_file_without_captions_is_named(tmp_path, captioned):
    captions(tmp_path / "c.npz", features=None)
    with pytest.raises(SampleFilesError, match="'features'.*mask"):
        make_requests(captioned, 5, 0, None, tmp_path / "c.npz")
