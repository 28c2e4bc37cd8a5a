"""Every study that ships: read, its recipes valid, its cost estimated."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.helpers.paths import CONFIGS
from vapi_jax.bench.flops import method_flops, sample_flops, step_flops
from vapi_jax.methods.generator import sized_policy
from vapi_jax.methods.resolve import examine, resolve
from vapi_jax.models.policies import make_policy
from vapi_jax.study import acceptance, estimate
from vapi_jax.study.__main__ import main
from vapi_jax.study.acceptance import RESULTS, Acceptance, Check, Measure
from vapi_jax.study.paper import INCEPTION, REFERENCE
from vapi_jax.study.spec import BASE, Draw, Files, Study, StudyError, read_study, recipe_of

STUDIES = sorted({path.stem for path in (CONFIGS / "studies").glob("*.py")} - {"acceptance"})


@pytest.mark.parametrize("variant", ["", ":tiny"])
@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_valid_and_says_what_it_costs(name, variant):
    study = read_study(f"{name}{variant}")
    assert isinstance(study, Study)
    for arm in study.trained:
        _, errors = examine(recipe_of(study, arm))
        assert errors == []
    costs = estimate.costs(study)
    assert [one.name for one in costs] == [BASE, *(arm.name for arm in study.trained)]
    assert all(one.training is not None and one.hours > 0 for one in costs)
    assert study.samples > 1280 or "efficientnet" not in study.features[0]
    assert (max(one.hours for one in costs) < 0.01) or not variant
    shown = estimate.render(study, costs)
    assert all(one.name in shown for one in costs)
    assert "50 %" in shown and "estimate" in shown


def flops_of(recipe, **changes):
    study = Study("x", "?", recipe, (), changes=changes)
    config = resolve(recipe_of(study))
    policy = make_policy(**sized_policy(config))
    return config, policy


def test_steps_of_other_methods_are_counted():
    """PFLOP of a step of 128 images on XXL, by hand from published counts of its parts."""
    config, policy = flops_of("c2i_xxl")
    assert method_flops(config, policy) == step_flops(config, policy).model
    one, encode, decode, vgg = 1.69, 0.313, 0.510, 0.090
    by_hand = {
        "xxl_ste": encode + 3 * one + 2 * decode + 3 * vgg,
        "xxl_cca:equal": encode + 8 * one,
        "xxl_tokenizer_post": encode + one + 3 * decode + 3 * vgg,
    }
    for recipe, each in by_hand.items():
        found = method_flops(*flops_of(recipe))
        assert found / 1e12 == pytest.approx(128 * each, rel=0.01)
    guided = sample_flops(config, policy, guided=True) / 1e12
    assert guided == pytest.approx(2 * one + decode, rel=0.01)


def test_rollouts_are_counted_with_their_guidance():
    """4 conditions of 8: drawn by two halves, trained through two, held against the base's two."""
    config, policy = flops_of("xl_ar_grpo", rewards="mse")
    plain, guided = (sample_flops(config, policy, guided=g) for g in (False, True))
    one, decode = guided - plain, 2 * plain - guided
    assert method_flops(config, policy) == pytest.approx(4 * 8 * ((2 + 6 + 2) * one + decode))


def test_equal_arithmetic_of_the_miniature_is_equal_or_the_rivals_have_more():
    study = read_study("mini_table2")
    costs = {one.name: one for one in estimate.costs(study)}
    for name in ("STE", "CCA"):
        equal = costs[f"{name}, equal arithmetic"]
        assert 1.0 <= equal.training / costs["VA-π"].training < 1.06
        assert equal.steps > costs[name].steps == costs["VA-π"].steps


def test_check_tells_the_cost_and_all_that_is_in_the_way(tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'out'}"
    assert main(["--study=demo:tiny", workdir, "--check", "--set=steps=7"]) == 0
    assert "2 x 7 x 8" in capsys.readouterr().out
    assert main(["--study=table4", workdir, "--check"]) == 1
    told = capsys.readouterr()
    assert "H100 hours" in told.out
    assert all(name in told.err for name in (REFERENCE, INCEPTION))
    assert main(["--study=demo:tiny", workdir, "--check", "--set=vapi.noise_rate=2"]) == 1
    assert "config.vapi.noise_rate=2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_acceptance_names_published_figures_cheapest_first(capsys):
    assert main(["--study=acceptance", "--workdir=unused", "--check"]) == 1  # no weights here
    told = capsys.readouterr().out
    places = [
        told.index(word) for word in ("psnr 20.5", "below ln V", "fid 2.04", "fid 13.8", "fid 2.2 ")
    ]
    assert places == sorted(places)


