"""A linear classifier in closed form: regularised least squares to targets of +-1 (the few-shot measure of ViT, arXiv:2010.11929, section 4.1).

No step size, no epochs, no luck: a comparison of two networks must not turn on how well each one's training by SGD went. Where ViT fixes the
regularisation, it is chosen here by leave-one-out on the training features, for which the same decomposition serves.
"""

import torch
from torch import Tensor

PATH = [10.0**power for power in range(-5, 3)]  # regularisations tried, in units of the mean eigenvalue


def classify(bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
    """int64 [Q]: the class of each of queries [Q, D], by bank [n, D] and its labels [n]. On the device of its arguments."""
    mean, std = bank.mean(0), bank.std(0, correction=0).clamp(min=1e-6)
    values = (bank - mean) / std  # [n, D]
    targets = 2 * torch.nn.functional.one_hot(labels, num_classes).to(values.dtype) - 1  # [n, C]
    level = targets.mean(0)
    targets = (targets - level).double()
    squares, rows = _decomposed(values)
    along = rows.T @ targets  # [m, C]
    best = min(PATH, key=lambda share: _left_out(rows, along, targets, squares, share * float(squares.mean())))
    weights = values.T @ (rows @ (along / (squares + best * squares.mean())[:, None])).to(values.dtype)  # [D, C]
    return ((queries - mean) / std @ weights + level).argmax(1)


def _decomposed(values: Tensor) -> tuple[Tensor, Tensor]:
    """(squared singular values [m], left singular vectors [n, m]) of values [n, D], by whichever Gram matrix is smaller."""
    few = len(values) <= values.shape[1]
    # float64: the small end of a Gram matrix is lost in float32
    gram = (values @ values.T if few else values.T @ values).double()
    squares, vectors = torch.linalg.eigh(gram)
    kept = squares > 1e-7 * squares[-1].clamp(min=1e-12)
    if not kept.any():  # all features equal: nothing to tell classes by
        return squares.new_ones(1), squares.new_zeros(len(values), 1)
    squares, vectors = squares[kept], vectors[:, kept]
    return squares, vectors if few else values.double() @ vectors / squares.sqrt()


def _left_out(rows: Tensor, along: Tensor, targets: Tensor, squares: Tensor, strength: float) -> float:
    """Mean squared error on each image by the classifier of all others: the error on itself, divided by 1 - its leverage.

    Of fewer images than features each fits itself: both parts are near 0, and so are computed as what the regularisation leaves, not as
    differences from 1, and in float64. Cut off instead (1 - leverage >= 1e-4, as it was), the smallest regularisation looked best and was the worst.
    """
    left = strength / (squares + strength)  # [m]
    # what lies in no direction of the features; the mean is fitted, too
    error, free = targets - rows @ along, (1 - 1 / len(rows) - rows.square().sum(1)).clamp(min=0)
    residual = (error + rows @ (left[:, None] * along)) / (free + rows.square() @ left).clamp(min=1e-12)[:, None]
    return float(residual.square().mean())
