"""Which checkpoint: statements about known curves, and a real table of milestones, trained once, resumed cell by cell."""

import csv
import json
import math
import shutil
from itertools import product

import numpy as np
import pytest
from scenes import write_split

from ssl_locat.config.yaml_files import dump_yaml
from ssl_locat.errors import ConfigError
from ssl_locat.tables import table
from ssl_locat.tables.checkpoints import (
    ALL,
    ANY,
    BEST,
    BEST_AT,
    LAST,
    LOSS,
    LOST,
    Run,
    collect,
    correlations,
    decay,
    losses,
    peak,
    spearman,
    training_loss,
    twins,
)  # fmt: skip
from ssl_locat.tables.jobs import Point, TrainingJob, jobs, trainings
from ssl_locat.tables.schema import load_table

STEPS = [10 * number for number in range(1, 11)]
UP = np.linspace(1, 10, 10)
TURNS = np.array([1.0, 4, 7, 9, 10, 9, 8, 6, 5, 4])  # best at the fifth of ten


def run_of(row, seed, dense, measure):
    dense, measure = np.array(dense, float), np.array(measure, float)
    return Run(row, seed, STEPS, {"dense": dense, "m": measure}, {"dense": dense, "m": measure})


def of(lines, **wanted):
    (line,) = (line for line in lines if all(getattr(line, key) == value for key, value in wanted.items()))
    return line


def test_spearman_is_of_ranks_and_ties_share_theirs():
    assert spearman(UP, UP**3) == pytest.approx(1) and spearman(UP, -UP) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 beside 1, 2, 3, 4: covariance 4.5 / sqrt(4.5 * 5)
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])) == pytest.approx(4.5 / math.sqrt(4.5 * 5), abs=1e-6)
    assert math.isnan(spearman(UP, np.ones(10))) and math.isnan(spearman(UP, np.full(10, np.nan)))


def test_a_measure_that_follows_the_task_loses_nothing_and_one_that_rises_loses_what_decayed():
    runs = [run_of("ViT", seed, TURNS + seed, measure) for seed, measure in ((0, TURNS), (1, TURNS * 2), (2, UP))]
    found = of(correlations(runs, ["m"], ["dense"]), row="ViT", what="m")
    assert found.runs == 3 and found.found.value == pytest.approx((1 + 1 + spearman(UP, TURNS)) / 3, abs=1e-6)
    lost = losses(runs, ["m"], ["dense"])
    assert of(lost, what="m").found.value == pytest.approx((0 + 0 + 6) / 3)
    assert of(lost, what="m").found.low == 0  # no choice is better than the best
    assert of(lost, what=LAST).found == (6, 6, 6)
    assert of(lost, what=ANY).found.value == pytest.approx(10 - TURNS.mean())


def test_where_a_run_was_best_and_what_it_lost_are_means_of_neighbours():
    assert peak(run_of("ViT", 0, TURNS, UP), "dense") == pytest.approx((50, 28 / 3, 28 / 3 - 5))  # 9, 10, 9; at the end 6, 5, 4
    assert peak(run_of("ViT", 0, UP, UP), "dense")[2] == 0  # still rising


def test_twins_are_compared_seed_by_seed_and_other_rows_are_not():
    runs = [
        run_of(row, seed, values + 3 * seed, UP) for row, values in (("ViT", TURNS), ("ViT + LocAt", UP)) for seed in range(3)
    ]
    runs.append(run_of("Other", 0, TURNS, UP))
    lines = [line for line in twins(runs, ["dense"], " + LocAt") if line.row != f"{ALL}: + LocAt"]
    assert {line.row for line in lines} == {"ViT: + LocAt"} and {line.runs for line in lines} == {3}
    assert of(lines, what=LOST).found.value == pytest.approx(-(28 / 3 - 5))
    assert of(lines, what=LOST).found.low == pytest.approx(of(lines, what=LOST).found.high)  # the seeds add the same to both
    assert of(lines, what=BEST_AT).found.value > 0 and of(lines, what=BEST).found.value == pytest.approx(9 - 28 / 3)
    assert {line.row for line in decay(runs, ["dense"])} == {"ViT", "ViT + LocAt", "Other"}


