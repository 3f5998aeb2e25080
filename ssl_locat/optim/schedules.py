"""Schedules as pure functions of progress: no state, so that a resumed run needs none."""

import math

import numpy as np


def warmed_up(iteration: float, warmup: float, start: float, peak: float) -> float:
    """In a straight line from `start` to `peak` over `warmup` iterations, both ends included; a warm-up of one iteration is `start` alone."""
    return start + (peak - start) * min(1.0, iteration / (warmup - 1)) if warmup > 1 else start


def cosine(iteration: float, total: float, start: float, end: float, warmup: float = 0, warmup_start: float = 0.0) -> float:
    """DINO's cosine_scheduler at one (possibly fractional) iteration.

    Linear from `warmup_start` to `start` over `warmup` iterations (both ends included: the first iteration has `warmup_start`, the last warm-up one
    `start`, and the first cosine one `start` again), then a cosine to `end`, which `total` itself would reach.

    Args:
        iteration: 0-based, 0 <= iteration < total.
        total, warmup: in iterations.
    """
    if iteration < warmup:
        return warmed_up(iteration, warmup, warmup_start, start)
    done = min(1.0, (iteration - warmup) / max(total - warmup, 1e-12))
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * done))


def constant_cooldown(
    iteration: float, total: float, start: float, end: float, warmup: float = 0, warmup_start: float = 0.0, share: float = 0.2
) -> float:
    """LocAtViT's constant-cooldown schedule at one (possibly fractional) iteration: `start`, and over the last `share` a straight line to `end`.

    The line begins one step down (at 7 iterations: 1, then 0.714), and `end` is what `total` itself would reach, so no iteration has it.
    Warm-up, which the reference does not have here, and arguments are as of `cosine`.
    """
    if iteration < warmup:
        return warmed_up(iteration, warmup, warmup_start, start)
    if iteration < (1 - share) * total:
        return start
    return end + (start - end) * (total - min(iteration, total)) / (share * total)


def straight(done: float, start: float, end: float) -> float:
    """From `start` to `end` in a straight line; done: 0 to 1."""
    return start + (end - start) * done


def decayed(iteration: float, total: float, decay: float) -> float:
    """How much of a decay over the last `decay` iterations lies behind: 0 before it and at its first iteration, 1 at `total`, which none has."""
    return min(1.0, max(0.0, iteration - (total - decay)) / decay) if decay > 0 else 0.0


LEARNING_RATES = {"cosine": cosine, "constant_cooldown": constant_cooldown}  # optim.schedule -> function


def stepwise(epoch: int, start: float, end: float, warmup_epochs: int) -> float:
    """DINO's teacher temperature: constant within an epoch, linear over `warmup_epochs` epochs, then `end`."""
    if epoch >= warmup_epochs:
        return end
    return float(np.linspace(start, end, warmup_epochs)[epoch])  # as the reference builds its table: both ends included
