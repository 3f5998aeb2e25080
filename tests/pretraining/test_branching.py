"""Other settings on purpose, from the full state: `--resume auto|PATH --allow KEY,...` (docs/branching.md)."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import losses, write_config

from ssl_locat.cluster.launch import submit_pretrain
from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import CheckpointError, ConfigError, UserError
from ssl_locat.objectives import Progress
from ssl_locat.objectives.dino import DINO
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.origin import launcher, restarted
from ssl_locat.runs.history import explain, open_run
from ssl_locat.runs.log import read_jsonl

HEAD = "num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16"


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder / "set", num_train=96, num_test=40, image_size=32, progress=False)
    return folder / "set"


@pytest.fixture(scope="module")
def base(textures, tmp_path_factory):
    """(config maker, the run folder of a finished run of 12 steps with checkpoints of steps 4, 8 and 12)."""
    folder = tmp_path_factory.mktemp("base")
    path = write_config(textures, folder)
    pretrain(load(str(path)))
    return path, folder / "run"


@pytest.fixture
def tiny(base, tmp_path):
    """`tiny(*overrides, run=NAME)`: a config whose run folder is a copy of the finished run, or an empty one of another name."""
    path, finished = base
    shutil.copytree(finished, tmp_path / "run")

    def make(*overrides: str, run: str = "run"):
        return load(str(path), [f"run_dir={tmp_path}/{run}", *overrides])

    return make


def records(config):
    return {record["step"]: record for record in read_jsonl(Path(config.run_dir) / "metrics.jsonl")}


def events(config, kind):
    return [event for event in read_jsonl(Path(config.run_dir) / "events.jsonl") if event["kind"] == kind]


def checkpoint(config, step):
    return str(Path(config.run_dir) / f"checkpoints/step_{step:08d}")


def test_a_finished_run_trains_longer_as_if_it_had_been_meant_to(tiny):
    """extend: the cosine of the longer run, from here on; the same images as a longer run from the start would see."""
    longer = tiny("optim.epochs=3")
    with pytest.raises(UserError, match=r"optim\.epochs was 2\.0, now 3\.0.*--allow optim\.epochs"):
        pretrain(longer)
    before = losses(longer.run_dir)
    summary = pretrain(longer, allow=["optim.epochs"])
    assert summary["steps"] == 18 and list(losses(longer.run_dir)) == list(range(1, 19))
    assert {step: losses(longer.run_dir)[step] for step in before} == before
    whole = tiny("optim.epochs=3", run="whole")
    pretrain(whole)
    for step in range(13, 19):
        assert records(longer)[step]["lr"] == records(whole)[step]["lr"]
        assert records(longer)[step]["momentum"] == records(whole)[step]["momentum"]
    (change,) = events(longer, "change")
    assert change["step"] == 12 and change["changes"] == ["optim.epochs was 2.0, now 3.0"]
    assert pretrain(longer)["steps"] == 18  # the settings are the run's own now


def test_total_steps_takes_the_place_of_epochs_and_a_run_ends_earlier(tiny):
    shorter = tiny("optim.total_steps=8")
    assert shorter.optim.epochs is None
    with pytest.raises(UserError, match=r"has seen 192 images, more than the 128"):
        pretrain(shorter, allow=["optim.epochs"])
    path = checkpoint(shorter, 4)
    assert pretrain(shorter, resume=path, allow=["optim.epochs"])["steps"] == 8
    assert list(losses(shorter.run_dir)) == list(range(1, 9))
    assert {path.name for path in Path(shorter.run_dir, "checkpoints").iterdir()} == {
        "step_00000004",
        "step_00000008",
        "superseded_step_00000008",
        "superseded_step_00000012",
    }


def test_a_decay_branches_into_a_folder_of_its_own_and_names_its_parent(tiny):
    """decay: from the values of the parent at that step straight to their ends, the lr's 0, which the step after the last would have."""
    parent = tiny()
    branch = tiny("optim.total_steps=12", "optim.schedule=decay", run="decay")
    path = checkpoint(parent, 8)
    allow = ["optim.total_steps", "optim.schedule"]
    with pytest.raises(ConfigError, match="begins at a checkpoint"):
        pretrain(branch)
    summary = pretrain(branch, resume=path, allow=allow)
    assert summary["steps"] == 12 and summary["samples_seen"] == 192 and summary["restarts"] == 0
    seen = records(branch)
    assert list(seen) == [9, 10, 11, 12]
    for name, end in {"lr": 0, "weight_decay": branch.optim.weight_decay[1], "momentum": branch.teacher.momentum[1]}.items():
        begin = records(parent)[9][name]
        assert begin != end
        assert [seen[step][name] for step in seen] == pytest.approx([begin + (end - begin) * number / 4 for number in range(4)])
    assert seen[9]["loss"] == records(parent)[9]["loss"]  # the same batch, weights and lr
    (told,) = events(branch, "branch")
    assert told["parent"] == path and "optim.schedule was 'cosine', now 'decay'" in told["changes"]
    facts, _ = explain(open_run(branch.run_dir))
    assert any(f"Branched from {path}" in fact and "optim.schedule" in fact for fact in facts)
    marker = json.loads(Path(checkpoint(branch, 12), "checkpoint.json").read_text())["meta"]
    assert marker["parent"] == {"checkpoint": path, "step": 8, "samples_seen": 128}
    assert set(losses(parent.run_dir)) == set(range(1, 13)), "the parent is as it was"


