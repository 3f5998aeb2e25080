"""Images that are the same picture, within a set and between sets: recompressed, resized, grey, mirrored, cropped by a tenth.

Candidates first: for each image its nearest ones by descriptions (nearest.py), or by features that a caller has. Then each pair is
aligned, and counts if it is nearly equal: a search may be generous, since the alignment decides.
"""

import hashlib
import tempfile
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.data.images.bands import Bands, decode_stored, needs_bands, picked
from ssl_locat.data.images.decode import MAX_PIXELS, decode_image, find_image
from ssl_locat.data.images.eight_bits import as_corrupt
from ssl_locat.data.images.likeness import alignment, thumbnail
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import RawSample
from ssl_locat.data.stream.nearest import NEAREST, let_go, nearest, nearest_of_many
from ssl_locat.data.stream.ordered import Unread, read_in_order
from ssl_locat.data.stream.workers import choose_workers
from ssl_locat.runs.log import progress

# of 200 photographs altered in each way at most one was below it, of different images none above 0.90 (docs/duplicates.md)
ALIKE = 0.91
MOST_PAIRS = 4e9  # compared one by one, which takes some minutes of a core; above it faiss looks into the nearest lists alone
MOST_IN_MEMORY = 200_000  # thumbnails; more lie in a temporary file, of which only what is worked on stays in memory


class Pair(NamedTuple):
    first: int
    second: int
    likeness: float  # the alignment; 1 for equal bytes


class Pairs(NamedTuple):
    """The same as arrays: 20 bytes a pair, where millions may be found."""

    first: np.ndarray  # int64 [M]
    second: np.ndarray  # int64 [M]
    likeness: np.ndarray  # float32 [M]

    def __len__(self) -> int:
        return len(self.likeness)

    def at(self, number: int) -> Pair:
        return Pair(int(self.first[number]), int(self.second[number]), round(float(self.likeness[number]), 4))


class Keys:
    """The keys of a set, in its order: one string and its ends."""

    def __init__(self) -> None:
        self.text, self.ends = bytearray(), [0]

    def add(self, key: str) -> None:
        self.text += key.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.text))

    def __getitem__(self, number: int) -> str:
        return self.text[self.ends[number] : self.ends[number + 1]].decode("utf-8", "surrogateescape")


class Looks(NamedTuple):
    """What a set is compared by; 1 kB an image."""

    thumbnails: np.ndarray  # uint8 [N, 32, 32]; black, like nothing, of damaged images
    digests: np.ndarray  # uint64 [N] of the encoded image; 0 of damaged ones
    keys: Keys | None = None

    def __len__(self) -> int:
        return len(self.digests)


def picture_of(encoded: bytes, channels: Bands | int | None = None) -> np.ndarray:
    """uint8 [H, W, C] of any image: 8-bit grey or colours as they are; of other numbers or bands their mean, stretched from its own least value
    to its greatest. channels: as a backbone reads them; without, all that the file holds."""
    if isinstance(channels, Bands):
        return _stretched(decode_image(encoded, channels=channels))
    if not needs_bands(encoded):
        image = decode_image(encoded, channels=None)
        return image if image.shape[2] in (1, 3) else np.ascontiguousarray(_bands_last(image))
    with as_corrupt("image"):
        values, missing = picked(decode_stored(encoded, MAX_PIXELS), None, None)
        values = values.astype(np.float32)
        return _stretched(_bands_last(np.where(missing, np.nan, values) if missing is not None else values))


def _bands_last(values: np.ndarray) -> np.ndarray:
    """An array [C, H, W] as [H, W, C]: the two axes that are closest in length are the image's."""
    bands, height, width = values.shape
    return values if abs(np.log(height / width)) >= abs(np.log(bands / height)) else values.transpose(1, 2, 0)


def _stretched(values: np.ndarray) -> np.ndarray:
    """float [H, W, C] -> uint8 [H, W, 1]; without data, the mean."""
    there = np.isfinite(values)
    grey = np.where(there, values, 0).sum(2, keepdims=True) / np.maximum(there.sum(2, keepdims=True), 1)
    known = there.any(2, keepdims=True)
    if not known.any():
        return np.zeros(grey.shape, np.uint8)
    low, high = grey[known].min(), grey[known].max()
    grey = np.where(known, grey, grey[known].mean())
    scaled: np.ndarray = (255 * (grey - low) / max(high - low, 1e-12)).astype(np.uint8)
    return scaled


class _Look:
    """What a worker makes of a sample."""

    def __init__(self, image_key: str | None, channels: Bands | int | None):
        self.image_key, self.channels = image_key, channels

    def __call__(self, raw: RawSample, index: int) -> tuple[np.ndarray, int, str]:
        encoded = find_image(raw.members, self.image_key)
        digest = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
        return thumbnail(picture_of(encoded, self.channels)), digest, raw.key


def _stacked(items: list) -> tuple[np.ndarray, np.ndarray, list[str]]:
    blank = np.zeros((32, 32), np.uint8)
    looks = [(blank, 0, item.key) if isinstance(item, Unread) else item for item in items]
    return (
        np.stack([look for look, _, _ in looks]),
        np.array([digest for _, digest, _ in looks], np.uint64),
        [look[2] for look in looks],
    )


