"""Parquet files of images: rows by number, labels and classes as the hub's data sets have them, damage named by file and row."""

import io
import json

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from shards import write_parquet, write_parquets

from ssl_locat.data.images.decode import decode_image, find_image, find_label
from ssl_locat.data.shards.check import check, show
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.parquet import ParquetDataset, open_parquet
from ssl_locat.data.shards.tar import Damage
from ssl_locat.data.stores.store import Store
from ssl_locat.errors import DataError

FEATURES = {"photo": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "text": {"dtype": "string"}}


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def rows(first: int, count: int) -> list[dict]:
    return [
        {"text": "x" * 50, "photo": {"bytes": png(first + i), "path": f"{first + i}.png"}, "kind": (first + i) % 2}
        for i in range(count)
    ]


@pytest.fixture
def hub(tmp_path) -> str:
    """A folder as `datasets` leaves it: two files of 25 and 10 rows, row groups of 10."""
    for number, (first, count) in enumerate([(0, 25), (25, 10)]):
        write_parquet(tmp_path / "set" / "data" / f"train-{number:05d}-of-00002.parquet", rows(first, count), 10, FEATURES)
    (tmp_path / "set" / "README.md").write_text("a data set")
    return str(tmp_path / "set")


def value(sample) -> int:
    return int(decode_image(find_image(sample.members))[0, 0, 0])


@pytest.mark.parametrize("spec", ["{}", "{}/data/train-*.parquet", "{}/data/train-{{00000..00001}}-of-00002.parquet"])
def test_rows_come_by_number_with_their_labels(hub, spec):
    dataset = open_dataset(spec.format(hub))
    assert isinstance(dataset, ParquetDataset) and len(dataset) == 35 and dataset.classes == ["cat", "dog"]
    samples = dataset.read(0, 35)
    assert [value(sample) for sample in samples] == list(range(35))
    assert [find_label(sample.members) for sample in samples] == [i % 2 for i in range(35)]
    # across row groups and files
    assert [value(sample) for sample in dataset.read(8, 28)] == list(range(8, 28))
    assert [(sample.key, sample.shard.rpartition("/")[2]) for sample in dataset.read(24, 26)] == [
        ("row 24", "train-00000-of-00002.parquet"), ("row 0", "train-00001-of-00002.parquet"),
    ]  # fmt: skip
    assert len(set(dataset.key_crcs().tolist())) == 35 and dataset.rows_per_read == 10
    assert "35 samples" in show(dataset) and check(f"{hub}/data/*.parquet").samples == 35


def test_only_the_columns_that_are_used_are_read(tmp_path):
    class Counting(Store):
        bytes_read = 0

        def read(self, url, start, end, stat=None):
            Counting.bytes_read += end - start
            return super().read(url, start, end, stat)

    many = [{"image": png(i % 250), "other": np.random.default_rng(i).bytes(20_000)} for i in range(60)]
    write_parquet(tmp_path / "a.parquet", many, 20)
    dataset = open_dataset(str(tmp_path / "a.parquet"), store=Counting())
    assert [value(sample) for sample in dataset.read(0, 60)] == [i % 250 for i in range(60)]
    assert Counting.bytes_read < 0.2 * (tmp_path / "a.parquet").stat().st_size


def test_a_store_in_memory(hub):
    with open(f"{hub}/data/train-00001-of-00002.parquet", "rb") as file:
        fsspec.filesystem("memory").pipe("/bucket/rows.parquet", file.read())
    dataset = open_dataset("memory://bucket/rows.parquet")
    assert dataset.remote and [value(sample) for sample in dataset.read(3, 6)] == [28, 29, 30]


def test_the_manifest_tells_another_set_and_not_another_place(hub, tmp_path):
    first = open_dataset(hub).manifest_hash
    (tmp_path / "moved").mkdir()
    (tmp_path / "set").rename(tmp_path / "moved" / "elsewhere")
    assert open_dataset(f"{tmp_path}/moved/elsewhere").manifest_hash == first
    write_parquet(tmp_path / "moved/elsewhere/data/train-00001-of-00002.parquet", rows(25, 11), 10, FEATURES)
    assert open_dataset(f"{tmp_path}/moved/elsewhere").manifest_hash != first


def test_damage_costs_its_row_group_alone_and_is_named_by_file_and_row(hub):
    path = f"{hub}/data/train-00000-of-00002.parquet"
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1)
    place = next(i for i in range(group.num_columns) if group.column(i).path_in_schema == "photo.bytes")
    with open(path, "r+b") as file:
        file.seek(group.column(place).data_page_offset)
        file.write(b"\xff" * 200)
    samples = open_dataset(hub).read(0, 35)
    damaged = [place for place, sample in enumerate(samples) if isinstance(sample, Damage)]
    assert damaged == list(range(10, 20)) and samples[10].key == "row 10" and "does not decode" in samples[10].reason
    assert samples[10].shard.endswith("train-00000-of-00002.parquet") and [value(samples[i]) for i in (9, 20)] == [9, 20]
    assert len(check(f"{hub}/data/*.parquet").damage) == 10


