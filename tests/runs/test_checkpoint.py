import json
import os
import pickle
import resource
import signal
import sys
import threading
import time

import pytest
import torch
from processes import run_ranks
from torch import nn
from torch.distributed.checkpoint import staging
from torch.nn.parallel import DistributedDataParallel

from ssl_locat.errors import CheckpointError, Outage
from ssl_locat.runs import distributed
from ssl_locat.runs.checkpoint import Checkpointer, problem, read_weights


class Small(nn.Module):
    """Parameters of all ranks (scalar, vector, matrix), a buffer, one parameter that never gets a gradient."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 4))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("center", torch.zeros(1, 4))

    def forward(self, x):
        return self.body(x) * self.scale


def build(width: int = 16, fused: bool = True):
    torch.manual_seed(0)
    model = Small(width)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "name": "decayed", "weight_decay": 0.04}, {"params": vectors, "name": "plain"}]
    return model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=fused)


def train(model, optimizer, first: int, last: int, frozen: nn.Module | None = None) -> float:
    """Steps [first, last): a pure function of the state and the step. frozen: a part whose gradients are dropped."""
    for step in range(first, last):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = model(torch.randn(6, 8)).square().mean()
        loss.backward()
        if frozen:
            frozen.zero_grad()
        optimizer.step()
    return loss.item()


def saved(run_dir, *steps, **options) -> Checkpointer:
    checkpointer = Checkpointer(run_dir, **options)
    model, optimizer = build()
    done = 0
    for step in steps:
        train(model, optimizer, done, step)
        checkpointer.save(step, {"student": model}, optimizer, {"samples_seen": 6 * step}, block=True)
        done = step
    return checkpointer


@pytest.mark.parametrize("fused", [True, False])
def test_resumed_run_equals_unbroken_run_bit_for_bit(tmp_path, fused, monkeypatch):
    model, optimizer = build(fused=fused)
    checkpointer = Checkpointer(tmp_path)
    train(model, optimizer, 0, 3)
    checkpointer.save(3, {"student": model}, optimizer, {"samples_seen": 18}, scaler_state={"scale": 2.0**16})
    loss = train(model, optimizer, 3, 6)  # while the save is written

    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    checkpointer.wait()
    again, its_optimizer = build(fused=fused)
    with torch.no_grad():
        again.scale.zero_()
    found = Checkpointer(tmp_path)
    assert found.load(found.newest(), {"student": again}, its_optimizer) == {
        "step": 3,
        "meta": {"samples_seen": 18},
        "scaler": {"scale": 65536.0},
    }
    assert train(again, its_optimizer, 3, 6) == loss
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert optimizer.state[one].keys() == its_optimizer.state[other].keys()
        for key, value in optimizer.state[one].items():
            twin = its_optimizer.state[other][key]
            assert torch.equal(value, twin) and value.dtype == twin.dtype and value.shape == twin.shape, key
    assert its_optimizer.param_groups[0]["betas"] == (0.9, 0.95) and its_optimizer.param_groups[0]["name"] == "decayed"
    for group in its_optimizer.param_groups:
        group["lr"] = 7.0
    found.load(found.newest(), {"student": again}, its_optimizer)
    assert [group["lr"] for group in its_optimizer.param_groups] == [1e-3, 1e-3]


def test_pinned_copies_are_made_anew_when_a_frozen_parameter_gets_its_state(tmp_path, monkeypatch):
    """On a GPU copies are kept from save to save; AdamW's state grows when the last layer unfreezes."""
    make = staging._create_cpu_state_dict
    monkeypatch.setattr(staging, "_create_cpu_state_dict", lambda state, pin_memory=False: make(state))  # no GPU to pin for
    checkpointer = Checkpointer(tmp_path)
    checkpointer._stager = staging.BlockingAsyncStager(cache_staged_state_dict=True)
    model, optimizer = build()
    for step, frozen in ((1, True), (2, True), (3, False)):
        train(model, optimizer, step - 1, step, frozen=model.body[2] if frozen else None)
        checkpointer.save(step, {"student": model}, optimizer, {}, block=True)
    assert torch.equal(read_weights(tmp_path / "checkpoints/step_00000003", "student.")["body.2.weight"], model.body[2].weight)


def test_last_and_milestones_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5, 6, 7, keep_last=2, milestone_every=3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step_{n:08d}" for n in (3, 6, 7)]


def test_a_save_says_no_word_of_failure_and_other_folders_are_left_alone(tmp_path, caplog):
    (tmp_path / "checkpoints/step_x1").mkdir(parents=True)
    checkpointer = saved(tmp_path, 1, 2, keep_last=1)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert checkpointer.newest().name == "step_00000002" and (tmp_path / "checkpoints/step_x1").exists()


