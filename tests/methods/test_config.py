"""Configurations: every mistake is named, all at once."""

import dataclasses
import json
import typing
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from tests.helpers.complaints import MINIMAL, lines
from tests.helpers.messages import facts
from vapi_jax.common.options import hints_of
from vapi_jax.common.recipes import read_recipe
from vapi_jax.evaluation.features import FEATURES
from vapi_jax.methods import METHODS, make_method
from vapi_jax.methods.config import ConfigError, EvalConfig, to_dict
from vapi_jax.methods.resolve import COMPARED_FEATURES, device_errors, resolve
from vapi_jax.methods.vapi import PRESETS, VAPiOptions
from vapi_jax.models.discriminator import PatchGAN
from vapi_jax.models.llama import LLAMA_SIZES
from vapi_jax.models.lpips import backbone_features, least_side, lpips_shapes
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.rewards import make_terms
from vapi_jax.rewards.reconstruction import LPIPS, MSE, patches

DTYPES = "('float32', 'bfloat16')"
SMALL = {"block_size": 4, "dim": 32, "n_head": 4, "n_layer": 1}  # 32 px under VQ-16


def test_defaults_are_the_papers():
    config = resolve(MINIMAL)
    assert config.options == VAPiOptions()
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
            {"method": "tokenizer", "tokenizer_training": {"loss": {"perceptal": 3.0}}},
            "tokenizer_training.loss.perceptal: nothing reads this option; did you mean "
            "tokenizer_training.loss.perceptual?",
        ),
        (
            {"policy": {"kind": "class", "n_layers": 3}},
            "policy.n_layers: nothing reads this option; did you mean policy.n_layer?",
        ),
        ({"mesh": {"zzz": 1}}, "mesh.zzz: nothing reads this option; known: data, fsdp"),
        # What code sets, too: another option may well be what is meant.
        (
            {"rewards": ({"name": "clip", "options": {"weights": "x", "tokenizer": "y"}},)},
            "rewards.clip.tokenizer: nothing reads this option; did you mean "
            "rewards.clip.tokenizer_path?",
        ),
        ({"options": {"x": 1}}, "options: nothing reads this option; did you mean condition?"),
    ],
)
def test_an_unknown_option_names_the_nearest_known_one(changes, line):
    assert [facts(found) for found in lines(**changes)] == [facts(line)]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"steps": "many"}, "steps='many': wants int, not str"),
        ({"steps": 2.5}, "steps=2.5: wants int, not float"),
        ({"steps": True}, "steps=True: wants int, not bool"),
        ({"vapi": {"fused": 1}}, "vapi.fused=1: wants bool, not int"),
        (
            {"vapi": {"ratio": None}},
            "vapi.ratio=None: choose one of ('token', 'sequence', 'sequence_mean')",
        ),
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
    assert facts(line) in [facts(found) for found in lines(**changes)]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"method": "sing"},
            "method='sing': there is no method 'sing'; known: "
            + ", ".join(METHODS)
            + "; or give your own "
            "as 'module:attribute'",
        ),
        ({"preset": "papr"}, "preset='papr': choose one of ('paper', 'reference', 'equations')"),
        ({"name": ""}, "name='': wants a name"),
        ({"mesh": {"fsdp": -1}}, "mesh: only one of data and fsdp can be -1, what is left"),
        (
            {"microbatch_size": 48},
            "microbatch_size=48: batch_size=128 is not a multiple of it",
        ),
        ({"eval": {"split": "dev"}}, "eval.split='dev': choose one of ('train', 'val', 'test')"),
        (
            {"rewards": ({"name": "lpips", "options": {"net": "squeeze"}},)},
            "rewards.lpips.net='squeeze': choose one of ('vgg', 'alex')",
        ),
        ({"on_nonfinite": "pray"}, "on_nonfinite='pray': choose one of ('stop', 'skip')"),
        (
            {"optimizer": {"schedule": "linear"}},
            "optimizer.schedule='linear': choose one of ('constant', 'cosine')",
        ),
        (
            {"data": {"image_size": 40}, "policy": {"kind": "class", **SMALL}},
            "data.image_size=40: the tokenizer reduces by 16; take a multiple of it",
        ),
        (
            {"tokenizer": {"encoder_ch_mult": (), "decoder_ch_mult": ()}},
            "tokenizer.encoder_ch_mult=(): wants a width for at least one resolution",
        ),
        *(
            (
                {"tokenizer": {name: "float16"}},
                f"tokenizer.{name}='float16': choose one of {DTYPES}",
            )
            for name in ("encoder_dtype", "decoder_dtype")
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
            "policy.kind='diffusion': there is no policy 'diffusion'; known: class, text, janus; or "
            "give your own as 'module:attribute'",
        ),
        (
            {"policy": {}},
            "policy.kind=None: there is no policy 'None'; known: class, text, janus; or give your own "
            "as 'module:attribute'",
        ),
        (
            {"policy": {"kind": "text", **SMALL}},
            "policy.kind='text': this generator takes no class labels; choose 'class', or name the "
            "condition that makes what it takes of the data's (condition.name='caption' for captions)",
        ),
        (
            {"policy": {"kind": "class", "dim": 30, "n_head": 4}},
            "policy: n_head must divide dim, and n_kv_head must divide n_head",
        ),
        (
            {"policy": {"kind": "class", "size": "GPT-XS"}},
            f"policy.size='GPT-XS': choose one of {tuple(LLAMA_SIZES)}",
        ),
        (
            {"policy": {"kind": "class", "dtype": "float16"}},
            "policy.dtype='float16': choose one of " + DTYPES,
        ),
        (
            {"policy": {"kind": "class", "remat": "some"}},
            "policy.remat='some': choose one of ('none', 'full', 'dots')",
        ),
        (
            {"policy": {"kind": "class", "attention": "flash"}},
            "policy.attention='flash': choose one of ('auto', 'xla', 'cudnn')",
        ),
        (
            {"method": "base", "policy": {"kind": "class", "class_dropout_prob": 0.0}},
            "policy.class_dropout_prob=0.0: this generator has no embedding for dropped labels; set "
            "base.label_dropout=0.0",
        ),
        (
            {"preset": "reference", "policy": {"kind": "class", "class_dropout_prob": 0.0}},
            "policy.class_dropout_prob=0.0: this generator has no embedding for dropped labels; set "
            "vapi.label_dropout=0.0",
        ),
        (
            {"method": "base", "policy": {"kind": "class", "attn_dropout_p": 0.1}},
            "policy.attn_dropout_p=0.1: attention kernels have no dropout; set it to 0",
        ),
        (
            {"vapi": {"corruption": "none"}},
            "vapi.corruption='none': choose one of ('paper', 'full')",
        ),
        (
            {"vapi": {"ratio": "word"}},
            "vapi.ratio='word': choose one of ('token', 'sequence', 'sequence_mean')",
        ),
        (
            {"rewards": ({"name": "mse", "options": {"reduction": "max"}},)},
            "rewards.mse.reduction='max': choose one of ('mean', 'sum')",
        ),
        (
            {"vapi": {"score": "energy", "group_size": 2}},
            "vapi.group_size=2: the energy score compares a sample with the others of its group; take at "
            "least 3",
        ),
        (
            {"vapi": {"credit": "spatial"}, "rewards": "mse, l1"},
            "rewards.l1: is no distance to an image, which vapi.credit='spatial' is made of; leave it out",
        ),
        (
            {"vapi": {"credit": "spatial", "ratio": "sequence"}},
            "vapi.ratio='sequence': vapi.credit='spatial' wants 'token'",
        ),
        (
            {"vapi": {"score": "energy", "advantage": "per_reward"}},
            "vapi.advantage='per_reward': vapi.score='energy' has one sum of rewards",
        ),
        (
            {"vapi": {"entropy_target": 1.0, "fused": False}},
            "vapi.entropy_target: only the fused step has an entropy bonus",
        ),
        (
            {"vapi": {"advantage_scale": "batch"}, "microbatch_size": 64},
            "vapi.advantage_scale='batch': wants the whole batch at once, and microbatch_size=64 cuts it; "
            "set it to 0",
        ),
        (
            {"vapi": {"update_dropout": True}},
            "vapi.update_dropout: the fused step samples from its training forward; set "
            "vapi.fused=False to run dropout in the update",
        ),
        (
            {"rewards": "0*mse, 0*lpips"},
            "rewards: none has a weight above 0; the reward would be constant",
        ),
        (
            {"rewards": "0.1*gan"},
            "rewards.gan: weights='': name the discriminator's, RUN/weights/discriminator.safetensors",
        ),
        (
            {"rewards": ({"name": "lpips", "options": {"files": ("vgg16.pth",)}},)},
            "rewards.lpips: files: wants two, the backbone's and the heads' (or none), not 1",
        ),
        (
            {"data": {"name": "flickr"}},
            "data: name must be one of ('photos', 'image_folder', 'tfds', 'image_text', 'scenes', "
            "'encoded'), or 'package.module:Class' of your own, got 'flickr'",
        ),
        (
            {"rewards": "-1*mse"},
            "rewards: mse has weight -1.0; wants at least 0",
        ),
        (
            {"rewards": ({"name": "mse", "weight": float("nan")},)},
            "rewards.mse.weight=nan: wants a finite number",
        ),
        (
            {"rewards": "mse, beauty"},
            "rewards: there is no reward 'beauty'; known: mse, lpips, l1, codebook_cosine, gan, clip, "
            "hpsv2, pickscore, aesthetic, http, scenes; or give your own as 'module:attribute'",
        ),
        (
            {"rewards": "mse, no.such.module:f"},
            "rewards: reward 'no.such.module:f': there is no module 'no'",
        ),
        (
            {"rewards": ({"weight": 1.0},)},
            "rewards: {'weight': 1.0} is neither a name nor {name, weight, options}",
        ),
        ({"rewards": "2 mse"}, "rewards: '2 mse' is no name, such as 'lpips' or '0.5*lpips'"),
        (
            {"rewards": ({"name": "textwrap:indent", "options": {"colour": 1}},)},
            "rewards.textwrap:indent: (pixels, batch, **options) cannot be passed: "
            "got an unexpected keyword argument 'colour'",
        ),
        (
            {"condition": {"name": "smell"}},
            "condition.name: there is no condition 'smell'; known: label, caption, prompt; or give your own "
            "as 'module:attribute'",
        ),
        (
            {"condition": {"name": "label", "options": {"classes": "ten"}}},
            "condition.options.classes='ten': wants int, not str",
        ),
        (
            {
                "policy": {"kind": "text", "cls_token_num": 12, "caption_dim": 32, **SMALL},
                "condition": {"name": "caption", "options": {"length": 5}},
            },
            "condition.name: 'caption' makes dropped bool, features float32 [5, 32], mask bool [5], the "
            "generator takes dropped bool, features float32 [12, 32], mask bool [12]: choose the kind that "
            "it takes, and leave sizes out of condition.options",
        ),
        (
            {
                "data": {"image_size": 16},
                "rewards": ({"name": "lpips", "options": {"net": "alex"}},),
            },
            "rewards.lpips: wants images of at least 31 pixels, not 16",
        ),
        (
            {"method": "tokenizer", "tokenizer_training": {"discriminator_kind": "wgan"}},
            "tokenizer_training.discriminator_kind='wgan': choose one of ('hinge', 'vanilla', "
            "'non-saturating', 'non-saturating-llamagen')",
        ),
        (
            {"method": "tokenizer", "tokenizer_training": {"adversarial_kind": "wgan"}},
            "tokenizer_training.adversarial_kind='wgan': choose one of ('hinge', 'non-saturating', "
            "'non-saturating-llamagen')",
        ),
        (
            {"method": "tokenizer", "tokenizer_training": {"discriminator_layers": 4}},
            "tokenizer_training.discriminator_layers=4: nothing is left of 32 pixels; take fewer",
        ),
        (
            {
                "method": "tokenizer",
                "tokenizer_training": {"loss": {"reconstruction_norm": "l3"}},
            },
            "tokenizer_training.loss.reconstruction_norm='l3': choose one of ('l1', 'l2')",
        ),
        (
            {"method": "base", "eval": {"compare": True}},
            "eval.compare: method 'base' has no table; set it to False",
        ),
        (
            {"method": "tokenizer", "eval": {"sampled_every": 5}},
            "eval.sampled_every: a tokenizer draws no samples; set it to 0",
        ),
        (
            {"eval": {"controls": True}},
            "eval.controls: they are rows of the table; set eval.compare=True as well",
        ),
        (
            {"eval": {"compare": True, "samples": 512}},
            "eval.samples=512: the table compares 512 features; wants at least 513",
        ),
        (
            {"eval": {"compare": True, "samples": 1, "allow_singular": True}},
            "eval.samples=1: the table compares 512 features; wants at least 2",
        ),
        (
            {"eval": {"compare": True, "samples": 1280, "unseen": "efficientnet_lite0_112"}},
            "eval.samples=1280: the table compares 1280 features; wants at least 1281",
        ),
    ],
)
def test_impossible_values_come_with_their_fix(changes, line):
    assert [facts(found) for found in lines(**changes)] == [facts(line)]


