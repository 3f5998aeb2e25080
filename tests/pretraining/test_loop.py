"""The training loop for real: runs that finish, stop, are killed and go on; what they leave behind."""

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
from processes import Command
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.errors import CheckpointError, ConfigError, DataError, Diverged, UserError
from ssl_locat.models.backbone import load_backbone
from ssl_locat.objectives import Progress, build
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.parts import build_model, check, rates, total_loss
from ssl_locat.pretraining.replay import replay
from ssl_locat.runs import folder as run_folder
from ssl_locat.runs.log import read_jsonl


@pytest.fixture(scope="session")
def textures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder / "set", num_train=96, num_test=40, image_size=32, progress=False)
    return folder / "set"


@pytest.fixture
def tiny(textures, tmp_path):
    """`tiny("key=value", ...)` -> config of a run that takes seconds: width 24, 12 steps of 16 images."""

    def make(*overrides: str):
        return load(str(write_config(textures, tmp_path)), overrides)

    return make


def test_a_run_leaves_what_the_design_promises(tiny):
    config = tiny("probes={every_epochs: 1, knn: {k: [5], image_size: 32, workers: 0}}", "export=true", "log.tensorboard=true")
    summary = pretrain(config)
    run = Path(config.run_dir)
    assert summary["steps"] == 12 and summary["samples_seen"] == 192
    assert json.loads((run / "summary.json").read_text()) == summary
    assert set(summary["knn"]) == {"raw_pixels", "init", "trained"}
    assert load(str(run / "config.yaml")) == config
    assert {"versions", "commit", "hardware"} <= set(json.loads((run / "environment.json").read_text()))
    records = read_jsonl(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 13))
    wanted = {"loss", "teacher_entropy", "kl", "grad_norm", "lr", "weight_decay", "momentum", "images_per_second", "data_wait"}
    assert wanted <= set(records[-1]) and {"feature_std", "rankme"} <= set(records[0])
    assert [record["step"] for record in read_jsonl(run / "probes" / "knn.jsonl")] == [0, 6, 12]
    assert {record["kind"] for record in read_jsonl(run / "events.jsonl")} >= {"start", "save", "probe", "finish"}
    assert (run / "export" / "model.safetensors").is_file() and list((run / "tensorboard").iterdir())


def test_objectives_count_by_their_weights_in_the_loss_and_in_its_gradient(tiny):
    head = "num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16"
    config = tiny(f"objective=[{{name: dino, weight: 0.5, {head}}}, {{name: koleo, weight: 3, min_images: 2}}]")
    objectives = build(config.objectives)
    views = {"dino": torch.randn(4, 8, 32, requires_grad=True), "koleo": torch.randn(4, 8, 24, requires_grad=True)}
    targets = {name: view[:2].detach() for name, view in views.items()}
    at = Progress(step=0, epoch=0, total_epochs=1)
    alone = {name: objectives[name](views[name], targets[name], at)[0] for name in views}
    total, metrics = total_loss(objectives, config, views, targets, at)
    torch.testing.assert_close(total, 0.5 * alone["dino"] + 3 * alone["koleo"])
    assert metrics["dino"] == alone["dino"] and metrics["koleo"] == alone["koleo"], "shown without the weight"
    for name, weight in (("dino", 0.5), ("koleo", 3)):
        found, own = (torch.autograd.grad(loss, views[name], retain_graph=True)[0] for loss in (total, alone[name]))
        torch.testing.assert_close(found, weight * own)


def test_finished_run_is_not_run_again(tiny):
    config = tiny()
    first = pretrain(config)
    before = losses(config.run_dir)
    assert pretrain(config)["steps"] == first["steps"]
    assert losses(config.run_dir) == before


def test_probes_do_not_disturb_training(tiny, tmp_path):
    plain, probed = (
        tiny(f"run_dir={tmp_path}/a"),
        tiny(f"run_dir={tmp_path}/b", "probes={every_steps: 2, knn: {k: [5], image_size: 32}}"),
    )
    pretrain(plain)
    pretrain(probed)
    assert losses(plain.run_dir) == losses(probed.run_dir)


