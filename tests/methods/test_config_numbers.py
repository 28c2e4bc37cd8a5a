"""Every number of a configuration has limits, and is named with them when it is outside."""

import dataclasses
import json
import types
import typing

import pytest

from tests.helpers.complaints import MINIMAL, lines
from tests.helpers.messages import facts
from vapi_jax.common.options import hints_of
from vapi_jax.methods import METHODS
from vapi_jax.methods.config import TrainConfig, to_dict
from vapi_jax.methods.resolve import resolve
from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.llama import LlamaConfig


def changes_of(path, value):
    """{"a": {"b": value}} of "a.b"; the generator is of a kind that has the option."""
    *sections, name = path.split(".")
    changes = {name: value}
    for section in reversed(sections):
        changes = {section: changes}
    if sections[:1] == ["policy"]:
        janus = {"hidden_dim", "text_vocab_size", "image_embed_dim", "num_tokens", "pad_id"}
        janus |= {"aligner_dim", "gen_head_dim"}
        changes["policy"] |= {"kind": "janus" if name in janus else "class"}
    owners = {method.section: name for name, method in METHODS.items()}
    changes["method"] = owners.get(path.partition(".")[0], "vapi")
    if changes["method"] == "tokenizer_post":
        changes["init"] = {"gpt": "demo", "vq": "demo"}
    return changes


# Of every method that rewards groups.
GROUPS = [
    ("group_size", 1, "wants at least 2, for advantages"),
    ("temperature", 0.0, "wants more than 0"),
    ("clip_epsilon", 0.0, "wants more than 0"),
    ("clip_epsilon_high", -0.1, "wants at least 0"),
    ("advantage_clip", 0.0, "wants more than 0"),
    ("kl_weight", -0.1, "wants at least 0"),
    ("entropy_share", 0.0, "wants more than 0, at most 1"),
    ("entropy_target", -0.1, "wants at least 0"),
    ("entropy_rate", 0.0, "wants more than 0"),
    ("entropy_limit", 0.0, "wants more than 0"),
    ("ema_decay", 1.0, "wants [0, 1)"),
]

