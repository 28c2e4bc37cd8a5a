"""What a run needs of this machine, looked up before anything is allocated or written.

Devices that fit the mesh and the batch, data that is there, weights that exist and fit, a workdir that is
free. Before a run nothing large is read: of weights the headers, of data the list of its images. Where a
thorough look is asked for (`--check`), weights are read whole, as the run will, and a few images.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vapi_jax.common import locks
from vapi_jax.common.errors import ExpectedError
from vapi_jax.common.files import read_json
from vapi_jax.common.options import Errors
from vapi_jax.common.trees import unflatten
from vapi_jax.data import DataError, classes_of
from vapi_jax.data.images import UnreadableImage
from vapi_jax.data.pipeline import encoder_of, fixed_samples, make_source
from vapi_jax.data.sources import Source
from vapi_jax.generation.shipped import MODELS
from vapi_jax.methods import Method, make_method
from vapi_jax.methods.classes import where, with_classes
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import GeneratorMethod
from vapi_jax.methods.method import Network
from vapi_jax.methods.resolve import device_errors, examine, raise_all
from vapi_jax.models.architecture import disagreements
from vapi_jax.models.attention import attention_implementation
from vapi_jax.models.efficientnet import JudgeWeightsError, load_efficientnet
from vapi_jax.models.loading import (
    CONFIG,
    MANIFEST,
    PARTS,
    WeightsSource,
    as_stored,
    open_weights,
    read_manifest,
    read_through,
)
from vapi_jax.models.lpips import PerceptualWeightsError, load_lpips_params
from vapi_jax.parallel.sharding import make_mesh
from vapi_jax.parallel.targets import memory_of
from vapi_jax.training import memory, resume, train
from vapi_jax.training.checkpoint import Checkpointer
from vapi_jax.weights.names import WeightsError, check_like
from vapi_jax.weights.store import SHIPPED, resolve_shipped

logger = logging.getLogger(__name__)

LOOKED_AT = 32
"""Images that a thorough look decodes, spread evenly over the split."""

_CONVERT = "name 'demo' or 'scenes', a released file, a directory of vapi_jax.convert or the workdir of a run"
_REPORTED = 24  # real images in the report, from the held-out split


def require(raw: Any) -> TrainConfig:
    """The typed configuration of a recipe that can run here.

    Raises:
      ConfigError: listing all that is wrong with its values, and all that is missing here.
    """
    config, errors, notes = look(raw)
    raise_all(errors)
    for note in notes:
        logger.warning("%s", note)
    return config


def look(raw: Any) -> tuple[TrainConfig, Errors, list[str]]:
    """What `require` gives or refuses, and what is worth knowing besides."""
    config, errors = examine(raw)
    mesh = open_mesh(config, errors)
    settled = with_classes(config, errors)
    data = look_at_data(settled, errors)
    look_at_weights(settled, mesh, errors)
    notes = [*data.notes, *notes_on_weights(settled)]
    return config, errors, [*notes, *look_at_memory(settled, mesh, errors)]


# --- devices --------------------------------------------------------------------------------------


def open_mesh(config: TrainConfig, errors: Errors) -> Mesh | None:
    """The mesh, with virtual devices where the platform is CPU; before any other use of JAX.

    Adds what does not fit. None where the mesh itself does not fit the devices.
    """
    if errors.concern("mesh", "cpu_devices"):
        return None
    if config.cpu_devices not in (1, jax.config.values["jax_num_cpu_devices"]):
        try:
            jax.config.update("jax_num_cpu_devices", config.cpu_devices)
        except RuntimeError:  # the backend is up already: a test, a notebook
            logger.info("devices are fixed already: %d", jax.device_count())
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    except ValueError as error:
        errors.append(f"mesh: {error}")
        mesh = None
    if not errors.concern("batch_size", "microbatch_size", "eval.images"):
        errors += device_errors(config, jax.device_count())
    sizes = {"dtype": "float32", "dim": 1, "n_head": 1, **config.policy}
    if mesh is not None and sizes.get("attention") == "cudnn" and not errors.concern("policy"):
        width, device = sizes["dim"] // sizes["n_head"], mesh.devices.flat[0]
        try:
            attention_implementation("cudnn", sizes["dtype"], width, device)
        except ValueError as error:
            errors.append(f"policy.attention='cudnn': {error}; choose 'auto'")
    return mesh


def look_at_memory(config: TrainConfig, mesh: Mesh | None, errors: Errors) -> list[str]:
    """Refuses a step that cannot fit a device whose memory is known; a note where it may not.

    The estimate leaves compilers' savings out, which halve it at most where layers keep what they compute.
    """
    if mesh is None or errors or (room := memory_of(mesh.devices.flat[0])) is None:
        return []
    method = make_method(config, mesh)
    optimizer = train.make_optimizer(config.optimizer, config.steps)
    state = train.abstract_state(method, optimizer, config.seed)
    parts = memory.estimate(method, state, method.frozen_shapes())
    wanted = sum(part.bytes for part in parts)
    if wanted <= room:
        return []
    most = max(parts, key=lambda part: part.bytes)
    text = (
        f"a step wants about {wanted / 1e9:.0f} GB of a device that has {room / 1e9:.0f}, {most.name} "
        f"{most.bytes / 1e9:.0f} of them"
    )
    if wanted <= 2 * room:
        return [f"{text}, by an estimate that errs upwards; --check --target=... compiles it"]
    errors.append(
        f"microbatch_size: {text}: take smaller ones, policy.remat='full', or more devices"
    )
    return []


# --- data -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class DataFound:
    """What there is to train on.

    Attributes:
      classes: how many; None where the data cannot be opened.
      images: split -> how many, of the splits that a run reads.
      notes: what is worth knowing and no error.
      labels: of each class.
    """

    classes: int | None = None
    images: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)


def look_at_data(config: TrainConfig, errors: Errors, images: int = 0) -> DataFound:
    """Opens the splits that a run reads and adds what is wrong with them.

    Args:
      config: the run, its classes settled.
      errors: taken into account, and added to.
      images: how many of each split to decode, to see whether they can be.
    """
    found = DataFound()
    if errors.concern("data"):
        return found
    opened: dict[str, Source] = {}
    for split in dict.fromkeys(["train", str(config.eval.split)]):
        try:
            opened[split] = make_source(config.data, split)
            if found.classes is None:
                classes = classes_of(config.data)
                found.classes, found.labels = len(classes.own), classes.by_name
        except DataError as error:
            line = f"{where(config)}: {error}"
            if line not in errors:  # a root that is missing is missing for all splits
                errors.append(line)
    found.images = {split: len(source) for split, source in opened.items()}
    for source in opened.values():
        note = f"{where(config)}: left out: {source.left_out}"
        if source.left_out and note not in found.notes:
            found.notes.append(note)
        found.notes += [line for line in source.notes if line not in found.notes]
    for split, source in opened.items():
        _try_images(config, split, source, images, found, errors)
    _check_counts(config, found, errors)
    return found


def _try_images(
    config: TrainConfig,
    split: str,
    source: Source,
    count: int,
    found: DataFound,
    errors: Errors,
) -> None:
    tried = np.unique(np.linspace(0, len(source) - 1, min(count, len(source)), dtype=int))
    broken = []
    for index in tried:
        try:
            source.sample(int(index), np.random.default_rng(0))
        except UnreadableImage as error:
            broken.append(f"{source.name(int(index))} ({error})")
        except DataError as error:
            errors.append(f"{where(config)}: {error}")
            return
    if not broken:
        return
    line = f"{len(broken)} of {len(tried)} {split} images tried cannot be read: {broken[0]}"
    if len(broken) > 1 and len(broken) > config.data.max_unreadable * len(tried):
        errors.append(f"data.max_unreadable={config.data.max_unreadable}: {line}")
    else:
        found.notes.append(line)


def _check_counts(config: TrainConfig, found: DataFound, errors: Errors) -> None:
    judged = config.eval
    wanted = [(judged.split, "eval.images", judged.images)]
    if judged.compare:
        wanted.append(("train", "eval.samples", judged.samples))
    if judged.sampled_every:
        wanted.append(("train", "eval.sampled", judged.sampled))
    for split, name, count in wanted:
        there = found.images.get(split)
        if there is not None and there < max(count, _REPORTED):
            errors.append(
                f"{name}={count}: split {split!r} has {there} images, and at least "
                f"{max(count, _REPORTED)} are looked at"
            )


def look_at_conditions(config: TrainConfig, mesh: Mesh | None, errors: Errors) -> None:
    """Adds why what the data say of an image is not what the generator takes; tried with one image."""
    if errors or mesh is None:
        return
    try:
        sample = next(iter(fixed_samples(config.data, config.eval.split, 1, config.seed)))
        if "condition" in sample:
            raw = np.stack([sample["condition"]])
            make_method(config, mesh).prepare({"condition": raw})
    except ExpectedError as error:
        errors.append(f"condition: {error}")


# --- weights --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WeightsFound:
    """Where a network's weights come from.

    Attributes:
      origin: as in the configuration, or "from scratch".
      state: whether they are there and what vouches for them.
    """

    origin: str
    state: str


SCRATCH = WeightsFound("from scratch", "")


def look_at_weights(
    config: TrainConfig, mesh: Mesh | None, errors: Errors, *, thorough: bool = False
) -> dict[str, WeightsFound]:
    """Finds the weights that a run starts from, by network, and adds what is wrong with them.

    Headers and sizes are compared with the model; contents are read and compared with their digests when
    they are loaded, or here where the look is `thorough`.
    """
    if errors:  # what is derived from options that are wrong would only mislead
        blocking = (
            "method",
            "policy",
            "tokenizer",
            "init",
            "rewards",
            "condition",
            "data.image_size",
        )
        if errors.concern(*blocking, config.section):
            return {}
    alone = make_mesh(1, 1, jax.devices()[:1])
    method = make_method(config, mesh or alone)
    found = {}
    for network in method.networks():
        if network.origin is not None:
            found[network.name] = _look_at_origin(network, errors, thorough)
        elif network.source is None and network.name not in _trained(method):
            errors.append(f"{network.option}='': the method needs these weights; {_CONVERT}")
        else:
            found[network.name] = _look(network, errors, thorough)
    if thorough and isinstance(method, GeneratorMethod) and not errors:
        try:
            if encoder_of(config.data) is not None:
                method.load_tokenizer()  # is it the one that made the tokens of the data?
        except WeightsError as error:
            errors.append(str(error).removeprefix("config."))
    if config.eval.compare:
        _look_at_bundled(config.eval.unseen, errors)
    return found


def notes_on_weights(config: TrainConfig) -> list[str]:
    """What is worth knowing of the weights that a run starts from, and no error."""
    where = config.init.gpt
    side = _side_of_model(where) if where else None
    if side in (None, config.data.image_size):
        return []
    return [
        f"init.gpt={where!r}: this generator was trained on images of {side} px, and "
        f"data.image_size={config.data.image_size}: it has never seen such a grid"
    ]


def _side_of_model(where: str) -> int | None:
    """Pixels of the images that a shipped model, or a run given by workdir or file, was trained on."""
    if where in MODELS:
        return MODELS[where].image_size
    path = Path(where)
    folder = path if path.is_dir() else path.parent.parent
    try:
        side = read_json(folder / CONFIG, WeightsError)["data"]["image_size"]
    except (WeightsError, KeyError, TypeError):
        return None
    return side if isinstance(side, int) else None


def _trained(method: Method) -> set[str]:
    """Names of the networks that a method can begin from scratch."""
    params = jax.eval_shape(method.init, jax.random.key(0))
    return set(method.weights_of(params, jax.eval_shape(method.init_extra, params)))


def _look_at_origin(network: Network, errors: Errors, thorough: bool) -> WeightsFound:
    assert network.origin is not None
    try:
        found = network.origin()
        if thorough and network.load is not None:
            network.load()
        return SCRATCH if found is None else WeightsFound(*found)
    except ExpectedError as error:
        errors.append(f"{network.option}: {error}")
        return WeightsFound("", "unfit")


def _look(network: Network, errors: Errors, thorough: bool) -> WeightsFound:
    source, option = network.source, network.option
    if source is None:
        return SCRATCH
    path = Path(source.path)
    try:
        if source.path in SHIPPED:
            resolve_shipped(PARTS[source.part], source.path)
            return WeightsFound(f"shipped {source.path}", "digest verified")
        if not path.exists():
            errors.append(
                f"{option}={source.path!r}: there is nothing at {path.absolute()}; {_CONVERT}"
            )
            return WeightsFound(source.path, "missing")
        target = network.shapes()
        converted = (path / MANIFEST).is_file()
        if converted:
            fresh = source.classes is not None and source.classes.fresh is not None
            _check_converted(path, as_stored(source, target)[0] if fresh else source)
        elif not thorough:
            with open_weights(source, target) as weights:
                check_like(unflatten(weights.leaves), target, f"the weights in {source.path}")
        if thorough:
            read_through(source, target)
        verified = converted and thorough and source.verify
        state = "digests verified" if verified else "digests known"
        return WeightsFound(source.path, state if converted else "no digest known")
    except WeightsError as error:
        errors.append(f"{option}={source.path!r}: {error}")
        return WeightsFound(source.path, "unfit")


def _check_converted(path: Path, source: WeightsSource) -> None:
    """What can be told of a converted directory without reading its weights."""
    config, manifest = read_manifest(path)
    if source.part not in config:
        raise WeightsError(f"it holds {', '.join(config)} and no {source.part}")
    if different := disagreements(config[source.part], source.config):
        raise WeightsError("; ".join(["it holds another model", *different]))
    for name, facts in manifest.get("outputs", {}).items():
        file = path / name
        if not file.is_file() or file.stat().st_size != facts.get("size"):
            raise WeightsError(f"{name} is missing or not of its size; convert the weights again")


def _look_at_bundled(unseen: str, errors: Errors) -> None:
    """The weights that the table's features are of."""
    try:
        load_lpips_params("vgg")
        load_efficientnet() if unseen.startswith("efficientnet") else load_lpips_params("alex")
    except (PerceptualWeightsError, JudgeWeightsError) as error:
        errors.append(f"eval.compare: {error}")


