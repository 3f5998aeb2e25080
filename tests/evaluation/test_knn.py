import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scenes import png, scene, write_shard, write_split

from ssl_locat.errors import CheckpointError, ConfigError, DataError, Preempted, UserError
from ssl_locat.evaluation.protocols import knn
from ssl_locat.evaluation.shared.features import Features, check_classes, label_subset
from ssl_locat.evaluation.shared.stopping import stoppable
from ssl_locat.models.backbone import create_backbone


def test_matches_the_reference(golden):
    case = golden("knn_clusters")
    ks = case.config["ks"]
    bank, queries = (F.normalize(case[f"in.{part}_features"], dim=1) for part in ("train", "test"))
    temperature, classes = case.config["T"], case.config["classes"]
    similarity, where = knn.nearest(bank, queries, max(ks))
    scores = knn.class_scores(similarity, case["in.train_labels"][where], ks, temperature, classes)
    best = (queries @ bank.T).amax(1, keepdim=True)
    for k in ks:
        # ours are relative to the nearest neighbour's weight
        ours, classes_of = (scores[k] * (best / temperature).exp()).topk(5)
        torch.testing.assert_close(ours, case[f"out.k{k}.scores_top5"], rtol=1e-4, atol=0)
        positive = case[f"out.k{k}.scores_top5"] > 0  # order among classes without a neighbour is chance
        assert (classes_of == case[f"out.k{k}.pred_top5"])[positive].all()

    table = knn.score(
        Features(case["in.train_features"], case["in.train_labels"]),
        Features(case["in.test_features"], case["in.test_labels"]),
        ks, [temperature], classes,
    )  # fmt: skip
    for k in ks:
        assert table[f"top1_k{k}"] == pytest.approx(case[f"out.k{k}.top1_top5"][0].item(), abs=1e-9)
        assert table[f"top5_k{k}"] == pytest.approx(case[f"out.k{k}.top5_positive_score_only"].item(), abs=1e-9)


def test_pieces_of_the_bank_do_not_matter():
    torch.manual_seed(0)
    bank, queries = torch.randn(500, 16), torch.randn(30, 16)
    whole = knn.nearest(bank, queries, 20)
    for rows in (7, 20, 133):
        pieces = knn.nearest(bank, queries, 20, bank_rows=rows, query_rows=11)
        torch.testing.assert_close(pieces[0], whole[0], rtol=1e-5, atol=1e-5)
        assert (pieces[1] == whole[1]).all()


def test_the_bank_passes_through_the_device_once_however_many_queries_there_are():
    class Bank:
        rows = torch.randn(100, 4)
        taken = 0

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, piece):
            self.taken += len(self.rows[piece])
            return self.rows[piece]

    bank = Bank()
    knn.nearest(bank, torch.randn(50, 4), 3, bank_rows=10, query_rows=7)
    assert bank.taken == 100


def test_small_temperature_does_not_overflow():
    bank = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(50) % 5
    similarity, where = knn.nearest(bank, bank, 10)
    scores = knn.class_scores(similarity, labels[where], [10], 0.001, 5)[10]
    assert scores.isfinite().all()
    assert (scores.argmax(1) == labels).all()


def test_several_temperatures_are_named():
    table = Features(torch.randn(40, 4, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3)
    assert set(knn.score(table, table, [5], [0.07, 0.1], 3)) == {"top1_k5_t0.07", "top5_k5_t0.07", "top1_k5_t0.1", "top5_k5_t0.1"}


def test_classes_and_confusions_add_up():
    labels, guesses = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3]), torch.tensor([0, 1, 1, 1, 1, 0, 3, 3, 1])
    found = knn.by_class(labels, guesses, ["cat", "dog", "cow"])
    assert found["classes"] == [
        {"class": "cat", "images": 3, "top1": 33.33},
        {"class": "dog", "images": 2, "top1": 100.0},
        {"class": "3", "images": 4, "top1": 50.0},
    ]
    assert found["confusions"][0] == {"class": "cat", "taken_for": "dog", "images": 2} and len(found["confusions"]) == 3
    assert knn.by_class(labels, labels)["confusions"] == []
    many = knn.by_class(torch.arange(30_000), torch.arange(30_000) + 1)
    assert (len(many["classes"]), len(many["confusions"])) == (knn.MOST_CLASSES, knn.MOST_CONFUSIONS)


def test_guesses_are_those_that_are_scored():
    torch.manual_seed(0)
    bank, queries = (Features(torch.randn(n, 4), torch.arange(n) % 3) for n in (60, 40))
    guesses = torch.zeros_like(queries.labels)
    scores = knn.score(bank, queries, [5, 10], [0.07, 0.1], 3, guesses=guesses)
    assert scores == knn.score(bank, queries, [5, 10], [0.07, 0.1], 3)
    assert scores["top1_k5_t0.07"] == pytest.approx(100 * (guesses == queries.labels).double().mean().item())


def test_more_neighbours_than_images_is_refused():
    table = Features(torch.randn(10, 4), torch.arange(10) % 3)
    with pytest.raises(ConfigError, match="k = 200 is more than the 10 images"):
        knn.score(table, table, [5, 200], [0.07], 3)


def test_classes_must_agree():
    assert check_classes(torch.tensor([0, 1, 2]), torch.tensor([2])) == 3
    with pytest.raises(DataError, match=r"not in data.train: 3, 5"):
        check_classes(torch.tensor([0, 1]), torch.tensor([1, 3, 5]))
    with pytest.raises(DataError, match=r"labels must be 0\.\.1"):
        check_classes(torch.tensor([0, 1, 2]), torch.tensor([1]), num_classes=2)


