"""Schedules as pure functions of progress: no state, so that a resumed run needs none."""

import math

import numpy as np


def cosine(iteration: float, total: float, start: float, end: float, warmup: float = 0) -> float:
    """DINO's cosine_scheduler at one (possibly fractional) iteration.

    Linear from 0 to `start` over `warmup` iterations (both ends included: the first iteration has 0, the last warm-up one
    `start`, and the first cosine one `start` again), then a cosine to `end`, which `total` itself would reach.

    Args:
        iteration: 0-based, 0 <= iteration < total.
        total, warmup: in iterations.
    """
    if iteration < warmup:
        return start * min(1.0, iteration / (warmup - 1)) if warmup > 1 else 0.0
    done = min(1.0, (iteration - warmup) / max(total - warmup, 1e-12))
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * done))


def stepwise(epoch: int, start: float, end: float, warmup_epochs: int) -> float:
    """DINO's teacher temperature: constant within an epoch, linear over `warmup_epochs` epochs, then `end`."""
    if epoch >= warmup_epochs:
        return end
    return float(np.linspace(start, end, warmup_epochs)[epoch])  # as the reference builds its table: both ends included
