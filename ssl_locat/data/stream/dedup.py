"""`ssl-locat shards dedup DATA...`: list the images that are there twice, and on request leave them out of training.

Of each group of the same picture the first is kept. With `--against`, what is also in another set (a test set) goes, too.
"""

from collections.abc import Sequence
from typing import Any

from ssl_locat.data.shards.index import FolderDataset, ShardDataset, open_dataset
from ssl_locat.data.shards.left_out import write_lists
from ssl_locat.data.stream.duplicates import ALIKE, Pair, duplicates, look_at
from ssl_locat.errors import DataError
from ssl_locat.runs.log import say
from ssl_locat.text.shown import shown, to_json

_LISTED = 50  # pairs shown to people; --json has all


def dedup_command(
    spec: str | list[str], against: str | None, leave_out: bool, as_json: bool, alike: float = ALIKE, workers: int | None = None
) -> None:
    """Print the duplicates of a set, within itself and against another; with `leave_out`, write the list beside the shards."""
    dataset = open_dataset(spec)
    if leave_out and isinstance(dataset, FolderDataset):
        raise DataError(
            f"{dataset.name} is a folder of images: the list lies beside shards. Pack it first: ssl-locat shards pack FOLDER OUT"
        )
    if leave_out and not isinstance(dataset, ShardDataset):
        raise DataError(
            f"{dataset.name} are Parquet files: the list lies beside tar shards. Leave its rows out when you write them."
        )
    looks = look_at(dataset, dataset.name, workers=workers)
    within = duplicates(looks, alike=alike)
    found: dict[str, Any] = {"samples": len(dataset), "within": [_told(pair, dataset, dataset) for pair in within]}
    gone = _redundant(within)
    if against is not None:
        other = open_dataset(against)
        between = duplicates(looks, look_at(other, other.name, workers=workers), alike=alike)
        found |= {"against": against, "between": [_told(pair, dataset, other) for pair in between]}
        gone |= {pair.first: f"sample {pair.second} of {other.name}" for pair in between}
    found["left_out"] = len(gone)
    if leave_out:
        assert isinstance(dataset, ShardDataset)
        found["written"] = write_lists(dataset, gone)
    if as_json:
        print(to_json(found))
    else:
        say("\n".join(_lines(found, leave_out)))


def _redundant(pairs: Sequence[Pair]) -> dict[int, str]:
    """number of a sample -> what it duplicates: all of a group but its first one."""
    first_of: dict[int, int] = {}

    def first(number: int) -> int:
        while number in first_of:
            number = first_of[number]
        return number

    for pair in pairs:
        one, other = sorted((first(pair.first), first(pair.second)))
        if one != other:
            first_of[other] = one
    return {number: f"sample {first(number)}" for number in sorted(first_of)}


def _told(pair: Pair, first: Any, second: Any) -> dict[str, Any]:
    one, other = (dataset.read(number, number + 1)[0].key for dataset, number in ((first, pair.first), (second, pair.second)))
    return {"numbers": [pair.first, pair.second], "keys": [one, other], "likeness": pair.likeness}


def _lines(found: dict[str, Any], leave_out: bool) -> list[str]:
    lines = []
    for kind in ("within", "between"):
        for pair in found.get(kind, [])[:_LISTED]:
            one, other = pair["keys"]
            what = "equal bytes" if pair["likeness"] == 1 else f"likeness {pair['likeness']:.2f}"
            where = f" of {shown(found['against'])}" if kind == "between" else ""
            lines.append(f"{shown(one)} is {shown(other)}{where} ({what})")
        if len(found.get(kind, [])) > _LISTED:
            lines.append(f"... and {len(found[kind]) - _LISTED} more pairs; --json lists all")
    lines.append(
        f"{found['samples']:,} samples, {found['left_out']:,} of them there twice{' or in the other set' if 'between' in found else ''}"
    )
    if leave_out:
        lines.append(f"left out from now on: {', '.join(map(shown, found['written']))}; delete the file to take them back")
    elif found["left_out"]:
        lines.append("--leave-out leaves them out of training; shards are not rewritten")
    return lines
