"""From a recipe's ConfigDict to the typed configuration, or a line for everything that is wrong with it."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vapi_jax.common.paths import PathError, local_text
from vapi_jax.methods.config import ConfigError, TrainConfig
from vapi_jax.methods.config_checks import TASKS, Errors, broken_limit, check_together
from vapi_jax.methods.vapi import PRESETS
from vapi_jax.models.janus import JanusConfig
from vapi_jax.models.llama import LlamaConfig
from vapi_jax.models.policy import POLICIES


def resolve(config: ConfigDict | Mapping[str, Any]) -> TrainConfig:
    """The typed configuration of a recipe, with its VA-π preset applied under its explicit choices.

    Raises:
      ConfigError: listing every unknown name, wrong type and impossible value.
    """
    resolved, errors = examine(config)
    raise_all(errors)
    return resolved


def raise_all(errors: Sequence[str]) -> None:
    """Raises `ConfigError` with all error lines, if there are any."""
    if errors:
        lines = [f"{len(errors)} error(s) in the configuration:"]
        lines += ["  - config." + error.replace("\n", "\n      ") for error in errors]
        raise ConfigError("\n".join(lines))


def examine(config: ConfigDict | Mapping[str, Any]) -> tuple[TrainConfig, Errors]:
    """The typed configuration, and a line for everything that is wrong with it.

    A value that cannot be used is left at its default, so that the rest can be judged as well.
    """
    raw = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    errors = Errors()
    preset = raw.get("preset", "paper")
    if not isinstance(preset, str) or preset not in PRESETS:
        errors.append(f"preset={preset!r}: choose one of {tuple(PRESETS)}")
        raw["preset"] = preset = "paper"
    if isinstance(raw.setdefault("vapi", {}), Mapping):
        raw["vapi"] = {**PRESETS[preset], **raw["vapi"]}
    errors += [f"{required}: missing" for required in _STAND_INS if required not in raw]
    resolved = _build(TrainConfig, raw, "", errors)
    check_together(resolved, errors)
    return resolved, errors


PATHS = ("data.path", "init.gpt", "init.vq", "init.perceptual", "init.discriminator")
"""Options that name files or folders."""

_STAND_INS = {"name": "unnamed", "task": TASKS[0]}  # for the two options without a default


def _build(kind: type, values: Any, where: str, errors: Errors) -> Any:
    """A dataclass from a mapping, collecting errors instead of stopping at the first."""
    if not isinstance(values, Mapping):
        errors.append(f"{where.rstrip('.')}={values!r}: wants options of its own, not a value")
        return kind()
    hints = typing.get_type_hints(kind)
    kwargs: dict[str, Any] = dict(_STAND_INS) if kind is TrainConfig else {}
    for name, value in values.items():
        path = f"{where}{name}"
        if name not in hints:
            errors.append(f"{path}: nothing reads this option{_nearest(name, hints, where)}")
        elif dataclasses.is_dataclass(hints[name]):
            kwargs[name] = _build(hints[name], value, f"{path}.", errors)
        elif path == "policy":
            kwargs[name] = _build_policy(value, values.get("task"), errors)
        else:
            _keep(kwargs, name, value, hints[name], path, errors)
    try:
        return kind(**kwargs)
    except ValueError as error:  # the dataclass's own check, one line for each finding
        errors += [f"{where.rstrip('.')}: {line}" for line in str(error).splitlines()]
        return kind()


def _build_policy(values: Any, task: Any, errors: Errors) -> dict[str, Any]:
    """The generator's options, which are those of its own kind."""
    if not isinstance(values, Mapping):
        errors.append(f"policy={values!r}: wants options of its own, not a value")
        return {}
    kind = values.get("kind")
    if kind not in POLICIES:
        if task != "tokenizer":
            errors.append(f"policy.kind={kind!r}: choose one of {tuple(POLICIES)}")
        return dict(values)
    hints = {"kind": str, **typing.get_type_hints(JanusConfig if kind == "janus" else LlamaConfig)}
    more = ("alignment", "padding") if kind == "janus" else ("size",)
    hints |= dict.fromkeys(more, str)
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in hints:
            _keep(kept, name, value, hints[name], f"policy.{name}", errors)
        else:
            near = _nearest(name, hints, "policy.")
            errors.append(f"policy.{name}: nothing reads this option{near}")
    return kept


def _keep(
    kept: dict[str, Any], name: str, value: Any, hint: Any, path: str, errors: Errors
) -> None:
    """Adds an option's value under its name, if it is of the right type and within its limits."""
    before = len(errors)
    value = _coerce(value, hint, path, errors)
    if len(errors) == before and path in PATHS:
        value = _local(value, path, errors)
    if len(errors) == before:
        broken = broken_limit(path, value)
        if broken is None:
            kept[name] = value
        else:
            errors.append(broken)


def _local(value: Any, path: str, errors: list[str]) -> Any:
    """A path, or each of several, with `~` expanded; "" names none."""
    if isinstance(value, tuple):
        return tuple(_local(part, path, errors) for part in value)
    try:
        return local_text(value) if value else value
    except PathError as error:
        errors.append(f"{path}={error}")
        return value


def _nearest(name: str, known: Iterable[str], where: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {where}{near[0]}?" if near else f"; known: {', '.join(known)}"


def _coerce(value: Any, hint: Any, where: str, errors: list[str]) -> Any:
    """A value of the field's type; whole floats pass for ints and ints for floats."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            errors.append(f"{where}={value!r}: wants a tuple, not {type(value).__name__}")
            return value
        inner = typing.get_args(hint)[0]
        return tuple(_coerce(item, inner, where, errors) for item in value)
    if typing.get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            errors.append(f"{where}={value!r}: wants options of its own, not a value")
        return value
    if typing.get_origin(hint) is types.UnionType:  # "int | None"
        return value if value is None else _coerce(value, typing.get_args(hint)[0], where, errors)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        errors.append(f"{where}={value!r}: wants {hint.__name__}, not {type(value).__name__}")
    return value


def device_errors(config: TrainConfig, devices: int) -> list[str]:
    """A line for every batch that does not split evenly over the devices."""
    errors = []
    batch, micro = config.batch_size, config.microbatch_size or config.batch_size
    if batch % devices:
        errors.append(_uneven("batch_size", batch, devices, -(-batch // devices) * devices))
    elif micro % devices:
        fitting = [n for n in range(devices, batch + 1, devices) if batch % n == 0]
        nearest = next((n for n in fitting if n >= micro), batch)
        errors.append(_uneven("microbatch_size", micro, devices, nearest))
    images = config.eval.images
    if images % devices:
        errors.append(_uneven("eval.images", images, devices, -(-images // devices) * devices))
    return errors


def _uneven(name: str, size: int, devices: int, fix: int) -> str:
    return f"{name}={size}: not a multiple of the {devices} devices; take {fix}"
