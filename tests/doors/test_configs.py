"""Every recipe loads and is what it says it is; test_tiny_runs.py and its sister run them."""

import ast
import dataclasses

import pytest

from tests.helpers.paths import CONFIGS
from tests.helpers.recipes import RECIPES, load
from vapi_jax.common.recipe_flags import SECTIONS
from vapi_jax.methods import METHODS
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import make_condition, sized_policy
from vapi_jax.methods.resolve import OWN_SECTION, resolve
from vapi_jax.methods.vapi import VAPiOptions
from vapi_jax.models.llama import LLAMA_SIZES
from vapi_jax.models.policies import make_policy
from vapi_jax.models.vq import VQ_PRESETS
from vapi_jax.rewards import make_terms
from vapi_jax.rewards.reconstruction import LPIPS, MSE

VARIANTS = [(name, variant) for name in RECIPES for variant in ("", "tiny")]
VARIANTS += [("c2i_demo", "full"), ("janus_pro_1b", "lora"), ("janus_pro_7b", "lora")]
TARGETS = [(name, v) for name in ("c2i_xl", "c2i_xxl") for v in ("h100x1", "h100x8", "a100x8")]


def test_the_recipes_are_these():
    known = {"c2i_demo", "c2i_xl", "c2i_xxl", "demo_base", "demo_tokenizer", "t2i_xl"}
    known |= {"janus_pro_1b", "janus_pro_7b", "t2i_demo"}
    assert known <= set(RECIPES)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_recipe_resolves(name, variant):
    config = resolve(load(name, variant))
    assert config.name == name


@pytest.mark.parametrize(("name", "variant"), TARGETS)
def test_a_variant_for_a_target_changes_how_a_step_runs_and_nothing_else(name, variant):
    config, plain = resolve(load(name, variant)), resolve(load(name))
    assert config != plain
    same = {"microbatch_size": plain.microbatch_size, "decode_chunk": plain.decode_chunk}
    policy = {**config.policy, "remat": plain.policy["remat"]}
    assert dataclasses.replace(config, **same, policy=policy) == plain


def test_every_section_can_be_overridden_whether_or_not_a_recipe_names_it():
    groups = [
        field.name
        for field in dataclasses.fields(TrainConfig)
        if dataclasses.is_dataclass(getattr(field, "default", None)) or field.name == "policy"
    ]
    groups += [method.section for method in METHODS.values()] + [OWN_SECTION]
    assert sorted(groups) == sorted(SECTIONS)


@pytest.mark.parametrize("name", RECIPES)
def test_the_docstring_holds_the_command(name):
    text = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text(encoding="utf-8")))
    assert f"python -m vapi_jax.main --config=configs/{name}.py --workdir=" in text


@pytest.mark.parametrize("name", RECIPES)
def test_an_unknown_variant_is_named(name):
    with pytest.raises(ValueError, match=rf"{name}.py:huge"):
        load(name, "huge")


# Table 7 of the paper, class-conditional column, and its sections 5.1 and B.
def check_table_7(config):
    assert config.method == "vapi"
    assert config.preset == "paper"
    assert (config.steps, config.batch_size) == (100, 128)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay) == (1e-6, 1e-4)
    assert (optimizer.b1, optimizer.b2) == (0.9, 0.999)
    assert optimizer.max_grad_norm == 1.0
    assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 0)
    assert config.options == VAPiOptions(
        group_size=8,
        noise_rate=0.0,
        ce_weight=0.1,
        clip_epsilon=0.2,
        advantage_clip=5.0,
        temperature=1.0,
        ratio="token",
        corruption="paper",
        kl_weight=0.0,
        fused=True,
    )
    terms = make_terms(config.rewards)
    assert [(term.weight, type(term.reward)) for term in terms] == [(1.0, MSE), (1.0, LPIPS)]
    assert terms[1].reward.net == "vgg"
    assert (config.data.name, config.data.dataset) == ("tfds", "imagenet2012")
    assert config.data.image_size == 384
    assert config.data.image_size // config.tokenizer.downsample_factor == 24
    assert config.policy["num_classes"] == 1000
    assert config.policy["dtype"] == config.tokenizer.decoder_dtype == "bfloat16"
    assert config.tokenizer.encoder_dtype == "float32"  # x* of a bfloat16 encoder are others


