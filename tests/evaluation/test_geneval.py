"""GenEval: the rules one by one, the table from verdicts, and files that are somebody else's."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.generation.test_protocols import OF_PROMPTS
from vapi_jax import score as door
from vapi_jax.evaluation.geneval_files import Image, judge_file, read_prompts
from vapi_jax.evaluation.geneval_scores import check_complete, difference, score
from vapi_jax.rewards.geneval import (
    TASKS,
    Clause,
    GenevalError,
    Objects,
    Prompt,
    Rules,
    Verdict,
    confident,
    judge,
    parse_prompt,
    relations,
)


def box(x, y, score=0.95, side=10):
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2, score]


def objects(*boxes, colors=None):
    return Objects(np.array(boxes, np.float64).reshape(-1, 5), colors)


def ask(*include, tag="single_object", exclude=()):
    return Prompt(tag, "a photo", tuple(include), tuple(exclude))


@pytest.mark.parametrize(
    "x, y, held",
    [
        (30, 0, {"right of"}),
        (-30, 0, {"left of"}),
        (0, 30, {"below"}),
        (0, -30, {"above"}),
        (30, 30, {"right of", "below"}),
        (30, -14, {"right of"}),  # the reduced offset is 12 of 33.1
        (2, 0, set()),  # a tenth of both sizes
        (4, 0, set()),  # half of the offset is left, which is not more than half
        (4.1, 0, {"right of"}),
        (0, 0, set()),
    ],
)
def test_where_one_box_lies_from_another(x, y, held):
    assert relations(np.array(box(x, y)), np.array(box(0, 0))) == held


def test_boxes_are_confident_and_few():
    found = objects(box(0, 0, 0.3), box(1, 0, 0.31), box(2, 0, 0.95), box(3, 0, 0.9))
    assert confident(found, "colors", Rules()).boxes[:, 4].tolist() == [0.95, 0.9, 0.31]
    assert confident(found, "counting", Rules()).boxes[:, 4].tolist() == [0.95]
    assert len(confident(found, "colors", Rules(max_objects=2))) == 2
    many = objects(*(box(x, 0) for x in range(20)))
    assert len(confident(many, "colors", Rules())) == 16


def test_overlap_counts_the_last_pixel():
    # 11 x 11 pixels each, 6 x 11 shared: 66 of 176.
    found = objects([0, 0, 10, 10, 0.9], [5, 0, 15, 10, 0.8])
    assert len(confident(found, "colors", Rules(max_overlap=0.375))) == 1
    assert len(confident(found, "colors", Rules(max_overlap=0.376))) == 2


def test_colors_are_those_of_the_most_confident_boxes():
    red = ask(Clause("dog", 1, color="red"))
    found = objects(box(0, 0, 0.8), box(9, 0, 0.9), colors=("red", "blue"))
    assert "blue" in judge(red, {"dog": found}).reason
    assert judge(red, {"dog": objects(box(0, 0), colors=("red",))}).correct
    with pytest.raises(GenevalError, match="dog.*colors"):
        judge(red, {"dog": objects(box(0, 0))})
    assert not judge(red, {}).correct  # no box, no colour to ask for


def test_every_box_must_lie_so_to_every_box_of_its_target():
    two = ask(Clause("cat", 2), Clause("dog", 2, position=("left of", 0)), tag="position")
    dogs = objects(box(0, 0), box(0, 30))
    assert judge(two, {"cat": objects(box(90, 0), box(90, 30)), "dog": dogs}).correct
    assert "left of" in judge(two, {"cat": objects(box(90, 0), box(0, 90)), "dog": dogs}).reason
    missing = judge(two, {"cat": objects(box(90, 0)), "dog": dogs})
    assert missing.reason.count(";") == 1  # too few cats, and no target: both are said
    assert judge(two, {"dog": dogs}).reason.count(";") == 1


def test_only_counting_has_an_upper_bound():
    two = Clause("dog", 2)
    three = {"dog": objects(box(0, 0), box(20, 0), box(40, 0))}
    assert judge(ask(two), three).correct
    assert "3" in judge(ask(two, tag="counting", exclude=[Clause("dog", 3)]), three).reason


# --- the table ------------------------------------------------------------------------------------


def make_set(sizes, right, samples=4):
    """Prompts, and images that are right where right(task, prompt, sample) says so."""
    prompts = [ask(Clause("dog", 1), tag=task) for task, n in sizes.items() for _ in range(n)]
    numbers = [i for n in sizes.values() for i in range(n)]
    images = [
        Image(p, s, f"{p:05d}/samples/{s:04d}.png", Verdict(bool(right(prompt.tag, i, s)), ""))
        for p, (prompt, i) in enumerate(zip(prompts, numbers, strict=True))
        for s in range(samples)
    ]
    return prompts, images


SIZES = dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))


def test_overall_is_the_plain_mean_of_tasks_and_intervals_are_of_prompts():
    chance = dict(zip(TASKS, (1.0, 0.5, 0.25, 0.5, 0.0, 0.5), strict=True))
    prompts, images = make_set(SIZES, lambda task, i, s: i % 4 < 4 * chance[task])
    found = score(images, prompts)
    assert found.tasks["two_object"].value == pytest.approx(50 / 99)
    shares = [1, 50 / 99, 0.25, 48 / 94, 0, 0.5]
    assert found.tasks["overall"].value == pytest.approx(np.mean(shares))
    assert (found.images, found.prompts) == (2212, 553)
    right = np.dot(shares, list(SIZES.values())) / 553
    assert found.images_correct == found.prompts_solved == pytest.approx(right)
    half = found.tasks["color_attr"]
    # All four images of a prompt agree: 100 prompts tell as much as 100 images.
    assert (half.low, half.high) == pytest.approx((0.4, 0.6), abs=0.01)
    sure = found.tasks["single_object"]
    assert (sure.low, sure.high) == (1, 1)
    assert found == score(images, prompts)


def test_differences_are_paired_by_prompt():
    prompts, before = make_set(SIZES, lambda task, i, s: i % 2 == 0)
    _, after = make_set(SIZES, lambda task, i, s: i % 2 == 0 or i % 10 == 1)
    gap = difference(after, before, prompts)["color_attr"]
    assert gap.value == pytest.approx(0.1)
    assert (gap.low, gap.high) == pytest.approx((0.05, 0.16), abs=0.011)
    same = difference(before, before, prompts)
    assert all((g.value, g.low, g.high) == (0, 0, 0) for g in same.values())
    with pytest.raises(GenevalError, match="prompt 0"):
        difference(after, before[4:], prompts)


def test_a_part_of_the_set_is_refused():
    prompts, images = make_set(SIZES, lambda *_: True)
    check_complete(images, prompts)
    with pytest.raises(GenevalError, match="2211 images.*prompt 552 has 3.*--allow_incomplete"):
        check_complete(images[:-1], prompts)
    with pytest.raises(GenevalError, match="552 prompts.*553"):
        check_complete(images[4:-4], prompts[:-1])


# --- files ----------------------------------------------------------------------------------------

METADATA = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"},
    {
        "tag": "colors",
        "include": [{"class": "dog", "count": 1, "color": "red"}],
        "prompt": "a red dog",
    },
]


def write(path, lines):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def detection(prompt, sample, *boxes, colors=None):
    found = {"dog": {"boxes": list(boxes)} | ({"colors": colors} if colors else {})}
    return {"filename": f"{prompt:05d}/samples/{sample:04d}.png", "detections": found}


def run(folder, *more, detections="detections.jsonl"):
    return door.main([
        "geneval", f"--detections={folder / detections}", f"--metadata={folder / 'metadata.jsonl'}",
        f"--out={folder / 'out.jsonl'}", *more,
    ])  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "metadata.jsonl", METADATA)
    lines = [
        detection(1, 0, box(0, 0), colors=["blue"]),
        detection(0, 1, box(0, 0, 0.2)),
        detection(0, 0, box(0, 0)),
        detection(1, 1, box(0, 0), colors=["red"]),
    ]
    write(tmp_path / "detections.jsonl", lines)
    return tmp_path


def test_the_command_writes_verdicts_and_the_table(folder, capsys):
    assert run(folder) == 1
    told = capsys.readouterr().err
    assert "--allow_incomplete" in told and len(told.splitlines()) == 1
    assert not (folder / "out.jsonl").exists()
    assert run(folder, "--allow_incomplete") == 0
    assert "not the published" in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, False, False, True]
    assert "blue" in lines[2]["reason"] and lines[2]["prompt"] == "a red dog"
    record = json.loads((folder / "out.json").read_text())
    assert record["scores"]["tasks"]["overall"]["value"] == 0.5
    assert record["rules"]["counting_threshold"] == 0.9
    assert run(folder, "--allow_incomplete", "--threshold=0.1") == 0
    record = json.loads((folder / "out.json").read_text())
    assert record["scores"]["tasks"]["single_object"]["value"] == 1


def test_how_the_images_were_drawn_is_compared_with_the_published_protocol(folder, capsys):
    def told(*more):
        assert run(folder, "--allow_incomplete", *more) == 0
        return capsys.readouterr().out, json.loads((folder / "out.json").read_text())["sampling"]

    assert "--samples DIR" in told()[0]
    recipe = {"sampling": {"top_k": 1000}}
    (folder / "recipe.json").write_text(json.dumps(recipe))  # beside the detections
    assert "top_k 1000 in place of 2000" in told()[0]
    (folder / "drawn").mkdir()
    assert run(folder, "--allow_incomplete", f"--samples={folder / 'drawn'}") == 1
    assert "drawn has no recipe.json" in capsys.readouterr().err
    (folder / "drawn" / "recipe.json").write_text(json.dumps(OF_PROMPTS))
    assert told(f"--samples={folder / 'drawn'}")[1] == OF_PROMPTS
    assert "warning" not in told(f"--samples={folder / 'drawn'}")[0]


def test_two_sets_are_compared(folder, capsys):
    assert run(folder, "--allow_incomplete") == 0
    (folder / "out.jsonl").rename(folder / "before.jsonl")
    assert run(folder, "--allow_incomplete", f"--against={folder / 'before.jsonl'}") == 0
    assert "difference" in capsys.readouterr().out
    record = json.loads((folder / "out.json").read_text())
    assert record["against"]["difference"]["overall"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_verdicts_by_other_rules_are_not_mixed(folder, capsys):
    assert run(folder, "--allow_incomplete", "--threshold=0.1") == 0
    for ending in ("jsonl", "json"):
        (folder / f"out.{ending}").rename(folder / f"base.{ending}")
    capsys.readouterr()
    against = f"--against={folder / 'base.jsonl'}"
    assert run(folder, "--allow_incomplete", against) == 1
    assert "--threshold=0.1, as base.json says, and here it is 0.3" in capsys.readouterr().err
    assert not (folder / "out.jsonl").exists()
    assert run(folder, "--allow_incomplete", against, "--threshold=0.1") == 0


@pytest.mark.parametrize(
    "wrong",
    [
        "threshold=nan",
        "counting_threshold=90",
        "max_overlap=-1",
        "position_threshold=2",
        "max_objects=-1",
    ],
)
def test_rules_have_limits(folder, wrong, capsys):
    assert run(folder, "--allow_incomplete", f"--{wrong}") == 1
    told = capsys.readouterr().err
    assert f"--{wrong.partition('=')[0]}" in told and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    "name, out",
    [
        ("detections.jsonl", "detections.jsonl"),
        ("metadata.jsonl", "metadata.jsonl"),
        ("base.jsonl", "base.jsonl"),
        ("base.json", "base.jsonl"),
    ],
)
def test_what_is_read_is_not_replaced(folder, name, out, capsys):
    assert run(folder, "--allow_incomplete", f"--out={folder / 'base.jsonl'}") == 0
    against, before = f"--against={folder / 'base.jsonl'}", (folder / name).read_bytes()
    assert run(folder, "--allow_incomplete", against, f"--out={folder / out}") == 1
    assert "is read, and would be replaced" in capsys.readouterr().err
    assert (folder / name).read_bytes() == before
    assert run(folder, "--allow_incomplete", f"--out={folder / 'no' / 'such' / 'x.jsonl'}") == 0


def test_results_of_the_original_evaluator_are_judged_again(folder, capsys):
    """Boxes tell; what colours were seen is not in the file, so its verdict holds there."""
    lines = [
        {
            "filename": f"images\\{p:05d}/samples/{s:04d}.png",
            "tag": METADATA[p]["tag"],
            "prompt": METADATA[p]["prompt"],
            "correct": correct,
            "reason": "",
            "metadata": json.dumps(METADATA[p]),
            "details": json.dumps({"dog": [box(0, 0)]}),
        }
        for p, s, correct in ((0, 0, True), (0, 1, False), (1, 0, False), (1, 1, True))
    ]
    write(folder / "results.jsonl", lines)
    assert run(folder, "--allow_incomplete", detections="results.jsonl") == 0
    told = capsys.readouterr().out
    assert "1 verdicts differ" in told and "00000/samples/0001.png" in told
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, True, False, True]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1"),
        ("[]", "line 1.*list"),
        ("[" * 100_000, "line 1"),
        ({"filename": "a.png", "detections": {}}, "a.png.*samples"),
        ({"detections": {}}, "filename None"),
        (detection(2, 0), "prompt 2.*have 2"),
        (detection(1, 0, box(0, 0)), "line 1.*dog.*colors"),
        (detection(1, 0, box(0, 0), colors=["red", "red"]), "1 boxes"),
        (detection(1, 0, box(0, 0), colors=["mauve"]), "mauve"),
        (detection(0, 0, [1, 2, 3, 4]), "box"),
        (detection(0, 0, [1, 2, 3, 4, "5"]), "box"),
        (detection(0, 0, [1, 2, 3, 4, 1e300]), "box"),
        (detection(0, 0, [1, 2, 3, 4, 95.0]), "line 1.*from 0 to 1, not 95.0"),
        (detection(0, 0, [1, 2, 3, 4, -0.5]), "from 0 to 1, not -0.5"),
        (detection(0, 0, [1, 2, 3, 4, float("nan")]), "NaN"),
        ({"filename": "0/samples/0.png", "detections": {"mouse": []}}, "computer mouse"),
        ({"filename": "0/samples/0.png", "detections": {"dog": 3}}, "dog"),
        ({"filename": "0/samples/0.png", "correct": True, "prompt": "a cat"}, "'a dog'.*'a cat'"),
        ({"filename": "0/samples/0.png", "correct": 1, "prompt": "a dog"}, "correct is 1"),
    ],
)
def test_lines_that_are_no_detections_are_named(folder, line, message):
    path = folder / "detections.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(GenevalError, match=message):
        judge_file(path, read_prompts(folder / "metadata.jsonl"), Rules())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tag": "dogs"}, "tag 'dogs'"),
        ({"prompt": None}, "prompt"),
        ({"include": []}, "include"),
        ({"include": [{"count": 1}]}, "names no class"),
        ({"include": [{"class": "dog", "count": True}]}, "count"),
        ({"include": [{"class": "dog", "count": 10**9}]}, "count"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "mauve"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "earlier"),
        ({"include": [{"class": "dog", "count": 1, "position": ["in", 0]}]}, "position"),
        ({"exclude": "dog"}, "exclude"),
    ],
)
def test_metadata_that_are_not_genevals_are_refused(change, message):
    with pytest.raises(GenevalError, match=message):
        parse_prompt({**METADATA[0], **change}, "line 7")


def test_the_same_image_twice_and_files_without_any(folder):
    prompts = read_prompts(folder / "metadata.jsonl")
    with pytest.raises(GenevalError, match="line 2: 00000/samples/0000.png is there twice"):
        judge_file(write(folder / "d.jsonl", [detection(0, 0)] * 2), prompts, Rules())
    with pytest.raises(GenevalError, match="no images"):
        judge_file(write(folder / "d.jsonl", []), prompts, Rules())
    with pytest.raises(GenevalError, match="no prompts"):
        read_prompts(folder / "d.jsonl")
    with pytest.raises(GenevalError, match="absent"):
        read_prompts(folder / "absent")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["dog", "boxes", "colors", "count", "class"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=80)
@given(detections=JSON, details=JSON, include=JSON)
def test_any_json_is_judged_or_refused(detections, details, include, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "d.jsonl"
    prompts = [parse_prompt(line, "line") for line in METADATA]
    for line in (
        {"filename": "0/samples/0.png", "detections": detections},
        {
            "filename": "0/samples/0.png",
            "correct": True,
            "prompt": "a dog",
            "details": str(details),
        },
    ):
        with contextlib.suppress(GenevalError):
            (image,) = judge_file(write(path, [line]), prompts, Rules())
            assert isinstance(image.verdict.correct, bool)
            assert (image.prompt, image.sample) == (0, 0)
    with contextlib.suppress(GenevalError):
        parse_prompt({**METADATA[0], "include": include}, "line")
