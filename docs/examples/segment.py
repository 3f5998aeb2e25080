"""Semantic segmentation with segmentation_models_pytorch: DPT (arXiv:2103.13413) on an exported backbone.

    python docs/examples/segment.py backbone/ "camvid-train-{000000..000002}.tar" camvid-val-000000.tar --classes 11

Tiny by default (minutes on a CPU); for a real run add --steps 20000 --size 448 --batch 16 --device cuda. DPT reads four blocks: the quickstart's
backbone, which has three, is too shallow for it.
"""

import argparse

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from samples import batches, normalised, read_samples
from torchmetrics.functional import jaccard_index


def pair(image: Image.Image, mask: Image.Image, size: int, backbone) -> tuple[torch.Tensor, torch.Tensor]:
    """An image [3, size, size] and its classes [size, size], of which 255 means: none of them."""
    classes = torch.from_numpy(np.array(mask.resize((size, size), Image.Resampling.NEAREST))).long()
    return normalised(image, size, backbone), classes


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="an export folder")
    parser.add_argument("train", help="shards of NAME.jpg and NAME.seg.png")
    parser.add_argument("test")
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, help="read so many of each set alone")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--width", type=int, default=64, help="channels of the decoder; DPT has 256")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    # `tu-` is smp's word for timm: our export is opened by name, with its weights (encoder_weights=True)
    model = smp.DPT(
        f"tu-local-dir:{args.backbone}",
        encoder_weights=True,
        decoder_intermediate_channels=(args.width,) * 4,
        decoder_fusion_channels=args.width,
        classes=args.classes,
        dynamic_img_size=True,
    ).to(args.device)
    backbone = model.encoder.model
    train, test = (
        [pair(*sample, args.size, backbone) for sample in read_samples(shards, "jpg", "seg.png", limit=args.images)]
        for shards in (args.train, args.test)
    )
    # the backbone has learned already: a tenth of the decoder's learning rate
    groups = [
        {"params": model.encoder.parameters(), "lr": args.lr / 10},
        {"params": [p for part in (model.decoder, model.segmentation_head) for p in part.parameters()]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.05)
    losses = []
    for batch in batches(train, args.batch, args.steps):
        images, classes = (torch.stack(parts).to(args.device) for parts in zip(*batch, strict=True))
        loss = F.cross_entropy(model(images), classes, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    model.eval()
    with torch.inference_mode():
        images, classes = (torch.stack(parts).to(args.device) for parts in zip(*test, strict=True))
        found = torch.cat([model(some).argmax(1) for some in images.split(args.batch)])
    miou = jaccard_index(found, classes, task="multiclass", num_classes=args.classes, ignore_index=255).item()
    few = max(1, args.steps // 5)
    scores = {"first_loss": float(np.mean(losses[:few])), "last_loss": float(np.mean(losses[-few:])), "miou": miou}
    print(scores)
    return scores


if __name__ == "__main__":
    main()
