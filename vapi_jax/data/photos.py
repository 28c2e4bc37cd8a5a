"""Class-conditional crops of photographs that come with scikit-image and scikit-learn.

No file has to be downloaded: the twelve photographs below are inside the installed packages (ten in
colour, two grey), and each is one class. Sources and licences as those packages document them:

- astronaut: Eileen Collins. NASA Great Images, no known restrictions, public domain.
- camera: a photographer at work, grey. CC0 by the photographer, Lav Varshney.
- chelsea: a cat. CC0 by the photographer, Stefan van der Walt.
- china: a Chinese pagoda. CC BY 2.0, danielbuechele on flickr (6061409035).
- coffee: a cup of coffee. CC0 by the photographer, Rachel Michetti; courtesy of Pikolo
  Espresso Bar.
- coins: Greek coins from Pompeii, grey. Brooklyn Museum, no known copyright restrictions.
- flower: a dahlia. CC BY 2.0, vultilion on flickr (6056698931).
- hubble: Hubble eXtreme Deep Field. NASA, HubbleSite, public domain.
- ihc: stained colonic glands under a microscope. CMMI, no known copyright restrictions.
- motorcycle: left image of a stereo pair. Middlebury 2014 stereo benchmark, Scharstein et al., GCPR
  2014; no terms stated.
- retina: fundus of a left eye. CC0, Mikael Häggström, WikiJournal of Medicine 1 (2), 2014.
- rocket: DSCOVR on a Falcon 9. SpaceX, public domain.

They are few and small (300 to 1411 pixels on the short side): enough to show that a method works,
far too little for a model that is of use elsewhere.

Every photograph is cut once across its longer side. Its right end (`photo_holdout` of the width, or
the largest crop where that is wider) is never trained on: the upper half of that strip gives the
"val" crops and the lower half the "test" crops, so the three splits of a class show different
things. A source keeps the pixels of its own region only, so no crop, and no filter of a resize, can
reach into another split.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vapi_jax.data.config import DataConfig, DataError, check_split
from vapi_jax.data.sources import Source
from vapi_jax.data.transforms import random_flip, to_array

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom excluded


@dataclasses.dataclass(frozen=True)
class Photo:
    """A bundled photograph: class name, the package that brings it, the file inside the package."""

    name: str
    package: str
    file: str


PHOTOS = (
    Photo("astronaut", "skimage", "data/astronaut.png"),
    Photo("camera", "skimage", "data/camera.png"),
    Photo("chelsea", "skimage", "data/chelsea.png"),
    Photo("china", "sklearn", "datasets/images/china.jpg"),
    Photo("coffee", "skimage", "data/coffee.png"),
    Photo("coins", "skimage", "data/coins.png"),
    Photo("flower", "sklearn", "datasets/images/flower.jpg"),
    Photo("hubble", "skimage", "data/hubble_deep_field.jpg"),
    Photo("ihc", "skimage", "data/ihc.png"),
    Photo("motorcycle", "skimage", "data/motorcycle_left.png"),
    Photo("retina", "skimage", "data/retina.jpg"),
    Photo("rocket", "skimage", "data/rocket.jpg"),
)
_PIP_NAMES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def load_photo(photo: Photo) -> Image.Image:
    """Reads a photograph as RGB.

    Raises:
        DataError: the package that bundles it is not installed, or its installed version
            does not bundle the file.
    """
    # find_spec locates a package without importing it: importing scikit-learn takes seconds.
    spec = importlib.util.find_spec(photo.package)
    pip_name = _PIP_NAMES.get(photo.package, photo.package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the photograph {photo.name!r} comes with {pip_name}, which is not installed: "
            f"pip install {pip_name}"
        )
    path = pathlib.Path(spec.submodule_search_locations[0]) / photo.file
    if not path.is_file():
        raise DataError(
            f"the photograph {photo.name!r} is not bundled in the installed {pip_name} ({path}); "
            "scikit-image 0.26 and scikit-learn 1.9 have it"
        )
    with Image.open(path) as image:
        return image.convert("RGB")


def crop_sides(size: tuple[int, int], config: DataConfig) -> tuple[int, int]:
    """Smallest and largest crop side in pixels, both included, for a size of (width, height)."""
    short = min(size)
    # Rounded down, so that half of an odd height still fits into the val and the test half.
    smallest = max(1, math.floor(config.photo_min_scale * short))
    return smallest, max(smallest, math.floor(config.photo_max_scale * short))


def split_box(size: tuple[int, int], split: str, config: DataConfig) -> Box:
    """The region of a photograph that belongs to a split.

    Args:
        size: (width, height) of the photograph, width >= height.
        split: "train", "val" or "test".
        config: photo_holdout and photo_max_scale are read.

    Returns:
        A box that holds the largest crop. The boxes of the three splits share no pixel.

    Raises:
        ValueError: the photograph is taller than wide, or `split` unknown.
    """
    check_split(split)
    width, height = size
    if width < height:
        raise ValueError(f"a photograph must not be taller than wide, got {width}x{height}")
    largest = crop_sides(size, config)[1]
    strip = max(round(config.photo_holdout * width), largest)
    middle = height // 2
    return {
        "train": (0, 0, width - strip, height),
        "val": (width - strip, 0, width, middle),
        "test": (width - strip, middle, width, height),
    }[split]


def draw_crop(size: tuple[int, int], sides: tuple[int, int], rng: np.random.Generator) -> Box:
    """A square of random side and place inside a region of (width, height)."""
    width, height = size
    side = int(rng.integers(sides[0], sides[1] + 1))
    left = int(rng.integers(width - side + 1))
    top = int(rng.integers(height - side + 1))
    return left, top, left + side, top + side


class PhotoSource(Source):
    """Random crops of the photographs: index i is a crop of class i % num_classes.

    Where a crop is smaller than `image_size` it is enlarged, which happens above 90 pixels at the
    default scales: the photographs hold no more detail.

    Args:
        config: see DataConfig.
        split: "train", "val" or "test".
        images: the photographs, in the order of PHOTOS; read from the installed packages if None.
    """

    class_names = tuple(photo.name for photo in PHOTOS)
    mixed = True

    @classmethod
    def read_class_names(cls, config: DataConfig) -> tuple[str, ...]:
        return cls.class_names

    def __init__(
        self, config: DataConfig, split: str, images: Sequence[Image.Image] | None = None
    ) -> None:
        super().__init__(config, split)
        self._sides = []
        self._regions = []
        if images is None:
            images = [load_photo(photo) for photo in PHOTOS]
        for image in images:
            self._sides.append(crop_sides(image.size, config))
            self._regions.append(image.crop(split_box(image.size, split, config)))

    def __len__(self) -> int:
        return len(PHOTOS) * self.config.photo_crops_per_class

    def name(self, index: int) -> str:
        return f"a crop of {PHOTOS[index % len(PHOTOS)].name}"

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        label = int(index) % len(PHOTOS)
        region, size = self._regions[label], self.config.image_size
        # Cut first, resize after: PIL's resize(box=...) lets its filter reach outside the box.
        # reducing_gap averages whole pixels first, for speed, where a crop is many times too large.
        crop = region.crop(draw_crop(region.size, self._sides[label], rng))
        crop = crop.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
        if self.config.flip:
            crop = random_flip(crop, rng)
        return {"image": to_array(crop), "condition": np.asarray(label, np.int32)}
