"""The smallest runs of every task, with random weights drawn by numpy: nothing is compiled for them."""

import dataclasses
import functools
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vapi_jax.common.trees import flatten, unflatten
from vapi_jax.methods import make_method
from vapi_jax.methods.resolve import resolve
from vapi_jax.models.vq import VQConfig, VQModel
from vapi_jax.parallel.sharding import make_mesh, put_sharded, shard_batch
from vapi_jax.training import train
from vapi_jax.weights.store import save_safetensors

SIDE, BATCH = 8, 16
TOKENIZER = {
    "codebook_size": 16,
    "codebook_embed_dim": 4,
    "ch": 32,
    "encoder_ch_mult": (1, 1),
    "decoder_ch_mult": (1, 1),
    "num_res_blocks": 1,
    "z_channels": 8,
}
SECTIONS = {
    "vapi": {"vapi": {"group_size": 3, "noise_rate": 0.3}},
    "tokenizer": {
        "tokenizer_training": {
            "discriminator_start": 1,
            "discriminator_ndf": 4,
            "discriminator_layers": 1,
        }
    },
}
_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def tokenizer_file():
    """Random weights of a tokenizer, drawn by numpy so that nothing is compiled for them."""
    model, image = VQModel(VQConfig(**TOKENIZER)), jnp.zeros((1, SIDE, SIDE, 3))
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0), image)["params"])
    return _random_file("tokenizer", shapes)


@functools.cache
def policy_file(side=SIDE):
    """Random weights of a generator for images of this side."""
    policy = make_tiny_method("base", make_mesh(1, 1, jax.devices()[:1]), image_size=side).policy
    return _random_file(f"policy_{side}", flatten(jax.eval_shape(policy.init, jax.random.key(0))))


def _random_file(name, shapes):
    rng = np.random.default_rng(7)

    def draw(name, shape):
        if name.endswith("/scale"):
            return np.ones(shape, np.float32)
        fan_in = 1 if name.startswith("codebook/") else max(1, math.prod(shape[:-1]))
        return (rng.normal(size=shape) * fan_in**-0.5).astype(np.float32)

    path = Path(_FOLDER.name) / f"{name}.safetensors"
    save_safetensors(path, unflatten({name: draw(name, s.shape) for name, s in shapes.items()}))
    return str(path)


def make_tiny_recipe(method, image_size=SIDE, **changes):
    """The smallest run of a method: 16 codes, a grid of half the image's side, two layers; a dict."""
    config = {
        "name": f"tiny_{method}",
        "method": method,
        "steps": 2,
        "batch_size": BATCH,
        "data": {"image_size": image_size, "num_threads": 0},
        "tokenizer": TOKENIZER,
        "policy": {
            "kind": "class", "dim": 32, "n_layer": 2, "n_head": 4, "multiple_of": 16,
            "num_classes": 12,
        },
        "rewards": ("mse",),  # no second network to compile
        "init": {"vq": "" if method == "tokenizer" else tokenizer_file()},
        # An eps this large keeps Adam's division from blowing rounding errors up to the size of lr.
        "optimizer": {"learning_rate": 1e-2, "eps": 1e-2},
        "eval": {"every": 1, "images": 8},
    } | SECTIONS.get(method, {})  # fmt: skip
    for name, change in changes.items():
        config[name] = {**config.get(name, {}), **change} if isinstance(change, dict) else change
    return config


def make_tiny_config(method, image_size=SIDE, **changes):
    """The same, resolved."""
    return resolve(make_tiny_recipe(method, image_size, **changes))


def make_tiny_method(method, mesh, **changes):
    return make_method(make_tiny_config(method, **changes), mesh)


def with_random_head(params, seed):
    """The same parameters with an output layer that is not zero: an untrained head is uniform."""
    shape = params["output"]["kernel"].shape
    kernel = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return {**params, "output": {"kernel": kernel}}


@dataclasses.dataclass
class Done:
    """Two steps of one case: their metrics and the parameters after them."""

    metrics: list
    params: dict
    donated: bool
    extra: dict


@dataclasses.dataclass
class Machine:
    """A compiled step on one mesh, which can be run from the start any number of times."""

    data: int
    fsdp: int
    changes: dict
    method: str = "vapi"

    def __post_init__(self):
        devices = jax.devices()[: self.data * self.fsdp]
        self.mesh = make_mesh(self.data, self.fsdp, devices)
        self.task = make_tiny_method(self.method, self.mesh, **self.changes)
        self.optimizer = train.make_optimizer(self.task.config.optimizer, 2)
        self.made = {}
        self.made[0], self.shardings = train.init_state(self.task, self.optimizer, 0)
        self.frozen = train.load_frozen(self.task)
        if self.task.keeps_start:
            self.frozen["base"] = self.state().params
        self.step = train.make_train_step(self.task, self.optimizer, self.shardings)
        rng, side = np.random.default_rng(0), self.task.config.data.image_size
        batch = {
            "image": rng.uniform(-1, 1, (BATCH, side, side, 3)).astype(np.float32),
            "condition": rng.integers(0, 12, BATCH).astype(np.int32),
        }
        self.batch = shard_batch(self.task.prepare(batch), self.mesh)

    def state(self, seed=0, step=0):
        if seed not in self.made:
            self.made[seed], _ = train.init_state(self.task, self.optimizer, seed)
        # A step donates its state, so each run has a copy of what was compiled and drawn once.
        state = jax.device_put(self.made[seed], self.shardings, may_alias=False)
        host = jax.device_get(state.params)
        host = flatten(with_random_head(host, 3) if "output" in host else host)
        params = put_sharded(host, state.params, self.shardings.params)
        at = jax.device_put(np.int32(step), self.shardings.step)
        return dataclasses.replace(state, params=params, step=at)

    def run(self, seed=0):
        state, metrics, donated = self.state(seed), [], True
        for _ in range(2):
            before = jax.tree.leaves((state.params, state.opt_state))
            state, found = self.step(state, self.frozen, self.batch)
            donated &= all(leaf.is_deleted() for leaf in before)
            metrics.append({name: float(value) for name, value in found.items()})
        extra = flatten(jax.device_get(state.extra))
        return Done(metrics, flatten(jax.device_get(state.params)), donated, extra)
