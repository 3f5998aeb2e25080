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
    targets = targets - level
    squares, rows = _decomposed(values)
    along = rows.T @ targets  # [m, C]
    best = min(PATH, key=lambda share: _left_out(rows, along, targets, squares, share * float(squares.mean())))
    weights = values.T @ (rows @ (along / (squares + best * squares.mean())[:, None]))  # [D, C]
    return ((queries - mean) / std @ weights + level).argmax(1)


def _decomposed(values: Tensor) -> tuple[Tensor, Tensor]:
    """(squared singular values [m], left singular vectors [n, m]) of values [n, D], by whichever Gram matrix is smaller."""
    few = len(values) <= values.shape[1]
    # float64: the small end of a Gram matrix is lost in float32
    gram = (values @ values.T if few else values.T @ values).double()
    squares, vectors = torch.linalg.eigh(gram)
    kept = squares > 1e-7 * squares[-1].clamp(min=1e-12)
    if not kept.any():  # all features equal: nothing to tell classes by
        return values.new_ones(1), values.new_zeros(len(values), 1)
    squares, vectors = squares[kept].to(values.dtype), vectors[:, kept].to(values.dtype)
    return squares, vectors if few else values @ vectors / squares.sqrt()


def _left_out(rows: Tensor, along: Tensor, targets: Tensor, squares: Tensor, strength: float) -> float:
    """Mean squared error on each image by the classifier of all others: the error on itself, divided by 1 - its leverage."""
    shrunk = squares / (squares + strength)
    leverage = (rows.square() @ shrunk + 1 / len(rows)).clamp(max=1 - 1e-4)  # [n]; the mean is fitted, too
    residual = (targets - rows @ (shrunk[:, None] * along)) / (1 - leverage)[:, None]
    return float(residual.square().mean())
