"""Rows without weights: trained once, read by every column, resumed, shared between tables; what they would cost; the figure."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file
from scenes import write_split

from ssl_locat.config.yaml_files import dump_yaml
from ssl_locat.errors import ConfigError, Diverged, UserError
from ssl_locat.evaluation.protocols import supervised
from ssl_locat.tables import cost, table
from ssl_locat.tables.figure import arrows, draw
from ssl_locat.tables.jobs import Job, TrainingJob, all_jobs, cells, jobs, training_folder, trainings
from ssl_locat.tables.schema import Figure, flat, load_table, nested
from ssl_locat.tables.text import Cell

SHAPE = "img_size=32&patch_size=8&embed_dim=64&depth=1&num_heads=1"
QUICK = {
    "epochs": 2, "warmup_epochs": 0, "lr": 3e-3, "batch_size": 16, "auto_augment": None, "mixup": 0, "cutmix": 0, "random_erasing": 0,
    "precision": "fp32", "workers": 0, "crop_fraction": 1.0,
}  # fmt: skip


@pytest.fixture
def chain(tmp_path):
    """A table whose rows are trained: three columns read the weights, one the untrained model."""
    data = write_split(tmp_path / "data", num_train=32, num_test=12)
    path = tmp_path / "chain.yaml"
    content = {
        "title": "Chain", "results": str(tmp_path / "results"), "trained": str(tmp_path / "trained"),
        "data": {"colours": {**data, "num_classes": 4}, "masks": {**data, "num_classes": 5}},
        "train": {"protocol": "supervised", "data": "colours", "options": QUICK},
        "columns": {
            "top-1": {"protocol": "validate", "data": "colours", "metric": "top1", "options": {"workers": 0}},
            "k-NN": {"protocol": "knn", "data": "colours", "metric": "top1_k3", "options": {"k": [3], "workers": 0}},
            "dense": {"protocol": "hummingbird", "data": "masks", "metric": "miou", "options": {"image_size": 32, "workers": 0}},
            "params": {"protocol": "efficiency", "metric": "params", "fresh": True, "options": {"image_size": 32, "num_classes": 4}},
        },
        "rows": {
            "ViT": {"fresh": f"timm:vit_tiny?{SHAPE}", "published": {"top-1": 25.0, "dense": 3.0}},
            "ViT + LocAt": {"fresh": f"timm:locatvit_tiny?{SHAPE}", "published": {"top-1": 50.0, "dense": 5.0}, "note": "ours | it is"},
        },
        "figure": {"x": "top-1", "y": "dense"},
    }  # fmt: skip
    path.write_text(dump_yaml(content))
    return path


def test_trains_once_and_every_column_reads_the_weights(chain, tmp_path, monkeypatch):
    folder, error = table.run(str(chain))
    assert error is None
    ours = {(row["row"], row["column"]): float(row["mean"]) for row in csv.DictReader((folder / "table.csv").open())}
    results = sorted((tmp_path / "trained").glob("*.json"))
    assert len(results) == 2 and len(ours) == 8
    for result, row in zip(results, ("ViT + LocAt", "ViT"), strict=True):  # locatvit before vit
        weights = result.with_suffix("")
        config = json.loads((weights / "config.json").read_text())
        assert config["pretrained_cfg"]["mean"] == [0.5] * 3  # the release's, of the protocol's YAML
        assert ours[row, "top-1"] == json.loads(result.read_text())["metrics"]["top1"]  # of the very same weights
        assert len(load_file(weights / "model.safetensors")) > 10
    assert not list((tmp_path / "trained").glob("*.progress.*")) and not list((tmp_path / "trained").glob("*.lock"))
    assert "- ViT + LocAt: ours | it is" in (folder / "table.md").read_text()
    assert r"\footnotesize ViT + LocAt: ours | it is" in (folder / "table.tex").read_text()
    drawn = list(csv.DictReader((folder / "figure.csv").open()))
    assert [(line["from"], line["to"], line["numbers"]) for line in drawn] == [
        ("ViT", "ViT + LocAt", "published"), ("ViT", "ViT + LocAt", "ours")
    ]  # fmt: skip
    assert float(drawn[1]["y_to"]) == pytest.approx(ours["ViT + LocAt", "dense"]) and float(drawn[0]["x_from"]) == 25

    # nothing is done twice, by this table or by another that shares the folder; a cell that is gone is measured from the same weights
    monkeypatch.setattr(table, "_train", lambda *_: pytest.fail("trained again"))
    (cell,) = [file for file in (folder / "cells").glob("validate-*.json") if str(results[1].stem) in file.read_text()]
    before = cell.read_text()
    cell.unlink()
    table.run(str(chain), ["columns.k-NN.options.k=[1,3]"])
    assert json.loads(cell.read_text())["metrics"] == json.loads(before)["metrics"]
    table.run(str(chain), [f"results={tmp_path}/other"])


def test_half_a_training_resumes_and_equals_an_unbroken_one(chain, tmp_path, monkeypatch):
    only = ["columns.k-NN.data=colours", f"ViT + LocAt=timm:vit_tiny?{SHAPE}&num_classes=4"]  # given: not trained
    table.run(str(chain), [*only, f"trained={tmp_path}/whole"])
    save, saves = supervised.save_progress, []

    def killed(*args):
        save(*args)
        saves.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(supervised, "save_progress", killed)
    with pytest.raises(KeyboardInterrupt):
        table.run(str(chain), only)
    monkeypatch.setattr(supervised, "save_progress", save)
    (kept,) = (tmp_path / "trained").glob("*.progress.safetensors")
    assert kept.stat().st_size > 0
    steps = []
    monkeypatch.setattr(supervised, "triangle", lambda *at, once=supervised.triangle: steps.append(at[0]) or once(*at))
    torch.manual_seed(99)
    table.run(str(chain), only)
    assert len(saves) == 1 and sorted(set(steps)) == [2, 3]  # the second epoch's
    (whole,), (resumed,) = ((tmp_path / name).glob("*/model.safetensors") for name in ("whole", "trained"))
    whole, resumed = load_file(whole), load_file(resumed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_cells_of_a_failed_training_say_so_and_the_highest_code_ends_the_table(chain, monkeypatch):
    train = table._train

    def diverges(job, device):
        if "locatvit" in job.fresh:
            raise Diverged("the loss is nan")
        train(job, device)

    monkeypatch.setattr(table, "_train", diverges)
    folder, error = table.run(str(chain))
    text = (folder / "table.md").read_text()
    assert error.exit_code == 5 and "4 of 10 cells" in str(error)
    assert "ViT + LocAt, training: the loss is nan" in text and "ViT + LocAt, k-NN: not measured, as its training failed" in text
    assert "| ViT | " in text


def test_a_row_changes_its_training_and_a_given_model_needs_none(chain):
    shown = load_table(str(chain), ["rows.ViT.train.options.epochs=7", f"ViT + LocAt=timm:locatvit_tiny?{SHAPE}&num_classes=4"])
    (training,) = [job for job in jobs(shown) if isinstance(job, TrainingJob)]
    assert (
        training.options["epochs"] == 7 and training.options["batch_size"] == 16 and training.options["data"]["num_classes"] == 4
    )
    assert [job.training for job in cells(shown) if job.column == "k-NN"] == [training, None]
    skipped = load_table(str(chain), ["rows.ViT.skip={dense: as it is blind}"])
    assert [(job.row, job.column) for job in cells(skipped) if job.column == "dense"] == [("ViT + LocAt", "dense")]
    seeds = load_table(str(chain), ["train.seeds=[0, 1, 2]"])
    assert len([job for job in jobs(seeds) if isinstance(job, TrainingJob)]) == 6
    assert len([job for job in cells(seeds) if (job.row, job.column) == ("ViT", "k-NN")]) == 3
    # one training of every row, in all its columns, before any row has a second
    seed_of = {job.folder: job.options["seed"] for job in jobs(seeds) if isinstance(job, TrainingJob)}
    turns = [seed_of[folder] for job in jobs(seeds) if (folder := training_folder(job))]
    assert turns == [seed for seed in (0, 1, 2) for _ in range(2 * (1 + 3))]
    # without a column that reads it nothing is trained; without its data neither
    unread = [f"rows.{row}.skip={{top-1: why, k-NN: why, dense: why}}" for row in shown.rows]
    for change in (unread, ["data.colours.train=null"]):
        assert not [job for job in jobs(load_table(str(chain), change)) if isinstance(job, TrainingJob)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.options.epoks=1", r"unknown key 'train.options.epoks'. Did you mean 'epochs'"),
        ("rows.ViT.train.options.epochs=many", r"rows.ViT.train.options.epochs is 'many'; expected a whole number"),
        ("train.protocol=linear", r"train.protocol is 'linear', which exports no weights; expected a YAML of supervised"),
        ("train.data=colors", r"train.data is 'colors'; known: colours, masks. Did you mean 'colours'"),
        ("rows.ViT.fresh=timm:vit_tinny", r"ViT, training: timm has no model 'vit_tinny'. Did you mean 'vit_tiny'"),
        ("rows.ViT.train.options.distill={model: nowhere.pth}", r"ViT, training: there is no nowhere.pth"),
        ("rows.ViT.train.recipe=quickstrat", r"Did you mean 'quickstart'"),
        (
            "rows.ViT.train={recipe: quickstart, options: {optim: {epoks: 1}}}",
            r"unknown key 'optim.epoks'. Did you mean 'epochs'",
        ),
        ("figure.x=top1", r"figure.x is 'top1'; known: top-1, k-NN, dense, params"),
    ],
)
def test_what_is_wrong_with_a_training_is_said_before_any(chain, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        table.run(str(chain), [change])
    assert not (tmp_path / "trained").exists()


def test_a_queued_table_does_the_same_jobs(chain, tmp_path):
    """What `--on` writes beside the code says what the command said, whatever the shipped YAMLs become."""
    arguments = ["rows.ViT.train.options.epochs=7", "train.options.lr=1e-3"]
    queued = tmp_path / "queued.yaml"
    queued.write_text(dump_yaml(table.check(str(chain), arguments)))
    here, there = (load_table(*given) for given in ((str(chain), arguments), (str(queued),)))
    assert jobs(here) == jobs(there)
    assert [table.cell_file(here, job) for job in cells(here)] == [table.cell_file(there, job) for job in cells(there)]


def test_a_recipe_is_pretrained_and_measured(tmp_path):
    data = write_split(tmp_path / "data", num_train=32, num_test=12)
    recipe = {
        "run_dir": "unused", "backbone": {"name": "locatvit_tiny", "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 1},
        "data": {"train": "unused", "workers": 0}, "objective": {"name": "dino", "num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
        "crops": {"global_size": 32, "local_size": 16, "num_local": 1}, "optim": {"epochs": 9, "global_batch_size": 8, "warmup_epochs": 0},
        "precision": "fp32", "checkpoint": {"every_steps": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    content = {
        "title": "Recipe", "results": str(tmp_path / "results"), "data": {"colours": {**data, "num_classes": 4}}, "train": {"data": "colours"},
        "columns": {"k-NN": {"protocol": "knn", "data": "colours", "metric": "top1_k3", "options": {"k": [3], "workers": 0}}},
        "rows": {"ours": {"train": {"recipe": str(tmp_path / "recipe.yaml"), "options": {"optim": {"epochs": 1}}}}, "theirs": {"published": {"k-NN": 3}}},
    }  # fmt: skip
    (tmp_path / "table.yaml").write_text(dump_yaml(content))
    (training, cell) = jobs(load_table(str(tmp_path / "table.yaml"), ["rows.ours.train.options.optim.lr=0.01"]))
    config = training.config()
    assert (config.optim.epochs, config.optim.lr, config.optim.global_batch_size) == (1, 0.01, 8) and config.data.num_classes == 4
    _, error = table.run(str(tmp_path / "table.yaml"))
    assert error is None
    (run,) = (path.parent for path in (tmp_path / "results" / "trained").glob("*/summary.json"))
    assert json.loads((run / "summary.json").read_text())["steps"] == 4 and isinstance(cell, Job) and not cell.lacks
    assert "| ours | " in (tmp_path / "results" / "table.md").read_text()
    # its result is lost: the run itself knows that it has finished
    run.with_name(f"{run.name}.json").unlink()
    table.run(str(tmp_path / "table.yaml"))
    assert json.loads((run / "summary.json").read_text())["restarts"] == 0


def test_a_queued_table_of_recipes_keeps_what_its_rows_share(tmp_path):
    data = write_split(tmp_path / "data", num_train=16, num_test=8)
    words = [f"data.imagenet.{part}={path}" for part, path in data.items()]
    words += ["train.options.optim={epochs: 1, global_batch_size: 16}", "train.options.data.workers=0", f"results={tmp_path}"]
    (tmp_path / "queued.yaml").write_text(dump_yaml(table.check("dino", words)))
    here, there = load_table("dino", words), load_table(str(tmp_path / "queued.yaml"))
    assert jobs(here) == jobs(there) and len(jobs(here)) == 2 * (1 + 6)
    assert {job.config().optim.global_batch_size for job in jobs(there) if isinstance(job, TrainingJob)} == {16}


def test_the_papers_tables_share_their_trainings():
    """LocAtViT-T is trained once, whatever the rows that it stands in are called."""
    data = ["data.imagenet.train=a.tar", "data.imagenet.test=b.tar"]
    rows = {
        "main": "Tiny ViT + LocAt",
        "hummingbird": "Tiny ViT + LocAt",
        "ablation": "Tiny LocAtViT",
        "kernels": "Tiny Gaussian",
    }
    folders = {trainings(load_table(name, data), row)[0].folder for name, row in rows.items()}
    assert len(folders) == 1 and folders.pop().name.startswith("locatvit-tiny-")


def test_weights_that_are_gone_are_missed_before_anything_is_done(chain, tmp_path):
    (training, *_) = jobs(load_table(str(chain)))
    training.result.parent.mkdir()
    training.result.write_text('{"metrics": {}}')
    with pytest.raises(UserError, match=r"ViT, training: .* says that it has finished, but its weights, .*, are gone"):
        table.check_jobs(load_table(str(chain)))


def test_options_flatten_and_nest():
    options = {"optim": {"lr": 1, "betas": [1, 2]}, "probes": {}, "a.b": 3}
    assert flat(options) == {"optim.lr": 1, "optim.betas": [1, 2], "probes": {}, "a.b": 3}
    assert nested(flat(options)) == {"optim": {"lr": 1, "betas": [1, 2]}, "probes": {}, "a": {"b": 3}}


# what it would cost -----------------------------------------------------------------------------------------------------------


def test_a_plan_lists_every_job_with_its_operations_and_writes_nothing(chain, tmp_path, capsys):
    cost.dry_run(
        str(chain), ["data.masks.train=null", "data.masks.test=null", "data.masks.size={train: 32, test: 12}"], tflops=1e-6
    )
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + 4) and not (tmp_path / "results").exists() and not (tmp_path / "trained").exists()
    assert lines[0].startswith("to do ") and "ViT, training: supervised of timm:vit_tiny" in lines[0] and "GPU hours" in lines[0]
    assert lines[3].startswith("needs data.masks.test ") and "PFLOP" in lines[3] and last.startswith("in all ")
    plan = load_table(str(chain))
    training, top1, knn = list(all_jobs(plan))[:3]
    # 16 patches and a class token of width 64; a linear layer of n numbers takes 2 n FLOP a token
    tokens, width = 17, 64
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    patches = 2 * 16 * (3 * 8 * 8) * width
    forward = patches + block
    assert cost.cost(plan, knn) == pytest.approx(44 * forward, rel=0.02)
    assert cost.cost(plan, top1) == pytest.approx(12 * forward, rel=0.02)
    # backward: twice the forward pass, but for the pixels' gradient
    assert cost.cost(plan, training) == pytest.approx(2 * 32 * (3 * forward - patches) + 12 * forward, rel=0.01)
    twice = load_table(str(chain), ["train.options.epochs=4"])
    assert cost.cost(twice, next(iter(all_jobs(twice)))) - cost.cost(plan, training) == pytest.approx(
        2 * 32 * (3 * forward - patches), rel=0.01
    )


def test_hours_are_for_a_given_speed_alone():
    assert cost.in_words(3.6e18, None) == "3.6 EFLOP" and cost.in_words(3.6e15, 100) == "3.6 PFLOP, 0.01 GPU hours at 100 TFLOP/s"
    assert "not known" in cost.in_words(None, 100)


# the figure -------------------------------------------------------------------------------------------------------------------


def test_arrows_lead_from_each_row_to_its_twin(tmp_path):
    def cells_of(x, y):
        return {"top-1": Cell(x, None, 1, 70.0), "ADE": Cell(y, None, 1, 20.0)}

    grid = {
        "A": cells_of(1.0, 2.0),
        "A + LocAt": cells_of(3.0, 4.0),
        "B": cells_of(None, 2.0),
        "B + LocAt": cells_of(3.0, 4.0),
        "C": cells_of(1, 1),
    }
    figure = Figure(x="top-1", y="ADE")
    found = arrows(figure, grid)
    assert [(arrow.source, arrow.numbers) for arrow in found] == [("A", "published"), ("A", "ours"), ("B", "published")]
    assert found[1].start == (1, 2) and found[1].end == (3, 4)
    assert draw(figure, grid, tmp_path) == ["figure.csv", "figure.png", "figure.svg"]
    assert (tmp_path / "figure.png").stat().st_size > 5000 and "</svg>" in (tmp_path / "figure.svg").read_text()


def test_unknown_figure_axes_are_refused(chain):
    with pytest.raises(ConfigError, match=r"figure.y is 'miou'"):
        load_table(str(chain), ["figure.y=miou"])
