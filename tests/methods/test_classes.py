"""Labels mean the same to the data and to the generator, or a run does not begin."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.helpers.image_folders import write_images
from tests.helpers.messages import assert_mentions
from tests.helpers.tiny import make_tiny_config
from vapi_jax.common.options import Errors
from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.data import DataError, Source, class_names, classes_of, labels_of, make_dataset
from vapi_jax.data.encoded import finish_split, write_part
from vapi_jax.data.photos import PhotoSource
from vapi_jax.data.sources import Encoder
from vapi_jax.methods import make_method
from vapi_jax.methods.classes import class_names_of, with_classes
from vapi_jax.methods.generator import sized_policy
from vapi_jax.methods.resolve import resolve
from vapi_jax.models.classes import (
    SHIPPED,
    ClassesError,
    filled,
    read_class_list,
    write_class_list,
)
from vapi_jax.models.loading import load_weights
from vapi_jax.models.policies import make_policy
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.weights.names import WeightsError
from vapi_jax.weights.store import save_safetensors

POLICY = {"kind": "class", "dim": 32, "n_layer": 2, "n_head": 4, "multiple_of": 16}
IMAGENETTE = {
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
    "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip


def folders(root, names, count=4):
    for name in names:
        write_images(root / "train" / name, count)
        write_images(root / "val" / name, 2)
    return {"name": "image_folder", "path": str(root), "folder_holdout": 0.5, "image_size": 8}


def config_of(data, **changes):
    raw = make_tiny_config("base", data=data, **changes)
    policy = {name: value for name, value in raw.policy.items() if name != "num_classes"}
    return dataclasses.replace(raw, policy={**policy, **changes.get("policy", {})})


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """Gives a file with a generator of so many classes, drawn by numpy."""
    folder = tmp_path_factory.mktemp("generators")

    def make(classes):
        path = folder / f"{classes}.safetensors"
        if not path.exists():
            options = {**POLICY, "vocab_size": 16, "block_size": 16, "num_classes": classes}
            shapes = flatten(jax.eval_shape(make_policy(**options).init, jax.random.key(0)))
            rng = np.random.default_rng(0)
            drawn = {k: rng.normal(size=s.shape).astype(np.float32) for k, s in shapes.items()}
            save_safetensors(path, unflatten(drawn))
        return str(path)

    return make


def settle(config):
    errors = Errors()
    return with_classes(config, errors), errors


def batch_labels(config):
    batch = next(iter(make_dataset(config.data, "train", 64, 0)))
    return set(batch["condition"].tolist())


# Lists -------------------------------------------------------------------------------------------


def test_imagenets_ids_are_in_the_order_of_their_labels():
    names = read_class_list("imagenet").names
    assert len(set(names)) == len(names) == 1000
    assert list(names) == sorted(names)
    assert [names[label] for label in IMAGENETTE.values()] == list(IMAGENETTE)
    assert names[999] == "n15075141"
    assert read_class_list("demo").names == PhotoSource.class_names
    assert SHIPPED == ("imagenet", "imagenet_words", "demo")


def test_a_list_is_read_as_it_was_written(tmp_path):
    names = ("a cat", "café", "b\udcff", "12")
    write_class_list(tmp_path / "classes.txt", names)
    assert read_class_list(tmp_path / "classes.txt").names == names
    assert filled(names, 6) == (*names, "4", "5")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lists_of_other_programs_are_read(tmp_path, newline):
    path = tmp_path / "list.txt"
    path.write_bytes(newline.join(["\ufeffcrane", " owl", "crane", "", ""]).encode())
    found = read_class_list(path)
    assert found.names == ("crane", "owl", "crane")
    assert found.labels == {"owl": 1}, "a name of two labels is the name of none"
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({"cat": 3, "tabby": 3, "dog": 0}))
    found = read_class_list(mapping)
    assert found.labels == {"cat": 3, "tabby": 3, "dog": 0}
    assert found.names == ("dog", "1", "2", "cat")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"", "a.txt"),
        ("a.txt", b"one\n\nthree\n", "line 2"),
        ("a.json", b'["a"]', "a.json"),
        ("a.json", b'{"a": "1"}', "'a'"),
        ("a.json", b'{"a": -1}', "-1"),
        ("a.json", b'{"a": true}', "True"),
        ("a.json", b"{}", "a.json"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ClassesError, match=told):
        read_class_list(tmp_path / name)
    with pytest.raises(ClassesError, match="gone"):
        read_class_list(tmp_path / "gone.txt")


# Data against generator --------------------------------------------------------------------------


class Ids(Source):
    """A source that is no folder, and names its classes by ids."""

    class_names = tuple(IMAGENETTE)

    def __len__(self):
        return 10

    def sample(self, index, rng):
        size = self.config.image_size
        image = np.zeros((size, size, 3), np.float32)
        return {"image": image, "condition": np.int32(index)}


@pytest.mark.parametrize("kind", ["folders", "source of one's own"])
def test_ids_are_the_labels_of_imagenet(tmp_path, generator, kind):
    own = {"name": f"{__name__}:Ids", "image_size": 8}
    data = folders(tmp_path, IMAGENETTE) if kind == "folders" else own
    config, errors = settle(config_of(data, init={"gpt": generator(1000)}))
    assert errors == []
    assert (config.data.classes, config.policy["num_classes"]) == ("imagenet", 1000)
    assert classes_of(config.data).by_name == IMAGENETTE
    assert batch_labels(config) == set(IMAGENETTE.values()) == set(labels_of(config.data).tolist())
    assert class_names(config.data)[217] == "n02102040"


def test_images_that_were_encoded_keep_their_names_until_a_run_reads_them(tmp_path, generator):
    rows = len(IMAGENETTE)
    batch = {
        "image": np.zeros((rows, 8, 8, 3), np.float32),
        "condition": np.arange(rows),
        "tokens": np.zeros((rows, 16), np.int32),
    }
    write_part(tmp_path / "train" / "00000", [batch])
    facts = {"encoder": Encoder("0", "float32"), "class_names": tuple(IMAGENETTE), "more": {}}
    finish_split(tmp_path / "train", 1, count=rows, **facts)
    data = {"name": "encoded", "path": str(tmp_path), "image_size": 8}
    config, errors = settle(config_of(data, init={"gpt": generator(1000)}))
    assert (errors, config.data.classes) == ([], "imagenet")
    assert batch_labels(config) == set(IMAGENETTE.values())


def test_a_generator_of_a_thousand_classes_from_scratch_takes_them_too(tmp_path):
    config, errors = settle(config_of(folders(tmp_path, IMAGENETTE), policy={"num_classes": 1000}))
    assert (errors, config.data.classes) == ([], "imagenet")


@pytest.mark.parametrize("width", [1, 4])
def test_numbers_are_labels(tmp_path, generator, width):
    names = [f"{label:0{width}d}" for label in range(12)]
    data = folders(tmp_path, names)
    for init in ({}, {"gpt": generator(12)}):
        config, errors = settle(config_of(data, init=init))
        assert (errors, config.data.classes) == ([], "numbers")
        assert classes_of(config.data).by_name == {name: int(name) for name in names}
        assert batch_labels(config) == set(range(12))


def test_numbers_that_are_no_labels_are_refused(tmp_path, generator):
    data = folders(tmp_path, [str(number) for number in range(1, 13)])
    _, (line,) = settle(config_of(data, init={"gpt": generator(12)}))
    assert_mentions(line, "data.classes='numbers'", "label 12", "0 to 11", "init.classes='new'")
    twice = folders(tmp_path / "b", ["1", "01"])
    _, (line,) = settle(config_of({**twice, "classes": "numbers"}))
    assert_mentions(line, "data.classes='numbers'", "1")
    config, errors = settle(config_of(data))
    assert (errors, config.data.classes) == ([], "sorted"), "from scratch any order will do"
    assert classes_of(config.data).by_name["10"] == 9


@pytest.mark.parametrize("count", [2, 12])
def test_any_other_names_are_refused_with_what_they_would_be(tmp_path, generator, count):
    names = [f"thing {i:02d}" for i in range(count)]
    path = generator(12)
    _, (line,) = settle(config_of(folders(tmp_path, names), init={"gpt": path}))
    assert line.startswith("data.classes='': ")
    assert_mentions(
        line, path, "thing 00 = 0, thing 01 = 1", "data.classes=sorted", "init.classes=new"
    )
    _, (line,) = settle(
        config_of(
            folders(tmp_path / "b", ["N01440764", "n02102040"]), init={"gpt": generator(1000)}
        )
    )
    assert_mentions(line, "1 of 2", "imagenet", "'N01440764'", "'n01440764'?")
    data = {**folders(tmp_path, names), "classes": "sorted"}
    config, errors = settle(config_of(data, init={"gpt": path}))
    assert (errors, config.policy["num_classes"]) == ([], 12)
    assert class_names_of(config) == filled(names, 12)


def test_own_classes_get_fresh_rows_and_keep_the_rest(tmp_path, generator):
    names = [f"thing {i}" for i in range(3)]
    init = {"gpt": generator(12), "classes": "new"}
    config, errors = settle(
        config_of(folders(tmp_path, names), init=init, policy={"num_classes": 12})
    )
    assert (errors, config.policy["num_classes"]) == ([], 3)
    method = make_method(config, make_mesh(1, 1, jax.devices()[:1]))
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    table = "cls_embedding/embedding"
    kept = make_policy(
        **sized_policy(dataclasses.replace(config, policy={**config.policy, "num_classes": 12}))
    )
    old_source = dataclasses.replace(method.init_from, config=kept.config, classes=None)
    old = flatten(load_weights(old_source, jax.eval_shape(kept.init, jax.random.key(0))))
    new = flatten(load_weights(method.init_from, shapes))
    assert new[table].shape == (4, 32)
    np.testing.assert_array_equal(new[table][-1], old[table][-1])
    assert not np.isclose(new[table][:3, None], old[table][None, :12]).all(-1).any()
    assert abs(new[table][:3].std() - old[table].std()) < 0.3
    again = flatten(load_weights(method.init_from, shapes))
    for name, value in new.items():
        np.testing.assert_array_equal(value, again[name])
        if name != table:
            np.testing.assert_array_equal(value, old[name])
    seeded = dataclasses.replace(method, config=dataclasses.replace(config, seed=9))
    assert not np.array_equal(flatten(load_weights(seeded.init_from, shapes))[table], new[table])


def test_fresh_rows_want_a_generator(tmp_path):
    data = folders(tmp_path, ["a", "b"])
    _, (line,) = settle(config_of(data, init={"classes": "new"}))
    assert_mentions(line, "init.classes='new'", "init.gpt=''")


def test_a_class_count_that_the_weights_lack_is_refused_with_the_remedy(tmp_path, generator):
    data = folders(tmp_path, ["a", "b"])
    init = {"gpt": generator(12)}
    _, (line,) = settle(config_of(data, init=init, policy={"num_classes": 2}))
    assert_mentions(line, "policy.num_classes=2", "12 classes", "init.classes='new'")


def test_labels_can_be_told_by_a_file(tmp_path, generator):
    data = folders(tmp_path / "data", ["cat", "dog"])
    text, mapping = tmp_path / "names.txt", tmp_path / "map.json"
    text.write_text("bird\ncat\ncow\ndog\n")
    mapping.write_text(json.dumps({"dog": 3, "cat": 1}))
    for file in (text, mapping):
        told = {**data, "classes": str(file)}
        config, errors = settle(config_of(told, init={"gpt": generator(12)}))
        assert errors == []
        assert classes_of(config.data).by_name == {"cat": 1, "dog": 3}
        assert batch_labels(config) == {1, 3}
    text.write_text("bird\ncat\ncow\ndogs\n")
    _, (line,) = settle(config_of({**data, "classes": str(text)}, init={"gpt": generator(12)}))
    assert_mentions(line, f"data.classes='{text}'", "'dog'", "'dogs'?")
    _, (line,) = settle(config_of({**data, "classes": "imagenet"}, init={"gpt": generator(1000)}))
    assert_mentions(line, "data.classes='imagenet'", "2 of 2", "'cat'")


def test_classes_may_be_empty_where_labels_do_not_depend_on_them(tmp_path, generator):
    data = folders(tmp_path, IMAGENETTE)
    for image in (tmp_path / "train" / "n02102040").iterdir():
        image.unlink()
    config, errors = settle(config_of(data, init={"gpt": generator(1000)}))
    assert errors == []
    assert batch_labels(config) == set(IMAGENETTE.values()) - {217}
    with pytest.raises(DataError, match="n02102040"):
        next(iter(make_dataset(config_of(data).data, "train", 4, 0)))


@pytest.mark.parametrize("where", ["run", "file of a run", "conversion"])
def test_a_list_beside_the_weights_is_the_generators(tmp_path, generator, where):
    run = tmp_path / "run"
    (run / "weights").mkdir(parents=True)
    with open(generator(12), "rb") as file:
        (run / "weights" / "policy.safetensors").write_bytes(file.read())
    names = ["dog", "cat", *(f"other {i}" for i in range(10))]
    write_class_list(run / "classes.txt", names)
    path = str(run if where == "run" else run / "weights" / "policy.safetensors")
    if where == "conversion":
        path = str(run)
        (run / "config.json").write_text(json.dumps({"gpt": {"num_classes": 12}}))
        (run / "manifest.json").write_text("{}")
    config, errors = settle(
        config_of(folders(tmp_path / "data", ["cat", "dog"]), init={"gpt": path})
    )
    assert (errors, config.data.classes) == ([], str(run / "classes.txt"))
    assert classes_of(config.data).by_name == {"cat": 1, "dog": 0}


def test_the_shipped_generator_knows_its_photographs():
    config, errors = settle(
        resolve({"name": "x", "method": "base", "policy": POLICY, "init": {"gpt": "demo"}})
    )
    assert (errors, config.data.classes, config.policy["num_classes"]) == ([], "demo", 12)


def test_methods_and_conditions_without_labels_have_nothing_to_settle(tmp_path):
    data = folders(tmp_path, ["a", "b"])
    for config in (
        make_tiny_config("tokenizer", image_size=16, policy={"kind": ""}),
        make_tiny_config("base", data=data, policy={"kind": "text"}, condition={"name": "caption"}),
    ):
        assert settle(config) == (config, [])


def test_weights_without_a_table_of_classes_are_told(tmp_path, generator):
    bare = tmp_path / "bare.safetensors"
    save_safetensors(bare, {"norm": {"scale": np.ones(32, np.float32)}})
    data = folders(tmp_path, ["a", "b"])
    config, errors = settle(config_of(data, init={"gpt": str(bare), "classes": "new"}))
    assert errors == []
    method = make_method(config, make_mesh(1, 1, jax.devices()[:1]))
    with pytest.raises(WeightsError, match="bare"):
        load_weights(method.init_from, jax.eval_shape(method.init, jax.random.key(0)))
