import io
import json
import tarfile

import cv2
import numpy as np
import pytest
import torch
from scenes import png, write_split
from shards import add
from timm.models import save_for_hf

from ssl_locat import cli
from ssl_locat.errors import ConfigError, UserError
from ssl_locat.evaluation import compare, compare_rows
from ssl_locat.evaluation.shared import least_squares
from ssl_locat.evaluation.shared.least_squares import classify
from ssl_locat.intervals.paired import Tally
from ssl_locat.models.backbone import create_backbone

MODEL, OTHER = "timm:test_vit", "timm:test_vit2"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("compared"), num_train=80, num_test=40)


def words(sets, folder, *more):
    data = [f"data.{name}={path}" for name, path in sets.items()]
    return [*data, "image_size=32", "workers=0", "draws=2", "fractions=[0.1,1.0]", f"results={folder}", *more]


def test_a_comparison_from_the_command_line_says_its_verdict_and_goes_on_where_it_stopped(sets, tmp_path, capsys, monkeypatch):
    arguments = ["compare", MODEL, OTHER, *words(sets, tmp_path), "--json"]
    assert cli.run_command(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["rows"]) == ["raw pixels", "untrained", MODEL, OTHER]
    assert list(result["rows"][MODEL]) == ["knn 10 %", "knn 100 %", "linear 10 %", "linear 100 %"]
    found = result["differences"][OTHER]["all"]
    means = [np.mean([value for value, _, _ in result["rows"][name].values()]) for name in (MODEL, OTHER)]
    assert found["value"] == pytest.approx(means[1] - means[0], abs=0.01) and found["low"] < found["value"] < found["high"]
    assert found["verdict"] in result["differences"][OTHER]["sentence"]
    assert set(result["leaks"]) == {"train"}
    text = (tmp_path / "compare.md").read_text()
    assert text.rstrip().splitlines()[-1].startswith(OTHER) and (tmp_path / "compare.png").stat().st_size > 5000

    # rows at hand are not measured again
    monkeypatch.setattr(compare, "_row", lambda *_: pytest.fail("measured again"))
    assert cli.run_command(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    assert cli.run_command(["compare", MODEL, *words(sets, tmp_path, "k=3"), "--dry-run"]) == 0
    assert "to do  untrained" in capsys.readouterr().out


def test_images_with_masks_are_compared_by_their_patches(sets, tmp_path):
    result = compare.run([MODEL, *words(sets, tmp_path, "protocols=[hummingbird]", "data.num_classes=5", "leaks=false")])
    assert list(result["rows"]) == ["untrained", MODEL] and result["compared_with"] == "untrained"
    assert 0 < result["rows"][MODEL]["hummingbird 100 %"][0] < 100 and result["leaks"] is None

    from ssl_locat.evaluation.evaluate import evaluate

    torch.manual_seed(0)
    alone = evaluate(MODEL, "hummingbird", data={**sets, "num_classes": 5}, image_size=32, workers=0)["miou"]
    assert result["rows"][MODEL]["hummingbird 100 %"][0] == pytest.approx(alone, abs=0.01)


def bands_split(folder, rng):
    """Shards of arrays of five bands and 16 bits with labels and masks; test image 3 is training image 7, brighter by a little."""
    images = [cv2.resize(rng.random((5, 5, 5)), (32, 32), interpolation=cv2.INTER_CUBIC) for _ in range(60)]
    sets = {"train": images[:40], "test": [*images[40:43], 1.05 * images[7] + 0.01, *images[43:]]}
    for name, arrays in sets.items():
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number, image in enumerate(arrays):
                label, stored = number % 4, io.BytesIO()
                np.save(stored, (1000 + 2000 * image + 900 * (np.arange(5) == label)).clip(0, 65535).astype(np.uint16))
                mask = np.full((32, 32), label, np.uint8)
                mask[:16] = 3
                for ending, content in (("cls", b"%d" % label), ("npy", stored.getvalue()), ("seg.png", png(mask))):
                    add(tar, f"{number:03d}.{ending}", content)
    return {name: str(folder / f"{name}.tar") for name in sets}


def test_networks_of_five_bands_are_compared_as_those_of_colours(tmp_path):
    sets = bands_split(tmp_path, np.random.default_rng(0))
    backbone = create_backbone("vit_tiny", in_chans=5, img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=1)
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "mean": (0.4,) * 5, "std": (0.2,) * 5}
    save_for_hf(backbone, tmp_path / "network", safe_serialization=True)
    config = json.loads((tmp_path / "network/config.json").read_text())
    config["channels"] = {"low": 0.0, "high": 5000.0}  # as an export of ours notes it
    (tmp_path / "network/config.json").write_text(json.dumps(config))
    model = str(tmp_path / "network")
    found = compare.run([model, *words(sets, tmp_path / "out")])
    assert found["rows"]["raw pixels"]["linear 100 %"][0] == 100  # a band tells the class
    assert [pair["test"] for pair in found["leaks"]["train"]["pairs"]] == [3] and (tmp_path / "out/leaks.png").exists()
    assert found["leaks"]["train"]["pairs"][0]["keys"] == ["003", "007"]
    dense = compare.run([model, *words(sets, tmp_path / "dense", "protocols=[hummingbird]", "data.num_classes=4")])
    assert set(dense["rows"]) == {"untrained", model} and dense["leaks"]["train"]["images"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train=a", "data.test=b"], "needs a MODEL"),
        ([MODEL, "data.train=a"], "needs data.test"),
        ([MODEL, "data.train=a", "data.test=b", "drws=3"], "unknown key 'drws'. Did you mean 'draws'"),
        ([MODEL, "data.train=a", "data.test=b", "fractions=[2]"], "expected shares above 0"),
        ([MODEL, "data.train=a", "data.test=b", "protocols=[knn,hummingbird]"], "Compare twice"),
    ],
)
def test_a_mistake_is_one_message(arguments, message):
    with pytest.raises((ConfigError, UserError), match=message):
        compare.load_compare(arguments)


