"""What a user may bring from outside the package: a reward, a condition, a policy and a method.

Named in recipes as "tests.helpers.toys:Name".
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vapi_jax.common.options import Count, Positive
from vapi_jax.methods.generator import GeneratorMethod
from vapi_jax.methods.method import Method, mean_of
from vapi_jax.models.conditions import Condition, Label
from vapi_jax.models.policies import ClassPolicy
from vapi_jax.models.sampling import generate
from vapi_jax.rewards import Reward, make_terms
from vapi_jax.rewards.prompts import LETTERS

# --- rewards --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Brightness(Reward):
    """How near a sample's mean is to a wanted one; a network of one number of its own."""

    wanted: float = 0.0

    def shapes(self):
        return {"scale": jax.ShapeDtypeStruct((), jnp.float32)}

    def load(self):
        return {"scale": np.float32(2.0)}

    def origin(self):
        return "two", "known"

    def __call__(self, weights, pixels, batch):
        return -weights["scale"] * jnp.abs(pixels.mean(axis=(2, 3, 4)) - self.wanted)


def contrast(pixels, batch, power=1):
    """A plain function is a reward too."""
    assert pixels.shape[:2] == batch["samples"].shape[:2]
    return jnp.std(pixels, axis=(2, 3, 4)) ** power


def mean_of_groups(pixels, batch):
    """A number for each image, where one for each sample is wanted."""
    return pixels.mean(axis=(1, 2, 3, 4))


def low_tokens(pixels, batch):
    """The share of tokens in the first half of 16 codes, which looks at no picture."""
    return jnp.mean(batch["samples"] < 8, axis=-1)


def contrast_on_host(pixels, batch):
    """The same by NumPy, which no compiler sees."""
    assert isinstance(pixels, np.ndarray)
    return np.std(pixels, axis=(2, 3, 4))


def dark_alone_on_host(pixels, batch):
    """One for each sample, and an error for a bright one."""
    if pixels.max() > 0.5:
        raise ValueError("too bright")
    return np.ones(pixels.shape[:2])


# --- conditions -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Superclass(Label):
    """Labels of a data set, `fold` of them together."""

    fold: Count = 4

    def prepare(self, raw):
        return super().prepare(np.asarray(raw) // self.fold)


@dataclasses.dataclass(frozen=True)
class Coloured(Condition):
    """A label and a colour: a pytree that no kind of the package takes."""

    classes: int = 12

    @property
    def num_classes(self):
        return self.classes

    def example(self, batch):
        return {"label": jnp.zeros(batch, jnp.int32), "colour": jnp.zeros(batch, jnp.int32)}

    def prepare(self, raw):
        raw = np.asarray(raw, np.int32)
        return {"label": raw, "colour": raw % 3}

    def _unconditional(self, condition):
        return {**condition, "label": jnp.full_like(condition["label"], self.classes)}


@dataclasses.dataclass(frozen=True)
class ColouredPolicy(ClassPolicy):
    """The class-conditional generator, its labels moved by the colour: a kind of its own."""

    @property
    def condition(self):
        return Coloured(classes=self.config.num_classes)

    def _label(self, condition):
        moved = (condition["label"] + condition["colour"]) % self.config.num_classes
        none = condition["label"] == self.config.num_classes
        return jnp.where(none, condition["label"], moved)

    def init(self, rng):
        return ClassPolicy(self.config).init(rng)

    def embed(self, params, condition):
        return super().embed(params, self._label(condition))

    def hidden(self, params, condition, context, *, dropout_rng=None):
        return super().hidden(params, self._label(condition), context, dropout_rng=dropout_rng)

    def prefill(self, params, condition):
        return super().prefill(params, self._label(condition))


# --- methods --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReinforceOptions:
    baseline_decay: Positive = 0.5
    epochs: Count = 2


@dataclasses.dataclass(frozen=True)
class Reinforce(GeneratorMethod):
    """Free-running rollouts, rewards on the host, several updates on each, and a second network.

    The reward is the share of tokens below half of the vocabulary; a linear critic of the class
    predicts it. Its batches bring no images.
    """

    title: ClassVar[str] = "REINFORCE"
    Options: ClassVar[type] = ReinforceOptions
    headline: ClassVar[tuple[str, ...]] = ("reward",)
    curves: ClassVar[Any] = (("reward", "Reward", "share of low tokens"),)
    rolls_out: ClassVar[bool] = True
    wants_images: ClassVar[bool] = False
    partition_rules: ClassVar[Any] = ((r"critic/", PartitionSpec()),)

    @property
    def updates(self):
        return self.options.epochs

    def prepare(self, batch):
        assert "image" not in batch
        return super().prepare(batch)

    def init(self, rng):
        policy = self.policy.init(rng)
        head = policy["output"]["kernel"]
        policy["output"] = {"kernel": 0.1 * jax.random.normal(rng, head.shape)}
        return {"policy": policy, "critic": {"table": jnp.zeros(self.policy.config.num_classes)}}

    def weights_of(self, params, extra):
        return {"policy": params["policy"], "critic": params["critic"]}

    def sampled(self):
        return dataclasses.replace(super().sampled(), params=lambda params: params["policy"])

    def rollout(self, params, frozen, batch, rng, step):
        tokens = generate(
            self.policy, params["policy"], batch["condition"], rng, sample_ids=batch["index"]
        )
        return {"condition": batch["condition"], "tokens": tokens}

    def review(self, experience):
        assert isinstance(experience["tokens"], np.ndarray)
        low = experience["tokens"] < self.policy.vocab_size // 2
        return {"reward": low.mean(axis=1).astype(np.float32)}

    def loss(self, params, extra, frozen, batch, rng, step):
        context = batch["tokens"][:, : self.policy.context_length]
        logits = self.policy.logits(params["policy"], batch["condition"], context)
        logps = jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch["tokens"][..., None], axis=-1
        ).mean(axis=(1, 2))
        value = params["critic"]["table"][batch["condition"]]
        advantage = jax.lax.stop_gradient(batch["reward"] - value)
        critic = jnp.square(value - batch["reward"])
        loss = -logps * advantage + critic
        aux = {"loss": loss, "reward": batch["reward"], "critic": critic}
        return loss.mean(), (aux, extra)

    def summarize(self, aux):
        return mean_of(aux, "loss", "reward", "critic")

    def held_out(self, params, frozen, batch, rng, temperature):
        return {"value": params["critic"]["table"][batch["condition"]].mean()}

    def reconstruct(self, params, frozen, images):
        return None