def test_a_row_without_an_image_is_damage_of_that_row(tmp_path):
    some = rows(0, 4)
    some[1]["photo"], some[2]["photo"] = None, {"bytes": None, "path": "elsewhere.png"}
    write_parquet(tmp_path / "a.parquet", some, 4, FEATURES)
    found = open_dataset(str(tmp_path / "a.parquet")).read(0, 4)
    assert [isinstance(sample, Damage) for sample in found] == [False, True, True, False]
    assert (
        found[1].reason == "no image in column photo"
        and "names elsewhere.png, which is not in the file, nor beside it" in found[2].reason
    )


def test_images_that_rows_only_name_are_read_from_beside_the_file(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    some = []
    for i in range(30):
        (tmp_path / "set" / "images" / f"{i}.png").write_bytes(png(i))
        some.append({"image": {"bytes": None, "path": f"images/{i}.png"}, "label": i % 3})
    paths = {3: "../secret.png", 4: "/etc/passwd", 5: "http://elsewhere/a.png", 6: "images/gone.png"}
    for place, path in paths.items():
        some[place]["image"]["path"] = path
    schema = pyarrow.schema(
        [("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])), ("label", pyarrow.int64())]
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some, schema), tmp_path / "set" / "a.parquet")
    dataset = open_dataset(f"{tmp_path}/set/a.parquet")
    samples = dataset.read(0, 30)
    damaged = {place: sample.reason for place, sample in enumerate(samples) if isinstance(sample, Damage)}
    assert list(damaged) == [3, 4, 5, 6] and "no place beside its file" in damaged[3] and "nor beside it" in damaged[6]
    assert [value(sample) for place, sample in enumerate(samples) if place not in damaged] == [0, 1, 2, *range(7, 30)]
    assert find_label(samples[7].members) == 1 and 50 < dataset.mean_bytes < 200  # of the images, not of the rows


def test_a_list_of_images_is_one_sample_of_several_members(tmp_path):
    lists = [{"images": [{"bytes": png(i), "path": "a.png"}, {"bytes": png(i + 1), "path": None}]} for i in range(3)]
    lists += [{"images": []}, {"images": [{"bytes": None, "path": "b.png"}]}]
    write_parquet(tmp_path / "a.parquet", lists, 10)
    found = open_dataset(str(tmp_path / "a.parquet")).read(0, 5)
    assert set(found[1].members) == {"0.png", "1.png"} and value(found[1]) == 1
    assert int(decode_image(find_image(found[1].members, "1.png"))[0, 0, 0]) == 2
    assert "empty list" in found[3].reason and "no image at place 0" in found[4].reason


def test_other_columns_are_members_where_metadata_is_asked_for(tmp_path):
    some = [
        {"image": png(i), "label": i, "site": f"ward {i}", "age": 40.5 + i, "mask": {"bytes": png(7), "path": None}}
        for i in range(4)
    ]
    write_parquet(tmp_path / "a.parquet", some, 4)
    store = Store()
    plain, whole = (
        open_parquet("a", store, store.expand(str(tmp_path / "a.parquet")), metadata=metadata).read(2, 3)[0]
        for metadata in (False, True)
    )
    assert set(plain.members) == {"png", "cls"} and set(whole.members) == {"png", "cls", "json", "mask.png"}
    assert json.loads(whole.members["json"]) == {"site": "ward 2", "age": 42.5} and value(whole) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b"PAR1 and no more"), "is no Parquet file that can be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "is no Parquet file that can be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\xff\xff\xff\x7fPAR1"), "footer says that it has"),
        (lambda path: write_parquet(path, [{"a": 1, "b": b"x", "c": b"y"}], 1), "no column of images among a, b, c"),
        (lambda path: write_parquet(path, [{"image": b"x", "label": 3}], 1), "files of one set have the same columns"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(hub, tmp_path, make, says):
    from pathlib import Path

    make(Path(hub) / "data" / "train-00001-of-00002.parquet")
    with pytest.raises(DataError, match=says):
        open_dataset(hub)


def test_flipped_bytes_are_damage_or_decode(tmp_path):
    data = write_parquets(tmp_path / "set", [40])
    path = tmp_path / "set" / "000.parquet"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(whole)
        for at in rng.integers(0, len(whole), 4):
            broken[at] = rng.integers(256)
        path.write_bytes(bytes(broken))
        try:
            dataset = open_dataset(data)
        except DataError:
            continue
        assert len(dataset.read(0, len(dataset))) == len(dataset)
