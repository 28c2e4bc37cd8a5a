"""Receipts: written whole, read with suspicion, compared digest by digest and metric by metric."""

import copy
import json

import pytest

from vapi_jax.evaluation.receipt import (
    ReceiptError,
    check_writable,
    compare_receipts,
    environment,
    find_recipe,
    free_path,
    precision,
    precision_differs,
    read_receipt,
    show_comparison,
    show_receipt,
    write_receipt,
)

RECEIPT = {
    "samples": {
        "path": "/s/images", "kind": "images", "count": 50, "height": 32, "width": 48,
        "digest": "aa" * 32,
    },
    "reference": {"path": "/r.npz", "kind": "statistics", "count": None, "digest": "bb" * 32},
    "features": {
        "name": "toy", "label": "toy relu", "parameters_sha256": "cc" * 32, "published": False,
    },
    "settings": {"metrics": ["fid", "kid"], "batch": 64, "seed": 0, "pr_images": 9, "paired": False},
    "metrics": {
        "fid": {"name": "Fréchet distance (toy relu)", "value": 12.345678901234567, "note": "a note"},
        "kid": {"name": "kernel distance (toy relu)", "value": 0.001, "standard_error": 0.0002},
        "psnr": {"name": "PSNR in dB", "value": None, "note": "infinite"},
    },
    "not_computed": {"sfid": "toy relu has no spatial features"},
    "warnings": ["few images"],
    "sampling": {"seed": 7, "sampling": {"cfg_scale": 1.75}, "größe": "π"},
    "environment": {"devices": {"kind": "cpu", "count": 8}},
}  # fmt: skip


def changed(path, value):
    receipt = copy.deepcopy(RECEIPT)
    *parents, name = path.split(".")
    node = receipt
    for parent in parents:
        node = node[parent]
    node[name] = value
    return receipt


def test_a_receipt_comes_back_with_every_digit(tmp_path):
    path = tmp_path / "r.json"
    write_receipt(path, RECEIPT)
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    found = read_receipt(path)
    assert found["format"] == "vapi_jax evaluation receipt" and found["version"] == 1
    assert {name: found[name] for name in RECEIPT} == RECEIPT
    assert "π" in path.read_text(encoding="utf-8")


def test_numbers_that_json_cannot_hold_are_not_written(tmp_path):
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_receipt(tmp_path / "r.json", changed("metrics.fid.value", value))
    assert not list(tmp_path.iterdir())


def test_what_is_shown_names_metrics_digests_settings_recipe_and_the_file(tmp_path):
    path = tmp_path / "r.json"
    write_receipt(path, RECEIPT)
    text = show_receipt(path)
    for part in (
        "Fréchet distance (toy relu)  12.3457           -",
        "kernel distance (toy relu)     0.001      0.0002",
        "PSNR in dB                         -           -",
        "not computed: sfid: toy relu has no spatial features",
        "PSNR in dB: infinite",
        "warning: few images",
        "samples: /s/images (images), 50 images of 48x32 px, SHA-256 aaaaaaaaaaaaaaaa",
        "reference: /r.npz (statistics), an unknown number of images, SHA-256 bbbbbbbbbbbbbbbb",
        "features: toy relu, parameters SHA-256 cccccccccccccccc",
        "settings: metrics fid,kid, batch 64, seed 0",
        '\n  seed 7\n  sampling {"cfg_scale": 1.75}\n  größe π\n',
        "computed on: 8 x cpu",
        f"receipt: {path}",
    ):
        assert part in text


