"""Prepared TensorFlow Datasets, read without TensorFlow.

The data must have been prepared in the array_record format, which allows random access. Preparing
needs TensorFlow, once, on any machine; reading does not:

    pip install "tensorflow-datasets" tensorflow
    tfds build imagenet2012 --file_format=array_record --data_dir=DIR
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from vapi_jax.data.config import DataConfig, DataError
from vapi_jax.data.sources import Source
from vapi_jax.data.transforms import read_sample

_USUAL_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def _tfds() -> types.ModuleType:
    # Imported late: it is an optional extra and takes seconds to import.
    try:
        import tensorflow_datasets
    except ModuleNotFoundError as error:
        raise DataError(
            f"{error}. Data source 'tfds' needs the extra of that name: "
            "pip install 'vapi_jax[tfds]'"
        ) from error
    return tensorflow_datasets


def _version_key(folder: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(number) for number in folder.name.split("."))


def find_prepared(config: DataConfig) -> pathlib.Path:
    """The version folder to read: `path` itself, or the newest one under path/dataset[/config].

    Raises:
        DataError: no dataset named, several configs to choose from, or nothing prepared there; says
            how to prepare it.
    """
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    data_dir = pathlib.Path(config.path or default).expanduser()
    if (data_dir / "dataset_info.json").is_file():
        return data_dir
    name, _, version = config.dataset.partition(":")
    if not name:
        raise DataError("tfds needs `dataset`, for example 'imagenet2012' or 'cifar10'")
    versions = [
        info.parent
        for pattern in ("*/dataset_info.json", "*/*/dataset_info.json")
        for info in (data_dir / name).glob(pattern)
        if re.fullmatch(r"\d+(\.\d+)*", info.parent.name) and version in ("", info.parent.name)
    ]
    parents = sorted({folder.parent for folder in versions})
    if len(parents) > 1:
        choices = [parent.relative_to(data_dir).as_posix() for parent in parents]
        raise DataError(f"{name!r} is prepared in several configs, name one of {choices}")
    if not versions:
        raise DataError(
            f"{config.dataset!r} is not prepared in {data_dir}. Set `path` to the data_dir, or "
            "prepare it once (this step needs TensorFlow): "
            f"tfds build {name} --file_format=array_record --data_dir={data_dir}"
        )
    return max(versions, key=_version_key)


def _builder(config: DataConfig) -> Any:
    """The builder of the prepared data, with image and label features checked."""
    folder = find_prepared(config)
    tfds = _tfds()
    builder = tfds.builder_from_directory(str(folder))
    features = builder.info.features
    for field in ("image_feature", "label_feature"):
        if getattr(config, field) not in features:
            raise DataError(
                f"{folder} has no feature {getattr(config, field)!r}; set `{field}` to one of "
                f"{sorted(features)}"
            )
    if not isinstance(features[config.image_feature], tfds.features.Image):
        raise DataError(f"feature {config.image_feature!r} of {folder} holds no images")
    if not isinstance(features[config.label_feature], tfds.features.ClassLabel):
        raise DataError(f"feature {config.label_feature!r} of {folder} holds no class labels")
    return builder


class TfdsSource(Source):
    """Images and class labels of one split of a prepared dataset.

    Raises:
        DataError: tensorflow-datasets is not installed; no dataset named, not prepared, or not in a
            random-access format, an unknown feature or split, a split without records or without
            labels; and, when a sample is read, a label that no class has or a damaged file of
            records.
    """

    @classmethod
    def read_class_names(cls, config: DataConfig) -> tuple[str, ...]:
        return tuple(_builder(config).info.features[config.label_feature].names)

    def __init__(self, config: DataConfig, split: str) -> None:
        super().__init__(config, split)
        builder = _builder(config)
        self.class_names = tuple(builder.info.features[config.label_feature].names)
        self._name = f"{builder.info.full_name} {config.source_split(split, _USUAL_SPLITS[split])}"
        self._records = _open_records(builder, config, split)
        # Some test splits carry -1 for every label.
        for index in {0, len(self._records) - 1}:
            self._record(index)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return f"{self._name}, record {index}"

    def _record(self, index: int) -> tuple[bytes, int]:
        """Encoded image and label."""
        with _damage_named(self.name(index)):
            record = self._records[index]
            encoded = record[self.config.image_feature]
            label = int(record[self.config.label_feature])
        if not 0 <= label < len(self.class_names):
            raise DataError(
                f"{self.name(index)} has the label {label}, its classes are 0 to "
                f"{len(self.class_names) - 1}: a split without labels cannot be used; set "
                f"`{self.split}_split` to another"
            )
        return encoded, label

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        encoded, label = self._record(index)
        return read_sample(io.BytesIO(encoded), label, self.config, self.split, rng)


@contextlib.contextmanager
def _damage_named(what: str) -> Iterator[None]:
    """Turns what array_record raises, or hands back, for a damaged file into a sentence."""
    try:
        yield
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{what} cannot be read ({error}): its files are damaged or incomplete; copy or prepare "
            "the dataset again"
        ) from error


def _open_records(builder: Any, config: DataConfig, split: str) -> Any:
    name = config.source_split(split, _USUAL_SPLITS[split])
    base = re.split(r"[\[+]", name)[0]
    if base not in builder.info.splits:
        raise DataError(
            f"{builder.info.full_name} has no split {name!r} for {split!r}; set `{split}_split` to "
            f"one of {sorted(builder.info.splits)} or a slice such as 'train[90%:]'"
        )
    if not builder.info.splits[name].num_examples:
        raise DataError(
            f"{builder.info.full_name} has no records in {name!r}; set `{split}_split` to others"
        )
    try:
        # The encoded bytes are enough: Pillow decodes every source the same way.
        return builder.as_data_source(
            split=name, decoders={config.image_feature: _tfds().decode.SkipDecoding()}
        )
    except NotImplementedError as error:
        raise DataError(
            f"{builder.data_dir} is not prepared in a random-access format; prepare it with "
            f"tfds build {builder.info.name} --file_format=array_record"
        ) from error
