"""Which images may be the same picture: the nearest by descriptions (images/likeness.py), each with each or, of millions, in lists (faiss).

Blocks of pairs come out as they are found, of one block of images at a time: what is held does not grow with their number.
"""

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

from ssl_locat.data.images.likeness import WINDOWS, describe, mirror
from ssl_locat.errors import UserError

CANDIDATE = 0.65  # similarity of descriptions below which nothing is aligned: crops reach down to 0.68
CANDIDATE_OF_MANY = 0.85  # among millions every image has some that are half alike: only surer ones are aligned
NEAREST = 8  # candidates of each image; cells and tiles are so alike that the right one may be the fifth
_QUERIES, _BANK = 512, 16384  # rows compared at a time: 32 MB of similarities
_DIM = 64  # of a description
_PROBES = 16  # lists that a query looks into
_ROUGH = 16  # of each query, those that are nearest by rough codes; their similarity is then computed
_PER_CENTRE = 40  # images for each centre in the search for them: faiss asks for 39


def nearest(thumbnails: np.ndarray, bank: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Blocks of int64 [M, 2], by ascending blocks of the first: the NEAREST images of `bank` to each of `thumbnails`, as far as they are
    candidates. uint8 [N, 32, 32] each; without a bank the images themselves, each but itself."""
    others, flip = thumbnails if bank is None else bank, mirror()
    for start in range(0, len(thumbnails), _QUERIES):
        queries = describe(thumbnails[start : start + _QUERIES])  # [q, W, 64]
        best = np.full((len(queries), NEAREST), -1.0, np.float32)
        place = np.zeros((len(queries), NEAREST), np.int64)
        for begin in range(0, len(others), _BANK):
            piece = describe(others[begin : begin + _BANK])  # [b, W, 64]
            likeness = np.zeros((len(queries), len(piece)), np.float32)
            # either may be the crop: the whole of one against each window of the other
            sides = [(queries[:, 0], piece[:, number]) for number in range(len(WINDOWS))]
            sides += [(queries[:, number], piece[:, 0]) for number in range(1, len(WINDOWS))]
            for one, other in sides:
                for turned in (one, one * flip):
                    np.maximum(likeness, turned @ other.T, out=likeness)
            if bank is None:
                here = np.arange(max(start, begin), min(start + len(queries), begin + len(piece)))
                likeness[here - start, here - begin] = -1
            best, place = _kept(best, place, likeness, begin)
        rows, columns = np.nonzero(best >= CANDIDATE)
        yield np.stack([rows + start, place[rows, columns]], axis=1)


def _kept(best: np.ndarray, place: np.ndarray, likeness: np.ndarray, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """The NEAREST so far, [q, NEAREST], with those of one more piece [q, b] whose first column is `begin`."""
    some = min(NEAREST, likeness.shape[1])
    new = np.argpartition(-likeness, some - 1, axis=1)[:, :some]
    values = np.concatenate([best, np.take_along_axis(likeness, new, 1)], axis=1)
    places = np.concatenate([place, new + begin], axis=1)
    order = np.argpartition(-values, NEAREST - 1, axis=1)[:, :NEAREST]
    return np.take_along_axis(values, order, 1), np.take_along_axis(places, order, 1)


def nearest_of_many(thumbnails: np.ndarray, bank: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """As `nearest`, for millions. Held for each image of the bank: a rough code of 16 bytes in a list around a centre, of which a query looks
    into the nearest 16, and its description, 128 bytes, by which those that are found are compared."""
    try:
        import faiss
    except ImportError:
        number = len(thumbnails if bank is None else bank)
        raise UserError(
            f"{len(thumbnails):,} and {number:,} images are too many to compare each with each: pip install 'ssl_locat[faiss]'."
        ) from None

    others = thumbnails if bank is None else bank
    lists = max(1, min(int(4 * len(others) ** 0.5), len(others) // _PER_CENTRE))
    # unit vectors: the nearest are those of the greatest inner product
    quantizer = faiss.IndexFlatL2(_DIM)
    index: Any = faiss.IndexIVFPQFastScan(quantizer, _DIM, lists, _DIM // 2, 4, faiss.METRIC_L2)
    index.by_residual, index.nprobe, index.cp.seed, index.cp.niter = False, _PROBES, 0, 5
    index.train(_spread(others, _PER_CENTRE * lists))
    known = np.zeros((len(others), _DIM), np.float16)
    for begin in range(0, len(others), _BANK):
        piece = describe(others[begin : begin + _BANK], 1)[:, 0]
        known[begin : begin + len(piece)] = piece
        index.add(piece)
        let_go(others)
    for start in range(0, len(thumbnails), _QUERIES):
        # each crop of an image, and its mirror image, against all whole images; the other way round, their crops ask for this one
        windows = describe(thumbnails[start : start + _QUERIES])  # [q, W, 64]
        queries = np.concatenate([windows, windows * mirror()], axis=1)  # [q, 2W, 64]
        _, where = index.search(queries.reshape(-1, _DIM), min(_ROUGH, len(others)))
        where = where.reshape(*queries.shape[:2], -1)  # [q, 2W, R]; -1 for none
        likeness = np.einsum("qwd,qwrd->qwr", queries, known[where].astype(np.float32))
        rows = np.arange(start, start + len(windows))[:, None, None]
        good = (likeness >= CANDIDATE_OF_MANY) & (where >= 0) & ((where != rows) | (bank is not None))
        pairs, values = np.stack([np.broadcast_to(rows, where.shape)[good], where[good]], axis=1), likeness[good]
        # of each image the best few: the surest first, then the first of each pair, then so many of each image
        pairs = pairs[np.argsort(-values, kind="stable")]
        pairs = pairs[np.sort(np.unique(pairs, axis=0, return_index=True)[1])]
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        begins = np.searchsorted(pairs[:, 0], pairs[:, 0])
        yield pairs[np.arange(len(pairs)) - begins < NEAREST]


def _spread(thumbnails: np.ndarray, count: int) -> np.ndarray:
    """float32 [about count, 64]: descriptions of images that lie as far apart in the set as they can. In pieces: thumbnails are 16 times as large."""
    chosen = np.arange(0, len(thumbnails), max(1, len(thumbnails) // count))
    found = []
    for begin in range(0, len(chosen), _BANK):
        found.append(describe(thumbnails[chosen[begin : begin + _BANK]], 1)[:, 0])
        let_go(thumbnails)
    return np.concatenate(found)


def let_go(array: np.ndarray) -> None:
    """Pages of a mapped file that were read stay with the process until it is told that they may go."""
    if isinstance(array, np.memmap) and (mapped := getattr(array, "_mmap", None)):
        mapped.madvise(mmap.MADV_DONTNEED)
