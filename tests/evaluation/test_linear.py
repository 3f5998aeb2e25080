import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scenes import write_split

from ssl_locat.config.yaml_files import shipped
from ssl_locat.errors import CheckpointError, ConfigError
from ssl_locat.evaluation.evaluate import load_protocol
from ssl_locat.evaluation.online import preserve_state, probe
from ssl_locat.evaluation.protocols import linear
from ssl_locat.evaluation.shared.features import extract, labelled_images
from ssl_locat.models.backbone import create_backbone


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("scenes"), num_train=64, num_test=24)


def test_schedule_matches_the_reference(golden):
    expected = golden("schedules")["out.eval_linear_cosine.lr0.001_bs128_100ep"]  # per epoch, lr scaled by 128 / 256
    steps = 100
    ours = torch.tensor([linear.annealed(epoch, steps, 1e-3 * 128 / 256) for epoch in range(steps)], dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-15)


def test_learns_colours(backbone, data):
    scores = linear.evaluate(backbone, data=data, epochs=30, lr=0.5, batch_size=32, blocks=2, patch_mean=True, workers=0)
    assert scores["top1"] > 70
    assert scores["top5"] == 100  # four classes


def test_kept_features_train_alike(backbone, data, monkeypatch):
    settings = {"data": data, "epochs": 30, "lr": 0.5, "batch_size": 32, "workers": 0}
    crops, original = [], linear.training_view
    monkeypatch.setattr(linear, "training_view", lambda *args, **kw: crops.append(args[1]) or original(*args, **kw))
    assert linear.evaluate(backbone, **settings, augment=False)["top1"] > 60
    assert not crops  # read once, centre-cropped
    linear.evaluate(backbone, **settings | {"epochs": 2}, augment=True)
    assert len(crops) == len(set(crops)) == 2 * 64  # every image of both epochs by a seed of its own


@pytest.mark.parametrize("protocol", [linear.evaluate, linear.sweep])
def test_few_labels_are_a_share_of_every_class(backbone, data, monkeypatch, protocol):
    totals, rows = [], linear.batches_of_rows
    monkeypatch.setattr(linear, "batches_of_rows", lambda total, *rest: totals.append(total) or rows(total, *rest))
    settings = {"data": data, "epochs": 1, "batch_size": 32, "augment": False, "workers": 0}
    if protocol is linear.sweep:
        with pytest.raises(ConfigError, match="blocks is 4, but LocAtVisionTransformer has 3 blocks"):
            protocol(backbone, **settings)
        settings["blocks"] = [1, 3]
    protocol(backbone, **settings)
    protocol(backbone, **settings, train_fraction=0.25)
    held_out = 0 if protocol is linear.evaluate else 0.1
    assert totals == [64 - round(held_out * 64), 16 - round(held_out * 16)]  # 4 classes of 16


