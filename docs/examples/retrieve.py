"""Retrieval with faiss: the images most alike, by the cosine of a backbone's features.

    python docs/examples/retrieve.py backbone/ "imagenette128-train-{000000..000009}.tar" "imagenette128-val-{000000..000001}.tar"

The index is exact; for more than a million images take faiss.index_factory(width, "IVF4096,PQ64").
"""

import argparse

import faiss
import numpy as np
import torch
from samples import normalised, open_backbone, read_samples

import ssl_locat


@torch.inference_mode()
def embed(backbone, images: list, size: int, batch: int, device: str) -> np.ndarray:
    """Unit vectors [N, D]: with them, an inner product is a cosine."""
    vectors = []
    for start in range(0, len(images), batch):
        some = torch.stack([normalised(image, size, backbone) for image in images[start : start + batch]])
        vectors.append(ssl_locat.features(backbone, some.to(device)).float().cpu())
    vectors = torch.cat(vectors).numpy()
    faiss.normalize_L2(vectors)
    return vectors


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="an export folder")
    parser.add_argument("gallery", help="shards of NAME.jpg and NAME.cls: what is searched")
    parser.add_argument("queries", help="shards of what to look for")
    parser.add_argument("--size", type=int, help="of the images; by default the backbone's")
    parser.add_argument("--neighbours", type=int, default=5)
    parser.add_argument("--images", type=int, help="read so many of each set alone")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    backbone = open_backbone(f"local-dir:{args.backbone}", num_classes=0).eval().to(args.device)
    size = args.size or backbone.pretrained_cfg["input_size"][-1]
    sets = [read_samples(shards, "jpg", "cls", limit=args.images) for shards in (args.gallery, args.queries)]
    (gallery, labels), (queries, truth) = (zip(*samples, strict=True) for samples in sets)
    index = faiss.IndexFlatIP(backbone.num_features)
    index.add(embed(backbone, gallery, size, args.batch, args.device))
    _, nearest = index.search(embed(backbone, queries, size, args.batch, args.device), args.neighbours)
    labels, truth = np.array(labels), np.array(truth)
    # of the neighbours, how many show what the query shows; chance: how often two images do
    precision = (labels[nearest] == truth[:, None]).mean()
    chance = (labels[None] == truth[:, None]).mean()
    scores = {"precision": float(precision), "chance": float(chance), "indexed": index.ntotal}
    print(scores)
    return scores


if __name__ == "__main__":
    main()
