"""YAML files that know where each of their keys stands, so that an error can name file and line.

`base:` chains, `key.sub=value` overrides, no interpolation, no code. What a key means is schema.py's business.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssl_locat.errors import ConfigError, did_you_mean

Path_ = tuple[str | int, ...]  # a key as its parts: ("optim", "lr")


@dataclass
class LoadedYaml:
    """A mapping, and for each key in it the place (`file:line`) it came from."""

    name: str
    data: dict[str, Any]
    # not in `data`: a value with a place attached would no longer be the plain str or float that pydantic checks
    places: dict[Path_, str] = field(default_factory=dict)

    def place(self, key: Path_) -> str:
        """The place of `key`, or of the nearest parent that stands in a file."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        return self.name


_MAX_DEPTH = 50  # levels of nesting; the parser calls itself for each


class _Loader(yaml.SafeLoader):
    """Raises YAMLError, and nothing else, for whatever a text may hold."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a value in itself, or a few lines that unfold to terabytes
            event = self.peek_event()
            raise _wrong(f"aliases are not read; write the value of *{event.anchor} out, or share it in a `base:` file", event)
        if self.depth == _MAX_DEPTH:
            raise _wrong(f"nested more than {_MAX_DEPTH} levels deep", self.peek_event())
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # of 2024-13-45, !!bool maybe, !!timestamp x
            shown = str(node.value) if len(str(node.value)) <= 40 else f"{str(node.value)[:40]}..."
            raise _wrong(f"{shown!r} cannot be read as a value ({error}); put text in quotes", node) from None


def _wrong(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


# YAML 1.1 reads 5e-4 as a string; everybody means a number
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def shipped(folder: str) -> Path:
    """`configs`, `launch` or `eval`: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "shipped" / folder
    return inside if inside.is_dir() else package.parent / folder


def find(name: str, folder: str) -> Path:
    """The file that `name` means: a path, or the name of a YAML shipped in `folder` (`pretrain` is in `configs/pretrain`)."""
    path = Path(name)
    # the ending decides: a folder called `quickstart` here must not hide the recipe of that name
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(
            f"{name}: there is no such file. Give the path of a YAML file, or a shipped name: {', '.join(names(folder))}."
        )
    candidate = shipped(folder) / f"{name}.yaml"
    # of another folder of recipes by its name, too: `pretrain adapt/default`
    beside = shipped(folder.partition("/")[0]) / f"{name}.yaml"
    for file in (candidate, *([beside] if re.fullmatch(r"\w+/\w+", name) else [])):
        if file.is_file():
            return file
    known = names(folder)
    raise ConfigError(
        f"{name!r} is neither a YAML file nor a shipped name. Shipped in {folder}/: {', '.join(known)}.{did_you_mean(name, known)}"
    )


def names(folder: str) -> list[str]:
    """The shipped names in `folder`, sorted."""
    return sorted(path.stem for path in shipped(folder).glob("*.yaml"))


def load_yaml(
    name: str, folder: str = "configs/pretrain", overrides: Iterable[str] = (), either: tuple[Path_, ...] = ()
) -> LoadedYaml:
    """Read `name` (a path or a shipped name), its `base:` chain below it, and `key.sub=value` overrides on top.

    A base is looked up beside the file that names it, then among the shipped ones. Mappings merge, anything else replaces.

    either: keys that say one thing in several ways. Where a file, or the overrides together, give some of them, those below go.

    Raises:
        ConfigError: a file is missing or not YAML, bases form a cycle, or an override is not `key=value`.
    """
    loaded = _load_chain(find(name, folder), folder, (), either)
    given = LoadedYaml(loaded.name, {})
    for override in overrides:
        _note_override(given.data, override)
    _make_way(loaded, given.data, either)
    for override in overrides:
        _apply_override(loaded, override)
    return loaded


def _make_way(below: LoadedYaml, above: dict, either: tuple[Path_, ...]) -> None:
    """Take out of `below` what a key of `either` in `above` takes the place of."""
    if not any(_value(above, key) is not None for key in either):
        return
    for key in either:
        parent = _value(below.data, key[:-1])
        if isinstance(parent, dict) and parent.pop(key[-1], None) is not None:
            below.places.pop(key, None)


def _note_override(data: dict, override: str) -> None:
    """The override's key and value alone, without what they are laid over."""
    name, _, text = override.partition("=")
    *parents, last = name.split(".")
    for part in parents:
        data = data.setdefault(part, {}) if isinstance(data.get(part, {}), dict) else {}
    data[last] = read_value(text)


