"""Tables and verdicts from results that were made up, so that what they have to say is known."""

import copy
import dataclasses
import re

import numpy as np
import pytest

from vapi_jax.study import page
from vapi_jax.study.spec import (
    Arm,
    Draw,
    Files,
    Results,
    Study,
    StudyError,
    recipe_of,
    with_changes,
)
from vapi_jax.study.table import comparisons, headline, lost_spread, rows_of, says, verdicts

FEATURE = "alex_conv5"
METRIC = f"frechet/{FEATURE}"
STUDY = Study(
    "made up", "Who wins?", "c2i_demo",
    (Arm("good"), Arm("narrow"), Arm("cold", draw=Draw(temperature=0.9), trained=False)),
    features=(FEATURE,), samples=64, sampling_seeds=2,
)  # fmt: skip


def one(distance, recall=0.5):
    shares = {"precision": 0.7, "recall": recall, "diversity": recall, "entropy": 3.0}
    return {METRIC: distance, f"kernel/{FEATURE}": distance / 100, **shares}


def result(name, seed, distances, recall, matched):
    draw = {
        "sets": [one(d, recall) for d in distances],
        "matched_temperature": 0.9 + 0.01 * seed,
        "matched": [one(d) for d in matched],
    }
    held_out = {"ce": 5.0 + seed, "reward": -0.4}
    return {"arm": name, "seed": seed, "held_out": held_out, "draws": {"plain": draw}}


def base(seed):
    wobble = 0.1 * (-1) ** seed
    draws = {"plain": [one(50.0 + wobble), one(52.0)], "cold": [one(47.0), one(49.0)]}
    return {"seed": seed, "draws": draws, "floor": one(20.0), "real": one(5.0)}


BASE = [base(seed) for seed in range(4)]
ARMS = {
    "good": [result("good", s, (40.0 + s, 42.0 + s), 0.5, (46.0, 48.5)) for s in range(4)],
    # Nearer than the base, no nearer than the base at its entropy, and less diverse.
    "narrow": [
        result("narrow", s, (44.0 + s, 45.0), 0.3 + s / 100, (43.5 + 0.8 * s, 45.9)) for s in range(4)
    ],
}  # fmt: skip


RESULTS = Results(BASE, ARMS, ["narrow, seed 4: gradient norm inf"])


def changed(arms=None, **changes):
    return dataclasses.replace(STUDY, **changes), Results(BASE, arms or ARMS, [])


def test_rows_are_means_over_trainings():
    rows = {row.name: row for row in rows_of(STUDY, RESULTS)}
    assert list(rows) == [
        "base", "good", "base at the entropy of good", "narrow", "base at the entropy of narrow", "cold",
        "tokenizer's floor", "other real crops",
    ]  # fmt: skip
    good = rows["good"]
    assert good.means[METRIC] == pytest.approx(42.5)  # of 41, 42, 43, 44
    assert good.sds[METRIC] == pytest.approx(1.2909944)
    assert (good.trainings, good.temperature) == (4, 1.0)
    assert good.means["held_out/ce"] == pytest.approx(6.5)
    assert rows["base at the entropy of good"].temperature == pytest.approx(0.915)
    means = [rows[name].means[METRIC] for name in ("base", "cold")]
    assert means == pytest.approx([51.0, 48.0])


def test_differences_are_paired_and_judged_together():
    found = {(c.arm, c.against): c for c in comparisons(STUDY, RESULTS)}
    assert len(found) == 5
    to_base = found["good", "base"]
    assert to_base.differences[METRIC].mean == pytest.approx(-8.5)
    assert says(to_base, METRIC) == "better"
    assert found["cold", "base"].differences[METRIC].mean == pytest.approx(-3.0)
    assert found["good", "base at equal entropy"].differences[METRIC].mean == pytest.approx(-4.75)
    assert says(found["narrow", "base at equal entropy"], METRIC) == "no difference"
    assert lost_spread(found["narrow", "base"]) == ["recall", "diversity"]
    assert lost_spread(to_base) == []
    for against, many in (("base", 3), ("base at equal entropy", 2)):
        these = [c for c in found.values() if c.against == against]
        raw, corrected = [c.differences[METRIC].p for c in these], [c.corrected for c in these]
        assert len(these) == many
        assert all(c >= p for c, p in zip(corrected, raw, strict=True) if c is not None)
        tested = [p for p in raw if p is not None]
        assert min(c for c in corrected if c is not None) == pytest.approx(
            len(tested) * min(tested)
        )