# --- workdir --------------------------------------------------------------------------------------


def look_at_workdir(
    config: TrainConfig,
    workdir: Path,
    errors: Errors,
    resume_with_changes: bool = False,
    mesh: Mesh | None = None,
) -> None:
    """Adds what keeps a run from beginning or going on in a workdir; writes nothing there.

    With a mesh, and no errors so far, the weights that the run does not train are loaded and compared with
    those that it began with.
    """
    there = next(part for part in (workdir, *workdir.absolute().parents) if part.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        errors.append(f"--workdir={workdir}: {there} cannot be written (permission denied)")
        return
    try:
        locks.look(workdir)
        if (workdir / "checkpoints").is_dir():
            with Checkpointer(workdir / "checkpoints") as saver:
                facts = resume.read_facts(saver, config, resume_with_changes)
            if facts is not None and mesh is not None and not errors:
                here = _origin(make_method(config, mesh))
                resume.check_origin(facts["origin"], here, resume_with_changes)
    except ExpectedError as error:
        errors.append(f"--workdir={workdir}: {error}")


def _origin(method: Method) -> dict[str, str | None]:
    """As `loop.fit` finds it."""
    config, start = method.config, None
    frozen = train.load_frozen(method)
    if config.eval.compare or method.keeps_start:
        optimizer = train.make_optimizer(config.optimizer, config.steps)
        start = train.init_state(method, optimizer, config.seed)[0].params
    return resume.origin_of(method, frozen, start)
