"""Images that are the same picture, within a set and between sets: recompressed, resized, grey, mirrored, cropped by a tenth.

Candidates first: for each image its nearest ones by descriptions (images/likeness.py), or by features that a caller has. Then each pair is
aligned, and counts if it is nearly equal: a search may be generous, since the alignment decides.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ssl_locat.data.images.decode import decode_image, find_image
from ssl_locat.data.images.likeness import WINDOWS, alignment, describe, mirror, thumbnail
from ssl_locat.data.shards.index import Dataset
from ssl_locat.data.shards.tar import RawSample
from ssl_locat.data.stream.ordered import Unread, read_in_order
from ssl_locat.data.stream.workers import choose_workers
from ssl_locat.errors import UserError
from ssl_locat.runs.log import progress

# of 200 photographs altered in each way at most one was below it, of different images none above 0.90 (docs/duplicates.md)
ALIKE = 0.91
CANDIDATE = 0.65  # similarity of descriptions below which nothing is aligned: crops reach down to 0.68
CANDIDATE_OF_MANY = 0.85  # among millions every image has some that are half alike: only surer ones are aligned
NEAREST = 8  # candidates of each image; cells and tiles are so alike that the right one may be the fifth
_QUERIES, _BANK = 512, 16384  # rows compared at a time: 32 MB of similarities
MOST_PAIRS = 4e9  # compared one by one, which takes some minutes of a core; above it faiss looks into the nearest lists alone
MOST_IN_MEMORY = 200_000  # thumbnails; more lie in a temporary file, which the system pages in and out


class Pair(NamedTuple):
    first: int
    second: int
    likeness: float  # the alignment; 1 for equal bytes


class Looks(NamedTuple):
    """What a set is compared by; 1 kB an image."""

    thumbnails: np.ndarray  # uint8 [N, 32, 32]; black, like nothing, of damaged images
    digests: np.ndarray  # uint64 [N] of the encoded image; 0 of damaged ones

    def __len__(self) -> int:
        return len(self.digests)


class _Look:
    """What a worker makes of a sample."""

    def __init__(self, image_key: str | None):
        self.image_key = image_key

    def __call__(self, raw: RawSample, index: int) -> tuple[np.ndarray, int]:
        encoded = find_image(raw.members, self.image_key)
        digest = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
        return thumbnail(decode_image(encoded, channels=None)), digest


def _stacked(items: list) -> tuple[np.ndarray, np.ndarray]:
    blank = (np.zeros((32, 32), np.uint8), 0)
    looks = [blank if isinstance(item, Unread) else item for item in items]
    return np.stack([look for look, _ in looks]), np.array([digest for _, digest in looks], np.uint64)


def look_at(dataset: Dataset, name: str, image_key: str | None = None, workers: int | None = None) -> Looks:
    """One pass over a set. Damaged images are like nothing: other commands tell of them."""
    thumbnails = _space(len(dataset))
    digests = np.zeros(len(dataset), np.uint64)
    options: dict[str, Any] = {"batch_size": 256, "workers": choose_workers(workers)}
    start = 0
    with progress(f"looks of {name}", total=len(dataset), unit="images") as bar:
        for some, hashes in read_in_order(dataset, np.arange(len(dataset)), _Look(image_key), _stacked, **options):
            thumbnails[start : start + len(some)], digests[start : start + len(some)] = some, hashes
            start += len(some)
            bar.update(len(some))
    return Looks(thumbnails, digests)


def _space(count: int) -> np.ndarray:
    if count <= MOST_IN_MEMORY:
        return np.zeros((count, 32, 32), np.uint8)
    # without a name: gone with the process, however it ends
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=(count, 32, 32))


def duplicates(first: Looks, second: Looks | None = None, more: np.ndarray | None = None, alike: float = ALIKE) -> list[Pair]:
    """Pairs of an image of `first` and one of `second` that are the same picture, the surest first; within `first` where there is no second
    (then `first < second` in each pair).

    more: int64 [M, 2], further candidates, such as nearest neighbours by features.
    """
    other = first if second is None else second
    search = _nearest if len(first) * len(other) <= MOST_PAIRS else _nearest_of_many
    candidates = [_equal_bytes(first, other), *search(first, other), *([more] if more is not None else [])]
    pairs = np.concatenate(candidates)
    if second is None:
        pairs = np.sort(pairs, axis=1)
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    pairs = np.unique(pairs, axis=0)
    blocks = np.array_split(pairs, max(1, len(pairs) // 4096))  # of millions of pairs the thumbnails would be gigabytes
    likeness = np.concatenate([alignment(first.thumbnails[some[:, 0]], other.thumbnails[some[:, 1]]) for some in blocks])
    same = (first.digests[pairs[:, 0]] == other.digests[pairs[:, 1]]) & (first.digests[pairs[:, 0]] != 0)
    likeness[same] = 1.0
    order = np.flatnonzero(likeness >= alike)
    order = order[np.argsort(-likeness[order], kind="stable")]
    return [Pair(int(pairs[at, 0]), int(pairs[at, 1]), round(float(likeness[at]), 4)) for at in order]


def _equal_bytes(first: Looks, second: Looks) -> np.ndarray:
    """int64 [M, 2]: for each image the first one, of the others, of equal bytes: what is flat is no less a duplicate for it."""
    values, where = np.unique(second.digests, return_index=True)
    at = np.searchsorted(values, first.digests).clip(max=len(values) - 1)
    same = (values[at] == first.digests) & (first.digests != 0)
    return np.stack([np.flatnonzero(same), where[at[same]]], axis=1).astype(np.int64)


def _nearest(first: Looks, second: Looks) -> Iterator[np.ndarray]:
    """Blocks of int64 [M, 2]: the NEAREST images of `second` to each of `first`, as far as they are candidates."""
    flip = mirror()
    for start in range(0, len(first), _QUERIES):
        queries = describe(first.thumbnails[start : start + _QUERIES])  # [q, W, 64]
        best = np.full((len(queries), NEAREST), -1.0, np.float32)
        place = np.zeros((len(queries), NEAREST), np.int64)
        for begin in range(0, len(second), _BANK):
            bank = describe(second.thumbnails[begin : begin + _BANK])  # [b, W, 64]
            likeness = np.zeros((len(queries), len(bank)), np.float32)
            # either may be the crop: the whole of one against each window of the other
            sides = [(queries[:, 0], bank[:, number]) for number in range(len(WINDOWS))]
            sides += [(queries[:, number], bank[:, 0]) for number in range(1, len(WINDOWS))]
            for one, other in sides:
                for turned in (one, one * flip):
                    np.maximum(likeness, turned @ other.T, out=likeness)
            if second is first:
                here = np.arange(max(start, begin), min(start + len(queries), begin + len(bank)))
                likeness[here - start, here - begin] = -1
            best, place = _kept(best, place, likeness, begin)
        rows, columns = np.nonzero(best >= CANDIDATE)
        yield np.stack([rows + start, place[rows, columns]], axis=1)


def _nearest_of_many(first: Looks, second: Looks) -> Iterator[np.ndarray]:
    """As `_nearest`, for millions: the whole images of `second` in lists around centres, of which a query looks into the nearest 16."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            f"{len(first):,} and {len(second):,} images are too many to compare each with each: pip install 'ssl_locat[faiss]'."
        ) from None

    lists = int(8 * len(second) ** 0.5)
    # centres by a graph: among 8,000 of them the search for the nearest would cost more than the lists
    quantizer = faiss.IndexHNSWFlat(64, 32, faiss.METRIC_INNER_PRODUCT)
    index: Any = faiss.IndexIVFFlat(quantizer, 64, lists, faiss.METRIC_INNER_PRODUCT)
    index.quantizer_trains_alone = 2  # k-means by itself, then the centres go into the graph
    index.nprobe, index.cp.seed, index.cp.niter = 16, 0, 5
    step = max(1, len(second) // (40 * lists))  # faiss asks for some 39 images a centre
    index.train(describe(second.thumbnails[::step], 1)[:, 0])
    for begin in range(0, len(second), _BANK):
        index.add(describe(second.thumbnails[begin : begin + _BANK], 1)[:, 0])
    for start in range(0, len(first), _QUERIES):
        # each crop of an image, and its mirror image, against all whole images; the other way round, their crops ask for this one
        windows = describe(first.thumbnails[start : start + _QUERIES])  # [q, W, 64]
        queries = np.concatenate([windows, windows * mirror()], axis=1)
        values, where = index.search(queries.reshape(-1, 64), NEAREST + 1)  # an image finds itself, too
        rows = np.arange(start, start + len(windows)).repeat(values.size // len(windows))
        values, where = values.reshape(-1), where.reshape(-1)
        good = (values >= CANDIDATE_OF_MANY) & (where >= 0) & ((where != rows) | (second is not first))
        pairs, values = np.stack([rows[good], where[good]], axis=1), values[good]
        # of each image the best few: the surest first, then the first of each pair, then so many of each image
        pairs = pairs[np.argsort(-values, kind="stable")]
        pairs = pairs[np.sort(np.unique(pairs, axis=0, return_index=True)[1])]
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        begins = np.searchsorted(pairs[:, 0], pairs[:, 0])
        yield pairs[np.arange(len(pairs)) - begins < NEAREST]


def _kept(best: np.ndarray, place: np.ndarray, likeness: np.ndarray, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """The NEAREST so far, [q, NEAREST], with those of one more piece [q, b] whose first column is `begin`."""
    some = min(NEAREST, likeness.shape[1])
    new = np.argpartition(-likeness, some - 1, axis=1)[:, :some]
    values = np.concatenate([best, np.take_along_axis(likeness, new, 1)], axis=1)
    places = np.concatenate([place, new + begin], axis=1)
    order = np.argpartition(-values, NEAREST - 1, axis=1)[:, :NEAREST]
    return np.take_along_axis(values, order, 1), np.take_along_axis(places, order, 1)
