"""The plan of `--check`: sizes from shapes equal sizes of arrays, and counts those of a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compilers import optimised
from tests.helpers.messages import assert_mentions
from tests.helpers.recipes import load
from tests.helpers.tiny import make_tiny_method
from vapi_jax.data.photos import PhotoSource
from vapi_jax.methods.config import CheckpointConfig, TrainConfig, to_dict
from vapi_jax.methods.resolve import resolve
from vapi_jax.models.lpips import load_lpips_params, lpips_shapes
from vapi_jax.parallel.sharding import batch_sharding, make_mesh
from vapi_jax.rewards.reconstruction import MSE
from vapi_jax.training import memory, plan, preflight, train
from vapi_jax.training.memory import bytes_per_device, estimate, tree_bytes
from vapi_jax.training.plan import check, checkpoint_steps, kept_steps, size
from vapi_jax.training.preflight import DataFound, WeightsFound


def planned(raw, capsys):
    """Exit status, the plan as JSON and the error lines."""
    status = check(raw, as_json=True)
    out, err = capsys.readouterr()
    return status, json.loads(out), err.splitlines()


def test_a_step_that_has_no_room_is_refused_and_one_that_may_have_none_is_noted(
    monkeypatch, capsys
):
    raw = load("c2i_demo", "tiny")
    wanted = sum(part["bytes"] for part in planned(raw, capsys)[1]["memory"])
    for room, refused, noted in ((wanted // 3, True, False), (wanted - 1, False, True)):
        monkeypatch.setattr(preflight, "memory_of", lambda _, room=room: room)
        status, found, errors = planned(raw, capsys)
        assert (status, any("microbatch_size" in line for line in errors)) == (refused, refused)
        assert any("GB" in note for note in found["data"]["notes"]) == noted
    monkeypatch.setattr(preflight, "memory_of", lambda _: wanted)
    assert planned(raw, capsys)[0] == 0


# The recipes -------------------------------------------------------------------------------------


def llama_parameters(dim, layers, vocab, classes):
    """By hand: embeddings, head and norm; attention, SwiGLU and two norms a layer."""
    hidden = -(-int(2 * 4 * dim / 3) // 256) * 256
    layer = 3 * dim * dim + dim * dim + 3 * dim * hidden + 2 * dim
    return vocab * dim + (classes + 1) * dim + layers * layer + dim + dim * vocab


def test_the_papers_recipe_is_planned_without_its_weights_and_data(capsys):
    before = sum(array.nbytes for array in jax.live_arrays())
    status, found, errors = planned(load("c2i_xxl"), capsys)
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 10_000
    assert status == 1
    assert errors[0] == "error: 3 error(s) in the configuration:"
    assert [line.split("=")[0] for line in errors[1:]] == [
        "  - config.data.name",
        "  - config.init.gpt",
        "  - config.init.vq",
    ]
    assert len(found["problems"]) == 3
    networks = {network["name"]: network for network in found["networks"]}
    count = llama_parameters(1536, 48, 16384, 1000)
    assert networks["policy"]["parameters"] == count == 1_410_972_672
    assert networks["policy"]["trained"] and not networks["tokenizer"]["trained"]
    assert networks["policy"]["weights"]["state"] == "missing"
    assert networks["reward lpips"]["weights"]["state"] == "digest verified"
    assert found["counts"] == {
        "steps": 100,
        "images": 12_800,
        "samples": 102_400,
        "samples_per_image": 8,
        "microbatches": 1,
        "evaluations": 5,
    }
    assert (found["saved"], found["kept"]) == ([50, 100], [50, 100])
    # Parameters and two moments in float32, a counter and a key.
    assert 0 < found["checkpoint_bytes"] - 3 * 4 * count < 100
    assert found["weight_bytes"] == {"policy.safetensors": 4 * count}
    parts = {part["name"]: part["bytes"] for part in found["memory"]}
    assert found["mesh"] == {"data": 1, "fsdp": 8}
    assert parts["parameters"] == pytest.approx(4 * count / 8, rel=0.01)
    assert parts["optimizer"] == pytest.approx(8 * count / 8, rel=0.01)
    assert found["memory_bytes"] == sum(parts.values())


@pytest.mark.parametrize(
    ("name", "variant"), [("c2i_demo", ""), ("demo_base", "tiny"), ("demo_tokenizer", "tiny")]
)
def test_the_demos_recipes_can_run(name, variant, capsys):
    status, found, errors = planned(load(name, variant), capsys)
    assert (status, errors, found["problems"]) == (0, [], [])
    assert found["data"] == {
        "classes": 12,
        "images": {"train": 12 * 1024, found["config"]["eval"]["split"]: 12 * 1024},
        "labels": {name: label for label, name in enumerate(PhotoSource.class_names)},
        "notes": [],
    }
    assert found["config"] == to_dict(_with_twelve_classes(resolve(load(name, variant))))


def _with_twelve_classes(config):
    if config.method == "tokenizer":
        return config
    data = dataclasses.replace(config.data, classes="demo" if config.init.gpt else "sorted")
    return dataclasses.replace(config, policy={**config.policy, "num_classes": 12}, data=data)


def test_the_plan_reads_well(capsys):
    recipe = load("c2i_demo", "full")
    assert check(recipe, "runs/demo") == 0
    text = capsys.readouterr().out
    for line in (
        'c2i_demo: VA-π post-training, preset "paper"',
        "devices     mesh data 2 x fsdp 4 of cpu in 1 process(es)",
        "data        photos at 32 px; 12 classes; images: train 12,288, test 12,288",
        "classes     12 of 12 labels, data.classes=demo: astronaut = 0, camera = 1, chelsea = 2, "
        "china = 3, coffee = 4, coins = 5, and 6 more",
        "step        16 images, 8 samples of each",
        "run         100 steps: 1,600 images (0.13 epochs), 12,800 samples decoded and rewarded",
        'evaluation  64 images of "test", 6 times; 256 samples, 5 times; at the end a table of base, '
        "sharpened base and result and controls (each trained anew), 3 x 5000 samples a row",
        "checkpoints 2 of 22.5 MiB each, 2 stay (45.1 MiB), and as many of each of 2 controls (135.3 MiB "
        "in all)",
        "            runs/demo/weights: policy.safetensors (7.5 MiB)",
        "policy, trained, from shipped demo (digest verified)               1,970,304",
    ):
        assert line in text.splitlines(), line
    assert all(len(line) <= 180 for line in text.splitlines())


def test_a_data_set_is_named_where_the_source_has_some(capsys):
    check(load("c2i_xxl"))
    assert "data        tfds imagenet2012 at 384 px; not found" in capsys.readouterr().out
    check(load("c2i_xxl", "tiny"))
    assert "data        photos at 32 px; 12 classes" in capsys.readouterr().out


def test_options_that_are_wrong_in_themselves_have_no_plan(capsys):
    recipe = load("c2i_xxl")
    recipe.vapi.group_size = 1
    recipe.optimizer.learning_rat = 1e-3
    assert check(recipe) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert_mentions(err, "error: ", "vapi.group_size=1", "optimizer.learning_rate?", "config.data")


def test_a_reward_model_that_is_not_there_hides_no_other_error(capsys):
    recipe = load("c2i_demo", "tiny")
    recipe.rewards = ({"name": "clip", "options": {"weights": "nowhere", "prompts": "imagenet"}},)
    recipe.init.gpt = "absent"
    assert check(recipe) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert_mentions(err, "2 error(s)", "rewards.clip: nowhere", "init.gpt='absent'")


def test_devices_that_do_not_fit_leave_a_plan_without_memory(capsys):
    recipe = load("demo_base", "tiny")
    recipe.mesh = {"data": 3, "fsdp": 1}
    status, found, errors = planned(recipe, capsys)
    assert status == 1
    assert (found["mesh"], found["memory"]) == (None, [])
    assert len(errors) == 2
    assert check(recipe) == 1
    assert "devices     8 x cpu; the mesh does not fit them" in capsys.readouterr().out


def test_notes_are_printed():
    config = resolve(load("demo_base", "tiny"))
    data = DataFound(12, {"train": 100}, ["something to know"])
    made = plan.make_plan(config, None, data, {"policy": WeightsFound("here", "fine")}, [])
    assert plan.render(made).endswith("note: something to know")
    assert "policy, trained, from here (fine)" in plan.render(made)


# Counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "every", "keep_last", "keep_every", "saved", "kept"),
    [
        (100, 50, 2, 0, [50, 100], [50, 100]),
        (100, 0, 2, 0, [100], [100]),
        (100, 30, 2, 0, [30, 60, 90, 100], [90, 100]),
        (100, 30, 1, 60, [30, 60, 90, 100], [60, 100]),
        (100, 25, 1, 50, [25, 50, 75, 100], [50, 100]),
        (3, 50, 2, 0, [3], [3]),
    ],
)
def test_checkpoints_are_counted_as_the_loop_saves_them(
    steps, every, keep_last, keep_every, saved, kept
):
    policy = CheckpointConfig(every, keep_last, keep_every)
    config = TrainConfig("x", "base", steps=steps, checkpoint=policy)
    assert checkpoint_steps(config) == saved
    assert kept_steps(config, saved) == kept


@pytest.mark.parametrize(("steps", "every", "count"), [(100, 25, 5), (100, 30, 5), (3, 50, 2)])
def test_evaluations_are_counted_with_the_first_and_the_last(steps, every, count):
    by_hand = 1 + sum(step % every == 0 or step == steps for step in range(1, steps + 1))
    assert plan._times(every, steps) == count == by_hand


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3 * 2**30 // 2, "1.5 GiB"),
        (5 * 2**40, "5,120.0 GiB"),
    ],
)
def test_sizes_in_words(count, text):
    assert size(count) == text


# Memory ------------------------------------------------------------------------------------------


def test_bytes_from_shapes_are_those_of_the_arrays():
    task = make_tiny_method("base", make_mesh(2, 4))
    optimizer = train.make_optimizer(task.config.optimizer, task.config.steps)
    shapes = train.abstract_state(task, optimizer, 0)
    layout = train.state_shardings(shapes, task.mesh)
    state, _ = train.init_state(task, optimizer, 0)
    first = jax.devices()[0]

    def held(tree):
        shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == first)

    assert bytes_per_device(shapes.params, layout.params) == held(state.params)
    assert bytes_per_device(shapes.opt_state, layout.opt_state) == held(state.opt_state)
    assert tree_bytes(shapes.params) == sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert tree_bytes(state.rng) == jax.random.key_data(state.rng).nbytes


@pytest.mark.parametrize("changes", [{}, {"rewards": ("mse", "lpips")}])
def test_frozen_shapes_are_those_of_the_networks_that_a_task_loads(changes):
    changes = {**changes, "data": {"image_size": 16, "num_threads": 0}}
    task = make_tiny_method("vapi", make_mesh(1, 8), **changes)
    loaded = task.load_frozen()
    shapes = task.frozen_shapes()
    assert shapes.keys() == loaded.keys()
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(lambda leaf: leaf.shape, shapes)


def test_the_discriminator_of_the_reward_counts_too():
    gan = {"name": "gan", "options": {"weights": "somewhere", "layers": 1}}
    method = make_tiny_method("vapi", make_mesh(1, 8), rewards=("mse", gan))
    assert tree_bytes(method.frozen_shapes()["rewards"]["gan"]) > 0


def parts_of(task):
    optimizer = train.make_optimizer(task.config.optimizer, task.config.steps)
    state = train.abstract_state(task, optimizer, 0)
    found = estimate(task, state, task.frozen_shapes())
    return {part.name: part.bytes for part in found}


def test_memory_follows_what_it_depends_on():
    def tiny(mesh=(1, 8), **changes):
        return parts_of(make_tiny_method("vapi", make_mesh(*mesh), batch_size=64, **changes))

    plain = tiny()
    halved = tiny(microbatch_size=32)
    assert halved["activations"] < 0.6 * plain["activations"]
    assert halved["decoding"] == plain["decoding"] // 2
    assert tiny(decode_chunk=1)["decoding"] == plain["decoding"] // 8
    assert tiny(vapi={"group_size": 6})["decoding"] == 2 * plain["decoding"]
    assert tiny(policy={"remat": "full"})["activations"] < 0.7 * plain["activations"]
    assert tiny(mesh=(8, 1))["parameters"] > 3 * plain["parameters"]
    assert tiny(vapi={"kl_weight": 0.1})["base generator"] == plain["parameters"]
    plainly = tiny(vapi={"fused": False})
    assert plainly["activations"] > 2 * plain["activations"]  # a sequence for every sample
    assert plainly["logits"] == 3 * plain["logits"]


def test_pairs_of_samples_are_counted_and_take_what_the_compiler_allots():
    def tiny(**options):
        mesh = make_mesh(1, 1, jax.devices()[:1])
        parts = make_tiny_method("vapi", mesh, vapi={"group_size": 16, **options}).memory(2)
        return {name: size for name, size, _ in parts}

    counted, images = tiny(score="energy")["pairs"], jnp.zeros((2, 8, 8, 3))
    assert tiny(credit="spatial")["pairs"] == counted
    assert "pairs" not in tiny()
    inner = jax.jit(lambda x, image: MSE().inner({}, x, {"image": image}, 4))
    with optimised():
        compiled = inner.lower(jnp.zeros((2, 16, 8, 8, 3)), images).compile()
    assert counted == pytest.approx(compiled.memory_analysis().temp_size_in_bytes, rel=0.1)


def test_a_tokenizer_keeps_its_activations_and_no_logits():
    task = make_tiny_method("tokenizer", make_mesh(8, 1), image_size=16)
    found = parts_of(task)
    assert not {"logits", "decoding"} & found.keys()
    assert found["gradients"] == found["parameters"]
    assert found["activations"] > 0
    split = {"image_size": 16, "batch_size": 16, "microbatch_size": 8}
    twice = make_tiny_method("tokenizer", make_mesh(8, 1), **split)
    assert parts_of(twice)["gradients"] == 2 * found["gradients"]


@pytest.mark.slow
def test_the_estimate_is_near_what_the_compiler_allots():
    """Of the demo's step over eight devices: within a third."""
    config = resolve(load("c2i_demo"))
    config = _with_twelve_classes(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    task = plan.make_method(config, mesh)
    optimizer = train.make_optimizer(config.optimizer, config.steps)
    state, frozen = train.abstract_state(task, optimizer, 0), task.frozen_shapes()
    layout = train.state_shardings(state, mesh)

    def laid_out(tree, shardings):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    side, batch = config.data.image_size, config.batch_size
    images = jax.ShapeDtypeStruct(
        (batch, side, side, 3), jnp.float32, sharding=batch_sharding(mesh)
    )
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=batch_sharding(mesh))
    step = train.make_train_step(task, optimizer, layout)
    lowered = step.lower(
        laid_out(state, layout),
        laid_out(frozen, memory.tree_shardings(frozen, mesh)),
        {"image": images, "condition": labels},
    )
    with optimised():
        compiled = lowered.compile()
    allotted = compiled.memory_analysis()
    measured = allotted.argument_size_in_bytes + allotted.temp_size_in_bytes
    found = parts_of(task)
    assert sum(found.values()) == pytest.approx(measured, rel=0.33)
    standing = sum(found[name] for name in ("parameters", "optimizer", "frozen networks"))
    assert standing == pytest.approx(allotted.argument_size_in_bytes, rel=0.02)


def test_the_perceptual_network_is_as_large_as_its_weights():
    for net in ("vgg", "alex"):
        assert tree_bytes(lpips_shapes(net)) == tree_bytes(load_lpips_params(net))
