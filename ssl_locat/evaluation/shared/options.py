"""What a protocol's options may hold: the types of its function's signature, and their check before anything is loaded.

The signature is read from the source, not by importing it: a wrong value is answered in a second, before torch is imported.
"""

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from ssl_locat.config.data_section import WeightedShards
from ssl_locat.config.signatures import check_options, source_of
from ssl_locat.config.yaml_files import LoadedYaml
from ssl_locat.errors import ConfigError, did_you_mean

# strict: pydantic would read true as 1, "5" as 5 and "no" as false
Text = Annotated[str, Field(description="text")]
Flag = Annotated[bool, Field(strict=True, description="true or false")]
Integer = Annotated[int, Field(strict=True, description="a whole number")]
Count = Annotated[int, Field(strict=True, ge=1, description="a whole number of at least 1")]
Whole = Annotated[int, Field(strict=True, ge=0, description="a whole number of at least 0")]
Folds = Annotated[int, Field(strict=True, ge=2, description="a whole number of at least 2")]
FromEnd = Annotated[int, Field(strict=True, le=-1, description="a whole number below 0, counted from the end")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number above 0")]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number of at least 0")]
Share = Annotated[float, Field(strict=True, gt=0, le=1, description="a number above 0, at most 1")]
Probability = Annotated[float, Field(strict=True, ge=0, le=1, description="a number from 0 to 1")]
Portion = Annotated[float, Field(strict=True, gt=0, lt=1, description="a number between 0 and 1, neither of them")]
BelowOne = Annotated[float, Field(strict=True, ge=0, lt=1, description="a number of at least 0, below 1")]
Counts = Annotated[Sequence[Count], Field(min_length=1, description="a list of whole numbers of at least 1")]
Positives = Annotated[Sequence[Positive], Field(min_length=1, description="a list of numbers above 0")]
Flags = Annotated[Sequence[Flag], Field(min_length=1, description="a list of true and false")]
Plain = Annotated[
    Sequence[Annotated[str | int | float | bool, Field(union_mode="left_to_right")]],
    Field(min_length=2, description="a list of at least two texts or numbers"),
]
Shards = Annotated[
    str | Path | Annotated[Sequence[str], Field(min_length=1)] | Annotated[Sequence[WeightedShards], Field(min_length=1)],
    Field(description="shards or a folder as text, a list of such, or a list of {shards, weight}"),
]


class _Cache(TypedDict):
    folder: Text


class PageCache(_Cache, total=False):
    """`data.cache`: as in pretraining."""

    max_gb: Positive


class _Read(TypedDict, total=False):
    """How any protocol's data is read."""

    train: Shards | None
    test: Shards | None
    train_images: Count | None  # how many of train, chosen by their keys; None: all
    test_images: Count | None
    num_classes: Count | None
    image_key: Text | None
    max_bad: Probability | None
    retry_minutes: Positive | None
    cache: PageCache | None


class LabelledData(_Read, total=False):
    """`data` of the protocols on global features."""

    label_key: Text | None


class SceneData(_Read, total=False):
    """`data` of the dense protocols (seg_datasets.py)."""

    layout: Text | None
    train_split: Text | None
    test_split: Text | None
    ignore_index: Whole | None
    reduce_zero_label: Flag | None
    mask_key: Text | None


class HeldOutData(SceneData, total=False):
    """`data` of `held_out`, which takes labels and masks. num_classes is that of the labels where a set has both."""

    label_key: Text | None
    mask_classes: Count | None


class _Teacher(TypedDict):
    model: Text


class Distill(_Teacher, total=False):
    """`distill` of supervised training."""

    weight: Probability
    temperature: Positive


def check_arguments(target: str, options: dict[str, Any], loaded: LoadedYaml, key: tuple = ()) -> None:
    """Raise ConfigError for options that `target`, 'package.module:function', does not take, or that are not of its signature's types.

    loaded, key: the YAML that the options come from, and the place in it that they stand at, for the message.
    """
    check_options(target, options, loaded, key)
    kinds = annotations(target)
    wrong = [
        line for name, value in options.items() if name in kinds for line in _wrong(kinds[name], value, (*key, name), loaded)
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


@cache
def annotations(target: str) -> dict[str, Any]:
    """Keyword-only argument -> its type. An argument without one, or with a type that is not of this file, may hold anything."""
    module, _, name = target.partition(":")
    source = source_of(module)
    assert source is not None, f"{target} has no source"
    (function,) = (
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    found: dict[str, Any] = {}
    for argument in function.args.kwonlyargs:
        text = ast.unparse(argument.annotation) if argument.annotation else "object"
        # a class made for get_type_hints, which resolves annotations that are text
        holder = type("Options", (), {"__annotations__": {argument.arg: text}})
        try:
            found |= get_type_hints(holder, globals(), include_extras=True)
        except NameError:
            continue
    return found


def _wrong(kind: Any, value: Any, key: tuple, loaded: LoadedYaml) -> Iterator[str]:
    """What is wrong with a value, and with the keys inside it."""
    name, place = ".".join(map(str, key)), loaded.place(key)
    # by hand, not by pydantic: its message would not name the place, nor the nearest key
    section = next((part for part in (kind, *get_args(kind)) if is_typeddict(part)), None)
    if section is not None and isinstance(value, dict):
        kinds = get_type_hints(section, include_extras=True)
        for inner in sorted(section.__required_keys__ - set(value)):
            yield f"{place}: {name}.{inner} is missing; expected {describe(kinds[inner])}."
        for inner, held in value.items():
            if inner in kinds:
                yield from _wrong(kinds[inner], held, (*key, inner), loaded)
            else:
                inside = loaded.place((*key, inner))
                yield f"{inside}: unknown key '{name}.{inner}'.{did_you_mean(inner, kinds)} Known here: {', '.join(kinds)}."
    elif section is not None:
        if value is not None or NoneType not in get_args(kind):
            yield f"{place}: {name} is {value!r}; expected {describe(kind)}."
    else:
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError:
            choices = [choice for part in (kind, *get_args(kind)) if get_origin(part) is Literal for choice in get_args(part)]
            yield f"{place}: {name} is {value!r}; expected {describe(kind)}.{did_you_mean(value, choices)}"


def describe(kind: Any) -> str:
    """A type in words."""
    inside = get_args(kind)
    if get_origin(kind) is Annotated:
        descriptions = [part.description for part in kind.__metadata__ if isinstance(part, FieldInfo) and part.description]
        return descriptions[0] if descriptions else describe(inside[0])
    if get_origin(kind) is Literal:
        return f"one of {', '.join(inside)}"
    if get_origin(kind) is tuple:
        return f"a list of {len(inside)}, each {describe(inside[0])}"
    if get_origin(kind) is Sequence:
        return f"a list, each {describe(inside[0])}"
    if is_typeddict(kind):
        return f"keys and values ({', '.join(get_type_hints(kind))})"
    if inside:
        return " or ".join(describe(part) for part in inside)
    return "null" if kind is NoneType else str(getattr(kind, "__name__", kind))
