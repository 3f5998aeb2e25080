"""Object detection with torchvision: FCOS (arXiv:1904.01355) over a feature pyramid of an exported ViT's intermediates.

    python docs/examples/detect.py backbone/ "coco128seg-train-{000000..000001}.tar" --classes 81

The shards have masks of classes; a box is drawn around each connected part. Tiny by default (minutes on a CPU); for a real run bring boxes of
your own and add --steps 90000 --size 800 --batch 16 --device cuda.
"""

import argparse
from collections import OrderedDict

import cv2
import numpy as np
import torch
from PIL import Image
from samples import batches, normalised, open_backbone, read_samples
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou


class Pyramid(nn.Module):
    """Four of a ViT's blocks, all on one grid, brought to strides of 1/4, 1/2, 1 and 2 patches; then torchvision's FPN."""

    def __init__(self, backbone: nn.Module, out_channels: int = 64):
        super().__init__()
        self.backbone, self.out_channels = backbone, out_channels
        depth, width = len(backbone.blocks), backbone.num_features
        self.taps = [round(depth * share) - 1 for share in (1 / 4, 2 / 4, 3 / 4, 1)]
        self.resize = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2), nn.GELU(), nn.ConvTranspose2d(width, width, 2, 2)),
                nn.ConvTranspose2d(width, width, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.fpn = FeaturePyramidNetwork([width] * 4, out_channels)
        patch = backbone.patch_embed.patch_size[0]
        self.strides = [patch / 4, patch / 2, patch, patch * 2]

    def forward(self, images: Tensor) -> OrderedDict:
        maps = self.backbone.forward_intermediates(images, indices=self.taps, norm=True, intermediates_only=True)
        return self.fpn(OrderedDict((str(i), resize(m)) for i, (resize, m) in enumerate(zip(self.resize, maps, strict=True))))


def boxes_of(mask: Image.Image, size: int) -> dict[str, Tensor]:
    """Boxes [n, 4] (x1, y1, x2, y2) around the connected parts of each class, and the classes [n]."""
    classes = np.array(mask.resize((size, size), Image.Resampling.NEAREST))
    boxes, labels = [], []
    for label in np.unique(classes[(classes > 0) & (classes < 255)]):
        _, _, parts, _ = cv2.connectedComponentsWithStats((classes == label).astype(np.uint8))
        for x, y, width, height, area in parts[1:]:  # the first is what lies around
            if area >= 16:
                boxes.append((x, y, x + width, y + height))
                labels.append(int(label))
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="an export folder of a ViT")
    parser.add_argument("train", help="shards of NAME.jpg and NAME.seg.png")
    parser.add_argument("--classes", type=int, required=True, help="with the background, which is 0")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--images", type=int, help="read so many alone")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    backbone = open_backbone(f"local-dir:{args.backbone}", num_classes=0)
    pyramid = Pyramid(backbone)
    model = FCOS(
        pyramid,
        args.classes,
        min_size=args.size,
        max_size=args.size,
        score_thresh=0.05,  # as COCO's evaluation wants it: what is unsure counts less, and is not left out
        # images come normalised already
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
        # one square anchor at each place, as large as the stride
        anchor_generator=AnchorGenerator(sizes=tuple((int(stride),) for stride in pyramid.strides), aspect_ratios=((1.0,),) * 4),
    ).to(args.device)
    samples = [
        (normalised(image, args.size, backbone), boxes_of(mask, args.size))
        for image, mask in read_samples(args.train, "jpg", "seg.png", limit=args.images)
    ]
    samples = [(image, target) for image, target in samples if len(target["boxes"])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    losses = []
    model.train()
    for batch in batches(samples, args.batch, args.steps):
        images, targets = zip(*batch, strict=True)
        targets = [{key: value.to(args.device) for key, value in target.items()} for target in targets]
        loss = sum(model([image.to(args.device) for image in images], targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    model.eval()
    with torch.inference_mode():
        found = model([image.to(args.device) for image, _ in samples[:8]])
    best = [box_iou(t["boxes"], f["boxes"].cpu()).amax(1) for f, (_, t) in zip(found, samples, strict=False) if len(f["boxes"])]
    few = max(1, args.steps // 5)
    scores = {
        "first_loss": float(np.mean(losses[:few])),
        "last_loss": float(np.mean(losses[-few:])),
        "boxes": sum(len(f["boxes"]) for f in found),
        "best_overlap": torch.cat(best).mean().item() if best else 0.0,  # of each true box with the nearest found one
    }
    print(scores)
    return scores


if __name__ == "__main__":
    main()
