"""How well features tell what members say beside the image, beside chance."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from shards import add

from ssl_locat.errors import ConfigError
from ssl_locat.evaluation.evaluate import evaluate, load_protocol
from ssl_locat.evaluation.protocols.metadata import balanced, read
from ssl_locat.evaluation.shared.features import Features
from ssl_locat.models.backbone import create_backbone


def table(told: float, count: int = 300, seed: int = 0) -> Features:
    """Values 0, 1, 2, of which features tell something along one axis each, of eight."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    values = torch.randn(count, 8, generator=generator)
    values[torch.arange(count), labels] += told
    return Features(values, labels)


def test_both_readers_are_at_chance_where_nothing_is_told_and_above_it_where_something_is():
    nothing, much = (read(table(told), table(told, seed=1)) for told in (0.0, 6.0))
    assert nothing["chance"] == pytest.approx(100 / 3) and abs(nothing["above_chance"]) < 9
    assert min(much["read_knn"], much["read_linear"]) > 95 and much["above_chance"] == pytest.approx(
        max(much["read_knn"], much["read_linear"]) - 100 / 3
    )


def test_a_rare_value_counts_as_much_as_a_common_one():
    labels = torch.tensor([0] * 98 + [1] * 2)
    assert balanced(labels, torch.zeros(100, dtype=torch.int64)) == 50.0


def write(path, count: int, offset: int):
    with tarfile.open(path, "w") as archive:
        for number in range(offset, offset + count):
            out, value = io.BytesIO(), "AB"[number % 2]
            Image.new("RGB", (32, 32), (250 * (number % 2), number, 128)).save(out, "PNG")
            add(archive, f"{number:03d}.png", out.getvalue())
            add(archive, f"{number:03d}.json", json.dumps({"scan": {"by": value if number % 6 else "?"}}).encode())
    return str(path)


def test_the_protocol_reads_members_and_leaves_out_what_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    backbone = create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    data = {"train": write(tmp_path / "a.tar", 60, 0), "test": write(tmp_path / "b.tar", 30, 100)}
    options = {"data": data, "member": "json", "values": ["A", "B"], "k": 5, "image_size": 32, "workers": 0}
    scores = evaluate(backbone, "metadata", **options, key="scan.by")
    assert scores["read_knn"] == scores["read_linear"] == 100 and scores["above_chance"] == 50
    assert (scores["train_images"], scores["test_images"], scores["unknown"]) == (50, 25, 15)
    with pytest.raises(ConfigError, match=r"none has a member 'json' with the key 'scan.of'"):
        evaluate(backbone, "metadata", **options, key="scan.of")
    with pytest.raises(ConfigError, match="k = 99"):
        evaluate(backbone, "metadata", **options | {"k": 99}, key="scan.by")
    with pytest.raises(ConfigError, match="each once"):
        evaluate(backbone, "metadata", **options | {"values": [1, 1.0]}, key="scan.by")


def test_values_are_asked_for_at_once():
    with pytest.raises(ConfigError, match="at least two texts or numbers"):
        load_protocol("metadata", ["data.train=a", "data.test=b", "values=A"])
