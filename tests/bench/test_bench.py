"""The benchmark measures the real step, counts what it sends, and says what stands in for what."""

import dataclasses
import json
import math
import re
import time
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import commands
from tests.helpers.compare import assert_close_in_norm
from tests.helpers.tiny import make_tiny_config
from vapi_jax.bench import hlo, measure, phases, report, scaling, setup, sweep
from vapi_jax.bench.devices import measured_peak, peak, table_peak
from vapi_jax.common.trees import flatten
from vapi_jax.data import DataError
from vapi_jax.methods.config import ConfigError
from vapi_jax.methods.corruption import purpose_keys
from vapi_jax.parallel.sharding import make_mesh


def one_device():
    return make_mesh(1, 1, jax.devices()[:1])


def tiny(**changes):
    """A recipe without weights of its own, as a benchmark meets it."""
    return make_tiny_config("vapi", **{"init": {"vq": "", "gpt": ""}, **changes})


@pytest.fixture(scope="module")
def tiny_setup():
    return setup.build(tiny(vapi={"noise_rate": 0.0}), one_device())


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peaks_of_known_devices(kind, tera):
    assert table_peak(kind, "bfloat16") == tera * 1e12
    assert table_peak(kind, "float32") is None  # the table is of bfloat16


def test_an_unknown_device_is_measured():
    assert table_peak("cpu", "bfloat16") is None
    assert measured_peak("float32", repeats=1) > 1e8
    value, source = peak("float32", devices=8)  # virtual devices share the cores
    assert 1e8 < value < 1e14
    assert source == "measured by a large float32 matrix product"


# --- the setup --------------------------------------------------------------------------------------


def test_a_recipe_without_weights_gets_random_ones_and_says_so(tiny_setup):
    assert tiny_setup.notes == {
        "generator": "random weights",
        "tokenizer": "random weights",
        "data": "the recipe's data (photos)",
    }
    head = np.asarray(tiny_setup.state.params["output"]["kernel"])
    assert 0.015 < head.std() < 0.025  # a zero head would send zeros through every layer
    assert tiny_setup.batch["image"].shape == (16, 8, 8, 3)


def test_data_that_is_not_here_is_replaced_and_the_reason_said():
    config = tiny(data={"name": "image_folder", "path": "/nowhere/at/all"},
                  policy={"num_classes": 7})  # fmt: skip
    task = setup.VAPi(config, one_device())
    batch, note = setup._first_batch(task)
    assert note.startswith("random images and labels; the recipe's data: ")
    assert "/nowhere/at/all" in note
    assert batch["image"].min() >= -1.0
    assert set(batch["condition"]) <= set(range(7))
    assert len(set(batch["condition"])) > 3


def test_weights_that_are_named_and_absent_are_replaced_and_the_reason_said():
    made = setup.build(tiny(init={"vq": "/nowhere/vq", "gpt": "/nowhere/gpt"}), one_device())
    for subject in ("generator", "tokenizer"):
        assert made.notes[subject].startswith("random weights; ")
        assert "/nowhere/" in made.notes[subject]


def test_shapes_alone_are_the_shapes_of_the_real_thing(tiny_setup):
    alone = setup.abstract(tiny_setup.method.config, one_device())
    for got, want in ((alone.state, tiny_setup.state), (alone.batch, tiny_setup.batch),
                      (alone.frozen, tiny_setup.frozen)):  # fmt: skip
        assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
            lambda x: (x.shape, x.dtype), want
        )


@pytest.mark.parametrize("build", [setup.build, setup.abstract])
def test_other_tasks_are_refused(build):
    with pytest.raises(ConfigError, match="'base':.*'vapi'"):
        build(make_tiny_config("base"), one_device())


# --- timing ---------------------------------------------------------------------------------------


def test_median_and_quartiles():
    assert setup.spread([4.0, 1.0, 2.0, 3.0, 100.0]) == setup.Spread(3.0, 2.0, 4.0, 5)
    assert setup.spread([2.0]) == setup.Spread(2.0, 2.0, 2.0, 1)


