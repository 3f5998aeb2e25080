"""What a name of data stands for where it is neither a shard nor a pattern: a wids list of shards, or a folder whose shards lie by splits.

wids lists (webdataset's `wids-shard-index-v1`): {"wids_version": 1, "shardlist": [{"url", "nsamples"}, ...], "datasets": [{"shardlist" or "source_url"}]}.
Folders by splits: WebDataset repositories of the Hugging Face hub, and local copies of them: `configs` in the README's header say which
shards are train and test, or else the names of folders and files do.
"""

import json
import logging
import os
import posixpath
import re
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml

from ssl_locat.data.stores.objects import Gone, folder_and_name, join, normalise, scheme_of
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import DataError
from ssl_locat.text.shown import redact, shown

log = logging.getLogger(__name__)

_LARGEST = 256 << 20  # bytes of a list: some million shards
_README = 1 << 20
# words of the hub's own rule for names, each split by all of its words; as a word of a folder or of the file: 'data/train-00000.tar'
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class ShardList(NamedTuple):
    """One data set of a wids list."""

    counts: dict[str, int]  # URL -> samples that the list promises
    weight: float | None  # None where the list gives none


def is_shard_list(spec: object) -> bool:
    return isinstance(spec, str) and redact(spec).lower().endswith(".json")


def read_shard_list(store: Store, spec: str) -> list[ShardList]:
    """The data sets of a wids list, one for each of its own and each weight in it. Raises DataError for what is no such list, and for URLs that
    data may not come from."""
    url = normalise(spec)
    content = _read_json(store, url)
    groups: dict[tuple[int, float | None], dict[str, int]] = {}
    _collect(groups, 0, content.get("shardlist", []), content.get("base"), url, content.get("weight"))
    for number, part in enumerate(_list_of(content.get("datasets", []), url), start=1):
        place, weight = url, part.get("weight")  # of the reference, whatever the file behind it says
        if "source_url" in part:
            place = _resolve(part["source_url"], content.get("base"), url)
            part = _read_json(store, place)
            if any("source_url" in inner for inner in _list_of(part.get("datasets", []), place)):
                raise DataError(f"{shown(place)}: its data sets name lists again; a wids list may name others, which hold shards")
        _collect(groups, number, part.get("shardlist", []), part.get("base"), place, weight)
    if not any(groups.values()):
        raise DataError(f"{shown(url)} lists no shards: expected a wids list, whose 'shardlist' names them")
    return [ShardList(counts, weight) for (_, weight), counts in groups.items() if counts]


def _read_json(store: Store, url: str) -> dict[str, Any]:
    try:
        stat = store.stat(url)
        if stat.size > _LARGEST:
            raise DataError(f"{shown(url)} has {stat.size} bytes, more than {_LARGEST}: no list of shards is as long")
        content = json.loads(store.read(url, 0, stat.size, stat))
    except Gone:
        raise DataError(f"{shown(url)} does not exist; expected a wids list of shards (.json)") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown(url)} is no JSON ({shown(error)}); expected a wids list of shards") from None
    if not isinstance(content, dict) or content.get("wids_version", 1) != 1 or not {"shardlist", "datasets"} & content.keys():
        raise DataError(
            f"{shown(url)} is no wids list that is known here: expected {{'wids_version': 1, 'shardlist': [{{'url', 'nsamples'}}, ...]}}, as "
            "webdataset's wids-index writes it"
        )
    return content


def _list_of(value: Any, url: str) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise DataError(f"{shown(url)}: 'shardlist' and 'datasets' are lists of objects; found {shown(repr(value)[:80])}")
    return value


def _collect(groups: dict, number: int, shards: Any, base: Any, place: str, weight: Any) -> None:
    for shard in _list_of(shards, place):
        url, count = shard.get("url"), shard.get("nsamples")
        if not isinstance(url, str) or type(count) is not int or count < 0:
            raise DataError(
                f"{shown(place)}: {shown(repr(shard)[:120])} is no shard; expected {{'url': text, 'nsamples': whole number}}"
            )
        own = shard.get("weight", weight)
        if own is not None and (isinstance(own, bool) or not isinstance(own, int | float) or not 0 < own < float("inf")):
            raise DataError(f"{shown(place)}: the weight of {shown(url)} is {shown(repr(own)[:40])}; expected a number above 0")
        groups.setdefault((number, own), {})[_resolve(url, base, place)] = count


