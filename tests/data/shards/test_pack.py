"""Packing: whatever lies in folders or archives comes out as shards, once each, and an interrupted packing goes on."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from ssl_locat.data.images.decode import decode_image, decode_mask, find_label
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.pack import pack, pack_command, write_shard
from ssl_locat.errors import DataError, UserError


def png(number: int, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_class_folders(folder, per_class: int = 4) -> None:
    for label, name in enumerate(["cat", "dog"]):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            (folder / name / f"a.{index}.png").write_bytes(png(label * 100 + index))


def packed(out) -> dict[int, dict[str, bytes]]:
    """Red value of the image -> members, read back by the stream's own reader."""
    samples = open_dataset(str(out / "shard-*.tar"))
    rows = samples.read(0, len(samples))
    found = {}
    for row in rows:
        image = next(data for name, data in row.members.items() if name in ("png", "jpg"))
        found[int(decode_image(image)[0, 0, 0])] = row.members | {"key": row.key}
    assert len(found) == len(rows)
    return found


def test_class_folders_keep_every_image_and_its_class(tmp_path):
    write_class_folders(tmp_path / "in")
    (tmp_path / "in" / "dog" / "notes.txt").write_text("no image")
    result = pack(str(tmp_path / "in"), tmp_path / "out", workers=1)
    assert result["samples"] == 8 and result["classes"] == ["cat", "dog"] and result["ignored"] == 1
    samples = packed(tmp_path / "out")
    assert {red: find_label(members) for red, members in samples.items()} == {
        **dict.fromkeys(range(4), 0),
        **{100 + index: 1 for index in range(4)},
    }
    assert samples[101]["png"] == png(101)  # bytes are copied, not re-encoded
    assert samples[101]["key"] == "dog_a_1"


def test_plain_folder_has_no_labels_and_equal_stems_stay_two_samples(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(1))
    (tmp_path / "in" / "a.PNG").write_bytes(png(2))
    pack(str(tmp_path / "in"), tmp_path / "out", workers=1)
    assert all("cls" not in members for members in packed(tmp_path / "out").values())


def test_tar_of_tars_as_imagenet_is_shipped(tmp_path):
    inner = {f"n0{c}.tar": tar({f"n0{c}_{i}.png": png(c * 100 + i) for i in range(3)}) for c in range(2)}
    (tmp_path / "train.tar").write_bytes(tar(inner))
    result = pack(str(tmp_path / "train.tar"), tmp_path / "out", workers=1)
    assert result["classes"] == ["n00", "n01"]
    samples = packed(tmp_path / "out")
    assert {red: find_label(members) for red, members in samples.items()} == {c * 100 + i: c for c in range(2) for i in range(3)}


def test_compressed_shards_are_repacked_with_all_their_members(tmp_path):
    members = {}
    for index in range(5):
        members |= {f"{index:03d}.png": png(index), f"{index:03d}.cls": b"7", f"{index:03d}.json": b"{}"}
    (tmp_path / "a.tar.gz").write_bytes(tar(members, "w:gz"))
    pack(str(tmp_path / "*.tar.gz"), tmp_path / "out", workers=1)
    samples = packed(tmp_path / "out")
    assert sorted(samples) == list(range(5))
    assert all(find_label(m) == 7 and m["json"] == b"{}" for m in samples.values())
    assert not (tmp_path / "out" / ".unpacked").exists()


def test_shards_keep_their_size_and_hold_mixed_classes(tmp_path):
    write_class_folders(tmp_path / "in", per_class=30)
    result = pack(str(tmp_path / "in"), tmp_path / "out", max_shard_mb=0.02, workers=2)
    shards = sorted((tmp_path / "out").glob("shard-*.tar"))
    assert result["shards"] == len(shards) > 2 and all(shard.stat().st_size < 60_000 for shard in shards)
    for shard in shards[:-1]:
        samples = open_dataset(str(shard))
        assert {find_label(row.members) for row in samples.read(0, len(samples))} == {0, 1}
    assert len(packed(tmp_path / "out")) == 60


def test_an_interrupted_packing_resumes_and_gives_the_same_shards(tmp_path):
    write_class_folders(tmp_path / "in", per_class=30)
    pack(str(tmp_path / "in"), tmp_path / "out", max_shard_mb=0.02, workers=1)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("shard-*.tar")}
    kept = tmp_path / "out" / "shard-000000.tar"
    before = kept.stat().st_mtime_ns
    for name in sorted(whole)[1:]:
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / ".shard-000001.tar.99.tmp").write_bytes(b"half")  # what a kill leaves behind
    pack(str(tmp_path / "in"), tmp_path / "out", max_shard_mb=0.02, workers=1)
    assert kept.stat().st_mtime_ns == before
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("shard-*.tar")} == whole
    with pytest.raises(UserError, match=r"max_shard_mb: 0\.02 -> 0\.03"):
        pack(str(tmp_path / "in"), tmp_path / "out", max_shard_mb=0.03, workers=1)