WSD = [
    "optim.schedule=wsd",
    "optim.weight_decay=[0.04, 0.4]",
    "teacher.momentum=[0.9, 1.0]",
    "objective.teacher_temp=[0.04, 0.07, 0.05]",
]
WSD += ["objective.teacher_temp_warmup_epochs=1", "backbone.drop_path_rate=0"]


def test_one_long_run_yields_several_finished_models(tiny, tmp_path):
    """WSD: one run that never decays; decays branch off two of its checkpoints, and each is bit for bit the run that was planned to end there."""
    long = tiny(*WSD, "optim.decay_epochs=0", "optim.epochs=4", "checkpoint.keep_last=9", run="long")
    pretrain(long)
    stable = records(long)
    assert [stable[step]["lr"] for step in (3, 24)] == [1e-2 * 16 / 256] * 2 and stable[1]["lr"] == 0
    assert {record["weight_decay"] for record in stable.values()} == {0.04}
    assert {record["momentum"] for record in stable.values()} == {0.9}
    for name, at in {"first": 8, "second": 16}.items():
        ends = ["optim.epochs=null", f"optim.total_steps={at + 6}", f"run_dir={tmp_path}/{name}", "export=true"]
        path = checkpoint(long, at)
        branch = tiny(*WSD, *ends, "optim.schedule=decay", "optim.decay_epochs=0")
        summary = pretrain(branch, resume=path, allow=["optim.total_steps", "optim.schedule"])
        assert summary["steps"] == at + 6 and Path(branch.run_dir, "export/model.safetensors").is_file()
        marker = json.loads(Path(checkpoint(branch, at + 6), "checkpoint.json").read_text())["meta"]
        assert marker["parent"] == {"checkpoint": path, "step": at, "samples_seen": 16 * at}
        decay = records(branch)
        assert list(decay) == list(range(at + 1, at + 7))
        for key, start, end in (("lr", 1e-2 * 16 / 256, 0), ("weight_decay", 0.04, 0.4), ("momentum", 0.9, 1.0)):
            expected = [start + (end - start) * number / 6 for number in range(6)]
            assert [record[key] for record in decay.values()] == pytest.approx(expected)

        planned = tiny(*WSD, *ends, "optim.decay_epochs=1", f"run_dir={tmp_path}/planned-{name}", "export=false")
        pretrain(planned)
        assert {step: record["loss"] for step, record in records(planned).items() if step > at} == losses(branch.run_dir)
        same = ("lr", "weight_decay", "momentum")
        assert all(records(planned)[step][key] == record[key] for step, record in decay.items() for key in same)
        assert {event["decay_from"] for config in (branch, planned) for event in events(config, "start")} == {at}
    assert losses(long.run_dir) == {step: record["loss"] for step, record in stable.items()}, "the long run is as it was"
    assert {event["decay_from"] for event in events(long, "start")} == {None}