def test_no_interval_of_where_runs_were_best_reaches_past_a_run():
    runs = [run_of("ViT", seed, values, UP) for seed, values in enumerate((TURNS, UP, TURNS[::-1]))]
    found = of(decay(runs, ["dense"]), what=BEST_AT).found
    assert 0 <= found.low < found.value < found.high == 100


def test_the_training_loss_is_the_mean_since_the_checkpoint_before(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "loss": step}) + "\n" for step in range(1, 7)))
    assert training_loss(tmp_path, [2, 6]).tolist() == [1.5, 4.5]
    assert np.isnan(training_loss(tmp_path / "nowhere", [2])).all()


@pytest.fixture
def study(tmp_path):
    """Two rows of two seeds, four checkpoints each, and a row of a later stage."""
    data = write_split(tmp_path / "data", num_train=32, num_test=12)
    recipe = {
        "run_dir": "unused", "backbone": {"name": "vit_tiny", "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 1},
        "data": {"train": "unused", "workers": 0}, "objective": {"name": "dino", "num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
        "crops": {"global_size": 32, "local_size": 16, "num_local": 1}, "optim": {"total_steps": 9, "global_batch_size": 8, "warmup_epochs": 0, "lr": 0.1}, "teacher": {"momentum": [0.5, 0.5]},
        "precision": "fp32", "checkpoint": {"every_steps": 9}, "log": {"every_steps": 1},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    content = {
        "title": "Which?", "results": str(tmp_path / "results"), "data": {"colours": {**data, "num_classes": 4}, "masks": {**data, "num_classes": 5}},
        "checkpoints": {"count": 4, "measures": ["DSE", "RankMe"], "balanced": "DSE", "targets": ["dense", "k-NN"]},
        "columns": {
            "k-NN": {"protocol": "knn", "data": "colours", "metric": "top1_k3", "options": {"k": [3], "workers": 0}},
            "dense": {"protocol": "hummingbird", "data": "masks", "metric": "miou", "options": {"image_size": 32, "workers": 0}},
            "DSE": {"protocol": "unlabelled", "data": "colours", "metric": "dse", "options": {"images": 8, "workers": 0}},
            "RankMe": {"protocol": "unlabelled", "data": "colours", "metric": "rankme", "options": {"images": 8, "workers": 0}},
        },
        "train": {"recipe": str(tmp_path / "recipe.yaml"), "data": "colours", "seeds": [0, 1]},
        "rows": {"DINO": {}, "DINO + LocAt": {"train": {"options": {"backbone": {"name": "locatvit_tiny"}}}}, "large": {"stage": 2}},
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(dump_yaml(content))
    return path


def test_twins_are_paired_by_seed_where_one_lacks_a_run(study):
    loaded = load_table(str(study), ["train.seeds=[4, 7]"])
    folders = {(row, job.options["seed"]): job.folder for row in ("DINO", "DINO + LocAt") for job in trainings(loaded, row)}
    del folders["DINO + LocAt", 4]
    points = [
        Point(row, folder, step, "dense", float(seed), {}) for (row, seed), folder in folders.items() for step in (2, 4, 6, 8)
    ]
    runs = collect(loaded, loaded.checkpoints, points)
    assert [(run.row, run.seed) for run in runs] == [("DINO", 4), ("DINO", 7), ("DINO + LocAt", 7)]
    best = of(twins(runs, ["dense"], " + LocAt"), row="DINO: + LocAt", what=BEST)
    assert (best.runs, best.found.value) == (1, 0.0)


def test_every_column_is_measured_on_every_milestone_and_any_cell_again_without_training(study, tmp_path, monkeypatch):
    folder, error = table.run(str(study))
    assert error is None
    raw = list(csv.DictReader((folder / "checkpoints.csv").open()))
    expected = product(
        ("DINO", "DINO + LocAt"), "01", ("2", "4", "6", "8"), ("k-NN", "dense", "DSE", "DSE (lambda of the run)", "RankMe", LOSS)
    )
    assert {(line["row"], line["seed"], line["step"], line["column"]) for line in raw} == set(expected)
    dense = {(line["row"], line["seed"], line["step"]): line["value"] for line in raw if line["column"] == "DSE"}
    assert len(set(dense.values())) == 16  # another number for every checkpoint
    chosen = list(csv.DictReader((folder / "choices.csv").open()))
    assert {line["what"] for line in chosen if line["row"] == ALL} == {
        "DSE",
        "DSE (lambda of the run)",
        "RankMe",
        LOSS,
        LAST,
        ANY,
    }
    assert all(float(line["mean"]) >= 0 for line in chosen)
    words = (folder / "checkpoints.md").read_text()
    assert "4 runs (DINO, DINO + LocAt), 4 checkpoints each" in words and "Not filled: large." in words
    assert "- large: not filled, of stage 2" in (folder / "table.md").read_text()
    assert all((folder / name).stat().st_size > 1000 for name in ("checkpoints.png", "checkpoints.svg", "correlations.png"))
    # the table itself shows the last milestone
    ours = {
        (line["row"], line["column"]): float(line["mean"])
        for line in csv.DictReader((folder / "table.csv").open())
        if line["mean"]
    }
    last = [float(line["value"]) for line in raw if (line["row"], line["step"], line["column"]) == ("DINO", "8", "k-NN")]
    assert ours["DINO", "k-NN"] == pytest.approx(sum(last) / 2, abs=1e-5)

    monkeypatch.setattr(table, "_train", lambda *_: pytest.fail("trained again"))
    before = (folder / "checkpoints.csv").read_bytes()
    gone = sorted((folder / "cells").glob("hummingbird-*.json"))
    assert len(gone) == 16
    for path in gone[:3]:
        path.unlink()
    for made in ("checkpoints.csv", "checkpoints.md"):
        (folder / made).unlink()
    table.run(str(study))
    assert (folder / "checkpoints.csv").read_bytes() == before


def test_a_checkpoint_that_is_missing_costs_its_cells_and_its_runs_statements(study, tmp_path):
    table.run(str(study), ["train.seeds=[0]"])
    results = tmp_path / "results"
    (run,) = {
        job.folder
        for job in jobs(load_table(str(study), ["train.seeds=[0]"]))
        if isinstance(job, TrainingJob) and job.row == "DINO"
    }
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    for path in (results / "cells").glob("knn-*.json"):
        path.unlink()
    _, error = table.run(str(study), ["train.seeds=[0]"])
    assert error is not None and "1 of" in str(error) and "DINO, k-NN, step 4" in str(error)
    kept = [line for line in csv.DictReader((results / "choices.csv").open()) if line["target"] == "k-NN"]
    assert {line["row"] for line in kept} == {"DINO + LocAt"}
    assert "step 4" in (results / "table.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("checkpoints.measures=[DES]", r"measures is 'DES'; known: k-NN, dense, DSE, RankMe. Did you mean 'DSE'"),
        ("checkpoints.count=12", r"checkpoints.count is 12, of which DINO needs as many steps or more, .*total_steps \(now 9\)"),
        ("train.options.optim={epochs: 1, total_steps: null}", r"total_steps \(now None\)"),
        ("checkpoints.balanced=RankMe", r"checkpoints.balanced is 'RankMe'; expected one of checkpoints.measures whose metric is dse"),
        ("columns.DSE.metric=dse_patches", r"of dse_patches, the metric of DSE, nobody knows which values are good"),
        ("rows.DINO.model=timm:vit_tiny", r"checkpoints are measured of trainings by a recipe \(train.recipe\); DINO has a MODEL"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_training(study, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        table.run(str(study), [change])
    assert not (tmp_path / "results").exists()
