"""From two sets of images to the values of a receipt, with a small extractor in place of a network."""

import functools
import json

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.special
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.helpers import toy_features as toy
from tests.helpers.compare import assert_close
from vapi_jax.evaluation import features as F
from vapi_jax.evaluation import measure as M
from vapi_jax.evaluation.features import Extractor, FeaturesError
from vapi_jax.evaluation.images import ImagesError
from vapi_jax.evaluation.inception_score import inception_score, shuffled_order
from vapi_jax.evaluation.kernel_distance import kernel_distance
from vapi_jax.evaluation.measure import MeasureError, Settings, measure, precompute
from vapi_jax.evaluation.pairs import PairsError
from vapi_jax.evaluation.precision_recall import precision_recall
from vapi_jax.evaluation.statistics import StatisticsError, load_statistics
from vapi_jax.models.lpips import load_lpips_params, lpips

ALL = ("fid", "sfid", "is", "precision", "recall", "kid")


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The toy under three names: as it is, as "inception", and as a network whose weights come in a file."""
    added = {"toy": toy.TOY, "inception": toy.FROM_FILE, "filed": toy.FROM_FILE}
    for name, extractor in added.items():
        monkeypatch.setitem(F.EXTRACTORS, name, extractor)


@pytest.fixture
def sets(tmp_path):
    """A folder of samples, an .npz of references, and the pixels of both."""
    samples, reference = toy.pixels(30, seed=1), toy.pixels(40, seed=2)
    np.savez(tmp_path / "reference.npz", reference)
    return toy.folder(tmp_path / "samples", samples), tmp_path / "reference.npz", samples, reference


def run(samples, reference, **options):
    options = {"features": "toy", "metrics": ALL, "batch": 7, **options}
    receipt = measure(Settings(str(samples), str(reference), **options))
    json.dumps(receipt, allow_nan=False)  # every receipt can be written
    return receipt


def values(receipt):
    return {name: entry["value"] for name, entry in receipt["metrics"].items()}


def raw(images):
    return {k: np.asarray(v) for k, v in toy.apply(toy.load(None, False).params, images).items()}


def textbook_frechet(a, b):
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    return shift @ shift + np.trace(sum(covariances) - 2 * root)


def test_samples_and_reference_of_two_protocols_are_warned_about(tmp_path):
    for name, rule in (("a", "balanced"), ("b", "random")):
        toy.folder(tmp_path / name / "images", toy.pixels(30, seed=1))
        recipe = {"count": 30, "labels": {"rule": rule, "classes": 12}}
        (tmp_path / name / "recipe.json").write_text(json.dumps(recipe))
    (warning,) = run(tmp_path / "a", tmp_path / "b", metrics=("kid",))["warnings"]
    assert "labels.rule balanced and random" in warning
    assert run(tmp_path / "a", tmp_path / "a", metrics=("kid",))["warnings"] == []


def test_every_metric_is_the_plain_function_of_the_features(sets):
    samples, reference, a, b = sets
    a, b = raw(a), raw(b)
    found = run(samples, reference, seed=3)
    shares = precision_recall(b["pool"], a["pool"])
    order = shuffled_order(30, 3)
    assert values(found) == {
        "fid": pytest.approx(textbook_frechet(a["pool"], b["pool"]), rel=5e-6),
        "sfid": pytest.approx(textbook_frechet(a["spatial"], b["spatial"]), rel=5e-6),
        "is": pytest.approx(inception_score(a["logits"][order]).score, rel=1e-5),
        "precision": shares.precision,
        "recall": shares.recall,
        "kid": pytest.approx(kernel_distance(a["pool"], b["pool"]).distance, rel=5e-6),
    }
    assert 0 < shares.precision < 1 and 0 < shares.recall < 1
    assert found["metrics"]["kid"]["method"] == "jackknife"
    assert found["metrics"]["kid"]["standard_error"] > 0
    assert found["metrics"]["precision"]["samples"] == 30
    assert found["metrics"]["precision"]["reference_images"] == 40
    assert found["not_computed"] == {} and found["warnings"] == []


def test_samples_are_shuffled_before_they_are_cut_into_splits(sets, monkeypatch):
    samples, reference, a, _ = sets
    tens = functools.partial(inception_score, split_size=10)
    monkeypatch.setattr(M, "inception_score", tens)
    logits = raw(a)["logits"]
    for seed in (0, 1):
        entry = run(samples, reference, metrics=("is",), seed=seed)["metrics"]["is"]
        assert entry["value"] == pytest.approx(
            tens(logits[shuffled_order(30, seed)]).score, rel=1e-5
        )
        assert entry["value"] != pytest.approx(tens(logits).score, rel=1e-4)
        assert entry["splits"] == 3 and entry["standard_deviation"] > 0


def test_container_order_and_batch_change_nothing(sets, tmp_path):
    samples, reference, a, _ = sets
    first = run(samples, reference)
    np.savez_compressed(tmp_path / "samples.npz", a)
    second = run(tmp_path / "samples.npz", reference, batch=64)
    assert second["samples"]["digest"] == first["samples"]["digest"]
    assert values(second) == pytest.approx(values(first), rel=2e-6)
    np.savez(tmp_path / "mixed.npz", np.random.default_rng(0).permutation(a))
    mixed = run(tmp_path / "mixed.npz", reference)
    assert mixed["samples"]["digest"] != first["samples"]["digest"]
    assert values(mixed) == pytest.approx(values(first), rel=2e-6)


def test_only_the_published_weights_give_published_names(sets):
    samples, reference, *_ = sets
    names = {m: e["name"] for m, e in run(samples, reference)["metrics"].items()}
    assert names == {
        "fid": "Fréchet distance (toy)",
        "sfid": "spatial Fréchet distance (toy)",
        "is": "classifier score (toy)",
        "precision": "precision (toy)",
        "recall": "recall (toy)",
        "kid": "kernel distance (toy)",
    }
    found = run(samples, reference, features="inception", inception="published")
    assert [e["name"] for e in found["metrics"].values()] == [
        "FID", "sFID", "Inception Score", "precision", "recall", "KID",
    ]  # fmt: skip
    assert found["features"]["file"] == "published" and found["features"]["published"] is True
    found = run(samples, reference, features="inception", inception="mine", metrics=("fid",))
    assert found["metrics"]["fid"]["name"] == "Fréchet distance (toy, weights abababab)"
    found = run(reference, reference, features="inception", inception="published", paired=True)
    assert [e["name"] for e in found["metrics"].values()][:2] == ["rFID", "rsFID"]


def test_lpips_features_give_no_sfid_and_no_inception_score(tmp_path):
    np.savez(tmp_path / "a.npz", toy.pixels(5, side=32))
    found = run(
        tmp_path / "a.npz", tmp_path / "a.npz", features="lpips_alex", metrics=("is", "kid")
    )
    assert list(found["metrics"]) == ["kid"]
    assert found["not_computed"] == {"is": "LPIPS-AlexNet conv5 has no logits features"}
    with pytest.raises(MeasureError, match=r"sfid: LPIPS-AlexNet conv5"):
        run(tmp_path / "a.npz", tmp_path / "a.npz", features="lpips_alex", metrics=("sfid", "is"))


def test_no_more_images_than_features_bring_a_warning_and_the_kernel_distance(tmp_path, sets):
    np.savez(tmp_path / "few.npz", toy.pixels(5, seed=1))
    found = run(tmp_path / "few.npz", sets[1], metrics=("fid",))
    assert list(found["metrics"]) == ["fid", "kid"]
    assert found["metrics"]["fid"]["singular"] is True
    assert "covariance is singular" in found["metrics"]["fid"]["note"]
    assert "5 images are no more than the 5 features" in found["warnings"][0]
    assert run(*sets[:2], metrics=("fid",))["metrics"]["fid"]["singular"] is False


def test_too_few_images_for_a_metric_are_a_reason_and_not_a_crash(tmp_path, sets):
    np.savez(tmp_path / "one.npz", toy.pixels(1))
    np.savez(tmp_path / "three.npz", toy.pixels(3))
    found = run(tmp_path / "one.npz", sets[1])
    assert list(found["metrics"]) == ["is"]
    assert found["not_computed"]["fid"] == "at least 2 images on each side are needed"
    found = run(tmp_path / "three.npz", sets[1])
    assert list(found["metrics"]) == ["fid", "sfid", "is", "kid"]
    assert "at least 4 images" in found["not_computed"]["recall"]
    assert "at least 4 images" in run(sets[1], tmp_path / "three.npz")["not_computed"]["precision"]


def test_too_few_reference_images_asked_for_are_a_reason_before_any_pass(sets):
    found = run(*sets[:2], metrics=("fid", "kid", "recall"), pr_images=3)
    assert list(found["metrics"]) == ["fid", "kid"]
    assert found["not_computed"] == {"recall": "pr_images=3: at least 4 are needed"}
    with pytest.raises(MeasureError, match="kid: pr_images=1: at least 2 are needed"):
        run(*sets[:2], metrics=("kid", "precision"), pr_images=1)


# --- references -----------------------------------------------------------------------------------


def test_precomputed_statistics_stand_for_their_images(sets, tmp_path):
    samples, reference, _, b = sets
    out = tmp_path / "new" / "stats.npz"
    facts = precompute(Settings("", str(reference), features="toy", batch=7), out)
    from_images, from_file = run(samples, reference), run(samples, out)
    assert values(from_file) == pytest.approx(values(from_images), rel=1e-9)
    assert facts["images"]["digest"] == from_images["reference"]["digest"]
    assert facts["images"]["count"] == from_file["reference"]["count"] == 40
    assert from_file["reference"]["made_from"]["images"] == facts["images"]
    assert from_file["reference"]["kind"] == "statistics"
    assert from_file["warnings"] == []
    assert_close(load_statistics(out).features, raw(b)["pool"], 2e-6)


def test_statistics_of_images_of_another_size_are_warned_about(sets, tmp_path):
    samples = sets[0]
    toy.folder(tmp_path / "large", np.repeat(toy.pixels(30, seed=1), 2, axis=1))
    precompute(Settings("", str(tmp_path / "large"), features="toy"), tmp_path / "stats.npz")
    with_images = run(samples, tmp_path / "large", metrics=("kid",))["warnings"]
    assert run(samples, tmp_path / "stats.npz", metrics=("kid",))["warnings"] == with_images
    assert "sizes differ" in with_images[0]


def test_statistics_in_other_features_are_refused(sets, tmp_path, monkeypatch):
    samples, reference, *_ = sets
    precompute(Settings("", str(reference), features="toy"), tmp_path / "stats.npz")

    def load(file, any_weights):
        weights = toy.load(file, any_weights)
        return F.Weights({**weights.params, "w": weights.params["w"] + 1})

    monkeypatch.setitem(F.EXTRACTORS, "toy", Extractor("changed", load, toy.apply))
    with pytest.raises(StatisticsError, match=r"toy \(.*changed"):
        run(samples, tmp_path / "stats.npz")


def test_foreign_statistics_belong_to_inception(sets, tmp_path):
    samples, _, _, b = sets
    pool = raw(b)["pool"].astype(np.float64)
    arrays = {"mu": pool.mean(axis=0), "sigma": np.cov(pool, rowvar=False)}
    np.savez(tmp_path / "fid.npz", **arrays)
    inception = {"features": "inception", "inception": "published"}
    found = run(samples, tmp_path / "fid.npz", **inception)
    assert list(found["metrics"]) == ["fid", "is"]
    assert values(found)["fid"] == pytest.approx(values(run(*sets[:2]))["fid"], rel=5e-6)
    assert found["not_computed"]["sfid"] == "the reference statistics have no mu_s and sigma_s"
    for metric in ("precision", "recall", "kid"):
        assert "neither images nor feature vectors" in found["not_computed"][metric]
    found = run(samples, tmp_path / "fid.npz", features="inception", inception="mine")
    assert "taken to be of FID's Inception network" in found["warnings"][0]
    with pytest.raises(StatisticsError, match="FID"):
        run(samples, tmp_path / "fid.npz")
    np.savez(tmp_path / "wide.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(StatisticsError, match="pool.*6.*toy.*5"):
        run(samples, tmp_path / "wide.npz", **inception)


def test_an_adm_reference_batch_gives_statistics_and_images(sets, tmp_path):
    samples, _, _, b = sets
    # Statistics of other images than the file's, so that it shows which of them were used.
    other = {k: v.astype(np.float64) for k, v in raw(toy.pixels(50, seed=5)).items()}
    arrays = {"mu": other["pool"].mean(axis=0), "sigma": np.cov(other["pool"], rowvar=False)}
    arrays |= {
        "mu_s": other["spatial"].mean(axis=0),
        "sigma_s": np.cov(other["spatial"], rowvar=False),
    }
    np.savez(tmp_path / "adm.npz", arr_0=b, **arrays)
    found = run(samples, tmp_path / "adm.npz", features="inception", inception="published")
    a = raw(sets[2])
    assert values(found)["fid"] == pytest.approx(
        textbook_frechet(a["pool"], other["pool"]), rel=5e-6
    )
    assert values(found)["sfid"] == pytest.approx(
        textbook_frechet(a["spatial"], other["spatial"]), rel=5e-6
    )
    plain = values(run(*sets[:2]))
    assert {m: values(found)[m] for m in ("precision", "recall")} == {
        m: plain[m] for m in ("precision", "recall")
    }
    assert found["reference"]["kind"] == "statistics and images"
    # In other features the statistics mean nothing, and the images are used throughout.
    found = run(samples, tmp_path / "adm.npz")
    assert values(found) == pytest.approx(plain, rel=1e-9)
    assert "are not used; its images are" in found["warnings"][0]


def test_random_reference_images_are_taken_where_there_are_too_many(sets, tmp_path):
    samples, reference, _, b = sets
    found = run(samples, reference, pr_images=12, seed=4)
    assert found["metrics"]["kid"]["reference_images"] == 12
    assert found["metrics"]["kid"]["samples"] == 30
    assert values(found)["fid"] == pytest.approx(values(run(samples, reference))["fid"])
    chosen = np.sort(np.random.default_rng([4, 1]).choice(40, 12, replace=False))
    want = kernel_distance(raw(toy.pixels(30, seed=1))["pool"], raw(b[chosen])["pool"])
    assert values(found)["kid"] == pytest.approx(want.distance, rel=5e-6)
    precompute(
        Settings("", str(reference), features="toy", pr_images=12, seed=4), tmp_path / "s.npz"
    )
    assert values(run(samples, tmp_path / "s.npz"))["kid"] == pytest.approx(want.distance, rel=5e-6)


# --- samplers, pairs, errors ----------------------------------------------------------------------


def test_the_directory_of_a_sampler_is_understood(tmp_path, sets):
    recipe = {"count": 30, "seed": 9, "sampling": {"cfg_scale": 1.5}}
    toy.folder(tmp_path / "out" / "images", sets[2])
    (tmp_path / "out" / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "out" / "grid.png").write_bytes(b"no sample")
    found = run(tmp_path / "out", sets[1], metrics=("fid",))
    assert found["samples"]["path"] == str(tmp_path / "out" / "images")
    assert found["sampling"] == recipe and found["warnings"] == []
    np.savez(tmp_path / "out" / "samples.npz", sets[2][:29])
    found = run(tmp_path / "out" / "samples.npz", sets[1], metrics=("fid",))
    assert found["sampling"] == recipe
    assert found["warnings"] == ["the sampler's recipe is for 30 images, there are 29"]


def test_samples_of_two_precisions_bring_a_warning(tmp_path, sets):
    for name, images, dtype in (("a", sets[2], "float32"), ("b", sets[3], "bfloat16")):
        toy.folder(tmp_path / name / "images", images)
        checkpoint = {"policy": {"dtype": dtype}, "tokenizer": {"decoder_dtype": dtype}}
        (tmp_path / name / "recipe.json").write_text(json.dumps({"checkpoint": checkpoint}))
    found = run(tmp_path / "a", tmp_path / "b", metrics=("fid",))
    (warning,) = found["warnings"]
    assert "float32" in warning and "bfloat16" in warning
    assert run(tmp_path / "a", tmp_path / "a", metrics=("fid",))["warnings"] == []
    assert run(tmp_path / "a", sets[1], metrics=("fid",))["warnings"] == []


def test_pairs_are_judged_by_pixels_and_by_lpips(tmp_path):
    originals = toy.pixels(9, seed=1, side=32)
    noise = np.random.default_rng(0).normal(scale=12, size=originals.shape)
    again = np.clip(originals + noise, 0, 255).astype(np.uint8)
    a, b = toy.folder(tmp_path / "a", again), toy.folder(tmp_path / "b", originals)
    metrics = ("psnr", "ssim", "lpips_alex", "fid")
    found = run(a, b, metrics=metrics, paired=True, batch=4)
    psnr = [peak_signal_noise_ratio(x, y) for x, y in zip(originals, again, strict=True)]
    ssim = [
        structural_similarity(x, y, channel_axis=-1) for x, y in zip(originals, again, strict=True)
    ]
    params = load_lpips_params("alex")
    far = jax.jit(lambda p, x, y: lpips(p, x, y, "alex"))
    far = np.asarray(far(params, *(x / np.float32(127.5) - 1 for x in (again, originals))))
    for name, want in (("psnr", psnr), ("ssim", ssim), ("lpips_alex", far)):
        entry = found["metrics"][name]
        assert entry["value"] == pytest.approx(np.mean(want), rel=5e-6)
        assert entry["standard_error"] == pytest.approx(np.std(want, ddof=1) / 3, rel=1e-5)
        assert entry["pairs"] == 9
    assert found["metrics"]["fid"]["value"] > 0
    only = run(a, b, metrics=("psnr",), paired=True)
    assert only["features"] is None and values(only)["psnr"] == values(found)["psnr"]
    for side in ("samples", "reference"):
        assert only[side]["digest"] == found[side]["digest"]


def test_equal_pairs_have_an_infinite_psnr_which_is_said_in_words(sets):
    found = run(sets[0], sets[0], metrics=("psnr", "ssim"), paired=True)
    assert found["metrics"]["psnr"]["value"] is None
    assert found["metrics"]["psnr"]["note"] == "30 of 30 pairs are equal: infinite"
    assert values(found)["ssim"] == pytest.approx(1.0, abs=5e-7)


def test_pairs_that_do_not_fit_are_refused(tmp_path, sets):
    with pytest.raises(ImagesError, match="30, .*has 40"):
        run(*sets[:2], paired=True, metrics=("psnr",))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ImagesError, match="'arr_0'"):
        run(sets[0], tmp_path / "stats.npz", paired=True)
    np.savez(tmp_path / "small.npz", toy.pixels(4, side=6))
    for metric, message in (("ssim", "7x7"), ("lpips_vgg", "at least 16x16")):
        with pytest.raises(PairsError, match=f"{metric}.*{message}"):
            run(tmp_path / "small.npz", tmp_path / "small.npz", paired=True, metrics=(metric,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("fid", "fidd")}, "metrics fidd are unknown here; choose from fid, sfid"),
        ({"metrics": ("psnr",)}, r"unknown here \(pairs are compared with --paired\)"),
        ({"metrics": ()}, "at least one metric"),
        ({"batch": 0}, "batch >= 1"),
        ({"pr_images": 0}, "pr_images >= 1"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_settings_without_sense_are_refused(options, message):
    with pytest.raises(MeasureError, match=message):
        Settings("a", "b", **options)


def test_features_that_are_not_finite_are_refused(monkeypatch, sets):
    def apply(params, images):
        found = toy.apply(params, images)
        return {**found, "pool": found["pool"] / (images[:, 0, 0] > 90).all(axis=1, keepdims=True)}

    monkeypatch.setitem(F.EXTRACTORS, "toy", Extractor("broken", toy.load, apply))
    with pytest.raises(FeaturesError, match=r"broken.*pool.*\d+.*\d+.*samples"):
        run(*sets[:2], metrics=("kid",))


def test_images_that_change_between_two_passes_are_noticed(sets, monkeypatch):
    samples = sets[0]
    compare = M._compare_sets

    def compare_and_meddle(*args):
        found = compare(*args)
        (samples / "0003.png").write_bytes((samples / "0004.png").read_bytes())
        return found

    monkeypatch.setattr(M, "_compare_sets", compare_and_meddle)
    with pytest.raises(MeasureError, match="changed while they were read"):
        run(samples, samples, metrics=("fid", "psnr"), paired=True)


def test_statistics_need_two_images_and_a_place(tmp_path, sets):
    np.savez(tmp_path / "one.npz", toy.pixels(1))
    with pytest.raises(MeasureError, match="at least 2"):
        precompute(Settings("", str(tmp_path / "one.npz"), features="toy"), tmp_path / "s.npz")
    (tmp_path / "file").write_text("")
    with pytest.raises(MeasureError, match="cannot be written"):
        precompute(Settings("", str(sets[1]), features="toy"), tmp_path / "file" / "s.npz")
