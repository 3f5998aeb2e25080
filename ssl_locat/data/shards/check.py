"""`ssl-locat shards check|show`: find all damage, tell what is in shards."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ssl_locat.data.images.decode import decode_image, find_image
from ssl_locat.data.shards.index import AnySet, is_collection, is_compressed, kind_of, open_dataset, read_compressed
from ssl_locat.data.shards.shard_index import scan_shard
from ssl_locat.data.shards.shard_set import ShardDataset
from ssl_locat.data.shards.tar import Damage, RawSample, parse
from ssl_locat.data.stores.objects import Gone
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import CorruptSample, DataError
from ssl_locat.runs.log import progress, say
from ssl_locat.text.shown import redact, shown, to_json

_THREADS = 4
_SHOWN = 3  # samples, as an example of what is there
_PIECE = 64 << 20  # bytes read at once: bounds the memory of a check


@dataclass
class Report:
    """What `check` found. `exit_code` is 3 if anything is damaged."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    repeated_keys: int = 0  # samples whose key came before in the same shard: both are used, but tools that go by key mix them up
    unusual: list[str] = field(default_factory=list)  # shards whose samples have other members than most

    @property
    def exit_code(self) -> int:
        return 3 if self.damage else 0

    def __str__(self) -> str:
        lines = [f"{self.shards} shards, {self.samples} samples, {self.bytes / 1e6:.1f} MB"]
        lines += [
            f"DAMAGED {shown(bad.shard)}{f' [{shown(bad.key)}]' if bad.key else ''}: {shown(bad.reason)}" for bad in self.damage
        ]
        if self.repeated_keys:
            lines.append(
                f"note: {self.repeated_keys} samples have the key of an earlier one in their shard; each is read as a sample of its own"
            )
        lines += [f"note: {line}" for line in self.unusual]
        lines.append(f"{len(self.damage)} damaged" if self.damage else "no damage found")
        return "\n".join(lines)


def check_command(spec: str | list[str], as_json: bool) -> int:
    """Print what `check` finds, images decoded; returns the exit code."""
    report = check(spec, decode=_decode_images)
    if as_json:
        report_dict = {name: getattr(report, name) for name in ("shards", "samples", "bytes", "repeated_keys", "unusual")}
        print(to_json(report_dict | {"damage": [bad._asdict() for bad in report.damage]}))
    else:
        say(str(report))
    return report.exit_code


def _decode_images(sample: RawSample) -> None:
    """Samples without an image are damage too: training would quarantine them."""
    decode_image(find_image(sample.members), channels=None)


def check(spec: str | list[str], decode: Callable[[RawSample], object] | None = None, store: Store | None = None) -> Report:
    """Read every byte once and report all damage by shard and key.

    Args:
        decode: called with each sample; what it raises as CorruptSample is damage too (an image that does not decode).
    """
    store, report = store or Store(), Report()
    urls = list(store.expand(_as_pattern(spec, store)))
    with ThreadPoolExecutor(_THREADS) as pool, progress("Checking shards", len(urls), "shards") as bar:
        # in the order of the pattern, whichever thread is first
        for url, (samples, found) in zip(urls, pool.map(lambda url: _check_one(store, url, decode), urls), strict=True):
            report.shards += 1
            report.samples += sum(samples.values())
            report.bytes += found.size
            report.damage += found.damage
            report.repeated_keys += found.repeated
            if len(samples) > 1:
                usual, count = samples.most_common(1)[0]
                report.unusual.append(
                    f"{shown(url)}: {sum(samples.values()) - count} samples lack or add members ({shown(', '.join(usual))} is usual)"
                )
            bar.update(1)
    return report


@dataclass
class _Found:
    size: int = 0
    damage: list[Damage] = field(default_factory=list)
    repeated: int = 0


