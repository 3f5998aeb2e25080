"""`backbone.pack_crops`: what `auto` decides and says, and that a run with either answer learns the same."""

import json
import logging

import pytest
import torch
from trained import write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import ConfigError
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.packing_choice import decide_packing, measure_both
from ssl_locat.pretraining.parts import check_backbone


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    make_textures(folder / "set", num_train=96, num_test=40, image_size=32, progress=False)
    return write_config(folder)


def run(config_file, folder, *overrides: str) -> list[float]:
    pretrain(load(str(config_file), [f"run_dir={folder}", "optim.epochs=null", "optim.total_steps=3", *overrides]))
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_packed_run_learns_what_an_unpacked_one_does_and_auto_says_its_choice(config_file, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    packed = run(config_file, tmp_path / "packed", "backbone.pack_crops=true", "log.every_steps=1")
    plain = run(config_file, tmp_path / "auto", "log.every_steps=1")
    assert packed == pytest.approx(plain, abs=1e-4) and len(packed) == 3
    assert "backbone.pack_crops auto: false (not measured on cpu" in caplog.text
    kept = (tmp_path / "auto/config.yaml").read_text()
    assert "pack_crops: false" in kept and "pack_crops: true" in (tmp_path / "packed/config.yaml").read_text()


def test_what_cannot_be_packed_is_refused_before_anything_is_built(config_file):
    def config(*overrides: str):
        return load(str(config_file), list(overrides))

    with pytest.raises(ConfigError, match=r"pack_crops is true, but there are no local crops.*auto or false"):
        check_backbone(config("backbone.pack_crops=true", "crops.num_local=0"))
    with pytest.raises(ConfigError, match="compiled networks"):
        check_backbone(config("backbone.pack_crops=true", "compile=true"))
    assert decide_packing(config("crops.num_local=0"), torch.device("cpu"), 8)[1].startswith("there are no local crops")
    assert min(measure_both(config(), torch.device("cpu"), 2)) > 0