def test_masks_lie_beside_their_images_and_shrink_with_them(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.png").write_bytes(png(9, (40, 20)))
    ids = Image.fromarray(np.repeat(np.arange(20, dtype=np.uint8)[:, None], 40, 1))
    ids.save(tmp_path / "masks" / "a" / "x.png")
    pack(str(tmp_path / "images"), tmp_path / "out", masks=str(tmp_path / "masks"), labels="none", resize=10, workers=1)
    (sample,) = packed(tmp_path / "out").values()
    assert decode_image(sample["jpg"]).shape == (10, 20, 3) and decode_mask(sample["seg.png"]).shape == (10, 20)
    assert set(np.unique(decode_mask(sample["seg.png"]))) <= set(range(20))
    (tmp_path / "masks" / "a" / "x.png").unlink()
    with pytest.raises(DataError, match="has no mask"):
        pack(str(tmp_path / "images"), tmp_path / "other", masks=str(tmp_path / "masks"), workers=1)


def test_labels_from_a_csv_file(tmp_path):
    (tmp_path / "in").mkdir()
    for index in range(3):
        (tmp_path / "in" / f"v{index}.png").write_bytes(png(index))
    (tmp_path / "labels.csv").write_text("name,class\nv0.png,wolf\nv1,ant\nv2.png,wolf\n")
    result = pack(str(tmp_path / "in"), tmp_path / "out", labels=str(tmp_path / "labels.csv"), workers=1)
    assert result["classes"] == ["ant", "wolf"]
    assert {red: find_label(members) for red, members in packed(tmp_path / "out").items()} == {0: 1, 1: 0, 2: 1}
    (tmp_path / "labels.csv").write_text("v0.png,3\n")
    with pytest.raises(DataError, match="no class for 2 of 3 images, such as 'v1'"):
        pack(str(tmp_path / "in"), tmp_path / "other", labels=str(tmp_path / "labels.csv"), workers=1)


def test_images_that_do_not_decode_are_left_out_of_resized_copies_and_listed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes(png(5, (40, 40)))
    (tmp_path / "in" / "bad.png").write_bytes(png(5)[:20])
    result = pack(str(tmp_path / "in"), tmp_path / "out", resize=10, workers=1)
    assert result["samples"] == 1 and result["skipped"] == 1
    assert (tmp_path / "out" / "shard-000000.skipped.txt").read_text().startswith("bad\t")
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["complete"]


def test_wrong_input_says_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        pack(str(tmp_path / "empty"), tmp_path / "out1", workers=1)
    with pytest.raises(DataError, match="does not exist"):
        pack(str(tmp_path / "nowhere"), tmp_path / "out2", workers=1)
    (tmp_path / "page.tar").write_text("<html>")
    with pytest.raises(DataError, match=r"page\.tar is not a whole tar"):
        pack(str(tmp_path / "page.tar"), tmp_path / "out3", workers=1)
    with pytest.raises(UserError, match="Did you mean 'workers'"):
        pack_command(str(tmp_path / "empty"), str(tmp_path / "out4"), ["worker=2"])


def test_a_shard_is_whole_or_absent(tmp_path):
    def samples():
        yield "a", {"txt": b"1"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.tar", samples())
    assert list(tmp_path.iterdir()) == []


def test_an_image_beyond_max_pixels_is_left_out_unless_more_is_allowed(tmp_path):
    (tmp_path / "in").mkdir()
    for name, side in (("small", 40), ("large", 90)):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / "in" / f"{name}.png")
    result = pack(str(tmp_path / "in"), tmp_path / "a", resize=32, max_pixels=5000, workers=1)
    assert (result["samples"], result["skipped"]) == (1, 1)
    assert "90 x 90 pixels, more than max_pixels = 5000" in (tmp_path / "a" / "shard-000000.skipped.txt").read_text()
    assert pack(str(tmp_path / "in"), tmp_path / "b", resize=32, max_pixels=9000, workers=1)["samples"] == 2


@pytest.fixture
def photos(tmp_path) -> str:
    (tmp_path / "in").mkdir()
    for index in range(3):
        (tmp_path / "in" / f"v{index}.png").write_bytes(png(index))
    return str(tmp_path / "in")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("workers=abc", r"workers is 'abc'; expected a whole number from 1, as in workers=1"),
        ("workers=-1", "workers is -1"),
        ("workers=2.5", "workers is 2.5"),
        ("workers=true", "workers is True"),
        ("resize=[1", r"resize is '\[1'; expected a whole number from 1"),
        ("resize=0", "resize is 0"),
        ("max_shard_mb=-1", r"max_shard_mb is -1; expected a number from 0\.001"),
        ("max_shard_mb=.nan", "max_shard_mb is nan"),
        ("max_shard_mb=.inf", "max_shard_mb is inf"),
        ("max_shard_mb=null", "max_shard_mb is None"),
        ("max_pixels=0", "max_pixels is 0"),
        ("seed=-1", "seed is -1; expected a whole number from 0"),
        ("labels=null", "labels is 'null'; expected 'auto', 'none', or a CSV file"),
        ("masks=5", "masks = 5 mirrors a folder of images; 5 is not a folder"),
        ("workers", "'workers' is not an option"),
    ],
)
def test_a_wrong_option_is_explained_before_anything_is_written(tmp_path, photos, option, expected):
    with pytest.raises(UserError, match=expected):
        pack_command(photos, str(tmp_path / "out"), [option])
    assert not list(tmp_path.glob("out/*"))


