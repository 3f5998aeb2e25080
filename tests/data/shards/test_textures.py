"""The quickstart's images: deterministic, complete or absent, easy with labels, hard for raw pixels and for random features."""

import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_locat.data.images.decode import decode_image, decode_mask
from ssl_locat.data.shards.textures import CLASSES, draw_scenes, make_textures
from ssl_locat.errors import DataError


def test_the_same_seed_gives_the_same_shards(tmp_path):
    arguments = {"num_train": 40, "num_test": 10, "image_size": 32}
    made = [make_textures(tmp_path / name, seed=seed, **arguments) for name, seed in [("a", 1), ("b", 1), ("c", 2)]]
    a, b, c = ((tmp_path / name / "textures-train-000000.tar").read_bytes() for name in "abc")
    assert a == b != c
    assert made[0]["num_classes"] == len(CLASSES) == 10


def test_samples_hold_image_label_and_mask(tmp_path):
    made = make_textures(tmp_path / "set", num_train=20, num_test=10, image_size=48)
    assert made["train"].endswith("textures-train-*.tar")
    with tarfile.open(tmp_path / "set" / "textures-train-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert len(members) == 60
    labels = set()
    for key in sorted({name.split(".")[0] for name in members}):
        label = int(members[f"{key}.cls"])
        mask = decode_mask(members[f"{key}.seg.png"])
        assert decode_image(members[f"{key}.jpg"]).shape == (48, 48, 3) and mask.shape == (48, 48)
        assert set(np.unique(mask)) == {0, label + 1}  # one object, of the class of the label
        assert 0.3 < (mask > 0).mean() < 0.95
        labels.add(label)
    assert labels == set(range(10))


def test_what_is_there_is_not_made_again_and_other_folders_are_safe(tmp_path):
    arguments = {"num_train": 10, "num_test": 10, "image_size": 32}
    make_textures(tmp_path / "set", **arguments)
    shard = tmp_path / "set" / "textures-train-000000.tar"
    before = shard.stat().st_mtime_ns
    make_textures(tmp_path / "set", **arguments)
    assert shard.stat().st_mtime_ns == before
    make_textures(tmp_path / "set", **(arguments | {"seed": 5}))
    assert shard.stat().st_mtime_ns != before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # no temporary folder is left
    (tmp_path / "mine").mkdir()
    for folder, settings in (("mine", arguments), ("set", arguments)):  # a foreign folder; an addition to one of ours
        (tmp_path / folder / "thesis.tex").touch()
        with pytest.raises(DataError, match=r"did not make \(thesis.tex"):
            make_textures(tmp_path / folder, **settings)
        assert (tmp_path / folder / "thesis.tex").exists()


def scenes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images [count, 3, 48, 48] and labels [count]."""
    labels = np.arange(count) % len(CLASSES)
    images, _ = draw_scenes(labels, 48, np.random.default_rng(seed))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2, torch.from_numpy(labels)


def nearest_neighbours(bank, bank_labels, queries, labels) -> float:
    """Share of queries that DINO's weighted vote (k = 20, T = 0.07) gets right."""
    similarity, index = (F.normalize(queries.flatten(1), dim=1) @ F.normalize(bank.flatten(1), dim=1).T).topk(20)
    votes = torch.zeros(len(queries), len(CLASSES)).scatter_add_(1, bank_labels[index], (similarity / 0.07).exp())
    return (votes.argmax(1) == labels).float().mean().item()


def random_features(images: torch.Tensor, seed: int) -> torch.Tensor:
    import timm

    torch.manual_seed(seed)
    options = {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3, "num_classes": 0}
    network = timm.models.VisionTransformer(**options).eval()
    with torch.no_grad():
        return network(images)


def test_raw_pixels_and_random_features_find_less_than_half():
    bank, bank_labels = scenes(1000, 0)
    queries, labels = scenes(300, 1)
    assert nearest_neighbours(bank, bank_labels, queries, labels) < 0.5
    assert nearest_neighbours(random_features(bank, 0), bank_labels, random_features(queries, 0), labels) < 0.5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_network_with_labels_finds_nearly_all_and_nothing_else_does():
    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    images, labels = scenes(4000, 0)
    queries, query_labels = scenes(1000, 1)
    assert nearest_neighbours(images, labels, queries, query_labels) < 0.5
    small, small_queries = (F.interpolate(x, 32, mode="bicubic", antialias=True) for x in (images, queries))
    assert nearest_neighbours(small, labels, small_queries, query_labels) < 0.5
    for seed in range(3):
        features = random_features(images, seed)
        assert nearest_neighbours(features, labels, random_features(queries, seed), query_labels) < 0.5

    torch.manual_seed(0)
    layers = [*stage(3, 24), *stage(24, 48), *stage(48, 96), *stage(96, 128)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(CLASSES)))
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3, weight_decay=0.05)
    epochs = 4
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=epochs * 63)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        assert (network(queries).argmax(1) == query_labels).float().mean() >= 0.9
