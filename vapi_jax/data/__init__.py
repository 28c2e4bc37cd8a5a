"""Images and their classes as deterministic, checkpointable batches (grain)."""

from vapi_jax.data.config import DataConfig, DataError
from vapi_jax.data.pipeline import (
    class_names,
    classes_of,
    fixed_batch,
    fixed_samples,
    labels_of,
    make_dataset,
    num_classes,
)
from vapi_jax.data.skipping import SkippedImages
from vapi_jax.data.sources import Source

__all__ = [
    "DataConfig",
    "DataError",
    "SkippedImages",
    "Source",
    "class_names",
    "classes_of",
    "fixed_batch",
    "fixed_samples",
    "labels_of",
    "make_dataset",
    "num_classes",
]