def test_steps_take_turns_and_hand_the_state_on():
    calls, ticks = [], []
    rig_of_strings = setup.Setup(None, None, "", None, "frozen", "batch", {})

    def step(name, seconds):
        def run(state, frozen, batch):
            assert (frozen, batch) == ("frozen", "batch")
            calls.append(name)
            time.sleep(seconds)
            return state + name, {}

        return run

    steps = {"a": step("a", 0.02), "b": step("b", 0.0)}
    laps = setup.time_steps(rig_of_strings, steps, 3, 2, lambda: ticks.append(1))
    assert calls == ["a", "b"] * 5
    assert rig_of_strings.state == "ab" * 5
    assert len(ticks) == 10
    assert len(laps["a"].wall) == len(laps["b"].processor) == 3
    assert min(laps["a"].wall) >= 0.02 > min(laps["b"].wall)
    assert min(laps["a"].processor) < 0.015  # asleep


def test_what_a_step_waits_for_its_input(tiny_setup, monkeypatch):
    def slow(task):
        batch = jax.device_get(tiny_setup.batch)
        while True:
            yield batch
            time.sleep(0.05)

    monkeypatch.setattr(setup, "host_batches", slow)
    seen = []

    def step(state, frozen, batch):
        seen.append(batch["image"].sharding)
        return state, {}

    waited = setup.input_wait(tiny_setup, step, 3, lambda: None)
    assert 0.05 <= waited < 1.0
    assert len(seen) == 3


def test_without_data_no_wait_is_measured(tiny_setup, monkeypatch):
    def absent(task):
        raise DataError("no such folder")

    monkeypatch.setattr(setup, "host_batches", absent)
    assert setup.input_wait(tiny_setup, None, 3, lambda: None) is None


def test_a_fault_in_the_data_is_not_timed_as_noise(tiny_setup, monkeypatch):
    def broken(*_):
        raise ValueError("a fault of the program")

    monkeypatch.setattr(setup, "make_dataset", broken)
    with pytest.raises(ValueError, match="a fault of the program"):
        setup._first_batch(tiny_setup.method)


# --- phases ---------------------------------------------------------------------------------------


def test_the_phases_together_are_the_gradient_of_the_step(tiny_setup):
    """Each is a program of its own; chained, they give what differentiating the whole gives."""
    parts, task, batch = phases._parts(tiny_setup), tiny_setup.method, tiny_setup.batch
    params, frozen, key = tiny_setup.state.params, tiny_setup.frozen, jax.random.key(5)
    indexed = {**batch, "index": jnp.arange(16)}
    keys = purpose_keys(key, indexed["index"])
    tokens = parts.encode(frozen, batch["image"])
    hidden, pull = parts.forward(params, batch["condition"], tokens[:, :-1])
    samples, entropy = parts.sampling(hidden, task.policy.head(params), keys[1], tokens)
    judged = parts.rewards(frozen, samples, tokens, batch, keys)
    got = flatten(parts.backward(pull, hidden, params, judged, entropy, keys))

    def whole(params):
        return task.loss(params, {}, frozen, indexed, key, 0)[0]

    want = flatten(jax.jit(jax.grad(whole))(params))
    assert_close_in_norm(got, want, 1e-5)
    decoded = parts.decode(frozen, samples.reshape(-1, samples.shape[-1]))
    assert decoded.shape == (48, 8, 8, 3)
    updated, _, norm = parts.optimizer(
        {**tiny_setup.state.params}, tiny_setup.state.opt_state, params
    )
    assert jax.tree.structure(updated) == jax.tree.structure(params)
    assert norm > 0.0


