"""The command: what it says, what it writes, and what it verifies."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import commands
from tests.helpers import toy_features as toy
from tests.helpers.messages import assert_mentions
from vapi_jax import evaluate
from vapi_jax.common.digests import params_digest
from vapi_jax.evaluation import features as F
from vapi_jax.evaluation.measure import Settings


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The toy in place of the networks; nothing of this machine's own settings."""
    added = {"toy": toy.TOY, "inception": toy.FROM_FILE, "lpips_vgg": toy.TOY}
    for name, extractor in added.items():
        monkeypatch.setitem(F.EXTRACTORS, name, extractor)
    monkeypatch.delenv(evaluate.ENVIRONMENT, raising=False)


@pytest.fixture
def sets(tmp_path):
    """A folder of samples and an .npz of references."""
    np.savez(tmp_path / "reference.npz", toy.pixels(40, seed=2))
    return toy.folder(tmp_path / "samples", toy.pixels(30, seed=1)), tmp_path / "reference.npz"


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


def compared(sets, *more):
    return run("--samples", sets[0], "--reference", sets[1], *more)


def test_help_has_examples():
    printed = commands.module("evaluate", "--help").stdout
    for text in (
        "--samples",
        "--verify",
        "--precompute photos_stats",
        "imagenet256.npz",
        "VAPI_INCEPTION",
    ):
        assert text in printed


