"""What a notebook calls: the commands' work as functions. `import vapi_jax as vj` offers each by its name.

    gen = vj.load("weights/c2i_xxl", dtype="bfloat16")       # or "demo", a run, a released file's directory
    images = gen.sample([207, 360], per_condition=8, cfg=1.75)   # uint8 [16, H, W, 3]
    run = vj.train(vj.recipe("c2i_xxl", **{"vapi.ce_weight": 0.2}), workdir="runs/a")
    vj.evaluate(run, reference="imagenet256.npz")            # the same receipt as the command's

No global state, and no flags inside. JAX is imported by the first call, not by the import.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vapi_jax.common.paths import local_path
from vapi_jax.common.recipes import change, read_recipe

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Array, UInt8
    from ml_collections import ConfigDict

    from vapi_jax.common.options import Dtype
    from vapi_jax.generation.generator import Generator
    from vapi_jax.methods.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
      workdir: everything that it made; report.html is the page to open.
      summary: what is in its summary.json.
    """

    workdir: Path
    summary: dict[str, Any]

    def __fspath__(self) -> str:
        return str(self.workdir)


def recipe(name: str | os.PathLike[str], **changes: Any) -> ConfigDict:
    """A recipe with some of its options changed.

    Args:
      name: of a file in configs/, or the path of one; a variant follows a colon ("c2i_demo:tiny").
      changes: option by its dotted path -> value, as **{"vapi.ce_weight": 0.2}.

    Returns:
      An `ml_collections.ConfigDict`, to look at, to change, and to give to `train`.

    Raises:
      RecipeError: there is no such recipe, it cannot be used, or a path of `changes` leads nowhere. Whether
        its options exist and have possible values is said by `train`, all at once.
    """
    return change(read_recipe(os.fspath(name)), changes)


def train(
    recipe: ConfigDict | TrainConfig,
    workdir: str | os.PathLike[str],
    *,
    resume_with_changes: bool = False,
) -> Trained:
    """Trains, evaluates and reports, as `python -m vapi_jax.main` does in one process.

    The same call goes on from what an earlier one has saved, wherever that one ended.

    Args:
      recipe: from `recipe`, or a resolved configuration.
      workdir: made if absent; no other live run may use it.
      resume_with_changes: go on also where the configuration is not that of the checkpoint.

    Raises:
      ConfigError: listing all that is wrong with the recipe's values, and all that is missing here.
      ExpectedError: of another kind, for whatever else a user can put right.
    """
    from vapi_jax.methods.config import TrainConfig
    from vapi_jax.training.preflight import require
    from vapi_jax.training.run import run

    place = local_path(os.fspath(workdir))
    config = recipe if isinstance(recipe, TrainConfig) else require(recipe)
    return Trained(place, run(config, place, resume_with_changes=resume_with_changes))


def load(checkpoint: str | os.PathLike[str] | Trained, *, dtype: Dtype = "float32") -> Generator:
    """A generator to sample from, to encode and to decode with, on all devices.

    Args:
      checkpoint: "demo" or "scenes" (shipped), a run (its directory or what `train` gave), or a converted
        directory. A folder of such a name is "./demo" or a Path.
      dtype: compute dtype of generator and decoder, "float32" or "bfloat16".

    Raises:
      WeightsError: there is no such checkpoint, or it is damaged, or its parts do not fit.
    """
    from vapi_jax.generation.loading import load_generator
    from vapi_jax.parallel.sharding import make_mesh

    place = checkpoint if isinstance(checkpoint, str) else os.path.abspath(checkpoint)
    return load_generator(place, make_mesh(), dtype=dtype)


def sample(
    generator: Generator | str | os.PathLike[str] | Trained,
    conditions: Sequence[Any] | None = None,
    **settings: Any,
) -> UInt8[np.ndarray, "N H W 3"]:
    """Images of a generator, or of a checkpoint that `load` takes; see `Generator.sample`."""
    from vapi_jax.generation.generator import Generator

    found = generator if isinstance(generator, Generator) else load(generator)
    return found.sample(conditions, **settings)