# --- communication --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "fsdp", "count"), [(1, 8, 1), (2, 4, 2)], ids=["1x8", "2x4-microbatches"]
)
def test_the_model_of_what_is_sent_is_what_the_compiled_step_sends(data, fsdp, count):
    config = tiny(microbatch_size=16 // count, policy={"remat": "full"})
    alone = setup.abstract(config, make_mesh(data, fsdp))
    compiled, _ = setup.compile_step(alone, True)
    found = hlo.collectives(compiled.as_text())
    assert all(one.exact for one in found)
    gathers = sum(
        one.sent_bytes
        for one in found
        if one.kind == "all-gather" and "quantile" not in one.op_name
    )
    scatters = sum(one.sent_bytes for one in found if one.kind == "reduce-scatter")
    sums = [one for one in found if one.kind == "all-reduce"]
    between = sum(one.sent_bytes for one in sums if one.group_size == data)
    numbers = scaling.count_parameters(alone.state.params, alone.method.mesh)
    sent = scaling.traffic(numbers, "float32", count, fsdp, data)
    assert numbers.whole == 5 * 32  # the norms
    # Versions of XLA differ in the handful of scalars that they gather for metrics.
    assert gathers == pytest.approx(sent.gathers, rel=0.01)
    whole = (fsdp - 1) / fsdp * 8 * numbers.whole  # of which the rest is metrics
    assert scatters == sent.scatter - whole
    if data > 1:
        assert between == pytest.approx(sent.across, rel=0.05)


def test_traffic_by_hand():
    numbers = scaling.Parameters(layers=1000, rest=100, whole=10)
    sent = scaling.traffic(numbers, "bfloat16", microbatches=3, fsdp=4, nodes=2)
    assert sent.gathers == 0.75 * 2 * (2 * 3 * 1000 + 100)
    assert sent.scatter == 0.75 * (3 * 4 * 1100 + 2 * 40)
    assert sent.across == 2 * 0.5 * (4 * 1100 / 4 + 40)
    alone = scaling.traffic(numbers, "bfloat16", 3, 1, 1)
    assert alone == scaling.Traffic(0.0, 0.0, 0.0)


LINK = scaling.Link("a test's", 1e12, 0.5, 8, 1e9, 1e8, 0.5)


def test_a_prediction_by_hand():
    numbers = scaling.Parameters(layers=10**6, rest=0, whole=0)
    found = scaling.predict(numbers, "bfloat16", 1e9, 128, 64, 4, LINK)
    assert found.compute == pytest.approx(2 * 1e9 / 0.5e12)
    assert found.gathers == pytest.approx(7 / 8 * 4e6 / 0.5e9)
    across = 2 * 7 / 8 * 4e6 / 8 / 0.5e8
    assert found.reduction == pytest.approx(7 / 8 * 4e6 / 0.5e9 + across)
    assert found.hidden == max(found.compute, found.gathers) + found.reduction
    assert found.exposed == found.compute + found.gathers + found.reduction
    alone = scaling.predict(numbers, "bfloat16", 1e9, 128, 1, 32, LINK)
    assert (alone.gathers, alone.reduction) == (0.0, 0.0)
    assert alone.hidden == alone.compute == pytest.approx(128 * 1e9 / 0.5e12)


@pytest.mark.parametrize(("images", "devices"), [(128, 512), (96, 12)])
def test_a_prediction_for_devices_that_do_not_fit_is_refused(images, devices):
    with pytest.raises(ValueError, match=f"{images}.*{devices}"):
        scaling.predict(scaling.Parameters(1, 1, 1), "bfloat16", 1.0, images, devices, 4, LINK)


# --- a whole measurement --------------------------------------------------------------------------

KEYS = {
    "seconds_per_step", "plain_seconds_per_step", "ratio", "model_flops", "compiled_flops",
    "peak_share", "phases", "device", "versions", "images_per_second", "compile_seconds",
    "peak_memory_bytes", "input_wait_seconds", "collectives_per_device",
}  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    return measure.measure(tiny(), one_device(), steps=3, plain=True)


@pytest.mark.slow
def test_a_measurement_has_everything_and_is_consistent(measured):
    assert measured.keys() >= KEYS
    assert json.loads(json.dumps(measured, allow_nan=False)) is not None
    assert measured["ratio"] == (measured["plain_seconds_per_step"] / measured["seconds_per_step"])
    assert measured["images_per_second"] == 16 / measured["seconds_per_step"]
    assert measured["achieved_flops_per_second"] == (
        measured["model_flops"] / measured["seconds_per_step"]
    )
    assert 0.0 < measured["peak_share"] < 1.0
    assert measured["compiled_flops"] == pytest.approx(measured["model_flops"], rel=0.01)
    assert measured["collectives_per_device"] == {}
    assert set(measured["phases"]) == set(phases.PHASES)
    assert all(seconds > 0.0 for name, seconds in measured["phases"].items() if name != "lpips")
    assert measured["phases_sum"] == pytest.approx(sum(measured["phases"].values()))
    low, high = measured["seconds_quartiles"]
    assert low <= measured["seconds_per_step"] <= high
    assert measured["peak_memory_bytes"] > 4 * 3 * sum(measured["parameters"].values())


@pytest.mark.slow
def test_the_text_for_a_person_says_all_of_it(measured):
    text = report.text_report(measured)
    for words in ("random weights", "images/s", "plain step", "ratio", "cost analysis", "whole step",
                  "a step waits", "lpips", "measured by a large float32"):  # fmt: skip
        assert words in text
    assert f"{measured['seconds_per_step']:.3f} s" in text


@pytest.mark.slow
def test_a_sweep_keeps_the_weights_and_changes_the_sizes(monkeypatch):
    """Two of its points, since each is compiled."""
    full = sweep.points
    monkeypatch.setattr(sweep, "points", lambda c, n: [p for p in full(c, n) if p[1].batch_size == 32
                                                       or p[0] == "recipe"])  # fmt: skip
    found = sweep.sweep(tiny(), one_device(), steps=1, plain=False)
    recipe, large = found["rows"]
    assert found["no_room"] == []
    assert 0 < recipe["planned_memory_bytes"] < large["planned_memory_bytes"]
    assert (recipe["varied"], large["varied"]) == ("recipe", "batch")
    assert (recipe["batch_size"], large["batch_size"]) == (16, 32)
    assert large["model_flops"] == 2 * recipe["model_flops"]
    assert recipe["policy_seconds"] > 0.0
    assert "policy_seconds" not in large

    room = (recipe["planned_memory_bytes"] + large["planned_memory_bytes"]) // 2
    monkeypatch.setattr(sweep, "memory_of", lambda device: room)
    found = sweep.sweep(tiny(), one_device(), steps=1, plain=False)
    assert [row["varied"] for row in found["rows"]] == ["recipe"]
    left_out = {"varied": "batch", "planned_memory_bytes": large["planned_memory_bytes"]}
    assert found["no_room"] == [left_out]


# --- the sweep's points, table and plot -----------------------------------------------------------


def test_a_sweep_changes_one_thing_at_a_time():
    config = tiny(microbatch_size=8, vapi={"group_size": 8})
    found = sweep.points(config, devices=4)
    assert found[0] == ("recipe", config)
    sizes = [(axis, c.batch_size, c.options.group_size, c.microbatch_size) for axis, c in found[1:]]
    assert sizes == [
        ("batch", 4, 8, 0),
        ("batch", 8, 8, 0),
        ("batch", 32, 8, 0),
        ("group", 16, 2, 8),
        ("group", 16, 4, 8),
        ("group", 16, 16, 8),
        ("microbatch", 16, 8, 4),
        ("microbatch", 16, 8, 16),
    ]


def test_a_sweep_leaves_out_batches_that_do_not_split_over_the_devices():
    found = sweep.points(tiny(), devices=16)
    assert {c.batch_size for _, c in found} == {16, 32}
    assert {c.microbatch_size for axis, c in found if axis == "microbatch"} == set()


RECIPE = {
    "name": "r", "method": "vapi", "batch_size": 16, "data": {"image_size": 32},
    "policy": {"kind": "class", "dim": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip


def test_any_option_is_varied_one_value_at_a_time():
    config = tiny(policy={"num_classes": 12})
    before = json.dumps(RECIPE)
    found = sweep.variants(RECIPE, config, ["policy.remat=none,full", "config.decode_chunk=2"])
    assert [label for label, _ in found] == [
        "recipe", "policy.remat=none", "policy.remat=full", "config.decode_chunk=2"
    ]  # fmt: skip
    assert found[0][1] is config
    assert [c.policy.get("remat") for _, c in found] == [None, "none", "full", None]
    assert [c.decode_chunk for _, c in found[1:]] == [config.decode_chunk] * 2 + [2]
    assert all(c.init == config.init for _, c in found)  # absent weights stay random
    assert all(c.policy["num_classes"] == 12 for _, c in found)
    assert json.dumps(RECIPE) == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("decode_chunk", "give values"),
        ("decode_chunk=two", "decode_chunk"),
        ("policy.no_such_thing=1", "no_such_thing"),
        ("mesh.data=1,2", "mesh"),
        ("cpu_devices=1,2", "cpu_devices"),
    ],
)
def test_an_option_that_cannot_be_varied_is_refused_in_a_sentence(option, message):
    with pytest.raises(ConfigError, match=message):
        sweep.variants(RECIPE, tiny(), [option])


def test_a_varied_step_has_the_weights_of_the_recipe_and_the_option(tiny_setup):
    config = tiny_setup.method.config
    host = {name: np.asarray(value) for name, value in tiny_setup.batch.items()}
    remat = dataclasses.replace(config, policy={**config.policy, "remat": "full"})
    changed = sweep._resized(tiny_setup, remat, host)
    assert changed.state is tiny_setup.state
    assert changed.method.policy.config.remat == "full"
    wide = dataclasses.replace(config, policy={**config.policy, "dim": 64})
    with pytest.raises(ConfigError, match="size"):
        sweep._resized(tiny_setup, wide, host)
    other = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, ch=64))
    with pytest.raises(ConfigError, match="frozen"):
        sweep._resized(tiny_setup, other, host)