def test_a_decay_that_is_longer_than_its_run_is_refused(tiny):
    with pytest.raises(
        ConfigError, match=r"optim\.decay_epochs is 3, 18 steps: longer than the run, which has 12\. Give at most 2\."
    ):
        pretrain(tiny("optim.schedule=wsd", "optim.decay_epochs=3", run="other"))


def test_the_teachers_temperature_goes_to_its_third_value_over_the_decay():
    objective = DINO(num_prototypes=8, teacher_temp=[0.04, 0.07, 0.05], teacher_temp_warmup_epochs=3)
    at = [
        objective.temperature(Progress(0, epoch, 9, done)) for epoch, done in ((0, 0), (1, 0), (3, 0), (6, 0), (7, 0.5), (8, 1.0))
    ]
    assert at == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.06, 0.05])
    plain = DINO(num_prototypes=8, teacher_temp=[0.04, 0.07])
    assert plain.temperature(Progress(0, 8, 9, 0.5)) == 0.07
    with pytest.raises(UserError, match=r"teacher_temp is \[0\.04\]; expected \[start, after the warm-up\]"):
        DINO(num_prototypes=8, teacher_temp=[0.04])


def test_a_branch_that_was_stopped_is_resumed_by_the_same_command_bit_for_bit(tiny):
    path = checkpoint(tiny(), 4)
    allow = ["optim"]
    options = ["optim.schedule=restart", "optim.lr=2.0e-2", "optim.epochs=3", "optim.warmup_epochs=0.5"]
    unbroken, broken = tiny(*options, run="unbroken"), tiny(*options, run="broken")
    pretrain(unbroken, resume=path, allow=allow)
    pretrain(broken, resume=path, allow=allow)
    for step in (16, 18):
        shutil.rmtree(checkpoint(broken, step))
    shutil.rmtree(path)  # as `keep_last` of the parent may have
    (Path(broken.run_dir) / "summary.json").unlink()
    pretrain(broken, resume=path, allow=allow)  # not from its parent again
    assert losses(broken.run_dir) == losses(unbroken.run_dir)
    assert [event["step"] for event in events(broken, "resume")] == [12]
    rates = {step: record["lr"] for step, record in records(unbroken).items()}
    assert rates[5] == 0 and rates[7] == pytest.approx(2e-2 * 16 / 256)  # restart: warm-up over 3 steps, then a cosine to the end
    assert all(rates[step] > rates[step + 1] for step in range(8, 18))


def test_a_branch_is_not_mixed_into_the_folder_of_another_run(tiny, tmp_path):
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    config = tiny("optim.lr=0.02", run="other")
    with pytest.raises(UserError, match=r"other holds a run that did not begin at .*a branch goes into a run_dir of its own"):
        pretrain(config, resume=checkpoint(tiny(), 8), allow=["optim.lr"])


def test_a_last_stage_of_larger_crops_and_another_objective(tiny):
    path = checkpoint(tiny(), 12)
    objectives = f"objective=[{{name: dino, weight: 0.5, {HEAD}}}, {{name: ibot, weight: 0.1, {HEAD}}}]"
    stage = tiny("optim.epochs=3", "crops.global_size=48", "crops.local_size=24", objectives, run="stage")
    summary = pretrain(stage, resume=path, allow=["optim.epochs", "crops", "objective"])
    assert summary["steps"] == 18
    assert "ibot" in records(stage)[13] and records(stage)[18]["loss"] is not None
    back = tiny("optim.epochs=4", "crops.global_size=48", "crops.local_size=24", run="back")
    assert pretrain(back, resume=checkpoint(stage, 18), allow=["optim.epochs", "objective"])["steps"] == 24


def test_another_batch_size_sees_every_image_once_and_ends_where_the_samples_do(tiny):
    path = checkpoint(tiny(), 4)
    larger = tiny("optim.global_batch_size=32", run="larger")
    summary = pretrain(larger, resume=path, allow=["optim.global_batch_size"])
    assert summary["samples_seen"] == 192 and summary["steps"] == 4 + 4
    assert [record["samples_seen"] for record in records(larger).values()] == [96, 128, 160, 192]


