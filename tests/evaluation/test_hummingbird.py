import json

import pytest
import torch
import torch.nn.functional as F
from scenes import write_shard, write_split

from ssl_locat.errors import ConfigError, DataError, UserError
from ssl_locat.evaluation.evaluate import refuse_not_finite, run_protocol
from ssl_locat.evaluation.protocols import hummingbird as hb
from ssl_locat.evaluation.shared import dense
from ssl_locat.evaluation.shared.metrics import confusion_matrix, hungarian_scores, segmentation_scores
from ssl_locat.models.backbone import create_backbone

CASES = [("hummingbird_255", "unbounded"), ("hummingbird_255", "bounded"), ("hummingbird_swapped", "unbounded")]


@pytest.mark.parametrize(("name", "run"), CASES)
def test_matches_the_reference(golden, name, run):
    case = golden(name)
    config = case.config
    grid, classes = (config["grid"], config["grid"]), config["classes"]
    frequencies = hb.patch_frequencies(case["in.train_masks"][:, 0], grid, classes, void_class=0)
    # in float64, as the reference's exact search was: in float32 a tie for the 30th neighbour may fall the other way
    memory = F.normalize(case["in.train_features"].double(), dim=2)
    if run == "bounded":
        per_image = config["runs"]["bounded"]["memory_size"] // config["ntrain"]
        kept = hb.sample_patches(frequencies, case["out.bounded.uniform_draws"].view(config["ntrain"], -1), per_image)
        assert (kept.sort().values == case["out.bounded.sampled_indices"].sort().values).all()
        memory, frequencies = memory.take_along_dim(kept[..., None], 1), frequencies.take_along_dim(kept[..., None], 1)
    memory, frequencies = memory.flatten(0, 1), frequencies.flatten(0, 1)

    queries = case["in.val_features"].double().flatten(0, 1)
    soft = hb.retrieve(memory, frequencies.double(), queries, neighbours=30, beta=0.02).unflatten(
        0, case["in.val_features"].shape[:2]
    )
    expected = case[f"out.{run}.label_hat"].double()
    torch.testing.assert_close(soft, expected, rtol=1e-4, atol=2e-6)  # the reference's softmax(x / 0.02) is of fp32 cosines
    masks = case["in.val_masks"][:, 0]
    predicted = hb.paint(soft, grid, masks.shape[1:])
    assert (predicted == case[f"out.{run}.pred"][:, 0]).float().mean() > 0.9999
    confusion = confusion_matrix(predicted, masks, classes)
    assert (confusion - case[f"out.{run}.confusion"]).abs().sum() <= 2
    plain, (matched, truth_of) = segmentation_scores(confusion)["miou"], hungarian_scores(confusion)
    assert plain == pytest.approx(100 * case[f"out.{run}.miou_identity"].item(), abs=0.01)
    assert matched == pytest.approx(100 * case[f"out.{run}.miou_hungarian"].item(), abs=0.01)
    assert (truth_of == case[f"out.{run}.hungarian_pred_to_gt"]).all()


def test_void_pixels_have_no_class_unless_the_reference_is_followed():
    masks = torch.tensor([[[0, 1, 255, 255], [1, 1, 255, 255]]])
    assert hb.patch_frequencies(masks, (1, 2), 2).tolist() == [[[0.25, 0.75], [0.0, 0.0]]]
    assert hb.patch_frequencies(masks, (1, 2), 2, void_class=0).tolist() == [[[0.25, 0.75], [1.0, 0.0]]]


def test_fewer_memories_than_neighbours():
    memory, labels = F.normalize(torch.randn(3, 8), dim=1), torch.eye(3)
    soft = hb.retrieve(memory, labels, 4 * memory, neighbours=30, beta=0.02)
    assert (soft.argmax(1) == torch.arange(3)).all()
    torch.testing.assert_close(soft.sum(1), torch.ones(3))


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


def test_finds_coloured_squares_better_than_the_most_common_class(tmp_path, backbone):
    data = write_split(tmp_path, num_train=24, num_test=8) | {"num_classes": 5}
    scores = hb.evaluate(backbone, data=data, image_size=32, workers=0)
    assert set(scores) == {"miou", "mean_accuracy", "pixel_accuracy", "miou_hungarian"}
    assert scores["miou"] > 30  # all background would be 15
    bounded = hb.evaluate(backbone, data=data, image_size=32, memory_size=24 * 8, workers=0)
    assert 20 < bounded["miou"] <= 100
    augmented = hb.evaluate(backbone, data=data, image_size=32, augment=True, paper_compat=True, norm=True, workers=2)
    assert augmented["miou"] > 20
    assert scores == hb.evaluate(backbone, data=data, image_size=32, workers=2, batch_size=5)


