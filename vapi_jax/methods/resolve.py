"""From a recipe to the typed configuration, or a line for everything that is wrong with it.

A recipe under `configs/` returns an `ml_collections.ConfigDict`; `resolve` turns it into the frozen
dataclasses of `vapi_jax.methods.config`. Limits of single options stand where the option is; how options
fit together is checked here and by the method. Nothing here touches a device or a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vapi_jax import rewards
from vapi_jax.common.options import Errors, build, coerce, nearest
from vapi_jax.common.plugins import UnknownNameError
from vapi_jax.methods import METHODS, find_method
from vapi_jax.methods.config import ConfigError, TrainConfig
from vapi_jax.methods.method import Method
from vapi_jax.models.lpips import least_side
from vapi_jax.models.policies import find_policy

COMPARED_FEATURES = {"alex_conv5": 512, "efficientnet_lite0_112": 1280}
"""`eval.unseen` -> width of the widest features of the final table, which always has VGG's 512: a covariance
needs more samples than that."""

OWN_SECTION = "method_options"
"""Where a recipe has the options of a method that names no section of its own."""


def resolve(config: ConfigDict | Mapping[str, Any]) -> TrainConfig:
    """The typed configuration of a recipe, with its method's preset applied under its explicit choices.

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
    method = _method(raw, errors)
    under = _preset(raw, method, errors)
    raw = _over(raw, under)
    more: dict[str, Any] = {"method": raw.pop("method", "vapi"), "section": _section(method)}
    more["options"] = build(
        method.Options, raw.pop(more["section"], {}), f"{more['section']}.", errors
    )
    for section in (*(other.section for other in METHODS.values()), OWN_SECTION):
        if section in raw and not raw[section]:  # an empty section says nothing
            del raw[section]
    more["rewards"] = rewards.completed(
        rewards.parse(raw.pop("rewards", rewards.DEFAULT), errors),
        rewards.parse(under.get("rewards", ()), errors),
    )
    more["policy"] = _policy(raw.pop("policy", {}), errors)
    if "name" not in raw:
        errors.append("name: missing")
        more["name"] = "unnamed"
    resolved = build(TrainConfig, raw, "", errors, **more)
    check_together(resolved, method, errors)
    return resolved, errors


def _method(raw: Mapping[str, Any], errors: Errors) -> type[Method]:
    found: Any
    if "method" not in raw:
        errors.append("method: missing")
        return METHODS["vapi"]
    try:
        found = find_method(str(raw["method"]))
    except UnknownNameError as error:
        errors.append(f"method={raw['method']!r}: {error}")
        return METHODS["vapi"]
    if not (isinstance(found, type) and issubclass(found, Method)):
        errors.append(f"method={raw['method']!r}: is no class of vapi_jax.methods.Method")
        return METHODS["vapi"]
    return found


def _section(method: type[Method]) -> str:
    return method.section or OWN_SECTION


def _preset(raw: dict[str, Any], method: type[Method], errors: Errors) -> dict[str, Any]:
    """What its preset means to a recipe (its "presets", which are taken out), over what to its method."""
    preset, own = raw.get("preset", "paper"), raw.pop("presets", {})
    if preset not in method.PRESETS:
        errors.append(f"preset={preset!r}: choose one of {tuple(method.PRESETS)}")
        preset = raw["preset"] = "paper"
    return _over(own.get(preset, {}), method.PRESETS[preset])


def _over(chosen: Mapping[str, Any], under: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options over others."""
    merged = {**under, **chosen}
    for name in chosen.keys() & under.keys():
        if isinstance(chosen[name], Mapping) and isinstance(under[name], Mapping):
            merged[name] = _over(chosen[name], under[name])
    return merged


def _policy(values: Any, errors: Errors) -> dict[str, Any]:
    """The generator's options, which are those of its own kind."""
    if not isinstance(values, Mapping):
        errors.append(f"policy={values!r}: wants options of its own, not a value")
        return {}
    kept: dict[str, Any] = {}
    try:
        hints = {"kind": str, **find_policy(str(values.get("kind"))).option_hints()}
    except UnknownNameError:
        return dict(values)  # a method that has a generator will say so
    for name, value in values.items():
        if name not in hints:
            near = nearest(name, hints, "policy.")
            errors.append(f"policy.{name}: nothing reads this option{near}")
            continue
        before = len(errors)
        found = coerce(value, hints[name], f"policy.{name}", errors)
        if len(errors) == before:
            kept[name] = found
    return kept


def check_together(config: TrainConfig, method: type[Method], errors: Errors) -> None:
    """Adds what is wrong with options that do not fit one another."""
    if not config.name:
        errors.append("name='': wants a name")
    micro = config.microbatch_size or config.batch_size
    if not errors.concern("batch_size", "microbatch_size") and config.batch_size % micro:
        errors.append(
            f"microbatch_size={micro}: batch_size={config.batch_size} is not a multiple of it"
        )
    if not errors.concern("tokenizer", "data"):
        side, factor = config.data.image_size, config.tokenizer.downsample_factor
        if not config.tokenizer.encoder_ch_mult:
            errors.append("tokenizer.encoder_ch_mult=(): wants a width for at least one resolution")
        elif side % factor:
            errors.append(
                f"data.image_size={side}: the tokenizer reduces by {factor}; take a multiple of it"
            )
    _check_evaluation(config, errors)
    if not errors.concern(_section(method)):
        method.check(config, errors)


def _check_evaluation(config: TrainConfig, errors: Errors) -> None:
    judged, side, least = config.eval, config.data.image_size, least_side("vgg")
    if judged.controls and not judged.compare:
        errors.append("eval.controls: they are rows of the table; set eval.compare=True as well")
    compared = COMPARED_FEATURES.get(judged.unseen, 0)
    least_samples = 2 if judged.allow_singular else compared + 1
    if judged.compare and judged.samples < least_samples and not errors.concern("eval"):
        errors.append(
            f"eval.samples={judged.samples}: the table compares {compared} features; wants "
            f"at least {least_samples}"
        )
    if errors.concern("data.image_size") or side >= least:
        return
    if judged.compare:
        errors.append(
            f"eval.compare: images of {side} pixels are too small for its features; wants at least "
            f"{least}"
        )
    if judged.sampled_every:
        errors.append(
            f"eval.sampled_every: images of {side} pixels are too small for the features that judge "
            f"samples; wants at least {least}, or set it to 0"
        )


def device_errors(config: TrainConfig, devices: int) -> list[str]:
    """A line for every batch that does not split evenly over the devices."""
    errors = []
    batch, micro = config.batch_size, config.microbatch_size or config.batch_size
    if batch % devices:
        errors.append(_uneven("batch_size", batch, devices, -(-batch // devices) * devices))
    elif micro % devices:
        fitting = [n for n in range(devices, batch + 1, devices) if batch % n == 0]
        nearest_fit = next((n for n in fitting if n >= micro), batch)
        errors.append(_uneven("microbatch_size", micro, devices, nearest_fit))
    images = config.eval.images
    if images % devices:
        errors.append(_uneven("eval.images", images, devices, -(-images // devices) * devices))
    return errors


def _uneven(name: str, size: int, devices: int, fix: int) -> str:
    return f"{name}={size}: not a multiple of the {devices} devices; take {fix}"


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """A configuration with other values of its method's options."""
    return dataclasses.replace(config, options=dataclasses.replace(config.options, **changes))
