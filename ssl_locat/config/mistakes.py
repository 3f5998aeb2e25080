"""What pydantic finds wrong with a YAML, in words: file and line, the full key, the value, what was expected, the nearest valid key."""

from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from ssl_locat.config.habits import in_our_words, our_value
from ssl_locat.config.yaml_files import LoadedYaml
from ssl_locat.errors import did_you_mean


def explain(schema: type[BaseModel], item: ErrorDetails, loaded: LoadedYaml, *, foreign: bool) -> str:
    """One pydantic error as: place: key is value; expected ...; nearest.

    foreign: whether keys of other projects are known here (habits.py has those of a pretraining run)."""
    key = _yaml_key(item, loaded.data)
    name = ".".join(map(str, key)) or loaded.name
    place = loaded.place(key)
    kind, message = item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = _known_keys(schema, item["loc"][:-1])
        ours = in_our_words(str(key[-1]), item["input"]) if foreign else ""
        return f"{place}: unknown key {name!r}.{ours or did_you_mean(str(key[-1]), known)} Known here: {', '.join(known)}."
    if kind == "missing":
        return f"{loaded.place(key[:-1]) if key[:-1] else loaded.name}: the key {name!r} is missing. It must be given: {_description(schema, item['loc'])}."
    if kind == "value_error":
        return f"{place}: {name}: {message}."
    if kind in ("model_type", "dict_type"):
        # of a section; options of the user's own naming have no list
        keys = ", ".join(_known_keys(schema, item["loc"])) if kind == "model_type" else ""
        return f"{place}: {name} is {item['input']!r}; expected keys and values{keys and f' ({keys})'}."
    expected = message[0].lower() + message[1:]
    if (value := our_value(name, item["input"])) != item["input"]:
        return f"{place}: {name} is {item['input']!r}, which is {value} here: {name}={value}."
    return f"{place}: {name} is {item['input']!r}; {expected.replace('input should', 'it should')}."


def drop_other_kinds(errors: list[ErrorDetails], data: Any) -> list[ErrorDetails]:
    """Without what a member of a union says of a value of another kind, where the member of its kind says more: of a list that it is no mapping."""
    places = [_yaml_key(item, data) for item in errors]
    return [
        item
        for item, place in zip(errors, places, strict=True)
        if item["type"] not in ("model_type", "list_type")
        or not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]


def _yaml_key(item: ErrorDetails, data: Any) -> tuple:
    """pydantic's location without the names of union members, which no user wrote."""
    key, loc = [], item["loc"]
    # ("objective", "list[Objective]", 0, "weight") -> ("objective", 0, "weight")
    for position, part in enumerate(loc):
        inside = isinstance(data, dict) and part in data
        listed = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if inside or listed:
            data = data[part]
            key.append(part)
        elif position == len(loc) - 1 and item["type"] == "missing":
            key.append(part)
    return tuple(key)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def _known_keys(schema: type[BaseModel], loc: tuple) -> list[str]:
    for part in loc:
        if part in schema.model_fields:
            schema = next(iter(_sections(schema.model_fields[part].annotation)), schema)
    return list(schema.model_fields)


def _description(schema: type[BaseModel], loc: tuple) -> str:
    known = schema
    for part in loc[:-1]:
        if part in known.model_fields:
            known = next(iter(_sections(known.model_fields[part].annotation)), known)
    found = known.model_fields.get(loc[-1])
    return (found.description or str(found.annotation)) if found else "see docs/config.md"
