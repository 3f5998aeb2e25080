"""Shards that this package writes, read by the readers that others have: webdataset's, timm's and Hugging Face `datasets`'."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from ssl_locat.data.shards.pack import pack, write_shard
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of six photographs, packed into shards of some of them."""
    source, out = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("shards")
    for label, name in enumerate(["cat", "dog"]):
        (source / name).mkdir()
        for index in range(6):
            pixels = np.random.default_rng(10 * label + index).integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(source / name / f"{index}.jpg")
    pack(str(source), out, workers=1, max_shard_mb=0.015)
    assert len(list(out.glob("*.tar"))) > 2
    return source, out


def expected(source) -> dict[str, tuple[bytes, int]]:
    """key -> (file, class)"""
    return {
        f"{path.parent.name}_{path.stem}": (path.read_bytes(), ["cat", "dog"].index(path.parent.name))
        for path in source.glob("*/*.jpg")
    }


def test_webdataset_reads_them(folder):
    import webdataset

    source, out = folder
    shards = sorted(map(str, out.glob("*.tar")))
    pipeline = webdataset.DataPipeline(webdataset.SimpleShardList(shards), webdataset.tarfile_to_samples())
    assert {s["__key__"]: (s["jpg"], int(s["cls"])) for s in pipeline} == expected(source)


def test_timm_reads_them(folder):
    from timm.data.readers.reader_wds import ReaderWds

    source, out = folder
    last = len(list(out.glob("*.tar"))) - 1
    reader = ReaderWds(str(out), split=f"shard-{{000000..{last:06d}}}.tar|12")
    found = [(np.asarray(image).tobytes(), target) for image, target in reader]
    decoded = [(np.asarray(Image.open(io.BytesIO(data))).tobytes(), label) for data, label in expected(source).values()]
    assert sorted(found) == sorted(decoded) and len(reader) == 12


def test_hugging_face_datasets_read_them(folder, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets package is not installed: pip install 'ssl_locat[dev]'")
    source, out = folder
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": sorted(map(str, out.glob("*.tar")))}, split="train", cache_dir=tmp_path, streaming=True
    )
    rows = list(loaded)
    assert {row["__key__"]: row["cls"] for row in rows} == {key: label for key, (_, label) in expected(source).items()}
    assert all(np.asarray(row["jpg"]).shape == (40, 48, 3) for row in rows)


def test_the_same_samples_give_the_same_bytes(tmp_path, monkeypatch):
    """Whatever the clock, the user and the order of a sample's members: no owner, time 0."""
    sample = {"jpg": b"\xff\xd8", "cls": b"1", "_note": b"kept", "seg.png": b"\x89PNG"}
    write_shard(tmp_path / "a.tar", [("x", sample), ("a" * 150, {"cls": b"2"}), ("ä", {"cls": b"3"})])
    monkeypatch.setattr("time.time", lambda: 9e9)
    monkeypatch.setenv("USER", "somebody")
    write_shard(tmp_path / "b.tar", [("x", dict(reversed(sample.items()))), ("a" * 150, {"cls": b"2"}), ("ä", {"cls": b"3"})])
    written = (tmp_path / "a.tar").read_bytes()
    assert written == (tmp_path / "b.tar").read_bytes()
    # for all machines and releases: shards are compared and cached by their bytes
    assert hashlib.sha256(written).hexdigest() == GOLDEN


GOLDEN = "0b4247766e2f2784f0b7bafc304b36512eafe53d121a4716ea52757bcf551fcb"


def test_the_made_image_set_is_read_by_webdataset_too(tmp_path):
    import webdataset

    made = make_textures(tmp_path / "t", num_train=20, num_test=0, image_size=32, progress=False)
    urls = sorted(map(str, tmp_path.glob("t/*train*.tar")))
    assert made["num_classes"] == 10
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 20 and {sample["jpg"].shape for sample in samples} == {(32, 32, 3)}
    assert sorted(sample["cls"] for sample in samples) == sorted([*range(10)] * 2)


@pytest.mark.parametrize("extension", ["", "__key__"])
def test_an_extension_that_webdataset_cannot_tell_from_its_own_is_refused(tmp_path, extension):
    with pytest.raises(DataError, match=r"x\..*cannot have the extension .*rename it"):
        write_shard(tmp_path / "a.tar", [("x", {extension: b"1"})])
    assert list(tmp_path.iterdir()) == []
