"""Images of a data set as PNG files, to evaluate samples against."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vapi_jax.common.files import new_folder
from vapi_jax.common.images import to_uint8
from vapi_jax.common.progress import ProgressBar
from vapi_jax.data.config import DataConfig
from vapi_jax.data.pipeline import fixed_samples


def write_images(config: DataConfig, split: str, num: int, seed: int, out: Path) -> None:
    """Writes the images of `fixed_batch` as `out`/000000.png and so on.

    Args:
        config: where the images come from, and their size.
        split: "train", "val" or "test".
        num: how many; at most as many as the split has.
        seed: of their choice and of random crops.
        out: must not exist; appears when complete.

    Raises:
        FolderExistsError: if `out` exists.
        DataError: if there are fewer images, or too many cannot be read.
    """
    with new_folder(out) as folder, ProgressBar(num, f"images of {split}") as progress:
        for number, sample in enumerate(fixed_samples(config, split, num, seed)):
            Image.fromarray(to_uint8(sample["image"])).save(folder / f"{number:06d}.png")
            progress.update(number + 1, 1)
