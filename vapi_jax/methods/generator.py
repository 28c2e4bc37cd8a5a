"""What methods that train an autoregressive generator over a frozen tokenizer have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from vapi_jax.common.digests import params_digest
from vapi_jax.common.options import Errors, build, hints_of
from vapi_jax.common.plugins import UnknownNameError, find
from vapi_jax.data.pipeline import encoder_of
from vapi_jax.data.sources import Encoder
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.method import Method, Network, SampledPolicy, tokenizer_source
from vapi_jax.models import conditions, lora
from vapi_jax.models.conditions import CONDITIONS, Condition
from vapi_jax.models.conversion import model_shapes
from vapi_jax.models.loading import ADAPTERS, ClassTable, WeightsSource, load_weights
from vapi_jax.models.lora import LoRA
from vapi_jax.models.pixels import PixelSpace
from vapi_jax.models.policies import find_policy, make_policy, on_devices
from vapi_jax.models.policy import Policy
from vapi_jax.models.vq import VQModel
from vapi_jax.parallel.sharding import replicated
from vapi_jax.weights.names import WeightsError


@dataclasses.dataclass(frozen=True)
class GeneratorMethod(Method):
    """A policy that is trained, and a frozen tokenizer to see images through."""

    independent_images: ClassVar[bool] = True

    @property
    def compute_dtype(self) -> str:
        return self.policy.compute_dtype

    @cached_property
    def policy(self) -> Policy:
        """The generator, with sizes it takes from the data and the tokenizer where not given."""
        return on_devices(make_policy(**sized_policy(self.config)), self.mesh, alone=self.local)

    @cached_property
    def condition(self) -> Condition:
        """What turns raw conditions of the data into those that the policy takes."""
        return make_condition(self.config, self.policy)

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {**batch, "condition": self.condition.prepare(batch["condition"])}

    def example_batch(self, rows: int) -> dict[str, Any]:
        condition = jax.eval_shape(lambda: self.condition.longest(rows))
        return {**super().example_batch(rows), "condition": condition}

    def drop_conditions(self, rng: PRNGKeyArray, batch: Mapping[str, Any], rate: float) -> Any:
        """The batch's conditions, each unconditional with probability `rate`."""
        keys = jax.vmap(partial(jax.random.fold_in, rng))(batch["index"])
        return conditions.drop(self.policy.condition, keys, batch["condition"], rate)

    @cached_property
    def pixels(self) -> PixelSpace:
        """The frozen tokenizer."""
        return PixelSpace(
            tokenizer=VQModel(self.config.tokenizer),
            mesh=None if self.local else self.mesh,
            chunk=self.config.decode_chunk,
        )

    def true_tokens(self, frozen: Mapping[str, Any], batch: Mapping[str, Any]) -> Array:
        """x* [B, T]: encoded here, or where the batch brings them, beforehand."""
        return batch["tokens"] if "tokens" in batch else self.pixels.encode(frozen, batch["image"])

    @property
    def init_from(self) -> WeightsSource | None:
        return generator_source(self.config, self.policy) if self.lora is None else None

    @property
    def lora(self) -> LoRA | None:
        """Adapters that are trained over a frozen generator, frozen["backbone"]; None where it is trained."""
        return self.policy.lora

    @property
    def trained_parts(self) -> str:
        if self.lora is None:
            return self.policy.trained_parts
        where = ", ".join(self.lora.targets) or "all linear maps"
        return (
            f"adapters of rank {self.lora.rank} on {where} of each layer; the generator is frozen"
        )

    def init(self, rng: PRNGKeyArray) -> Any:
        params = self.policy.init(rng)
        return params if self.lora is None else lora.split(params)[1]

    def whole(self, params: Any, frozen: Mapping[str, Any]) -> Any:
        return params if self.lora is None else lora.union(frozen["backbone"], params)

    def _base_shapes(self) -> Any:
        """Of the generator without adapters."""
        return lora.split(jax.eval_shape(self.policy.init, jax.random.key(0)))[0]

    def load_tokenizer(self) -> Any:
        """The frozen tokenizer's weights, checked against its configuration.

        Raises:
          WeightsError: if none are named, or they do not fit.
        """
        source = tokenizer_source(self.config)
        if source is None:
            raise WeightsError(
                "config.init.vq: name weights of a tokenizer (a released file, a converted directory, "
                "a run of configs/demo_tokenizer.py), or 'demo' for the shipped ones"
            )
        params = load_weights(source, model_shapes(self.config.tokenizer))
        if (made := encoder_of(self.config.data)) is not None:
            own = self.image_encoder(params)
            if made != own:
                raise WeightsError(
                    f"config.init.vq={source.path}, config.tokenizer.encoder_dtype={own.dtype!r}: "
                    f"the images in {self.config.data.path} were encoded with {made}, and this run "
                    f"has {own}. Choose the same, or encode them again"
                )
        return params

    def image_encoder(self, params: Any) -> Encoder:
        """What turns images into tokens, by the tokenizer's weights."""
        sizes = self.config.tokenizer
        return Encoder(params_digest(params), sizes.encoder_dtype, sizes.encoder_patches)

    def load_frozen(self) -> dict[str, Any]:
        found = {"tokenizer": self.load_tokenizer()}
        source = generator_source(self.config, self.policy)
        if self.lora is not None and source is not None:
            found["backbone"] = load_weights(source, self.frozen_shapes()["backbone"])
        return found

    def frozen_shapes(self) -> dict[str, Any]:
        found = {"tokenizer": model_shapes(self.config.tokenizer)}
        if (
            self.lora is not None
        ):  # nothing is added to it, so what products round is rounded at once
            found["backbone"] = jax.eval_shape(self.policy.narrowed, self._base_shapes())
        return found

    def networks(self) -> list[Network]:
        tokenizer = partial(model_shapes, self.config.tokenizer)
        source = generator_source(self.config, self.policy)
        found = [
            Network("policy", "init.gpt", self._base_shapes, source),
            Network("tokenizer", "init.vq", tokenizer, tokenizer_source(self.config)),
        ]
        kind, option = self.condition, self.condition.network_option
        if option and getattr(kind, option):
            name = f"condition.options.{option}"
            found.append(Network(option, name, kind.shapes, origin=kind.origin, load=kind.load))
        return found

    def memory(self, rows: int) -> Sequence[tuple[str, int, str]]:
        del rows
        leaves = jax.tree.leaves(self.condition.shapes())
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // jax.local_device_count()
        name = self.condition.network_option
        return [(name, held, "split over the devices of a process")] if held else []

    def raw_name(self, condition: Any) -> str:
        return self.condition.name(condition)

    def describe(self) -> dict[str, Any]:
        return self.condition.describe()

    def weights_of(self, params: Any, extra: Any) -> dict[str, Any]:
        del extra
        return {"policy" if self.lora is None else ADAPTERS: params}

    def narrowed(self, params: Any) -> Any:
        return self.policy.narrowed(params)

    @property
    def precision(self) -> dict[str, Any]:
        return {"policy": self.policy.compute_dtype, **super().precision}

    def sampled(self) -> SampledPolicy | None:
        return SampledPolicy(self.policy.for_sampling(), self._drawn_from, self.pixels)

    def _drawn_from(self, params: Any, frozen: Mapping[str, Any]) -> Any:
        if self.lora is None:
            return params
        return self.whole(jax.device_put(params, replicated(self.mesh)), frozen)

    def reconstruct(
        self, params: Any, frozen: Mapping[str, Any], images: Float[Array, "B H W 3"]
    ) -> Float[Array, "B H W 3"]:
        del params
        return self.pixels.decode(frozen, self.pixels.encode(frozen, images))

    @classmethod
    def check(cls, config: TrainConfig, errors: Errors) -> None:
        super().check(config, errors)
        check_policy(config, errors)
        if config.policy.get("lora") is not None:
            if not config.init.gpt:
                errors.append("policy.lora: adapters want weights to adapt; name them in init.gpt")
            if config.init.classes == "new":
                errors.append("policy.lora: init.classes='new' wants rows that are trained, too")