def test_what_was_not_told_apart_would_have_been_from_the_stated_difference_on():
    """At the level that it had to pass; so none that is larger stands there."""
    rng = np.random.default_rng(0)
    arms = {
        f"arm {i}": [
            result(f"arm {i}", s, rng.normal(48 - i, 2, 2), 0.5, rng.normal(48, 2, 2)) for s in range(4)
        ]
        for i in range(8)
    }  # fmt: skip
    study = dataclasses.replace(STUDY, arms=tuple(Arm(name) for name in arms))
    found = comparisons(study, Results(BASE, arms, []))
    sentences = verdicts(found, METRIC, 4)
    unseen = [(c, s) for c, s in zip(found, sentences, strict=True) if "would have been" in s]
    assert len(unseen) > 4
    for one_of, sentence in unseen:
        least = float(re.search(r"; (\S+) would", sentence)[1])
        assert least > abs(one_of.differences[METRIC].mean)
        assert one_of.differences[METRIC].p > one_of.level < 0.05


def test_an_arm_that_draws_the_bases_tokens_is_held_against_it_once():
    arms = copy.deepcopy(ARMS)
    for training in arms["good"]:
        training["draws"]["plain"]["matched"] = base(training["seed"])["draws"]["plain"]
    found = [(c.arm, c.against) for c in comparisons(*changed(arms))]
    assert ("good", "base at equal entropy") not in found
    assert ("narrow", "base at equal entropy") in found


def test_a_result_says_itself_that_its_tokens_are_the_bases():
    """Another machine draws and judges the base again, to other last digits."""
    arms = copy.deepcopy(ARMS)
    for training in arms["good"]:
        drawn, same = training["draws"]["plain"], base(training["seed"])["draws"]["plain"]
        drawn["matched"] = [{**one, METRIC: one[METRIC] + 1e-9} for one in same]
        drawn["tokens_of_base"] = True
    for training in arms["narrow"]:
        training["draws"]["plain"]["tokens_of_base"] = False
        training["draws"]["plain"]["matched"] = base(training["seed"])["draws"]["plain"]
    found = [(c.arm, c.against) for c in comparisons(*changed(arms))]
    assert ("good", "base at equal entropy") not in found
    assert ("narrow", "base at equal entropy") in found


def test_a_verdict_says_where_pairs_are_missing_entropies_differ_or_nothing_varies():
    arms = {"good": copy.deepcopy(ARMS["good"][:3]), "narrow": copy.deepcopy(ARMS["narrow"])}
    for training in arms["narrow"]:
        for sample in training["draws"]["plain"]["matched"]:
            sample["entropy"] = 2.9
        for number, sample in enumerate(training["draws"]["plain"]["sets"]):
            sample[METRIC] = BASE[training["seed"]]["draws"]["plain"][number][METRIC] - 3.0
    found = comparisons(*changed(arms))
    said = dict(zip([(c.arm, c.against) for c in found], verdicts(found, METRIC, 4), strict=True))
    assert "(3 of 4 pairs)" in said["good", "base"]
    assert "pairs" not in said["narrow", "base at equal entropy"]
    assert "+0.1 nats" in said["narrow", "base at equal entropy"]
    assert "nats" not in said["good", "base at equal entropy"]
    assert "-3 ± 0" in said["narrow", "base"] and "no noise" in said["narrow", "base"]


def test_arms_are_held_against_another_one_by_seed():
    """Trainings that the other one lacks have no pair."""
    given = changed({"good": ARMS["good"], "narrow": ARMS["narrow"][1:]}, against="good")
    found = {(c.arm, c.against): c for c in comparisons(*given)}
    between = found["narrow", "good"].differences[METRIC]
    assert (between.n, ("good", "good") in found) == (3, False)
    assert between.mean == pytest.approx(2.5)  # 45, 45.5, 46 less 42, 43, 44