def _resolve(url: str, base: Any, place: str) -> str:
    """The URL of a shard as its list gives it: whole, or relative to `base`, or else to where the list lies."""
    near = base if isinstance(base, str) and base else folder_and_name(place)[0]
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url) or "::" in url:
        found = normalise(url)  # refuses commands and chains
    elif scheme_of(near) == "file":
        found = normalise(os.path.join(normalise(near), url))
    else:
        parts = urlsplit(near)
        found = f"{parts.scheme}://{parts.netloc}{posixpath.normpath(posixpath.join(parts.path or '/', url))}"
    if scheme_of(found) == "file" and scheme_of(place) != "file":
        raise DataError(
            f"{shown(place)} names {shown(found)}, a file of this machine: a list from elsewhere names what lies elsewhere"
        )
    return found


def check_counts(name: str, promised: dict[str, int], found: Iterable[tuple[str, int, int]]) -> None:
    """DataError for a whole shard (URL, samples, damaged ones) that holds another number of samples than its list says."""
    for url, count, damaged in found:
        if count != promised.get(url, count) and not damaged:
            raise DataError(
                f"{name} says that {shown(url)} holds {promised[url]} samples, but it holds {count}: the list is of other shards. Write it anew "
                f"(wids-index), or name the shards themselves"
            )


def choose_split(store: Store, folder: str, tars: list[str], split: str | None) -> list[str]:
    """Of the shards below a folder (relative paths) those of one split: of `split` ('train', 'test'), or of the only one there is.

    Raises DataError where that leaves a choice, naming what to write for each.
    """
    splits = _by_readme(store, folder, tars) or _by_names(tars)
    wanted = {"train": ("train",), "test": ("test", "validation")}.get(split or "", ())
    found = [name for name in splits if name in wanted] if len(splits) > 1 else list(splits)
    if len(found) == 1:
        log.info("%s: %d shards of split %s", shown(folder), len(splits[found[0]]), found[0])
        return splits[found[0]]
    listed = "; ".join(
        f"{name} ({len(paths)} shards): {shown(join(folder, _pattern(paths)))}" for name, paths in sorted(splits.items())
    )
    raise DataError(f"{shown(folder)} holds {len(splits)} splits: name the shards of one. {listed}")


def has_splits(store: Store, folder: str, files: Iterable[str]) -> bool:
    """Whether the folder's README says which of its shards belong to which split."""
    return "README.md" in files and bool(_configs(store, folder))


def _configs(store: Store, folder: str) -> list[dict]:
    """`configs` of the YAML header of a README: what the hub's viewer and `datasets` go by."""
    try:
        stat = store.stat(join(folder, "README.md"))
        text = store.read(join(folder, "README.md"), 0, min(stat.size, _README), None).decode("utf-8", "replace")
        header = yaml.safe_load(text.split("\n---", 1)[0].removeprefix("---")) if text.startswith("---") else None
    except (Gone, yaml.YAMLError):
        return []
    configs = header.get("configs") if isinstance(header, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _by_readme(store: Store, folder: str, tars: list[str]) -> dict[str, list[str]]:
    configs = _configs(store, folder)
    default = [config for config in configs if config.get("default") or config.get("config_name") == "default"] or configs
    if len(default) > 1:
        names = ", ".join(str(config.get("config_name")) for config in default)
        raise DataError(f"{shown(folder)}: its README has several configurations ({shown(names)}): name the shards of one")
    found: dict[str, list[str]] = {}
    for config in default:
        files: Any = config.get("data_files") or []
        for entry in files if isinstance(files, list) and any(isinstance(one, dict) for one in files) else [{"path": files}]:
            patterns = entry.get("path", []) if isinstance(entry, dict) else entry
            for pattern in patterns if isinstance(patterns, list) else [patterns]:
                name = str(entry.get("split", "train") if isinstance(entry, dict) else "train")
                found.setdefault(name, []).extend(path for path in tars if _matches(path, str(pattern)))
    return {name: sorted(dict.fromkeys(paths)) for name, paths in found.items() if paths}


def _matches(path: str, pattern: str) -> bool:
    from fsspec.utils import glob_translate  # the hub's patterns are fsspec's: ** crosses folders

    return re.match(glob_translate(pattern.removeprefix("./")), path) is not None


def _by_names(tars: list[str]) -> dict[str, list[str]]:
    """By the words of folders and files, folders first; what names no split is 'train', as on the hub."""
    found: dict[str, list[str]] = {}
    for path in tars:
        words = [word for part in path.split("/") for word in re.split(r"[^A-Za-z0-9]+|(?<=[a-z])(?=\d)", part.lower())]
        name = next((split for word in words for split, names in _SPLITS.items() if word in names), "train")
        found.setdefault(name, []).append(path)
    return found


def _pattern(paths: list[str]) -> str:
    """A glob for some paths: what they begin with, in the folder that they share."""
    start = os.path.commonprefix(paths)  # noqa: RUF071  # of letters, as a glob begins
    depth = max(path[len(start) :].count("/") for path in paths)
    return paths[0] if len(paths) == 1 else f"{start}{'*/' * depth}*.tar"
