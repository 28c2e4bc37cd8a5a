"""Every recipe loads, is what it says it is, and runs from end to end in its tiny form."""

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import modes
from tests.helpers.paths import CONFIGS
from vapi_jax.common.recipe_flags import SECTIONS
from vapi_jax.common.trees import flatten
from vapi_jax.data.scenes.grammar import TASKS
from vapi_jax.generation.loading import load_generator
from vapi_jax.methods import METHODS
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import make_condition, sized_policy
from vapi_jax.methods.resolve import OWN_SECTION, resolve
from vapi_jax.methods.vapi import VAPiOptions
from vapi_jax.models.llama import LLAMA_SIZES
from vapi_jax.models.policies import make_policy
from vapi_jax.models.vq import VQ_PRESETS
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.rewards import make_terms
from vapi_jax.rewards.reconstruction import LPIPS, MSE
from vapi_jax.training.logging import read_history
from vapi_jax.training.run import run
from vapi_jax.weights.store import load_safetensors

RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py"))
VARIANTS = [(name, variant) for name in RECIPES for variant in ("", "tiny")]
VARIANTS += [("c2i_demo", "full"), ("janus_pro_1b", "lora"), ("janus_pro_7b", "lora")]
TARGETS = [(name, v) for name in ("c2i_xl", "c2i_xxl") for v in ("h100x1", "h100x8", "a100x8")]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where recipes keep what they make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def load(name, variant=""):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


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


# --- end to end -----------------------------------------------------------------------------------

SUMMARY = {"method", "name", "config", "devices", "versions", "steps", "seconds", "held_out"}
ESTIMATE = {"mean", "sd", "n", "values"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """name -> (summary, workdir) of a finished tiny run, each run once."""
    done = {}

    def finish(name):
        if name not in done:
            workdir = tmp_path_factory.mktemp(name)
            done[name] = (run(resolve(load(name, "tiny")), workdir), workdir)
        return done[name]

    return finish


# The 7B's tiny form is the 1B's, and the demo's methods go the way of the XXL's.
OTHERS = {"janus_pro_7b", "demo_ste", "demo_cca", "demo_tokenizer_post"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in OTHERS])
def test_the_tiny_form_runs_from_end_to_end(name, finished):
    summary, workdir = finished(name)
    written = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(summary))
    assert written.keys() >= SUMMARY
    assert written["name"] == name
    assert written["directory"] == str(Path.cwd())
    assert written["config"]["steps"] == written["steps"] == resolve(load(name, "tiny")).steps
    assert written["devices"]["count"] == 8
    assert written["devices"]["mesh"]["data"] * written["devices"]["mesh"]["fsdp"] == 8
    assert written["versions"].keys() >= {"vapi_jax", "python", "jax", "flax", "optax", "grain"}
    assert 0.0 < written["seconds"]["train"] < written["seconds"]["total"]
    modes.assert_for_all(workdir)
    rows = read_history(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(written["steps"] + 1))
    assert list((workdir / "tensorboard").iterdir())
    for file, digest in written["weights"].items():
        assert len(digest) == 64
        assert load_safetensors(workdir / "weights" / file)
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert name in page
    assert "data:image/png;base64," in page
    assert not any(link in page for link in ('src="http', "src='http", "<link"))  # self-contained


@pytest.mark.slow
@pytest.mark.parametrize("name", ["c2i_xl", "c2i_xxl", "c2i_demo", "t2i_xl", "t2i_demo"])
def test_a_post_training_run_tells_what_changed(name, finished):
    summary, _ = finished(name)
    for metric in ("reward", "ce", "entropy"):
        assert summary[metric].keys() >= {"first", "last"}
        assert summary[metric]["first"] != summary[metric]["last"]
    assert summary["reward"]["last"] < 0.0 < summary["ce"]["last"]


@pytest.mark.slow
def test_the_demo_compares(finished):
    summary, workdir = finished("c2i_demo")
    for key in ("frechet", "frechet_unseen"):
        found = summary[key]
        assert found["feature"]
        for row in ("before", "after", "floor"):
            assert found[row].keys() == ESTIMATE
            assert found[row]["mean"] > 0.0
            assert found[row]["sd"] >= 0.0
            assert found[row]["n"] == 2
    assert summary["frechet"]["feature"] != summary["frechet_unseen"]["feature"]
    assert "FID" not in summary["frechet"]["feature"].replace("not FID", "")
    kinds = [row["kind"] for row in summary["table"]]
    assert {"base", "temperature", "matched", "vapi", "floor", "real"} == set(kinds)
    for picture in ("samples_before", "samples_after", "reconstructions", "real"):
        assert (workdir / f"{picture}.png").stat().st_size > 0


@pytest.mark.slow
def test_the_text_demo_scores_scenes(finished):
    """Six scores in every row, with what guidance does to the base, and what changed, paired."""
    summary, workdir = finished("t2i_demo")
    tasks, scores = {*TASKS, "overall"}, summary["scenes"]
    kinds = [row["kind"] for row in summary["table"]]
    assert {"base", "guided", "matched", "vapi", "floor", "real"} <= set(kinds)
    for row in [*(row["scenes"] for row in summary["table"]), *scores["changes"].values()]:
        assert row.keys() == tasks
        assert all(-1 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in row.values())
    assert scores["changes"].keys() == {"base", "matched"}
    for task in tasks:
        change = scores["vapi"][task]["value"] - scores["base"][task]["value"]
        assert scores["changes"]["base"][task]["value"] == pytest.approx(change)
    real = next(row["scenes"] for row in summary["table"] if row["kind"] == "real")
    assert real["overall"]["value"] == 1.0
    assert "color attr" in (workdir / "report.html").read_text(encoding="utf-8")
    found = load_generator(str(workdir), make_mesh(1, 1, jax.devices()[:1]))
    assert found.condition.encoder == "scenes"  # so that it is sampled without naming one
    assert found.sample(["a photo of a red star"]).shape == (1, 32, 32, 3)


@pytest.mark.slow
def test_a_finished_run_asked_again_trains_no_further(finished):
    """The same command on a finished workdir goes on from its last checkpoint: nothing is left."""
    summary, workdir = finished("demo_base")
    again = run(resolve(load("demo_base", "tiny")), workdir)
    assert again["weights"] == summary["weights"]
    assert again["ce"] == summary["ce"]


@pytest.mark.slow
def test_a_trained_decoder_is_sampled_with_the_generator_that_it_is_for(finished):
    _, workdir = finished("xxl_tokenizer_post")
    generator = load_generator(str(workdir), make_mesh(1, 1, jax.devices()[:1]))
    trained = load_safetensors(workdir / "weights" / "tokenizer.safetensors")
    demo = load_generator("demo", make_mesh(1, 1, jax.devices()[:1]))
    own, start = (flatten(g.frozen["tokenizer"]) for g in (generator, demo))
    for name, want in flatten(trained).items():
        np.testing.assert_array_equal(own[name], want)
        kept = name.startswith(("encoder/", "quant_conv/", "codebook/"))
        assert np.array_equal(own[name], start[name]) == kept, name
    for name, want in flatten(demo.params).items():
        np.testing.assert_array_equal(flatten(generator.params)[name], want)
