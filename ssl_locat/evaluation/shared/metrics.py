"""Metrics: classification hits, confusion matrices, mIoU by label and by Hungarian matching. Plain tensors in, plain floats out."""

import numpy as np
import torch
from torch import Tensor

VOID = 255  # in masks: a pixel that does not count


def top_hits(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """bool [B]: is the label among the k classes of highest score? scores [B, C], labels [B].

    A class of score 0 never counts: in k-NN it means "no such neighbour", and which of those fill the top 5 is chance
    (the reference lets its sort decide; logits are never exactly 0).
    """
    values, classes = scores.topk(min(k, scores.shape[1]), dim=1)
    return ((classes == labels[:, None]) & (values != 0)).any(dim=1)


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """int64 [C, C], rows the truth and columns the prediction; pixels labelled 255 are left out.

    Both inputs are integer tensors of one shape, any shape, with values in 0..C-1 where not ignored.
    """
    valid = labels != VOID
    pairs = labels[valid].long() * num_classes + predicted[valid].long()  # each pair as one number, so that one bincount does
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def reduce_zero_label(labels: Tensor) -> Tensor:
    """Class ids 1..C become 0..C-1, and 0 ("other") becomes 255, as ADE20K and PASCAL Context are scored. 255 stays 255."""
    return torch.where((labels == 0) | (labels == 255), 255, labels.long() - 1)


def class_ious(confusion: Tensor) -> Tensor:
    """float64 [C]: intersection over union per class as a fraction; NaN for a class that is in neither truth nor prediction."""
    confusion = confusion.double()
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)  # predicted + true - both


def segmentation_scores(confusion: Tensor) -> dict[str, float]:
    """miou, mean_accuracy, pixel_accuracy in percent from a confusion matrix [C, C].

    Means are over the classes for which the figure is defined: IoU where a class is in truth or prediction, accuracy where in truth.
    """
    confusion = confusion.double()
    hits, truth = confusion.diagonal(), confusion.sum(1)
    return {
        "miou": 100 * class_ious(confusion).nanmean().item(),
        "mean_accuracy": 100 * (hits / truth).nanmean().item(),
        "pixel_accuracy": 100 * (hits.sum() / truth.sum()).item(),
    }


def hungarian_scores(confusion: Tensor) -> tuple[float, Tensor]:
    """(mIoU in percent, truth class of each predicted class [C]) after the best one-to-one renaming of predicted classes.

    What the reference's Hummingbird reports: classes that are absent everywhere count as IoU 0 in the mean, unlike `segmentation_scores`,
    and a prediction that swaps two classes is forgiven.
    """
    confusion = confusion.double()
    union = confusion.sum(1)[:, None] + confusion.sum(0)[None] - confusion
    iou = torch.where(union > 0, confusion / union.clamp(min=1), 0).T  # predicted x truth
    truth_of = torch.from_numpy(best_assignment(-iou.cpu().numpy()))
    return 100 * iou.cpu()[torch.arange(len(iou)), truth_of].mean().item(), truth_of


def best_assignment(cost: np.ndarray) -> np.ndarray:
    """int64 [n]: the column given to each row of cost [n, n], each column once, of least total cost.

    Shortest augmenting paths with potentials (Jonker and Volgenant 1987), O(n^3): milliseconds at 171 classes, and no SciPy.
    """
    n = len(cost)
    row_potential, column_potential = np.zeros(n), np.zeros(n + 1)
    row_of = np.full(n + 1, -1)  # column n is the virtual start of every path
    for row in range(n):
        # a path starts at the new row, and alternates: free edge to a column, back along its match
        row_of[n], column = row, n
        shortest, previous = np.full(n, np.inf), np.full(n, n)
        visited = np.zeros(n + 1, dtype=bool)
        while row_of[column] >= 0:
            visited[column] = True
            here, free = row_of[column], ~visited[:n]
            reduced = cost[here] - row_potential[here] - column_potential[:n]
            better = free & (reduced < shortest)
            shortest[better], previous[better] = reduced[better], column
            # Dijkstra: the nearest column not visited yet is final
            following = int(np.where(free, shortest, np.inf).argmin())
            step = shortest[following]
            # potentials keep every reduced cost at 0 or above, and 0 along matches
            row_potential[row_of[visited]] += step
            column_potential[visited] -= step
            shortest[free] -= step
            column = following
        while column != n:
            # an unmatched column was reached: every match on the path moves one step along it
            row_of[column] = row_of[previous[column]]
            column = int(previous[column])
    assigned = np.empty(n, dtype=np.int64)
    assigned[row_of[:n]] = np.arange(n)
    return assigned