def make_condition(config: TrainConfig, policy: Policy) -> Condition:
    """The kind of condition that a configuration names, or the policy's own.

    Raises:
      ValueError: there is none of that name, or its options are wrong.
    """
    asked, own = config.condition, policy.condition
    if not asked.name:
        return own
    found, errors = find(asked.name, CONDITIONS, "condition"), Errors()
    # Sizes that the generator decides need no saying again.
    sizes = {name: getattr(own, name) for name in hints_of(found) if hasattr(own, name)}
    options = {**sizes, **asked.options}
    made = build(found, options, "condition.options.", errors, droppable=own.droppable)
    if errors:
        raise ValueError("\n".join(errors))
    return made


def sized_policy(config: TrainConfig) -> dict[str, Any]:
    """The policy's options, "kind" among them, with sizes that tokenizer and image size decide."""
    options = dict(config.policy)
    kind = find_policy(options["kind"])
    options.setdefault("vocab_size", config.tokenizer.codebook_size)
    grid = config.data.image_size // config.tokenizer.downsample_factor
    options.setdefault(kind.length_option, grid * grid)
    return options


def generator_source(config: TrainConfig, policy: Policy) -> WeightsSource | None:
    """The generator weights that a configuration names, if any."""
    init, table = config.init, None
    if not init.gpt:
        return None
    if policy.class_table:
        fresh = config.seed if init.classes == "new" else None
        table = ClassTable(policy.class_table, int(policy.condition.droppable), fresh)
    sizes = getattr(policy, "config", None)
    names = policy.name_rules, policy.ignored_names
    return WeightsSource(init.gpt, "gpt", *names, sizes, init.verify, table)


