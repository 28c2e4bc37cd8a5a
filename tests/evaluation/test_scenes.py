"""Drawn scenes: what is held out, that captions are true of them, and that the detector sees so."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from vapi_jax import score
from vapi_jax.common.images import to_uint8
from vapi_jax.common.recipes import load_recipe
from vapi_jax.data.config import SPLITS, DataConfig, DataError
from vapi_jax.data.pipeline import fixed_samples
from vapi_jax.data.scenes.drawing import COLORS, SHAPES, Thing, draw
from vapi_jax.data.scenes.grammar import (
    TASKS,
    Scene,
    coloring_split,
    combinations,
    make,
    prompts,
    read,
)
from vapi_jax.data.scenes.source import SceneSource
from vapi_jax.evaluation.samples import asked_of
from vapi_jax.evaluation.scene_scores import SceneJudge, scene_judge
from vapi_jax.methods.resolve import resolve
from vapi_jax.rewards import geneval
from vapi_jax.rewards.geneval import judge, parse_prompt
from vapi_jax.rewards.scenes import detect

SCENES = 240
SIDES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def source(side: int = 64, split: str = "train", **options: int) -> SceneSource:
    return SceneSource(
        DataConfig(name="scenes", image_size=side, flip=False, options=options), split
    )


def pixels(scenes: SceneSource, index: int) -> np.ndarray:
    image = scenes.sample(index, np.random.default_rng())["image"]
    return np.uint8(np.round((image + 1) * 127.5))


def right(scene: Scene, image: np.ndarray) -> bool:
    return judge(parse_prompt(scene.metadata, ""), detect(image)).correct


def jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file))


def blur(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.6)))


def noise(image: np.ndarray) -> np.ndarray:
    dirt = np.random.default_rng(int(image.sum())).normal(0, 8, image.shape)
    return np.clip(image + dirt, 0, 255)


def test_names_are_genevals():
    assert TASKS == geneval.TASKS
    assert tuple(COLORS) == geneval.COLORS


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize(
    ("change", "least"), [(np.array, 0.995), (noise, 0.99), (blur, 0.99), (jpeg, 0.88)]
)
def test_true_scenes_are_right(side, change, least):
    scenes = source(side)
    good = [right(scenes.scene(i)[0], change(pixels(scenes, i))) for i in range(SCENES)]
    assert np.mean(good) >= least


def test_detector_finds_every_thing_and_its_place():
    scenes = source()
    for index in range(60):
        things = scenes.scene(index)[0].things
        found = detect(pixels(scenes, index))
        told = [
            (name, color, *((box[:2] + box[2:4]) / 128))
            for name, objects in found.items()
            for box, color in zip(objects.boxes, objects.colors, strict=True)
        ]
        assert len(told) == len(things)
        for thing in things:
            assert any(
                (thing.shape, thing.color) == told[:2]
                and np.hypot(thing.x - told[2], thing.y - told[3]) < 0.05
                for told in told
            )


def picture(things, index) -> np.ndarray:
    return draw(things, 64, np.random.default_rng(index))


@pytest.mark.parametrize("task", TASKS)
def test_a_change_makes_a_scene_wrong(task):
    for index in range(12):
        scene = make(task, SPLITS[index % 3], np.random.default_rng([index, 3]))
        things = scene.things
        assert right(scene, picture(things, index))
        assert not right(scene, picture(things[1:], index))
        if task in ("colors", "color_attr"):
            other = "red" if things[0].color != "red" else "blue"
            changed = dataclasses.replace(things[0], color=other)
            assert not right(scene, picture((changed, *things[1:]), index))
        if task == "position":
            turned = [Thing(t.shape, t.color, 1 - t.x, 1 - t.y, t.radius) for t in things]
            assert not right(scene, picture(turned, index))


def test_one_too_many_is_wrong():
    scene = make("counting", "test", np.random.default_rng(0))
    lot = [
        Thing(scene.things[0].shape, "red", x, y, 0.12)
        for x in (0.2, 0.5, 0.8)
        for y in (0.25, 0.7)
    ]
    count = scene.metadata["include"][0]["count"]
    assert right(scene, picture(lot[:count], 0))
    assert not right(scene, picture(lot[: count + 1], 0))


def test_a_mirror_swaps_left_and_right():
    swap = {**SIDES, "above": "above", "below": "below"}
    for index in range(24):
        scene = make("position", "train", np.random.default_rng(index))
        mirrored = json.loads(json.dumps(scene.metadata))
        place = mirrored["include"][1]["position"]
        place[0] = swap[place[0]]
        image = picture(scene.things, index)[:, ::-1]
        assert right(Scene(scene.things, mirrored), image)


def told_alone(line: dict) -> tuple | None:
    """The combination that a caption tells and nothing more; none of single_object and color_attr."""
    tag, include = line["tag"], line["include"]
    colored = "color" in include[0]
    if tag == "colors":
        return tag, (include[0]["class"], include[0]["color"])
    if tag == "counting" and not colored:
        return tag, (include[0]["class"], include[0]["count"])
    if tag == "two_object":
        return tag, tuple(sorted((c["class"] for c in include), key=list(SHAPES).index))
    if tag == "position" and not colored:
        b, a = (c["class"] for c in include)
        side = include[1]["position"][0]
        first = list(SHAPES).index(a) < list(SHAPES).index(b)
        return tag, (a, side, b) if first else (b, SIDES[side], a)
    return None


def test_no_training_caption_tells_a_held_out_combination_and_nothing_more():
    """Yet each is shown: what no picture had could not be drawn."""
    dealt = {
        (task, c): split
        for task in ("counting", "colors", "two_object", "position")
        for split, rows in combinations(task).items()
        for c in rows
    }
    scenes, told, painted, shown = source(), set(), set(), set()
    for index in range(6000):
        scene = scenes.scene(index)[0]
        told |= {told_alone(scene.metadata)} - {None}
        painted |= {(t.shape, t.color) for t in scene.things}
        if len({t.shape for t in scene.things}) == 2:
            a, b = [(t.shape, t.color) for t in scene.things]
            assert coloring_split(a, b) == "train"
            shown.add(tuple(sorted((a[0], b[0]))))
        else:
            shown.add((scene.things[0].shape, len(scene.things)))
    assert told == {c for c, split in dealt.items() if split == "train"}
    assert (len(painted), len(shown)) == (80, 28 + 8 * 4)


def test_held_out_captions_tell_held_out_combinations_and_nothing_more():
    for number, task in enumerate(("counting", "colors", "two_object", "position")):
        for split in ("val", "test"):
            lines = [make(task, split, np.random.default_rng([number, i])) for i in range(200)]
            told = {told_alone(scene.metadata) for scene in lines}
            assert told == {(task, c) for c in combinations(task)[split]}


def test_things_stand_on_a_lattice_and_apart():
    scenes = source()
    for index in range(600):
        things = scenes.scene(index)[0].things
        cells = np.array([(8 * thing.x - 0.5, 8 * thing.y - 0.5) for thing in things])
        np.testing.assert_array_equal(cells, np.clip(np.rint(cells), 1, 6))
        i, j = np.triu_indices(len(things), 1)
        assert (abs(cells[i] - cells[j]).max(1) >= 3).all()


def test_half_of_the_training_captions_of_numbers_and_sides_name_colours():
    for task in ("counting", "position"):
        for split, share in (("train", 0.5), ("val", 0.0), ("test", 0.0)):
            made = [make(task, split, np.random.default_rng([3, i])).metadata for i in range(400)]
            named = [all("color" in clause for clause in line["include"]) for line in made]
            assert np.mean(named) == pytest.approx(share, abs=0.1)


def test_sets_of_real_scenes_have_none_in_common():
    config = source(images=40).config
    sets = [
        {
            sample["image"].tobytes()
            for sample in fixed_samples(config, "train", 15, 7, number=number)
        }
        for number in range(3)
    ]
    assert not sets[0] & sets[1]
    assert sets[2] == sets[0]  # there are no more


def test_a_caption_is_read_back_as_the_line_that_it_was_made_from():
    for number, task in enumerate(TASKS):
        for index in range(150):
            line = make(task, SPLITS[index % 3], np.random.default_rng([number, index])).metadata
            assert read(line["prompt"]) == line
    for text in ("a horse", "a red", "two ring", "a ring and", "a photo of a ring ", "five rings"):
        with pytest.raises(DataError, match=text):
            read(text)


@pytest.mark.parametrize("task", ["two_object", "counting", "colors", "position", "color_attr"])
def test_prompts_of_splits_are_disjoint(task):
    texts = [{p["prompt"] for p in prompts(split, 20) if p["tag"] == task} for split in SPLITS[1:]]
    assert all(texts)
    assert not texts[0] & texts[1]


def test_samples_follow_from_seed_and_index():
    a, b = source(images=50), source(images=50)
    assert len(a) == 50
    b.sample(3, np.random.default_rng(1))
    np.testing.assert_array_equal(pixels(a, 7), pixels(b, 7))
    assert (pixels(a, 7) != pixels(source(seed=1), 7)).any()
    assert (pixels(a, 7) != pixels(source(split="val"), 7)).any()
    # The same scene at another size.
    assert a.scene(7)[0] == source(32).scene(7)[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"flip": True}, "flip"), ({"image_size": 16}, "16"), ({"options": {"imges": 3}}, "imges")],
)
def test_bad_options_are_named(change, named):
    config = DataConfig(**{"name": "scenes", "image_size": 32, "flip": False, **change})
    with pytest.raises(DataError, match=named):
        SceneSource(config, "train")


@pytest.fixture
def folder(tmp_path):
    """Images of scenes, the second of every task with nothing on it, and their metadata."""
    lines = []
    for index in range(12):
        scene = make(TASKS[index // 2], "test", np.random.default_rng([index, 5]))
        lines.append(json.dumps(scene.metadata))
        folder = tmp_path / f"images/{index:05}/samples"
        folder.mkdir(parents=True)
        # The second of every task has nothing on it.
        shown = picture(scene.things if index % 2 == 0 else (), index)
        Image.fromarray(np.uint8(np.round(shown))).save(folder / "0000.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def command(folder: Path, *more: str) -> int:
    return score.main([
        "scenes", f"--images={folder / 'images'}", f"--metadata={folder / 'metadata.jsonl'}",
        f"--out={folder / 'scores.jsonl'}", *more,
    ])  # fmt: skip


def test_command_scores_a_folder(folder, capsys):
    out = folder / "scores.jsonl"
    (folder / "images/recipe.json").write_text('{"sampling": {"top_k": 5}}')
    assert command(folder) == 0
    told = capsys.readouterr().out
    assert "published" not in told and "warning" not in told
    tasks = json.loads(out.with_suffix(".json").read_text())["scores"]["tasks"]
    assert {name: estimate["value"] for name, estimate in tasks.items()} == dict.fromkeys(
        [*TASKS, "overall"], 0.5
    )
    (folder / "images/00003/samples/0000.png").unlink()
    assert command(folder) != 0
    assert command(folder, "--allow_incomplete") == 0


def saved(side: tuple[int, int], place: str):
    def save(folder: Path) -> None:
        path = folder / "images" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", side).save(path)

    return save


def first_line(folder: Path, **change: object) -> str:
    line = json.loads((folder / "metadata.jsonl").read_text().splitlines()[0])
    return json.dumps({**line, **change})


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (saved((64, 64), "0copy/samples/0000.png"), "0copy/samples/0000.png is no image such as"),
        (saved((64, 64), "1_0/samples/0000.png"), "1_0/samples/0000.png is no image such as"),
        (saved((64, 64), "00000/samples/0000 (copy).png"), r"0000 (copy).png is no image such as"),
        (saved((64, 64), "00012/samples/0000.png"), "prompt 12, and the metadata 12 prompts"),
        (saved((16, 16), "00000/samples/0000.png"), "16x16 pixels; scenes are square"),
        (saved((64, 32), "00000/samples/0000.png"), "64x32 pixels"),
        (
            lambda f: (f / "images/00000/metadata.jsonl").write_text(first_line(f, prompt="a dog")),
            "prompt 0 were drawn for 'a dog', and --metadata asks for 'a photo",
        ),
        (
            lambda f: (f / "images/prompts.jsonl").write_text('{"prompt": "a dog", "fed": ""}'),
            "prompt 0 were drawn for 'a dog'",
        ),
        (
            lambda f: (f / "metadata.jsonl").write_text(
                first_line(f, include=[{"class": "dog", "count": 1}])
            ),
            "prompt 0 asks for 'dog', and scenes are of circle",
        ),
    ],
)  # fmt: skip
def test_what_is_no_folder_of_scenes_for_its_metadata_is_refused(folder, spoil, named, capsys):
    spoil(folder)
    assert command(folder) == 1
    told = capsys.readouterr().err
    assert named in told and len(told.splitlines()) == 1
    assert [path.name for path in folder.iterdir() if path.name.startswith("scores")] == []


def test_what_the_sampler_left_beside_its_images_agrees(folder):
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    for number, line in enumerate(lines):
        (folder / f"images/{number:05}/metadata.jsonl").write_text(line)
    texts = [json.dumps({"prompt": json.loads(line)["prompt"]}) for line in lines]
    (folder / "images/prompts.jsonl").write_text("\n".join(texts))
    assert command(folder) == 0
    assert command(folder, f"--out={folder / 'metadata.jsonl'}") == 1


def test_a_runs_judge_scores_true_scenes_and_tells_them_from_others():
    judge = SceneJudge(source(), 48)
    true: list = []
    others: list = []
    for numbers, images in judge.drawn(32):
        true += judge.judge(numbers, to_uint8(images), 0)
        others += judge.judge(numbers, to_uint8(np.roll(images, 1, axis=0)), 0)
    scores = judge.scores(true)
    assert list(scores) == [*TASKS, "overall"]
    assert scores["overall"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    same, worse = judge.change(true, true), judge.change(others, true)
    assert set(same["overall"].values()) == {0.0}
    assert worse["overall"]["high"] < 0.0
    # Scenes that are told alike are one prompt; samples of a second turn are others of the same.
    assert len({image.prompt for image in true}) == len({p["prompt"] for p in told(48)}) < 48
    again = judge.judge(range(48, 50), np.zeros((2, 64, 64, 3), np.uint8), 1)
    assert [image.prompt for image in again] == [image.prompt for image in true[:2]]
    assert len({(image.prompt, image.sample) for image in true + again}) == 50


def told(count: int) -> list[dict]:
    return [source().asked(index) for index in range(count)]


def test_other_data_are_not_judged_as_scenes():
    recipe = load_recipe("configs/demo_base.py", "demo_base").get_config("tiny")
    assert scene_judge(resolve(recipe)) is None


def test_samples_are_asked_for_held_out_captions_where_data_have_no_classes():
    recipe = load_recipe("configs/demo_base.py", "demo_base").get_config("tiny")
    photos = resolve(recipe)
    np.testing.assert_array_equal(asked_of(photos, 5), np.arange(12))
    data = DataConfig(name="scenes", flip=False)
    config = dataclasses.replace(photos, data=data)
    held = SceneSource(data, config.eval.split)
    assert asked_of(config, 5).tolist() == [held.asked(i)["prompt"] for i in range(5)]
