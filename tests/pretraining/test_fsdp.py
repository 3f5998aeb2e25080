"""DDP, FSDP2 and activation checkpointing train as one process does: a small LocAtViT with DINO's head, on gloo processes."""

import pytest
import torch
from processes import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssl_locat.models.backbone import create_backbone
from ssl_locat.objectives import Progress
from ssl_locat.objectives.dino import DINO
from ssl_locat.optim.optim import build_optimizer, clip_gradients, set_hyperparameters
from ssl_locat.pretraining.student_teacher import StudentTeacher
from ssl_locat.runs import distributed
from ssl_locat.runs.checkpoint import Checkpointer, read_weights
from ssl_locat.runs.distributed import rank, world_size

BATCH, STEPS = 8, 4


def build(parallel: str | None, recompute: bool):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone = create_backbone("locatvit_tiny", drop_path_rate=0.0, **options)
    losses = nn.ModuleDict({"dino": DINO(num_prototypes=64, hidden_dim=32, bottleneck_dim=16, frozen_last_layer_epochs=0)})
    model = StudentTeacher(backbone, losses)
    if recompute:
        distributed.checkpoint_activations(model.student.backbone.blocks)
    student = model.student
    if parallel == "ddp":
        student = DistributedDataParallel(model.student, find_unused_parameters=True)
    elif parallel == "fsdp":
        for network in (model.student, model.teacher):
            distributed.shard(network, [*network.backbone.blocks, *network.heads.values()], torch.device("cpu"))
    return model, student, losses, build_optimizer(model.student, (0.9, 0.999))


def crops_of(step: int, accumulate: int):
    """This rank's micro-batches of a global batch that is the same for every world size; view-major."""
    torch.manual_seed(1000 + step)
    views = torch.randn(2, BATCH, 3, 32, 32), torch.randn(2, BATCH, 3, 16, 16)
    share = BATCH // (world_size() * accumulate)
    for micro in range(accumulate):
        start = (micro * world_size() + rank()) * share
        yield tuple(view[:, start : start + share].flatten(0, 1) for view in views)


def train(model, student, losses, optimizer, first: int = 0, accumulate: int = 1) -> list[float]:
    found = []
    for step in range(first, STEPS):
        set_hyperparameters(optimizer, 1e-2, 0.04)
        total = 0.0
        for micro, (global_crops, local_crops) in enumerate(crops_of(step, accumulate)):
            with distributed.gradient_sync(student, now=micro == accumulate - 1):
                with torch.no_grad():
                    targets = model.teacher(global_crops, None, 2)
                views = student(global_crops, local_crops, 2)
                loss, _ = losses["dino"](views["dino"], targets["dino"], Progress(step, 0.0, 1.0))
                (loss / accumulate).backward()
            total += loss.detach() / accumulate
        clip_gradients(model.student.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        losses["dino"].finish_step()
        model.update_teacher(0.9)
        found.append(distributed.all_reduce_mean_(total).item())
    return found


def run(parallel: str | None, recompute: bool, run_dir=None, resume: bool = False, accumulate: int = 1):
    """Losses; saves at the end, or goes on from what was saved two steps before the end."""
    model, student, losses, optimizer = build(parallel, recompute)
    modules = {"student": student, "teacher": model.teacher, "objective": losses}
    if run_dir is None:
        return train(model, student, losses, optimizer, accumulate=accumulate)
    checkpointer = Checkpointer(run_dir)
    if resume:
        step = checkpointer.load(checkpointer.newest(), modules, optimizer)["step"]
        return train(model, student, losses, optimizer, first=step)
    global STEPS
    STEPS = 2
    first = train(model, student, losses, optimizer)
    checkpointer.save(2, modules, optimizer, {}, block=True)
    STEPS = 4
    return first + train(model, student, losses, optimizer, first=2)


@pytest.fixture(scope="module")
def alone():
    """Losses of one process: the measure of all others."""
    return torch.tensor(run(None, False))


def close(losses: list[float], expected: torch.Tensor) -> None:
    # the same sums in another order; 4 steps at lr 0.01 let the differences of 1e-7 grow
    torch.testing.assert_close(torch.tensor(losses), expected, rtol=2e-5, atol=2e-6)


def test_recomputed_activations_change_nothing(alone):
    assert run(None, True) == alone.tolist()


def test_accumulation_is_the_same_global_batch(alone):
    close(run(None, False, accumulate=4), alone)


def _all_forms(folder):
    """Both forms train and save; each goes on from the other's checkpoint. In one go: starting processes is what takes time."""
    return {
        "ddp": run("ddp", False, folder / "ddp"),
        "fsdp": run("fsdp", True, folder / "fsdp"),
        "ddp from fsdp": run("ddp", True, folder / "fsdp", True),
        "fsdp from ddp": run("fsdp", False, folder / "ddp", True),
        "ddp accumulated": run("ddp", False, accumulate=2),
        "fsdp accumulated": run("fsdp", False, accumulate=2),
        "probed": probed(),
    }


def probed() -> list[float]:
    """What a sharded backbone's whole copy says, on rank 0 alone."""
    model = build("fsdp", False)[0]
    twin = distributed.copy_whole(model.teacher.backbone, build(None, False)[0].teacher.backbone)
    return twin(torch.ones(1, 3, 32, 32)).flatten().tolist() if distributed.is_main() else []


@pytest.mark.timeout(1200)  # 24 trainings on two cores, where four processes wait for each other
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one_and_checkpoints_load_in_any_form(processes, alone, tmp_path):
    expected = build(None, False)[0].teacher.backbone(torch.ones(1, 3, 32, 32)).flatten().tolist()
    for index, found in enumerate(run_ranks(_all_forms, processes, tmp_path, seconds=1000)):
        assert found["probed"] == ([] if index else expected)
        close(found["ddp accumulated"], alone)
        close(found["fsdp accumulated"], alone)
        close(found["ddp"], alone)
        close(found["fsdp"], alone)
        close(found["ddp from fsdp"], alone[2:])
        close(found["fsdp from ddp"], alone[2:])
    names = build(None, False)[0].teacher.backbone.state_dict().keys()
    for form in ("ddp", "fsdp"):
        close(run(None, False, tmp_path / form, True), alone[2:])
        assert read_weights(tmp_path / form / "checkpoints/step_00000002", "teacher.backbone.").keys() == names
