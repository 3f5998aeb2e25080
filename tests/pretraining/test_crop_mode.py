"""`crops.mode: auto`: decided by measuring, said, written down, and kept by every resume."""

import logging
from pathlib import Path

import pytest
import torch
from tiny_run import write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.index import open_mix
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.measure import crop_mode
from ssl_locat.measure.crop_mode import MODES, Rates, choose_mode, measured_rates
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.runs.folder import read_config

# images/s a core as performance notes have them; a GPU that does the rest of each mode quickly
GPU = Rates(1700, 810, 600, {"cpu": 60_000, "device-photometric": 30_000, "device": 15_000})


@pytest.mark.parametrize(
    ("workers", "cores", "networks", "mode"),
    [
        (64, 64, 3500, "cpu"),  # cores enough for everything
        (8, 10, 3500, "device-photometric"),
        (10, 4, 3500, "device"),  # ten workers on four cores are four
        (2, 64, 3500, "device"),
        (10, 10, 200, "cpu"),  # a large network eats little
    ],
)
def test_a_gpu_is_fed_by_what_cores_there_are(workers, cores, networks, mode):
    chosen, why = choose_mode(GPU, "cuda", workers, cores, networks)
    assert chosen == mode
    assert f"networks {networks} images/s" in why and all(name in why for name in MODES)


def test_on_a_cpu_the_least_work_wins():
    rates = Rates(1700, 810, 600, {"cpu": 5000, "device-photometric": 60, "device": 40})
    assert choose_mode(rates, "cpu", 4, 8, None)[0] == "cpu"
    slow_colours = rates._replace(photometric=20)
    assert choose_mode(slow_colours, "cpu", 4, 8, None)[0] == "device-photometric"


def test_a_rate_that_noise_has_hidden_is_not_told_as_a_number():
    _, why = choose_mode(GPU._replace(photometric=crop_mode._UNMEASURED), "cuda", 8, 8, 100)
    assert "photometric not to be told from cut" in why and "1000000" not in why


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_textures(tmp_path / "set", num_train=96, num_test=40, image_size=32, progress=False)
    path = str(write_config(tmp_path / "set", tmp_path))
    return lambda *overrides: load(path, ["crops.mode=auto", *overrides])


def test_rates_are_measured_once(tiny, monkeypatch):
    config = tiny()
    datasets, _ = open_mix(config.data.train)
    rates = measured_rates(datasets, config, torch.device("cpu"))
    assert min(rates.decode, rates.cut, rates.photometric, *rates.device.values()) > 0 and tuple(rates.device) == MODES
    monkeypatch.setattr(crop_mode, "measure_rates", None)
    assert measured_rates(datasets, config, torch.device("cpu")) == rates
    with pytest.raises(TypeError):  # other crops are measured anew
        measured_rates(datasets, tiny("crops.num_local=4"), torch.device("cpu"))


def test_the_choice_is_written_down_and_kept(tiny, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    config = tiny("optim.epochs=1")
    pretrain(config)
    chosen = read_config(config.run_dir).crops.mode
    assert chosen in MODES and f"crops.mode auto: {chosen} (decode " in caplog.text
    # whatever a resume would measure, perhaps on another machine, and whatever the file says by now: the run keeps its crops
    monkeypatch.setattr(crop_mode, "measure_rates", None)
    other = next(mode for mode in MODES if mode != chosen)
    written = Path(config.run_dir, "config.yaml")
    text = written.read_text()
    assert text.count(f"mode: {chosen}") == 1
    written.write_text(text.replace(f"mode: {chosen}", f"mode: {other}"))
    pretrain(config)
    assert read_config(config.run_dir).crops.mode == chosen
    assert f"crops.mode auto: {chosen} (as at the first start of this run)" in caplog.text
