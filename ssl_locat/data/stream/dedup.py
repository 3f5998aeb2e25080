"""`ssl-locat shards dedup DATA...`: list the images that are there twice, and on request leave them out of training.

A sample is left out if it is the same picture as one that stays, of a smaller number. With `--against`, what is also in another set (a test
set) goes, too.
"""

import json
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.data.images.likeness import alignment
from ssl_locat.data.shards.folder import FolderDataset
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.left_out import write_lists
from ssl_locat.data.shards.parquet import ParquetDataset
from ssl_locat.data.shards.shard_set import ShardDataset
from ssl_locat.data.stream.duplicates import ALIKE, Looks, Pairs, find_pairs, look_at
from ssl_locat.errors import DataError
from ssl_locat.runs.log import say
from ssl_locat.text.shown import shown, to_json

_LISTED = 50  # pairs shown to people; --json has all
_STAYING = 8  # samples of a group that stay, the latest, with which one that was paired with none of them is compared


class _Found(NamedTuple):
    """Pairs of one kind, and the sets that their numbers count in."""

    pairs: Pairs
    first: Looks
    second: Looks

    def told(self) -> Iterator[dict[str, Any]]:
        assert self.first.keys and self.second.keys
        for number in range(len(self.pairs)):
            pair = self.pairs.at(number)
            keys = [self.first.keys[pair.first], self.second.keys[pair.second]]
            yield {"numbers": [pair.first, pair.second], "keys": keys, "likeness": pair.likeness}


def dedup_command(
    spec: str | list[str], against: str | None, leave_out: bool, as_json: bool, alike: float = ALIKE, workers: int | None = None
) -> None:
    """Print the duplicates of a set, within itself and against another; with `leave_out`, write the list beside the shards."""
    dataset = open_dataset(spec)
    if leave_out and not isinstance(dataset, ShardDataset | ParquetDataset):
        raise DataError(
            f"{dataset.name} is {'a folder of images' if isinstance(dataset, FolderDataset) else 'no set of tars or Parquet files'}: the list lies "
            "beside shards. Pack it first: ssl-locat shards pack FOLDER OUT"
        )
    looks = look_at(dataset, dataset.name, workers=workers)
    found = {"within": _Found(find_pairs(looks, alike=alike), looks, looks)}
    gone = redundant(found["within"].pairs, looks, alike)
    if against is not None:
        other = open_dataset(against)
        others = look_at(other, other.name, workers=workers)
        found["between"] = _Found(find_pairs(looks, others, alike=alike), looks, others)
        gone |= {
            first: f"sample {second} of {other.name}"
            for first, second in zip(found["between"].pairs.first.tolist(), found["between"].pairs.second.tolist(), strict=True)
        }
    written: list[str] = []
    if leave_out:
        assert isinstance(dataset, ShardDataset | ParquetDataset) and looks.keys
        written = write_lists(dataset, ((number, looks.keys[number], gone[number]) for number in sorted(gone)))
    about = {"samples": len(dataset), "left_out": len(gone)} | ({"against": against} if against else {})
    if as_json:
        _print_json(about | ({"written": written} if leave_out else {}), found)
    else:
        say("\n".join(_lines(about, found, written)))


def redundant(pairs: Pairs, looks: Looks, alike: float = ALIKE) -> dict[int, str]:
    """number of a sample -> what it duplicates: one of a smaller number that stays.

    What is like one that goes need not be like one that stays (frames of a film, each like the next): a group, all that hangs together by
    pairs, keeps as many as it needs. But each image was paired with its nearest alone, of which none may stay where there are many copies: it
    is compared with some of its group that do.
    """
    heads = _heads(pairs, len(looks))
    order = np.argsort(pairs.second, kind="stable")
    first, second = pairs.first[order], pairs.second[order]
    staying: dict[int, list[int]] = {}  # by the head of their group
    gone: dict[int, str] = {}
    for number in np.unique(np.concatenate([first, second])).tolist():
        stays = staying.setdefault(heads[number], [])
        partners = first[slice(*np.searchsorted(second, [number, number + 1]))].tolist()  # those of a smaller number
        like = next((partner for partner in partners if partner not in gone), None)
        if like is None and stays:
            some = stays[-_STAYING:]
            close = alignment(looks.thumbnails[[number] * len(some)], looks.thumbnails[some])
            like = some[int(close.argmax())] if close.max() >= alike else None
        if like is None:
            stays.append(number)
        else:
            gone[number] = f"sample {like}"
    return gone


def _heads(pairs: Pairs, count: int) -> array:
    """int64 [N]: of each sample the smallest number that hangs together with it by pairs."""
    heads = array("q", range(count))

    def head(number: int) -> int:
        while heads[number] != number:
            heads[number] = heads[heads[number]]  # shorter for the next one who asks
            number = heads[number]
        return number

    for one, other in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        one, other = head(one), head(other)
        heads[max(one, other)] = min(one, other)
    for number in range(count):
        heads[number] = head(number)
    return heads


def _print_json(about: dict[str, Any], found: dict[str, _Found]) -> None:
    """One object, a pair a line: millions of them are never held as text."""
    print("{" + "".join(f"{json.dumps(name)}: {to_json(value)},\n" for name, value in about.items()), end="")
    for place, (name, pairs) in enumerate(found.items()):
        print(f'"{name}": [', end="")
        for number, pair in enumerate(pairs.told()):
            print("," * (number > 0) + "\n" + to_json(pair), end="")
        print("]" + (",\n" if place < len(found) - 1 else "}"), end="" if place < len(found) - 1 else "\n")


def _lines(about: dict[str, Any], found: dict[str, _Found], written: list[str]) -> list[str]:
    lines = []
    for kind, pairs in found.items():
        for _, pair in zip(range(_LISTED), pairs.told(), strict=False):
            one, other = pair["keys"]
            what = "equal bytes" if pair["likeness"] == 1 else f"likeness {pair['likeness']:.2f}"
            where = f" of {shown(about['against'])}" if kind == "between" else ""
            lines.append(f"{shown(one)} is {shown(other)}{where} ({what})")
        if len(pairs.pairs) > _LISTED:
            lines.append(f"... and {len(pairs.pairs) - _LISTED:,} more pairs; --json lists all")
    lines.append(
        f"{about['samples']:,} samples, {about['left_out']:,} of them there twice{' or in the other set' if 'between' in found else ''}"
    )
    if written:
        lines.append(f"left out from now on: {', '.join(map(shown, written))}; delete the file to take them back")
    elif about["left_out"]:
        lines.append("--leave-out leaves them out of training; shards are not rewritten")
    return lines
