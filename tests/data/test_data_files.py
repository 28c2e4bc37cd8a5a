"""Data from files: ADM crops, image folders, prepared TensorFlow Datasets, and their errors."""

import dataclasses
import io
import itertools
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.compare import assert_close
from tests.helpers.image_folders import assert_same, folder_config, numbers, take, write_images
from tests.helpers.messages import assert_mentions
from vapi_jax.data import (
    DataConfig,
    DataError,
    SkippedImages,
    class_names,
    fixed_batch,
    labels_of,
    make_dataset,
    num_classes,
)
from vapi_jax.data.pipeline import make_source
from vapi_jax.data.tfds_source import find_prepared
from vapi_jax.data.transforms import center_crop, random_crop, to_array

# Crops -----------------------------------------------------------------------------------------


def pattern(height, width):
    y, x = np.mgrid[:height, :width]
    return ((37 * y * y + 53 * x * y + 91 * x) % 256).astype(np.uint8)


# Computed in float64 with numpy alone: means of 2x2 blocks, then Keys' kernel (a = -0.5) widened by
# the scale as two matrices, then the middle. PIL rounds to whole grey levels after each pass.
ADM_LANDSCAPE = [
    [135.36, 98.45, 112.72, 141.34],
    [102.75, 105.16, 102.25, 101.89],
    [120.88, 143.93, 159.52, 147.33],
    [101.49, 94.62, 118.85, 116.87],
]
ADM_PORTRAIT = [
    [92.97, 111.98, 159.61, 153.52],
    [116.65, 50.2, 102.72, 136.21],
    [76.11, 120.13, 145.91, 43.86],
    [114.59, 59.14, 190.77, 70.34],
]


@pytest.mark.parametrize(
    "image, expected",
    [
        (pattern(10, 16), ADM_LANDSCAPE),
        (np.kron(pattern(7, 5), np.ones((2, 2), np.uint8)), ADM_PORTRAIT),
    ],
    ids=["landscape", "portrait"],
)
def test_center_crop_equals_adm(image, expected):
    actual = np.asarray(center_crop(Image.fromarray(image), 4), np.float64)
    np.testing.assert_allclose(actual, expected, atol=1.5)
    assert np.mean(np.abs(actual - expected)) < 0.6


def test_center_crop_keeps_an_image_of_the_right_size():
    image = pattern(6, 6)
    np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(image), 6)), image)
    # A wide image of the right height loses (9 - 6) // 2 = 1 column on the left.
    wide = pattern(6, 9)
    np.testing.assert_array_equal(np.asarray(center_crop(Image.fromarray(wide), 6)), wide[:, 1:7])


def test_random_crop_lies_inside_the_image_and_moves():
    # Brightness grows to the right, so the mean of a crop tells where it was.
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (100, 200))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    rng = np.random.default_rng(0)
    crops = [np.asarray(random_crop(image, 20, rng)) for _ in range(50)]
    means = [crop.mean() for crop in crops]
    assert {crop.shape for crop in crops} == {(20, 20)}
    assert min(means) < 70
    assert max(means) > 130
    spans = [int(crop[0, -1]) - int(crop[0, 0]) for crop in crops]
    assert min(spans) < 80
    assert max(spans) > 90, "scales between 0.8 and 1 of the short side"


def test_to_array_maps_bytes_to_minus_one_and_one():
    image = Image.fromarray(np.array([[[0, 51, 255]]], np.uint8))
    actual = to_array(image)
    assert actual.dtype == np.float32
    assert_close(actual, [[[-1.0, -0.6, 1.0]]], 1e-6)


# Folders ---------------------------------------------------------------------------------------


