"""What a training step will need of a device's memory, told from shapes: nothing is allocated.

Counted: the state in its layout; gradients; what differentiation keeps of one microbatch's forward pass
(by tracing it); the output layer's blocks of logits; and the decoding of one chunk of samples. Left out:
what is recomputed inside a layer, communication buffers, and the compiler's own room. An estimate, to
be compared with a device's size and not with its last megabyte.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vapi_jax.methods import Task
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import GeneratorTask, VAPiTask
from vapi_jax.models import head
from vapi_jax.models.conversion import model_shapes
from vapi_jax.models.discriminator import PatchGAN
from vapi_jax.models.lpips import lpips_shapes
from vapi_jax.parallel.sharding import tree_shardings
from vapi_jax.training import train

_VGG_WIDTH = 64  # of the perceptual network's first layers, at full size
_MAPS = 4  # full-size maps alive at once while an image is decoded or judged (measured)
_LOGITS = 3  # arrays of a block's size in its backward pass


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes of a device's memory, and what they hold."""

    name: str
    bytes: int
    what: str


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or ShapeDtypeStructs."""
    return sum(_leaf_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return 8 * math.prod(shape)
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that each device holds of a tree in this layout."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(_leaf_bytes(layout.shard_shape(x.shape), x.dtype) for x, layout in pairs)


def frozen_shapes(config: TrainConfig) -> dict[str, Any]:
    """Shapes of the frozen networks that a task loads, by role."""
    shapes = {}
    if config.task != "tokenizer":
        shapes["tokenizer"] = model_shapes(config.tokenizer)
    if config.task == "tokenizer" or (config.task == "vapi" and config.reward.lpips != 0.0):
        shapes["perceptual"] = lpips_shapes(config.perceptual_net)
    if config.task == "vapi" and config.reward.gan != 0.0:
        training, side = config.tokenizer_training, config.data.image_size
        model = PatchGAN(ndf=training.discriminator_ndf, n_layers=training.discriminator_layers)
        init = partial(model.init, train=False)
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        shapes["discriminator"] = jax.eval_shape(init, jax.random.key(0), image)
    return shapes


def estimate(task: Task, state: train.TrainState, frozen: Mapping[str, Any]) -> list[Part]:
    """The parts of a device's memory in a training step.

    Args:
      task: on its mesh.
      state: its shapes, from `train.abstract_state`.
      frozen: shapes of its frozen networks.
    """
    config, mesh = task.config, task.mesh
    layout = train.state_shardings(state, mesh)
    rows = max((config.microbatch_size or config.batch_size) // mesh.size, 1)
    parts = [
        Part("parameters", bytes_per_device(state.params, layout.params), "this device's share"),
        Part("optimizer", bytes_per_device(state.opt_state, layout.opt_state), "AdamW's moments"),
        Part(
            "frozen networks",
            bytes_per_device(dict(frozen), tree_shardings(dict(frozen), mesh)),
            ", ".join(frozen) or "none",
        ),
    ]
    if isinstance(task, VAPiTask) and config.vapi.needs_base:
        base = bytes_per_device(state.params, layout.params)
        parts.append(Part("base generator", base, "frozen, for the KL term"))
    parts.append(_gradients(task, state, layout))
    kept = _kept_for_backward(task, state, frozen, rows)
    parts.append(Part("activations", kept, f"kept of {rows} image(s) for the backward pass"))
    if isinstance(task, GeneratorTask):
        parts += _generator_parts(task, rows)
    return parts


def _gradients(task: Task, state: train.TrainState, layout: Any) -> Part:
    """What `vapi_jax.training.train` holds of them at once.

    Per device: a whole float32 sum over microbatches, and one microbatch's in the compute dtype.
    """
    if not task.independent_images:
        shares = bytes_per_device(state.params, layout.params)
        split = task.config.microbatch_size not in (0, task.config.batch_size)
        return Part("gradients", shares * (2 if split else 1), "in the parameters' layout")
    whole = tree_bytes(state.params)
    narrow = whole // 4 * jnp.dtype(task.compute_dtype).itemsize
    return Part("gradients", whole + narrow, "a whole sum, and one microbatch's")


def _kept_for_backward(
    task: Task, state: train.TrainState, frozen: Mapping[str, Any], rows: int
) -> int:
    """Bytes of the residuals of one device's microbatch, parameters not counted again."""
    side = task.config.data.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32),
        "condition": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "index": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    alone = dataclasses.replace(task, local=True)
    weights = dict(frozen)
    if isinstance(task, VAPiTask) and task.config.vapi.needs_base:
        weights["base"] = state.params

    def pullback(params: Any, extra: Any, weights: Any, batch: Any, rng: Any, step: Any) -> Any:
        def loss(params: Any) -> Any:
            return alone.loss(params, extra, weights, batch, rng, step)[0]

        return jax.vjp(loss, params)[1]

    residuals = jax.eval_shape(
        pullback, state.params, state.extra, weights, batch, state.rng, state.step
    )
    known = Counter((x.shape, x.dtype) for x in jax.tree.leaves((state.params, weights, batch)))
    total = 0
    for leaf in jax.tree.leaves(residuals):
        if known[leaf.shape, leaf.dtype] > 0:
            known[leaf.shape, leaf.dtype] -= 1
        else:
            total += tree_bytes(leaf)
    return total


def _generator_parts(task: GeneratorTask, rows: int) -> list[Part]:
    config, policy = task.config, task.policy
    vocab, length = policy.vocab_size, policy.num_tokens
    if config.task != "vapi":
        block = rows * length * vocab
        return [Part("logits", 4 * _LOGITS * block, "float32, of all tokens")]
    positions = length
    if config.vapi.fused:
        positions = head.block_length(rows, length, vocab)
        block = rows * positions * vocab
    else:
        block = rows * config.vapi.group_size * length * vocab
    logits = Part("logits", 4 * _LOGITS * block, f"float32, of {positions} position(s) at a time")
    chunk = min(config.decode_chunk or rows, rows)
    images = chunk * config.vapi.group_size
    sizes = config.tokenizer
    # The first layer after the last doubling still has the width of the level below.
    width = sizes.ch * max(sizes.decoder_ch_mult[:2])
    if config.reward.lpips != 0.0:
        width = max(width, _VGG_WIDTH)
    pixels = _MAPS * 4 * images * config.data.image_size**2 * width
    return [logits, Part("decoding", pixels, f"{images} sample(s) at a time, and their reward")]
