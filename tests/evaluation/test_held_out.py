"""One labelled set judged by itself: against slow loops, on one process and on two."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import run_ranks

from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import DataError
from ssl_locat.evaluation.protocols.held_out import evaluate, fold_of, judge_labels, kinds_of
from ssl_locat.evaluation.protocols.hummingbird import paint, patch_frequencies, retrieve
from ssl_locat.evaluation.shared.dense import dense_images, last_patches
from ssl_locat.evaluation.shared.features import Features
from ssl_locat.evaluation.shared.least_squares import classify
from ssl_locat.evaluation.shared.tallies import read_tallies
from ssl_locat.models.backbone import create_backbone


def tiny():
    torch.manual_seed(0)
    return create_backbone("vit_tiny", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder, num_train=20, num_test=45, image_size=32, progress=False)
    return {"test": f"{folder}/textures-test-*.tar", "mask_classes": 11}


def test_each_image_is_judged_by_the_labels_of_other_folds():
    torch.manual_seed(0)
    table = Features(torch.randn(61, 8), torch.arange(61) % 4)
    found = judge_labels(table, 5, 3, 0.07, 0, torch.device("cpu"))
    fold, unit = fold_of(61, 5, 0), F.normalize(table.values, dim=1)
    assert fold.bincount().tolist() == [13, 12, 12, 12, 12]
    for image in range(61):
        others = (fold != fold[image]).nonzero().squeeze(1)
        similarity = unit[others] @ unit[image]
        near = similarity.topk(3).indices
        votes = torch.zeros(4).index_add(0, table.labels[others][near], (similarity[near] / 0.07).exp())
        assert bool(found["knn"].hits[0, image, 0]) == (int(votes.argmax()) == int(table.labels[image]))
        guess = classify(table.values[others], table.labels[others], table.values[image][None], 4)
        assert bool(found["linear"].hits[0, image, 0]) == (int(guess) == int(table.labels[image]))


def test_scenes_are_painted_by_the_patches_of_other_folds(data, tmp_path):
    """With a memory that holds all patches: Hummingbird, as its own protocol has it, fold by fold."""
    backbone, file = tiny(), str(tmp_path / "tallies.npz")
    options = {"image_size": 32, "folds": 3, "workers": 0, "memory_size": 10**6}
    scores = evaluate(backbone, data=data, tallies=file, **options)
    assert set(scores) == {"knn", "linear", "miou", "score", "test_images"} and scores["test_images"] == 45
    assert scores["score"] == pytest.approx((scores["knn"] + scores["linear"] + scores["miou"]) / 3)
    images = dense_images(
        {"test": data["test"], "num_classes": 11}, "test", image_size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        batch_size=45, workers=0,
    )  # fmt: skip
    (batch,) = images
    with torch.no_grad():
        tokens = last_patches(backbone, batch.images)
    votes, patches = patch_frequencies(batch.masks, tokens.grid, 11), F.normalize(tokens.patches, dim=2)
    fold, hits, of = fold_of(45, 3, 0), torch.zeros(11), torch.zeros(11)
    for number in range(3):
        own = fold == number
        soft = retrieve(patches[~own].flatten(0, 1), votes[~own].flatten(0, 1), patches[own].flatten(0, 1), 30, 0.02)
        painted, truth = paint(soft.unflatten(0, (int(own.sum()), -1)), tokens.grid, (32, 32)), batch.masks[own]
        for label in range(11):
            there = truth != 255
            hits[label] += ((painted == label) & (truth == label)).sum()
            of[label] += (((painted == label) | (truth == label)) & there).sum()
    kept = read_tallies(file)
    assert kept is not None
    np.testing.assert_allclose(kept["miou"].hits[0].sum(0), hits, atol=2)  # ties of rounding: a pixel or two
    np.testing.assert_allclose(kept["miou"].of[0].sum(0), of, atol=2)


def _on_a_rank(data: dict) -> dict:
    return evaluate(tiny(), data=data, image_size=32, folds=3, workers=0)


@pytest.mark.slow
def test_two_processes_judge_alike(data):
    one, (first, second) = _on_a_rank(data), run_ranks(_on_a_rank, 2, data)
    assert first == second and first == pytest.approx(one)


def test_sets_that_cannot_judge_are_named(data, tmp_path):
    assert kinds_of(data) == ("labels", "masks") and kinds_of({"test": data["test"], "num_classes": 10}) == ("labels",)
    make_textures(tmp_path / "few", num_train=20, num_test=10, image_size=32, progress=False)
    with pytest.raises(DataError, match="too few to judge by"):
        kinds_of({"test": f"{tmp_path}/few/textures-test-*.tar"})
