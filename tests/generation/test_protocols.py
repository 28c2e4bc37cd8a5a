"""Which samples may be compared: the published protocol by name, and sentences where two recipes differ."""

import re

import pytest

from vapi_jax import sample
from vapi_jax.generation.protocols import (
    PROTOCOLS,
    departures,
    departures_from_geneval,
    differences,
)

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


GENEVAL = [
    "--ckpt=x", "--out=y", "--protocol=geneval", "--prompts=m.jsonl", "--text_encoder=t",
]  # fmt: skip


def test_genevals_protocol_is_one_flag():
    args = sample.parse(GENEVAL)
    assert (args.layout, args.per_prompt, args.format) == ("geneval", 4, "png")
    assert (args.cfg, args.top_k, args.temperature, args.top_p) == (7.5, 2000, 1.0, 1.0)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([*GENEVAL, "--top_k=1000"], "leave --top_k out"),
        ([*GENEVAL, "--per_prompt=2"], "leave --per_prompt out"),
        ([*GENEVAL, "--cfg_schedule=cosine", "--cfg_power=1"], "leave --cfg_schedule out"),
        (
            [*GENEVAL, "--cfg=1.0"],
            "leave --cfg out",
        ),  # what other samples have where it is left out
        ([*GENEVAL, "--cfg=7.5", "--top_k=0"], "leave --top_k out"),
        (GENEVAL[:3], "geneval wants --prompts"),
        ([*FLAGS, "--prompts=a dog", "--text_encoder=t"], "adm50k .* leave --prompts out"),
    ],
)
def test_what_genevals_protocol_does_not_go_with(flags, named, capsys):
    with pytest.raises(SystemExit):
        sample.parse(flags)
    assert re.search(named, capsys.readouterr().err)


@pytest.mark.parametrize(
    "flag", ["--num=1000", "--labels=balanced", "--resize=384", "--format=both", "--format=png"]
)
def test_what_a_protocol_says_is_not_said_otherwise_beside_it(flag, capsys):
    with pytest.raises(SystemExit):
        sample.parse([*FLAGS, flag])
    assert f"leave {flag.partition('=')[0]} out" in capsys.readouterr().err


def test_what_it_stands_for_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        sample.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for protocol in PROTOCOLS.values():
        for flag, value in protocol.items():
            assert f"--{flag} {value}" in shown


OF_PROMPTS = {
    "sampling": {
        "temperature": 1.0, "top_k": 2000, "top_p": 1.0, "cfg_scale": 7.5, "cfg_schedule": "constant",
    },
    "captions": {"rule": "m.jsonl", "per_prompt": 4, "layout": "geneval"},
}  # fmt: skip


def test_samples_that_genevals_figures_are_not_of_are_named():
    """An evaluation goes by the layout; scores are GenEval's whatever it is."""
    assert departures_from_geneval(OF_PROMPTS) is departures(OF_PROMPTS, 2212, 256) is None
    drawn = {**OF_PROMPTS, "sampling": {**OF_PROMPTS["sampling"], "top_k": 1000}}
    assert "geneval" in departures(drawn, 2212, 256)
    assert "top_k 1000 in place of 2000" in departures(drawn, 2212, 256)
    flat = {**OF_PROMPTS, "captions": {"per_prompt": 1, "layout": "flat"}}
    assert "per_prompt 1 in place of 4" in departures_from_geneval(flat)
    assert "labels captions in place of random" in departures(flat, 50_000, 256)
    for foreign in ({}, {"sampling": [1], "captions": 7}):
        assert "cfg nothing in place of 7.5" in departures_from_geneval(foreign)


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
