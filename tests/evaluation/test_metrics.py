import itertools

import numpy as np
import pytest
import torch

from ssl_locat.evaluation.shared import metrics


@pytest.mark.parametrize("name", ["miou_plain", "miou_reduce_zero", "miou_absent_class"])
def test_segmentation_scores_match_mmseg(golden, name):
    case = golden(name)
    classes = case.config["classes"]
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for i in range(len(case.config["sizes"])):
        label = case[f"in.{i}.label"]
        if case.config["reduce_zero_label"]:
            label = metrics.reduce_zero_label(label)
        confusion += metrics.confusion_matrix(case[f"in.{i}.pred"], label, classes)

    torch.testing.assert_close(metrics.class_ious(confusion), case["out.iou"], rtol=1e-12, atol=0, equal_nan=True)
    scores = metrics.segmentation_scores(confusion)
    assert scores["miou"] == pytest.approx(100 * case["out.miou"].item(), rel=1e-12)
    assert scores["mean_accuracy"] == pytest.approx(100 * case["out.macc"].item(), rel=1e-12)
    assert scores["pixel_accuracy"] == pytest.approx(100 * case["out.aacc"].item(), rel=1e-12)


def test_assignment_is_the_cheapest_of_all_permutations():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5, 6):
        for _ in range(10):
            cost = rng.integers(-4, 5, (n, n)).astype(float)  # integers: ties are common
            assigned = metrics.best_assignment(cost)
            assert sorted(assigned) == list(range(n))
            cheapest = min(sum(cost[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
            assert cost[np.arange(n), assigned].sum() == cheapest


def test_hungarian_forgives_swapped_classes_and_plain_does_not():
    confusion = torch.tensor([[0, 9, 0], [7, 0, 0], [0, 0, 5]])
    assert metrics.segmentation_scores(confusion)["miou"] == pytest.approx(100 / 3)
    matched, truth_of = metrics.hungarian_scores(confusion)
    assert matched == pytest.approx(100)
    assert truth_of.tolist() == [1, 0, 2]
    assert metrics.hungarian_scores(torch.tensor([[2, 2], [0, 4]]))[0] == pytest.approx(100 * (2 / 4 + 4 / 6) / 2)


def test_a_class_of_one_pixel_counts_as_any_other():
    assert metrics.hungarian_scores(torch.tensor([[1, 0], [0, 3]]))[0] == pytest.approx(100)


def test_labels_move_down_by_one_and_what_was_void_stays_void():
    assert metrics.reduce_zero_label(torch.tensor([0, 1, 2, 254, 255], dtype=torch.uint8)).tolist() == [255, 0, 1, 253, 255]


def test_a_class_of_score_zero_is_no_hit():
    scores = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.3]])
    assert metrics.top_hits(scores, torch.tensor([1, 2]), k=3).tolist() == [False, True]