def row(axis, group, seconds, **more):
    return {
        "varied": axis, "batch_size": 16, "group_size": group, "microbatch_size": 16,
        "seconds_per_step": seconds, "seconds_quartiles": [seconds, seconds],
        "images_per_second": 16 / seconds, "model_flops": group * 1e9, "planned_memory_bytes": 5 * 10**8,
        **more,
    }  # fmt: skip


FOUND = {
    "name": "bench_cpu",
    "device": {"kind": "cpu", "count": 1, "cores": 2},
    "versions": {"jax": "0.10.2"},
    "steps": 5,
    "rows": [
        row("recipe", 8, 1.0, policy_seconds=0.3, plain_seconds_per_step=3.0),
        row("batch", 8, 2.0),
        row("group", 2, 0.5, policy_seconds=0.29, plain_seconds_per_step=1.0),
        row("group", 16, 1.9, policy_seconds=0.31),
    ],
}


def test_the_curves_against_the_group_are_in_its_order():
    assert sweep.group_series(FOUND["rows"]) == {
        "this step": ([2, 8, 16], [0.5, 1.0, 1.9]),
        "its generator alone": ([2, 8, 16], [0.29, 0.3, 0.31]),
        "plain step": ([2, 8], [1.0, 3.0]),
    }


def test_a_sweep_is_written_into_its_place_and_nothing_else_changes(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("# Speed\n\n<!-- sweep -->\nold\n<!-- end of sweep -->\n\nLast words.\n")
    assert sweep.write_docs(FOUND, tmp_path) == [page, tmp_path / "performance.svg"]
    text = page.read_text()
    assert text.startswith("# Speed\n\n<!-- sweep -->\n`configs/bench_cpu.py`, 1 x cpu, 2 cores")
    assert text.endswith("<!-- end of sweep -->\n\nLast words.\n")
    assert "old" not in text
    assert "| group | 16 | 2 | 16 | 2 GFLOP | 0.500 | 32.0 | 500 MB |" in text
    sweep.write_docs(FOUND, tmp_path)
    assert page.read_text() == text
    root = ElementTree.parse(tmp_path / "performance.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = " ".join(node.text or "" for node in root.iter())
    for label in ("this step", "its generator alone", "plain step", "seconds a step"):
        assert label in words


def test_a_page_that_is_new_gets_a_block():
    text = report.replace_block("", "sweep", "table")
    assert text == "<!-- sweep -->\ntable\n<!-- end of sweep -->\n"
    assert report.replace_block("A page.\n", "sweep", "table").startswith("A page.\n\n<!-- sweep")


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.384e15, "1.38 PX"), (9.89e11, "989 GX"), (12.0, "12 X"), (0.0, "0 X"), (None, "unknown")],
)
def test_quantities(value, text):
    assert report.quantity(value, "X") == text