def test_exponents_are_numbers_here_too(tmp_path, photos):
    pack_command(photos, str(tmp_path / "out"), ["max_pixels=1e8", "workers=1", "labels=none", "resize=null"])
    assert json.loads((tmp_path / "out" / "pack.json").read_text())["settings"]["max_pixels"] == 100_000_000


def test_out_is_a_local_folder(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"OUT is 's3://bucket/x', .* Pack there, then copy the folder .*aws s3 cp --recursive"):
        pack(photos, "s3://bucket/x", workers=1)
    assert not (tmp_path / "s3:").exists()
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        with pytest.raises(UserError, match=f"OUT is '{out}', which is no folder and cannot be made one"):
            pack(photos, out, workers=1)


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": 5}', "\xff"])
def test_a_damaged_account_of_a_packing_is_named(tmp_path, photos, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pack.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"pack\.json is damaged"):
        pack(photos, tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (b"v0,\xe9\n", "which is no CSV file in UTF-8"),
        (b"v0," + b"x" * 200_000, "which is no CSV file in UTF-8 .field larger"),
        (b"v0,1\nv1,1\nv2," + b"9" * 5000, "is too large; class ids are integers from 0"),
    ],
)
def test_a_wrong_csv_file_is_explained(tmp_path, photos, rows, expected):
    (tmp_path / "labels.csv").write_bytes(rows)
    with pytest.raises(DataError, match=expected):
        pack(photos, tmp_path / "out", labels=str(tmp_path / "labels.csv"), workers=1)


def test_a_csv_file_of_a_spreadsheet_may_begin_with_a_mark(tmp_path, photos):
    (tmp_path / "labels.csv").write_text("v0,2\nv1,1\nv2,0\n", encoding="utf-8-sig")
    pack(photos, tmp_path / "out", labels=str(tmp_path / "labels.csv"), workers=1)
    assert {red: find_label(members) for red, members in packed(tmp_path / "out").items()} == {0: 2, 1: 1, 2: 0}


def test_a_link_to_nowhere_is_left_out(tmp_path, photos, caplog):
    (tmp_path / "in" / "x.jpg").symlink_to("nowhere.jpg")
    result = pack(photos, tmp_path / "out", workers=1)
    assert (result["samples"], result["ignored"]) == (3, 1) and "1 images cannot be opened" in caplog.text


def test_linked_folders_are_packed_like_others_and_once(tmp_path, photos):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.png").write_bytes(png(7))
    (tmp_path / "in" / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../in")  # a loop
    pack(photos, tmp_path / "out", workers=1)
    assert sorted(packed(tmp_path / "out")) == [0, 1, 2, 7]


def test_names_that_are_no_utf8_are_packed_and_listed(tmp_path, photos):
    for name, data in ((b"b\xe9.png", png(9)), (b"c\xe9.png", png(9)[:20])):
        with open(photos.encode() + b"/" + name, "wb") as file:
            file.write(data)
    result = pack(photos, tmp_path / "out", resize=4, workers=1)
    assert (result["samples"], result["skipped"]) == (4, 1)
    assert (tmp_path / "out" / "shard-000000.skipped.txt").read_bytes().startswith(b"c\xe9\t")


@pytest.mark.parametrize("size", [1 << 80, 1 << 62, 1 << 40, -1024])
def test_a_size_that_no_file_has_is_damage(tmp_path, size):
    archive = bytearray(tar({"a.png": png(1), "b.png": png(2)}))
    header = bytearray(archive[:512])
    header[124:136] = (0x80 << 88 | size if size >= 0 else (1 << 96) + size).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    archive[:512] = header
    (tmp_path / "x.tar").write_bytes(archive)
    with pytest.raises(DataError, match=r"x\.tar is not a whole tar archive: it ends inside 'a\.png'"):
        pack(str(tmp_path / "x.tar"), tmp_path / "out", workers=1)


def test_a_damaged_compressed_tar_is_named(tmp_path):
    data = bytearray(tar({"a.png": bytes(range(256)) * 64}, "w:gz"))
    data[60:80] = bytes(20)
    (tmp_path / "a.tar.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar\.gz cannot be unpacked"):
        pack(str(tmp_path / "a.tar.gz"), tmp_path / "out", workers=1)


def test_every_key_leads_back_to_its_file(tmp_path):
    folder = tmp_path / "photos"
    for name in ("cats/a.b.png", "cats_a/b.png", "é x/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(folder / name)
    pack(str(folder), str(tmp_path / "out"), workers=1)
    origins = dict(line.split("\t") for line in (tmp_path / "out/files.tsv").read_text(encoding="utf-8").splitlines())
    dataset = open_dataset(str(tmp_path / "out"))
    for sample in dataset.read(0, 3):
        assert sample.members["png"] == (folder / origins[sample.key]).read_bytes()
    assert len(origins) == 3