def test_long_entries_of_a_recipe_are_cut_where_they_are_shown_only(tmp_path):
    write_receipt(tmp_path / "r.json", changed("sampling.checkpoint", "x" * 500))
    lines = show_receipt(tmp_path / "r.json").splitlines()
    assert f"  checkpoint {'x' * 87}..." in lines
    assert read_receipt(tmp_path / "r.json")["sampling"]["checkpoint"] == "x" * 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "JSON object"),
        ("{}", "version 1.*None"),
        ('{"format": "vapi_jax evaluation receipt", "version": 2}', "version 2"),
        ('{"format": "vapi_jax evaluation receipt", "version": 1}', "samples, reference"),
        ('{"a": NaN}', "NaN"),
        ("\xff", "JSON"),
    ],
)
def test_files_that_are_no_receipts_are_refused(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ReceiptError, match=message) as caught:
        read_receipt(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", ["12", [1], {"a": 1}])
def test_a_value_that_is_no_number_is_refused(tmp_path, value):
    write_receipt(tmp_path / "r.json", changed("metrics.kid.value", value))
    with pytest.raises(ReceiptError, match=r"metrics\.kid"):
        read_receipt(tmp_path / "r.json")
    with pytest.raises(ReceiptError, match="no file"):
        read_receipt(tmp_path / "absent.json")


def test_a_recipe_is_found_beside_the_samples(tmp_path):
    for place in ("out/images", "other"):
        (tmp_path / place).mkdir(parents=True)
    for name in ("out/samples.npz", "out/more.npz"):
        (tmp_path / name).write_bytes(b"")
    for samples in ("out/images", "out/samples.npz", "out/more.npz", "other"):
        assert find_recipe(tmp_path / samples) is None
    recipe = {"seed": 3}
    (tmp_path / "out/recipe.json").write_text(json.dumps(recipe))
    for samples in ("out", "out/images", "out/samples.npz"):
        assert find_recipe(tmp_path / samples) == recipe
    for samples in ("out/more.npz", "other"):  # not theirs
        assert find_recipe(tmp_path / samples) is None
    (tmp_path / "out/more.recipe.json").write_text('{"seed": 4}')
    (tmp_path / "out/samples.recipe.json").write_text('{"seed": 5}')
    assert find_recipe(tmp_path / "out/more.npz") == {"seed": 4}
    assert find_recipe(tmp_path / "out/samples.npz") == {"seed": 5}
    (tmp_path / "out/recipe.json").write_text("no JSON")
    with pytest.raises(ReceiptError, match=r"out/recipe\.json"):
        find_recipe(tmp_path / "out/images")


def computed_in(policy, decoder, **more):
    checkpoint = {"policy": {"dtype": policy}, "tokenizer": {"decoder_dtype": decoder}}
    return {"seed": 7, "checkpoint": checkpoint, **more}


def test_another_precision_is_said_where_both_recipes_tell(tmp_path):
    ours, theirs = computed_in("float32", "float32"), computed_in("float32", "bfloat16")
    assert precision(theirs) == {"policy.dtype": "float32", "tokenizer.decoder_dtype": "bfloat16"}
    assert precision_differs(ours, computed_in("float32", "float32", seed=8)) is None
    assert "tokenizer.decoder_dtype bfloat16" in precision_differs(ours, theirs)
    for foreign in (None, {}, {"checkpoint": "x"}, {"checkpoint": {"policy": 1, "tokenizer": {}}}):
        assert precision(foreign) is None and precision_differs(ours, foreign) is None
    recorded, found = changed("sampling", ours), changed("sampling", theirs)
    comparison = compare_receipts(recorded, found)
    assert not comparison.equal
    assert comparison.digests == [precision_differs(theirs, ours)]
    write_receipt(tmp_path / "r.json", found)
    assert "policy.dtype float32, tokenizer.decoder_dtype bfloat16" in show_receipt(
        tmp_path / "r.json"
    )


def test_an_earlier_receipt_beside_the_samples_is_kept(tmp_path):
    samples = tmp_path / "samples.npz"
    names = []
    for _ in range(3):
        path = free_path(samples)
        path.write_text("{}")
        names.append(path.name)
    assert names == [f"samples.npz.receipt{number}.json" for number in ("", "-2", "-3")]


def test_a_place_where_nothing_can_be_written_is_noticed_beforehand(tmp_path):
    check_writable(tmp_path / "new" / "r.json")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "r.json", tmp_path / "new"):
        with pytest.raises(ReceiptError, match="receipt"):
            check_writable(path)


def test_equal_receipts_are_equal():
    found = compare_receipts(RECEIPT, copy.deepcopy(RECEIPT))
    assert found.equal and not found.digests
    assert [row[-1] for row in found.rows] == ["equal"] * 3
    assert "verified: digests and metrics agree" in show_comparison(found)


@pytest.mark.parametrize(
    "what", ["samples.digest", "reference.digest", "features.parameters_sha256"]
)
def test_a_digest_that_differs_is_named_with_both_values(what):
    found = compare_receipts(RECEIPT, changed(what, "dd" * 32))
    assert not found.equal and len(found.digests) == 1
    text = show_comparison(found)
    assert text.startswith(what.split(".")[0]) and "dd" * 32 in text and "NOT verified" in text
    assert [row[-1] for row in found.rows] == ["equal"] * 3


@pytest.mark.parametrize(
    ("metric", "value", "verdict"),
    [
        ("fid", 12.345678901234567 * (1 + 9e-5), "equal"),
        ("fid", 12.345678901234567 * (1 + 3e-4), "DIFFERS"),
        ("fid", None, "DIFFERS"),
        ("psnr", 40.0, "DIFFERS"),
        ("kid", 0.001 + 0.9e-6, "equal"),
        ("kid", 0.001 - 2e-6, "DIFFERS"),
    ],
)
def test_metrics_are_equal_within_the_stated_tolerance(metric, value, verdict):
    found = compare_receipts(RECEIPT, changed(f"metrics.{metric}.value", value))
    verdicts = dict(zip(RECEIPT["metrics"], (row[-1] for row in found.rows), strict=True))
    assert verdicts.pop(metric) == verdict
    assert set(verdicts.values()) == {"equal"}
    assert found.equal == (verdict == "equal")
    assert "0.0001 relative" in show_comparison(found)


def test_a_metric_that_one_side_lacks_is_a_difference():
    fewer = copy.deepcopy(RECEIPT)
    del fewer["metrics"]["kid"]
    for pair, verdict in (((RECEIPT, fewer), "not computed"), ((fewer, RECEIPT), "not recorded")):
        found = compare_receipts(*pair)
        assert not found.equal
        assert verdict in [row[-1] for row in found.rows]


def test_the_environment_says_with_what_where_and_when():
    found = json.loads(json.dumps(environment()))
    assert {"vapi_jax", "python", "jax", "jaxlib", "numpy", "pillow"} <= set(found["versions"])
    assert found["devices"] == {"kind": "cpu", "count": 8}
    assert found["date"].endswith("+00:00")
