"""A corrupt image in what is evaluated: the message names the option that leaves it out, and that option does; words of people with folders."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_locat.errors import DataBudgetExceeded, DataError
from ssl_locat.evaluation.evaluate import evaluate
from ssl_locat.evaluation.protocols.dump import dump
from ssl_locat.models.backbone import create_backbone

SMALL = {"patch_size": 8, "img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}


@pytest.fixture(scope="module")
def backbone():
    return create_backbone("vit_tiny", **SMALL).eval()


@pytest.fixture
def photos(tmp_path):
    for part in ("train", "val", "flat"):
        for name in ("cats", "dogs") if part != "flat" else (".",):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(6):
                pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def test_features_leave_corrupt_images_out_when_told(photos, tmp_path, backbone):
    (photos / "flat/torn.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(DataError, match=r"torn: .* max_bad=0\.01"):
        dump(backbone, data=str(photos / "flat"), out=str(tmp_path / "a"), workers=0)
    with pytest.raises(DataError, match=r"1 of 7 images cannot be read, more than max_bad = 0\.1 allows\. The first: .*torn"):
        dump(backbone, data=str(photos / "flat"), out=str(tmp_path / "b"), workers=0, max_bad=0.1)
    dump(backbone, data=str(photos / "flat"), out=str(tmp_path / "c"), workers=0, max_bad=0.2, batch_size=3)
    about = json.loads((tmp_path / "c/features.json").read_text())
    listed = json.loads((tmp_path / "c/features-000-00000.json").read_text())
    assert (about["images"], about["left_out"]) == (6, 1) and len(listed["key"]) == 6
    assert "torn" in (tmp_path / "c/left_out-000.txt").read_text()


def test_a_refusal_says_its_reason_and_the_option(photos, backbone):
    (photos / "train/cats/torn.png").write_bytes(b"\x89PNG and no more")
    data = {"train": str(photos / "train"), "test": str(photos / "val")}
    with pytest.raises(DataError, match=r"cats/torn: .* data\.max_bad=0\.01"):
        evaluate(backbone, "knn", data=data, k=[3], workers=0)
    with pytest.raises(
        DataBudgetExceeded, match=r"1 of 13 images could not be read, more than data.max_bad = 0\.01 .* The first: .*cats/torn"
    ):
        evaluate(backbone, "knn", data={**data, "max_bad": 0.01}, k=[3], workers=0)
    assert "top1_k3" in evaluate(backbone, "knn", data={**data, "max_bad": 0.1}, k=[3], workers=0)


@pytest.mark.parametrize("protocol", ["knn", "segmentation"])
def test_a_folder_without_labels_or_masks_is_told_in_words_of_folders(photos, backbone, protocol):
    data = {"train": str(photos / "flat"), "test": str(photos / "flat")}
    options = {"data": data, "workers": 0, "k": [3]} if protocol == "knn" else {"data": {**data, "num_classes": 3}, "workers": 0}
    with pytest.raises((DataError, DataBudgetExceeded)) as told:
        evaluate(backbone, protocol, **options)
    wanted = "class folders, such as cats/ and dogs/" if protocol == "knn" else "Masks are looked for in masks/"
    assert wanted in str(told.value)
    assert not any(word in str(told.value) for word in ("member", "_key", "shards check", "credential"))


def test_bars_say_which_set_they_read(photos, backbone, monkeypatch):
    from ssl_locat.evaluation.shared import features

    said = []
    real = features.progress
    monkeypatch.setattr(features, "progress", lambda text, **options: said.append(text) or real(text, **options))
    torch.manual_seed(0)
    evaluate(backbone, "knn", data={"train": str(photos / "train"), "test": str(photos / "val")}, k=[3], workers=0)
    assert [(text.partition(" of ")[0], text.rpartition("/")[2]) for text in said] == [
        ("training features", "train"),
        ("test features", "val"),
    ]