def test_acceptance_stops_at_the_first_miss_and_measures_nothing_twice(tmp_path, capsys):
    calls, repaired = [], {}

    def check(name, value):
        def measure(changes, folder):
            calls.append((name, changes["data.path"]))
            return {"fid": repaired.get(name, value)}

        return Check(name, Measure(measure), {"fid": (2.0, 2.5)}, f"look at {name}")

    checks = (check("one", 2.2), check("two", 2.6), check("three", 2.2))
    given = Acceptance("a", checks, {"data.path": "here"})
    assert not given.run(tmp_path)
    assert calls == [("one", "here"), ("two", "here")]
    assert "look at two" in capsys.readouterr().out
    wider = (checks[0], dataclasses.replace(checks[1], wants={"fid": (2.0, 2.7)}), checks[2])
    assert dataclasses.replace(given, checks=wider).run(tmp_path)
    assert calls[2:] == [("three", "here")]
    # What was missed is looked at again, and all of it with other data.
    assert not given.run(tmp_path)
    repaired["two"] = 2.1
    assert given.run(tmp_path)
    assert calls[3:] == [("two", "here"), ("two", "here")]
    assert dataclasses.replace(given, changes={"data.path": "there"}).run(tmp_path)
    assert calls[5:] == [(name, "there") for name in ("one", "two", "three")]


def test_acceptance_says_which_files_it_will_miss_and_goes_as_far_as_it_can(tmp_path, capsys):
    here, gone = tmp_path / "here", str(tmp_path / "gone")
    here.touch()
    wants = {"fid": (2.0, 2.5)}
    one, two, three = (
        Check(name, Measure(lambda *_: {"fid": 2.2}, lambda _, needs=needs: needs), wants, "")
        for name, needs in (("one", (str(here),)), ("two", ()), ("three", (gone, "demo")))
    )
    given = Acceptance("a", (one, two, three, dataclasses.replace(three, name="four")))
    with pytest.raises(StudyError, match="gone, from “three” on") as error:
        given.run(tmp_path / "out")
    assert str(here) not in str(error.value) and "demo" not in str(error.value)
    told = capsys.readouterr()
    assert (told.out + told.err).index("gone") < (told.out + told.err).index("one")
    assert set(json.loads((tmp_path / "out" / RESULTS).read_text())) == {"one", "two"}
    Path(gone).touch()
    assert given.run(tmp_path / "out")


def test_acceptance_measures_again_where_files_were_replaced(tmp_path):
    calls, file, folder = [], tmp_path / "fid.pth", tmp_path / "c2i_xxl"
    file.write_text("one")
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "model.safetensors").write_text("as the manifest says")

    def look(changes, folder):
        calls.append(changes)
        return {"fid": 2.2}

    measure = Measure(look, lambda changes: [str(file), str(folder), "demo"])
    given = Acceptance("a", (Check("one", measure, {"fid": (2.0, 2.5)}, ""),))
    for change, many in (
        (lambda: None, 1),
        ((folder / "model.safetensors").touch, 1),
        (lambda: file.write_text("two, longer"), 2),
        (lambda: (folder / "manifest.json").write_text('{"outputs": {}}'), 3),
        (lambda: None, 3),
    ):
        change()
        assert given.run(tmp_path / "out")
        assert len(calls) == many
    (tmp_path / "out" / RESULTS).write_text("{")
    with pytest.raises(StudyError, match=RESULTS):
        given.run(tmp_path / "out")


def test_acceptance_draws_from_the_weights_that_are_set(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        acceptance,
        "draw_files",
        lambda files, checkpoint, *_: drawn.append((checkpoint, files.dtype)) or {},
    )
    measure = acceptance.sampled(Files("adm50k", "weights/xxl", reference="adm.npz"), Draw())
    for changes in ({}, {"init.gpt": "/data/xxl", "policy.dtype": "float32", "data.path": "d"}):
        measure.look(changes, tmp_path)
    assert drawn == [("weights/xxl", "bfloat16"), ("/data/xxl", "float32")]
    assert list(measure.reads(changes)) == ["/data/xxl", "adm.npz"]
    recipe = acceptance.teacher_forced("c2i_demo", {"init.vq": "mine"})
    assert list(recipe.reads({"init.gpt": "/data/xxl"})) == ["/data/xxl", "mine"]


@pytest.mark.slow
def test_acceptance_passes_with_the_shipped_models(tmp_path, capsys):
    assert main(["--study=acceptance:tiny", f"--workdir={tmp_path}"]) == 0
    assert "MISSED" not in capsys.readouterr().out
    measured = json.loads((tmp_path / RESULTS).read_text())
    assert [set(found["figures"]) for found in measured.values()] == [
        {"psnr", "ssim"}, {"ce", "below ln V"}, {"fid", "precision", "recall", "kid"},
    ]  # fmt: skip