@pytest.mark.parametrize(
    ("override", "allow", "message"),
    [
        ("seed=1", "seed", r"cannot continue this run: seed was 0, now it is 1"),
        ("data.train={0}/textures-test-*.tar", "data.train", r"cannot continue this run: .* was started on 96 samples"),
        ("backbone.embed_dim=48", "backbone", "belongs to another model"),
    ],
)
def test_what_would_change_the_order_of_data_or_the_model_is_refused(tiny, textures, override, allow, message):
    config = tiny(override.format(textures))
    with pytest.raises(CheckpointError, match=message):
        pretrain(config, allow=[allow])


def test_a_job_is_refused_before_it_is_queued(tiny, tmp_path):
    other = tiny("optim.lr=0.02")
    with pytest.raises(UserError, match=r"optim\.lr was 0\.01, now 0\.02.*--allow optim\.lr"):
        submit_pretrain(other, "slurm", dry_run=True)
    with pytest.raises(CheckpointError, match="nowhere: there is no checkpoint"):
        submit_pretrain(other, "slurm", resume=str(tmp_path / "nowhere"), dry_run=True)


def test_a_command_that_is_queued_keeps_what_is_allowed(tiny, capsys):
    submit_pretrain(tiny("optim.lr=0.02"), "local", allow=["optim.lr"], dry_run=True)
    assert "--resume auto --allow optim.lr" in capsys.readouterr().out


def test_a_key_that_is_none_is_refused_with_the_nearest(tiny):
    with pytest.raises(ConfigError, match=r"--allow optim\.lrr: there is no such setting\. Did you mean 'optim\.lr'"):
        pretrain(tiny("optim.lr=0.1"), allow=["optim.lrr"])


def test_auto_compares_with_the_checkpoints_own_settings_whatever_the_file_says(tiny):
    """config.yaml may be edited or deleted; what was trained stands in the checkpoint."""
    other, same = tiny("optim.lr=0.02"), tiny()
    path = Path(other.run_dir, "config.yaml")
    path.write_text(other.to_yaml())
    with pytest.raises(UserError, match=r"optim\.lr was 0\.01, now 0\.02"):
        pretrain(other)
    path.unlink()
    with pytest.raises(UserError, match=r"optim\.lr was 0\.01, now 0\.02"):
        pretrain(other)
    assert pretrain(same)["steps"] == 12 and load(str(path)) == same  # as it was


def test_resume_path_and_never_hold_for_the_first_start_only(tiny, monkeypatch):
    """A requeue runs the same command line."""
    config = tiny()
    path = checkpoint(config, 4)
    pretrain(config, resume=path)
    shutil.rmtree(checkpoint(config, 12))
    (Path(config.run_dir) / "summary.json").unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    pretrain(config, resume=path)
    assert [event["step"] for event in events(config, "resume")] == [4, 8]
    shutil.rmtree(checkpoint(config, 12))
    (Path(config.run_dir) / "summary.json").unlink()
    pretrain(config, resume="never")
    assert [event["step"] for event in events(config, "resume")] == [4, 8, 8]
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted(config.run_dir)
    monkeypatch.setenv(
        "TORCHELASTIC_RESTART_COUNT", "0"
    )  # a node joined: torchrun counts failures only, but its agent is the same
    assert not restarted(config.run_dir)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    (Path(config.run_dir) / "events.jsonl").write_text(f'{{"kind": "start", "launcher": "{launcher()}"}}\n')
    assert restarted(config.run_dir)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(UserError, match="--resume never, but"):
        pretrain(config, resume="never")


def test_the_export_of_a_finished_run_is_made_when_it_is_missing(tiny):
    config = tiny("export=true")
    assert not Path(config.run_dir, "export").exists()
    summary = pretrain(config)
    assert summary["steps"] == 12 and Path(config.run_dir, "export/model.safetensors").is_file()
