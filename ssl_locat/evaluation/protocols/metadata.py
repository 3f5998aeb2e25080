"""How well frozen features tell what a sample's members say beside its image, such as its camera: near `chance` for a nuisance that they hide.

ssl-locat evaluate metadata MODEL data.train=... data.test=... member=json key=camera values='[A, B, C]'

Two readers, as one may see what the other does not: the vote of neighbours, and a linear classifier in closed form. Where the value goes along with
the class in data.train (each hospital its own scanner), features that tell classes tell it, too, and no network can hide it: measure on images of
which each class has each value about as often.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_locat.config.data_section import as_text
from ssl_locat.data.shards.metadata import Field as Metadata
from ssl_locat.data.shards.metadata import check_fields
from ssl_locat.errors import ConfigError, DataError
from ssl_locat.evaluation.protocols.knn import class_scores, nearest
from ssl_locat.evaluation.shared.features import Features, check_image_size, extract, labelled_images, split
from ssl_locat.evaluation.shared.least_squares import classify
from ssl_locat.evaluation.shared.options import Count, LabelledData, Plain, Positive, Text, Whole


def evaluate(
    backbone: nn.Module,
    *,
    data: LabelledData,
    member: Text = "json",
    key: Text | None = None,
    values: Plain | None = None,
    k: Count = 20,
    temperature: Positive = 0.07,
    image_size: Count | None = None,
    resize_size: Count | None = None,
    precision: Literal["bf16", "fp32"] | None = None,
    batch_size: Count = 256,
    workers: Whole | None = None,
) -> dict[str, float]:
    """-> read_knn, read_linear: accuracy in percent on data.test; chance: of always answering the commonest value; above_chance: of the better reader, over it.
    All are means over the values of data.test, so that a rare one counts as much: chance is 100 / (how many occur). And train_images, test_images,
    unknown: how many were read, and left out as they say nothing.

    Args:
        data: train and test, images with the member beside them; further keys as of knn. No labels are read.
        member, key, values: as of data.metadata (docs/metadata.md).
        k, temperature: of the neighbours' vote. image_size, resize_size, precision, workers: as of knn.
    """
    texts = [as_text(value) for value in values or ()]
    if len(texts) < 2 or None in texts or len(set(texts)) < len(texts):
        raise ConfigError(
            f"values is {values!r}; expected a list of at least two texts or numbers, each once, such as values='[A, B]'."
        )
    field = Metadata("value", member.lower().lstrip("."), key, tuple(str(text) for text in texts))
    size = check_image_size(backbone, image_size)
    settings: dict[str, Any] = {"image_size": size, "resize_size": resize_size, "batch_size": batch_size, "workers": workers}
    tables, unknown = [], 0
    for name in ("train", "test"):
        split(data, name)
        images = labelled_images(backbone, data, name, **settings, label=_Value(field), metadata=True)
        check_fields([field], [images.dataset])
        table = extract(backbone, images, precision=precision, what=f"{name} features")
        known = table.labels < len(texts)
        if not known.any():
            raise DataError(f"data.{name}: no image says which of {', '.join(field.values)} it has.")
        unknown += int((~known).sum())
        tables.append(Features(table.values[known], table.labels[known]))
    bank, queries = tables
    return read(bank, queries, k=k, temperature=temperature) | {
        "train_images": len(bank.labels),
        "test_images": len(queries.labels),
        "unknown": unknown,
    }


class _Value:
    """members -> the number of the value; the one behind the last where there is none."""

    def __init__(self, field: Metadata):
        self.field = field

    def __call__(self, members: dict[str, bytes]) -> int:
        return self.field.read(members) % (len(self.field.values) + 1)


def read(bank: Features, queries: Features, k: int = 20, temperature: float = 0.07) -> dict[str, float]:
    """What both readers find of queries' labels, beside chance, in percent."""
    if k > len(bank.labels):
        raise ConfigError(f"k = {k} is more than the {len(bank.labels)} images of data.train. Give a smaller k.")
    count = int(max(bank.labels.max(), queries.labels.max())) + 1
    similarity, where = nearest(F.normalize(bank.values, dim=1), F.normalize(queries.values, dim=1), k)
    voted = class_scores(similarity, bank.labels[where], [k], temperature, count)[k].argmax(1)
    knn = balanced(queries.labels, voted)
    linear = balanced(queries.labels, classify(bank.values, bank.labels, queries.values, count))
    chance = 100 / len(queries.labels.unique())
    return {"read_knn": knn, "read_linear": linear, "chance": chance, "above_chance": max(knn, linear) - chance}


def balanced(labels: Tensor, guesses: Tensor) -> float:
    """Percent right, the mean over the values that occur."""
    return 100 * float(torch.stack([(guesses[labels == value] == value).float().mean() for value in labels.unique()]).mean())