def test_more_of_a_score_is_better():
    arms = copy.deepcopy(ARMS)
    for trainings in arms.values():
        for training in trainings:
            for which in ("sets", "matched"):
                for number, sample in enumerate(training["draws"]["plain"][which]):
                    sample["scenes/overall"] = 0.5 + 0.01 * number + 0.1 * (which == "sets")
    base = copy.deepcopy(BASE)
    for number, one_seed in enumerate(base):
        for sets in one_seed["draws"].values():
            for sample in sets:
                sample["scenes/overall"] = 0.4 + 0.001 * number
    study = dataclasses.replace(STUDY, verdict="scenes/overall")
    found = comparisons(study, Results(base, arms, []))
    assert headline(study, found) == "scenes/overall"
    to_base = next(c for c in found if (c.arm, c.against) == ("narrow", "base"))
    assert says(to_base, "scenes/overall") == "better"
    assert "bought with recall" in verdicts([to_base], "scenes/overall", 4)[0]
    # What one training lacks is of the others; what an arm lacks altogether is no metric of the verdict.
    for number, training in enumerate(arms["good"]):
        del training["draws"]["plain"]["sets"][0]["scenes/overall"]
        found = comparisons(study, Results(base, arms, []))
        if number < 2:
            assert headline(study, found) == "scenes/overall"
            sentences = verdicts(found, "scenes/overall", 4)
            pairs = f"({3 - number} of 4 pairs)"
            assert [pairs in sentence for sentence in sentences] == ["good" in x for x in sentences]
            rows = {row.name: row for row in rows_of(study, Results(base, arms, []))}
            assert rows["good"].means["scenes/overall"] == pytest.approx(0.605)
    assert headline(study, found) == METRIC


def test_a_gain_bought_with_diversity_is_called_so():
    found = comparisons(STUDY, RESULTS)
    sentences = dict(
        zip([(c.arm, c.against) for c in found], verdicts(found, METRIC, 4), strict=True)
    )
    assert "bought with recall and diversity" in sentences["narrow", "base"]
    assert "bought" not in sentences["good", "base"]
    assert "would have been seen" in sentences["narrow", "base at equal entropy"]


def test_so_is_one_bought_with_the_recall_that_is_published():
    arms = copy.deepcopy(ARMS)
    for number, training in enumerate(arms["good"]):
        for sample in training["draws"]["plain"]["sets"]:
            sample["adm/recall"] = 0.6 + number / 1000
    base = copy.deepcopy(BASE)
    for sample in (sample for one in base for sample in one["draws"]["plain"]):
        sample["adm/recall"] = 0.7
    found = comparisons(STUDY, Results(base, arms, []))
    (said,) = verdicts([c for c in found if (c.arm, c.against) == ("good", "base")], METRIC, 4)
    assert "bought with adm/recall, which fell" in said


def test_the_page_counts_images_that_wait_for_a_detector():
    arms, base = copy.deepcopy(ARMS), copy.deepcopy(BASE)
    study = dataclasses.replace(STUDY, files=Files("geneval", "x", prompts="m.jsonl"))
    # 4 trainings of 2 arms, the arm's and the matched base's, and the base in 2 draws, 2 sets each.
    waits = "{} of 48 sets of images wait for a detector."
    text = page.markdown(study, Results(base, arms, []), comparisons(study, RESULTS), "c")
    assert waits.format(48) in text
    arms["good"][0]["draws"]["plain"]["sets"][0]["geneval/overall"] = 0.3
    text = page.markdown(study, Results(base, arms, []), comparisons(study, RESULTS), "c")
    assert waits.format(47) in text
    text = page.markdown(STUDY, Results(base, arms, []), comparisons(STUDY, RESULTS), "c")
    assert "detector" not in text


def test_one_training_tells_nothing_about_the_next():
    found = comparisons(*changed({"good": ARMS["good"][:1]}))
    assert {says(one, METRIC) for one in found if one.arm == "good"} == {"untested"}


def test_without_enough_samples_the_kernel_distance_decides():
    found = comparisons(STUDY, RESULTS)
    assert headline(STUDY, found) == METRIC
    for one_of in found:
        del one_of.differences[METRIC]
    assert headline(STUDY, found) == f"kernel/{FEATURE}"


