"""A folder of images is walked once, whatever asks for its classes, splits and images afterwards."""

import os
from collections import Counter

import pytest

from tests.helpers.image_folders import write_images
from tests.helpers.tiny import make_tiny_recipe
from vapi_jax.methods.resolve import resolve
from vapi_jax.training import plan
from vapi_jax.training.run import run


@pytest.fixture
def listed(monkeypatch):
    """How often each folder has been listed."""
    counts = Counter()
    for name in ("scandir", "listdir"):
        real = getattr(os, name)

        def counting(path=".", real=real):
            counts[str(path)] += 1
            return real(path)

        monkeypatch.setattr(os, name, counting)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "splits", [("train", "val"), ("",)], ids=["folders for splits", "one folder"]
)
def test_a_check_and_a_run_list_every_folder_once(tmp_path, listed, splits):
    folders = [tmp_path / "data" / split / name for split in splits for name in ("a", "b/deep")]
    for folder in folders:
        write_images(folder, 60)
    data = {"name": "image_folder", "path": str(tmp_path / "data"), "folder_holdout": 0.5}
    recipe = make_tiny_recipe(
        "base", data=data, eval={"images": 24, "every": 1}, policy={"num_classes": 2}
    )
    assert plan.check(recipe, str(tmp_path / "run")) == 0
    run(resolve(recipe), tmp_path / "run")
    counts = {path: n for path, n in listed.items() if path.startswith(f"{tmp_path}/data")}
    assert len(counts) >= 4 * len(splits) and set(counts.values()) == {1}
