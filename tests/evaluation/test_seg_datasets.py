"""Each published layout on a miniature tree of its own, with its own label remapping."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scenes import png, write_shard

from ssl_locat.errors import ConfigError, DataError
from ssl_locat.evaluation.shared.seg_datasets import LAYOUTS, open_scenes


def put(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def pair(root: Path, image: str, mask: str, ids: list[int]) -> None:
    """An image of 2 x len(ids) pixels, and its mask with these stored ids."""
    put(root / image, np.full((2, len(ids), 3), 100))
    put(root / mask, np.array([ids, ids]))


def stored_and_read(data: dict, name: str = "train") -> list[int]:
    scenes = open_scenes(data, name)
    image, mask = scenes[0]
    assert image.shape[:2] == mask.shape and mask.dtype == np.int64
    return mask[0].tolist()


def test_ade20k(tmp_path):
    for split in ("training", "validation"):
        pair(tmp_path, f"images/{split}/ADE_1.jpg", f"annotations/{split}/ADE_1.png", [0, 1, 150, 2])
    data = {"layout": "ade20k", "train": str(tmp_path), "test": str(tmp_path)}
    assert stored_and_read(data) == stored_and_read(data, "test") == [255, 0, 149, 1]
    assert open_scenes(data, "train").num_classes == 150


def test_pascal_context(tmp_path):
    for split in ("train", "val"):
        pair(tmp_path, f"JPEGImages/{split}_1.jpg", f"SegmentationClassContext/{split}_1.png", [0, 1, 59])
        (tmp_path / "ImageSets/SegmentationContext").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ImageSets/SegmentationContext/{split}.txt").write_text(f"{split}_1\n")
    data = {"layout": "pascal_context", "train": str(tmp_path), "test": str(tmp_path)}
    assert stored_and_read(data) == stored_and_read(data, "test") == [255, 0, 58]


def test_coco_stuff(tmp_path):
    # stored as id - 1: 11 and ten others name nothing, so what follows moves up; stuff begins at 91
    pair(tmp_path, "images/train2017/1.jpg", "annotations/train2017/1.png", [0, 10, 12, 89, 91, 181, 11, 255])
    data = {"layout": "coco_stuff", "train": str(tmp_path), "test": str(tmp_path)}
    assert stored_and_read(data) == [0, 10, 11, 79, 80, 170, 255, 255]
    assert len(set(LAYOUTS["coco_stuff"].remap.values())) == 171


def test_voc(tmp_path):
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text("a\n")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("b\n")
    pair(tmp_path, "JPEGImages/a.jpg", "SegmentationClassAug/a.png", [0, 20, 255])
    pair(tmp_path, "JPEGImages/b.jpg", "SegmentationClass/b.png", [0, 5, 255])
    data = {"layout": "voc", "train": str(tmp_path), "test": str(tmp_path)}
    assert stored_and_read(data) == [0, 20, 255]
    assert stored_and_read(data, "test") == [0, 5, 255]


def test_cityscapes(tmp_path):
    pair(tmp_path, "leftImg8bit/train/ulm/x_leftImg8bit.png", "gtFine/train/ulm/x_gtFine_labelIds.png", [7, 8, 33, 0, 29])
    assert stored_and_read({"layout": "cityscapes", "train": str(tmp_path)}) == [0, 1, 18, 255, 255]


def test_camvid(tmp_path):
    for split in ("train", "val", "test"):
        pair(tmp_path, f"{split}/0001.png", f"{split}annot/0001.png", [0, 10, 11])
    data = {"layout": "camvid", "train": str(tmp_path), "test": str(tmp_path), "test_split": "test"}
    assert stored_and_read(data) == stored_and_read(data, "test") == [0, 10, 255]


def test_folders_of_images_and_masks_and_shards(tmp_path):
    pair(tmp_path / "folder", "images/street/1.jpg", "masks/street/1.png", [0, 1, 2])
    assert stored_and_read({"train": str(tmp_path / "folder"), "num_classes": 3}) == [0, 1, 2]
    assert stored_and_read({"train": str(tmp_path / "folder"), "num_classes": 2, "reduce_zero_label": True}) == [255, 0, 1]
    assert stored_and_read({"train": str(tmp_path / "folder"), "num_classes": 3, "ignore_index": 1}) == [0, 255, 2]
    scenes = open_scenes({"train": write_shard(tmp_path / "a.tar", [0, 3], 0), "num_classes": 5}, "train")
    assert set(np.unique(scenes[1][1])) == {0, 4, 255}


def test_camvid_shards(shared_data):
    scenes = open_scenes({"test": f"{shared_data('camvid')}/camvid-val-*.tar", "num_classes": 11}, "test")
    image, mask = scenes[3]
    assert len(scenes) == 101 and image.shape == (360, 480, 3) and mask.shape == (360, 480)


def test_wrong_masks_are_named(tmp_path):
    root = tmp_path / "set"
    pair(root, "images/1.jpg", "masks/1.png", [0, 1, 9])
    with pytest.raises(DataError, match=r"masks/1.png: holds class id 9; expected 0\.\.2 and 255"):
        open_scenes({"train": str(root), "num_classes": 3}, "train")[0]
    put(root / "masks/1.png", np.zeros((5, 5)))
    with pytest.raises(DataError, match=r"masks/1.png: the mask is 5 x 5 pixels, its image 3 x 2"):
        open_scenes({"train": str(root), "num_classes": 3}, "train")[0]
    (root / "masks/1.png").unlink()
    with pytest.raises(DataError, match=r"masks/1.png: no such file \(1 of the 2"):
        open_scenes({"train": str(root), "num_classes": 3}, "train")
    put(root / "masks/1.png", np.zeros((2, 3)))
    (root / "images/1.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"masks/1.png: not an image"):
        open_scenes({"train": str(root), "num_classes": 3}, "train")[0]


def test_wrong_keys_and_layouts(tmp_path):
    with pytest.raises(ConfigError, match=r"data.layout is 'ade'; known: ade20k.*Did you mean 'ade20k'"):
        open_scenes({"layout": "ade", "train": str(tmp_path)}, "train")
    with pytest.raises(DataError, match=r"no such folder. Expected the published layout"):
        open_scenes({"layout": "ade20k", "train": str(tmp_path)}, "train")
    with pytest.raises(ConfigError, match=r"unknown key 'data.mask'. Did you mean 'mask_key'"):
        open_scenes({"train": str(tmp_path), "mask": "x"}, "train")
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        open_scenes({"train": str(tmp_path), "num_classes": 3}, "train")
    assert png(np.zeros((2, 2), np.uint8))[:4] == b"\x89PNG"
