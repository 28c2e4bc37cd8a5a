"""What the labels of a run mean: the classes of its data against those of the generator it starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vapi_jax.common.options import Errors
from vapi_jax.common.plugins import UnknownNameError
from vapi_jax.data import DataError
from vapi_jax.data.classes import NUMBERS, SORTED, ClassMap, class_map, is_number
from vapi_jax.data.pipeline import classes_of
from vapi_jax.data.sources import source_class
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import generator_source, sized_policy
from vapi_jax.models.classes import IMAGENET_CLASSES, filled
from vapi_jax.models.loading import WeightsSource, class_count, class_list
from vapi_jax.models.policies import find_policy, make_policy


def with_classes(config: TrainConfig, errors: Errors) -> TrainConfig:
    """The run with its classes settled: `data.classes` by name, and how many the generator has.

    Where a recipe does not say how many, the weights that it starts from do, or else the data.

    Args:
      config: the run; of a method or a kind of generator without labels it comes back as it is.
      errors: added to, where labels of the data would not mean what they mean to the generator.
    """
    option = labels_option(config)
    if option is None or errors.concern("policy", "condition", "tokenizer", "init.classes"):
        return config
    source = _weights(config)
    fresh = config.init.classes == "new"  # as many rows as the data have classes
    if fresh and (source is None or source.classes is None):
        errors.append(
            "init.classes='new': wants weights of a generator with classes to take the rest from, in "
            f"init.gpt={config.init.gpt!r}"
        )
        return config
    stored = None if source is None or fresh else class_count(source)
    if stored is None and source is not None and source.classes is not None and not fresh:
        return config  # nothing there, or no such weights: said where they are opened
    asked = None if fresh else config.policy.get(option)
    if stored is not None and asked not in (None, stored):
        errors.append(
            f"policy.{option}={asked}: the generator in {config.init.gpt} has {stored} classes; leave "
            "this option out, or say init.classes='new' for fresh rows for your classes"
        )
        return config
    count = stored if asked is None else asked
    settled = _sized(config, option, count)
    if errors.concern("data.name", "data.path", "data.options", "data.classes", "data.dataset"):
        return settled
    try:
        own = source_class(config.data.name).read_class_names(config.data)
    except DataError as error:
        errors.append(f"{where(config)}: {error}")
        return settled
    rule = config.data.classes or _rule(config, own, source, count, errors)
    if rule is None:
        return settled
    try:
        found = class_map(rule, own)
    except DataError as error:
        errors.append(f"data.classes={rule!r}: {error}")
        return settled
    if count is not None and found.labels and max(found.labels) >= count:
        errors.append(_beyond(config, found, option, count))
        return settled
    settled = _sized(settled, option, len(found.names) if count is None else count, replace=fresh)
    return dataclasses.replace(settled, data=dataclasses.replace(config.data, classes=rule))


def where(config: TrainConfig) -> str:
    """The option that says where a run's data are."""
    data = config.data
    return f"data.path={data.path!r}" if data.path else f"data.name={data.name!r}"


def labels_option(config: TrainConfig) -> str | None:
    """The option of the generator that counts its labels; None for a run without labels."""
    if config.condition.name:
        return None
    try:
        return find_policy(str(config.policy.get("kind"))).classes_option or None
    except UnknownNameError:
        return None


def _sized(
    config: TrainConfig, option: str, count: int | None, *, replace: bool = False
) -> TrainConfig:
    if count is None or (option in config.policy and not replace):
        return config
    return dataclasses.replace(config, policy={**config.policy, option: count})


def _weights(config: TrainConfig) -> WeightsSource | None:
    """The generator weights that a run starts from."""
    try:
        return generator_source(config, make_policy(**sized_policy(config)))
    except ValueError:  # sizes that do not fit one another, about which there is an error already
        return None


def _rule(
    config: TrainConfig,
    own: Sequence[str],
    source: WeightsSource | None,
    count: int | None,
    errors: Errors,
) -> str | None:
    """The value of `data.classes` that fits the generator; None where none does."""
    numbers = all(map(is_number, own))
    pretrained = source is not None and config.init.classes == "keep"
    known = class_list(source) if pretrained and source is not None else ""
    if not pretrained and count == IMAGENET_CLASSES:
        known = "imagenet"
    unlisted = _unlisted(own, known)
    if not unlisted:
        return known
    if numbers and (count is not None or sorted(map(int, own)) == list(range(len(own)))):
        return NUMBERS
    if not pretrained or not own:
        return SORTED
    errors.append(
        f"data.classes='': it is not known which labels of the generator in {config.init.gpt} the "
        f"{len(own)} classes of the data are: their names are no numbers, and {unlisted}. In their order "
        f"they would be: {class_map(SORTED, own).rows()}. Where that is right, say "
        "data.classes=sorted; else name imagenet or a file of names (data.classes=FILE); or give the "
        "generator fresh rows for them, with init.classes=new"
    )
    return None


def _unlisted(own: Sequence[str], known: str) -> str:
    """Why a generator's own list does not tell the labels of these classes; "" where it does."""
    if not known:
        return "no list says what its labels are called"
    try:
        class_map(known, own)
    except DataError as error:
        return str(error)
    return ""


def _beyond(config: TrainConfig, found: ClassMap, option: str, count: int) -> str:
    name = max(zip(found.labels, found.own, strict=True))[1]
    if not config.init.gpt or config.init.classes == "new":
        return (
            f"policy.{option}={count}: the data has {len(found.own)} classes, and labels from {count} on "
            f"have no embedding; take {max(found.labels) + 1}"
        )
    return (
        f"data.classes={found.rule!r}: {name} would be label {max(found.labels)}, and the generator in "
        f"{config.init.gpt} has the labels 0 to {count - 1}. Name the right labels with "
        "data.classes=imagenet or a file of names, or say init.classes='new' for fresh rows for your "
        "classes"
    )


def class_names_of(config: TrainConfig) -> tuple[str, ...] | None:
    """Names of all labels of a run whose classes are settled; None for a run without labels."""
    option = labels_option(config)
    if option is None or option not in config.policy:
        return None
    return filled(classes_of(config.data).names, config.policy[option])
