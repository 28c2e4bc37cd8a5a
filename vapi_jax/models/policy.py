"""What a generator must offer to be sampled from and trained.

A policy is a frozen dataclass of hyper-parameters and holds no arrays; parameters are passed to every call.
What it is asked for is a pytree of its `condition`. The kinds are in `vapi_jax.models.policies`;
`tests/models/test_policy.py` runs over all of them.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from jaxtyping import Array, Float, Int, PRNGKeyArray

from vapi_jax.models.conditions import Condition, Tree
from vapi_jax.models.head import Head, project
from vapi_jax.models.lora import LoRA
from vapi_jax.weights.names import Rule

Params = dict[str, Any]
Cache = Any


class Policy(abc.ABC):
    """π_θ(tokens | condition) over grids of `num_tokens` tokens out of `vocab_size`."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """V, how many image tokens there are."""

    @property
    @abc.abstractmethod
    def num_tokens(self) -> int:
        """T, the tokens of one image in raster order."""

    @property
    @abc.abstractmethod
    def compute_dtype(self) -> str:
        """What matrices are multiplied in."""

    @property
    def context_length(self) -> int:
        """How many of the T tokens `logits` takes; T - 1, as the last one predicts nothing."""
        return self.num_tokens - 1

    @property
    def lora(self) -> LoRA | None:
        """Adapters beside its matrices; None where there are none."""
        return None

    @property
    @abc.abstractmethod
    def name_rules(self) -> tuple[Rule, ...]:
        """The table between our parameter names and the released checkpoints'."""

    @property
    @abc.abstractmethod
    def ignored_names(self) -> tuple[str, ...]:
        """Regular expressions of checkpoint names that are no parameters of this policy."""

    @property
    @abc.abstractmethod
    def condition(self) -> Condition:
        """The kind of condition that it takes."""

    def example_condition(self, batch: int) -> Tree:
        """A valid condition of this batch size, for initialisation and shape inference."""
        return self.condition.example(batch)

    @classmethod
    @abc.abstractmethod
    def option_hints(cls) -> dict[str, Any]:
        """The options of a recipe's `policy` section -> annotated types with their limits."""

    @classmethod
    @abc.abstractmethod
    def from_options(cls, **options: Any) -> Policy:
        """The policy that these options describe.

        Raises:
          ValueError: fields that contradict each other, or an unknown size.
          TypeError: an unknown field.
        """

    trained_parts: ClassVar[str] = ""
    """What of a published model is trained, and what is not, for people; "" where all of it is."""

    length_option: ClassVar[str] = "num_tokens"
    """The option that says how many tokens an image has."""

    classes_option: ClassVar[str] = ""
    """The option that says how many classes there are; "" for a kind without classes."""

    class_table: ClassVar[str] = ""
    """Path of the parameter [classes + those for no class, D]; "" for a kind without one."""

    @abc.abstractmethod
    def init(self, rng: PRNGKeyArray) -> Params:
        """Fresh float32 parameters, a nested dict; the same for the same key."""

    def narrowed(self, params: Params) -> Params:
        """The same parameters in fewer bytes, for forward passes alone.

        Only what every use casts to the compute dtype anyway may be cast, so that results are the same
        to the bit. A kind that does not say so keeps its float32.
        """
        return params

    def unstacked(self, params: Params) -> Params:
        """The same parameters, an array for each layer, as `prefill` and `decode` read them fastest.

        They take both; from stacked ones every call copies its layers. A kind that does not say so keeps
        what it has.
        """
        return params

    def for_sampling(self) -> Policy:
        """The policy that draws from what this one trains: with the same parameters, the model's own."""
        return self

    @abc.abstractmethod
    def embed(self, params: Params, condition: Tree) -> Float[Array, "B P D"]:
        """The conditioning positions as the transformer gets them."""

    @abc.abstractmethod
    def hidden(
        self,
        params: Params,
        condition: Tree,
        context: Int[Array, "B S"],
        *,
        dropout_rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """What the output layer sees: position t knows the condition and context[:t].

        context has `context_length` tokens. Dropout is off without `dropout_rng`.
        """

    @abc.abstractmethod
    def head(self, params: Params) -> Head:
        """The output layer."""

    def logits(
        self,
        params: Params,
        condition: Tree,
        context: Int[Array, "B S"],
        *,
        dropout_rng: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T V"]:
        """Teacher-forced float32 logits of all tokens; see `hidden` for the arguments."""
        hidden = self.hidden(params, condition, context, dropout_rng=dropout_rng)
        return project(hidden, self.head(params))

    def unconditional(self, condition: Tree) -> Tree:
        """The other half of classifier-free guidance; see `Condition.unconditional`."""
        return self.condition.unconditional(condition)

    @abc.abstractmethod
    def prefill(self, params: Params, condition: Tree) -> tuple[Float[Array, "B V"], Cache]:
        """Float32 logits of token 0, and the cache of the condition (leading axis B or 1)."""

    def with_room(self, cache: Cache, tokens: int) -> Cache:
        """The cache with room for the first `tokens` tokens of an image, what it holds kept.

        `decode` reads all of it, filled or not, so `sampling.generate` makes room bit by bit. A kind
        whose `prefill` makes room for all tokens returns the cache as it is.
        """
        return cache

    @abc.abstractmethod
    def decode(
        self, params: Params, cache: Cache, token: Int[Array, " B"], index: Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Takes in token `index` (0 .. T-2, may be traced); returns the logits of index + 1.

        The cache has room for it, see `with_room`.
        """