def test_steps_of_more_devices_are_cheaper_but_not_by_their_number():
    config = make_tiny_config("vapi", batch_size=64)
    found = measure.scaling(setup.abstract(config, make_mesh(1, 8)))
    assert [(row["devices"], row["images"]) for row in found] == [
        (1, 64), (8, 64), (64, 64), (64, 512), (512, 4096)
    ]  # fmt: skip
    one, eight, many, wide, widest = (row["exposed"] for row in found)
    assert one > eight
    assert one / many < 64
    assert wide < widest < 1.5 * wide
    assert all(row["hidden"] <= row["exposed"] for row in found)
    rows = report.scaling_rows(found)
    assert rows[1] == [8, 64, *rows[1][2:]]
    assert len(rows[0]) == len(report.SCALING_HEADERS)


def test_no_scaling_is_told_for_other_nodes_than_the_models():
    assert measure.scaling(setup.abstract(make_tiny_config("vapi"), make_mesh(2, 4))) is None


# --- the command ----------------------------------------------------------------------------------


def test_help_names_the_flags_and_shows_the_commands_of_all_modes():
    text = commands.module("bench", "--help").stdout
    for flag in ("--config", "--steps", "--[no]plain", "--json", "--[no]sweep", "--docs", "--batch",
                 "--mode=sample", "--mode=evaluate", "--cfg", "--features", "--vectors"):  # fmt: skip
        assert flag in text