@pytest.mark.parametrize("change", ["data.workers=2", "log.every_steps=5", "checkpoint.every_steps=3"])
def test_what_may_change_does_not_change_the_losses(tiny, tmp_path, change):
    a, b = tiny(f"run_dir={tmp_path}/a"), tiny(f"run_dir={tmp_path}/b", change)
    pretrain(a)
    pretrain(b)
    assert losses(a.run_dir) == losses(b.run_dir)


def test_accumulation_keeps_the_global_batch(tiny, tmp_path):
    """Same samples, crops, centring and gradient; float sums are grouped differently."""
    whole = tiny(f"run_dir={tmp_path}/a", "backbone.drop_path_rate=0")
    parts = tiny(f"run_dir={tmp_path}/b", "backbone.drop_path_rate=0", "optim.accumulate_steps=4")
    pretrain(whole)
    pretrain(parts)
    assert losses(whole.run_dir) == pytest.approx(losses(parts.run_dir), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_starts_where_fp32_does_and_stays_finite(tiny, tmp_path, precision):
    """Only the first losses are comparable: fp16's loss scale is found by skipping steps."""
    full, low = (
        tiny(f"run_dir={tmp_path}/a", "optim.epochs=1"),
        tiny(f"run_dir={tmp_path}/b", "optim.epochs=1", f"precision={precision}"),
    )
    pretrain(full)
    pretrain(low)
    assert losses(low.run_dir)[1] == pytest.approx(losses(full.run_dir)[1], rel=0.01)
    assert len(losses(low.run_dir)) == 6


def test_the_teacher_may_have_a_precision_of_its_own(tiny, tmp_path):
    entropies = {}
    for name, options in {"fp32": [], "mixed": ["precision=bf16", "teacher.precision=fp32"], "bf16": ["precision=bf16"]}.items():
        config = tiny(f"run_dir={tmp_path}/{name}", "optim.epochs=null", "optim.total_steps=1", "log.every_steps=1", *options)
        pretrain(config)
        (first,) = read_jsonl(Path(config.run_dir) / "metrics.jsonl")
        entropies[name] = first["teacher_entropy"]
    assert entropies["mixed"] == entropies["fp32"] != entropies["bf16"]


def start(config: Path, *overrides: str) -> Command:
    return Command("pretrain", str(config), *overrides)


def finish(process: Command, code: int, seconds: float = 240) -> str:
    """Wait for the exit status; -> what it said."""
    assert process.wait(seconds) == code, process.stderr
    return process.stderr


def wait_for_step(run: Path, step: int, process: Command, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        records = read_jsonl(run / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            return
        time.sleep(0.02)


def test_each_signal_saves_and_the_same_command_resumes(textures, tmp_path):
    config, run, seen = write_config(textures, tmp_path), tmp_path / "run", {}
    long = ["optim.epochs=12", "data.workers=1"]
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        process = start(config, *long)
        wait_for_step(run, len(seen) + 4, process)
        process.send_signal(getattr(signal, name))
        message = finish(process, 4)
        assert f"Stopped by {name}" in message and "same command" in message and "Traceback" not in message
        saved = losses(run)
        assert len(saved) >= len(seen) + 4 and {step: saved[step] for step in seen} == seen
        seen = saved
    finish(start(config, *long), 0)
    after = losses(run)
    assert list(after) == list(range(1, 73))
    assert {step: after[step] for step in seen} == seen


@pytest.mark.parametrize(("objective", "kill_times"), [("dino", 5), pytest.param("ibot", 2, marks=pytest.mark.slow)])
def test_killed_at_random_points_and_resumed_losses_are_bit_identical(textures, tmp_path, objective, kill_times):
    """Drop path on, two loader workers, SIGKILL several times, at times that fall also into saving (every step is saved)."""
    config = write_config(textures, tmp_path)
    common = ["optim.epochs=8", "data.workers=2"]
    if objective == "ibot":  # masks, two centres, a shared head
        heads = "num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16"
        common.append(f"objective=[{{name: dino, {heads}}}, {{name: ibot, {heads}, shared_head: true}}]")
    finish(start(config, *common, f"run_dir={tmp_path}/unbroken"), 0)
    expected = losses(tmp_path / "unbroken")
    rng, kills, run = random.Random(0), 0, tmp_path / "broken"
    common += ["checkpoint.every_steps=1", f"run_dir={run}"]
    while kills < kill_times:
        process = start(config, *common)
        records = read_jsonl(run / "metrics.jsonl")
        wait_for_step(run, (records[-1]["step"] if records else 0) + rng.randint(2, 7), process)
        time.sleep(rng.random() * 0.1)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        assert len(losses(run)) < len(expected), "the run finished before it was killed often enough; make it longer"
    finish(start(config, *common), 0)
    assert losses(run) == expected


def test_changed_settings_are_refused_on_resume(tiny):
    config = tiny("optim.epochs=1")
    pretrain(config)
    with pytest.raises(UserError, match=r"optim\.lr was 0\.01, now 0\.02"):
        pretrain(tiny("optim.epochs=1", "optim.lr=0.02"))
    with pytest.raises(UserError, match="--resume never, but"):
        pretrain(config, resume="never")
    with pytest.raises(CheckpointError, match=r"nowhere: there is no checkpoint"):
        pretrain(config, resume=str(Path(config.run_dir) / "nowhere"))
    with pytest.raises(UserError, match=r"step_00000004 is of a run with other settings: .*optim\.lr was 0\.01, now 0\.02"):
        pretrain(tiny("optim.lr=0.02", f"run_dir={config.run_dir}_b"), resume=f"{config.run_dir}/checkpoints/step_00000004")


def test_checkpoints_that_cannot_be_used_are_named_and_never_trained_over(tiny, caplog):
    config = tiny("optim.epochs=1")
    pretrain(config)
    markers = sorted(Path(config.run_dir).glob("checkpoints/*/checkpoint.json"))
    markers[-1].write_text(markers[-1].read_text().replace('"format": 1', '"format": 2'))  # as a later version would write
    (Path(config.run_dir) / "summary.json").unlink()
    pretrain(config)  # goes on from the one before
    assert f"{markers[-1].parent} is passed over: its format is 2, this version reads 1" in caplog.text
    for marker in Path(config.run_dir).glob("checkpoints/step_*/checkpoint.json"):
        marker.write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* can be used: step_.*--resume never"):
        pretrain(config)


def test_two_processes_never_train_in_one_folder(textures, tmp_path):
    config = write_config(textures, tmp_path)
    first = start(config)
    try:
        wait_for_step(tmp_path / "run", 1, first)
        first.send_signal(signal.SIGSTOP)  # so that it is there still, however long the second takes to start
        said = finish(start(config), 2)
        assert f"run is in use: process {first.pid} on " in said
    finally:
        first.kill()
    finish(start(config), 0)  # the kernel freed the lock


def test_a_holder_on_another_machine_is_waited_for(tmp_path, monkeypatch, caplog):
    """Its node may have died, which a network disk notices late."""
    hold = "import fcntl, sys; f = open('lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 7 on elsewhere\\n'); f.flush(); print(); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE", 0)
    with pytest.raises(UserError, match=r"process 7 on elsewhere trains in it.*delete"):
        run_folder.acquire_lock(tmp_path)
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE", 300)
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: holder.communicate())  # it ends meanwhile
    run_folder.acquire_lock(tmp_path).close()
    assert "waiting for it to end" in caplog.text


def test_a_lock_that_is_deleted_while_another_waits_is_held_by_one_alone(tmp_path, monkeypatch):
    """The waiting process opens what is there; what it locked must still be the file of that name when it has it."""
    lockf, times = run_folder.fcntl.lockf, []

    def slow(file, how):
        lockf(file, how)
        times.append(os.fstat(file.fileno()).st_ino)
        if len(times) < 3:  # somebody deletes the file, and a third process makes it anew
            (tmp_path / "lock").unlink()
            (tmp_path / "other").touch()
            (tmp_path / "other").rename(tmp_path / "lock")

    monkeypatch.setattr(run_folder.fcntl, "lockf", slow)
    with run_folder.acquire_lock(tmp_path) as lock:
        assert len(times) == 3 and os.path.samestat(os.fstat(lock.fileno()), (tmp_path / "lock").stat())


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("{knn: {k: [5], data: {test: nowhere/*.tar}}}", r"probes\.knn: .*nowhere"),
        ("{knn: {k: [5], data: {label_key: json}}}", r"probes\.knn: .*json"),
        ("{knn: {kk: [5]}}", r"unknown key 'probes\.knn\.kk'"),
    ],
)
def test_a_probe_that_is_switched_on_later_is_checked_at_the_start(tiny, probe, message):
    config = tiny("optim.epochs=1")
    pretrain(config)
    shutil.rmtree(max(Path(config.run_dir).glob("checkpoints/step_*")))
    (Path(config.run_dir) / "summary.json").unlink()
    with pytest.raises(UserError, match=message):
        pretrain(tiny("optim.epochs=1", f"probes={probe}"))