def test_a_run_folder_that_was_moved_away_does_not_appear_again(tmp_path):
    checkpointer = saved(tmp_path / "run", 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    model, optimizer = build()
    with pytest.raises(Outage, match="step 2 could not be saved"):
        checkpointer.save(2, {"student": model}, optimizer, {}, block=True)
    assert not (tmp_path / "run").exists()


def test_the_same_step_of_another_history_is_set_aside(tmp_path):
    first = saved(tmp_path, 1, 2)
    model, optimizer = build()
    again = Checkpointer(tmp_path)
    again.load(tmp_path / "checkpoints/step_00000001", {"student": model}, optimizer)
    again.save(2, {"student": model}, optimizer, {"samples_seen": 99}, block=True)
    assert again.newest().name == "step_00000002" == first.newest().name
    assert json.loads((again.newest() / "checkpoint.json").read_text())["meta"] == {"samples_seen": 99}
    assert (tmp_path / "checkpoints/superseded_step_00000002").exists()


def test_damaged_checkpoint_is_passed_over(tmp_path):
    checkpointer = saved(tmp_path, 1, 2, 3, 4)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [problem(folder) for folder in folders] == [None] * 3
    tensors = next(folders[2].glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    (folders[1] / "checkpoint.json").unlink()
    assert "bytes instead of" in problem(folders[2])
    assert checkpointer.newest().name == "step_00000002"
    model, optimizer = build()
    with pytest.raises(CheckpointError, match="bytes instead of"):
        checkpointer.load(folders[2], {"student": model}, optimizer)


def test_other_model_is_refused_before_anything_changes(tmp_path):
    checkpointer = saved(tmp_path, 1)
    model, optimizer = build(width=8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"differs in shape student\.body.0.weight: .* and 2 more"):
        checkpointer.load(checkpointer.newest(), {"student": model}, optimizer)
    with pytest.raises(CheckpointError, match=r"lacks teacher\.body\.0\.bias"):
        checkpointer.load(checkpointer.newest(), {"teacher": model}, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_are_read_by_prefix(tmp_path):
    path = saved(tmp_path, 2).newest()
    model, optimizer = build()
    train(model, optimizer, 0, 2)
    weights = read_weights(path, "student.body.")
    assert weights.keys() == model.body.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.body.state_dict().items())
    assert read_weights(path, "student.")["scale"].shape == ()
    with pytest.raises(CheckpointError, match=r"no weights under 'teacher\.'; it has .*student\.body\."):
        read_weights(path, "teacher.")


def test_resuming_from_an_older_one_sets_the_newer_aside(tmp_path):
    saved(tmp_path, 1, 2, 3)
    model, optimizer = build()
    checkpointer = Checkpointer(tmp_path)
    checkpointer.load(tmp_path / "checkpoints/step_00000001", {"student": model}, optimizer)
    checkpointer.save(2, {"student": model}, optimizer, {}, block=True)
    assert checkpointer.newest().name == "step_00000002"
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_00000001", "step_00000002", "superseded_step_00000002", "superseded_step_00000003"}


@pytest.fixture
def gate(monkeypatch):
    """An event that holds up the writing thread until it is set: a `save` that waits for the disk fails here."""
    gate, write = threading.Event(), Checkpointer._write

    def held(*arguments):
        assert gate.wait(15), "save waited until all was written"
        return write(*arguments)

    monkeypatch.setattr(Checkpointer, "_write", held)
    return gate


def test_saving_returns_before_it_writes_and_does_not_see_later_steps(tmp_path, gate):
    torch.manual_seed(0)
    model = nn.Linear(2048, 2048)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = Checkpointer(tmp_path)
    before = model.weight.detach().clone()
    checkpointer.save(1, {"student": model}, optimizer, {})
    assert checkpointer.newest() is None
    with torch.no_grad():
        model.weight.zero_()
    gate.set()
    checkpointer.wait()
    assert torch.equal(read_weights(checkpointer.newest(), "student.")["weight"], before)


# ---- killed, or out of space, at every stage


def in_child(function) -> int:
    """Exit status of `function` run in a forked copy of this process."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at_file_operation(number: int, folder) -> None:
    """SIGKILL just before the `number`-th operation that touches `folder`; audit events come before what they announce."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if (changes or event == "open") and arguments and str(folder) in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_kill_at_any_stage_leaves_a_whole_checkpoint(tmp_path):
    endings = []
    for stage in range(1, 200):
        run_dir = tmp_path / str(stage)
        saved(run_dir, 1, keep_last=1)

        def save_and_die(run_dir=run_dir, stage=stage):
            die_at_file_operation(stage, run_dir)
            saved_again = Checkpointer(run_dir, keep_last=1)
            model, optimizer = build()
            saved_again.load(run_dir / "checkpoints/step_00000001", {"student": model}, optimizer)
            saved_again.save(2, {"student": model}, optimizer, {}, block=True)

        status = in_child(save_and_die)
        model, optimizer = build()
        survivor = Checkpointer(run_dir, keep_last=1)
        newest = survivor.newest()
        assert newest is not None, f"nothing survived a kill at operation {stage}"
        assert survivor.load(newest, {"student": model}, optimizer)["step"] in (1, 2)
        survivor.save(3, {"student": model}, optimizer, {}, block=True)  # goes on, and clears what was left behind
        assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_00000003"]
        endings.append(newest.name)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert status == 0 and stage > 10  # every operation had its turn, up to a save that was not disturbed
    assert endings[0] == "step_00000001" and endings[-1] == "step_00000002"


@pytest.mark.parametrize("room", [0, 3000])
def test_full_disk_leaves_the_former_one_and_training_goes_on(tmp_path, room):
    saved(tmp_path, 1)

    def fill_up():
        model, optimizer = build()
        checkpointer = Checkpointer(tmp_path)
        checkpointer.load(checkpointer.newest(), {"student": model}, optimizer)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # the kernel refuses to write more, as on a full disk
        checkpointer.save(2, {"student": model}, optimizer, {})
        train(model, optimizer, 1, 2)
        checkpointer.wait()
        assert checkpointer.failures == 1 and checkpointer.newest().name == "step_00000001"
        with pytest.raises(Outage, match=r"step 3 could not be saved: .*File too large.*step_00000001"):
            checkpointer.save(3, {"student": model}, optimizer, {}, block=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpointer.save(4, {"student": model}, optimizer, {}, block=True)
        assert checkpointer.newest().name == "step_00000004" and checkpointer.failures == 0

    assert in_child(fill_up) == 0
    assert not list((tmp_path / "checkpoints").glob(".*"))


# ---- other world sizes


def _two_processes(run_dir, of_one):
    """Save as two, load what one saved, fail on rank 1 only. In one go: starting processes is what takes time."""
    model, optimizer = build()
    wrapped = DistributedDataParallel(model)
    train(wrapped, optimizer, 0, 2)
    checkpointer = Checkpointer(run_dir)
    checkpointer.save(2, {"student": wrapped}, optimizer, {"samples_seen": 12})
    checkpointer.wait(raise_errors=True)

    again, its_optimizer = build()
    other = Checkpointer(of_one)
    newest = other.newest()
    if distributed.rank() == 0:
        assert read_weights(newest, "student.")  # one rank may read weights alone
    meta = other.load(newest, {"student": DistributedDataParallel(again)}, its_optimizer)["meta"]
    loss = train(again, its_optimizer, 2, 4)

    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    checkpointer.save(4, {"student": wrapped}, optimizer, {})
    checkpointer.wait()
    return meta, loss, checkpointer.failures, checkpointer.newest().name


def test_two_processes_and_one_read_each_other_and_a_failure_on_one_is_known_to_both(tmp_path):
    saved(tmp_path / "one", 2)
    model, optimizer = build()
    train(model, optimizer, 0, 2)
    expected = train(model, optimizer, 2, 4)
    found = run_ranks(_two_processes, 2, tmp_path / "two", tmp_path / "one")
    assert found == [({"samples_seen": 12}, expected, 1, "step_00000002")] * 2

    alone, its_optimizer = build()
    checkpointer = Checkpointer(tmp_path / "two")
    checkpointer.load(checkpointer.newest(), {"student": alone}, its_optimizer)
    assert train(alone, its_optimizer, 2, 4) == expected
    files = json.loads((checkpointer.newest() / "checkpoint.json").read_text())["files"]
    assert len(files) == 2  # each rank wrote its part
    one, other = (checkpointer.newest() / name for name in files)
    swapped = one.with_name("swapped")
    one.rename(swapped), other.rename(one), swapped.rename(other)  # of one size, perhaps: names tell whose part it is
    assert checkpointer.newest() is None and problem(one.parent, contents=True)


# ---- what it costs


def test_saving_stalls_training_for_less_than_a_step(tmp_path, gate):
    """Measured in this thread's CPU time, each save beside a step: other work on the machine does not count."""
    from ssl_locat.models.backbone import create_backbone

    torch.manual_seed(0)
    options = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
    model = create_backbone("locatvit_tiny", **options)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = Checkpointer(tmp_path, keep_last=1)

    def step():
        model.forward_features(torch.randn(16, 3, 64, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    steps, stalls = [], []
    for number in range(1, 8):
        began = time.thread_time()
        step()
        gate.clear()
        between = time.thread_time()
        checkpointer.save(number, {"student": model}, optimizer, {})
        stalls.append(time.thread_time() - between)
        steps.append(between - began)
        gate.set()
        checkpointer.wait()
    print(f"step {sorted(steps)[3] * 1e3:.1f} ms, stall {sorted(stalls)[3] * 1e3:.1f} ms of CPU time")
    assert sorted(stalls)[3] < 0.5 * sorted(steps)[3]
    assert checkpointer.newest().name == "step_00000007"
