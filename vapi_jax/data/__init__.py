"""Images and their classes as deterministic, checkpointable batches (grain)."""

from vapi_jax.data.config import DataConfig
from vapi_jax.data.pipeline import class_names, fixed_batch, make_dataset, num_classes

__all__ = ["DataConfig", "class_names", "fixed_batch", "make_dataset", "num_classes"]