def test_folder_with_splits(tmp_path):
    write_images(tmp_path / "train" / "zebra", 3)
    write_images(tmp_path / "train" / "ant", 5, first=50)
    write_images(tmp_path / "val" / "zebra", 2, first=100)
    config = folder_config(tmp_path)
    assert class_names(config) == ("ant", "zebra")
    assert num_classes(config) == 2
    (batch,) = take(make_dataset(config, "train", 8, seed=0), 1)
    assert sorted(numbers(batch)) == [0, 1, 2, 50, 51, 52, 53, 54]
    for number, label in zip(numbers(batch), batch["condition"], strict=True):
        assert label == (0 if number >= 50 else 1)
    held_out = fixed_batch(config, "val", 2, seed=0)
    assert sorted(numbers(held_out)) == [100, 101]
    assert held_out["condition"].tolist() == [1, 1]
    with pytest.raises(DataError, match=r"test.*`test_split`"):
        fixed_batch(config, "test", 1, seed=0)
    renamed = dataclasses.replace(config, test_split="val")
    assert sorted(numbers(fixed_batch(renamed, "test", 2, seed=0))) == [100, 101]


def test_folder_without_splits_is_divided_in_every_class(tmp_path):
    write_images(tmp_path / "a", 40)
    write_images(tmp_path / "b", 20, first=100)
    config = folder_config(tmp_path, folder_holdout=0.2)
    files = {split: make_source(config, split) for split in ("train", "val", "test")}
    rng = np.random.default_rng(0)
    found = {
        split: sorted(
            (os.path.basename(source.name(i)), int(source.sample(i, rng)["condition"]))
            for i in range(len(source))
        )
        for split, source in files.items()
    }
    assert sorted(itertools.chain(*found.values())) == sorted(
        [(f"{n:03d}.png", 0) for n in range(40)] + [(f"{n:03d}.png", 1) for n in range(100, 120)]
    )
    counts = {split: np.bincount([label for _, label in found[split]]) for split in found}
    assert counts["train"].tolist() == [32, 16]
    assert counts["val"].tolist() == counts["test"].tolist() == [4, 2]


def test_folder_epochs_and_processes(tmp_path):
    write_images(tmp_path / "train" / "a", 7)
    write_images(tmp_path / "train" / "b", 6, first=100)
    config = folder_config(tmp_path, crop="random")
    everything = sorted([*range(7), *range(100, 106)])
    epochs = take(make_dataset(config, "train", 13, seed=0), 2)
    assert [sorted(numbers(epoch)) for epoch in epochs] == [everything, everything]
    assert numbers(epochs[0]) != numbers(epochs[1])
    shares = [take(make_dataset(config, "train", 2, 0, i, 3), 2) for i in range(3)]
    seen = [number for share in shares for batch in share for number in numbers(batch)]
    assert len(set(seen)) == len(seen) == 12


def test_files_of_all_kinds_are_read(tmp_path):
    folder = tmp_path / "train" / "a"
    kinds = [("L", ".jpg"), ("RGBA", ".webp"), ("P", ".PNG"), ("P", ".gif"), ("CMYK", ".tif")]
    for number, (mode, suffix) in enumerate(kinds):
        write_images(folder, 1, first=number, mode=mode, suffix=suffix)
    (folder / "._000.jpg").write_bytes(b"left behind by a file manager")
    (folder / "notes.txt").write_text("no image")
    (folder / "folder.png").mkdir()
    config, skipped = folder_config(tmp_path, max_unreadable=0.0), SkippedImages()
    assert len(make_source(config, "train")) == 5
    batch = fixed_batch(config, "train", 5, seed=0, skipped=skipped)
    assert batch["image"].shape == (5, 4, 4, 3)
    assert len(skipped) == 0


