"""Satellites, scanners and microscopes end to end at small size: init -> pretrain -> k-NN, linear -> export, on real files of `../shared/data`."""

import io
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from ssl_locat import cli
from ssl_locat.config.schema import load
from ssl_locat.data.images.decode import decode_image
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.data.shards.tar import Damage
from ssl_locat.data.shards.write import write_shard
from ssl_locat.doctor.init import init
from ssl_locat.evaluation.evaluate import evaluate
from ssl_locat.evaluation.shared.image_views import channels_of
from ssl_locat.export.export import export
from ssl_locat.export.parity import BothTokens
from ssl_locat.measure import step as step_measure
from ssl_locat.models.backbone import load_backbone
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.report.command import report

SMALL = ["backbone.embed_dim=24", "backbone.depth=1", "data.workers=0", "log.tensorboard=false"]


@pytest.fixture(autouse=True)
def _quick_init(monkeypatch, tmp_path):
    monkeypatch.setattr(step_measure, "SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_twelve_bands_from_the_file_to_onnx(shared_data, tmp_path):
    """What guides/satellite.md does: Sentinel-2's twelve bands of 16 bits, and a backbone whose export says which they are."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    folder = shared_data("s2_12band_sample")
    names = json.loads((folder / "info.json").read_text())["bands"]
    (tmp_path / "tiles").mkdir()
    for number in range(4):
        shutil.copy(folder / f"tile{number}_64x64x12.tif", tmp_path / "tiles")
        patch = tifffile.imread(folder / "patch_120x120x12_contig.tif")[number * 14 :][:64, :64]
        tifffile.imwrite(tmp_path / "tiles" / f"cut{number}.tif", patch, photometric="minisblack", planarconfig="contig")
    path = init("tiles")
    overrides = [*SMALL, "optim.epochs=2", "crops.band_drop_prob=0.1", "crops.vertical_flip_prob=0.5", "crops.turn_prob=0.75"]
    overrides += ["crops.noise_prob=0.3", "crops.stretch_prob=0.2", f"data.channels.names={json.dumps(names)}"]
    config = load(str(path), [*overrides, "data.channels.show=[3,2,1]"])
    channels = config.data.channels
    assert channels.type == "uint16" and config.backbone.options["in_chans"] == 12 == len(channels.low) == len(config.crops.mean)
    assert pretrain(config)["quarantined"] == 0
    out = export(config.run_dir, str(tmp_path / "out"), format="onnx")
    card = (out / "README.md").read_text()
    assert all(f"| {name} |" in card for name in names) and "uint16" in card and f"{channels.high[11]:g}" in card
    backbone = load_backbone(str(out)).eval()
    # from the file's bytes, by what the export says, through both programs
    pixels = decode_image((folder / "tile0_64x64x12.tif").read_bytes(), channels=channels_of(backbone))
    mean, std = (torch.tensor(backbone.pretrained_cfg[name]) for name in ("mean", "std"))
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None].expand(2, -1, -1, -1).contiguous()
    assert abs(images.mean()) < 1 and 0.3 < images.std() < 3
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 12, "height", "width"]
    with torch.inference_mode():
        for expected, given in zip(BothTokens(backbone)(images), session.run(None, {"images": images.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(given), expected, atol=1e-4, rtol=1e-4)
    assert "data:image/" in report([config.run_dir]).read_text()  # pictures of B04, B03, B02


def test_ct_slices_of_dicom_from_init_to_knn(shared_data, tmp_path):
    """What guides/medical.md does: 12 bits in HU, with and without contrast agent; the same network reads the same slices as PNG."""
    pytest.importorskip("pydicom", reason="the dicom extra is not installed")
    folder = shared_data("ct16_dicom")
    for part in ("train", "test"):
        shutil.copy(folder / f"ct16_dicom-dcm-{part}-000000.tar", tmp_path)
    (tmp_path / "ct").mkdir()
    for tar in tmp_path.glob("*.tar"):
        tar.rename(tmp_path / "ct" / tar.name)
    path = init("ct")
    config = load(
        str(path), [*SMALL, "optim.epochs=1", "optim.global_batch_size=16", "probes.knn=null", "probes.every_epochs=null"]
    )
    channels = config.data.channels
    assert channels.type == "dicom" and -1100 < channels.low[0] < -900 < 0 < channels.high[0] < 2000  # air to bone, in HU
    assert pretrain(config)["quarantined"] == 0
    backbone = load_backbone(config.run_dir)
    data = {"train": config.data.train, "test": config.data.test}
    scores = evaluate(backbone, "knn", data=data, k=[5], workers=0)
    assert 0 <= scores["top1_k5"] <= 100
    # PNG holds HU + 1024, which the network's scale takes into account by one line
    as_png = {**backbone.pretrained_cfg["channels"], "type": "uint16"}
    as_png["low"], as_png["high"] = ([value + 1024 for value in as_png[key]] for key in ("low", "high"))
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "channels": as_png}
    png = {part: str(folder / f"ct16_dicom-png-{part}-000000.tar") for part in ("train", "test")}
    assert evaluate(backbone, "knn", data=png, k=[5], workers=0) == pytest.approx(scores, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["locatvit_tiny", "vit_tiny_patch16_224"])
@pytest.mark.parametrize(("name", "recipe", "classes"), [("eurosat_rgb", "eurosat_cpu", 10), ("pbc_blood", "blood_cells_cpu", 8)])
def test_a_domain_end_to_end(shared_data, tmp_path, name, recipe, classes, backbone):
    """The shipped recipe, a seventh as long: what init says fits it, the features beat a guess by far, and what is exported is what was trained."""
    folder = shared_data(name)
    data = {"train": f"{folder}/{name}-train-000000.tar", "test": f"{folder}/{name}-test-*.tar"}
    options = [f"data.{part}={pattern}" for part, pattern in data.items()]
    measured = load(str(init(str(folder), "seen.yaml")))
    config = load(
        recipe, [*options, f"backbone.name={backbone}", "optim.total_steps=8", "probes.every_steps=8", "log.tensorboard=false"]
    )
    assert np.allclose(measured.crops.mean, config.crops.mean, atol=0.08) and measured.data.num_classes in (None, classes)
    summary = pretrain(config)
    assert summary["knn"]["trained"] > 2.5 * 100 / classes and summary["quarantined"] == 0
    folder = export(config.run_dir, str(tmp_path / "out"))
    scores = {
        protocol: evaluate(load_backbone(model), protocol, data=data, image_size=48, resize_size=48, workers=0, **given)
        for model in (str(folder),)
        for protocol, given in (("knn", {"k": [20]}), ("linear", {"augment": False, "epochs": 5, "standardize": True, "lr": 0.1}))
    }
    assert scores["knn"]["top1_k20"] == pytest.approx(summary["knn"]["trained"], abs=0.01)
    assert scores["linear"]["top1"] > 2.5 * 100 / classes


def test_what_does_not_fit_a_set_of_bands_is_quarantined_with_its_reason(tmp_path):
    rng = np.random.default_rng(0)

    def npy(array: np.ndarray) -> bytes:
        out = io.BytesIO()
        np.save(out, array)
        return out.getvalue()

    def image(bands: int = 4, dtype: str = "uint16", side: int = 30) -> np.ndarray:
        return rng.integers(0, 4000, (side, side + 2, bands)).astype(dtype)

    bomb = io.BytesIO()
    np.savez_compressed(bomb, image=np.zeros((9000, 9000, 4), np.uint16))  # 648 MB in 630 kB
    deflated = bytearray(4000)
    deflated[128:132] = b"DICM"
    deflated[140:162] = b"1.2.840.10008.1.2.1.99"
    bad = {
        "missing_band": ({"npy": npy(image(3))}, "has 3 bands, data.channels.bands is 4"),
        "bands_first": ({"npy": npy(np.moveaxis(image(side=60), 2, 0))}, "has 62 bands, data.channels.bands is 4"),
        "wrong_type": ({"npy": npy(image(dtype="float32"))}, "holds float32, data.channels.type is uint16"),
        "cut": ({"npy": npy(image())[:-9]}, "bytes follow"),
        "bomb": ({"npz": bomb.getvalue()}, "to decode|more than max_pixels"),
        "empty": ({"npy": npy(np.zeros((30, 32, 4), np.uint16))}, "100 % of the values are no data"),
        "syntax": ({"dcm": bytes(deflated)}, "transfer syntax .*deflated"),
        "none": ({"txt": b"nothing"}, "no image among the members"),
    }
    samples = [(f"good{i:02d}", {"npy": npy(image())}) for i in range(20)]
    samples.append(("good_bigendian", {"npy": npy(image().astype(">u2"))}))  # the machine's order is not the file's
    samples += [(f"bad_{name}", members) for name, (members, _) in bad.items()]
    write_shard(tmp_path / "set-000000.tar", iter(samples))
    overrides = ["data.train=set-000000.tar", "data.test=null", "data.make=null", "data.num_classes=null", "data.max_bad=0.9"]
    overrides += [
        "data.channels={type: uint16, bands: 4, pick: [3, 2, 1, 0], high: 4000, no_data: 0}",
        "data.max_pixels=2000000",
        "backbone.in_chans=4",
    ]
    overrides += [
        "crops.mean=[0.5,0.5,0.5,0.5]",
        "crops.std=[0.3,0.3,0.3,0.3]",
        "crops.gray_prob=0",
        "crops.jitter=[0.4,0.4,0,0]",
    ]
    overrides += [
        "probes={}",
        "export=false",
        "optim.epochs=null",
        "optim.total_steps=8",
        "optim.global_batch_size=8",
        "objective={name: dino, num_prototypes: 64, hidden_dim: 32, bottleneck_dim: 16}",
        "optim.warmup_epochs=0",
    ]
    config = load("quickstart", [*SMALL, *overrides, "run_dir=run"])
    summary = pretrain(config)
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    found = {entry["key"]: entry["error"] for entry in map(json.loads, lines)}
    assert not [key for key in found if key.startswith("good")]
    assert set(found) == {f"bad_{name}" for name in bad} and summary["quarantined"] == len(bad)
    for name, (_, says) in bad.items():
        assert re.search(says, found[f"bad_{name}"]), (name, found[f"bad_{name}"])
    assert not any(isinstance(sample, Damage) for sample in open_dataset("set-000000.tar").read(0, 29))


GUIDES = [
    ("satellite", "eurosat"),
    ("satellite", "bands"),
    ("medical", "ct"),
    ("medical", "slice"),
    ("microscopy", "blood"),
    ("microscopy", "fluorescence"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("page", "part"), GUIDES)
def test_a_guides_commands_run_on_the_files_that_it_names(shared_data, tmp_path, page, part):
    """Word by word, but for the length of a run; ct16_dicom without its PNGs, which are the same slices."""
    for name in ("eurosat_rgb", "s2_12band_sample", "ct16_dicom", "pbc_blood"):
        shutil.copytree(shared_data(name), name, ignore=shutil.ignore_patterns("*-png-*"))
    (tmp_path / "cells").mkdir()
    text = (Path(__file__).resolve().parent.parent / "docs" / "guides" / f"{page}.md").read_text(encoding="utf-8")
    if part in ("bands", "slice", "fluorescence"):
        (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
        (tmp_path / "example.py").write_text(code)
        runpy.run_path("example.py")
    (commands,) = re.findall(rf'^```bash title="{part}"\n(.*?)^```$', text, re.M | re.S)
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "pretrain":
            words += ["optim.epochs=null", "optim.total_steps=2", "optim.warmup_epochs=0", "data.workers=0"]
            words += ["probes={}"] if words[1].endswith(".yaml") else ["probes.every_steps=2"]
        elif words[0] == "evaluate":
            words += ["workers=0"] + (["least_steps=50"] if "linear_small" in words else [])
        assert cli.run_command(words) == 0, line