def test_draws_hold_as_many_of_every_class_and_smaller_ones_lie_in_larger():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    small, large = ([*compare_rows.draws_of(labels, share, 3, seed=0)] for share in (0.06, 0.3))
    assert len(small) == 3 and [labels[rows].bincount().tolist() for rows in large] == [[10, 10, 10]] * 3
    assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(small, large, strict=True))
    assert not torch.equal(small[0], small[1])
    assert [len(rows) for rows in compare_rows.draws_of(labels, 1.0, 3, seed=0)] == [100]


def test_least_squares_finds_what_is_linear_with_few_images_and_with_many():
    torch.manual_seed(0)
    directions = torch.randn(4, 50)
    for number in (40, 400):
        labels = torch.arange(number) % 4
        bank = directions[labels] + torch.randn(number, 50)
        queries = directions[torch.arange(200) % 4] + torch.randn(200, 50)
        assert (classify(bank, labels, queries, 4) == torch.arange(200) % 4).float().mean() > 0.95
    assert (classify(torch.ones(8, 3), torch.arange(8) % 2, torch.ones(2, 3), 2) >= 0).all()


@pytest.mark.parametrize("number", [30, 80])
def test_leave_one_out_in_closed_form_is_leave_one_out(number):
    """Also of fewer images than features, where each image fits itself and both parts of the closed form are near 0."""
    torch.manual_seed(0)
    values = torch.randn(number, 60).double()
    values -= values.mean(0)
    targets = torch.randn(number, 2).double()
    targets -= targets.mean(0)
    squares, rows = least_squares._decomposed(values)
    for share in (1e-5, 1e-2, 1.0):
        strength = share * float(squares.mean())
        errors = []
        for out in range(number):
            kept = torch.arange(number) != out
            # the mean is fitted without the image, too
            bank, level, goal = values[kept], values[kept].mean(0), targets[kept].mean(0)
            gram = (bank - level).T @ (bank - level) + strength * torch.eye(60).double()
            weights = torch.linalg.solve(gram, (bank - level).T @ (targets[kept] - goal))
            errors.append((targets[out] - goal - (values[out] - level) @ weights).square())
        found = least_squares._left_out(rows, rows.T @ targets, targets, squares, strength)
        assert found == pytest.approx(float(torch.stack(errors).mean()), rel=1e-3)


