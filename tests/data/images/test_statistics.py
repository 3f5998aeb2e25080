"""Statistics of channels in one pass, the configs that say them, and a run from 16-bit files to an exported backbone."""

import io
import json

import numpy as np
import pytest
import tifffile

from ssl_locat.config.schema import load
from ssl_locat.data.images.decode import decode_image
from ssl_locat.data.images.statistics import Counting
from ssl_locat.data.shards.pack import write_shard
from ssl_locat.data.shards.stats import Reading, count_all, stats_command
from ssl_locat.doctor.init import init
from ssl_locat.errors import DataError, UserError
from ssl_locat.evaluation.evaluate import evaluate
from ssl_locat.evaluation.shared.image_views import channels_of
from ssl_locat.export.export import export
from ssl_locat.measure import step as step_measure
from ssl_locat.models.backbone import load_backbone
from ssl_locat.pretraining.loop import pretrain

BANDS = 4


def tiff(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, photometric="minisblack", planarconfig="contig", extratags=[(42113, 2, 0, "0", True)])
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def reflectance(label: int, number: int) -> np.ndarray:
    """uint16 [h, w, BANDS], in thousands; class 1 is bright in the last band; 0 in a corner means no data."""
    image = np.random.default_rng(1000 * label + number).integers(800, 1200, (34 + number % 3, 36, BANDS), dtype=np.uint16)
    image[..., -1] += 3000 * label
    image[:4, :4] = 0
    return image


def test_counting_is_numpys():
    rng, counting = np.random.default_rng(0), Counting()
    images = [rng.normal(1e6, 3, (20 + i, 30, 2)).astype(np.float64) for i in range(6)]
    missing = [rng.random(image.shape) < 0.3 for image in images]
    for image, holes in zip(images, missing, strict=True):
        counting.add(image, holes)
    found = counting.result()
    values = np.concatenate([np.where(holes, np.nan, image).reshape(-1, 2) for image, holes in zip(images, missing, strict=True)])
    np.testing.assert_allclose(found.mean, np.nanmean(values, 0), rtol=1e-12)
    np.testing.assert_allclose(found.std, np.nanstd(values, 0), rtol=1e-9)
    np.testing.assert_allclose(found.no_data, np.isnan(values).mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.percentiles[50], np.nanmedian(values, 0), atol=0.2)
    assert found.least == np.nanmin(values, 0).tolist() and found.greatest == np.nanmax(values, 0).tolist()


def test_what_was_counted_apart_joins_to_the_same():
    images = [np.random.default_rng(i).integers(0, 9000, (16, 16, 3), dtype=np.uint16) for i in range(8)]
    whole, parts = Counting(), [Counting() for _ in range(3)]
    for number, image in enumerate(images):
        whole.add(image, None)
        parts[number % 3].add(image, None)
    joined = Counting()
    for part in parts:
        joined.join(part)
    np.testing.assert_allclose(joined.result().mean, whole.result().mean)
    np.testing.assert_allclose(joined.result().std, whole.result().std)
    assert joined.result().percentiles == whole.result().percentiles