def test_held_out_images_are_not_augmented(tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    write_images(tmp_path / "train" / "a", 1)
    Image.fromarray(np.stack([pattern(9, 12)] * 3, -1)).save(tmp_path / "val" / "a" / "0.png")
    config = folder_config(tmp_path, crop="random")
    first = fixed_batch(config, "val", 1, seed=0)
    for seed in range(1, 6):
        assert_same([first], [fixed_batch(config, "val", 1, seed=seed)])


def test_folder_errors_name_the_place_and_the_layout(tmp_path):
    with pytest.raises(DataError, match="`path`.*PATH/CLASS/IMAGE"):
        num_classes(DataConfig(name="image_folder"))
    missing = tmp_path / "missing"
    with pytest.raises(DataError, match=r"missing.*PATH/CLASS/IMAGE"):
        make_dataset(folder_config(missing), "train", 1, seed=0)
    with pytest.raises(DataError, match="nothing.*PATH/CLASS/"):
        num_classes(folder_config(tmp_path))
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 file.*1.*\.png"):
        num_classes(folder_config(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="'train'.* 1 .* 1 "):
        make_dataset(folder_config(tmp_path), "train", 1, seed=0)
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "val" / "b", 2)
    with pytest.raises(DataError, match=r"\bb\b.*train"):
        fixed_batch(folder_config(tmp_path), "val", 1, seed=0)


@pytest.mark.parametrize("folder", ["", "train"])
def test_classes_without_images_are_named_with_what_they_hold(tmp_path, folder):
    write_images(tmp_path / folder / "full", 20)
    (tmp_path / folder / "empty").mkdir()
    (tmp_path / folder / "other").mkdir()
    for name in ("a.heic", "b.heic", "c.txt"):
        (tmp_path / folder / "other" / name).write_bytes(b"")
    with pytest.raises(DataError) as error:
        make_dataset(folder_config(tmp_path), "train", 1, seed=0)
    assert (
        "2 of 3 class folders in" in str(error.value)
        and "empty (holds nothing), other (holds 3 file(s): 2 with .heic, 1 with .txt). Remove or"
        in str(error.value)
    )


def test_a_held_out_split_need_not_have_every_class(tmp_path):
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "train" / "b", 2)
    write_images(tmp_path / "val" / "b", 2)
    (tmp_path / "val" / "a").mkdir()
    assert fixed_batch(folder_config(tmp_path), "val", 2, seed=0)["condition"].tolist() == [1, 1]


def test_a_folder_of_splits_is_never_taken_for_a_folder_of_classes(tmp_path):
    write_images(tmp_path / "val" / "a", 2)
    write_images(tmp_path / "training" / "a", 2)
    with pytest.raises(DataError) as error:
        class_names(folder_config(tmp_path))
    assert str(error.value) == (
        f"there is no folder {tmp_path / 'train'} for split 'train'; {tmp_path} holds 2 folder(s): "
        "training, val. Set `train_split` to the sub-folder to read"
    )
    with pytest.raises(DataError, match=r"trainig.*'train'.*training"):
        class_names(folder_config(tmp_path, train_split="trainig"))
    assert class_names(folder_config(tmp_path, train_split="training")) == ("a",)
    write_images(tmp_path / "classes" / "a", 2)
    assert class_names(folder_config(tmp_path / "classes")) == ("a",)
    with pytest.raises(DataError, match="classes/train.*'train'"):
        class_names(folder_config(tmp_path / "classes", train_split="train"))


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_an_empty_one(tmp_path, monkeypatch):
    write_images(tmp_path / "train" / "a" / "deep", 2)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"deep.*Permission denied"):
        make_dataset(folder_config(tmp_path), "train", 1, seed=0)


# TensorFlow Datasets ---------------------------------------------------------------------------


