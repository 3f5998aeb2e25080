"""Large TIFFs as shards of windows: pixel by pixel what the file holds, by the bytes of the tiles that a window touches, and nothing whole."""

import io
import tracemalloc

import numpy as np
import pytest
import tifffile
from servers import range_server
from shards import as_list, fingerprint

from ssl_locat.config.data_section import Data
from ssl_locat.data.images.bands import Bands
from ssl_locat.data.images.decode import decode_image, find_image
from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.shards.tar import Damage
from ssl_locat.data.stores.store import Store
from ssl_locat.data.stream.plan import choose_plan
from ssl_locat.data.stream.stream import TrainStream
from ssl_locat.errors import ConfigError, DataError

WIDTH, HEIGHT = 200, 150


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def values(bands: int, kind: str, seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """[H, W, bands]: smooth, so that JPEG keeps it nearly; every pixel another one."""
    y, x = np.mgrid[:height, :width]
    found = np.stack([(x * (b + 1) + y * 2 + seed) % 251 for b in range(bands)], axis=2)
    return (found * (200 if kind != "uint8" else 1)).astype(kind)


def windows(spec: dict, store: Store | None = None):
    (dataset,), _ = open_mix(spec, store=store)
    return dataset


def content(sample) -> np.ndarray:
    if "npy" in sample.members:
        return np.load(io.BytesIO(sample.members["npy"]))
    found = tifffile.imread(io.BytesIO(sample.members["tif"]))
    return found if found.ndim == 3 else found[..., None]


def place(key: str) -> tuple[int, int]:
    x, y, *_ = key.replace(",", "").split()[1::2]
    return int(x), int(y)


FILES = {
    "tiled": {"tile": (32, 48)},
    "deflate": {"tile": (64, 64), "compression": "zlib", "predictor": True},
    "lzw big-endian": {"tile": (32, 32), "compression": "lzw", "byteorder": ">"},
    "zstd planar": {"tile": (32, 32), "compression": "zstd", "planarconfig": "separate"},
    "BigTIFF": {"tile": (32, 32), "bigtiff": True},
    "strips": {"rowsperstrip": 16, "compression": "zlib"},
    "JPEG 2000": {"tile": (32, 32), "compression": "jpeg2000", "compressionargs": {"reversible": True, "level": 0}},
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(("bands", "number"), [(3, "uint8"), (1, "uint16"), (5, "int16")])
def test_windows_are_the_files_pixels(tmp_path, kind, bands, number):
    options = dict(FILES[kind])
    if kind == "JPEG 2000" and number != "uint8":
        pytest.skip("JPEG 2000 of slides has 8 bits and 3 bands")
    if bands == 1:
        options.pop("planarconfig", None)
    image = values(bands, number)
    photometric = "rgb" if bands == 3 else "minisblack"
    contig = {"planarconfig": "contig", **options} if bands > 1 else options
    written = image if bands > 1 else image[..., 0]
    written = np.moveaxis(image, 2, 0) if contig.get("planarconfig") == "separate" else written
    tifffile.imwrite(tmp_path / "a.tif", written, photometric=photometric, metadata=None, **contig)
    dataset = windows({"raster": str(tmp_path / "a.tif"), "size": 40, "stride": 30})
    assert len(dataset) == 6 * 4
    seen = set()
    for sample in dataset.read(0, len(dataset)):
        assert not isinstance(sample, Damage), sample
        x, y = place(sample.key)
        np.testing.assert_array_equal(content(sample), image[y : y + 40, x : x + 40])
        assert content(sample).dtype == number and sample.shard.endswith("a.tif")
        seen.add((x, y))
    assert seen == {(x, y) for x in range(0, 161, 30) for y in range(0, 111, 30)}


def write_pyramid(path, kind: str, image: np.ndarray, **options) -> None:
    with tifffile.TiffWriter(path, bigtiff=kind == "OME") as file:
        common = {"tile": (32, 32), "photometric": "rgb", **options}
        if kind == "OME":
            file.write(image, subifds=2, metadata={"axes": "YXS"}, **common)
            for step in (2, 4):
                file.write(image[::step, ::step], subfiletype=1, metadata=None, **common)
        elif kind == "GeoTIFF":  # overviews are reduced pages
            file.write(image, metadata=None, **common)
            for step in (2, 4):
                file.write(image[::step, ::step], subfiletype=1, metadata=None, **common)
        else:  # Aperio's: a thumbnail in strips, the levels as further pages, a label
            file.write(image, description="Aperio Image Library", metadata=None, **common)
            file.write(image[::8, ::8], photometric="rgb", metadata=None)
            for step in (2, 4):
                file.write(image[::step, ::step], metadata=None, **common)
            file.write(image[:40, :90], photometric="rgb", subfiletype=1, metadata=None)


@pytest.mark.parametrize("kind", ["OME", "SVS", "GeoTIFF"])
def test_levels_of_a_pyramid(tmp_path, kind):
    image = values(3, "uint8")
    write_pyramid(tmp_path / "a.tif", kind, image)
    for level, step in ((0, 1), (1, 2), (2, 4)):
        dataset = windows({"raster": str(tmp_path / "*.tif"), "size": 16, "level": level})
        small = image[::step, ::step]
        assert len(dataset) == (small.shape[0] // 16) * (small.shape[1] // 16)
        sample = dataset.read(5, 6)[0]
        x, y = place(sample.key)
        np.testing.assert_array_equal(content(sample), small[y : y + 16, x : x + 16])
        assert ("level" in sample.key) == (level > 0)
    with pytest.raises(DataError, match=r"has no level 3; it has 0: 200 x 150, 1: 100 x 75, 2: 50 x 38"):
        windows({"raster": str(tmp_path / "a.tif"), "size": 16, "level": 3})


def test_jpeg_tiles_with_shared_tables(tmp_path):
    image = values(3, "uint8")
    tifffile.imwrite(
        tmp_path / "a.tif",
        image,
        tile=(32, 32),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 95},
        metadata=None,
    )
    dataset = windows({"raster": str(tmp_path / "a.tif"), "size": 50})
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        whole = file.pages[0].asarray()
    for sample in dataset.read(0, len(dataset)):
        x, y = place(sample.key)
        np.testing.assert_array_equal(content(sample), whole[y : y + 50, x : x + 50])
        assert decode_image(find_image(sample.members)).shape == (50, 50, 3)


def test_bands_as_pages_names_and_no_data_reach_the_decoder(tmp_path):
    image = values(4, "uint16")
    image[:80, :80] = 7
    names = "".join(f'<Item name="DESCRIPTION" sample="{b}" role="description">B{b}</Item>' for b in range(4))
    tags = [(42112, "s", 0, f"<GDALMetadata>{names}</GDALMetadata>", True), (42113, "s", 0, "7", True)]
    tifffile.imwrite(
        tmp_path / "a.tif", image, tile=(32, 32), photometric="minisblack", planarconfig="contig", extratags=tags, metadata=None
    )
    spec = {"raster": str(tmp_path / "a.tif"), "size": 40}
    dataset = windows({**spec, "min_data": 0.5})
    whole = windows(spec)
    assert len(whole) - len(dataset) == 4 and {place(s.key) for s in dataset.read(0, len(dataset))}.isdisjoint(
        {(0, 0), (40, 0), (0, 40), (40, 40)}
    )
    bands = Bands((0.0,) * 2, (65535.0,) * 2, (0.5,) * 2, pick=("B3", "B1"))
    sample = next(s for s in dataset.read(0, len(dataset)) if place(s.key) == (80, 80))
    np.testing.assert_allclose(
        decode_image(find_image(sample.members), channels=bands), image[80:120, 80:120, [3, 1]] / 257, rtol=1e-5
    )
    pages = np.moveaxis(image, 2, 0)
    tifffile.imwrite(tmp_path / "b.tif", pages, tile=(32, 32), photometric="minisblack", planarconfig=None, metadata=None)
    paged = windows({"raster": str(tmp_path / "b.tif"), "size": 40})
    sample = paged.read(3, 4)[0]
    x, y = place(sample.key)
    np.testing.assert_array_equal(content(sample), image[y : y + 40, x : x + 40])


def test_windows_without_tissue_are_left_out_and_the_pyramid_tells_it(tmp_path):
    slide = np.full((256, 512, 3), 240, np.uint8)
    slide[:, :128] = (200, 90, 160)  # eosin; ink beside it
    slide[:, 384:] = (12, 12, 12)
    write_pyramid(tmp_path / "a.tif", "SVS", slide)
    spec = {"raster": str(tmp_path / "a.tif"), "size": 64}
    assert len(windows(spec)) == 8 * 4
    kept = windows({**spec, "min_tissue": 0.5})
    assert {place(s.key) for s in kept.read(0, len(kept))} == {(x, y) for x in (0, 64) for y in (0, 64, 128, 192)}
    half = windows({**spec, "stride": 32, "min_tissue": 0.4})
    assert max(place(s.key)[0] for s in half.read(0, len(half))) == 96
    with pytest.raises(DataError, match="none of 1 file"):
        windows({**spec, "size": 128, "stride": 96, "min_tissue": 1.0, "level": 2})
    tifffile.imwrite(tmp_path / "b.tif", values(5, "uint16"), tile=(32, 32), photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match="min_tissue is for stained slides"):
        windows({"raster": str(tmp_path / "b.tif"), "size": 32, "min_tissue": 0.1})


def test_a_window_costs_the_bytes_of_its_tiles_and_the_index_is_made_once(tmp_path):
    """A slide of 2048 x 2048 in tiles of 128, over HTTP; raw, so that bytes can be counted by hand."""
    image = values(3, "uint8", height=2048, width=2048)
    (tmp_path / "root").mkdir()
    tifffile.imwrite(tmp_path / "root" / "a.tif", image, tile=(128, 128), photometric="rgb", metadata=None)
    tile = 128 * 128 * 3
    with range_server(tmp_path / "root") as (url, log):
        spec = {"raster": f"{url}/a.tif", "size": 128}
        dataset = windows(spec, Store(20, 10))
        assert sum(count for _, count in log) < 600_000 < 0.05 * image.nbytes  # the header, in blocks of 256 kB
        assert dataset.mean_bytes == tile and len(dataset) == 256
        log.clear()
        for count in (1, 16):
            assert len(dataset.read(32, 32 + count)) == count
            assert sum(size for _, size in log) == count * tile and len(log) == 1  # a row of tiles by one request
            log.clear()
        shifted = windows({**spec, "stride": 100}, Store(20, 10))
        log.clear()
        shifted.read(21, 22)  # inside four tiles, of two rows
        assert sum(size for _, size in log) == 4 * tile and len(log) == 2
        log.clear()
        assert windows(spec, Store(20, 10)).manifest_hash == dataset.manifest_hash != shifted.manifest_hash
        assert sum(size for _, size in log) <= 2  # the file's size; nothing else is asked again
    local = windows({**spec, "raster": str(tmp_path / "root" / "a.tif")})
    tracemalloc.start()
    for start in range(0, 64, 8):
        local.read(start, start + 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # each window some times over, as bytes, pixels and their copies; not the file
    assert peak < 6 * 8 * tile < image.nbytes / 4


def test_windows_obey_the_plan_and_mix_with_tars(tmp_path):
    from shards import write_shards

    for number in range(3):
        tifffile.imwrite(tmp_path / f"{number}.tif", values(3, "uint8", number), tile=(32, 32), photometric="rgb", metadata=None)
    tars = write_shards(tmp_path / "tars", [40, 40])
    spec = [{"raster": f"{tmp_path}/*.tif", "size": 16, "weight": 3.0}, {"shards": tars}]

    def stream(workers: int, world: int) -> dict:
        datasets, weights = open_mix(spec)
        plan = choose_plan(datasets, weights, 3, 24)
        found = {}
        for rank in range(world):
            options = {"start_samples": 0, "global_batch_size": 24, "workers": workers, "rank": rank, "world_size": world}
            with TrainStream(datasets, plan, fingerprint, as_list, **options) as batches:
                for _, batch in zip(range(10), batches, strict=False):
                    found |= dict(zip(batch.positions.tolist(), batch.payload, strict=True))
        return found

    expected = stream(0, 1)
    assert stream(1, 2) == expected and len({crc for _, crc, _ in expected.values()}) > 200
    assert any(key.startswith("x ") for key, _, _ in expected.values()) and any(
        not key.startswith("x ") for key, _, _ in expected.values()
    )


def test_a_damaged_tile_is_named_by_file_and_window(tmp_path):
    image = values(3, "uint8")
    for name, options in {"zlib": {"compression": "zlib"}, "jpeg": {"compression": "jpeg"}}.items():
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, image, tile=(32, 32), photometric="rgb", metadata=None, **options)
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            # the second tile of the second row; the fourth of the fourth
            at, length, last = page.dataoffsets[8], page.databytecounts[8], page.dataoffsets[24]
        data = bytearray(path.read_bytes())
        data[at + length // 2 : at + length] = b"\x55" * (length - length // 2)
        path.write_bytes(bytes(data))
        dataset = windows({"raster": str(path), "size": 32})
        (damage,) = [sample for sample in dataset.read(0, len(dataset)) if isinstance(sample, Damage)]
        assert damage.key == "x 32, y 32, 32 px" and damage.shard == str(path) and "tile" in damage.reason
    # cut after it was indexed: the windows whose tiles are gone, and no others
    with open(path, "r+b") as file:
        file.truncate(last)
    broken = [sample.key for sample in dataset.read(0, len(dataset)) if isinstance(sample, Damage)]
    assert broken == ["x 32, y 32, 32 px", *(f"x {x}, y 96, 32 px" for x in (96, 128, 160))]


def tile_bomb(path) -> None:
    """A JPEG tile whose own header claims 60000 x 60000 pixels."""
    tifffile.imwrite(path, values(3, "uint8"), tile=(32, 32), photometric="rgb", compression="jpeg", metadata=None)
    data = path.read_bytes().replace(b"\xff\xc0\x00\x11\x08\x00\x20\x00\x20", b"\xff\xc0\x00\x11\x08\xea\x60\xea\x60")
    path.write_bytes(data)


def test_a_tile_that_claims_more_than_its_place_is_damage(tmp_path):
    tile_bomb(tmp_path / "a.tif")
    dataset = windows({"raster": str(tmp_path / "a.tif"), "size": 32})
    found = dataset.read(0, 3)
    assert all("60000 x 60000" in sample.reason for sample in found)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b"II\x2a\x00 and no more"), "a TIFF without an image"),
        (lambda path: path.write_bytes(b"a text"), "no TIFF that can be read"),
        (lambda path: tifffile.imwrite(path, values(1, "uint8").astype(np.complex64), photometric="minisblack"), "complex64|bits a value"),
        (lambda path: tifffile.imwrite(path, np.zeros((64, 64), np.uint8), photometric="miniswhite"), "inverted greys"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_says_why(tmp_path, make, says):
    make(tmp_path / "a.tif")
    with pytest.raises(DataError, match=says):
        windows({"raster": str(tmp_path / "a.tif"), "size": 16})


def test_fuzzed_headers_are_refused_or_give_damage(tmp_path):
    tifffile.imwrite(
        tmp_path / "whole.tif", values(3, "uint8", height=64, width=64), tile=(32, 32), photometric="rgb", metadata=None
    )
    whole, rng = (tmp_path / "whole.tif").read_bytes(), np.random.default_rng(0)
    for number in range(60):
        broken = bytearray(whole)
        for at in rng.integers(0, 400, 3):
            broken[at] = rng.integers(256)
        (tmp_path / f"{number}.tif").write_bytes(bytes(broken))
        try:
            dataset = windows({"raster": str(tmp_path / f"{number}.tif"), "size": 16}, Store(2, 2))
        except DataError:
            continue
        assert len(dataset.read(0, min(8, len(dataset)))) == min(8, len(dataset))


@pytest.mark.parametrize("name", ["patch_120x120x12_contig", "patch_12x120x120_planar", "tile0_64x64x12"])
def test_windows_of_a_real_satellite_image(name, shared_data):
    path = shared_data("s2_12band_sample") / f"{name}.tif"
    dataset = windows({"raster": str(path), "size": 32, "stride": 24})
    image = tifffile.imread(path)
    image = np.moveaxis(image, 0, 2) if image.shape[0] == 12 else image
    assert len(dataset) == ((image.shape[0] - 32) // 24 + 1) ** 2
    for sample in dataset.read(0, len(dataset)):
        x, y = place(sample.key)
        np.testing.assert_array_equal(content(sample), image[y : y + 32, x : x + 32])


def test_the_yaml_knows_windows():
    data = Data.model_validate({"train": {"raster": "slides/*.tif", "size": 256, "min_tissue": 0.1}})
    assert data.model_dump()["train"]["min_tissue"] == 0.1
    mixed = Data.model_validate({"train": [{"shards": "a/*.tar"}, {"raster": "b.tif", "size": 64, "weight": 2}]})
    assert [type(part).__name__ for part in mixed.train] == ["WeightedShards", "RasterWindows"]
    with pytest.raises(ConfigError, match="nor"):
        open_mix({"raster": "a.tif", "sise": 3})
