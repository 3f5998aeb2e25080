"""`shards pack` of everything that is read as data: every sample comes out byte by byte, with its type, its bands and its other members."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from servers import range_server
from shards import write_parquet

from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.pack import pack
from ssl_locat.errors import DataError

COUNT = 12


def npy(number: int) -> bytes:
    """A 16-bit image of 5 bands."""
    out = io.BytesIO()
    np.save(out, np.random.default_rng(number).integers(0, 65535, (6, 4, 5)).astype(np.uint16))
    return out.getvalue()


def members(number: int) -> dict[str, bytes]:
    return {"npy": npy(number), "cls": b"%d" % (number % 3), "json": json.dumps({"site": f"ward {number}"}).encode()}


def as_folder(path):
    path.mkdir()
    for number in range(COUNT):
        (path / f"{number:03d}.npy").write_bytes(npy(number))
    return str(path)


def as_tar(path):
    with tarfile.open(path.with_suffix(".tar"), "w") as archive:
        for number in range(COUNT):
            for ending, content in members(number).items():
                info = tarfile.TarInfo(f"{number:03d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return str(path.with_suffix(".tar"))


def as_zip(path):
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(COUNT):
            for ending, content in members(number).items():
                archive.writestr(f"{number:03d}.{ending}", content)
    return str(path.with_suffix(".zip"))


def as_parquet(path):
    rows = [{"image": npy(n), "label": n % 3, "site": f"ward {n}"} for n in range(COUNT)]
    return str(write_parquet(path.with_suffix(".parquet"), rows, 5))


def as_repository(path):
    path.mkdir()
    (path / "README.md").write_text("a data set")
    for name, numbers in (("train", range(COUNT)), ("test", range(3))):
        rows = [{"image": npy(n), "label": n % 3, "site": f"ward {n}"} for n in numbers]
        write_parquet(path / "data" / f"{name}-00000-of-00001.parquet", rows, 5)
    return str(path)


@pytest.mark.parametrize("make", [as_folder, as_tar, as_zip, as_parquet, as_repository])
def test_what_is_packed_comes_out_byte_by_byte(tmp_path, make):
    source = make(tmp_path / "source")
    options = {"split": "train"} if make is as_repository else {}
    result = pack(source, tmp_path / "out", workers=1, **options)
    assert (result["samples"], result["skipped"]) == (COUNT, 0)
    found = open_dataset(f"{tmp_path}/out/*.tar").read(0, COUNT)
    expected = {(n if make is as_folder else members(n)["cls"], npy(n)) for n in range(COUNT)}
    if make is as_folder:
        assert {sample.members["npy"] for sample in found} == {content for _, content in expected}
    else:
        as_set = {tuple(sorted((name, content) for name, content in sample.members.items())) for sample in found}
        assert as_set == {tuple(sorted(members(n).items())) for n in range(COUNT)}
    assert len({sample.key for sample in found}) == COUNT and not (tmp_path / "out" / ".unpacked").exists()
    origins = (tmp_path / "out" / "files.tsv").read_text().splitlines()
    assert len(origins) == COUNT
    if make is as_parquet:
        assert any(line.endswith("source.parquet: row 7") for line in origins)
    # the same again is nothing to do
    assert pack(source, tmp_path / "out", workers=1, **options)["samples"] == COUNT


def test_a_url_is_packed_and_a_damaged_sample_is_listed(tmp_path):
    (tmp_path / "root").mkdir()
    path = Path(as_zip(tmp_path / "root" / "source"))
    data = bytearray(path.read_bytes())
    data[40:44] = b"\xff" * 4
    path.write_bytes(bytes(data))
    with range_server(tmp_path / "root") as (url, _):
        result = pack(f"{url}/source.zip", tmp_path / "out", workers=1)
    assert result["samples"] == COUNT - 1 and result["ignored"] == 1
    (line,) = (tmp_path / "out" / "damaged.txt").read_text().splitlines()
    assert "source.zip: 000: npy:" in line


def test_class_folders_of_a_zip_keep_their_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(6):
            archive.writestr(f"set/{'cat' if number < 3 else 'dog'}/{number}.npy", npy(number))
    result = pack(str(tmp_path / "a.zip"), tmp_path / "out", workers=1)
    assert result["classes"] == ["cat", "dog"]
    assert sorted(sample.members["cls"] for sample in open_dataset(f"{tmp_path}/out/*.tar").read(0, 6)) == [b"0"] * 3 + [b"1"] * 3
    with pytest.raises(DataError, match="does not exist"):
        pack(str(tmp_path / "b.zip"), tmp_path / "other", workers=1)