def _value(data: Any, key: Path_) -> Any:
    for part in key:
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _load_chain(path: Path, folder: str, seen: tuple[Path, ...], either: tuple[Path_, ...]) -> LoadedYaml:
    # one file under two names, by a link or by `..`, is still a circle
    path = path.resolve()
    shown = _shown(path)
    if path in seen:
        chain = " -> ".join(_shown(step) for step in (*seen[seen.index(path) :], path))
        raise ConfigError(f"{shown}: the `base:` files form a circle: {chain}. Remove one of them.")
    loaded = _read(path, shown)
    base = loaded.data.pop("base", None)
    if base is None:
        return loaded
    if not isinstance(base, str):
        raise ConfigError(f"{loaded.place(('base',))}: base is {base!r}; expected the name or path of one YAML file.")
    beside = path.parent / (base if base.endswith((".yaml", ".yml")) else f"{base}.yaml")
    try:
        base_path = beside if beside.is_file() else find(base, folder)
    except ConfigError as error:
        raise ConfigError(f"{loaded.place(('base',))}: base file not found. {error}") from None
    below = _load_chain(base_path, folder, (*seen, path), either)
    _make_way(below, loaded.data, either)
    # a key stands where it was said last, as its value does
    merged = LoadedYaml(shown, _merge(below.data, loaded.data), {**below.places, **loaded.places})
    return merged


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _merge(below: dict, above: dict) -> dict:
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def _read(path: Path, shown: str) -> LoadedYaml:
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except UnicodeDecodeError:
        raise ConfigError(f"{shown}: not a text file. Expected YAML in UTF-8.") from None
    except yaml.YAMLError as error:
        raise ConfigError(_explained(error, shown, "not valid YAML: ")) from None
    if node is None:
        raise ConfigError(f"{shown}: the file is empty. Expected keys such as `data:` and `backbone:`.")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{shown}:{node.start_mark.line + 1}: expected `key: value` lines at the top level.")
    places: dict[Path_, str] = {}
    _note_places(node, (), shown, places)
    try:
        return LoadedYaml(shown, loader.construct_document(node), places)
    except yaml.YAMLError as error:
        raise ConfigError(f"{_explained(error, shown)} Only plain YAML values are read, no tags.") from None


def _explained(error: yaml.YAMLError, shown: str, kind: str = "") -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{shown}:{mark.line + 1}" if mark else shown
    # `problem` is one line; the error as a text quotes the file over several
    return f"{where}: {kind}{getattr(error, 'problem', None) or error}."


def _note_places(node: yaml.Node, key: Path_, shown: str, places: dict[Path_, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for name_node, value_node in node.value:
            child = (*key, str(name_node.value))
            place = f"{shown}:{name_node.start_mark.line + 1}"  # marks count lines from 0
            if child in places:  # YAML forbids it, PyYAML silently keeps the last
                raise ConfigError(f"{place}: {'.'.join(map(str, child))} is given twice (first at {places[child]}). Keep one.")
            places[child] = place
            _note_places(value_node, child, shown, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*key, index)] = f"{shown}:{item.start_mark.line + 1}"
            _note_places(item, (*key, index), shown, places)


def _apply_override(loaded: LoadedYaml, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r}: expected an override of the form key.sub=value, such as optim.lr=1e-3.")
    # a number is an entry of a list: objective.0.weight=2
    parts: Path_ = tuple(int(part) if re.fullmatch(r"[0-9]{1,9}", part) else part for part in name.split("."))
    target: Any = loaded.data
    for depth, part in enumerate(parts[:-1]):
        if isinstance(target, list):
            _check_number(target, parts[: depth + 1], override)
            assert isinstance(part, int)  # what _check_number makes sure of
            if not isinstance(target[part], (dict, list)):
                shown = ".".join(map(str, parts[: depth + 1]))
                raise ConfigError(f"{override!r}: {shown} is {target[part]!r}, which has no keys; give {shown} as a whole.")
        elif not isinstance(target.get(part), (dict, list)):
            target[part] = {}
        target = target[part]
    if isinstance(target, list):
        _check_number(target, parts, override)
    target[parts[-1]] = read_value(text)
    # what stood below a replaced mapping stands nowhere any more
    for known in [key for key in loaded.places if key[: len(parts)] == parts]:
        del loaded.places[known]
    loaded.places[parts] = f"command line ({name}={text})"


def _check_number(target: list, parts: Path_, override: str) -> None:
    last = parts[-1]
    if not isinstance(last, int) or last >= len(target):
        name = ".".join(map(str, parts[:-1]))
        raise ConfigError(
            f"{override!r}: {name} is a list of {len(target)}; say which by a number below that, as in {name}.0.KEY=VALUE"
        )


def overridden(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Plain values with `key.sub=value` laid over them; the values given are left as they are."""
    loaded = LoadedYaml("the command line", deepcopy(data))
    for override in overrides:
        _apply_override(loaded, override)
    return loaded.data


def read_value(text: str) -> Any:
    """The VALUE of key=VALUE on a command line."""
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError:
        return text  # a glob, or something whose quotes a shell already ate: it is a string


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that `load_yaml` reads: no aliases, also where one list stands in two places."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