def test_a_run_from_other_weights_keeps_their_grid_and_needs_them_once(tiny, tmp_path):
    """GAug's constants belong to the grid at which the first weights were trained (paper.md), not to later crops."""
    first = tiny("optim.epochs=1", f"run_dir={tmp_path}/a")
    pretrain(first)
    larger = [
        "crops.global_size=64",
        "crops.local_size=32",
        "backbone.img_size=64",
        "optim.epochs=1",
        f"backbone.init={tmp_path}/a",
    ]
    config = tiny(*larger, f"run_dir={tmp_path}/b")
    pretrain(config)
    assert load_backbone(tmp_path / "b").gaug_options["initial_grid"] == (4, 4)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(max((tmp_path / "b/checkpoints").glob("step_*")))
    (tmp_path / "b/summary.json").unlink()
    pretrain(config)  # goes on without the first run
    assert load_backbone(tmp_path / "b").gaug_options["initial_grid"] == (4, 4)


def test_crops_that_the_patches_do_not_divide_are_refused_at_once(tiny):
    with pytest.raises(ConfigError, match=r"crops.local_size is 23 pixels.*divisible by patch size \(8\)"):
        check(tiny("crops.local_size=23"))
    with pytest.raises(UserError, match="refuses its options"):
        check(tiny("backbone.num_heads=0"))
    with pytest.raises(ConfigError, match=r"unknown key 'probes.knn.kk'.*Did you mean 'k'"):
        check(tiny("probes={knn: {kk: 5}}"))


