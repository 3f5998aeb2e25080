"""Checkpoints worth keeping and a run that has no more to gain: decided by probes, the same whether the run was interrupted or not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import CheckpointError, ConfigError, Preempted, UserError
from ssl_locat.evaluation.evaluate import evaluate
from ssl_locat.evaluation.probe_options import check_probes
from ssl_locat.export.export import export
from ssl_locat.models.backbone import load_backbone
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.monitor import Monitor
from ssl_locat.pretraining.probes import Probes
from ssl_locat.pretraining.setup import Run
from ssl_locat.runs.best import Measure, best_of, measure_of, parse_step, read_best, reason_to_stop
from ssl_locat.runs.checkpoint import Checkpointer, read_weights
from ssl_locat.runs.history import explain, open_run
from ssl_locat.runs.log import read_jsonl

UNLABELLED = "probes={every_steps: 2, unlabelled: {images: 16, views: 2, image_size: 32, workers: 0}}"
MOVING = "teacher.momentum=[0.5, 0.9]"  # so that twelve steps show in the teacher
KEEP = "checkpoint={every_steps: 3, keep_last: 1, keep_best: {dense: null, global: unlabelled.lidar}}"


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder / "set", num_train=96, num_test=40, image_size=32, progress=False)
    return folder / "set"


@pytest.fixture
def tiny(textures, tmp_path):
    """`tiny("key=value", ..., run=NAME)`: 12 steps, a label-free probe every 2, a checkpoint every 3."""

    def make(*overrides: str, run: str = "run"):
        return load(str(write_config(textures, tmp_path)), [UNLABELLED, KEEP, MOVING, f"run_dir={tmp_path}/{run}", *overrides])

    return make


def kept(run: str | Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in Path(run, "checkpoints").glob("step_*"))


def records(run: str | Path) -> list[dict]:
    return read_jsonl(Path(run) / "probes/unlabelled.jsonl")


def events(run: str | Path, kind: str) -> list[dict]:
    return [event for event in read_jsonl(Path(run) / "events.jsonl") if event["kind"] == kind]


def highest(found: list[dict], name: str) -> dict:
    return max((record for record in found if record["step"]), key=lambda record: (record[name], -record["step"]))


def test_the_best_by_each_measure_stay_beside_the_last(tiny):
    config = tiny()
    summary = pretrain(config)
    run = Path(config.run_dir)
    found = records(run)
    assert [record["step"] for record in found] == [0, 2, 4, 6, 8, 10, 12]
    dense, general = highest(found, "dse"), highest(found, "lidar")
    assert json.loads((run / "checkpoints/best.json").read_text()) == {
        "dense": {"measure": "unlabelled.dse", "step": dense["step"], "value": dense["dse"]},
        "global": {"measure": "unlabelled.lidar", "step": general["step"], "value": general["lidar"]},
    }
    assert kept(run) == sorted({dense["step"], general["step"], 12})  # and nothing besides
    assert summary["best"]["dense"]["step"] == dense["step"] and "stopped" not in summary
    told = [event for event in events(run, "best") if event["choice"] == "dense"]
    assert told[-1]["step"] == dense["step"] and told[-1]["measure"] == "unlabelled.dse"
    assert read_best(run)["dense"].value == dense["dse"]
    again = evaluate(
        load_backbone(run, step="best-dense"), "unlabelled", data={"test": config.data.test}, images=16, views=2, workers=0
    )
    assert again["dse"] == pytest.approx(dense["dse"], abs=1e-6), "the probe of a step is of the checkpoint of that step"


def test_keeping_and_stopping_rules_leave_what_is_learned_alone(tiny):
    plain, keeping = tiny("checkpoint.keep_best={}", run="plain"), tiny("stop_when={measure: dense, patience: 99}")
    pretrain(plain)
    pretrain(keeping)
    assert losses(plain.run_dir) == losses(keeping.run_dir)
    assert kept(plain.run_dir) == [12] and not Path(plain.run_dir, "checkpoints/best.json").exists()


class Killed(BaseException):
    """As SIGKILL: nobody catches it."""


def broken_run(config, monkeypatch, at: dict[int, str]) -> None:
    """Start the run until it has ended; at these steps it is killed or stopped, each once."""
    measure, decide, log, make = Probes.run, Run.probe, Monitor.log, Checkpointer.__init__
    left, made = dict(at), []

    def cut(step: int, where: str) -> None:
        if left.get(step) == where:
            del left[step]
            raise Killed

    def measured(self, step, *args):
        cut(step, "before its probe")
        measure(self, step, *args)

    def decided(self):
        decide(self)
        cut(self.step, "after its decision")

    def logged(self, *args):
        log(self, *args)
        if left.get(self.run.step) == "signal":
            del left[self.run.step]
            os.kill(os.getpid(), signal.SIGTERM)

    def making(self, *args, **options):
        make(self, *args, **options)
        made.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "__init__", making)
        patch.setattr(Probes, "run", measured)
        patch.setattr(Run, "probe", decided)
        patch.setattr(Monitor, "log", logged)
        for _ in at:
            with pytest.raises((Killed, Preempted)):
                pretrain(config)
            made[-1]._writer.shutdown()  # a killed process writes and deletes no more; here its thread would
        pretrain(config)
    assert not left


def test_an_interrupted_run_keeps_the_same_checkpoints(tiny, monkeypatch):
    """Killed when a step is saved and not yet measured, stopped by a signal at such a step, killed when all is decided."""
    unbroken, broken = tiny(run="unbroken"), tiny(run="broken")
    pretrain(unbroken)
    broken_run(broken, monkeypatch, {2: "before its probe", 4: "signal", 8: "after its decision", 12: "before its probe"})
    assert losses(broken.run_dir) == losses(unbroken.run_dir)
    assert records(broken.run_dir) == records(unbroken.run_dir)
    assert read_best(broken.run_dir) == read_best(unbroken.run_dir)
    assert kept(broken.run_dir) == kept(unbroken.run_dir)
    summaries = [json.loads(Path(config.run_dir, "summary.json").read_text()) for config in (unbroken, broken)]
    assert summaries[0]["best"] == summaries[1]["best"]


def first_stop(found: list[dict], measure: Measure, patience: int) -> int | None:
    """The step at which the rule ends a run, by the records of one that it did not end; None: at none before its last."""
    steps = [record["step"] for record in found]
    return next((step for n, step in enumerate(steps[:-1]) if reason_to_stop(found[: n + 1], measure, patience)), None)


def test_a_run_that_has_no_more_to_gain_ends_finished_and_the_same_when_interrupted(tiny, monkeypatch):
    whole = tiny(run="whole")
    pretrain(whole)
    names = ("dse", "dse_dim", "lidar", "rankme", "alignment", "dse_inter", "uniformity", "dse_intra_1")
    stops = {name: first_stop(records(whole.run_dir), Measure("unlabelled", name), 2) for name in names}
    name, at = next((name, step) for name, step in stops.items() if step)
    assert 6 <= at < 12, "two probes after the best one, which is at step 2 or later"
    rule = [f"stop_when={{measure: unlabelled.{name}, patience: 2}}", "export=true"]
    stopped, broken = tiny(*rule, run="stopped"), tiny(*rule, run="broken")
    summary = pretrain(stopped)
    run = Path(stopped.run_dir)
    assert summary["steps"] == at and summary["samples_seen"] == 16 * at
    assert f"unlabelled.{name} was best at step" in summary["stopped"] and "patience is 2" in summary["stopped"]
    assert (run / "export/model.safetensors").is_file() and at in kept(run)
    assert [event["kind"] for event in read_jsonl(run / "events.jsonl")][-2:] == ["stop", "finish"]
    found = open_run(run)
    assert found.status == "finished" and any("stop_when" in fact for fact in explain(found)[0])
    whole_losses = losses(whole.run_dir)
    assert losses(run) == {step: whole_losses[step] for step in range(1, at + 1)}
    assert pretrain(stopped) == summary, "the same command again has nothing left to do"

    broken_run(broken, monkeypatch, {at - 2: "signal", at: "before its probe"})
    assert losses(broken.run_dir) == losses(run) and records(broken.run_dir) == records(run)
    assert read_best(broken.run_dir) == read_best(run) and kept(broken.run_dir) == kept(run)
    again = json.loads(Path(broken.run_dir, "summary.json").read_text())
    assert again["stopped"] == summary["stopped"] and again["steps"] == at

    patient = tiny(rule[0].replace("patience: 2", "patience: 99"), run="stopped")
    assert pretrain(patient)["steps"] == 12 and losses(run) == whole_losses, "whoever is more patient goes on"


def test_export_takes_the_kept_one_and_averages_the_last_milestones(tiny, tmp_path):
    config = tiny("checkpoint.milestone_every_steps=4")
    pretrain(config)
    run = Path(config.run_dir)
    dense = read_best(run)["dense"].step
    images = torch.rand(2, 3, 32, 32)

    def features(model) -> torch.Tensor:
        with torch.inference_mode():
            return load_backbone(model)(images)

    for step, expected in {"best-dense": dense, "last": 12, 4: 4}.items():
        folder = export(str(run), str(tmp_path / f"export-{step}"), step=step)
        with torch.inference_mode():
            assert torch.equal(features(folder), load_backbone(run, step=expected)(images))
        card = (folder / "README.md").read_text()
        assert f"step {expected}" in card and ("best of its run: " in card) == (
            expected in {b.step for b in read_best(run).values()}
        )

    folder = export(str(run), str(tmp_path / "average"), average=3, with_head=True)
    weights = [read_weights(run / f"checkpoints/step_{step:08d}", "teacher.") for step in (4, 8, 12)]
    name = "blocks.0.attn.qkv.weight"
    mean = torch.stack([state[f"backbone.{name}"].double() for state in weights]).mean(0)
    assert torch.equal(load_backbone(folder).state_dict()[name], mean.float())
    assert "average of steps 4, 8, 12" in (folder / "README.md").read_text() and (folder / "head.safetensors").is_file()
    scores = evaluate(str(folder), "unlabelled", data={"test": config.data.test}, images=16, views=2, workers=0)
    assert scores["dse"] > 0
    upto = load_backbone(run, average=2, step=8).state_dict()[name]
    assert torch.equal(upto, torch.stack([state[f"backbone.{name}"].double() for state in weights[:2]]).mean(0).float())
    with pytest.raises(CheckpointError, match=r"holds 3 milestones to average up to step 12 \(of steps 4, 8, 12\), not 4"):
        load_backbone(run, average=4)
    with pytest.raises(UserError, match="one network"):
        load_backbone(folder, average=2)


def test_what_was_never_kept_is_no_checkpoint(tiny):
    config = tiny("checkpoint.keep_best=[dense]", "optim.total_steps=2", "optim.epochs=null")
    pretrain(config)
    with pytest.raises(CheckpointError, match=r"has no best-global \(it has best-dense\)"):
        load_backbone(config.run_dir, step="best-global")
    with pytest.raises(UserError, match=r"step is 'bset-dense'; expected .*Did you mean 'best-dense'"):
        load_backbone(config.run_dir, step="bset-dense")
    shutil.rmtree(Path(config.run_dir, "checkpoints/step_00000002"))
    with pytest.raises(CheckpointError, match="no whole checkpoint of step 2"):
        load_backbone(config.run_dir, step="best-dense")


def _on_two_ranks(overrides: list[str], file: str) -> None:
    pretrain(load(file, overrides))


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_decide_alike(textures, tmp_path, parallel):
    """Rank 0 decides and deletes; a rank that went another way would hang in the next step."""
    file, run = str(write_config(textures, tmp_path)), tmp_path / "run"
    rule = "stop_when={measure: unlabelled.rankme, patience: 1}"
    length = ["optim.epochs=null", "optim.total_steps=6", f"parallel={parallel}"]
    run_ranks(_on_two_ranks, 2, [UNLABELLED, KEEP, MOVING, rule, *length], file)
    found, last = records(run), json.loads((run / "summary.json").read_text())["steps"]
    assert first_stop(found, Measure("unlabelled", "rankme"), 1) is None and found[-1]["step"] == last
    assert bool(reason_to_stop(found, Measure("unlabelled", "rankme"), 1)) or last == 6
    best = {choice: entry.step for choice, entry in read_best(run).items()}
    assert best == {"dense": highest(found, "dse")["step"], "global": highest(found, "lidar")["step"]}
    assert kept(run) == sorted({*best.values(), last})


# ---- the functions that decide


def test_the_first_labelled_probe_stands_for_a_choice_and_dse_without_labels():
    label_free = {"unlabelled": None}
    assert str(measure_of("dense", label_free)) == "unlabelled.dse"
    both = {"knn": {"k": [20]}, "unlabelled": None, "voc": {"protocol": "segmentation"}}
    assert str(measure_of("dense", both)) == "voc.miou" and str(measure_of("global", both)) == "knn.top1"
    assert str(measure_of("global", label_free, "unlabelled.lidar")) == "unlabelled.lidar"
    assert str(measure_of("knn.top1_k20", both)) == "knn.top1_k20"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint.keep_best=[dense, global]"], r"checkpoint\.keep_best: global needs labels .*RankMe misleads"),
        (
            ["checkpoint.keep_best=[dense]", "probes.unlabelled=null", "probes.knn={k: [5]}"],
            "dense needs a probe.*probes.unlabelled",
        ),
        (["checkpoint.keep_best={global: unlabelled.lidra}"], "Did you mean 'lidar'"),
        (["checkpoint.keep_best={global: unlabeled.lidar}"], "no measure of a probe.*Did you mean 'unlabelled'"),
        (["checkpoint.keep_best=[dense]", "probes.every_steps=null"], r"give probes\.every_epochs"),
        (["checkpoint.keep_best={}", "stop_when={measure: global, patience: 3}"], r"stop_when\.measure: global needs labels"),
    ],
)
def test_a_choice_that_nothing_measures_is_refused_before_anything_is_built(tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_probes(tiny(*overrides))


def test_a_metric_that_the_probe_leaves_out_is_refused_at_its_first_turn(tiny):
    config = tiny("probes.unlabelled.views=1")
    with pytest.raises(ConfigError, match=r"unlabelled\.lidar: this probe measures no lidar; it has dse, "):
        pretrain(config)
    assert not losses(config.run_dir)


def test_the_best_is_the_earlier_of_two_alike_whatever_is_good():
    found = [
        {"step": step, "dse": dse, "uniformity": -dse, "alpha_req": 1 + dse}
        for step, dse in ((0, 9.0), (2, 0.5), (4, 0.7), (6, 0.7))
    ]
    found.append({"step": 8, "dse": None, "uniformity": float("nan"), "alpha_req": "x"})
    assert best_of(found, Measure("u", "dse")) == ("u.dse", 4, 0.7)
    assert best_of(found, Measure("u", "uniformity")) == ("u.uniformity", 4, -0.7)
    assert best_of(found, Measure("u", "alpha_req")) == ("u.alpha_req", 2, 1.5)
    assert (
        best_of(found, Measure("u", "dse"), steps={2, 8}) == ("u.dse", 2, 0.5) and best_of(found[:1], Measure("u", "dse")) is None
    )
    assert reason_to_stop(found, Measure("u", "dse"), 3) is None and "in the 2 probes since (last: 0.7)" in reason_to_stop(
        found, Measure("u", "dse"), 2
    )
    top = [{"step": 2, "top1_k10": 50.0, "top1_k20": 60.0, "train_images": 9}]
    assert best_of(top, Measure("knn", "top1")) == ("knn.top1", 2, 50.0) and best_of(top, Measure("knn", "top1_k20")).value == 60


@pytest.mark.parametrize(("text", "step"), [("4000", 4000), ("last", "last"), ("best-dense", "best-dense")])
def test_steps_are_numbers_or_names(text, step):
    assert parse_step(text) == step


@pytest.mark.slow
def test_killed_at_random_points_a_run_ends_with_the_same_best_checkpoints(textures, tmp_path):
    """SIGKILL of the command itself, at times that fall into saving, measuring and rotating, too."""
    config = write_config(textures, tmp_path)
    rule = "stop_when={measure: unlabelled.dse_inter, patience: 6}"
    common = ["optim.epochs=10", UNLABELLED, KEEP, rule, MOVING]

    def start(run: Path) -> subprocess.Popen:
        with open(tmp_path / "said.log", "w") as said:
            command = [sys.executable, "-m", "ssl_locat", "pretrain", str(config), *common, f"run_dir={run}"]
            return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=said)

    whole, broken, rng, kills = tmp_path / "whole", tmp_path / "broken", random.Random(0), 0
    assert start(whole).wait(240) == 0, (tmp_path / "said.log").read_text()
    while kills < 6:
        process = start(broken)
        before, until = len(events(broken, "save")), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until and len(events(broken, "save")) <= before:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.4)
        if process.poll() is None:
            process.kill()
            kills += 1
        assert process.wait() != 0, "the run ended before it was killed often enough"
    assert start(broken).wait(240) == 0, (tmp_path / "said.log").read_text()
    assert losses(broken) == losses(whole) and records(broken) == records(whole)
    assert read_best(broken) == read_best(whole) and kept(broken) == kept(whole)
    ends = [json.loads((run / "summary.json").read_text()).get("stopped") for run in (whole, broken)]
    assert ends[0] == ends[1]
