"""The kinds of generators, LlamaGen's and Janus-Pro's, and how one is made by name.

A new kind is a `vapi_jax.models.policy.Policy` and an entry in `POLICIES`, or is named as "module:Class".
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.common.options import Dtype, hints_of
from vapi_jax.common.plugins import find
from vapi_jax.models import janus, llama
from vapi_jax.models.attention import attention_implementation
from vapi_jax.models.conditions import Caption, Label, Prompt, Tree
from vapi_jax.models.head import Head
from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.llama import LLAMA_SIZES, LlamaConfig
from vapi_jax.models.lora import LoRA
from vapi_jax.models.policy import Cache, Params, Policy
from vapi_jax.models.transformer import BlockConfig, KVCache, unstack
from vapi_jax.weights.names import Rule


@dataclasses.dataclass(frozen=True)
class _StackPolicy(Policy):
    """What LlamaGen and Janus share: a stack of blocks, and functions of its parameters.

    Attributes:
      network: the module that both stand in.
    """

    network: ClassVar[Any]

    config: Any

    @property
    @abc.abstractmethod
    def module(self) -> nn.Module:
        """The network, of these sizes."""

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def compute_dtype(self) -> str:
        return str(self.config.dtype)

    @property
    def lora(self) -> LoRA | None:
        found: LoRA | None = self.config.lora
        return found

    @property
    def name_rules(self) -> tuple[Rule, ...]:
        return tuple(self.network.NAME_RULES)

    @property
    def ignored_names(self) -> tuple[str, ...]:
        return tuple(self.network.IGNORED_NAMES)

    def init(self, rng: PRNGKeyArray) -> Params:
        context = jnp.zeros((1, 1), dtype=jnp.int32)
        return self.module.init(rng, self.example_condition(1), context)["params"]

    def narrowed(self, params: Params) -> Params:
        return _cast_matrices(params, self.compute_dtype)

    def unstacked(self, params: Params) -> Params:
        return {**params, "layers": unstack(params["layers"])}

    def embed(self, params: Params, condition: Tree) -> Float[Array, "B P D"]:
        return self.module.apply({"params": params}, condition, method="embed")

    def decode(
        self, params: Params, cache: Cache, token: Int[Array, " B"], index: Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], Cache]:
        found: tuple[Array, Cache] = self.network.decode(self.config, params, cache, token, index)
        return found


@dataclasses.dataclass(frozen=True)
class _LlamaPolicy(_StackPolicy):
    """What class and text conditioning share."""

    length_option: ClassVar[str] = "block_size"
    network: ClassVar[Any] = llama

    config: LlamaConfig

    @classmethod
    def option_hints(cls) -> dict[str, Any]:
        return {**hints_of(LlamaConfig), "size": Literal[tuple(LLAMA_SIZES)]}

    @property
    def module(self) -> llama.Llama:
        return llama.Llama(self.config)

    @property
    def num_tokens(self) -> int:
        return self.config.block_size

    def hidden(
        self,
        params: Params,
        condition: Tree,
        context: Int[Array, "B S"],
        *,
        dropout_rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        return self.module.apply(
            {"params": params},
            condition,
            context,
            deterministic=dropout_rng is None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
            method="hidden",
        )

    def head(self, params: Params) -> Head:
        return Head(params["output"]["kernel"])

    def prefill(self, params: Params, condition: Tree) -> tuple[Float[Array, "B V"], Cache]:
        return llama.prefill(self.config, params, condition)

    def with_room(self, cache: KVCache, tokens: int) -> KVCache:
        return cache.grown(self.config.cls_token_num + tokens)


@dataclasses.dataclass(frozen=True)
class ClassPolicy(_LlamaPolicy):
    """Class-conditional LlamaGen, under a `Label`."""

    classes_option: ClassVar[str] = "num_classes"
    class_table: ClassVar[str] = "cls_embedding/embedding"

    def __post_init__(self) -> None:
        if self.config.model_type != "c2i":
            raise ValueError(f"ClassPolicy wants model_type 'c2i', not {self.config.model_type!r}")

    @property
    def condition(self) -> Label:
        return Label(classes=self.config.num_classes, droppable=self.config.class_dropout_prob > 0)

    @classmethod
    def from_options(cls, **options: Any) -> ClassPolicy:
        return cls(_llama_config("c2i", options))


@dataclasses.dataclass(frozen=True)
class TextPolicy(_LlamaPolicy):
    """Text-conditional LlamaGen, under a `Caption`."""

    def __post_init__(self) -> None:
        if self.config.model_type != "t2i":
            raise ValueError(f"TextPolicy wants model_type 't2i', not {self.config.model_type!r}")

    @property
    def condition(self) -> Caption:
        c = self.config
        return Caption(
            length=c.cls_token_num, width=c.caption_dim, droppable=c.class_dropout_prob > 0
        )

    @classmethod
    def from_options(cls, **options: Any) -> TextPolicy:
        return cls(_llama_config("t2i", {"cls_token_num": 120, **options}))


@dataclasses.dataclass(frozen=True)
class JanusPolicy(_StackPolicy):
    """Janus-Pro, under a `Prompt`.

    alignment: "shifted_by_one" reads token t's logits one position before it, as pretraining and
      inference do. "same_position" reads them where x_t itself has been fed, as the reference
      implementation of VA-π does: then the context has T tokens, and there is no sampling.
    padding: "exact" counts positions over real prompt tokens and starts at the last of them, so
      padding on either side changes nothing. "counted" counts through the padding, as the
      reference does with its right-padded prompts: results depend on the batch's longest prompt.
    """

    trained_parts: ClassVar[str] = (
        "the language model, gen_embed, gen_aligner and gen_head; not its text head (lm_head), and not what "
        "looks at images (vision_model, aligner), which no run loads and an export carries along"
    )

    network: ClassVar[Any] = janus

    config: JanusConfig
    alignment: str = "shifted_by_one"
    padding: str = "exact"

    @classmethod
    def option_hints(cls) -> dict[str, Any]:
        own = {
            "alignment": Literal["shifted_by_one", "same_position"],
            "padding": Literal["exact", "counted"],
        }
        return {**hints_of(JanusConfig), **own}

    def __post_init__(self) -> None:
        if self.alignment not in ("shifted_by_one", "same_position"):
            raise ValueError(f"unknown alignment {self.alignment!r}")
        if self.padding not in ("exact", "counted"):
            raise ValueError(f"unknown padding {self.padding!r}")

    @property
    def module(self) -> janus.Janus:
        return janus.Janus(self.config)

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens

    @property
    def context_length(self) -> int:
        return self.num_tokens - (self.alignment == "shifted_by_one")

    @property
    def condition(self) -> Prompt:
        return Prompt(pad_id=self.config.pad_id, vocab=self.config.text_vocab_size)

    @classmethod
    def from_options(
        cls, alignment: str = "shifted_by_one", padding: str = "exact", **options: Any
    ) -> JanusPolicy:
        return cls(JanusConfig(**options), alignment, padding)

    def for_sampling(self) -> JanusPolicy:
        return dataclasses.replace(self, alignment="shifted_by_one", padding="exact")

    def hidden(
        self,
        params: Params,
        condition: Tree,
        context: Int[Array, "B S"],
        *,
        dropout_rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        del dropout_rng  # Janus has no dropout: with an rng and without, it is the same function
        return self.module.apply(
            {"params": params},
            condition,
            context,
            same_position=self.alignment == "same_position",
            count_padding=self.padding == "counted",
            method="hidden",
        )

    def head(self, params: Params) -> Head:
        last = params["gen_head"]["fc2"]
        return Head(last["kernel"], last["bias"])

    def prefill(self, params: Params, condition: Tree) -> tuple[Float[Array, "B V"], Cache]:
        if self.alignment == "same_position":
            raise ValueError("alignment 'same_position' has seen the token it scores: no sampling")
        return janus.prefill(self.config, params, condition, self.padding == "counted")

    def with_room(self, cache: KVCache, tokens: int) -> KVCache:
        return cache.grown(cache.visible.shape[1] - (self.num_tokens - 1) + tokens)


def _cast_matrices(params: Params, dtype: str) -> Params:
    """Matrices and tables in the compute dtype. Norms, biases and learned features stay."""

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.astype(dtype) if name in ("kernel", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _llama_config(model_type: str, config: Mapping[str, Any]) -> LlamaConfig:
    fields = dict(config)
    size = fields.pop("size", None)
    if size is not None:
        if size not in LLAMA_SIZES:
            raise ValueError(f"unknown size {size!r}, known are {', '.join(LLAMA_SIZES)}")
        fields = {**LLAMA_SIZES[size], **fields}
    if fields.setdefault("model_type", model_type) != model_type:
        raise ValueError(f"model_type {fields['model_type']!r} contradicts kind")
    return LlamaConfig(**fields)


def on_devices(
    policy: Policy, mesh: Mesh, dtype: Dtype | None = None, alone: bool = False
) -> Policy:
    """The policy with its attention settled for these devices, which need not be the default ones.

    Args:
      policy: one of another make than `POLICIES` stays as it is.
      mesh: the devices.
      dtype: to compute in instead of the policy's own; attention is then chosen anew.
      alone: each device runs a program of its own, inside `jax.shard_map`, as where there is but one.

    Raises:
      ValueError: cuDNN attention is asked for where it cannot be.
    """
    config: Any = getattr(policy, "config", None)
    block = getattr(config, "block", None)
    if not isinstance(block, BlockConfig):
        return policy
    attention = block.attention if dtype is None else "auto"
    computed = dtype or block.dtype
    device, alone = mesh.devices.flat[0], alone or mesh.devices.size == 1
    attention = attention_implementation(attention, computed, block.head_dim, device, alone)
    config = dataclasses.replace(config, dtype=computed, attention=attention)
    return dataclasses.replace(cast(Any, policy), config=config)


def without_adapters(policy: Policy) -> Policy:
    """The policy of weights that adapters have been merged into; one that has none stays as it is."""
    if policy.lora is None:
        return policy
    own = cast(Any, policy)
    return dataclasses.replace(own, config=dataclasses.replace(own.config, lora=None))


POLICIES: dict[str, type[Policy]] = {
    "class": ClassPolicy,
    "text": TextPolicy,
    "janus": JanusPolicy,
}


def find_policy(kind: str) -> type[Policy]:
    """The class of a kind of generator: of `POLICIES`, or a user's own as "module:Class".

    Raises:
      UnknownNameError: there is no such kind.
    """
    return find(kind, POLICIES, "policy")


def make_policy(kind: str, **options: Any) -> Policy:
    """A policy by name, so that a trainer names no class.

    Args:
      kind: see `find_policy`.
      options: of that kind, see its `option_hints`.

    Raises:
      ValueError: for an unknown kind or size, or fields that contradict each other.
      TypeError: for an unknown field.
    """
    return find_policy(kind).from_options(**options)
