"""Intervals of figures without their answers: against published tables, and against what they promise on drawn numbers."""

import statistics

import numpy as np
import pytest

from ssl_locat.intervals.figures import one_more_run, share_noise, student_t, wilson
from ssl_locat.runs.best import Measure, noise_of
from ssl_locat.tables.text import Cell


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (200, 1.9719)]
)
def test_students_quantiles_are_those_of_the_tables(freedom, quantile):
    assert student_t(0.95, freedom) == pytest.approx(quantile, abs=1e-4)


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_one_more_run_of_the_same_kind_is_called_a_tie_as_often_as_the_level_says(runs):
    """Two deviations, which tables had before, called every third one of two runs another thing."""
    rng = np.random.default_rng(runs)
    found = [Cell.of(list(values[:runs]), values[runs]) for values in rng.normal(60, 0.7, (4000, runs + 1))]
    assert np.mean([cell.is_tie for cell in found]) == pytest.approx(0.95, abs=0.012)
    assert Cell.of([60.0, 60.4, 60.2], 62.0).is_tie is False
    assert one_more_run(statistics.stdev([60.0, 60.4, 60.2]), 3) == pytest.approx(0.2 * 4.3027 * (4 / 3) ** 0.5, abs=1e-3)


def test_what_doctor_calls_noise_is_half_of_the_interval_that_a_run_prints():
    low, high = wilson(34.2, 1000)
    assert (
        noise_of(Measure("knn", "top1"), {"top1_k20": 34.2, "test_images": 1000}) == (high - low) / 2 == share_noise(34.2, 1000)
    )
    assert share_noise(100.0, 50) > 3  # fifty answers that are right are no proof that all would be


def test_answers_that_are_correlated_by_half_differ_by_no_more_than_the_noise():
    rng = np.random.default_rng(0)
    both = rng.multivariate_normal([0, 0], [[1, 0.71], [0.71, 1]], (2000, 500)) > 0  # a correlation of the answers of about 1/2
    shares = 100 * both.mean(1)  # [2000, 2]
    assert np.corrcoef(both[..., 0].ravel(), both[..., 1].ravel())[0, 1] == pytest.approx(0.5, abs=0.01)
    inside = np.mean([abs(one - other) <= share_noise(one, 500) for one, other in shares])
    assert inside == pytest.approx(0.95, abs=0.015)
