"""Data: determinism, resuming and sharding, and photographs whose splits share no pixel."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.helpers.image_folders import assert_same, take
from vapi_jax.common.options import Errors, build
from vapi_jax.data import DataConfig, DataError, class_names, fixed_batch, make_dataset, num_classes
from vapi_jax.data.photos import (
    PHOTOS,
    Photo,
    PhotoSource,
    crop_sides,
    draw_crop,
    load_photo,
    split_box,
)

PHOTO_CONFIG = DataConfig(image_size=8, photo_crops_per_class=4, num_threads=0)


def rows(batches):
    """Every image of some batches as bytes, so that they can be compared as sets."""
    return [image.tobytes() for batch in batches for image in batch["image"]]


# Photographs -----------------------------------------------------------------------------------


def test_photos_classes_shapes_types_and_range():
    assert num_classes(PHOTO_CONFIG) == len(class_names(PHOTO_CONFIG)) == 12
    for split in ("train", "val", "test"):
        (batch,) = take(make_dataset(PHOTO_CONFIG, split, 24, seed=0), 1)
        assert batch["image"].shape == (24, 8, 8, 3)
        assert batch["image"].dtype == np.float32
        assert batch["condition"].shape == (24,)
        assert batch["condition"].dtype == np.int32
        assert -1.0 <= batch["image"].min() < -0.8
        assert 0.8 < batch["image"].max() <= 1.0


def test_every_epoch_visits_the_classes_evenly_in_its_own_order():
    epoch = 4 * 12
    batches = take(make_dataset(PHOTO_CONFIG, "train", epoch, seed=3), 3)
    orders = [batch["condition"].tolist() for batch in batches]
    for order in orders:
        np.testing.assert_array_equal(np.bincount(order, minlength=12), 4)
        assert order != sorted(order)
    assert orders[0] != orders[1] != orders[2]
    assert len(set(rows(batches))) == 3 * epoch, "an epoch repeats crops of another"


def test_without_shuffle_the_classes_come_in_turn():
    config = dataclasses.replace(PHOTO_CONFIG, shuffle=False)
    (batch,) = take(make_dataset(config, "train", 25, seed=0), 1)
    np.testing.assert_array_equal(batch["condition"], np.arange(25) % 12)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_the_seed_fixes_everything(num_threads):
    config = dataclasses.replace(PHOTO_CONFIG, num_threads=num_threads)
    first = take(make_dataset(config, "train", 10, seed=1), 8)
    assert_same(first, take(make_dataset(PHOTO_CONFIG, "train", 10, seed=1), 8))
    other = take(make_dataset(config, "train", 10, seed=2), 8)
    assert not set(rows(first)) & set(rows(other))


@pytest.mark.parametrize("done", [1, 3, 7])
def test_an_iterator_resumes_exactly(done):
    # Epochs of 48 samples end inside batches of 10: the states lie before and after an epoch's end.
    config = dataclasses.replace(PHOTO_CONFIG, num_threads=2)
    expected = take(make_dataset(config, "train", 10, seed=5), done + 5)
    iterator = iter(make_dataset(config, "train", 10, seed=5))
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    restored = iter(make_dataset(config, "train", 10, seed=5))
    next(restored)
    restored.set_state(state)
    assert_same(expected[done:], list(itertools.islice(restored, 5)))


@pytest.mark.parametrize("count", [2, 5])
def test_processes_share_the_stream_and_no_sample(count):
    # 48 samples in an epoch are no multiple of 5: the shares stay disjoint in later epochs, too.
    one = take(make_dataset(PHOTO_CONFIG, "train", 4 * count, seed=7), 6)
    shares = [take(make_dataset(PHOTO_CONFIG, "train", 4, 7, i, count), 6) for i in range(count)]
    assert len({row for share in shares for row in rows(share)}) == 6 * 4 * count
    for step, whole in enumerate(one):
        dealt = [rows([share[step]]) for share in shares]
        assert rows([whole]) == [row for group in dealt for row in group]


def test_held_out_crops_are_fixed_by_index_and_seed():
    ten, thirty = (fixed_batch(PHOTO_CONFIG, "val", n, seed=0) for n in (10, 30))
    np.testing.assert_array_equal(ten["image"], thirty["image"][:10])
    np.testing.assert_array_equal(thirty["condition"], np.arange(30) % 12)
    other = fixed_batch(PHOTO_CONFIG, "val", 30, seed=1)
    assert not set(rows([thirty])) & set(rows([other]))
    once = take(make_dataset(PHOTO_CONFIG, "val", 10, seed=0), 100)
    assert len(once) == 4, "a held-out split passes once: 48 samples, 4 full batches"
    np.testing.assert_array_equal(once[0]["image"], ten["image"])


@pytest.mark.parametrize("scales", [(0.3, 0.45, 0.375), (0.5, 0.5, 0.1), (0.05, 0.1, 0.5)], ids=str)
def test_no_crop_of_one_split_meets_a_crop_of_another(scales):
    config = DataConfig(
        photo_min_scale=scales[0], photo_max_scale=scales[1], photo_holdout=scales[2]
    )
    rng = np.random.default_rng(0)
    for photo in PHOTOS:
        size = load_photo(photo).size
        sides = crop_sides(size, config)
        owners = np.zeros(size[::-1], np.int32)
        for bit, split in enumerate(("train", "val", "test")):
            left, top, right, bottom = split_box(size, split, config)
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
            touched = np.zeros_like(owners)
            for _ in range(200):
                box = draw_crop((right - left, bottom - top), sides, rng)
                assert sides[0] <= box[2] - box[0] == box[3] - box[1] <= sides[1]
                touched[top + box[1] : top + box[3], left + box[0] : left + box[2]] = 1
            owners += touched << bit
        assert set(np.unique(owners)) <= {0, 1, 2, 4}, photo.name


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pixels_of_other_splits_cannot_reach_a_crop(split):
    # Everything outside the split's own region becomes noise: no crop may change, filters included.
    config = dataclasses.replace(PHOTO_CONFIG, image_size=16)
    noise = np.random.default_rng(0)
    images, poisoned = [], []
    for photo in PHOTOS:
        image = load_photo(photo)
        box = split_box(image.size, split, config)
        pixels = noise.integers(0, 256, (image.height, image.width, 3), dtype=np.uint8)
        damaged = Image.fromarray(pixels)
        damaged.paste(image.crop(box), box)
        assert np.any(np.asarray(damaged) != np.asarray(image))
        images.append(image)
        poisoned.append(damaged)
    clean, dirty = PhotoSource(config, split, images), PhotoSource(config, split, poisoned)
    for seed in range(10):
        for record in range(len(PHOTOS)):
            a = clean.sample(record, np.random.default_rng(seed))["image"]
            b = dirty.sample(record, np.random.default_rng(seed))["image"]
            np.testing.assert_array_equal(a, b)


def test_flip_off_and_on():
    config = dataclasses.replace(PHOTO_CONFIG, flip=False)
    plain = PhotoSource(config, "train")
    flipping = PhotoSource(PHOTO_CONFIG, "train")
    mirrored = 0
    for seed in range(40):
        a = plain.sample(0, np.random.default_rng(seed))["image"]
        b = flipping.sample(0, np.random.default_rng(seed))["image"]
        if not np.array_equal(a, b):
            np.testing.assert_array_equal(a[:, ::-1], b)
            mirrored += 1
    assert 10 < mirrored < 30


def test_missing_photographs_are_explained():
    with pytest.raises(DataError, match="pip install no_such_package"):
        load_photo(Photo("nobody", "no_such_package", "data/nobody.png"))
    with pytest.raises(DataError, match="'nobody'.*scikit-image"):
        load_photo(Photo("nobody", "skimage", "data/nobody.png"))


# Arguments -------------------------------------------------------------------------------------


def errors_of(**options):
    errors = Errors()
    build(DataConfig, options, "data.", errors)
    return errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "imagenet"}, "name.*photos.*'imagenet'"),
        ({"options": {"a": 1}}, "options.*'photos'"),
        ({"crop": "middle"}, "data.crop='middle'.*center.*random"),
        ({"image_size": 0}, "data.image_size=0.* 1"),
        ({"photo_min_scale": 0.4, "photo_max_scale": 0.3}, "0.4 and 0.3"),
        ({"photo_max_scale": 0.6}, "<= 0.5.*0.6"),
        ({"photo_holdout": 0.0}, "data.photo_holdout=0.0.* 0.*0.5"),
        ({"folder_holdout": 0.7}, "data.folder_holdout=0.7.* 0.*0.5"),
        ({"photo_crops_per_class": 0}, "data.photo_crops_per_class=0.* 1"),
        ({"num_threads": 3, "prefetch": 2}, "prefetch.*3"),
        ({"max_unreadable": 1.5}, "data.max_unreadable=1.5.* 0 to 1"),
        ({"max_unreadable": float("nan")}, "data.max_unreadable=nan"),
        ({"max_image_pixels": 0}, "data.max_image_pixels=0.* 1 to 178956970"),
        ({"max_image_pixels": 200_000_000}, "data.max_image_pixels=200000000"),
    ],
)
def test_impossible_configurations(options, message):
    (line,) = errors_of(**options)
    assert re.search(message, line)


def test_all_that_is_impossible_is_said_at_once():
    assert len(errors_of(name="imagenet", crop="middle", image_size=0, max_unreadable=-1.0)) == 4


def test_impossible_arguments():
    with pytest.raises(ValueError, match="split.*'validation'"):
        make_dataset(PHOTO_CONFIG, "validation", 1, seed=0)
    with pytest.raises(ValueError, match="batch_size.*1"):
        make_dataset(PHOTO_CONFIG, "train", 0, seed=0)
    with pytest.raises(ValueError, match="process_index"):
        make_dataset(PHOTO_CONFIG, "train", 1, 0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="48.*25.*2"):
        make_dataset(PHOTO_CONFIG, "val", 25, 0, process_index=0, process_count=2)
    with pytest.raises(ValueError, match=r"\[1, 48\].*'val'.*49"):
        fixed_batch(PHOTO_CONFIG, "val", 49, seed=0)
