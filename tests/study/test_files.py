"""The published way of judging: flags of the sampler, and a detector's findings on the page."""

import json

import pytest

from vapi_jax import sample
from vapi_jax.study.files import (
    DETECTIONS,
    add_detected,
    arguments,
    folder_of,
    settled_temperature,
    undetected,
)
from vapi_jax.study.spec import Draw, Files, StudyError

PROMPTS = [
    {
        "tag": "single_object",
        "include": [{"class": "cup", "count": 1}],
        "prompt": "a photo of a cup",
    },
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"},
]


@pytest.mark.parametrize(
    ("files", "draw", "wanted"),
    [
        (
            Files("adm50k", "weights/x"),
            Draw(cfg_scale=1.75),
            {"num": 50_000, "labels": "random", "resize": 256, "cfg": 1.75, "temperature": 0.9},
        ),
        (
            Files("geneval", "weights/x", prompts="m.jsonl", text_encoder="t5"),
            Draw(cfg_scale=7.5, top_k=2000),
            {"layout": "geneval", "per_prompt": 4, "cfg": 7.5, "top_k": 2000, "text_encoder": "t5"},
        ),
        (
            Files("geneval_janus", "weights/x", prompts="m.jsonl", changes={"per_prompt": 1}),
            Draw(cfg_scale=5.0),
            {"layout": "geneval", "per_prompt": 1, "cfg": 5.0, "top_k": 0, "dtype": "bfloat16"},
        ),
    ],
)
def test_samples_are_asked_for_as_the_protocol_and_the_draw_say(files, draw, wanted):
    args = sample.parse(["--ckpt=demo", "--out=o", *arguments(files, draw, 0.9, seed=3)])
    assert {name: str(getattr(args, name)) for name in wanted} == {
        name: str(value) for name, value in wanted.items()
    }
    assert (args.seed, args.temperature) == (3, 0.9)


def test_a_matched_temperature_is_the_first_that_was_found(tmp_path):
    path = tmp_path / "matched.json"
    asked = [
        ("plain", 3.25, 0.9), ("guided", 2.5, 0.8), ("plain", 3.2501, 0.9000001), ("plain", 3.5, 1.1),
    ]  # fmt: skip
    found = [settled_temperature(path, name, nats, lambda t=t: t) for name, nats, t in asked]
    assert found == [0.9, 0.8, 0.9, 1.1]
    path.write_text("{")
    with pytest.raises(StudyError, match="matched.json"):
        settled_temperature(path, "plain", 3.25, lambda: 0.9)


def test_what_a_detector_finds_is_scored_where_it_lies(tmp_path):
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("".join(f"{json.dumps(line)}\n" for line in PROMPTS))
    files = Files("geneval", "weights/x", prompts=str(metadata))
    places = [folder_of(tmp_path, "va_pi_0", "guided", number) for number in range(2)]
    for place in places:
        place.mkdir(parents=True)
    box = [0, 0, 9, 9, 0.95]
    found = [
        {"filename": "00000/samples/0000.png", "detections": {"cup": {"boxes": [box]}}},
        {"filename": "00001/samples/0000.png", "detections": {"dog": {"boxes": [box]}}},
    ]
    (places[1] / DETECTIONS).write_text("".join(f"{json.dumps(line)}\n" for line in found))
    sets = [{"entropy": 3.0}, {"entropy": 3.1}]
    add_detected(files, tmp_path, "va_pi_0", "guided", sets)
    scores = {"geneval/single_object": 1.0, "geneval/counting": 0.0, "geneval/overall": 0.5}
    assert sets == [{"entropy": 3.0}, {"entropy": 3.1, **scores}]
    assert undetected(tmp_path) == places[:1]