@dataclasses.dataclass(frozen=True)
class Mean(Method):
    """The smallest method: one number learns the mean of the images."""

    title: ClassVar[str] = "the mean of images"
    section: ClassVar[str] = ""

    def init(self, rng):
        return {"mean": {"bias": jnp.full((1,), 0.5)}}

    def weights_of(self, params, extra):
        return {"mean": params["mean"]}

    def loss(self, params, extra, frozen, batch, rng, step):
        loss = jnp.square(params["mean"]["bias"] - batch["image"]).mean()
        return loss, ({"loss": loss}, extra)

    def held_out(self, params, frozen, batch, rng, temperature):
        return {"error": jnp.abs(params["mean"]["bias"] - batch["image"].mean()).mean()}


@dataclasses.dataclass(frozen=True)
class Twice(Mean):
    """The same, which learns twice from a batch."""

    updates: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True)
class Edge(Twice):
    """The same, not finite once the number has fallen."""

    def loss(self, params, extra, frozen, batch, rng, step):
        loss, aux = super().loss(params, extra, frozen, batch, rng, step)
        return jnp.where(params["mean"]["bias"][0] < 0.5, jnp.nan, 1.0) * loss, aux


@dataclasses.dataclass(frozen=True)
class SparseOptions:
    every: Count = 3


@dataclasses.dataclass(frozen=True)
class Sparse(Mean):
    """The same, of whose steps one in so many has anything to learn from."""

    Options: ClassVar[type] = SparseOptions
    patience: ClassVar[int] = 20

    def loss(self, params, extra, frozen, batch, rng, step):
        loss, aux = super().loss(params, extra, frozen, batch, rng, step)
        return loss * ((step + 1) % self.options.every == 0), aux


@dataclasses.dataclass(frozen=True)
class Asked(Mean):
    """The same, its images weighted by the recipe's reward, which sees no prompts."""

    def loss(self, params, extra, frozen, batch, rng, step):
        [term], images = make_terms(self.config.rewards), batch["image"]

        def asked(images):
            prompts = jnp.zeros((len(images), LETTERS), jnp.uint8)
            return term.reward({}, images[:, None], {"prompt": prompts})[:, 0]

        rows = PartitionSpec(self.mesh.axis_names)
        each = jax.shard_map(asked, mesh=self.mesh, in_specs=rows, out_specs=rows, check_vma=False)
        losses = each(jax.lax.stop_gradient(images)) * jnp.square(
            params["mean"]["bias"] - images
        ).mean(axis=(1, 2, 3))
        return losses.mean(), ({"loss": losses}, extra)