def test_label_subset_takes_a_share_of_every_class():
    labels = torch.cat([torch.zeros(200), torch.ones(50), torch.full((3,), 2.0)]).long()
    kept = label_subset(labels, 0.1, seed=0)
    assert torch.bincount(labels[kept]).tolist() == [20, 5, 1]
    assert kept.tolist() == label_subset(labels, 0.1, seed=0).tolist()
    assert kept.tolist() != label_subset(labels, 0.1, seed=1).tolist()
    with pytest.raises(ConfigError, match="train_fraction is 10"):
        label_subset(labels, 10, seed=0)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


def test_colours_are_told_apart_from_shards_and_class_folders(tmp_path, backbone):
    data = write_split(tmp_path)
    scores = knn.evaluate(backbone, data=data, k=[5], workers=0)
    assert scores["top1_k5"] > 60  # four classes by colour: even random features see some of it
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate(["blue", "green", "red"]):
            (tmp_path / "folders" / part / name).mkdir(parents=True)
            for index in range(6):
                (tmp_path / "folders" / part / name / f"{index}.png").write_bytes(png(scene(label, 32, rng)[0]))
    folders = {part: str(tmp_path / "folders" / part) for part in ("train", "test")}
    assert knn.evaluate(backbone, data=folders, k=5, workers=2)["top1_k5"] > 50


def test_compressed_shards_give_the_same_numbers(tmp_path, backbone):
    plain = write_split(tmp_path)
    packed = {
        "train": write_shard(tmp_path / "train.tar.gz", [i % 4 for i in range(48)], 0),
        "test": write_shard(tmp_path / "test.tar.gz", [i % 4 for i in range(24)], 1),
    }
    assert knn.evaluate(backbone, data=plain, k=5, workers=0) == knn.evaluate(backbone, data=packed, k=5, workers=0)


def test_folds_and_few_labels(tmp_path, backbone):
    data = write_split(tmp_path)
    assert knn.evaluate(backbone, data={"train": data["train"]}, k=5, folds=4, workers=0)["top1_k5"] > 50
    few = knn.evaluate(backbone, data=data, k=12, train_fraction=0.25, workers=0)
    assert 25 <= few["top1_k12"] <= 100
    with pytest.raises(ConfigError, match=r"k = 13 is more than the 12 images"):  # 4 classes of 12, a quarter of each
        knn.evaluate(backbone, data=data, k=13, train_fraction=0.25, workers=0)


def test_raw_pixels_need_no_backbone(tmp_path):
    assert knn.raw_pixel_knn(data=write_split(tmp_path), k=5)["top1_k5"] > 50


def test_raw_pixels_of_cifar_as_its_readme_has_them(shared_data):
    folder = shared_data("cifar10")
    data = {"train": f"{folder}/cifar10-mini-train-*.tar", "test": f"{folder}/cifar10-mini-test-*.tar"}
    assert knn.raw_pixel_knn(data=data, k=20)["top1_k20"] == pytest.approx(
        34.7, abs=0.2
    )  # 33.5 by majority vote; full set: 45.79


def test_wrong_input_is_said_before_work_starts(tmp_path, backbone):
    data = write_split(tmp_path)
    with pytest.raises(UserError, match=r"image_size 30 is not a multiple of the backbone's patch size 8. Nearest: 24 or 32"):
        knn.evaluate(backbone, data=data, image_size=30)
    with pytest.raises(ConfigError, match=r"unknown key 'data.tset'. Did you mean 'test'"):
        knn.evaluate(backbone, data={"train": data["train"], "tset": data["test"]})
    with pytest.raises(ConfigError, match=r"data.test is missing"):
        knn.evaluate(backbone, data={"train": data["train"]})
    for part, names in {"train": "abc", "test": "ac"}.items():  # read alone, each would number its folders 0, 1, ...
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(png(scene(0, 32, np.random.default_rng(0))[0]))
    with pytest.raises(DataError, match=r"the class folder 'b' is in data.train, not in data.test \(3 and 2 folders\)"):
        knn.evaluate(backbone, data={"train": str(tmp_path / "train"), "test": str(tmp_path / "test")}, workers=0)
    unlabelled = tmp_path / "images"
    unlabelled.mkdir()
    (unlabelled / "a.png").write_bytes(png(scene(0, 32, np.random.default_rng(0))[0]))
    with pytest.raises(DataError, match="no label"):
        knn.evaluate(backbone, data={"train": str(unlabelled), "test": data["test"]}, workers=0)


def test_asked_to_stop_the_features_are_kept_and_the_same_command_reads_only_the_rest(tmp_path):
    data = write_split(tmp_path / "data", num_train=40, num_test=12)
    backbone = create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=1)
    settings = {"data": data, "k": [3], "batch_size": 8, "workers": 0}
    unbroken = knn.evaluate(backbone, **settings)
    file = tmp_path / "features.safetensors"
    seen = 0

    def after(_, __, output):
        nonlocal seen
        seen += len(output)
        if seen in (16, 40):  # in the middle of the training images; then, resumed, at their end
            os.kill(os.getpid(), signal.SIGUSR2)

    backbone.patch_embed.register_forward_hook(after)
    for _ in range(2):
        with stoppable(), pytest.raises(Preempted, match=r"Stopped by SIGUSR2 in .* features"):
            knn.evaluate(backbone, **settings, resume_file=str(file))
        kept = load_file(file)
        assert sum(int((labels >= 0).sum()) for name, labels in kept.items() if name.endswith("labels")) == seen
    assert knn.evaluate(backbone, **settings, resume_file=str(file)) == unbroken
    assert seen == 40 + 12
    with pytest.raises(CheckpointError, match="image_size"):
        knn.evaluate(backbone, **settings, image_size=40, resume_file=str(file))