def look_at(
    dataset: Dataset, name: str, image_key: str | None = None, workers: int | None = None, channels: Bands | int | None = None
) -> Looks:
    """One pass over a set. Damaged images are like nothing: other commands tell of them. channels: see `picture_of`."""
    thumbnails = space(len(dataset))
    digests, keys = np.zeros(len(dataset), np.uint64), Keys()
    options: dict[str, Any] = {"batch_size": 256, "workers": choose_workers(workers)}
    start = 0
    with progress(f"looks of {name}", total=len(dataset), unit="images") as bar:
        for some, hashes, names in read_in_order(
            dataset, np.arange(len(dataset)), _Look(image_key, channels), _stacked, **options
        ):
            thumbnails[start : start + len(some)], digests[start : start + len(some)] = some, hashes
            for key in names:
                keys.add(key)
            let_go(thumbnails)
            start += len(some)
            bar.update(len(some))
    return Looks(thumbnails, digests, keys)


def space(count: int) -> np.ndarray:
    """Room for so many thumbnails: memory, or a file without a name, gone with the process, however it ends."""
    if count <= MOST_IN_MEMORY:
        return np.zeros((count, 32, 32), np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=(count, 32, 32))


def duplicates(first: Looks, second: Looks | None = None, more: np.ndarray | None = None, alike: float = ALIKE) -> list[Pair]:
    """`find_pairs` as a list."""
    found = find_pairs(first, second, more, alike)
    return [found.at(number) for number in range(len(found))]


def find_pairs(first: Looks, second: Looks | None = None, more: np.ndarray | None = None, alike: float = ALIKE) -> Pairs:
    """Pairs of an image of `first` and one of `second` that are the same picture, the surest first; within `first` where there is no second
    (then `first < second` in each pair).

    more: int64 [M, 2], further candidates, such as nearest neighbours by features. What is held besides Looks is 32 bytes for each image of
    `first` and 20 for each pair that is found: candidates are aligned block by block, as the search finds them.
    """
    other = first if second is None else second
    search = nearest if len(first) * len(other) <= MOST_PAIRS else nearest_of_many
    met = np.full(
        (len(first), NEAREST), -1, np.int32
    )  # what each image was compared with: a pair within a set is met from both sides
    equal = _equal_bytes(first, other, within=second is None)
    found = [(equal, np.ones(len(equal), np.float32))]
    for pairs in search(first.thumbnails, None if second is None else second.thumbnails):
        found.append(_aligned(_new(pairs, met, within=second is None), first, other, alike))
    if more is not None:
        pairs = np.sort(more, axis=1)[more[:, 0] != more[:, 1]] if second is None else more
        pairs = pairs[~(met[pairs[:, 0]] == pairs[:, 1:]).any(1)]
        found.append(_aligned(pairs, first, other, alike))
    pairs, likeness = np.concatenate([part for part, _ in found]), np.concatenate([part for _, part in found])
    # those of equal bytes may have been found by their looks, too
    kept = np.unique(pairs[:, 0] * len(other) + pairs[:, 1], return_index=True)[1]
    kept = kept[np.argsort(-likeness[kept], kind="stable")]
    return Pairs(pairs[kept, 0], pairs[kept, 1], likeness[kept])


def _new(pairs: np.ndarray, met: np.ndarray, *, within: bool) -> np.ndarray:
    """The pairs that were not met before, the smaller number first within a set; all are noted. pairs [M, 2] by ascending first, at most NEAREST of each."""
    rows, columns = pairs[:, 0], pairs[:, 1]
    met[rows, np.arange(len(rows)) - np.searchsorted(rows, rows)] = columns
    if not within:
        return pairs
    # the smaller one has asked before, or asks in this very block: it met the pair if it found the other one, too
    before = (columns < rows) & (met[columns] == rows[:, None]).any(1)
    return np.sort(pairs[~before], axis=1)


def _aligned(pairs: np.ndarray, first: Looks, second: Looks, alike: float) -> tuple[np.ndarray, np.ndarray]:
    """(those that are the same picture [m, 2], how alike [m])."""
    found = []
    for begin in range(0, len(pairs), 4096):
        some = pairs[begin : begin + 4096]
        likeness = alignment(first.thumbnails[some[:, 0]], second.thumbnails[some[:, 1]])
        digests = first.digests[some[:, 0]]
        likeness[(digests == second.digests[some[:, 1]]) & (digests != 0)] = 1.0
        found.append((some[likeness >= alike], likeness[likeness >= alike]))
    for looks in (first, second):
        let_go(looks.thumbnails)
    if not found:
        return np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
    return np.concatenate([part for part, _ in found]), np.concatenate([part for _, part in found])


def _equal_bytes(first: Looks, second: Looks, *, within: bool) -> np.ndarray:
    """int64 [M, 2]: for each image the first one, of the others, of equal bytes: what is flat is no less a duplicate for it."""
    values, where = np.unique(second.digests, return_index=True)
    at = np.searchsorted(values, first.digests).clip(max=len(values) - 1)
    same = (values[at] == first.digests) & (first.digests != 0)
    pairs = np.stack([np.flatnonzero(same), where[at[same]]], axis=1).astype(np.int64)
    return pairs[pairs[:, 1] < pairs[:, 0]][:, ::-1] if within else pairs
