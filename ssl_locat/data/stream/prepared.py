"""From a raw sample to a prepared one, or to the reason why it is damaged; the store is asked twice before it is."""

from collections.abc import Callable
from typing import Any

from ssl_locat.data.shards.filters import filtered
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import Damage, RawSample
from ssl_locat.data.stores.store import anew
from ssl_locat.errors import CorruptSample, MissingMember


def prepared(
    raw: RawSample | Damage, prepare: Callable[[RawSample, int], Any], seed: int, again: Callable[[], RawSample | Damage | None]
) -> tuple[str, Any] | Damage:
    """(key, `prepare(raw, seed)`) of the sample as its filters make it; where that raises CorruptSample, of what `again()` brings, if it is not the same."""
    if isinstance(raw, Damage):
        return raw
    try:
        sample = filtered(raw, seed)
        return sample.key, prepare(sample, seed)
    except CorruptSample as error:
        damage = Damage(raw.key, raw.shard, error.reason)
        second = None if isinstance(error, MissingMember) else again()
    if not isinstance(second, RawSample) or second.members == raw.members:
        return damage
    try:
        sample = filtered(second, seed)
        return sample.key, prepare(sample, seed)
    except CorruptSample as error:
        return Damage(second.key, second.shard, error.reason)


def read_again(dataset: Dataset, index: int) -> RawSample | Damage | None:
    """A sample by itself, from its store: a cache or a proxy on the way may have sent other bytes once. None for local files, which tell
    the same. One small request for a damaged sample, whatever was read around it. Raises Outage."""
    if not dataset.remote:
        return None
    with anew():
        return dataset.read(index, index + 1)[0]