def test_the_memory_is_made_of_random_views_where_asked(tmp_path, backbone, monkeypatch):
    seeds, original = [], dense.random_view
    monkeypatch.setattr(dense, "random_view", lambda image, mask, seed: seeds.append(seed) or original(image, mask, seed))
    data = write_split(tmp_path, num_train=12, num_test=4) | {"num_classes": 5}
    plain = hb.evaluate(backbone, data=data, image_size=32, workers=0)
    assert not seeds
    augmented = hb.evaluate(backbone, data=data, image_size=32, augment=True, workers=0)
    assert len(seeds) == len(set(seeds)) == 12  # the training images, once each; test images are shown as they are
    assert augmented != plain


def test_other_is_a_class_of_its_own_for_the_reference(tmp_path, backbone, monkeypatch):
    """ADE20K there: 151 classes, 0 remembered and predicted, left out of the truth. Before, "other" was remembered as the first class."""
    found = []
    monkeypatch.setattr(hb, "hungarian_scores", lambda confusion: found.append(confusion) or hungarian_scores(confusion))
    data = write_split(tmp_path, num_train=24, num_test=8)
    settings = {"image_size": 32, "paper_compat": True, "workers": 0}
    scores = hb.evaluate(backbone, data=data | {"num_classes": 4, "reduce_zero_label": True}, **settings)
    hb.evaluate(backbone, data=data | {"num_classes": 5}, **settings)  # the same ids, 0 judged too
    assert found[0].shape == (5, 5) and found[0][0].sum() == 0 and found[0][:, 0].sum() > 0
    assert torch.equal(found[0][1:], found[1][1:])
    ious = [found[0][i, i] / (found[0][i].sum() + found[0][:, i].sum() - found[0][i, i]) for i in range(1, 5)]
    assert scores["miou_hungarian"] == pytest.approx(100 * sum(ious).item() / 5, abs=1e-4)  # 5 rows, of which "other" counts 0
    hb.evaluate(backbone, data=data | {"num_classes": 4, "reduce_zero_label": True}, **settings | {"paper_compat": False})
    assert found[2].shape == (4, 4)


def test_a_model_without_patch_tokens_is_refused(tmp_path):
    data = write_split(tmp_path, num_train=8, num_test=4) | {"num_classes": 5}
    with pytest.raises(UserError, match=r"Linear does not say how its tokens lie"):
        hb.evaluate(torch.nn.Linear(2, 2), data=data, image_size=32)


def test_a_block_that_is_not_there_is_refused(tmp_path, backbone):
    data = write_split(tmp_path, num_train=8, num_test=4) | {"num_classes": 5}
    with pytest.raises(ConfigError, match="block is -3, but LocAtVisionTransformer has 2 blocks or stages to read from"):
        hb.evaluate(backbone, data=data, image_size=32, block=-3, workers=0)


def test_wrong_masks_name_the_file(tmp_path, backbone):
    data = write_split(tmp_path, num_train=8, num_test=4)
    with pytest.raises(DataError, match=r"train-0.tar: 0003: holds class id 4; expected 0\.\.3 and 255 for void"):
        hb.evaluate(backbone, data=data | {"num_classes": 4}, image_size=32, workers=0)
    with pytest.raises(ConfigError, match=r"data.num_classes is missing"):
        hb.evaluate(backbone, data=data, image_size=32)


def test_masks_that_are_void_all_over_leave_no_number_and_end_with_code_2(tmp_path, backbone):
    data = write_split(tmp_path, num_train=8, num_test=4)
    blank = {"train": data["train"], "test": write_shard(tmp_path / "void-0.tar", [0, 1], 1, void=True), "num_classes": 5}
    result = run_protocol(backbone, "hummingbird", {"data": blank, "image_size": 32, "workers": 0}, "M")
    assert result["metrics"]["miou"] is None and "NaN" not in json.dumps(result)
    with pytest.raises(UserError, match="hummingbird of M: miou, mean_accuracy, pixel_accuracy not finite") as refused:
        refuse_not_finite(result)
    assert refused.value.exit_code == 2
