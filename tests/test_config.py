"""Configurations: every mistake is named, all at once, and every option is read by something."""

import ast
import dataclasses
import pathlib
import typing

import pytest
from ml_collections import ConfigDict

import vapi_jax
from vapi_jax.config import ConfigError, TrainConfig, check_devices, resolve
from vapi_jax.models.llama import LlamaConfig
from vapi_jax.vapi import PRESETS, VAPiConfig

MINIMAL = {"name": "x", "task": "vapi", "policy": {"kind": "class", "size": "GPT-B"}}
SMALL = {"block_size": 4, "dim": 32, "n_head": 4, "n_layer": 1}  # 32 px under VQ-16


def lines(**changes):
    """The errors of a configuration, one a line, without the prefix."""
    with pytest.raises(ConfigError) as error:
        resolve({**MINIMAL, **changes})
    count, *rest = str(error.value).splitlines()
    assert count.startswith(f"{len(rest)} error(s)")
    assert all(line.startswith("  - config.") for line in rest)
    return [line.removeprefix("  - config.") for line in rest]


def test_defaults_are_the_papers():
    config = resolve(MINIMAL)
    assert config.vapi == VAPiConfig()
    assert (config.steps, config.batch_size) == (100, 128)
    assert config.optimizer.learning_rate == 1e-6


