"""What a checkpoint turns into when it is to be sampled: a policy, a tokenizer, and who they are.

A checkpoint is named as people name it: "demo" or "scenes" for weights that ship with the package, the
directory of a finished run, or a directory of converted weights. Facts about it (architecture,
SHA-256 of the files) come along, so that whoever uses its images can say where they are from.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vapi_jax.common.digests import digest_of
from vapi_jax.common.files import read_json
from vapi_jax.common.options import Dtype
from vapi_jax.data import DataConfig, class_names
from vapi_jax.generation.generator import Generator
from vapi_jax.generation.shipped import MODELS
from vapi_jax.methods.config import ConfigError, TrainConfig
from vapi_jax.methods.generator import make_condition, sized_policy
from vapi_jax.methods.method import tokenizer_source
from vapi_jax.methods.resolve import resolve
from vapi_jax.models import vq
from vapi_jax.models.architecture import policy_kind
from vapi_jax.models.classes import ClassesError, read_class_list
from vapi_jax.models.conditions import Caption, Condition, Prompt
from vapi_jax.models.loading import (
    ADAPTERS,
    MANIFEST,
    PARTS,
    ClassTable,
    WeightsSource,
    class_list,
    load_weights,
    locate,
    read_manifest,
)
from vapi_jax.models.lora import merged, split, union
from vapi_jax.models.pixels import PixelSpace
from vapi_jax.models.policies import make_policy, on_devices, without_adapters
from vapi_jax.models.policy import Policy
from vapi_jax.models.text_tokens import FAST
from vapi_jax.models.vq import VQConfig, VQModel
from vapi_jax.parallel.sharding import tree_shardings
from vapi_jax.weights.names import WeightsError
from vapi_jax.weights.store import load_metadata, resolve_shipped
from vapi_jax.weights.tensors import open_tensors

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"


def load_generator(ckpt: str, mesh: Mesh, *, dtype: Dtype = "float32") -> Generator:
    """The generator that a checkpoint holds.

    Args:
      ckpt: of `MODELS`, or a directory of one of the kinds in `DIRECTORIES`.
      mesh: devices for the weights and all that is computed with them.
      dtype: what policy and decoder compute in, "float32" or "bfloat16", whatever the checkpoint was
        trained in: images of two checkpoints are compared in one precision.

    Raises:
      WeightsError: if there is no such checkpoint, with what was looked for; if it is unfinished or
        damaged; or if its parts do not fit.
    """
    if ckpt in MODELS:
        if any((Path(ckpt) / marker).is_file() for marker in DIRECTORIES):
            logger.warning(
                "%r are the weights that ship with the package; ./%s is a folder", ckpt, ckpt
            )
        return _assemble(_shipped(ckpt), mesh, dtype)
    path = Path(ckpt).expanduser()
    for marker, (_, reader) in DIRECTORIES.items():
        if (path / marker).is_file():
            return _assemble(reader(path), mesh, dtype)
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            raise WeightsError(
                f"{path} holds a run that has not finished: it has checkpoints and no {SUMMARY}. Go on with "
                "it by the command that began it"
            )
        looked = "; ".join(f"{marker} of {what}" for marker, (what, _) in DIRECTORIES.items())
        raise WeightsError(f"{path} holds no generator. Looked there for: {looked}")
    what = "is a file, not a directory" if path.exists() else "does not exist"
    kinds = ", ".join(what for what, _ in DIRECTORIES.values())
    raise WeightsError(
        f"checkpoint {ckpt!r} {what}. Give {' or '.join(map(repr, MODELS))} for weights that ship with "
        f"the package, or the directory of: {kinds}"
    )


@dataclasses.dataclass(frozen=True)
class _Found:
    """A checkpoint before its weights are read."""

    policy: Policy
    tokenizer: VQConfig
    weights: WeightsSource  # of the policy
    tokenizer_weights: WeightsSource
    image_size: int
    class_names: tuple[str, ...] | None
    facts: dict[str, Any]
    condition: Condition
    adapters: Path | None = None  # that go into the policy's weights
    noted: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _assemble(found: _Found, mesh: Mesh, dtype: Dtype) -> Generator:
    """Reads the weights, each device its own slices."""
    policy, side = on_devices(found.policy, mesh, dtype), found.image_size
    tokenizer = dataclasses.replace(found.tokenizer, decoder_dtype=dtype)
    grid = side // tokenizer.downsample_factor
    if (policy.num_tokens, policy.vocab_size) != (grid * grid, tokenizer.codebook_size):
        raise WeightsError(
            f"generator and tokenizer do not fit: {policy.num_tokens} tokens of {policy.vocab_size} "
            f"codes, and a {grid}x{grid} grid of {tokenizer.codebook_size} codes"
        )
    pixels = PixelSpace(tokenizer=VQModel(tokenizer), mesh=mesh)
    shapes, adapters = split(jax.eval_shape(policy.init, jax.random.key(0)))
    image = jnp.zeros((1, side, side, 3))
    frozen = jax.eval_shape(
        lambda: {"tokenizer": pixels.tokenizer.init(jax.random.key(0), image)["params"]}
    )
    layout = tree_shardings(frozen, mesh)["tokenizer"]
    own = tree_shardings(shapes, mesh)
    params, digests = load_weights(found.weights, shapes, own), {}
    if policy.lora is not None and found.adapters is not None:
        source = dataclasses.replace(found.weights, path=str(found.adapters))
        added = load_weights(source, adapters, tree_shardings(adapters, mesh))
        lora = policy.lora
        merge = jax.jit(lambda base, added: merged(union(base, added), lora), out_shardings=own)
        params, digests = merge(params, added), {ADAPTERS: _digests(source)}
        policy = without_adapters(policy)
    return Generator(
        policy=policy,
        params=params,
        mesh=mesh,
        pixels=pixels,
        frozen={"tokenizer": load_weights(found.tokenizer_weights, frozen["tokenizer"], layout)},
        image_size=side,
        class_names=found.class_names,
        condition=found.condition,
        noted=found.noted,
        facts={
            **found.facts,
            "policy": _named(policy),
            "tokenizer": dataclasses.asdict(tokenizer),
            "image_size": side,
            "sha256": {
                PARTS[source.part]: _digests(source)
                for source in (found.weights, found.tokenizer_weights)
            }
            | digests,
        },
    )


def _policy_source(path: str, policy: Policy) -> WeightsSource:
    config = getattr(policy, "config", None)
    table = ClassTable(policy.class_table, int(policy.condition.droppable))
    names = policy.name_rules, policy.ignored_names
    return WeightsSource(path, "gpt", *names, config, classes=table if table.path else None)


def _shipped(name: str) -> _Found:
    """A generator that ships with the package."""
    model = MODELS[name]
    policy = make_policy(**model.policy)
    condition = policy.condition
    if isinstance(condition, Caption):
        condition = dataclasses.replace(condition, encoder=name, dtype="float32", clean=False)
    trained = load_metadata(resolve_shipped("policy", name))
    return _Found(
        policy=policy,
        tokenizer=model.tokenizer,
        weights=_policy_source(name, policy),
        tokenizer_weights=WeightsSource(
            name, "vq", vq.NAME_RULES, vq.IGNORED_NAMES, model.tokenizer
        ),
        image_size=model.image_size,
        class_names=_class_names(DataConfig(), policy),
        facts={"kind": name, "path": name, "trained": trained},
        condition=condition,
    )


def _trained(directory: Path) -> _Found:
    """What a run of `vapi_jax.main` has trained."""
    summary = _read_summary(directory / SUMMARY)
    folder, adapters = directory / "weights", None
    weights = folder / "policy.safetensors"
    if (folder / f"{ADAPTERS}.safetensors").is_file():
        weights = adapters = folder / f"{ADAPTERS}.safetensors"
    config, decoder = _run_config(directory, summary), folder / "tokenizer.safetensors"
    # A run that trained a decoder for a generator, which it names.
    for_another = decoder.is_file() and bool(config.init.gpt) and not weights.is_file()
    if for_another:
        weights = decoder
    if not weights.is_file():
        raise WeightsError(
            f"{directory} has a {SUMMARY} but no {weights.relative_to(directory)}: it trained no "
            "generator"
        )
    policy = make_policy(**sized_policy(config)).for_sampling()
    found, noted = digest_of(weights), summary.get("weights", {}).get(weights.name)
    if noted is not None and found != noted:
        raise WeightsError(
            f"{weights} is not the file that the run wrote: its SHA-256 is {found}, {SUMMARY} says "
            f"{noted}"
        )
    tokenizer = tokenizer_source(config)
    if tokenizer is None:
        raise WeightsError(f"{directory / SUMMARY} names no weights of a tokenizer in init.vq")
    if tokenizer.path not in MODELS and not (place := Path(tokenizer.path)).exists():
        raise WeightsError(
            f"{directory / SUMMARY} names the tokenizer init.vq={tokenizer.path!r}, and there is nothing at "
            f"{place.absolute()}; the run was started in {summary.get('directory', 'another folder')}"
        )
    source = _policy_source(str(weights), policy)
    if for_another:
        tokenizer = dataclasses.replace(tokenizer, path=str(decoder))
    if adapters is not None or for_another:
        source = _policy_source(config.init.gpt, policy)
        if source.path not in MODELS and not (place := Path(source.path)).exists():
            raise WeightsError(
                f"{directory / SUMMARY} builds on init.gpt={source.path!r}, and there is nothing at "
                f"{place.absolute()}"
            )
    told = summary["config"]
    trained = {name: told.get(name) for name in ("name", "method", "preset", "steps", "seed")}
    return _Found(
        policy=policy,
        tokenizer=config.tokenizer,
        weights=source,
        tokenizer_weights=tokenizer,
        adapters=adapters,
        image_size=config.data.image_size,
        class_names=_listed_names(str(directory), policy) or _class_names(config.data, policy),
        facts={
            "kind": "run",
            "path": str(directory),
            "trained": {**trained, "versions": summary.get("versions", {})},
        },
        condition=make_condition(config, policy),
        noted=noted if isinstance(noted := summary.get("condition"), dict) else {},
    )


def _converted(directory: Path) -> _Found:
    """Released weights that vapi_jax.convert has converted, generator and tokenizer."""
    config, manifest = read_manifest(directory)
    place = str(
        directory.absolute()
    )  # that of a folder called "demo" is no name of shipped weights
    if missing := [part for part in PARTS if part not in config]:
        raise WeightsError(
            f"{directory} holds no {' and no '.join(missing)}: to draw images, convert generator and "
            "tokenizer into one directory, with --gpt and --vq"
        )
    options = {part: {k: v for k, v in config[part].items() if k != "name"} for part in PARTS}
    try:
        tokenizer = VQConfig(**options["vq"])
        policy = make_policy(policy_kind(options["gpt"]), **options["gpt"])
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{directory} has a config.json that does not work: {error}") from error
    condition = policy.condition
    if isinstance(condition, Prompt) and (directory / FAST).is_file():
        condition = dataclasses.replace(condition, tokenizer=place)
    names = vq.NAME_RULES, vq.IGNORED_NAMES
    return _Found(
        policy=policy,
        tokenizer=tokenizer,
        weights=_policy_source(place, policy),
        tokenizer_weights=WeightsSource(place, "vq", *names, tokenizer),
        image_size=math.isqrt(policy.num_tokens) * tokenizer.downsample_factor,
        class_names=_listed_names(str(directory), policy),
        facts={
            "kind": "converted",
            "path": str(directory),
            "trained": {
                "names": {part: config[part].get("name", "") for part in PARTS},
                "sources": manifest.get("sources", []),
            },
        },
        condition=condition,
    )


DIRECTORIES: dict[str, tuple[str, Callable[[Path], _Found]]] = {
    SUMMARY: ("a finished run of vapi_jax.main", _trained),
    MANIFEST: ("weights converted by vapi_jax.convert", _converted),
}
"""The file by which a kind of checkpoint directory is known -> (what it is, its reader)."""


def _read_summary(path: Path) -> dict[str, Any]:
    summary = read_json(path, WeightsError)
    if not isinstance(summary.get("config"), dict):
        raise WeightsError(f"{path} holds no configuration of a run")
    return summary


def _run_config(directory: Path, summary: Mapping[str, Any]) -> TrainConfig:
    """What sampling needs of a run's configuration: generator, tokenizer and data.

    How it was trained is left out, and with it every name of code that only training needs. Other code of
    the user's own has to be imported already: a file does not decide what is run.
    """
    told = summary["config"]
    kept = ("name", "policy", "condition", "tokenizer", "data", "init")
    raw = {**{name: told[name] for name in kept if name in told}, "method": "base"}
    for section, option in (("init", "gpt"), ("init", "vq"), ("data", "path")):
        value = raw[section].get(option) if isinstance(raw.get(section), dict) else None
        if value and value not in MODELS:
            place = Path(str(summary.get("directory", "")), str(value))
            if place.exists():  # else it may be in the same place here
                raw[section] = {**raw[section], option: str(place)}
    options = raw["condition"].get("options") if isinstance(raw.get("condition"), dict) else None
    asked = options if isinstance(options, dict) else {}
    for option in ("tokenizer", "encoder"):
        value = asked.get(option)
        if isinstance(value, str) and value and value not in MODELS:
            place = Path(str(summary.get("directory", "")), value)
            if place.exists():
                asked = {**asked, option: str(place)}
                raw["condition"] = {**raw["condition"], "options": asked}
    named = (
        (raw.get("policy") or {}).get("kind"),
        *((raw.get(part) or {}).get("name") for part in ("condition", "data")),
    )
    for name in filter(None, named):
        module, colon, _ = str(name).partition(":")
        if colon and module not in sys.modules:
            raise WeightsError(
                f"{directory / SUMMARY} names {name!r}, code that this program has not loaded, and a "
                f"file is not trusted to: import {module} first, from Python"
            )
    try:
        return resolve(raw)
    except ConfigError as error:
        raise WeightsError(f"{directory / SUMMARY} is of another version: {error}") from error


def _named(policy: Policy) -> dict[str, Any]:
    """A policy's kind and hyper-parameters, compute dtype included."""
    config: Any = getattr(policy, "config", None)
    kind = type(policy).__name__.removesuffix("Policy").lower()
    return {"kind": kind, **dataclasses.asdict(config), "dtype": policy.compute_dtype}


