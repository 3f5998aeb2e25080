"""`evaluate validate` equals timm's own loader and a plain loop, on real pictures and random weights."""

import pytest
import torch
from scenes import write_split
from timm.data import create_loader, resolve_data_config
from timm.data.dataset import ImageDataset

from ssl_locat.errors import ConfigError, DataError
from ssl_locat.evaluation.evaluate import run
from ssl_locat.evaluation.protocols import validate
from ssl_locat.models.backbone import create_backbone

MODEL = "vit_tiny_patch16_224"
SMALL = {"img_size": 64, "patch_size": 16, "depth": 2, "num_classes": 10}


def picture_folder(folder):
    """Thirty noisy photographs in ten class folders, landscape and portrait: cropping and resizing matter for them."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(30):
        height, width = rng.integers(70, 140, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
            (int(width), int(height)), Image.Resampling.BICUBIC
        )
        place = folder / f"c{number % 10}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        coarse.save(place)
    return folder


def timm_accuracy(model, folder, **changes) -> dict[str, float]:
    """As timm's validate.py counts it."""
    config = resolve_data_config(changes, model=model)
    loader = create_loader(ImageDataset(str(folder)), batch_size=8, is_training=False, use_prefetcher=False, num_workers=0, **{
        name: config[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    })  # fmt: skip
    hits = torch.zeros(2)
    with torch.no_grad():
        for images, labels in loader:
            best = model(images).topk(5).indices == labels[:, None]
            hits += torch.stack([best[:, 0].sum(), best.any(1).sum()])
    return {name: 100 * hits[i].item() / 30 for i, name in enumerate(("top1", "top5"))}


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({}, {}),
        ({"crop_fraction": 0.5}, {"crop_pct": 0.5}),
        ({"interpolation": "bilinear", "image_size": 96}, {"interpolation": "bilinear", "img_size": 96}),
    ],
)
@pytest.mark.parametrize("name", [MODEL, "locatvit_tiny"])
def test_equals_timms_own_loop(tmp_path, name, given, changes):
    torch.manual_seed(3)
    model = create_backbone(name, **SMALL).eval()
    model.head.weight.data.normal_()  # untrained heads are zero: every class would tie
    folder = picture_folder(tmp_path / "pictures")
    ours = validate.evaluate(model, data={"test": str(folder)}, batch_size=7, workers=0, **given)
    assert ours == timm_accuracy(model, folder, **changes)
    assert 0 < ours["top5"] < 100


def test_a_shift_of_the_crop_would_be_seen(tmp_path):
    """The comparison above has teeth: another crop gives other logits on these pictures."""
    torch.manual_seed(3)
    model = create_backbone(MODEL, **SMALL).eval()
    model.head.weight.data.normal_()
    folder = picture_folder(tmp_path / "pictures")
    found = {
        validate.evaluate(model, data={"test": str(folder)}, workers=0, crop_fraction=part)["top5"] for part in (0.3, 0.5, 0.9)
    }
    assert len(found) > 1


def test_what_supervised_trained_is_validated_by_its_file(tmp_path):
    data = write_split(tmp_path, num_train=60, num_test=24)
    file = tmp_path / "trained.safetensors"
    model = "timm:locatvit_tiny?img_size=32&patch_size=8&embed_dim=192&depth=1"
    options = ["epochs=3", "warmup_epochs=0", "lr=0.003", "batch_size=12", "mixup=0", "cutmix=0", "random_erasing=0", "auto_augment=null",
               "crop_fraction=1.0", "precision=fp32", "workers=0", f"weights_file={file}"]  # fmt: skip
    sets = [f"data.train={data['train']}", f"data.test={data['test']}"]
    trained = run("supervised", model, [*options, *sets])["metrics"]
    again = run("validate", str(file), [sets[1], "crop_fraction=1.0", "workers=0"])["metrics"]
    assert again == {name: trained[name] for name in ("top1", "top5")}


def test_a_model_without_a_classifier_and_a_label_beyond_it_are_refused(tmp_path):
    data = write_split(tmp_path, num_train=4, num_test=4)
    with pytest.raises(ConfigError, match=r"no classifier\. `ssl-locat evaluate linear MODEL` trains one"):
        validate.evaluate(create_backbone(MODEL, **SMALL | {"num_classes": 0}), data=data, workers=0)
    with pytest.raises(DataError, match=r"data\.num_classes is 1: labels must be 0\.\.0"):
        validate.evaluate(create_backbone(MODEL, **SMALL | {"num_classes": 1}), data=data, workers=0)