def test_config_dicts_and_mappings_resolve_alike():
    changes = {**MINIMAL, "eval": {"temperatures": [0.5, 1]}, "optimizer": {"learning_rate": 1}}
    config = resolve(ConfigDict(changes))
    assert config == resolve(changes)
    assert config.eval.temperatures == (0.5, 1.0)
    assert isinstance(config.optimizer.learning_rate, float)
    assert resolve({**MINIMAL, "steps": 1e3}).steps == 1000


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"stepz": 3}, "stepz: nothing reads this option; did you mean steps?"),
        (
            {"vapi": {"groupsize": 3}},
            "vapi.groupsize: nothing reads this option; did you mean vapi.group_size?",
        ),
        (
            {"tokenizer_training": {"loss": {"perceptal": 3.0}}},
            "tokenizer_training.loss.perceptal: nothing reads this option; did you mean "
            "tokenizer_training.loss.perceptual?",
        ),
        (
            {"policy": {"kind": "class", "n_layers": 3}},
            "policy.n_layers: nothing reads this option; did you mean policy.n_layer?",
        ),
        ({"mesh": {"zzz": 1}}, "mesh.zzz: nothing reads this option; known: data, fsdp"),
    ],
)
def test_an_unknown_option_names_the_nearest_known_one(changes, line):
    assert lines(**changes) == [line]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"steps": "many"}, "steps='many': wants int, not str"),
        ({"steps": 2.5}, "steps=2.5: wants int, not float"),
        ({"steps": True}, "steps=True: wants int, not bool"),
        ({"vapi": {"fused": 1}}, "vapi.fused=1: wants bool, not int"),
        ({"vapi": {"ratio": None}}, "vapi.ratio=None: wants str, not NoneType"),
        ({"optimizer": {"b1": "0.9"}}, "optimizer.b1='0.9': wants float, not str"),
        ({"data": "photos"}, "data='photos': wants options of its own, not a value"),
        ({"vapi": 3}, "vapi=3: wants options of its own, not a value"),
        ({"policy": "class"}, "policy='class': wants options of its own, not a value"),
        ({"eval": {"temperatures": 0.9}}, "eval.temperatures=0.9: wants a tuple, not float"),
        ({"eval": {"temperatures": ("a",)}}, "eval.temperatures='a': wants float, not str"),
        ({"policy": {"kind": "class", "dim": "a"}}, "policy.dim='a': wants int, not str"),
    ],
)
def test_wrong_types(changes, line):
    assert line in lines(**changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"task": "sing"}, "task='sing': choose one of ('vapi', 'tokenizer', 'base')"),
        ({"preset": "papr"}, "preset='papr': choose one of ('paper', 'reference', 'equations')"),
        ({"steps": 0}, "steps=0: wants at least 1"),
        ({"batch_size": 0}, "batch_size=0: wants at least 1"),
        (
            {"microbatch_size": 48},
            "microbatch_size=48: batch_size=128 is not a multiple of it",
        ),
        ({"microbatch_size": -8}, "microbatch_size=-8: batch_size=128 is not a multiple of it"),
        ({"log_every": 0}, "log_every=0: wants at least 1"),
        ({"eval": {"every": 0}}, "eval.every=0: wants at least 1"),
        ({"eval": {"split": "dev"}}, "eval.split='dev': choose one of ('train', 'val', 'test')"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last=0: wants at least 1"),
        ({"perceptual_net": "squeeze"}, "perceptual_net='squeeze': choose one of ('vgg', 'alex')"),
        (
            {"optimizer": {"schedule": "linear"}},
            "optimizer.schedule='linear': choose one of ('constant', 'cosine')",
        ),
        ({"optimizer": {"learning_rate": -1.0}}, "optimizer.learning_rate=-1.0: wants at least 0"),
        (
            {"data": {"image_size": 40}, "policy": {"kind": "class", **SMALL}},
            "data.image_size=40: the tokenizer reduces by 16; take a multiple of it",
        ),
        (
            {"policy": {"kind": "class", "block_size": 9}},
            "policy.block_size=9: images of 32 px give 2x2 tokens, so 4",
        ),
        (
            {"policy": {"kind": "class", "vocab_size": 99}},
            "policy.vocab_size=99: the tokenizer has 16384 codes",
        ),
        (
            {"policy": {"kind": "diffusion"}},
            "policy.kind='diffusion': choose one of ('class', 'text', 'janus')",
        ),
        ({"policy": {}}, "policy.kind=None: choose one of ('class', 'text', 'janus')"),
        (
            {"policy": {"kind": "class", "dim": 30, "n_head": 4}},
            "policy: n_head must divide dim, and n_kv_head must divide n_head",
        ),
        ({"vapi": {"group_size": 1}}, "vapi.group_size=1: advantages need at least 2"),
        ({"vapi": {"noise_rate": 1.5}}, "vapi.noise_rate=1.5: wants 0 to 1"),
        ({"vapi": {"temperature": 0}}, "vapi.temperature=0.0: wants more than 0"),
        ({"vapi": {"token_dropout": 1.0}}, "vapi.token_dropout=1.0: wants [0, 1)"),
        (
            {"vapi": {"corruption": "none"}},
            "vapi.corruption='none': choose one of ('paper', 'full')",
        ),
        ({"vapi": {"ratio": "word"}}, "vapi.ratio='word': choose one of ('token', 'sequence')"),
        (
            {"vapi": {"mse_reduction": "max"}},
            "vapi.mse_reduction='max': choose 'mean' or 'sum'",
        ),
        (
            {"vapi": {"update_dropout": True}},
            "vapi.update_dropout: the fused step samples from its training forward; set "
            "vapi.fused=False to run dropout in the update",
        ),
        (
            {"reward": {"mse": 0.0, "lpips": 0.0}},
            "reward: all weights are 0; the reward would be constant",
        ),
        (
            {"reward": {"gan": 0.1}},
            "reward.gan: name the discriminator's weights in init.discriminator",
        ),
        (
            {"data": {"name": "flickr"}},
            "data: name must be one of ('photos', 'image_folder', 'tfds'), got 'flickr'",
        ),
        (
            {"task": "tokenizer", "tokenizer_training": {"discriminator_kind": "wgan"}},
            "tokenizer_training.discriminator_kind='wgan': choose one of ('hinge', 'vanilla', "
            "'non-saturating', 'non-saturating-llamagen')",
        ),
        (
            {"task": "tokenizer", "tokenizer_training": {"restart_every": 0}},
            "tokenizer_training.restart_every=0: wants at least 1",
        ),
    ],
)
def test_impossible_values_come_with_their_fix(changes, line):
    assert lines(**changes) == [line]