@pytest.mark.parametrize(("name", "size"), [("c2i_xl", "GPT-XL"), ("c2i_xxl", "GPT-XXL")])
def test_the_paper_recipes_are_table_7(name, size):
    config = resolve(load(name))
    check_table_7(config)
    assert config.policy["size"] == size
    published = {"GPT-XL": (1280, 36, 20), "GPT-XXL": (1536, 48, 24)}[size]
    sizes = LLAMA_SIZES[size]
    assert (sizes["dim"], sizes["n_layer"], sizes["n_head"]) == published
    vq16, ours = VQ_PRESETS["VQ-16"], config.tokenizer
    assert (ours.codebook_size, ours.codebook_embed_dim) == (16384, 8)
    assert ours.encoder_ch_mult == vq16.encoder_ch_mult
    assert (ours.ch, ours.z_channels) == (128, 256)
    assert config.init.vq
    assert config.init.gpt


def test_the_text_recipe_is_the_paper_s():
    config = resolve(load("t2i_xl"))
    assert (config.method, config.steps, config.batch_size) == ("vapi", 200, 128)
    assert (config.options.noise_rate, config.options.group_size) == (0.5, 8)
    assert (config.options.ce_weight, config.options.clip_epsilon) == (0.1, 0.2)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1e-6, 1e-4)
    assert (config.policy["kind"], config.policy["size"]) == ("text", "GPT-XL")
    assert config.data.image_size == 256 and not config.data.flip
    assert config.condition.options["dtype"] == "bfloat16"  # LlamaGen's features
    stored = resolve(load("t2i_xl", "precomputed"))
    assert stored.data.name == "encoded" and not stored.condition.options
    assert stored.options == config.options
    recipe = load("t2i_xl", "precomputed")
    recipe.condition.options.length = 120  # says nothing of the data's options
    assert dict(recipe.data.options) == {}


@pytest.mark.parametrize(
    ("name", "sizes", "pad_id"),
    [
        ("janus_pro_1b", (2048, 24, 16, 5632), 100002),
        ("janus_pro_7b", (4096, 30, 32, 11008), 100015),
    ],
)
def test_the_janus_recipes_are_the_paper_s_and_the_release_s_by_preset(name, sizes, pad_id):
    recipe = load(name)
    config = resolve(recipe)
    assert (config.method, config.steps, config.batch_size) == ("vapi", 100, 128)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1e-7, 1e-4)
    assert (config.options.group_size, config.options.ce_weight) == (8, 0.1)
    policy = make_policy(**sized_policy(config))
    model = policy.config
    assert (model.dim, model.n_layer, model.n_head, model.hidden_dim) == sizes
    assert (model.pad_id, model.num_tokens, model.dtype) == (pad_id, 576, "bfloat16")
    assert config.data.image_size == 384 and not config.data.flip
    own = (policy.alignment, policy.padding, make_condition(config, policy).side)
    assert (*own, config.options.noise_rate) == ("shifted_by_one", "exact", "left", 0.95)
    recipe.preset = "reference"
    config = resolve(recipe)
    policy = make_policy(**sized_policy(config))
    own = (policy.alignment, policy.padding, make_condition(config, policy).side)
    assert (*own, config.options.noise_rate) == ("same_position", "counted", "right", 1.0)
    assert policy.for_sampling() == make_policy("janus", **dataclasses.asdict(policy.config))
    assert make_condition(config, policy).tokenizer == config.init.gpt
    recipe.vapi.noise_rate = 0.5
    assert resolve(recipe).options.noise_rate == 0.5


def test_the_reference_preset_is_one_flag_away():
    recipe = load("c2i_xxl")
    recipe.preset = "reference"
    method = resolve(recipe).options
    assert (method.corruption, method.fused, method.update_dropout) == ("full", False, True)
    assert (method.group_size, method.ce_weight) == (8, 0.1)


def test_the_demo_and_its_ingredients_have_one_shape():
    demo, base, tokenizer = (resolve(load(n)) for n in ("c2i_demo", "demo_base", "demo_tokenizer"))
    assert demo.tokenizer == base.tokenizer == tokenizer.tokenizer
    assert demo.policy == base.policy
    assert demo.data == base.data == tokenizer.data
    assert (demo.data.image_size // demo.tokenizer.downsample_factor) ** 2 == 64
    assert demo.cpu_devices == demo.mesh.data * demo.mesh.fsdp == 8
    # Settings are chosen on "val"; the table is of crops that nothing has been chosen on.
    assert (demo.eval.split, base.eval.split, tokenizer.eval.split) == ("test", "val", "val")
    assert demo.eval.compare
    assert demo.eval.seeds >= 3
