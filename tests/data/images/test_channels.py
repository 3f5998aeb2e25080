"""Images of one to many channels: decoded, cropped, trained on, judged, exported and shown."""

import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from timm.models import adapt_input_conv

from ssl_locat.config.schema import load
from ssl_locat.data.images.crops import MultiCrop
from ssl_locat.data.images.decode import decode_image
from ssl_locat.data.shards.index import open_dataset
from ssl_locat.doctor.init import init
from ssl_locat.errors import ConfigError, CorruptSample
from ssl_locat.evaluation.evaluate import evaluate
from ssl_locat.export.export import export
from ssl_locat.export.timm_folder import write_timm
from ssl_locat.measure import step as step_measure
from ssl_locat.models.backbone import create_backbone, init_weights, load_backbone
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.report.command import report

COLOURLESS = {"gray_prob": 0.0, "jitter": (0.4, 0.4, 0.0, 0.0)}


def npy(array: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def tiff(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, photometric="minisblack", planarconfig="contig")
    return out.getvalue()


def noise(channels: int, height: int = 40, width: int = 52) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(pixels: np.ndarray, mode: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels, mode).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_arrays_come_out_as_they_are(channels):
    pixels = noise(channels)
    for data in (npy(pixels), npy(np.asfortranarray(pixels))):
        for asked in (channels, None):
            found = decode_image(data, channels=asked)
            assert np.array_equal(found, pixels) and found.flags.c_contiguous and found.flags.writeable
    assert np.array_equal(decode_image(npy(pixels[..., 0]), channels=1), pixels[..., :1])


@pytest.mark.parametrize(
    "data, says",
    [
        (npy(np.zeros((4, 4, 2), np.float32)), "float32 .*expected uint8"),
        (npy(np.zeros((4, 4, 2), np.uint16)), "uint16 .*other types need data.channels"),
        (npy(np.array([{}, {}], object), allow_pickle=True), "object"),
        (npy(noise(2))[:-7], "bytes follow"),
        (npy(noise(2))[:20], "not a .npy file"),
        (npy(np.zeros((1, 1, 2), np.uint8)).replace(b"(1, 1, 2)", b"(9999999, 9999999, 2)"), "refused from its header|not a .npy"),
        (npy(noise(5)), "has 5 channels, the backbone takes 2: set backbone.in_chans=5"),
        (encoded(noise(3), "RGB"), "has 3 channels .mode RGB., the backbone takes 2"),
    ],
)  # fmt: skip
def test_what_is_no_image_of_so_many_channels_says_why(data, says):
    with pytest.raises(CorruptSample, match=says):
        decode_image(data, channels=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ordinary_images_serve_one_channel_or_their_own_bands():
    gray = noise(1)
    assert np.array_equal(decode_image(encoded(gray[..., 0], "L"), channels=1), gray)
    colour = decode_image(encoded(noise(3), "RGB"), channels=1)
    assert np.abs(colour[..., 0] - noise(3) @ np.array([0.299, 0.587, 0.114])).max() <= 1
    assert np.array_equal(decode_image(encoded(noise(4), "RGBA"), channels=4), noise(4))
    assert np.array_equal(decode_image(npy(gray), channels=3), np.repeat(gray, 3, 2))


@pytest.mark.parametrize("blurred", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_each_channel_is_cropped_as_if_alone(channels, blurred):
    """All but contrast, whose mean grey is of all channels."""
    options = {**COLOURLESS, "jitter": (0.4, 0.0, 0.0, 0.0), "solarize_prob": (0.5, 0.5, 0.5), "mode": "cpu"}
    options["blur_prob"] = (0.5, 0.5, 0.5) if blurred else (0.0, 0.0, 0.0)
    crops, image = MultiCrop(24, 12, 3, **options, mean=(0.5,) * channels, std=(0.2,) * channels), noise(channels)
    alone = MultiCrop(24, 12, 3, **options, mean=(0.5,), std=(0.2,))
    for seed in range(20):
        whole = crops.cut(image, seed).pixels
        assert [crop.shape for crop in whole] == [(24, 24, channels)] * 2 + [(12, 12, channels)] * 3
        for channel in range(channels):
            for crop, one in zip(whole, alone.cut(image[..., channel : channel + 1].copy(), seed).pixels, strict=True):
                # blur sums the same numbers in another order
                np.testing.assert_allclose(crop[..., channel], one[..., 0].astype(float), rtol=0, atol=int(blurred))


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_all_modes_agree(channels):
    options = {**COLOURLESS, "mean": (0.5,) * channels, "std": (1.0,) * channels}
    finished = {}
    for mode in ("cpu", "device-photometric", "device"):
        crops = MultiCrop(24, 12, 2, mode=mode, **options)
        batch = crops.finish(crops.collate([crops.cut(noise(channels, 40 + i), i) for i in range(4)]), "cpu")
        finished[mode] = torch.cat([batch.global_crops.flatten(), batch.local_crops.flatten()]) * 255
    for mode in ("device-photometric", "device"):
        difference = (finished[mode] - finished["cpu"]).abs()
        assert difference.mean() < 0.5 and difference.quantile(0.99) <= 2, mode  # as for RGB: 8-bit rounding of each operation


def test_a_config_that_does_not_fit_its_channels_is_refused():
    six = ["backbone.in_chans=6", "crops.gray_prob=0", "crops.jitter=[0.4,0.4,0,0]"]
    statistics = [f"crops.{name}=[0.5,0.5,0.5,0.5,0.5,0.5]" for name in ("mean", "std")]
    assert len(load("quickstart", [*six, *statistics]).crops.mean) == 6
    with pytest.raises(ConfigError, match=r"in_chans is 6, but crops.mean has 3 numbers"):
        load("quickstart", six)
    with pytest.raises(ConfigError, match="mean has 6 numbers and std 3"):
        load("quickstart", [*six, statistics[0]])
    with pytest.raises(ConfigError, match=r"made of RGB, the images have 6 channels: set gray_prob"):
        load("quickstart", [six[0], *statistics])


def test_arrays_beside_images_are_no_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.npy").write_bytes(npy(noise(2)))
    assert len(open_dataset(str(tmp_path))) == 2
    (tmp_path / "a.png").write_bytes(encoded(noise(3), "RGB"))
    assert len(open_dataset(str(tmp_path))) == 1


@pytest.mark.parametrize("channels", [1, 6])
def test_from_arrays_to_an_exported_backbone(tmp_path, monkeypatch, channels):
    """Class 0 is bright in the first channel, class 1 in the last (dark, if there is one channel): a k-NN must tell them apart."""
    monkeypatch.setattr(step_measure, "SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 24), ("val", 8)):
        for label in (0, 1):
            folder = tmp_path / "bands" / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = noise(channels, 34 + number % 3, 36) // 2
                if not (label and channels == 1):
                    image[..., -label] += 110
                (folder / f"{number}.npy").write_bytes(npy(image))
    path = init("bands")
    overrides = ["optim.epochs=1", "optim.global_batch_size=16", "backbone.embed_dim=24", "backbone.depth=1", "data.workers=0"]
    config = load(str(path), [*overrides, "log.tensorboard=false", "probes.knn.k=5", "probes.knn.workers=0"])
    assert config.backbone.options["in_chans"] == len(config.crops.mean) == channels
    summary = pretrain(config)
    assert summary["quarantined"] == 0 and summary["knn"]["raw_pixels"] > 90
    assert load_backbone(config.run_dir).patch_embed.proj.in_channels == channels

    folder = export(config.run_dir, str(tmp_path / "out"), format="timm")
    backbone = load_backbone(folder)
    data = {"train": config.data.train, "test": config.data.test}
    for protocol, options in {"knn": {"k": [5]}, "linear": {"epochs": 2, "batch_size": 16}}.items():
        scores = evaluate(backbone, protocol, data=data, workers=0, **options)
        assert all(0 <= value <= 100 for value in scores.values())
    assert "What GAug learned" in report([config.run_dir]).read_text()


def small(channels: int, section: dict | None = None):
    backbone = create_backbone("locatvit_tiny", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, in_chans=channels)
    read = {"mean": (0.5,) * channels, "std": (0.5,) * channels, "channels": section}
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, **read}
    return backbone


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> str:
    """Images of two 16-bit bands with masks: where the second is bright, the mask is 1."""
    folder = tmp_path_factory.mktemp("scenes")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(8):
        mask = np.zeros((20, 24), np.uint8)
        mask[:, 2 * number :] = 1
        image = np.stack([np.full(mask.shape, 500), 300 + 3000 * mask.astype(int)], axis=2).astype(np.uint16)
        (folder / "images" / f"{number}.tif").write_bytes(tiff(image))
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return str(folder)


@pytest.mark.parametrize("protocol", ["segmentation", "hummingbird", "attention"])
def test_dense_protocols_take_any_bands(scenes, tmp_path, protocol):
    options = {
        "segmentation": {"iterations": 3, "batch_size": 4, "image_size": 16, "scale": (32, 16), "hidden": 8},
        "hummingbird": {"image_size": 16, "neighbours": 3, "augment": True},
        "attention": {"images": 2, "out": str(tmp_path / "maps")},
    }[protocol]
    data = {"test": f"{scenes}/images"} if protocol == "attention" else {"train": scenes, "test": scenes, "num_classes": 2}
    workers = {} if protocol == "attention" else {"workers": 0}
    scores = evaluate(small(2, {"type": "uint16", "low": 0, "high": 4000}), protocol, data=data, **workers, **options)
    assert all(np.isfinite(value) for value in scores.values())


def test_supervised_takes_any_bands_without_an_augmentation_of_colours(tmp_path):
    for number in range(12):
        folder = tmp_path / "set" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(number).integers(100, 900, (20, 20, 2), dtype=np.uint16) + np.uint16(3000 * (number % 2))
        (folder / f"{number}.npy").write_bytes(npy(image))
    options = {
        "data": {"train": str(tmp_path / "set"), "test": str(tmp_path / "set")},
        "epochs": 1,
        "batch_size": 4,
        "workers": 0,
    }
    section = {"type": "uint16", "low": 0, "high": 4000}
    with pytest.raises(ConfigError, match=r"made for 8-bit RGB; this backbone takes 2 channels .*: give auto_augment=null"):
        evaluate(small(2, section), "supervised", **options)
    scores = evaluate(small(2, section), "supervised", **options, auto_augment=None, precision="fp32")
    assert 0 <= scores["top1"] <= 100


def test_validate_shows_bands_as_it_shows_colours(tmp_path):
    """The same pictures as 8-bit RGB, and as three bands of 16 bits: the same views but for the rounding of 8 bits, and the same scores."""
    rng, count = np.random.default_rng(0), 12
    for number in range(count):
        coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((28 + number, 40), Image.Resampling.BICUBIC))
        for kind, name, data in (("rgb", "png", encoded(picture, "RGB")), ("bands", "npy", npy(picture.astype(np.uint16) * 200))):
            (tmp_path / kind / f"c{number % 3}").mkdir(parents=True, exist_ok=True)
            (tmp_path / kind / f"c{number % 3}" / f"{number}.{name}").write_bytes(data)
    plain, deep = small(3), small(3, {"type": "uint16", "low": 0, "high": 51000})
    plain.reset_classifier(3)
    deep.reset_classifier(3)
    deep.load_state_dict(plain.state_dict())
    scores, seen = [], []
    for model, kind in ((plain, "rgb"), (deep, "bands")):
        views: list[torch.Tensor] = []
        model.patch_embed.register_forward_pre_hook(lambda _, given, views=views: views.append(given[0].clone()))
        scores.append(evaluate(model, "validate", data={"test": str(tmp_path / kind)}, workers=0, batch_size=4))
        seen.append(torch.cat(views))
    difference = (seen[0] - seen[1]).abs()
    assert (
        difference.max() * 127.5 < 6 and difference.mean() * 127.5 < 0.5
    )  # std is 0.5: Pillow rounds colours after each direction
    assert scores[0] == pytest.approx(scores[1], abs=100 / count + 1e-9)
    many = small(5)
    many.reset_classifier(3)
    for path in (tmp_path / "bands").rglob("*.npy"):
        path.write_bytes(npy(rng.integers(0, 256, (30, 20, 5), dtype=np.uint8)))
    assert 0 <= evaluate(many, "validate", data={"test": str(tmp_path / "bands")}, workers=0)["top1"] <= 100


@pytest.mark.parametrize(("old", "new"), [(3, 5), (3, 1), (5, 3), (1, 4), (4, 1)])
def test_weights_cross_numbers_of_channels_by_timms_rule(tmp_path, old, new):
    source, target = small(old), small(new)
    weights = tmp_path / "weights"
    weights.mkdir()
    write_timm(source, weights)
    missing = init_weights(target, str(weights))
    kernel, given = target.patch_embed.proj.weight, source.patch_embed.proj.weight
    assert not missing and torch.equal(kernel, adapt_input_conv(new, given, base_chans=old))
    if new % old == 0 or new == 1:  # a patch of one value gives the same token; where the list is cut, only nearly
        tokens = [model.patch_embed(torch.full((1, count, 16, 16), 0.7)) for model, count in ((source, old), (target, new))]
        torch.testing.assert_close(*tokens, atol=1e-5, rtol=1e-4)
    assert torch.equal(target.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