def test_stopped_and_continued_equals_unbroken(backbone, data, tmp_path, monkeypatch):
    settings = {"data": data, "epochs": 4, "lr": 0.1, "batch_size": 32, "workers": 0}
    unbroken = linear.evaluate(backbone, **settings, resume_file=str(tmp_path / "a.safetensors"))
    assert 1 <= unbroken["best_epoch"] <= 4 and unbroken["top1_best"] >= unbroken["top1"]
    save, saves = linear.save_progress, []

    def killed(*args):
        save(*args)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(linear, "save_progress", killed)
    with pytest.raises(KeyboardInterrupt):
        linear.evaluate(backbone, **settings, resume_file=str(tmp_path / "b.safetensors"))
    monkeypatch.undo()
    assert linear.evaluate(backbone, **settings, resume_file=str(tmp_path / "b.safetensors")) == unbroken
    unbroken_state, state = (load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert all(torch.equal(unbroken_state[name], state[name]) for name in unbroken_state)
    with pytest.raises(CheckpointError, match="epochs: 4 there, 5 here"):
        linear.evaluate(backbone, **settings | {"epochs": 5}, resume_file=str(tmp_path / "b.safetensors"))
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    with pytest.raises(CheckpointError, match=r"another command \(weights"):
        linear.evaluate(backbone, **settings, resume_file=str(tmp_path / "b.safetensors"))


@pytest.mark.parametrize("first", [0, 3, 4, 7])
def test_kept_features_come_epoch_after_epoch_wherever_a_training_begins(first):
    whole = list(itertools.islice(linear.batches_of_rows(19, 4, 0, 7), 12))  # four batches an epoch, three rows left out
    found = list(itertools.islice(linear.batches_of_rows(19, 4, first, 7), 12 - first))
    assert all(torch.equal(one, other) for one, other in zip(found, whole[first:], strict=True))
    assert all(len({*torch.cat(whole[start : start + 4]).tolist()}) == 16 for start in (0, 4, 8))


def test_small_sets_get_steps_and_one_scale(backbone, data, monkeypatch):
    """64 images are two steps an epoch: five epochs become as many as 40 steps take, watched and saved as often as five would be."""
    tables, steps, train_heads = [], [], linear.train_heads

    def note(heads, settings, layout, batches, **options):
        first, *rest = itertools.islice(batches, 4)
        tables.append(torch.cat([features for features, _ in (first, *rest)]))
        seen, save = [], options["save"]
        train_heads(
            heads, settings, layout, iter([first] * 40), **options | {"save": lambda step: (seen.append(step), save(step))}
        )
        steps.append(seen)

    monkeypatch.setattr(linear, "train_heads", note)
    settings = {"data": data, "epochs": 5, "batch_size": 32, "augment": False, "least_steps": 40, "workers": 0}
    linear.evaluate(backbone, **settings)
    linear.evaluate(backbone, **settings, standardize=True)
    assert steps == [[8, 16, 24, 32, 40]] * 2
    plain, scaled = tables
    assert scaled.mean(0).abs().max() < 1e-4 and (scaled.std(0) - 1).abs().max() < 0.02  # two epochs of all images
    assert plain.mean(0).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eurosat_rgb/eurosat_rgb", "pbc_blood/pbc_blood", "cifar10/cifar10-mini"])
def test_small_sets_end_within_half_a_point_of_a_converged_regression(shared_data, name):
    """By L-BFGS in float64 on the same standardised features, with the same penalty. A little above is chance: 500 to 1000 test images."""
    folder, _, prefix = name.partition("/")
    data = {split: f"{shared_data(folder)}/{prefix}-{split}-*.tar" for split in ("train", "test")}
    torch.manual_seed(0)
    network = create_backbone("locatvit_tiny", img_size=64, patch_size=8, depth=4)
    _, options = load_protocol("linear_small", ["workers=0", *(f"data.{split}={path}" for split, path in data.items())])
    scores = linear.evaluate(network, **options)
    train, test = (
        extract(network, labelled_images(network, data, split, image_size=64, resize_size=None, batch_size=64, workers=0))
        for split in ("train", "test")
    )
    std, mean = torch.std_mean(train.values, 0)
    x, x_test = (((part.values - mean) / std).double() for part in (train, test))
    weight = torch.zeros(int(train.labels.max()) + 1, x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=600, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (
            F.cross_entropy(x @ weight[:, :-1].T + weight[:, -1], train.labels)
            + options["weight_decay"] / 2 * weight[:, :-1].square().sum()
        )
        value.backward()
        return value

    optimizer.step(loss)
    hits = (x_test @ weight[:, :-1].T + weight[:, -1]).argmax(1) == test.labels
    expected = 100 * hits.double().mean().item()
    print(name, "linear_small", scores["top1"], "regression", expected)
    assert expected - 0.5 <= scores["top1"] <= expected + 1


def test_the_papers_settings_are_those_of_its_text():
    _, options = load_protocol("linear", ["data.train=a", "data.test=b"])
    expected = {
        "epochs": 50,
        "blocks": 1,
        "lr": 1e-3,
        "batch_size": 1024,
        "augment": True,
        "standardize": False,
        "least_steps": 0,
    }
    assert expected.items() <= options.items()
    header = (shipped("eval") / "linear.yaml").read_text()
    assert "50 epochs" in header.splitlines()[0] and "100 epochs" not in header


def test_sweep_chooses_on_held_out_images(backbone, data):
    scores = linear.sweep(
        backbone, data=data, blocks=[1, 2], patch_mean=[False, True], lrs=[1e-6, 0.3], held_out=0.25, epochs=20, batch_size=16,
        augment=False, workers=0,
    )  # fmt: skip
    assert scores["best_lr"] == pytest.approx(0.3)  # the other cannot learn in so few steps
    assert scores["top1"] > 50
    assert scores["best_blocks"] in (1, 2) and scores["best_patch_mean"] in (0, 1)
    with pytest.raises(ConfigError, match="held_out is 0"):
        linear.sweep(backbone, data=data, held_out=0)


def test_columns_of_a_setting():
    layout = linear.Layout(blocks=3, class_width=2, mean_width=1)
    features = torch.tensor([[1, 1, 2, 2, 3, 3, 9]])
    assert layout.pick(features, linear.Setting(1, False, 0.1)).tolist() == [[3, 3]]
    assert layout.pick(features, linear.Setting(2, True, 0.1)).tolist() == [[2, 2, 3, 3, 9]]
    assert layout.pick(features, linear.Setting(3, False, 0.1)).tolist() == [[1, 1, 2, 2, 3, 3]]


def test_probes_leave_random_state_and_modes_alone(backbone, data):
    import random

    import numpy as np

    backbone.train()
    backbone.blocks[0].eval()

    def draw() -> list:
        return [torch.rand(2).tolist(), random.random(), np.random.rand()]

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = draw()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    scores = probe(backbone, "linear", {"epochs": 2, "batch_size": 16, "workers": 2}, data)
    assert probe(
        backbone,
        "dense",
        {"protocol": "hummingbird", "image_size": 32, "data": {"num_classes": 5}, "workers": 0},
        data | {"num_classes": 4, "label_key": "cls"},
    )
    assert "top1" in scores
    assert draw() == expected
    assert backbone.training and not backbone.blocks[0].training and backbone.blocks[1].training
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    with preserve_state(backbone):
        torch.rand(3)
    with pytest.raises(ConfigError, match=r"probes.hummingbrid: 'hummingbrid' is no probe.*Did you mean 'hummingbird'"):
        probe(backbone, "hummingbrid", {}, data)
    with pytest.raises(ConfigError, match=r"probes.often.k is \[0\]; expected a whole number"):
        probe(backbone, "often", {"protocol": "knn", "k": [0]}, data)
