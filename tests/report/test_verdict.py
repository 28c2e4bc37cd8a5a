"""The verdict says what the numbers say, and no more."""

import math
import re

import pytest
from scipy.stats import ttest_ind_from_stats, ttest_rel

from tests.helpers.runs import distance, make_summary
from vapi_jax.report import verdict


@pytest.mark.parametrize(
    ("changes", "tone", "headline", "sentence"),
    [
        ({}, "mixed", "no better than another temperature", "can explain what changed"),
        ({"after": 440.0, "unseen": 84.0}, "good", "by more than sharpening", "better than mere"),
        ({"after": 440.0, "unseen": 86.0}, "mixed", "not in others", "is not to be told apart"),
        ({"after": 462.0}, "mixed", "another temperature", "does more"),
        (
            {"after": 480.0, "unseen": 97.0},
            "bad",
            "worse.*although the reward rose",
            "rose from 471",
        ),
        ({"after": 471.6}, "mixed", "No change", "did not change: 47"),
        ({"after": 472.0}, "mixed", "No change.*although the reward rose", "inside the noise"),
        ({"after": 440.0, "unseen": 99.0}, "mixed", "worse in features it never", "do not say the"),
        ({"after": 440.0, "last": -0.52}, "mixed", "and the reward fell", "fell from −0.5050"),
        ({"after": 480.0, "last": -0.505}, "bad", "and the reward stayed", "stayed at −0.5050"),
    ],
)
def test_verdict(changes, tone, headline, sentence):
    said = verdict.verdict(make_summary(**changes))
    assert said.tone == tone
    assert re.search(headline, said.headline), said.headline
    assert sentence in " ".join(said.sentences).replace("\u00a0", " "), said.sentences


def test_a_trial_of_too_few_samples_says_that_it_means_nothing():
    summary = make_summary()
    for samples, trial in ((512, True), (513, False)):
        summary["frechet"]["samples"] = samples
        said = " ".join(verdict.verdict(summary).sentences)
        assert ("mean nothing" in said) == trial
    summary["frechet_unseen"] |= {"samples": 513, "dim": 1280}
    assert "mean nothing" in " ".join(verdict.verdict(summary).sentences)


def test_verdict_with_one_seed_claims_nothing():
    summary = make_summary(after=440.0)
    for row in summary["table"]:
        row["frechet"]["n"] = row["frechet_unseen"]["n"] = 1
    for block in ("frechet", "frechet_unseen"):
        summary[block]["before"]["n"] = summary[block]["after"]["n"] = 1
    said = verdict.verdict(summary)
    assert said.tone == "mixed" and "not conclusive" in said.headline
    text = " ".join(said.sentences)
    assert "no estimate of the noise" in text and "±" not in text


def test_without_a_table_the_main_numbers_speak():
    said = verdict.verdict({"reward": {"first": -0.5, "last": -0.4}})
    assert said.tone == "plain" and "rose" in said.headline and len(said.sentences) == 1
    assert verdict.verdict({"reward": {"first": -0.4, "last": -0.5}}).tone == "bad"
    falling = [{"step": s, "loss": 2 - s / 100} for s in range(1, 101)]
    said = verdict.verdict({"ce": {"first": 3.0, "last": 2.0}}, falling)
    assert (said.tone, said.headline) == ("plain", "The loss fell")
    assert "3.000" in said.sentences[0] and "1.045" in said.sentences[1]
    assert verdict.verdict({}, falling[::-1]).tone == "bad"
    assert verdict.verdict({}).sentences == ()


@pytest.mark.parametrize(
    ("unseen", "sentence"),
    [
        (
            91.94,
            "did as much as a temperature of 0.98 does",
        ),  # four tenths of the way from 93.1 to 90.2
        (89.5, "did as much as a temperature of 0.93 does"),  # half way from 90.2 to 88.8
        (
            80.0,
            "no temperature of the base in the table does as much: the best, 0.92, reaches 88.80",
        ),
        (95.0, None),
    ],
)
def test_verdict_names_the_temperature_of_equal_distance(unseen, sentence):
    said = " ".join(verdict.verdict(make_summary(unseen=unseen)).sentences)
    assert sentence in said if sentence else "as much" not in said


def test_verdict_names_an_inexact_match():
    summary = make_summary()
    summary["table"][2]["entropy"] = 3.44
    text = " ".join(verdict.verdict(summary).sentences)
    assert "that control's entropy is 0.10 nats higher" in text


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((10.0, 2.0, 3), (15.0, 2.0, 3)),
        ((10.0, 2.0, 3), (14.0, 2.0, 3)),
        ((15.0, 2.0, 3), (10.0, 2.0, 3)),
        ((10.0, 3.0, 3), (15.0, 0.0, 3)),
        ((10.0, 3.0, 2), (12.0, 0.5, 20)),
    ],
)
def test_compare_is_welchs_test(a, b):
    got = verdict.compare(distance(*a), distance(*b))
    test = ttest_ind_from_stats(*a, *b, equal_var=False)
    assert got.difference == a[0] - b[0]
    if test.pvalue > 0.05:
        assert got.outcome == "same"
    else:
        assert got.outcome == ("better" if a[0] < b[0] else "worse")
    # The interval ends at 0 just where the test's p is 5 %.
    edge = ttest_ind_from_stats(got.margin, *a[1:], 0.0, *b[1:], equal_var=False)
    assert edge.pvalue == pytest.approx(0.05)


@pytest.mark.parametrize("second", [[11.1, 21.0, 30.9], [9.1, 22.0, 29.5], [9.0, 19.0, 29.0]])
def test_values_of_the_same_seeds_are_paired(second):
    first = [10.0, 20.0, 30.0]
    a, b = ({**distance(20.0, 10.0), "values": values} for values in (first, second))
    a, b = ({**one, "mean": sum(one["values"]) / 3} for one in (a, b))
    got, apart = verdict.compare(a, b), [x - y for x, y in zip(first, second, strict=True)]
    assert got.difference == pytest.approx(sum(apart) / 3)
    if len(set(apart)) > 1:
        interval = ttest_rel(first, second).confidence_interval(0.95)
        assert got.margin == pytest.approx((interval.high - interval.low) / 2)
    outside = got.margin < abs(got.difference)
    assert got.outcome == ("same" if not outside else "better" if got.difference < 0 else "worse")
    assert verdict.compare(a, {**b, "values": second[:2]}).margin > 20.0  # Welch's


def test_what_cannot_be_compared():
    assert verdict.compare(distance(10.0, None), distance(15.0)).outcome == "unknown"
    assert verdict.compare(distance(10.0), None).outcome == "absent"
    assert verdict.compare(distance(10.0, 0.0), distance(10.0, 0.0)).outcome == "same"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.50512, "0.5051"),
        (-471.63, "−471.6"),
        (0, "0"),
        (1e-6, "1.000e−06"),
        (12345.6, "12346"),
        (None, "–"),
        (math.nan, "–"),
        ("x", "–"),
    ],
)
def test_show(value, text):
    assert verdict.show(value) == text