def test_an_untrained_twin_keeps_nothing_of_the_weights():
    backbone = create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    twin = compare_rows.untrained(backbone, 1)
    own = dict(backbone.named_parameters())
    same = [name for name, value in twin.named_parameters() if value.ndim > 1 and torch.equal(value, own[name])]
    assert not same and twin(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_test_images_that_training_has_seen_do_not_decide(tmp_path):
    """Two networks, one of which remembers the leaked images: without them there is no difference."""
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.5
    remembers = base.copy()
    remembers[:40] = True
    rows = {name: {"knn 100 %": Tally.of_hits(hits)} for name, hits in (("a", base), ("b", remembers))}
    leaks = {"train": {"images": 40, "of": 100, "pairs": [{"test": number} for number in range(40)]}}
    _, config = compare.load_compare([MODEL, "data.train=a", "data.test=b"])
    found = compare.judged(["a", "b"], rows, config, leaks)["differences"]["b"]
    assert found["all"]["verdict"] == "helped" and found["without_leaks"]["value"] == 0


def test_a_mean_that_rose_does_not_hide_a_column_that_fell():
    rng = np.random.default_rng(0)
    base = rng.random(600) < 0.7
    better, worse = base | (rng.random(600) < 0.6), base & (rng.random(600) > 0.1)
    rows = {
        "a": {"knn 100 %": Tally.of_hits(base), "linear 100 %": Tally.of_hits(base)},
        "b": {"knn 100 %": Tally.of_hits(better), "linear 100 %": Tally.of_hits(worse)},
        "c": {"knn 100 %": Tally.of_hits(better), "linear 100 %": Tally.of_hits(better)},
    }
    _, config = compare.load_compare([MODEL, "data.train=a", "data.test=b"])
    found = compare.judged(["a", "b", "c"], rows, config, None)["differences"]
    assert found["b"]["all"]["verdict"] == "helped" and found["b"]["fallen"] == ["linear 100 %"]
    assert "helped on average, not everywhere" in found["b"]["sentence"]
    assert "Fell beyond the noise: linear 100 % -" in found["b"]["sentence"]
    assert found["c"]["fallen"] == [] and "c against a: helped, +" in found["c"]["sentence"]


def test_a_gain_no_larger_than_two_trainings_of_one_recipe_differ_by_is_not_called_help():
    base = np.arange(2000) < 1400
    rows = {"a": base, "b": base | (np.arange(2000) >= 1970), "c": base & (np.arange(2000) >= 30)}
    rows = {name: {"knn 100 %": Tally.of_hits(hits)} for name, hits in rows.items()}
    found = {}
    for more in ([], ["margin=0"]):
        _, config = compare.load_compare([MODEL, "data.train=a", "data.test=b", *more])
        found[bool(more)] = compare.judged(["a", "b", "c"], rows, config, None)["differences"]
    assert found[False]["b"]["all"]["low"] > 0 and found[False]["b"]["all"]["verdict"] != "helped"
    assert "b against a: better, but not by a margin to speak of, +1.50 points" in found[False]["b"]["sentence"]
    assert found[True]["b"]["all"]["verdict"] == "helped"
    assert found[False]["c"]["all"]["verdict"] == found[True]["c"]["all"]["verdict"] == "harmed"  # a loss needs no margin


def test_braces_make_several_seeds_one_model():
    rng = np.random.default_rng(0)
    rows = {"untrained": {"knn 10 %": Tally.of_hits(rng.random((2, 300)) < 0.3)}}
    for name, level in (("start", 0.5), ("run-0", 0.8), ("run-1", 0.6)):
        rows[name] = {"knn 10 %": Tally.of_hits(rng.random((2, 300)) < level)}
    _, config = compare.load_compare(["start", "run-{0,1}", "data.train=a", "data.test=b"])
    assert [name for name, _ in compare.rows_of(["start", "run-{0,1}"], config)] == [
        "raw pixels",
        "untrained",
        "start",
        "run-0",
        "run-1",
    ]
    both = compare.judged(["start", "run-{0,1}"], rows, config, None)
    alone = compare.judged(["start", "run-0", "run-1"], rows, config, None)["differences"]
    found = both["differences"]["run-{0,1}"]
    assert list(both["rows"]) == ["untrained", "start", "run-{0,1}"] and "and 2 seeds" in found["sentence"]
    assert found["all"]["value"] == pytest.approx(np.mean([alone[name]["all"]["value"] for name in ("run-0", "run-1")]), abs=1e-3)
    # two seeds that lie 20 points apart say little of the recipe
    assert alone["run-0"]["all"]["verdict"] == "helped" and found["all"]["low"] < 0
