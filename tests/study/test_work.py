"""A study on the smallest models: trained, judged, gone on with."""

import json
import multiprocessing
import re
from pathlib import Path

import jax
import pytest

from tests.helpers.tiny import make_tiny_recipe, policy_file
from vapi_jax.common import locks
from vapi_jax.common.errors import ExpectedError
from vapi_jax.methods import HealthError
from vapi_jax.study import work as module
from vapi_jax.study.__main__ import main
from vapi_jax.study.files import folder_of
from vapi_jax.study.judge import StudyJudge
from vapi_jax.study.spec import Arm, Study, StudyError, read_study
from vapi_jax.study.work import read_results, settle, work

STUDY = """
from vapi_jax.study.spec import Arm, Draw, Study

def get_study(variant=""):
    arms = (
        Arm("longer", {"steps": 3}),
        Arm("CE", {"method": "sft", "sft.noise_rate": 0.3}),
        Arm("decoder", {"method": "tokenizer_post", "optimizer.learning_rate": 1e-3}),
        Arm("kept", {"vapi.ema_decay": 0.9999999}, average=True),
        Arm("cold", draw=Draw(temperature=0.5), trained=False),
    )
    draws = {"plain": Draw(), "guided": Draw(cfg_scale=2.0)}
    return Study(
        "tiny", "?", RECIPE, arms, draws=draws, seeds=1, sampling_seeds=2, samples=40,
        features=("vgg_relu4_3",),
    )
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    weights = {"init": {"gpt": policy_file(16)}, "data": {"classes": "sorted"}}  # no uniform logits
    recipe = make_tiny_recipe("vapi", image_size=16, **weights)
    (folder / "recipe.py").write_text(f"def get_config():\n    return {recipe!r}\n")
    (folder / "study.py").write_text(STUDY.replace("RECIPE", repr(str(folder / "recipe.py"))))
    assert main([f"--study={folder / 'study.py'}", f"--workdir={folder / 'out'}"]) == 0
    return read_study(str(folder / "study.py")), folder / "out", folder


@pytest.mark.slow
def test_every_arm_is_trained_and_judged_alike(done):
    study, out, _ = done
    found = read_results(study, out / "results")
    assert [set(one["draws"]) for one in found.base] == [{"plain", "guided", "cold"}]
    assert {name: len(trainings) for name, trainings in found.arms.items()} == {
        "longer": 1, "CE": 1, "decoder": 1, "kept": 1,
    }  # fmt: skip
    sets = [arm["draws"][draw]["sets"] for (arm,) in found.arms.values() for draw in study.draws]
    sets += list(found.base[0]["draws"].values())
    metrics = {"kernel/vgg_relu4_3", "precision", "recall", "diversity", "entropy"}
    assert all(set(one) == metrics for drawn in sets for one in drawn)
    assert all(drawn[0] != drawn[1] for drawn in sets)  # two sampling seeds
    longer, ce = (json.loads((out / f"results/{n}_0.json").read_text()) for n in ("longer", "ce"))
    assert (longer["steps"], ce["steps"]) == (3, 2)
    plain, guided = (longer["draws"][name]["sets"][0]["entropy"] for name in ("plain", "guided"))
    assert guided != plain
    assert (out / "arms" / "ce" / "seed_0" / "run" / "summary.json").exists()
    assert "longer against the base, guided" in (out / "study.md").read_text()
    assert (out / "differences.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_trained_decoder_decodes_what_the_base_draws(done):
    study, out, _ = done
    found = read_results(study, out / "results")
    (decoder,), (base,) = found.arms["decoder"], found.base
    for name in study.draws:
        drawn = decoder["draws"][name]
        assert drawn["matched"] == base["draws"][name]
        assert drawn["tokens_of_base"]
        assert not found.arms["CE"][0]["draws"][name]["tokens_of_base"]
        assert drawn["matched_temperature"] == study.draws[name].temperature
        for own, other in zip(drawn["sets"], base["draws"][name], strict=True):
            assert own["entropy"] == other["entropy"]  # the same tokens
            assert own["kernel/vgg_relu4_3"] != other["kernel/vgg_relu4_3"]  # other pixels


@pytest.mark.slow
def test_an_average_that_kept_all_of_its_start_draws_what_the_base_draws(done):
    study, out, _ = done
    found = read_results(study, out / "results")
    (kept,), (longer,), (base,) = found.arms["kept"], found.arms["longer"], found.base
    weights = out / "arms" / "kept" / "seed_0" / "run" / "weights"
    one, average = (weights / f"policy{end}.safetensors" for end in ("", "_ema"))
    assert one.read_bytes() != average.read_bytes()
    for name in study.draws:
        for one, other, of_base in zip(
            kept["draws"][name]["sets"],
            longer["draws"][name]["sets"],
            base["draws"][name],
            strict=True,
        ):
            # The same samples, but an average of equal weights may round once.
            assert one == pytest.approx(of_base, rel=1e-6)
            assert other["entropy"] != pytest.approx(of_base["entropy"], rel=1e-6)


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(done, monkeypatch):
    study, out, _ = done

    def again(*_, **__):
        raise AssertionError("it was finished")

    for name in ("run", "fit", "settled_method"):
        monkeypatch.setattr(module, name, again)
    assert work(study, out) == []


def test_an_arm_without_room_leaves_the_others_to_be_done(tmp_path, monkeypatch):
    done = []

    def found(study, workdir, arm, seed, judge, stop):
        done.append((arm.name, seed))
        if arm.name == "a":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")
        return {"arm": arm.name, "recipe": arm.recipe, "changes": {}, "average": False}

    monkeypatch.setattr(module, "_found", found)
    study = Study("x", "?", "c2i_demo:tiny", (Arm("a"), Arm("b")), seeds=2)
    left = work(study, tmp_path)
    assert [sentence.partition(":")[0] for sentence in left] == ["a, seed 0", "a, seed 1"]
    assert "no room" in left[0] and "Out of memory" in left[0] and "and more" not in left[0]
    assert done == [(name, seed) for seed in range(2) for name in ("base", "a", "b")]
    with locks.hold(tmp_path / "arms" / "a" / "seed_0"):
        assert "another process" in work(study, tmp_path)[0]
    assert done[6:] == [("a", 1)]
    # Anything else ends the study.
    error = jax.errors.JaxRuntimeError("INTERNAL: a fault")
    monkeypatch.setattr(module, "_found", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        work(study, tmp_path)


@pytest.mark.slow
def test_results_of_another_protocol_or_arm_are_not_mixed_in(done):
    _, out, folder = done
    text = (folder / "study.py").read_text()
    for name, old, new, fact in (
        ("samples", "samples=40", "samples=48", "samples"),
        ("arm", '"steps": 3', '"steps": 4', "longer"),
    ):
        (folder / f"{name}.py").write_text(text.replace(old, new))
        with pytest.raises(StudyError, match=fact):
            work(read_study(str(folder / f"{name}.py")), out)
        with pytest.raises(StudyError, match=fact):
            work(read_study(str(folder / f"{name}.py")), out)  # and it has changed nothing
    recipe = folder / "recipe.py"
    before = recipe.read_text()
    assert "'batch_size': 16" in before
    try:
        recipe.write_text(before.replace("'batch_size': 16", "'batch_size': 32"))
        with pytest.raises(StudyError, match="batch_size: 16 -> 32"):
            work(read_study(str(folder / "study.py")), out)
        with pytest.raises(StudyError, match="batch_size: 16 -> 32"):  # nor shown
            read_results(read_study(str(folder / "study.py")), out / "results")
        # A run would go on for more steps; a result of fewer is of another arm.
        recipe.write_text(before.replace("'steps': 2", "'steps': 5"))
        assert recipe.read_text() != before
        with pytest.raises(StudyError, match="steps: 2 -> 5"):
            work(read_study(str(folder / "study.py")), out)
        # The base, which is read first, has no learning rate.
        recipe.write_text(re.sub(r"'learning_rate': [\d.e-]+", "'learning_rate': 0.5", before))
        assert recipe.read_text() != before
        with pytest.raises(StudyError, match=r"/(?!base)\w+_0\.json is of another.*learning_rate"):
            work(read_study(str(folder / "study.py")), out)
    finally:
        recipe.write_text(before)


@pytest.mark.slow
def test_a_page_of_results_of_another_study_is_refused(done, capsys):
    _, out, folder = done
    text = (folder / "study.py").read_text()
    (folder / "renamed.py").write_text(text.replace('Arm("CE"', 'Arm("ce"'))
    for results, fact in (
        (out / "results", "ce_0.json is of another arm"),
        (folder / "none" / "results", "study.json"),
    ):
        argv = [f"--study={folder / 'renamed.py'}", f"--workdir={folder / 'page'}"]
        assert main([*argv, f"--results={results}"]) != 0
        assert fact in capsys.readouterr().err


def _begin(folder: Path, barrier, samples: int, said) -> None:
    study = Study("raced", "?", "c2i_demo", (), samples=samples)
    barrier.wait()
    try:
        settle(study, folder)
        said.put("begun")
    except StudyError as error:
        said.put(str(error))


@pytest.mark.parametrize("samples", [(64, 64), (64, 72)])
def test_processes_that_begin_at_once_agree_on_one_protocol(tmp_path, samples):
    context = multiprocessing.get_context("spawn")
    barrier, said = context.Barrier(2), context.Queue()
    begun = [context.Process(target=_begin, args=(tmp_path, barrier, n, said)) for n in samples]
    for process in begun:
        process.start()
    answers = sorted(said.get(timeout=120) for _ in begun)
    for process in begun:
        process.join()
    refused = [answer for answer in answers if answer != "begun"]
    assert len(refused) == (samples[0] != samples[1])
    assert all("samples" in answer for answer in refused)


def test_results_without_a_protocol_are_nobodys(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "base_0.json").write_text("{}")
    with pytest.raises(StudyError, match="study.json"):
        settle(Study("x", "?", "c2i_demo", ()), tmp_path)


def test_results_that_tell_less_or_are_damaged(tmp_path, monkeypatch):
    study = Study("x", "?", "c2i_demo:tiny", (Arm("a"),), seeds=1)
    settle(study, tmp_path)
    monkeypatch.setattr(module, "_found", lambda *_: pytest.fail("it was finished"))
    older = {"recipe": "", "changes": {}}
    base, arm = (tmp_path / "results" / f"{name}_0.json" for name in ("base", "a"))
    base.write_text(json.dumps({"arm": "base", **older}))
    arm.write_text(json.dumps({"arm": "a", **older}))
    assert work(study, tmp_path) == []
    with pytest.raises(StudyError, match="base_0.json tells of no samples: remove it"):
        read_results(study, tmp_path / "results")
    arm.write_text(json.dumps(older))
    with pytest.raises(StudyError, match=r"a_0.json is of another arm 'a' \(arm: None\)"):
        work(study, tmp_path)
    arm.write_text('{"arm": "a", "rec')
    with pytest.raises(StudyError, match="a_0.json cannot be read as JSON"):
        work(study, tmp_path)


def test_images_of_an_earlier_training_make_room_for_those_of_the_next(tmp_path, monkeypatch):
    study = Study("x", "?", "c2i_demo:tiny", (Arm("a"), Arm("a 0")), seeds=2)
    mine, others = (folder_of(tmp_path, who, "plain", 0) for who in ("a_1", "a_0_1"))
    for place in (mine, others):
        place.mkdir(parents=True)
        (place / "recipe.json").touch()

    def run(config, place, stop):
        assert [path.name for path in (tmp_path / "images").iterdir()] == ["a_0_1"]
        raise HealthError("nan")

    monkeypatch.setattr(module, "run", run)
    found = module._found(study, tmp_path, Arm("a"), 1, StudyJudge(study, tmp_path), None)
    assert found["failed"] == "nan"


@pytest.mark.slow
def test_the_page_is_made_again_from_results_alone(done, tmp_path):
    _, out, folder = done
    results = f"--results={out / 'results'}"
    assert main([f"--study={folder / 'study.py'}", f"--workdir={tmp_path}", results]) == 0
    tables = [(place / "study.md").read_text().partition("| |")[2] for place in (out, tmp_path)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "get_study"),
        ("def get_study(variant):\n    return 3\n", "int"),
        ("def get_study():\n    return 1 / 0\n", "line 2"),
    ],
)
def test_what_is_no_study_is_named(tmp_path, text, fact):
    (tmp_path / "study.py").write_text(text)
    with pytest.raises(ExpectedError, match=fact):
        read_study(str(tmp_path / "study.py"))
    with pytest.raises(StudyError, match=r"gone.*demo"):
        read_study(str(tmp_path / "gone.py"))
    assert read_study("demo:tiny").name == "demo, tiny"