def test_stats_of_tars_leave_out_what_is_unlike_and_become_a_yaml(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples = [(f"{i:03d}", {"tif": tiff(reflectance(i % 2, i))}) for i in range(12)]
    samples += [("odd", {"tif": tiff(reflectance(0, 3)[..., :3])}), ("bad", {"tif": samples[0][1]["tif"][:500]})]
    write_shard(tmp_path / "set-000000.tar", iter(samples))
    found = count_all("set-000000.tar", Reading())
    assert found.type == "uint16" and found.no_data == 0 and len(found.damaged) == 2 and found.counting.images == 12
    assert "3 channels of uint16, not 4 of uint16 as the first" in found.damaged[0]
    valid = np.concatenate([reflectance(i % 2, i).reshape(-1, BANDS).astype(float) for i in range(12)])
    valid = valid[valid[:, 0] > 0]
    np.testing.assert_allclose(found.counting.result().mean, valid.mean(0), rtol=1e-9)
    stats_command("set-000000.tar", ["base=quickstart"], "deep.yaml", as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == 12 and said["no_data"][0] == pytest.approx(16 / (36 * 35), rel=0.1)
    overrides = ["data.train=set-000000.tar", "crops.gray_prob=0", "crops.jitter=[0.4,0.4,0,0]"]
    config = load("deep.yaml", overrides)
    assert (
        config.data.channels.type == "uint16"
        and config.data.channels.no_data == 0
        and config.backbone.options["in_chans"] == BANDS
    )
    # on the scale of the config, channels have the mean and deviation that it says
    from ssl_locat.data.images.bands import reading

    pixels = [decode_image(sample["tif"], channels=reading(config.channels, config.crops.mean)) for _, sample in samples[:12]]
    joined = np.concatenate([image.reshape(-1, BANDS) for image in pixels]) / 255
    np.testing.assert_allclose(joined.mean(0), config.crops.mean, atol=0.01)
    with pytest.raises(UserError, match=r"deep\.yaml exists"):
        stats_command("set-000000.tar", [], "deep.yaml", False)
    with pytest.raises(UserError, match="Did you mean 'no_data'"):
        stats_command("set-000000.tar", ["nodata=3"], None, False)
    with pytest.raises(DataError, match="none of 14 samples can be used"):
        stats_command("set-000000.tar", ["pick=[9]"], None, False)


def test_stats_of_eight_bits_are_on_the_usual_scale(tmp_path, capsys):
    for number in range(4):
        image = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        (tmp_path / f"{number}.npy").write_bytes(npy(image))
    stats_command(str(tmp_path), [], None, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert set(said["config"]) == {"crops"} and abs(said["config"]["crops"]["mean"][0] - 0.5) < 0.02


@pytest.mark.parametrize("kind", ["tif", "npy first"])
def test_from_sixteen_bits_to_an_exported_backbone(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(step_measure, "SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 20), ("val", 6)):
        for label in (0, 1):
            folder = tmp_path / "bands" / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = reflectance(label, number)
                data = tiff(image) if kind == "tif" else npy(np.moveaxis(image, 2, 0))
                (folder / f"{number}.{kind[:3]}").write_bytes(data)
    # what does not fit the set
    broken = tmp_path / "bands" / "train" / "class0"
    (broken / f"odd.{kind[:3]}").write_bytes(tiff(reflectance(0, 0)[..., :2]) if kind == "tif" else npy(reflectance(0, 0)[:2]))
    path = init("bands")
    overrides = ["optim.epochs=1", "optim.global_batch_size=16", "backbone.embed_dim=24", "backbone.depth=1", "data.workers=0"]
    overrides += ["log.tensorboard=false", "probes.knn.k=5", "probes.knn.workers=0", "data.max_bad=0.2", "crops.noise_prob=0.5"]
    config = load(str(path), overrides)
    channels = config.data.channels
    assert channels.type == "uint16" and config.backbone.options["in_chans"] == BANDS and channels.bands_first == (kind != "tif")
    assert channels.no_data == (0 if kind == "tif" else None) and "no data" in path.read_text()
    summary = pretrain(config)
    assert summary["quarantined"] <= 1 and summary["knn"]["raw_pixels"] > 90
    folder = export(config.run_dir, str(tmp_path / "out"), format="timm")
    backbone = load_backbone(folder)
    assert channels_of(backbone) == channels_of(load_backbone(config.run_dir)) and channels_of(backbone).low == tuple(
        channels.low
    )
    assert "uint16" in (folder / "README.md").read_text()
    data = {"train": config.data.train, "test": config.data.test, "max_bad": 0.2}
    scores = evaluate(backbone, "knn", data=data, workers=0, k=[5])
    assert 0 <= scores["top1_k5"] <= 100
