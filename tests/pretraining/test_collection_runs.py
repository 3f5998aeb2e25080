"""A whole pretraining on each kind of collection: it ends, and resumed from a checkpoint in its middle it has the same losses."""

import io
import shutil
import zipfile

import numpy as np
import pytest
import tifffile
from PIL import Image
from shards import write_parquet
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.runs.log import read_jsonl

pytestmark = pytest.mark.slow
COUNT = 96


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(number)).save(out, "PNG")
    return out.getvalue()


def as_parquet(folder) -> str:
    write_parquet(folder / "a.parquet", [{"image": {"bytes": png(number), "path": None}} for number in range(COUNT)], 10)
    return f"'{folder}/a.parquet'"


def as_zip(folder) -> str:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(COUNT):
            archive.writestr(f"{number:03d}.png", png(number))
    return f"'{folder}/a.zip'"


def as_raster(folder) -> str:
    rows = [np.concatenate([picture(row * 8 + column) for column in range(8)], 1) for row in range(COUNT // 8)]
    tifffile.imwrite(folder / "a.tif", np.concatenate(rows), tile=(64, 64), photometric="rgb", compression="zlib", metadata=None)
    return f"{{raster: '{folder}/a.tif', size: 32}}"


@pytest.mark.parametrize("make", [as_parquet, as_zip, as_raster])
def test_a_run_on_a_collection_resumes_to_the_same_losses(tmp_path, monkeypatch, make):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = [f"data.train={make(tmp_path)}", "data.test=null", "checkpoint={every_steps: 4, keep_last: 9}", "log.every_steps=1"]
    config = load(str(write_config(tmp_path, tmp_path)), given)
    assert pretrain(config)["steps"] == 12
    whole = losses(config.run_dir)
    assert sorted(whole) == list(range(1, 13))
    run = tmp_path / "run"
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / "summary.json").unlink()
    shutil.rmtree(run / "export", ignore_errors=True)
    assert pretrain(config)["steps"] == 12
    assert losses(config.run_dir) == whole
    assert "resume" in {record["kind"] for record in read_jsonl(run / "events.jsonl")}