def _check_one(store: Store, url: str, decode: Callable[[RawSample], object] | None) -> tuple[Counter, _Found]:
    """({extensions of a sample: how many}, damage) of one shard."""
    kinds: Counter = Counter()
    found, keys = _Found(), set()
    try:
        found.size = store.stat(url).size
        read = (
            read_compressed(url, store)
            if is_compressed(url)
            else _rows(store, url)
            if kind_of(url) != "tar"
            else _samples(store, url)
        )
        for sample in read:
            if isinstance(sample, RawSample) and decode:
                try:
                    decode(sample)
                except CorruptSample as error:
                    sample = Damage(sample.key, sample.shard, error.reason)
            if isinstance(sample, Damage):
                found.damage.append(sample)
                continue
            found.repeated += sample.key in keys
            keys.add(sample.key)
            # as sets of extensions: the order of members within a sample means nothing
            kinds[tuple(sorted(sample.members))] += 1
    except (CorruptSample, Gone, DataError) as error:
        found.damage.append(Damage("", shown(url), str(error)))
    return kinds, found


def _rows(store: Store, url: str) -> Iterator[RawSample | Damage]:
    """All samples of a Parquet file or a zip archive."""
    dataset = open_dataset(url, store=store)
    for first in range(0, len(dataset), 64):
        yield from dataset.read(first, min(len(dataset), first + 64))


def _samples(store: Store, url: str) -> Iterator[RawSample | Damage]:
    """All slots of a shard, scanned afresh: an index may be older than the damage."""
    stat = store.stat(url)
    starts, crcs = scan_shard(store, url, stat)
    first = 0
    while first < len(crcs):
        last = first + 1
        # as many slots as fit into a piece, at least one
        while last < len(crcs) and starts[last + 1] - starts[first] <= _PIECE:
            last += 1
        data = store.read(url, starts[first], starts[last], stat)
        for i in range(first, last):
            yield parse(data, starts[i] - starts[first], starts[i + 1] - starts[first], crcs[i], redact(url))
        first = last


def show_command(spec: str | list[str], as_json: bool) -> None:
    dataset = open_dataset(spec)
    if as_json:
        shards = [
            {"url": shown(s.url), "samples": s.count, "bytes": s.stat.size, "damaged": s.damaged}
            for s in getattr(dataset, "shards", [])
        ]
        print(to_json({"data": dataset.name, "samples": len(dataset), "manifest": dataset.manifest_hash, "shards": shards}))
    else:
        say(show(dataset))


def show(dataset: AnySet) -> str:
    """Counts, sizes and the first samples, as text."""
    lines = [
        f"{dataset.name}: {len(dataset)} samples, {len(dataset) * dataset.mean_bytes / 1e6:.1f} MB",
        f"manifest {dataset.manifest_hash}",
    ]
    if isinstance(dataset, ShardDataset):
        lines += [
            f"  {shown(shard.url)}  {shard.count} samples  {shard.stat.size / 1e6:.1f} MB{f'  {shard.damaged} DAMAGED' * bool(shard.damaged)}"
            for shard in dataset.shards[:20]
        ]
        if len(dataset.shards) > 20:
            lines.append(f"  ... and {len(dataset.shards) - 20} more shards")
    elif dataset.classes:
        lines.append(
            f"{len(dataset.classes)} classes: {shown(', '.join(dataset.classes[:10]))}{' ...' * (len(dataset.classes) > 10)}"
        )
    for sample in dataset.read(0, min(_SHOWN, len(dataset))):
        if isinstance(sample, Damage):
            lines.append(f"[{shown(sample.key)}] DAMAGED: {shown(sample.reason)}")
        else:
            lines.append(
                f"[{shown(sample.key)}]  "
                + "  ".join(f"{shown(name)} {_describe(data)}" for name, data in sorted(sample.members.items()))
            )
    return "\n".join(lines)


def _describe(data: bytes) -> str:
    """A short text as it is, anything else as its size."""
    try:
        text = data.decode()
        return json.dumps(text.strip()) if len(text) <= 20 and text.isprintable() else f"{len(data)} bytes"
    except UnicodeDecodeError:
        return f"{len(data)} bytes"


def _as_pattern(spec: str | list[str], store: Store) -> str | list[str]:
    """A folder stands for the shards in it."""
    if isinstance(spec, str) and ".tar" not in spec and not is_collection(spec):
        files = list(store.walk(spec))
        names = [name for name in files if "/" not in name and ".tar" in name] or [name for name in files if is_collection(name)]
        if not names:
            raise DataError(f"{shown(spec)} holds no .tar shards, Parquet files or zip archives to check")
        return [f"{spec.rstrip('/')}/{name}" for name in names]
    return spec
