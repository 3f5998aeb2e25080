"""Fine-tuning with timm's parts: its loader, augmentation, Mixup, optimizer with layer-wise decay, and schedule.

    python docs/examples/finetune.py backbone/ "imagenette128-train-{000000..000009}.tar" "imagenette128-val-{000000..000001}.tar" --classes 10

Tiny by default; for a real run add --epochs 100 --batch 256 --device cuda --augment rand-m9-mstd0.5-inc1 (timm's own recipe for ViTs), and
for data that does not fit into memory timm's `create_dataset("wds/...")`.
"""

import argparse

import torch
from samples import open_backbone, read_samples
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.utils.data import Dataset


class Images(Dataset):
    """Labelled images; `create_loader` puts timm's augmentation into `transform`."""

    transform = None

    def __init__(self, samples: list[tuple]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        image, label = self.samples[index]
        return self.transform(image.convert("RGB")), label


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="an export folder")
    parser.add_argument("train", help="shards of NAME.jpg and NAME.cls")
    parser.add_argument("test")
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, help="of the images; by default the backbone's")
    parser.add_argument("--batch", type=int, default=64, help="even, as Mixup pairs images")
    parser.add_argument("--images", type=int, help="read so many of each set alone")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--layer-decay", type=float, default=0.75, help="factor on the learning rate from each block to the one before it"
    )
    parser.add_argument("--augment", help="timm's auto_augment")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    model = open_backbone(f"local-dir:{args.backbone}", num_classes=args.classes, drop_path_rate=0.1).to(args.device)
    size = args.size or model.pretrained_cfg["input_size"][-1]
    train, test = (Images(read_samples(shards, "jpg", "cls", limit=args.images)) for shards in (args.train, args.test))
    common = {
        "input_size": (3, size, size),
        "batch_size": args.batch,
        "mean": model.pretrained_cfg["mean"],
        "std": model.pretrained_cfg["std"],
        "use_prefetcher": False,  # timm's puts batches on a GPU by a stream of its own
        "num_workers": 0,  # the images are in memory
        "persistent_workers": False,
        "pin_memory": False,
    }
    train_loader = create_loader(train, is_training=True, auto_augment=args.augment, **common)
    test_loader = create_loader(test, is_training=False, crop_pct=1.0, **common)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=args.classes)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05, layer_decay=args.layer_decay)
    schedule, epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=args.epochs, warmup_epochs=1, warmup_lr=args.lr / 100, min_lr=args.lr / 100
    )
    soft_loss, losses = SoftTargetCrossEntropy(), []
    for epoch in range(epochs):
        schedule.step(epoch)
        model.train()
        for images, labels in train_loader:
            images, targets = mixup(images.to(args.device), labels.to(args.device))
            loss = soft_loss(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    model.eval()
    right = 0
    with torch.inference_mode():
        for images, labels in test_loader:
            right += (model(images.to(args.device)).argmax(1).cpu() == labels).sum().item()
    few = max(1, len(losses) // 5)
    scores = {
        "first_loss": sum(losses[:few]) / few,
        "last_loss": sum(losses[-few:]) / few,
        "top1": right / len(test),
    }
    print(scores)
    return scores


if __name__ == "__main__":
    main()
