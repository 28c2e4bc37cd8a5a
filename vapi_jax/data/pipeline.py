"""From a source to batches: the one grain pipeline that every source runs through.

A source (`vapi_jax.data.sources`) turns an index and a random generator into a sample. Grain derives
that generator from the seed and the position in the endless stream of epochs, so a batch depends on
nothing but the configuration, the seed and its number.
"""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Float, Int

from vapi_jax.data.classes import ClassMap, class_map
from vapi_jax.data.config import DataConfig, DataError, check_split
from vapi_jax.data.skipping import Readable, SkippedImages
from vapi_jax.data.sources import Encoder, Source, source_class


def make_source(config: DataConfig, split: str) -> Source:
    """Opens one split of the configured source. What can go wrong is said at each source.

    Raises:
        DataError: also where samples of captions would be judged by the lines of other images.
    """
    source = source_class(config.name)(config, check_split(split))
    if not source.mixed and len(source) and source.asked(0) is not None:
        raise DataError(
            f"data.name={config.name!r}: `asked` tells of images by their place, and without `mixed = True` "
            f"held-out images of split {split!r} are drawn in another order: mix them, and say so"
        )
    return source


def classes_of(config: DataConfig) -> ClassMap:
    """The classes of the data, and which label each has in "condition".

    Raises:
        DataError: `config.classes` has no label for some.
    """
    return class_map(config.classes, source_class(config.name).read_class_names(config))


def class_names(config: DataConfig) -> tuple[str, ...]:
    """Names of labels; the position of a name is its label in "condition"."""
    return classes_of(config).names


def labels_of(config: DataConfig) -> Int[np.ndarray, " C"]:
    """The labels that the data have, in rising order."""
    return np.unique(np.asarray(classes_of(config).labels, np.int32))


def encoder_of(config: DataConfig) -> Encoder | None:
    """What made the tokens that come with the images; None where none come, or it is not known."""
    return source_class(config.name).read_encoder(config)


def num_classes(config: DataConfig) -> int:
    """Number of labels, those that the data lack included."""
    return len(class_names(config))


def _samples(
    source: Source, config: DataConfig, seed: int, shuffle: bool, skipped: SkippedImages | None
) -> grain.MapDataset:
    dataset = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    # An empty list is falsy, but it is the caller's.
    skipped = SkippedImages() if skipped is None else skipped
    return dataset.random_map(Readable(source, config, skipped).sample)


def make_dataset(
    config: DataConfig,
    split: str,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    skipped: SkippedImages | None = None,
) -> grain.IterDataset:
    """Batches of one split for one process.

    "train" never ends and is shuffled anew every epoch. "val" and "test" pass once over the split,
    in its own order, and leave out the samples that do not fill a last batch on every process.

    The stream is dealt to the processes batch by batch: whatever the number of processes, their n-th
    batches one after the other are the same samples in the same order if the global batch size is the
    same. The iterator's `get_state` and `set_state` resume exactly.

    Args:
        config: see DataConfig.
        split: "train", "val" or "test".
        batch_size: images per batch of THIS process.
        seed: fixes order, crops and flips.
        process_index, process_count: which share of the stream this process reads.
        skipped: takes in the images that cannot be read, for which others stand in.

    Returns:
        Batches {"image": float32 [B, H, W, 3] in [-1, 1], "condition": int32 [B]}, and of encoded
        images "tokens" int32 [B, T].

    Raises:
        ValueError: impossible arguments.
        DataError: a split too small for one batch on every process; and, when a batch is read, more
            unreadable images than `config.max_unreadable` allows.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be in [0, process_count), got {process_index} of {process_count}"
        )
    source = make_source(config, split)
    training = split == "train"
    dataset = _samples(source, config, seed, training and config.shuffle, skipped)
    if training:
        # Repeating before dealing keeps the processes' shares disjoint also where the length of an
        # epoch is no multiple of their number.
        dataset = dataset.repeat()
    else:
        per_step = batch_size * process_count
        usable = len(source) // per_step * per_step
        if usable == 0:
            raise DataError(
                f"split {split!r} has {len(source)} images, fewer than one batch of {batch_size} "
                f"on each of {process_count} processes"
            )
        dataset = dataset[:usable]
    dataset = dataset.batch(batch_size)[process_index::process_count]
    return dataset.to_iter_dataset(_reading(config))


def _reading(config: DataConfig) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch)


def fixed_samples(
    config: DataConfig,
    split: str,
    n: int,
    seed: int,
    skipped: SkippedImages | None = None,
    number: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """The samples of `fixed_batch` one at a time; raises as it does, at the call.

    Sets `number` have no image in common, as long as the split has enough of them, where they would be
    the same: a source that neither order nor crops change.
    """
    source = make_source(config, split)
    if not 0 < n <= len(source):
        raise DataError(f"n must be in [1, {len(source)}] for split {split!r}, got {n}")
    dataset = _samples(source, config, seed, not source.mixed, skipped)
    first = number * n if source.settled and (number + 1) * n <= len(source) else 0
    return iter(dataset[first : first + n].to_iter_dataset(_reading(config)))


def fixed_batch(
    config: DataConfig, split: str, n: int, seed: int, skipped: SkippedImages | None = None
) -> dict[str, Float[np.ndarray, "N H W 3"] | Int[np.ndarray, " N"]]:
    """The same `n` images every time, for evaluation.

    Photographs: crop i shows class i % num_classes. Encoded held-out images: those and the order that
    the recipe they were encoded for would see. Other sources: `n` different images drawn from the
    split, but for those that stand in for unreadable ones, which go to `skipped`.

    Returns:
        {"image": float32 [n, H, W, 3] in [-1, 1], "condition": int32 [n]}, numpy, and of encoded
        images "tokens" int32 [n, T].

    Raises:
        DataError: n is not positive, or the split is smaller than n, or too much is unreadable.
    """
    samples = list(fixed_samples(config, split, n, seed, skipped))
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