# Option, a value on the wrong side of its limit, what it wants.
OUTSIDE = [
    ("seed", -1, "wants 0 to 4294967295"),
    ("seed", 2**32, "wants 0 to 4294967295"),
    ("steps", 0, "wants at least 1"),
    ("batch_size", 0, "wants at least 1"),
    ("microbatch_size", -8, "wants at least 0"),
    ("cpu_devices", 0, "wants at least 1"),
    ("decode_chunk", -1, "wants at least 0"),
    ("log_every", 0, "wants at least 1"),
    ("base.label_dropout", 1.5, "wants 0 to 1"),
    ("text_base.label_dropout", 1.5, "wants 0 to 1"),
    ("mesh.data", 0, "wants at least 1, or -1 for what is left"),
    ("mesh.fsdp", -2, "wants at least 1, or -1 for what is left"),
    ("tokenizer.codebook_size", 1, "wants at least 2"),
    ("tokenizer.codebook_embed_dim", 0, "wants at least 1"),
    ("tokenizer.ch", 0, "wants at least 1"),
    ("tokenizer.encoder_ch_mult", (1, 0), "wants at least 1"),
    ("tokenizer.decoder_ch_mult", (-1, 1), "wants at least 1"),
    ("tokenizer.num_res_blocks", 0, "wants at least 1"),
    ("tokenizer.z_channels", 0, "wants at least 1"),
    ("tokenizer.groupnorm_groups", 0, "wants at least 1"),
    ("tokenizer.commit_loss_beta", -0.5, "wants at least 0"),
    ("tokenizer.entropy_loss_ratio", -0.5, "wants at least 0"),
    ("tokenizer.entropy_temperature", 0.0, "wants more than 0"),
    ("tokenizer.dropout_p", 1.0, "wants [0, 1)"),
    ("tokenizer_training.loss.reconstruction", -1.0, "wants at least 0"),
    ("tokenizer_training.loss.perceptual", -1.0, "wants at least 0"),
    ("tokenizer_training.loss.codebook", -1.0, "wants at least 0"),
    ("tokenizer_training.loss.adversarial", -1.0, "wants at least 0"),
    ("tokenizer_training.discriminator_start", -1, "wants at least 0"),
    ("tokenizer_training.discriminator_ndf", 0, "wants at least 1"),
    ("tokenizer_training.discriminator_layers", 0, "wants at least 1"),
    ("tokenizer_training.restart_below", -0.1, "wants at least 0"),
    ("tokenizer_training.restart_every", 0, "wants at least 1"),
    ("tokenizer_training.restart_until", 1.1, "wants 0 to 1"),
    ("policy.dim", 0, "wants at least 1"),
    ("policy.n_layer", 0, "wants at least 1"),
    ("policy.n_head", 0, "wants at least 1"),
    ("policy.n_kv_head", 0, "wants at least 1"),
    ("policy.multiple_of", 0, "wants at least 1"),
    ("policy.ffn_dim_multiplier", 0.0, "wants more than 0"),
    ("policy.rope_base", 0.0, "wants more than 0"),
    ("policy.norm_eps", 0.0, "wants more than 0"),
    ("policy.initializer_range", -0.1, "wants at least 0"),
    ("policy.token_dropout_p", 1.0, "wants [0, 1)"),
    ("policy.attn_dropout_p", -0.1, "wants [0, 1)"),
    ("policy.resid_dropout_p", 1.0, "wants [0, 1)"),
    ("policy.ffn_dropout_p", 1.0, "wants [0, 1)"),
    ("policy.drop_path_rate", 1.0, "wants [0, 1)"),
    ("policy.num_classes", 0, "wants at least 1"),
    ("policy.caption_dim", 0, "wants at least 1"),
    ("policy.class_dropout_prob", 2.0, "wants 0 to 1"),
    ("policy.vocab_size", 1, "wants at least 2"),
    ("policy.cls_token_num", 0, "wants at least 1"),
    ("policy.block_size", 0, "wants at least 1"),
    ("policy.hidden_dim", 0, "wants at least 1"),
    ("policy.text_vocab_size", 0, "wants at least 1"),
    ("policy.image_embed_dim", 0, "wants at least 1"),
    ("policy.aligner_dim", 0, "wants at least 1"),
    ("policy.gen_head_dim", 0, "wants at least 1"),
    ("policy.lora.rank", 0, "wants at least 1"),
    ("policy.lora.alpha", 0.0, "wants more than 0"),
    ("policy.num_tokens", 0, "wants at least 1"),
    ("policy.pad_id", -1, "wants at least 0"),
    *(
        (f"{section}.{name}", value, wants)
        for section in ("vapi", "ar_grpo")
        for name, value, wants in GROUPS
    ),
    ("sft.noise_rate", 1.5, "wants 0 to 1"),
    ("sft.weight", 0.0, "wants more than 0"),
    ("ste.tau", 0.0, "wants more than 0"),
    ("ste.temperature", 0.0, "wants more than 0"),
    ("ste.ce_weight", -0.1, "wants at least 0"),
    ("ste.noise_rate", 1.5, "wants 0 to 1"),
    ("ste.label_dropout", 1.5, "wants 0 to 1"),
    ("tokenizer_post.loss.reconstruction", -1.0, "wants at least 0"),
    ("tokenizer_post.loss.perceptual", -1.0, "wants at least 0"),
    ("tokenizer_post.loss.codebook", -1.0, "wants at least 0"),
    ("tokenizer_post.loss.adversarial", -1.0, "wants at least 0"),
    ("tokenizer_post.discriminator_start", -1, "wants at least 0"),
    ("tokenizer_post.discriminator_ndf", 0, "wants at least 1"),
    ("tokenizer_post.discriminator_layers", 0, "wants at least 1"),
    ("tokenizer_post.true_share", 1.1, "wants 0 to 1"),
    ("tokenizer_post.temperature", 0.0, "wants more than 0"),
    ("tokenizer_post.cfg_scale", -1.0, "wants at least 0"),
    ("ar_grpo.updates", 0, "wants at least 1"),
    ("ar_grpo.cfg_scale", -1.0, "wants at least 0"),
    ("ar_grpo.top_k", -1, "wants at least 0"),
    ("ar_grpo.top_p", 0.0, "wants more than 0 and at most 1"),
    ("ar_grpo.importance_cap", -1.0, "wants at least 0"),
    ("cca.beta", 0.0, "wants more than 0"),
    ("cca.negative_weight", -1.0, "wants at least 0"),
    ("cca.unconditional", 1.0, "wants [0, 1)"),
    ("vapi.noise_rate", 1.5, "wants 0 to 1"),
    ("vapi.noise_rate", -0.1, "wants 0 to 1"),
    ("vapi.ce_weight", -0.1, "wants at least 0"),
    ("vapi.token_dropout", 1.0, "wants [0, 1)"),
    ("vapi.label_dropout", 1.1, "wants 0 to 1"),
    ("optimizer.learning_rate", -1.0, "wants at least 0"),
    ("optimizer.weight_decay", -0.1, "wants at least 0"),
    ("optimizer.b1", 1.0, "wants [0, 1)"),
    ("optimizer.b2", -0.1, "wants [0, 1)"),
    ("optimizer.eps", 0.0, "wants more than 0"),
    ("optimizer.max_grad_norm", -1.0, "wants at least 0"),
    ("optimizer.warmup_steps", -1, "wants at least 0"),
    ("eval.every", 0, "wants at least 1"),
    ("eval.images", 0, "wants at least 1"),
    ("eval.samples", 0, "wants at least 1"),
    ("eval.seeds", 0, "wants at least 1"),
    ("eval.temperatures", (0.9, 0.0), "wants more than 0"),
    ("eval.cfg_scales", (2.0, 0.0), "wants more than 0"),
    ("eval.sampled", 2, "wants at least 3"),
    ("eval.sampled_every", -1, "wants at least 0"),
    ("eval.grid_per_class", 0, "wants at least 1"),
    ("eval.grid_classes", 0, "wants at least 1"),
    ("checkpoint.every", -1, "wants at least 0"),
    ("checkpoint.keep_last", 0, "wants at least 1"),
    ("checkpoint.keep_every", -1, "wants at least 0"),
    ("max_skipped", -1, "wants at least 0"),
]