CPU = "--config=configs/bench_cpu.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config is needed"),
        ((CPU, "--docs=x"), "--docs writes the table of a sweep: add --sweep"),
        ((CPU, "--sweep", "--compile_only"), "--compile_only runs no steps"),
        ((CPU, "--vary=seed=1", "--compile_only"), "--compile_only runs no steps"),
        ((CPU, "--vary=seed=1", "--sweep"), "leave --vary out"),
        ((CPU, "--vary=mesh.data=2"), "error: --vary=mesh.data=2: one benchmark has one mesh"),
        ((CPU, "--plain", "--compile_only"), "choose one"),
        ((CPU, "--steps=0"), "flag --steps=0"),
        ((CPU, "more"), "unexpected arguments: more"),
        ((CPU, "--config.vappi.x=1"), "no section of the configuration"),
        (("--config=configs/demo_base.py",), "error: config.method='base'"),
        ((CPU, "--plain", "--config.vapi.fused=False"), "leave --plain out"),
        ((CPU, "--sweep", "--config.preset=reference"), "a sweep varies the fused step"),
        ((CPU, "--config.vapi.group_siz=1"), "did you mean vapi.group_size?"),
        ((CPU, "--config.mesh.data=3"), "error:"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(arguments, message):
    done = commands.module("bench", *arguments)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_compiling_alone_tells_what_eight_devices_would_send(tmp_path):
    done = commands.module("bench",
        "--config=configs/bench_cpu.py:tiny", "--compile_only", f"--json={tmp_path / 'x.json'}",
        "--config.policy.dtype=bfloat16", "--config.policy.remat=full", "--config.rewards=mse",
        env=commands.environment(**commands.OPTIMISED),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"all-gather of .*\d MB", done.stdout)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["device"]["count"] == 8
    assert found["compiled_flops_exact"] is True
    assert found["compiled_flops"] > found["model_flops"]  # layers are computed again
    sent = scaling.traffic(scaling.Parameters(**found["parameters"]), "bfloat16", 1, 4, 2)
    # XLA for CPU sends float32 where the program says bfloat16.
    gathered = found["collectives_per_device"]["all-gather"]["sent_bytes"]
    assert gathered in (sent.gathers, 2 * sent.gathers)
    assert math.isfinite(found["peak_memory_bytes"])