def test_all_errors_come_at_once():
    found = lines(
        preset="papr",
        stepz=1,
        batch_size=-1,
        log_every="often",
        data={"name": "flickr"},
        tokenizer={"ch": 33},
        vapi={"group_size": 1, "noise_rte": 0.1},
        policy={"kind": "class", "wings": 2, "n_layer": "two"},
        optimizer={"schedule": "linear"},
    )
    assert len(found) == 11
    assert sorted(line.split(":")[0].split("=")[0] for line in found) == [
        "batch_size",
        "data",
        "log_every",
        "optimizer.schedule",
        "policy.n_layer",
        "policy.wings",
        "preset",
        "stepz",
        "tokenizer",
        "vapi.group_size",
        "vapi.noise_rte",
    ]


def test_name_and_task_must_be_there():
    with pytest.raises(ConfigError, match=r"(?s)2 error.*config.name: missing.*config.task: miss"):
        resolve({"policy": MINIMAL["policy"]})


def test_a_preset_sets_what_the_recipe_does_not():
    reference = resolve({**MINIMAL, "preset": "reference"}).vapi
    assert reference == dataclasses.replace(VAPiConfig(), **PRESETS["reference"])
    assert reference.corruption == "full"
    mixed = resolve({**MINIMAL, "preset": "reference", "vapi": {"corruption": "paper"}}).vapi
    assert mixed == dataclasses.replace(reference, corruption="paper")
    explicit = resolve({**MINIMAL, "preset": "equations", "vapi": {"ratio": "token"}}).vapi
    assert (explicit.ratio, explicit.mse_reduction) == ("token", "sum")


def test_presets_only_name_options_that_exist():
    known = {field.name for field in dataclasses.fields(VAPiConfig)}
    assert all(set(preset) <= known for preset in PRESETS.values())


def test_batches_must_split_over_the_devices():
    small = {"batch_size": 24, "microbatch_size": 12, "eval": {"images": 20}}
    config = resolve({**MINIMAL, **small})
    check_devices(config, 4)
    with pytest.raises(ConfigError) as error:
        check_devices(config, 8)
    assert str(error.value).splitlines() == [
        "config.microbatch_size=12: not a multiple of the 8 devices; take 16",
        "config.eval.images=20: not a multiple of the 8 devices; take 24",
    ]


# --- nothing is offered that nothing reads --------------------------------------------------------

# Read by name and not as an attribute: where, and what reads them.
READ_BY_NAME = {
    ("TrainConfig", "preset"): ("config.py", 'raw.get("preset"'),
    ("DataConfig", "train_split"): ("data/config.py", '_split")'),
    ("DataConfig", "val_split"): ("data/config.py", '_split")'),
    ("DataConfig", "test_split"): ("data/config.py", '_split")'),
    ("RewardWeights", "mse"): ("reward.py", "getattr(weights, name)"),
    ("RewardWeights", "l1"): ("reward.py", "getattr(weights, name)"),
    ("RewardWeights", "codebook_cosine"): ("reward.py", "getattr(weights, name)"),
}
PACKAGE = pathlib.Path(vapi_jax.__file__).parent


def reachable(kind, found):
    found.add(kind)
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint) and hint not in found:
            reachable(hint, found)
    return found


def read_attributes():
    """Attribute names read in the package, but not by the checks of a configuration's values."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path == PACKAGE / "config.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                node.body = [n for n in node.body if getattr(n, "name", "") != "__post_init__"]
        names |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        }
    return names


def test_every_option_is_read_by_something():
    kinds = reachable(TrainConfig, {LlamaConfig})
    assert {kind.__name__ for kind in kinds} >= {
        "TrainConfig", "VAPiConfig", "RewardWeights", "DataConfig", "VQConfig", "LlamaConfig",
        "GeneratorWeights", "TokenizerTrainConfig", "OptimizerConfig", "MeshConfig", "EvalConfig",
        "InitConfig", "CheckpointConfig",
    }  # fmt: skip
    read = read_attributes()
    for kind in kinds:
        for field in dataclasses.fields(kind):
            exception = READ_BY_NAME.get((kind.__name__, field.name))
            if exception is None:
                assert field.name in read, f"nothing reads {kind.__name__}.{field.name}"
            else:
                path, text = exception
                assert text in (PACKAGE / path).read_text(encoding="utf-8"), exception
