"""The leak check of a comparison: test images that are the same picture as a training or an unlabelled one.

Found by looks (data/images/likeness.py) and by the features of the first MODEL; a pair counts if its pictures align.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ssl_locat.data.images.bands import Bands
from ssl_locat.data.images.decode import find_image
from ssl_locat.data.images.tiles import TILE, montage
from ssl_locat.data.shards.kinds import Dataset
from ssl_locat.data.shards.tar import Damage
from ssl_locat.data.stream.duplicates import Pair, duplicates, look_at, picture_of
from ssl_locat.evaluation.compare_rows import FeatureSets
from ssl_locat.evaluation.protocols.knn import nearest
from ssl_locat.evaluation.shared.samples import open_spec, open_split, open_store
from ssl_locat.evaluation.shared.seg_datasets import open_scenes

BY_FEATURES = 2  # candidates of each test image
MOST_SHOWN = 24  # pairs in the picture


def find_leaks(
    data: Mapping[str, Any], unlabelled: Any, tables: FeatureSets | None, workers: int | None, picture: Path, *,
    channels: Bands | int, dense: bool,
) -> dict[str, Any]:  # fmt: skip
    """{"train": {"images", "pairs"}, "unlabelled": ...}: how many test images are also there, and which; the surest are drawn to `picture`.

    channels: as the first MODEL reads them. Of each pair: the numbers of both images in their sets, their keys, and how alike they are (1: equal bytes).
    """
    key = data.get("image_key")
    sets: dict[str, Dataset] = {
        name: open_scenes(data, name).dataset if dense else open_split(data, name) for name in ("test", "train")
    }
    if unlabelled:
        sets["unlabelled"] = open_spec(unlabelled, open_store(data))
    looks = {name: look_at(dataset, f"data.{name}", key, workers, channels) for name, dataset in sets.items()}
    found, shown = {}, []
    for name in [name for name in sets if name != "test"]:
        whole = tables and name == "train" and len(tables.train.labels) == len(sets["train"])
        # rows of features are images of the set only where none was left out
        more = _by_features(tables) if tables and whole and len(tables.test.labels) == len(sets["test"]) else None
        pairs = duplicates(looks["test"], looks[name], more)
        shown += [(pair, name) for pair in pairs[:MOST_SHOWN]]
        found[name] = {
            "images": len({pair.first for pair in pairs}),
            "of": len(sets[name]),
            "pairs": [_told(pair, sets["test"], sets[name]) for pair in pairs],
        }
    if shown:
        _draw(shown[:MOST_SHOWN], sets, key, channels, picture)
    else:
        picture.unlink(missing_ok=True)
    return found


def _by_features(tables: FeatureSets) -> np.ndarray:
    """int64 [M, 2]: (test image, training image) that are nearest by features."""
    bank, queries = (F.normalize(table.values, dim=1) for table in (tables.train, tables.test))
    _, where = nearest(bank, queries, min(BY_FEATURES, len(bank)))  # [Q, k]
    rows = torch.arange(len(queries))[:, None].expand_as(where)
    return torch.stack([rows.flatten(), where.flatten()], dim=1).numpy()


def _told(pair: Pair, test: Dataset, other: Dataset) -> dict[str, Any]:
    keys = [dataset.read(number, number + 1)[0].key for dataset, number in ((test, pair.first), (other, pair.second))]
    return {"test": pair.first, "other": pair.second, "keys": keys, "likeness": pair.likeness}


def _draw(
    shown: Sequence[tuple[Pair, str]], sets: Mapping[str, Dataset], key: str | None, channels: Bands | int, path: Path
) -> None:
    """Pairs side by side, four to a row: the test image, then the other."""
    tiles = [
        (_tile(sets["test"], pair.first, key, channels), _tile(sets[name], pair.second, key, channels)) for pair, name in shown
    ]
    rows = [[tile for pair in tiles[start : start + 4] for tile in pair] for start in range(0, len(tiles), 4)]
    path.parent.mkdir(parents=True, exist_ok=True)
    montage(rows).save(path)


def _tile(dataset: Dataset, number: int, key: str | None, channels: Bands | int) -> np.ndarray:
    raw = dataset.read(number, number + 1)[0]
    assert not isinstance(raw, Damage), "it was read a moment ago"
    image = picture_of(find_image(raw.members, key), channels)
    if image.shape[2] != 3:
        image = np.repeat(image.mean(2, keepdims=True).astype(np.uint8), 3, axis=2)
    return np.array(Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS))
