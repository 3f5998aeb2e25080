"""Planted duplicates are found, and different pictures are not accused: on real photographs, tiles and cells."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from ssl_locat.data.images.decode import decode_image
from ssl_locat.data.images.likeness import alignment, thumbnail
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.stream import duplicates as duplicates_module
from ssl_locat.data.stream.duplicates import Looks, duplicates, look_at, picture_of


def recompressed(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=50)
    return decode_image(stream.getvalue())


def cropped(image, rng):
    height, width = (round(0.9 * side) for side in image.shape[:2])
    top, left = (rng.integers(0, whole - part + 1) for whole, part in zip(image.shape[:2], (height, width), strict=True))
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def grey(image):
    return np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)


def altered(image, rng):
    """Each way by itself, then all of them."""
    half = tuple(side // 2 for side in image.shape[1::-1])
    yield recompressed(image)
    yield cropped(image, rng)
    yield np.ascontiguousarray(image[:, ::-1])
    yield cv2.resize(image, half, interpolation=cv2.INTER_AREA)
    yield grey(image)
    yield recompressed(cv2.resize(grey(cropped(image, rng)[:, ::-1]), half, interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize(
    ("pattern", "found"),
    # flat fields and water, at 32 px and JPEG 50, are nothing but noise: such tiles cannot be told, and are not accused
    [
        ("imagenette128/imagenette128-val-*.tar", 0.99),
        ("pbc_blood/pbc_blood-test-*.tar", 0.99),
        ("eurosat_rgb/eurosat_rgb-test-*.tar", 0.9),
    ],
)
def test_planted_duplicates_are_found_and_others_not_accused(shared_data, pattern, found):
    folder, _, name = pattern.partition("/")
    dataset = open_dataset(f"{shared_data(folder)}/{name}")
    images = [decode_image(raw.members["jpg"]) for raw in dataset.read(0, 240)]
    rng = np.random.default_rng(0)
    planted = [(number, picture) for number in range(40) for picture in altered(images[number], rng)]
    thumbnails = np.stack([thumbnail(picture) for _, picture in planted])
    test = Looks(thumbnails, np.arange(1, len(planted) + 1, dtype=np.uint64))
    train = look_at(dataset, "test", workers=0)
    pairs = duplicates(test, train)
    right = {pair.first for pair in pairs if pair.second == planted[pair.first][0]}
    assert len(right) / len(planted) >= found
    assert sum(pair.second != planted[pair.first][0] for pair in pairs) <= 1


def test_arrays_and_bands_are_looked_at_too(shared_data):
    """Twelve bands of 16 bits, in either order of axes, and the same patch from a TIFF; heights in metres."""
    folder = shared_data("s2_12band_sample")
    dataset = open_dataset(f"{folder}")
    looks = look_at(dataset, "tiles", workers=0)
    names = [dataset.read(number, number + 1)[0].key for number in range(len(dataset))]
    assert (looks.thumbnails.reshape(len(looks), -1).std(1) > 5).all()
    pair = next(pair for pair in duplicates(looks))
    assert {names[pair.first], names[pair.second]} == {"patch_120x120x12_contig", "patch_12x120x120_planar"}
    rng = np.random.default_rng(0)
    heights = (3000 + 500 * cv2.resize(rng.random((6, 6)), (64, 64), interpolation=cv2.INTER_CUBIC)).astype(np.float32)
    cube = np.stack([heights, heights**1.1, heights + rng.random((64, 64))]).astype(np.float32)  # [3, 64, 64]
    pictures = []
    for values in (heights, cube.transpose(1, 2, 0), cube):
        stream = io.BytesIO()
        np.save(stream, np.ascontiguousarray(values))
        pictures.append(thumbnail(picture_of(stream.getvalue())))
    assert alignment(np.stack(pictures[:2]), np.stack(pictures[1:])).min() > 0.97


def test_equal_bytes_are_found_however_flat_and_a_set_is_searched_within_itself(shared_data):
    dataset = open_dataset(f"{shared_data('eurosat_rgb')}/eurosat_rgb-test-*.tar")
    looks = look_at(dataset, "test", workers=0)
    twice = Looks(np.concatenate([looks.thumbnails, looks.thumbnails[7:9]]), np.concatenate([looks.digests, looks.digests[7:9]]))
    pairs = duplicates(twice)
    assert {(7, 500), (8, 501)} <= {pair[:2] for pair in pairs if pair.likeness == 1}
    assert all(pair.first < pair.second for pair in pairs) and len(pairs) <= 4
    flat = Looks(np.full((2, 32, 32), 9, np.uint8), np.array([5, 6], np.uint64))
    assert duplicates(flat) == []


def test_the_search_of_millions_finds_what_the_search_of_thousands_does(shared_data, monkeypatch):
    pytest.importorskip("faiss")
    dataset = open_dataset(f"{shared_data('imagenette128')}/imagenette128-val-*.tar")
    rng = np.random.default_rng(1)
    images = [decode_image(raw.members["jpg"]) for raw in dataset.read(0, 30)]
    looks = look_at(dataset, "val", workers=0)
    planted = np.stack([thumbnail(picture) for image in images for picture in altered(image, rng)])
    both = Looks(np.concatenate([looks.thumbnails, planted]), np.arange(1, len(looks) + len(planted) + 1, dtype=np.uint64))
    monkeypatch.setattr(duplicates_module, "MOST_PAIRS", 0)
    pairs = {pair[:2] for pair in duplicates(both)}
    right = {(number // 6, len(looks) + number) for number in range(len(planted))}
    # the copies of one image are like each other, too, and only the best few of each are aligned: all hang together
    reached = {second for first, second in pairs if second >= len(looks)} | {first for first, _ in pairs if first >= len(looks)}
    assert len(reached) >= 0.97 * len(right), (len(reached), len(right))  # a crop may fall below the surer candidates