# And a value at the limit, where the limit itself is possible.
INSIDE = [
    ("seed", 2**32 - 1),
    ("base.label_dropout", 1.0),
    ("vapi.noise_rate", 0.0),
    ("vapi.noise_rate", 1.0),
    ("vapi.token_dropout", 0.0),
    ("vapi.group_size", 2),
    ("vapi.ce_weight", 0.0),
    ("decode_chunk", 0),
    ("tokenizer.codebook_size", 2),
    ("optimizer.b1", 0.0),
    ("optimizer.max_grad_norm", 0.0),
    ("mesh.data", 1),
    ("checkpoint.every", 0),
    ("policy.n_kv_head", None),
    ("eval.temperatures", ()),
]


@pytest.mark.parametrize(("path", "value", "wants"), OUTSIDE)
def test_a_number_outside_its_limits_is_named_with_them(path, value, wants):
    (line,) = lines(**changes_of(path, value))
    assert facts(line) == facts(f"{path}={value}: {wants}")


@pytest.mark.parametrize(("path", "value"), INSIDE)
def test_a_number_at_its_limit_is_possible(path, value):
    found = to_dict(resolve({**MINIMAL, **changes_of(path, value)}))
    for name in path.split("."):
        found = found[name]
    assert found == json.loads(json.dumps(value))  # tuples are lists there


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "path", ["optimizer.learning_rate", "vapi.temperature", "policy.rope_base"]
)
def test_numbers_must_be_finite(path, value):
    assert lines(**changes_of(path, value)) == [f"{path}={value}: wants a finite number"]


def test_every_number_has_limits_and_a_row_above():
    """The data's own are tried in tests/data/test_data.py."""
    numbers, free = set(), set()

    def limited(hint):
        inner = typing.get_args(hint)
        return typing.get_origin(hint) is typing.Annotated or any(map(limited, inner))

    def numeric(hint):
        return hint in (int, float) or any(map(numeric, typing.get_args(hint)))

    def collect(kind, where):
        for name, hint in hints_of(kind).items():
            parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            own = [x for x in parts if isinstance(x, type) and dataclasses.is_dataclass(x)]
            if own:
                collect(own[0], f"{where}{name}.")
            elif typing.get_origin(hint) is not typing.Literal and numeric(hint):
                (numbers if limited(hint) else free).add(f"{where}{name}")

    collect(TrainConfig, "")
    for method in METHODS.values():
        collect(method.Options, f"{method.section}.")
    for kind in (LlamaConfig, JanusConfig):
        collect(kind, "policy.")
    numbers = {name for name in numbers if not name.startswith("data.")}
    assert {path for path, _, _ in OUTSIDE} == numbers
    assert free <= {"data.photo_min_scale", "data.photo_max_scale", "data.prefetch"}
