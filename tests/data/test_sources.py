"""A source of images of a user's own: one class in a file anywhere, and its name in the recipe."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.paths import ROOT
from vapi_jax.data import DataConfig, DataError, Source, class_names, fixed_batch, make_dataset
from vapi_jax.data.config import SOURCES
from vapi_jax.data.sources import source_class


class Stripes(Source):
    """Images of one grey value each, darker in the first half of the split."""

    class_names = ("dark", "bright")

    def __len__(self):
        return self.options.get("count", 20)

    def sample(self, index, rng):
        side, bright = self.config.image_size, 2 * index // len(self)
        image = np.full((side, side, 3), index / len(self) - 0.5, np.float32)
        return {"image": image, "condition": np.int32(bright)}


OWN = DataConfig(name=f"{__name__}:Stripes", image_size=4, options={"count": 30}, num_threads=0)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules["__main__"])


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_of_the_table_is_there(name):
    assert issubclass(source_class(name), Source)


def test_a_source_of_ones_own_runs_through_the_same_pipeline():
    assert class_names(OWN) == ("dark", "bright")
    batch = next(iter(make_dataset(OWN, "train", 30, seed=0)))
    assert sorted(np.rint(30 * (batch["image"][:, 0, 0, 0] + 0.5)).astype(int)) == list(range(30))
    np.testing.assert_array_equal(batch["condition"], batch["image"][:, 0, 0, 0] >= 0.0)
    # Its first images are all of one class, so held-out ones are drawn from all of them.
    assert set(fixed_batch(OWN, "val", 10, seed=0)["condition"]) == {0, 1}


class Told(Stripes):
    """With the line of metadata that each image satisfies."""

    def asked(self, index):
        return {"prompt": f"image {index}"}


class Mixed(Told):
    """The same, of which the first ones are as good as any."""

    mixed = True


def test_images_that_are_judged_by_their_place_are_held_out_in_their_order():
    own = dataclasses.replace(OWN, name=f"{__name__}:Told")
    with pytest.raises(DataError, match="Told'.*`asked`.*`mixed = True`.*'val'"):
        fixed_batch(own, "val", 10, seed=0)
    found = fixed_batch(dataclasses.replace(own, name=f"{__name__}:Mixed"), "val", 10, seed=0)
    assert np.rint(30 * (found["image"][:, 0, 0, 0] + 0.5)).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Source", "no_such_module"),
        (f"{__name__}:Missing", "Missing"),
        ("not a module:Source", "not a module"),
        ("dataclasses:dataclass", "no class derived from"),
    ],
)
def test_a_name_that_means_no_source_is_refused(name, message):
    with pytest.raises(DataError, match=f"data.name='{name}'.*{message}|{message}"):
        class_names(dataclasses.replace(OWN, name=name))


MODULE = """
import numpy as np
from vapi_jax.data import Source

class Noise(Source):
    class_names = ("noise",)

    def __len__(self):
        return self.options["count"]

    def sample(self, index, rng):
        image = rng.uniform(-1, 1, (self.config.image_size,) * 2 + (3,))
        return {"image": image.astype(np.float32), "condition": np.int32(0)}
"""


def test_the_command_finds_it_beside_the_recipe_that_names_it(tmp_path):
    (tmp_path / "my_data.py").write_text(MODULE)
    done = subprocess.run(
        [sys.executable, "-m", "vapi_jax.main", f"--config={ROOT}/configs/c2i_demo.py:tiny",
         "--check", "--json", "--config.data.name=my_data:Noise", "--config.data.options.count=77",
         "--config.policy.num_classes=12", "--config.data.classes=sorted"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    print(done.stderr)
    plan = json.loads(done.stdout)
    assert plan["data"]["classes"] == 1
    assert set(plan["data"]["images"].values()) == {77}