def test_what_is_said_of_networks_is_true():
    """Limits that are written down in the checks, measured on the networks themselves."""
    for net in ("vgg", "alex"):
        side = least_side(net)
        run, params = partial(backbone_features, net=net), lpips_shapes(net)
        jax.eval_shape(run, params, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
        smaller = jax.ShapeDtypeStruct((1, side - 1, side - 1, 3), jnp.float32)
        with pytest.raises(ValueError, match="at least"):
            jax.eval_shape(run, params, smaller)
    for side, layers in ((32, 3), (31, 2), (24, 3), (64, 4)):
        model = PatchGAN(ndf=4, n_layers=layers)
        init = partial(model.init_with_output, train=False)
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        logits, _ = jax.eval_shape(init, jax.random.key(0), image)
        assert logits.shape[1] == patches(side, layers)
    widest = {
        name: max(FEATURES[name].dim, FEATURES["vgg_relu4_3"].dim) for name in COMPARED_FEATURES
    }
    assert widest == COMPARED_FEATURES
    assert tuple(COMPARED_FEATURES) == typing.get_args(hints_of(EvalConfig)["unseen"])


def test_a_wrong_value_draws_no_further_complaints_of_what_follows_from_it():
    assert lines(data={"image_size": 0}, policy={"kind": "class", "block_size": 9}) == [
        "data.image_size=0: wants at least 1"
    ]
    assert lines(batch_size=-1, microbatch_size=3) == ["batch_size=-1: wants at least 1"]
    assert lines(tokenizer={"codebook_size": 0}, policy={"kind": "class", "vocab_size": 7}) == [
        "tokenizer.codebook_size=0: wants at least 2"
    ]


def test_the_data_section_says_all_that_is_wrong_with_it():
    found = lines(data={"image_size": 0, "crop": "middle", "name": "flickr", "prefetch": 0})
    assert {line.partition("=")[0].partition(":")[0] for line in found} == {
        "data", "data.image_size", "data.crop",
    }  # fmt: skip


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


def test_name_and_method_must_be_there():
    with pytest.raises(ConfigError, match=r"(?s)2 error.*config.method.*config.name"):
        resolve({"policy": MINIMAL["policy"]})


def test_a_preset_sets_what_the_recipe_does_not():
    reference = resolve({**MINIMAL, "preset": "reference"}).options
    assert reference == dataclasses.replace(VAPiOptions(), **PRESETS["reference"]["vapi"])
    assert reference.corruption == "full"
    mixed = resolve({**MINIMAL, "preset": "reference", "vapi": {"corruption": "paper"}}).options
    assert mixed == dataclasses.replace(reference, corruption="paper")
    explicit = resolve({**MINIMAL, "preset": "equations", "vapi": {"ratio": "token"}})
    assert explicit.options.ratio == "token"
    assert [term.reward for term in make_terms(explicit.rewards)] == [MSE("sum"), LPIPS()]
    assert resolve({**MINIMAL, "preset": "equations", "rewards": "l1"}).rewards[0].name == "l1"


def test_a_preset_completes_the_rewards_that_a_recipe_names():
    recipe = read_recipe("c2i_xxl")
    recipe.preset = "equations"
    named = resolve(recipe)
    assert named.options.ratio == "sequence"
    assert [term.reward for term in make_terms(named.rewards)] == [
        MSE("sum"),
        LPIPS(dtype="bfloat16"),
    ]
    recipe.rewards = ({"name": "mse", "weight": 2.0, "options": {"reduction": "mean"}}, "3*mse")
    explicit = make_terms(resolve(recipe).rewards)
    assert [(term.reward.reduction, term.weight) for term in explicit] == [
        ("mean", 2.0),
        ("sum", 3.0),
    ]


def test_rewards_are_written_in_several_ways():
    short = resolve({**MINIMAL, "rewards": "mse, 0.5*lpips"})
    long = ({"name": "mse"}, {"name": "lpips", "weight": 0.5})
    assert short.rewards == resolve({**MINIMAL, "rewards": long}).rewards
    assert short.rewards == resolve({**MINIMAL, "rewards": ["mse", long[1]]}).rewards
    twice = make_terms(resolve({**MINIMAL, "rewards": "mse, 2*mse, 3*mse"}).rewards)
    assert [(term.name, term.weight) for term in twice] == [
        ("mse", 1.0), ("mse_2", 2.0), ("mse_3", 3.0),
    ]  # fmt: skip


def test_straight_through_training_takes_rewards_with_a_gradient_alone():
    toys, weights = "tests.helpers.toys:", {"weights": "x", "prompts": "imagenet"}
    good = ("mse", "l1", "lpips", f"{toys}contrast", f"{toys}Brightness")
    bad = (
        "codebook_cosine", "scenes", {"name": "http", "options": {"url": "http://x/"}},
        {"name": "clip", "options": weights}, {"name": "hpsv2", "options": weights},
        {"name": "pickscore", "options": weights},
        {"name": "aesthetic", "options": {"weights": "x", "head": "x"}},
        {"name": f"{toys}contrast_on_host", "options": {"on_host": True}},
    )  # fmt: skip
    assert [line.partition(":")[0] for line in lines(method="ste", rewards=(*good, *bad))] == [
        "rewards.codebook_cosine", "rewards.scenes", "rewards.http", "rewards.clip", "rewards.hpsv2",
        "rewards.pickscore", "rewards.aesthetic", "rewards.contrast_on_host",
    ]  # fmt: skip
    (line,) = lines(method="ste", rewards="mse, codebook_cosine")
    assert facts(line) == facts("rewards.codebook_cosine: no gradient, 'vapi', 'ar_grpo'")


def test_a_control_with_nothing_to_learn_is_left_out():
    for weight, names in (
        (0.1, {"CE only", "shuffled advantages"}),
        (0.0, {"shuffled advantages"}),
    ):
        config = resolve({**MINIMAL, "vapi": {"ce_weight": weight}})
        assert make_method(config, make_mesh(1, 1, jax.devices()[:1])).controls().keys() == names


def test_a_resolved_configuration_resolves_to_itself():
    changes = {"preset": "reference", "rewards": "mse, 0.5*l1", "eval": {"temperatures": (0.5,)}}
    for method in METHODS:
        own = changes if method == "vapi" else {"init": {"gpt": "demo", "vq": "demo"}}
        if method == "text_base":  # starts from nothing, with captions
            text = {"kind": "text", "dim": 32, "n_head": 4, "n_layer": 1}
            own = {"policy": text, "condition": {"name": "caption"}, method: {"encoder": "t5"}}
        config = resolve({**MINIMAL, **own, "method": method})
        assert resolve(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "devices", "found"),
    [
        (
            {"batch_size": 24, "microbatch_size": 12, "eval": {"images": 20}},
            8,
            [
                "microbatch_size=12: not a multiple of the 8 devices; take 24",
                "eval.images=20: not a multiple of the 8 devices; take 24",
            ],
        ),
        (
            {"batch_size": 20, "microbatch_size": 10, "eval": {"images": 64}},
            8,
            ["batch_size=20: not a multiple of the 8 devices; take 24"],
        ),
        (
            {"batch_size": 96, "microbatch_size": 12},
            8,
            ["microbatch_size=12: not a multiple of the 8 devices; take 16"],
        ),
        ({"batch_size": 24, "microbatch_size": 12, "eval": {"images": 20}}, 4, []),
        ({"batch_size": 7, "eval": {"images": 7}}, 1, []),
    ],
)
def test_batches_must_split_over_the_devices(changes, devices, found):
    errors = device_errors(resolve({**MINIMAL, **changes}), devices)
    assert [facts(line) for line in errors] == [facts(line) for line in found]
    # What an error tells to take is possible.
    for line in found:
        *sections, name = line.split("=")[0].split(".")
        fix = {name: int(line.rsplit(" ", 1)[1])}
        if name == "batch_size":
            fix["microbatch_size"] = 0
        changes = {**changes, **({sections[0]: fix} if sections else fix)}
    assert device_errors(resolve({**MINIMAL, **changes}), devices) == []