def evaluate(
    images: UInt8[np.ndarray, "N H W 3"] | str | os.PathLike[str] | Trained,
    reference: str | os.PathLike[str],
    *,
    count: int = 1024,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """The receipt of `python -m vapi_jax.evaluate`: metrics, digests, settings, versions.

    Args:
      images: an array; a folder or .npz of images; or what `train` gave, of which `count` samples with
        labels in turn are drawn.
      reference: images or statistics to judge them against.
      count: samples of a run.
      seed: of a run's samples, and of random subsets.
      settings: of `vapi_jax.evaluation.measure.Settings`, such as features="lpips_alex" or
        metrics=("fid", "kid"). Without FID's weights (`inception=FILE`) features are LPIPS's.

    Raises:
      ExpectedError: images or reference cannot be read, or nothing can be computed.
    """
    import numpy as np

    from vapi_jax.evaluation.measure import Settings, measure

    with tempfile.TemporaryDirectory() as folder:
        if isinstance(images, Trained):
            images = sample(images, count=count, seed=seed)
        if isinstance(images, np.ndarray):
            path = Path(folder) / "samples.npz"
            np.savez(path, arr_0=images)
            images = path
        given = {"seed": seed, **settings}
        if given.get("inception") is not None:
            given.setdefault("features", "inception")
        return measure(Settings(os.fspath(images), os.fspath(reference), **given))


def reward(
    rewards: str | Sequence[Any] = "mse, lpips",
) -> Callable[..., dict[str, Array]]:
    """A function that says what samples are worth, each reward by its name and "total" (Eq. 10).

    Args:
      rewards: as in a recipe: "mse, 0.5*lpips", or a list of names and of {name, weight, options}.

    Returns:
      (samples [B, G, H, W, 3], images [B, H, W, 3] or None, conditions=None) -> float32 [B, G] each; pixels
      are floats in [-1, 1], conditions B captions or labels, for rewards that read them.
      Rewards that look at tokens ("codebook_cosine") are not to be had here. What a reward on the host
      raises, a call raises.

    Raises:
      ConfigError: listing what is wrong with the rewards.
      ValueError: by a call, of pixels that are no floats or of another shape, or without what a reward reads.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vapi_jax.common.host_calls import raise_failure
    from vapi_jax.common.options import Errors
    from vapi_jax.methods.resolve import raise_all
    from vapi_jax.rewards import make_terms, parse, total

    errors = Errors()
    specs = parse(rewards, errors)
    raise_all(errors)
    terms = make_terms(specs)
    raise_all([
        f"rewards.{term.name}: looks at tokens, and here are none" for term in terms if term.reward.shares
    ])  # fmt: skip
    weights = {term.name: jax.device_put(term.reward.load()) for term in terms}

    @jax.jit
    def values(weights: Any, samples: Array, known: Any, prompts: Any) -> dict[str, Array]:
        found = {t.name: t(weights[t.name], samples, {**known, **prompts[t.name]}) for t in terms}
        return {**found, "total": total(found, terms)}

    def judge(samples: Any, images: Any, conditions: Any = None) -> dict[str, Array]:
        known = {} if images is None else {"image": images}
        for pixels, axes in ((samples, "[B, G, H, W, 3]"), (images, "[B, H, W, 3]")):
            if pixels is None:
                continue
            # Levels would give numbers, too, of no meaning.
            if not jnp.issubdtype(pixels.dtype, jnp.floating) or pixels.ndim != axes.count(",") + 1:
                raise ValueError(
                    f"pixels are {pixels.dtype} {pixels.shape}; wants floats {axes} in [-1, 1], such as "
                    "levels / 127.5 - 1"
                )
        prompts: dict[str, Any] = {term.name: {} for term in terms}
        if conditions is not None:
            raw = np.asarray(conditions)
            made = {term.name: term.reward.prepare(raw) for term in terms}
            prompts = {name: {} if x is None else {"prompt": x} for name, x in made.items()}
            if raw.dtype.kind in "iu":
                known["condition"] = raw.astype(np.int32)
        try:
            found = jax.block_until_ready(values(weights, samples, known, prompts))
        except KeyError as error:
            raise ValueError(f"a reward asks for {error}, which this call was not given") from error
        raise_failure()
        return found

    return judge


# --- names that are commands, too -----------------------------------------------------------------


class _Door(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return globals()[self.__name__.rpartition(".")[2]](*args, **kwargs)


def callable_door(name: str) -> None:
    """Lets a command's module be called as the function of its name here.

    `vapi_jax.sample` is both `python -m vapi_jax.sample` and `vj.sample(...)`, whichever was imported first.
    """
    if name in sys.modules and name != "__main__":
        sys.modules[name].__class__ = _Door
