"""What to read and how to cut it: the one configuration shared by every data source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.options import Count, Limits, Natural, Share
from vapi_jax.common.paths import PathText
from vapi_jax.data.images import PILLOW_PIXELS

SOURCES = {
    "photos": "vapi_jax.data.photos:PhotoSource",
    "image_folder": "vapi_jax.data.folder:FolderSource",
    "tfds": "vapi_jax.data.tfds_source:TfdsSource",
    "image_text": "vapi_jax.data.image_text.source:ImageTextSource",
    "scenes": "vapi_jax.data.scenes.source:SceneSource",
    "encoded": "vapi_jax.data.encoded:EncodedSource",
}
"""`data.name` -> where its class is; see `vapi_jax.data.sources`."""

SPLITS = ("train", "val", "test")

HoldOut = Annotated[float, Limits(0, 0.5, open_low=True)]
Pixels = Annotated[int, Limits(1, 2 * PILLOW_PIXELS)]  # Pillow reads nothing larger


class DataError(ExpectedError, ValueError):
    """Data that cannot be used as configured; the message says what was found and what to do."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, at what size, cropped how.

    Three splits exist everywhere: "train" to learn from, "val" to choose settings on and "test" for
    the final table. What they map to is said at each source.

    Attributes:
        name: "photos" (bundled photographs, no files needed), "image_folder", "tfds",
            "image_text" (images with captions), "scenes" (drawn shapes with captions, at 32 pixels or more,
            the same ones in every epoch), "encoded" (images and tokens that vapi_jax.encode
            dataset wrote), or a source of your own as "package.module:Class" (see vapi_jax.data.sources).
        image_size: side of the square images, in pixels.
        path: image_folder, image_text, encoded: the root folder, or one file of image_text. tfds: the
            data_dir, or a prepared version folder; empty means $TFDS_DATA_DIR or ~/tensorflow_datasets.
        dataset: tfds only: "name", "name/config" or "name/config:version", for example
            "imagenet2012", "cifar10", "imagenette/320px-v2".
        train_split, val_split, test_split: image_folder: sub-folder of `path`; tfds: a split, or
            a slice such as "train[:90%]". Empty means the source's usual name: "train"; "val"
            (image_folder) or "validation" (tfds); "test".
        classes: which label each class of the data gets. "imagenet", "demo", or a file: by name, the
            file holding the name of each label, one a line, or (JSON) an object name -> label. "numbers":
            classes are named by their labels. "sorted": the first class is label 0, and so on. Empty:
            found out from the generator that a run starts from, or an error; without one, "sorted".
        image_feature, label_feature: tfds only: names of the features to read.
        crop: "center" (ADM's centre crop) or "random" (ADM's random crop, training split only).
            Photographs are always cropped at random places.
        flip: mirror half of the training images left to right. Photographs: in every split, so that
            held-out crops have the distribution of the training crops.
        shuffle: visit the training split in a new random order every epoch.
        photo_min_scale, photo_max_scale: side of a photo crop, as a fraction of the photograph's
            short side, drawn uniformly between the two.
        photo_holdout: fraction of a photograph's longer side that is never trained on.
        photo_crops_per_class: crops of each photograph in one epoch.
        folder_holdout: image_folder and image_text without sub-folders for splits: fraction of every
            class, or of all images with captions, that is kept for val and test, half each.
        max_unreadable: share of the split's images that may be unreadable. Each is left out, listed,
            and its place taken by another image of the split; where there are more, a run stops.
        max_image_pixels: images with more pixels are not decoded but count as unreadable: a small
            file can hold an image that fills the memory.
        num_threads: threads that read and crop, 0 to work in the caller's thread. More threads than
            spare cores slow the trainer down.
        prefetch: batches prepared ahead.
        options: image_text: see `vapi_jax.data.image_text.source.Options`; scenes:
            `vapi_jax.data.scenes.source.Options`. A source of your own: what it wants beside all this.
    """

    name: str = "photos"
    image_size: Count = 32
    path: PathText = ""
    dataset: str = ""
    train_split: str = ""
    val_split: str = ""
    test_split: str = ""
    classes: PathText = ""
    image_feature: str = "image"
    label_feature: str = "label"
    crop: Literal["center", "random"] = "center"
    flip: bool = True
    shuffle: bool = True
    photo_min_scale: float = 0.3
    photo_max_scale: float = 0.45
    photo_holdout: HoldOut = 0.375
    photo_crops_per_class: Count = 1024
    folder_holdout: HoldOut = 0.1
    max_unreadable: Share = 0.01
    max_image_pixels: Pixels = PILLOW_PIXELS
    num_threads: Natural = 1
    prefetch: int = 4
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError with a line for everything that is wrong."""
        wrong = []
        if self.name not in SOURCES and ":" not in self.name:
            wrong.append(
                f"name must be one of {tuple(SOURCES)}, or 'package.module:Class' of your own, got "
                f"{self.name!r}"
            )
        if self.options and self.name in SOURCES and self.name not in ("image_text", "scenes"):
            wrong.append(
                "options are read by image_text, scenes and sources of your own, not by "
                f"{self.name!r}"
            )
        # Above one half, a crop would not fit into the val or the test half of the strip.
        if not 0.0 < self.photo_min_scale <= self.photo_max_scale <= 0.5:
            wrong.append(
                "photo scales must satisfy 0 < photo_min_scale <= photo_max_scale <= 0.5, got "
                f"{self.photo_min_scale} and {self.photo_max_scale}"
            )
        if self.prefetch < max(1, self.num_threads):
            wrong.append(
                f"prefetch must be at least max(1, num_threads), got num_threads={self.num_threads}, "
                f"prefetch={self.prefetch}"
            )
        if wrong:
            raise ValueError("\n".join(wrong))

    def source_split(self, split: str, usual: str) -> str:
        """The source's own name of `split`, or `usual` where the configuration names none."""
        return getattr(self, f"{check_split(split)}_split") or usual


def check_split(split: str) -> str:
    """Returns `split`. Raises ValueError unless it is "train", "val" or "test"."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return split