def check_policy(config: TrainConfig, errors: Errors) -> None:
    """Adds what is wrong with the options of a generator and its condition."""
    kind = config.policy.get("kind")
    if errors.concern("policy"):
        return
    try:
        found = find_policy(str(kind))
    except UnknownNameError as error:
        errors.append(f"policy.kind={kind!r}: {error}")
        return
    length = found.length_option
    if not errors.concern("data", "tokenizer"):
        side, codes = config.data.image_size, config.tokenizer.codebook_size
        grid, options = side // config.tokenizer.downsample_factor, sized_policy(config)
        if options[length] != grid * grid:
            errors.append(
                f"policy.{length}={options[length]}: images of {side} px give {grid}x{grid} tokens, "
                f"so {grid * grid}"
            )
        if options["vocab_size"] != codes:
            errors.append(
                f"policy.vocab_size={options['vocab_size']}: the tokenizer has {codes} codes"
            )
    if errors.concern(f"policy.{length}", "policy.vocab_size", "data.image_size", "tokenizer"):
        return
    try:
        policy = make_policy(**sized_policy(config))
    except ValueError as error:
        errors.append(f"policy: {error}")
        return
    try:
        given = make_condition(config, policy)
    except UnknownNameError as error:
        errors.append(f"condition.name: {error}")
        return
    except ValueError as error:
        errors += str(error).splitlines()
        return
    if given.num_classes is None and not config.condition.name:
        errors.append(
            f"policy.kind={kind!r}: this generator takes no class labels; choose 'class', or name the "
            "condition that makes what it takes of the data's (condition.name='caption' for captions)"
        )
    makes, takes = (jax.eval_shape(lambda x=x: x.example(1)) for x in (given, policy.condition))
    if makes != takes:
        errors.append(
            f"condition.name: {config.condition.name!r} makes {_in_words(makes)}, the generator takes "
            f"{_in_words(takes)}: choose the kind that it takes, and leave sizes out of condition.options"
        )


def _in_words(condition: Any) -> str:
    """The arrays of one condition: "features float32 [120, 2048], mask bool [120]"."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(condition):
        name = ".".join(str(getattr(key, "key", key)) for key in path)
        found.append(f"{name} {leaf.dtype} {list(leaf.shape[1:])}".replace(" []", "").strip())
    return ", ".join(found)


def has_dropout(config: TrainConfig) -> bool:
    """Whether the generator drops activations where it is trained with dropout."""
    sizes = getattr(make_policy(**sized_policy(config)), "config", None)
    return any(
        getattr(sizes, f"{where}_dropout_p", 0.0) > 0.0 for where in ("token", "resid", "ffn")
    )


def check_dropout(config: TrainConfig, errors: Errors, option: str, rate: float) -> None:
    """Adds what only shows when dropout is on.

    Args:
      config: the run.
      errors: added to.
      option: that asks for dropped conditions.
      rate: its value.
    """
    if errors.concern("policy", "tokenizer", "data.image_size", "condition"):
        return
    policy = make_policy(**sized_policy(config))
    if rate > 0.0 and not policy.condition.droppable:
        errors.append(
            f"policy.class_dropout_prob=0.0: this generator has no embedding for dropped labels; set "
            f"{option}=0.0"
        )
    dropout = getattr(getattr(policy, "config", None), "attn_dropout_p", 0.0)
    if dropout > 0.0:
        errors.append(
            f"policy.attn_dropout_p={dropout}: attention kernels have no dropout; set it to 0"
        )


def logits_bytes(rows: int, length: int, vocab: int) -> int:
    """Of a block of float32 logits and its companions in the backward pass."""
    return 4 * 3 * rows * length * vocab