def encoded_png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (number, 100, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def prepare_tfds(tfds, folder, shard_lengths, label=lambda n: n % 2, image=encoded_png):
    """Writes "tiny" as `tfds build --file_format=array_record` lays it out, without TensorFlow."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_generated_pb2 as example_pb2
    from tensorflow_datasets.proto import tf_feature_generated_pb2 as feature_pb2

    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["ant", "bee"]),
            "file_name": tfds.features.Text(),
        }
    )
    features.save_config(str(folder))
    number = total = 0
    for shard, length in enumerate(shard_lengths):
        name = f"tiny-train.array_record-{shard:05d}-of-{len(shard_lengths):05d}"
        writer = array_record_module.ArrayRecordWriter(str(folder / name), "group_size:1")
        for _ in range(length):
            values = {
                "image": {"bytes_list": feature_pb2.BytesList(value=[image(number)])},
                "label": {"int64_list": feature_pb2.Int64List(value=[label(number)])},
                "file_name": {"bytes_list": feature_pb2.BytesList(value=[b"x"])},
            }
            record = example_pb2.Example(
                features=feature_pb2.Features(
                    feature={key: feature_pb2.Feature(**value) for key, value in values.items()}
                )
            ).SerializeToString()
            writer.write(record)
            total += len(record)
            number += 1
        writer.close()
    split = {
        "name": "train",
        "shardLengths": [str(length) for length in shard_lengths],
        "numBytes": str(total),
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def tfds_config(path, **options):
    return DataConfig(
        name="tfds", path=str(path), dataset="tiny", image_size=4, num_threads=0, **options
    )


def test_tfds_reads_prepared_data_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the tfds extra is not installed")
    tensorflow_before = "tensorflow" in sys.modules
    prepare_tfds(tfds, tmp_path / "tiny" / "1.0.0", shard_lengths=[6, 4])
    config = tfds_config(tmp_path, val_split="train[80%:]")
    assert class_names(config) == ("ant", "bee")
    (batch,) = take(make_dataset(config, "train", 10, seed=0), 1)
    assert batch["image"].shape == (10, 4, 4, 3)
    assert batch["condition"].dtype == np.int32
    assert sorted(numbers(batch)) == list(range(10))
    assert [number % 2 for number in numbers(batch)] == batch["condition"].tolist()
    assert sorted(numbers(fixed_batch(config, "val", 2, seed=0))) == [8, 9]
    threaded = dataclasses.replace(config, num_threads=2)
    assert_same(
        take(make_dataset(config, "train", 3, 1), 6), take(make_dataset(threaded, "train", 3, 1), 6)
    )
    with pytest.raises(DataError, match=r"'test'.*`test_split`.*\['train'\]"):
        fixed_batch(config, "test", 1, seed=0)
    with pytest.raises(DataError, match=r"'labels'.*`label_feature`.*'label'"):
        class_names(dataclasses.replace(config, label_feature="labels"))
    with pytest.raises(DataError, match="'file_name'"):
        class_names(dataclasses.replace(config, image_feature="file_name"))
    assert ("tensorflow" in sys.modules) == tensorflow_before


def test_tfds_classes_get_the_labels_of_a_generators_list(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the tfds extra is not installed")
    prepare_tfds(tfds, tmp_path / "tiny" / "1.0.0", [10])
    (tmp_path / "classes.txt").write_text("bee\nwasp\nant\n")
    config = tfds_config(tmp_path, classes=str(tmp_path / "classes.txt"))
    assert (class_names(config), labels_of(config).tolist()) == (("bee", "wasp", "ant"), [0, 2])
    (batch,) = take(make_dataset(config, "train", 10, seed=0), 1)
    assert [(2, 0)[number % 2] for number in numbers(batch)] == batch["condition"].tolist()
    (tmp_path / "classes.txt").write_text("bee\nwasp\n")
    with pytest.raises(DataError, match="'ant'"):
        class_names(config)


def test_tfds_labels_that_no_class_has_are_refused(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the tfds extra is not installed")
    prepare_tfds(tfds, tmp_path / "unlabelled" / "1.0.0", [4], label=lambda n: -1)
    config = dataclasses.replace(tfds_config(tmp_path), path=str(tmp_path / "unlabelled" / "1.0.0"))
    with pytest.raises(DataError) as error:
        make_source(config, "train")
    assert_mentions(
        str(error.value), "tiny/1.0.0 train", "record 0", "-1", "0 to 1", "`train_split`"
    )
    # One bad label in the middle is met when its record is.
    prepare_tfds(tfds, tmp_path / "wrong" / "1.0.0", [5], label=lambda n: 2 if n == 2 else 0)
    config = dataclasses.replace(config, path=str(tmp_path / "wrong" / "1.0.0"))
    with pytest.raises(DataError, match="record 2.*2.*0.*1"):
        take(make_dataset(config, "train", 5, seed=0), 1)


def test_tfds_images_that_cannot_be_read_are_skipped_by_their_record(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the tfds extra is not installed")
    damaged = {3: b"", 7: encoded_png(7)[:-30]}
    folder = tmp_path / "tiny" / "1.0.0"
    prepare_tfds(tfds, folder, [10], image=lambda n: damaged.get(n, encoded_png(n)))
    skipped = SkippedImages()
    config = tfds_config(tmp_path, max_unreadable=0.2)
    (batch,) = take(make_dataset(config, "train", 10, 0, skipped=skipped), 1)
    assert set(numbers(batch)) == set(range(10)) - {3, 7}
    assert sorted(name for name, _ in skipped.items()) == [
        "tiny/1.0.0 train, record 3",
        "tiny/1.0.0 train, record 7",
    ]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "missing"])
def test_a_damaged_file_of_records_stops_the_run_by_name(tmp_path, damage):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the tfds extra is not installed")
    folder = tmp_path / "tiny" / "1.0.0"
    prepare_tfds(tfds, folder, [6, 4])
    first = min(folder.glob("*.array_record*"))
    data = bytearray(first.read_bytes())
    for place in range(100, 3000, 100):
        data[place] ^= 255 if damage == "flipped" else 0
    first.unlink()
    if damage != "missing":
        first.write_bytes({"truncated": data[:65_536], "emptied": b""}.get(damage, data))
    with pytest.raises(DataError, match=r"tiny/1.0.0 train.*\d+"):
        take(make_dataset(tfds_config(tmp_path), "train", 10, seed=0), 1)


def test_a_tfds_split_without_records_is_refused(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the tfds extra is not installed")
    prepare_tfds(tfds, tmp_path / "tiny" / "1.0.0", [4])
    with pytest.raises(DataError, match=r"'train\[:0\]'.*`val_split`"):
        make_source(tfds_config(tmp_path, val_split="train[:0]"), "val")


def test_tfds_in_a_format_without_random_access(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the tfds extra is not installed")
    folder = tmp_path / "tiny" / "1.0.0"
    prepare_tfds(tfds, folder, shard_lengths=[1])
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    (folder / "tiny-train.array_record-00000-of-00001").rename(
        folder / "tiny-train.tfrecord-00000-of-00001"
    )
    with pytest.raises(DataError, match="tfds build tiny --file_format=array_record"):
        fixed_batch(tfds_config(tmp_path), "train", 1, seed=0)


def test_tfds_finds_the_newest_prepared_version(tmp_path):
    for version in ("small/9.0.0", "small/10.0.0"):
        folder = tmp_path / "tiny" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
    config = tfds_config(tmp_path)
    newest = tmp_path / "tiny" / "small" / "10.0.0"
    assert find_prepared(config) == newest
    assert find_prepared(dataclasses.replace(config, path=str(newest))) == newest
    older = dataclasses.replace(config, dataset="tiny/small:9.0.0")
    assert find_prepared(older) == tmp_path / "tiny" / "small" / "9.0.0"
    (tmp_path / "tiny" / "large" / "1.0.0").mkdir(parents=True)
    (tmp_path / "tiny" / "large" / "1.0.0" / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"'tiny/large', 'tiny/small'"):
        find_prepared(config)


def test_tfds_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="'tiny'.*tfds build tiny"):
        find_prepared(tfds_config(tmp_path))
    with pytest.raises(DataError, match="needs `dataset`"):
        find_prepared(dataclasses.replace(tfds_config(tmp_path), dataset=""))
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    # None is how Python marks a module that must not be imported.
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"pip install 'vapi_jax\[tfds\]'"):
        make_dataset(tfds_config(tmp_path), "train", 1, seed=0)