def test_a_probe_at_two_temperatures_or_without_test_images_ends_well(tiny, tmp_path):
    summary = pretrain(tiny("optim.epochs=1", "probes={knn: {k: [5], temperature: [0.07, 0.1], workers: 0}}"))
    assert set(summary["knn"]) == {"raw_pixels", "init", "trained"}
    probe = "probes={knn: {k: [5], folds: 4, workers: 0}}"
    summary = pretrain(tiny("optim.epochs=1", f"run_dir={tmp_path}/folds", "data.test=null", probe))
    assert set(summary["knn"]) == {"init", "trained"}


def test_a_line_cut_off_by_a_full_disk_is_left_out_and_the_run_resumes(tiny, caplog):
    config = tiny("optim.epochs=1", "export=false")
    pretrain(config)
    run = Path(config.run_dir)
    (run / "summary.json").unlink()
    shutil.rmtree(max((run / "checkpoints").glob("step_*")))
    for name in ("events.jsonl", "metrics.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"time": "x", "kind": "sa')
    pretrain(config)
    assert list(losses(run)) == list(range(1, 7))
    assert [event["kind"] for event in read_jsonl(run / "events.jsonl") if event["kind"] != "probe"][-1] == "finish"
    assert "cannot be read and is left out" in caplog.text


def test_unreachable_or_unfit_input_is_refused_before_a_model_is_built(tiny, tmp_path):
    with pytest.raises(ConfigError, match="multiple of 3 ranks"):
        check(tiny(), ranks=3)
    with pytest.raises(DataError):
        check(tiny("data.train=nowhere/*.tar"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        check(tiny(f"data.train={tmp_path}/empty"))
    with pytest.raises(ConfigError, match=r"data\.epoch_samples"):
        check(tiny("data.train=[{shards: runs/a.tar}, {shards: runs/a.tar}]".replace("runs/a.tar", tiny().data.train)))


def test_nan_stops_the_run_says_what_to_do_and_is_looked_at_again(tiny, capsys):
    config = tiny("optim.lr=1.0e+30", "optim.warmup_epochs=0", "optim.clip_grad=0")
    with pytest.raises(Diverged) as error:
        pretrain(config)
    assert "step" in str(error.value) and "lower lr" in str(error.value)
    (saved,) = (Path(config.run_dir) / "replay").iterdir()
    replay(config, saved)  # with the weights at the start, which were still good
    said = capsys.readouterr().err
    assert f"step {error.value.args[0].split('step ')[1].split()[0]} of rank 0" in said
    assert "every module's output is finite" in said and "the batch itself is harmless" in said


def test_bad_images_are_skipped_counted_and_limited(tiny, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    from PIL import Image

    for index in range(24):
        Image.new("RGB", (40, 40), (index * 10, 0, 0)).save(folder / f"{index:03}.png")
    (folder / "broken.png").write_bytes(b"not an image")
    config = tiny(f"data.train={folder}", "optim.epochs=4", "data.max_bad=0.2")
    summary = pretrain(config)
    (bad,) = read_jsonl(Path(config.run_dir) / "quarantine.jsonl")
    assert summary["quarantined"] == 1 and "broken" in bad["key"]


def test_schedules_follow_the_samples_seen(tiny):
    config = tiny()
    _, _, length = check(config)
    larger = tiny("optim.global_batch_size=32")
    _, _, shorter = check(larger)
    for samples in (64, 96, 160):
        assert rates(config, length, samples).momentum == pytest.approx(rates(larger, shorter, samples).momentum, rel=1e-6)


def test_learning_rate_may_start_above_zero_and_stay_until_the_last_fifth(tiny):
    config = tiny("optim.schedule=constant_cooldown", "optim.warmup_start_lr=1.0e-5", "optim.warmup_epochs=1", "optim.epochs=20")
    _, _, length = check(config)
    batch = config.optim.global_batch_size
    peak = config.optim.lr * batch / 256
    lr = [rates(config, length, step * batch).lr for step in range(length.total_steps)]
    constant = lr[length.steps_per_epoch : length.total_steps * 4 // 5]
    assert lr[0] == pytest.approx(1e-5) and constant == pytest.approx([peak] * len(constant)) and len(constant) > 1
    assert lr[length.total_steps * 9 // 10] == pytest.approx(config.optim.min_lr + (peak - config.optim.min_lr) / 2)


def test_model_is_a_function_of_the_seed(tiny):
    device = torch.device("cpu")
    (a, _), (b, _), (c, _) = (build_model(tiny(f"seed={seed}"), device) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), c.state_dict().values(), strict=True))


def test_teacher_receives_no_gradient_and_drops_no_path(tiny):
    model, _ = build_model(tiny(), torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    drops = [module.drop_prob for module in model.student.modules() if hasattr(module, "drop_prob")]
    assert any(drops) and not any(module.drop_prob for module in model.teacher.modules() if hasattr(module, "drop_prob"))


def test_probe_on_splits_of_its_own_is_compared_with_their_raw_pixels(tiny):
    """data.test may be missing where the probe names its splits."""
    data = tiny().data
    probe = f"probes={{every_epochs: 1, knn: {{k: [5], workers: 0, data: {{train: '{data.train}', test: '{data.test}'}}}}}}"
    summary = pretrain(tiny("data.test=null", "optim.epochs=1", probe))
    assert set(summary["knn"]) == {"raw_pixels", "init", "trained"}