def _digests(source: WeightsSource) -> dict[str, str]:
    """SHA-256 of the files that a source means, by name."""
    if source.path not in MODELS and (Path(source.path) / MANIFEST).is_file():
        outputs = read_manifest(Path(source.path))[1]["outputs"]  # compared when they were read
        return {name: facts["sha256"] for name, facts in sorted(outputs.items())}
    with open_tensors(locate(source)[0]) as file:
        return {part.name: digest_of(part) for part in file.paths}


def _listed_names(path: str, policy: Policy) -> tuple[str, ...] | None:
    """Names from the list that a run or a conversion has of its generator's classes."""
    which = class_list(_policy_source(path, policy))
    try:
        names = read_class_list(which).names if which else ()
    except ClassesError as error:
        logger.warning("%s", error)
        return None
    return names if len(names) == policy.condition.num_classes else None


def _class_names(config: DataConfig, policy: Policy) -> tuple[str, ...] | None:
    """Names from the data that the generator was trained on, where it can still be found."""
    if policy.condition.num_classes is None:
        return None
    try:
        names = class_names(config)
    except (OSError, ImportError, TypeError, ValueError) as error:
        logger.info("class names are unknown, so classes go by number: %s", error)
        return None
    return names if len(names) == policy.condition.num_classes else None
