"""Every protocol gives the same number on one process and on two."""

import torch
from processes import run_ranks
from scenes import write_split


def run_protocols(data: dict) -> dict[str, float]:
    from ssl_locat.evaluation.protocols import hummingbird, knn, linear, segmentation, supervised
    from ssl_locat.models.backbone import create_backbone

    torch.manual_seed(0)
    backbone = create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    dense = data | {"num_classes": 5}
    probe = {"iterations": 12, "batch_size": 4, "image_size": 32, "scale": (64, 32), "hidden": 32, "lr": 0.02, "workers": 0}
    found = {
        "knn": knn.evaluate(backbone, data=data, k=[5], workers=0, batch_size=7),
        "linear": linear.evaluate(backbone, data=data, epochs=6, lr=0.5, batch_size=16, workers=0),
        "sweep": linear.sweep(backbone, data=data, epochs=6, lrs=[0.1, 0.5], blocks=[1], augment=False, batch_size=16, workers=0),
        "hummingbird": hummingbird.evaluate(backbone, data=dense, image_size=32, memory_size=25 * 8, workers=0, batch_size=4),
        "segmentation": segmentation.evaluate(backbone, data=dense, **probe),
        "segmentation_linear": segmentation.evaluate(backbone, data=dense, head="linear", **probe),
        "supervised": supervised.evaluate(
            backbone, data=data, epochs=2, warmup_epochs=0, lr=1e-3, batch_size=16, mixup=0, cutmix=0, drop_path=0, auto_augment=None,
            random_erasing=0, precision="fp32", crop_fraction=1.0, workers=0,
        ),
    }  # fmt: skip
    return {f"{protocol}.{name}": value for protocol, scores in found.items() for name, value in scores.items()}


def test_one_and_two_processes_agree(tmp_path):
    data = write_split(tmp_path, num_train=25, num_test=11)  # odd: shares of unequal length
    alone = run_protocols(data)
    first, second = run_ranks(run_protocols, 2, data)
    assert first == second
    different = {name: (alone[name], first[name]) for name in alone if abs(alone[name] - first[name]) > 0.1}
    assert not different, different
