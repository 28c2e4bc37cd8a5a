"""Which samples may be compared: the published protocol by name, and sentences where two recipes differ."""

import pytest

from vapi_jax import sample
from vapi_jax.generation.protocols import PROTOCOLS, departures, differences

FLAGS = ["--ckpt=demo", "--out=x", "--protocol=adm50k"]
RECIPE = {
    "checkpoint": {"path": "runs/a"},
    "sampling": {"temperature": 1.0, "cfg_scale": 1.0},
    "seed": 0,
    "count": 50_000,
    "batch": 64,
    "labels": {"rule": "random", "classes": 1000, "sha256": "00"},
    "image_size": 256,
    "decoded_size": 384,
    "resize": "bicubic",
    "started": "monday",
}


def test_the_published_protocol_is_one_flag():
    args = sample.parse(FLAGS)
    assert (args.num, args.labels, args.resize, args.format) == (50_000, "random", 256, "npz")
    assert sample.parse([*FLAGS, "--cfg=1.75", "--num=50000"]).cfg == 1.75


@pytest.mark.parametrize(
    "flag", ["--num=1000", "--labels=balanced", "--resize=384", "--format=both"]
)
def test_what_a_protocol_says_is_not_said_otherwise_beside_it(flag, capsys):
    with pytest.raises(SystemExit):
        sample.parse([*FLAGS, flag])
    assert f"leave {flag.partition('=')[0]} out" in capsys.readouterr().err


def test_what_it_stands_for_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        sample.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for flag, value in PROTOCOLS["adm50k"].items():
        assert f"--{flag} {value}" in shown


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": 10_000}, "count 50000 and 10000"),
        ({"image_size": 384, "resize": None}, "image_size 256 and 384, resize bicubic and None"),
        ({"labels": {"rule": "balanced", "classes": 1000}}, "labels.rule random and balanced"),
        ({"sampling": {"temperature": 1.0, "cfg_scale": 1.75}}, "sampling.cfg_scale 1.0 and 1.75"),
    ],
)
def test_recipes_of_two_protocols_are_told_apart(change, named):
    assert named in differences(RECIPE, {**RECIPE, **change})
    assert differences(RECIPE, {**RECIPE, "seed": 1, "batch": 1, "checkpoint": {}}) is None


def test_a_recipe_of_others_may_say_anything():
    for foreign in (None, {}, {"sampling": [1]}, {"sampling": None, "prompt": 1}):
        assert differences(RECIPE, foreign) is None
    assert "labels.rule random and 7" in differences(RECIPE, {"labels": 7})


def test_samples_that_published_numbers_are_not_of_are_named():
    assert departures(RECIPE, 50_000, 256) is None
    assert departures(None, 50_000, 256) is None
    found = departures({**RECIPE, "labels": {"rule": "balanced"}}, 49_999, 384)
    for text in ("adm50k", "num 49999 ", "resize 384 ", "labels balanced "):
        assert text in found
