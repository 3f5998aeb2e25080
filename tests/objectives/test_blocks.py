"""Prototypes block by block: the plain losses' values and gradients, with memory that does not grow with K, and how many are in use when."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ssl_locat.benchmarks.timing import peak_bytes
from ssl_locat.errors import UserError
from ssl_locat.objectives import Masks, Progress, Views
from ssl_locat.objectives.blocks import BlockScores, sinkhorn_by_blocks
from ssl_locat.objectives.dino import DINO
from ssl_locat.objectives.ibot import IBOT
from ssl_locat.objectives.targets import sinkhorn

SIZE = {"num_prototypes": 50, "hidden_dim": 32, "bottleneck_dim": 16, "min_images": 1, "teacher_temp": (0.04, 0.07)}


def at(epoch: float) -> Progress:
    return Progress(step=0, epoch=epoch, total_epochs=100)


def as_blocks(scores: torch.Tensor, block: int = 7) -> BlockScores:
    """Scores that someone else computed: tokens times one prototype for each."""
    return BlockScores(scores, torch.eye(scores.shape[-1]), block)


def test_dino_by_blocks_equals_the_reference(golden):
    g = golden("dino_loss_2g8l")
    config = g.config
    temperatures = (config["warmup_teacher_temp"], config["teacher_temp"])
    objective = DINO(
        num_prototypes=config["out_dim"],
        teacher_temp=temperatures,
        teacher_temp_warmup_epochs=config["warmup_teacher_temp_epochs"],
    )
    if "in.center0" in g:
        objective.center.copy_(g["in.center0"])
    for iteration, epoch in enumerate(config["epoch_of_iter"]):
        student = g[f"in.{iteration}.student"].unflatten(0, (config["ncrops"], -1)).requires_grad_()
        teacher = as_blocks(g[f"in.{iteration}.teacher"].unflatten(0, (2, -1)))
        loss, _ = objective(as_blocks(student), teacher, at(epoch))
        torch.testing.assert_close(loss.reshape(1), g[f"out.{iteration}.loss"], rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient.flatten(0, 1), g[f"grad.{iteration}.student"], rtol=1e-5, atol=1e-7)
        objective.finish_step()
        torch.testing.assert_close(objective.center, g[f"out.{iteration}.center_after"], rtol=1e-6, atol=1e-7)


def test_ibot_and_sinkhorn_by_blocks_equal_dinov2(golden):
    g = golden("ssl_losses")
    temperature = g.config["teacher_temp"]
    for given, expected in (
        ("in.cls.sk_logits", "out.v2.dino.sinkhorn"),
        ("in.ibot.teacher_masked_logits", "out.v2.ibot.sinkhorn"),
    ):
        targets = sinkhorn_by_blocks(as_blocks(g[given]), temperature)
        found = torch.cat([targets.part(span) for span in targets.scores.spans()], -1).exp()
        torch.testing.assert_close(found, g[expected].reshape(found.shape), rtol=2e-5, atol=1e-6)
    objective, weights = (
        IBOT(num_prototypes=48, teacher_temp=(temperature,) * 2),
        g["out.v2.ibot.masks_weight"] / len(g["in.ibot.mask"]),
    )
    teacher = (as_blocks(g["in.ibot.teacher_masked_logits"]), weights)
    objective(teacher, teacher, at(50))
    objective.finish_step()
    torch.testing.assert_close(objective.center.center, g["out.v2.ibot.center"].reshape(1, -1), rtol=2e-5, atol=1e-6)
    student = g["in.ibot.student_masked"].requires_grad_()
    loss, _ = objective((as_blocks(student), weights), teacher, at(50))
    torch.testing.assert_close(loss, g["out.v2.ibot.loss_masked"].reshape(()), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], g["grad.v2.ibot.student_masked"], rtol=2e-5, atol=2e-6)


def views_of(networks: int) -> list[Views]:
    """Of a student and a teacher: class tokens of 5 and 2 views, patches of which some are hidden."""
    torch.manual_seed(0)
    masks = Masks.of(torch.rand(8, 9) < 0.3, torch.device("cpu"))
    return [
        Views(torch.randn(views, 4, 24), torch.randn(2, 4, 9, 24), None, masks.hidden.unflatten(0, (2, 4)), masks.index)
        for views in (5, 2)[:networks]
    ]


def flat(found) -> list[torch.Tensor]:
    return [leaf.detach() for leaf in tree_leaves(found)]


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
@pytest.mark.parametrize("make", [DINO, IBOT])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_give_the_plain_losses_gradients(make, targets, precision):
    """Of every parameter of the head, through both networks' own; in bfloat16 what differs is the order of sums of rounded numbers."""
    torch.manual_seed(1)
    plain = make(**SIZE, targets=targets)
    blocks = make(**SIZE, targets=targets, prototype_block=16)  # 50 = 3 x 16 + 2
    heads = [plain.make_head(24), plain.make_head(24)]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    found = {}
    for name, objective in (("plain", plain), ("blocks", blocks)):
        student, teacher = (objective.make_head(24) for _ in heads)
        for own, given in zip((student, teacher), heads, strict=True):
            own.load_state_dict(given.state_dict())
        with autocast:
            outputs = [head(views) for head, views in zip((student, teacher), views_of(2), strict=True)]
        losses = [objective(outputs[0], outputs[1], at(40)) for _ in range(2)]  # the second with a centre that has moved
        objective.finish_step()
        loss, metrics = losses[-1]
        loss.backward()
        found[name] = (loss.detach(), metrics, [p.grad for p in student.parameters() if p.requires_grad], objective.state_dict())
    # of a tensor's largest value: sums of either order are as far from those in float64
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    for ours, expected in zip(flat(found["blocks"]), flat(found["plain"]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * expected.abs().max().item() + 1e-7)


def test_memory_does_not_grow_with_prototypes():
    """Beside tokens and prototypes, which are as large as the parameters: 12 rows of scores and gradients of 8192 prototypes cost 16 blocks of 512 a sixteenth."""
    student, teacher = torch.randn(10, 8, 4, requires_grad=True), torch.randn(2, 8, 4)
    weight = torch.randn(8192, 4, requires_grad=True)
    objective = DINO(num_prototypes=8192)

    def by_blocks(block: int) -> None:
        objective(BlockScores(student, weight, block), BlockScores(teacher, weight.detach(), block), at(0))[0].backward()

    scores = 4 * 8192 * 80  # of the student, float32
    assert peak_bytes(lambda: by_blocks(512)) < 0.5 * scores
    assert peak_bytes(lambda: objective(student @ weight.mT, teacher @ weight.mT, at(0))[0].backward()) > 2 * scores


def test_active_prototypes_are_a_prefix_by_the_share_of_the_run():
    objective = DINO(**SIZE, active_prototypes=[[0, 20], [0.5, 50]])
    assert [objective.active(at(epoch)) for epoch in (0, 49.9, 50, 100)] == [20, 20, 50, 50]
    assert objective.mean_active == 35
    head, plain = objective.make_head(24), DINO(**{**SIZE, "num_prototypes": 20})
    student, teacher = views_of(2)
    loss, metrics = objective(head(student), head(teacher), at(10))
    loss.backward()
    drop = head(student).whole()[..., :20], head(teacher).whole()[..., :20]
    torch.testing.assert_close(loss, plain(*drop, at(10))[0])
    assert metrics["active_prototypes"] == 20
    gradient = head.last_layer.weight_v.grad
    assert gradient[:20].abs().min() > 0 and not gradient[20:].any()
    objective.finish_step()
    assert objective.center[0, :20].abs().min() > 0 and not objective.center[0, 20:].any()
    objective(head(student), head(teacher), at(60))  # all of them now
    objective.finish_step()
    assert objective.center.abs().min() > 0


def test_a_shared_head_has_its_owners_stages():
    dino, ibot = DINO(**SIZE, active_prototypes=[[0, 20], [0.5, 50]]), IBOT(shared_head=True)
    ibot.follow(dino)
    assert ibot.active(at(10)) == 20
    with pytest.raises(UserError, match="active_prototypes with shared_head"):
        IBOT(shared_head=True, num_prototypes=50, active_prototypes=[[0, 10]]).follow(copy.deepcopy(dino))


@pytest.mark.parametrize("stages", [[[0.1, 20]], [[0, 20], [0, 30]], [[0, 51]], [[0, 20], [1, 50]], [[0, 0]]])
def test_stages_that_cannot_be_meant_are_refused(stages):
    with pytest.raises(UserError, match=r"active_prototypes is .*shares rising from 0"):
        DINO(**SIZE, active_prototypes=stages)


def test_sinkhorn_of_no_rows_is_no_targets():
    targets = sinkhorn_by_blocks(BlockScores(torch.zeros(0, 4), torch.randn(9, 4), 4), 0.1)
    assert targets.part(slice(0, 4)).shape == sinkhorn(torch.zeros(0, 4), 0.1).shape
