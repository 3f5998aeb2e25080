import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scenes import png, scene, write_shard

from ssl_locat.errors import ConfigError, UserError
from ssl_locat.evaluation.protocols.dump import dump
from ssl_locat.evaluation.shared.features import near
from ssl_locat.models.backbone import create_backbone
from ssl_locat.models.tokens import features


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


def test_safetensors_hold_every_token_in_order(tmp_path, backbone):
    data = write_shard(tmp_path / "a.tar", [0, 1, 2, 3, 0, 1, 2], 0)
    dump(backbone, data=data, out=str(tmp_path / "out"), rows=4, batch_size=2, workers=0)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == ["features-000-00000.safetensors", "features-000-00001.safetensors"]
    parts = [load_file(file) for file in files]
    assert [tuple(part["class"].shape) for part in parts] == [(4, 48), (3, 48)]
    assert parts[0]["patches"].shape == (4, 16, 48) and parts[0]["patches"].dtype == torch.float16
    beside = json.loads(files[1].with_suffix(".json").read_text())
    assert beside == {"key": ["0004", "0005", "0006"], "label": [0, 1, 2]}
    about = json.loads((tmp_path / "out" / "features.json").read_text())
    assert about["images"] == 7 and about["grid"] == [4, 4] and about["width"] == 48
    with pytest.raises(UserError, match="already holds features"):
        dump(backbone, data=data, out=str(tmp_path / "out"))


def test_unlabelled_folder_as_npy_and_parquet(tmp_path, backbone):
    (tmp_path / "images").mkdir()
    pixels = scene(0, 32, np.random.default_rng(0))[0]
    for index in range(3):
        (tmp_path / "images" / f"{index}.png").write_bytes(png(pixels))
    source = str(tmp_path / "images")
    dump(backbone, data=source, out=str(tmp_path / "npy"), format="npy", workers=0)
    table = np.load(tmp_path / "npy" / "features-000-00000.class.npy")
    mean, std = (torch.tensor(backbone.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        expected = features(backbone, image[None].float())
    torch.testing.assert_close(torch.from_numpy(table), expected.expand(3, -1), rtol=1e-5, atol=1e-5)

    parquet = pytest.importorskip("pyarrow.parquet", reason="the parquet extra is not installed")
    dump(backbone, data=source, out=str(tmp_path / "parquet"), format="parquet", patches=False, workers=0)
    rows = parquet.read_table(tmp_path / "parquet" / "features-000-00000.parquet").to_pylist()
    assert [row["key"] for row in rows] == ["0", "1", "2"] and rows[0]["label"] == -1
    np.testing.assert_allclose(rows[0]["class"], table[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="Did you mean 'parquet'"):
        dump(backbone, data=source, out=str(tmp_path / "x"), format="parket")


def test_a_place_that_cannot_be_written_is_reported_before_the_model_is_loaded(tmp_path, monkeypatch):
    from ssl_locat.evaluation import evaluate as program
    from ssl_locat.models import backbone as backbones

    def never(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(backbones, "load_backbone", never)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"OUT is {out}, but {tmp_path}/file is a file. Give a new or an empty folder"):
            program.features("timm:vit_tiny", "images", str(out))
    with pytest.raises(UserError, match="there is no nowhere"):
        program.features("nowhere", "images", str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="out is given twice"):
        program.features("timm:vit_tiny", "images", str(tmp_path / "out"), ["out=x"])
    with pytest.raises(ConfigError, match="rows is 0; expected a whole number of at least 1"):
        program.features("timm:vit_tiny", "images", str(tmp_path / "out"), ["rows=0"])


def test_a_table_that_is_read_again_and_again_crosses_to_the_gpu_once_where_there_is_room(monkeypatch):
    class Table:
        nbytes = 40

        def to(self, device):
            return "moved"

    table = Table()
    for free, expected in ((80, "moved"), (79, table)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 100))
        assert near(table, torch.device("cuda")) == expected
    assert near(table, torch.device("cpu")) is table