def test_the_page_holds_every_row_verdict_and_published_figure():
    figures = {"plain": {METRIC: 7.65, "fid": 2.28}}
    arms = (dataclasses.replace(STUDY.arms[0], published=figures), *STUDY.arms[1:])
    study = dataclasses.replace(STUDY, arms=arms)
    found = comparisons(study, RESULTS)
    text = page.markdown(study, RESULTS, found, "python -m vapi_jax.study")
    for row in rows_of(study, RESULTS):
        assert f"| {row.name} |" in text
    for sentence in verdicts(found, METRIC, 4):
        assert sentence in text
    assert "42.50 ± 1.3" in text
    assert "gradient norm inf" in text
    assert f"| good | plain | {METRIC} | 7.65 | 42.50 ± 1.3 |" in text
    assert "| good | plain | fid | 2.28 | – |" in text


def test_the_front_has_a_line_for_the_base_and_for_every_arm(tmp_path):
    draws = {name: Draw() for name in ("plain", "hot", "wide")}
    study = dataclasses.replace(STUDY, draws=draws)
    results = copy.deepcopy(RESULTS)
    for training in [*results.base, *(one for found in results.arms.values() for one in found)]:
        training["draws"] |= dict.fromkeys(draws, training["draws"]["plain"])
    path, sentences = page.write(study, results, tmp_path, "a command")
    assert "front.png" in path.read_text() and (tmp_path / "front.png").exists()
    assert len(sentences) == 3 * 4 + 1 + 1  # the last is of what broke down
    (axis,) = page.front(
        study, rows_of(study, results)
    ).axes  # no FID, so precision and recall alone
    assert [line.get_label() for line in axis.lines] == ["base", "good", "narrow"]
    assert [len(line.get_xdata()) for line in axis.lines] == [3, 3, 3]


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"arms": (Arm("base"),)}, "base"),
        ({"arms": (Arm("Base"),)}, "folders of arms: base"),
        ({"arms": (Arm("plain", draw=Draw(), trained=False),)}, "draws: plain"),
        ({"arms": (Arm("a b"), Arm("a-b"))}, "a_b"),
        ({"features": ("inception",)}, "inception"),
        ({"seeds": 0}, "seeds"),
        ({"draws": {}}, "draws"),
        ({"against": "b"}, "'b'"),
        ({"files": Files("adm", "demo")}, "adm50k"),
        ({"files": Files("adm50k", "demo"), "arms": (Arm("a", average=True),)}, "average"),
        ({"arms": (Arm("a", draw=Draw()),)}, "'a'"),
        ({"arms": (Arm("a", {"steps": 3}, draw=Draw(), trained=False),)}, "'a'"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(changes, fact):
    with pytest.raises(StudyError, match=fact):
        Study(**{"name": "x", "question": "?", "recipe": "c2i_demo", "arms": (), **changes})


def test_a_change_of_all_recipes_that_would_not_reach_all_is_refused():
    study = dataclasses.replace(STUDY, arms=(Arm("fast", {"optimizer.learning_rate": 1.0}),))
    assert with_changes(study, {"steps": 3}).changes == {"steps": 3}
    for name in ("optimizer.learning_rate", "seed", "eval.samples"):
        with pytest.raises(StudyError, match=name):
            with_changes(study, {name: 7})


def test_the_base_in_files_is_the_one_that_is_trained_from():
    files = Files("geneval", "weights/x", prompts="m.jsonl", text_encoder="t5")
    study = dataclasses.replace(STUDY, files=files)
    found = with_changes(study, {"init.gpt": "mine", "policy.dtype": "float32"}).files
    assert (found.checkpoint, found.dtype, found.text_encoder) == ("mine", "float32", "t5")
    found = with_changes(study, {"condition.options.encoder": "my_t5"}).files
    assert (found.checkpoint, found.text_encoder) == ("weights/x", "my_t5")


def test_an_average_wants_a_method_that_keeps_one():
    for method in ("vapi", "sft"):
        arm = Arm("a", {"method": method}, average=True)
        study = Study("x", "?", "c2i_demo", (arm,))
        with pytest.raises(StudyError, match=f"{method}.ema_decay"):
            recipe_of(study, arm)
    arm = Arm("a", {"vapi.ema_decay": 0.9}, average=True)
    assert recipe_of(Study("x", "?", "c2i_demo", (arm,)), arm).vapi.ema_decay == 0.9