def test_a_real_run_brings_neither_torch_nor_tensorflow(tmp_path):
    np.savez(tmp_path / "a.npz", toy.pixels(4, seed=1, side=32))
    np.savez(tmp_path / "b.npz", toy.pixels(4, seed=2, side=32))
    code = (
        "import sys; from vapi_jax.evaluate import main; status = main(sys.argv[1:]);"
        "foreign = {'torch', 'tensorflow', 'torchvision', 'lpips_jax'} & set(sys.modules);"
        "print('foreign', foreign); sys.exit(status)"
    )
    done = commands.python(
        "-c", code, "--samples", tmp_path / "a.npz", "--reference", tmp_path / "b.npz",
        "--paired", "--features", "lpips_alex", "--metrics", "fid,precision,psnr,ssim",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "foreign set()" in done.stdout
    assert "Fréchet distance (LPIPS-AlexNet conv5)" in done.stdout
    assert "FID" not in done.stdout


def test_every_number_is_in_a_receipt_beside_the_samples(sets, capsys, tmp_path):
    assert compared(sets, "--features", "toy", "--seed", 5, "--batch", 7) == 0
    text = capsys.readouterr().out
    receipt = json.loads((tmp_path / "samples.receipt.json").read_text())
    assert list(receipt["metrics"]) == ["fid", "sfid", "is", "precision", "recall", "kid"]
    for entry in receipt["metrics"].values():
        assert entry["name"] in text and f"{entry['value']:.6g}" in text
    assert str(tmp_path / "samples.receipt.json") in text
    assert receipt["settings"]["seed"] == 5 and receipt["settings"]["batch"] == 7
    assert receipt["samples"]["count"] == 30 and receipt["reference"]["count"] == 40
    assert receipt["features"]["parameters_sha256"] == params_digest(toy.load(None, False).params)
    assert receipt["sampling"] is None and receipt["environment"]["devices"]["count"] == 8
    assert compared(sets, "--features", "toy", "--metrics", "fid, fid") == 0
    again = json.loads((tmp_path / "samples.receipt-2.json").read_text())
    assert list(again["metrics"]) == ["fid"]


def test_no_number_is_shown_where_no_receipt_can_be_written(sets, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert compared(sets, "--features", "toy", "--out", tmp_path / "file" / "r.json") == 1
    seen = capsys.readouterr()
    assert seen.out == "" and seen.err.startswith("error: the folder of the receipt")

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    assert compared(sets, "--features", "toy", "--out", tmp_path / "r.json") == 1
    seen = capsys.readouterr()
    assert seen.out == "" and "no space left" in seen.err


def test_without_inception_weights_it_says_so_and_goes_on_under_another_name(sets, capsys):
    assert compared(sets, "--metrics", "fid") == 0
    seen = capsys.readouterr()
    assert_mentions(seen.err, "pt_inception-2015-12-05-6726825d.pth", "SHA-256", "toy", "not FID")
    assert "Fréchet distance (toy)" in seen.out and "FID" not in seen.out


def test_inception_weights_come_from_the_flag_or_the_environment(sets, capsys, monkeypatch):
    assert compared(sets, "--metrics", "fid", "--inception", "published") == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("FID ")
    monkeypatch.setenv(evaluate.ENVIRONMENT, "published")
    assert compared(sets, "--metrics", "fid") == 0
    seen = capsys.readouterr()
    assert seen.out.splitlines()[2].startswith("FID ") and "not named" not in seen.err
    assert compared(sets, "--metrics", "fid", "--features", "toy") == 0
    assert "Fréchet distance (toy)" in capsys.readouterr().out


def test_pairs_need_no_network_and_say_nothing_of_one(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", toy.pixels(5, seed=1))
    np.savez(tmp_path / "b.npz", toy.pixels(5, seed=2))
    pair = (tmp_path / "a.npz", tmp_path / "b.npz")
    assert compared(pair, "--paired", "--metrics", "psnr,ssim", "--out", tmp_path / "r.json") == 0
    seen = capsys.readouterr()
    assert "PSNR in dB" in seen.out and "Inception" not in seen.err
    assert json.loads((tmp_path / "r.json").read_text())["features"] is None


def test_an_extractor_of_ones_own_by_module_and_attribute(sets, capsys):
    assert compared(sets, "--features", "tests.helpers.toy_features:TOY", "--metrics", "kid") == 0
    assert "kernel distance (toy)" in capsys.readouterr().out


# --- verify and precompute ------------------------------------------------------------------------


def test_a_receipt_verifies_and_tampering_does_not(sets, capsys, tmp_path):
    path = tmp_path / "r.json"
    assert compared(sets, "--features", "toy", "--out", path, "--seed", 2, "--batch", 5) == 0
    assert run("--verify", path) == 0
    assert "verified: digests and metrics agree" in capsys.readouterr().out
    receipt = json.loads(path.read_text())
    receipt["metrics"]["recall"]["value"] -= 0.01
    path.write_text(json.dumps(receipt))
    assert run("--verify", path, "--batch", 64) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if "DIFFERS" in line] == ["recall (toy)"]


def test_what_is_verified_are_the_recorded_settings(sets, tmp_path):
    path = tmp_path / "r.json"
    flags = ["--features", "toy", "--metrics", "kid,fid", "--seed", 7, "--batch", 5]
    assert compared(sets, *flags, "--pr_images", 9, "--out", path) == 0
    receipt = json.loads(path.read_text())

    def settings(*more):
        args = evaluate.parse(["--verify", str(path), *more])
        return evaluate.settings_of_receipt(receipt, args)

    # The toy is not the published network, so other weights are accepted when it is computed again.
    recorded = Settings(
        *map(str, sets),
        any_weights=True,
        features="toy",
        metrics=("kid", "fid"),
        seed=7,
        batch=5,
        pr_images=9,
    )
    assert settings() == recorded
    assert settings("--batch", "8") == dataclasses.replace(recorded, batch=8)
    there = settings("--samples", "a", "--reference", "b", "--features", "c", "--inception", "d")
    moved = {"samples": "a", "reference": "b", "features": "c", "inception": "d"}
    assert there == dataclasses.replace(recorded, **moved)


def test_verifying_other_images_names_the_digest_that_differs(sets, capsys, tmp_path):
    path = tmp_path / "r.json"
    assert compared(sets, "--features", "toy", "--out", path, "--metrics", "fid") == 0
    np.savez(tmp_path / "moved.npz", toy.pixels(30, seed=1))
    assert run("--verify", path, "--samples", tmp_path / "moved.npz") == 0
    np.savez(tmp_path / "other.npz", toy.pixels(40, seed=3))
    capsys.readouterr()
    assert run("--verify", path, "--reference", tmp_path / "other.npz") == 1
    text = capsys.readouterr().out
    assert_mentions(text, "reference", "SHA-256", "NOT verified")
    assert "samples differ" not in text
    (sets[0] / "0000.png").unlink()
    assert run("--verify", path) == 1
    assert "samples differ" in capsys.readouterr().out


def test_changed_weights_are_noticed(sets, capsys, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    assert compared(sets, "--features", "toy", "--out", path, "--metrics", "fid") == 0

    def load(file, any_weights):
        params = toy.load(file, any_weights).params
        return F.Weights({**params, "head": params["head"] + 1})

    monkeypatch.setitem(F.EXTRACTORS, "toy", F.Extractor("toy", load, toy.apply))
    assert run("--verify", path) == 1
    text = capsys.readouterr().out
    assert "features differ" in text and "DIFFERS" not in text


def test_a_receipt_cannot_make_the_command_import_a_module(sets, capsys, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "r.json"
    assert compared(sets, "--features", "toy", "--out", path, "--metrics", "fid") == 0
    receipt = json.loads(path.read_text())
    receipt["features"]["name"] = "evil:EXTRACTOR"
    path.write_text(json.dumps(receipt))
    capsys.readouterr()
    assert run("--verify", path) == 1
    assert "if you trust that module, add --features evil:EXTRACTOR" in capsys.readouterr().err
    assert run("--verify", path, "--features", "toy") == 0


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("metrics", "fid"),
        ("metrics", [1]),
        ("batch", "64"),
        ("batch", True),
        ("seed", 1.5),
        ("pr_images", None),
        ("paired", "no"),
    ],
)
def test_a_receipt_with_settings_of_another_type_is_refused(sets, capsys, tmp_path, section, value):
    path = tmp_path / "r.json"
    assert compared(sets, "--features", "toy", "--out", path, "--metrics", "fid") == 0
    receipt = json.loads(path.read_text())
    receipt["settings"][section] = value
    path.write_text(json.dumps(receipt))
    capsys.readouterr()
    assert run("--verify", path) == 1
    assert "error: " in capsys.readouterr().err


def test_precomputed_statistics_serve_as_a_reference(sets, capsys, tmp_path):
    stats = tmp_path / "stats.npz"
    assert run("--precompute", stats, "--reference", sets[1], "--features", "toy") == 0
    text = capsys.readouterr().out
    assert_mentions(text, "40 images", "40 feature vectors")
    assert compared(sets, "--features", "toy", "--out", tmp_path / "images.json") == 0
    both = (sets[0], stats)
    assert compared(both, "--features", "toy", "--out", tmp_path / "stats.json") == 0
    one, other = (
        json.loads((tmp_path / name).read_text())["metrics"]
        for name in ("images.json", "stats.json")
    )
    for name, entry in one.items():
        assert other[name]["value"] == pytest.approx(entry["value"], rel=1e-9)
    assert run("--verify", tmp_path / "stats.json") == 0
    assert run("--precompute", tmp_path / "s.txt", "--reference", sets[1]) == 1
    assert "must end in .npz" in capsys.readouterr().err


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--samples and --reference must be given"),
        (("--samples", "x"), "--reference must be given"),
        (("--precompute", "x.npz"), "--reference must be given"),
        (("--verify", "r.json", "--seed", "1"), "--verify does not read --seed"),
        (("--verify", "r.json", "--precompute", "x"), "two commands"),
        (
            ("--precompute", "x.npz", "--reference", "r", "--samples", "s"),
            "does not read --samples",
        ),
        (("--samples", "x", "--reference", "y", "--batch", "many"), "invalid int value: 'many'"),
        (("--sample", "x", "--reference", "y"), "unrecognized arguments: --sample"),
    ],
)
def test_flags_without_sense_end_with_a_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--samples", "/absent"), "there is nothing at /absent"),
        (("--reference", "/absent.npz"), "there is nothing at /absent.npz"),
        (("--features", "fid"), "features 'fid' are unknown; choose one of"),
        (("--features", "toy", "--inception", "f"), "'toy' read no such file"),
        (("--any_weights",), "name the weights with --inception"),
        (("--metrics", "fid,psnr"), "pairs are compared with --paired"),
        (("--metrics", ","), "at least one metric"),
        (("--batch", "0"), "batch >= 1"),
        (("--verify", "/absent.json"), None),
    ],
)
def test_errors_are_sentences_and_exit_with_one(sets, capsys, more, message):
    if message is None:
        assert run(*more) == 1
        message = "there is no file /absent.json"
    else:
        assert compared(sets, *more) == 1
    seen = capsys.readouterr()
    assert seen.err.splitlines()[-1].startswith("error: ") and message in seen.err
    assert seen.out == ""


def test_real_inception_weights_are_asked_for_by_name(sets, capsys, monkeypatch):
    monkeypatch.setitem(
        F.EXTRACTORS, "inception", F.Extractor("I", F._load_inception, toy.apply, True)
    )
    assert compared(sets, "--features", "inception") == 1
    assert "name it with --inception" in capsys.readouterr().err
    assert compared(sets, "--inception", "/absent.pth") == 1
    assert "/absent.pth: no such file" in capsys.readouterr().err
