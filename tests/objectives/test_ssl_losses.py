"""iBOT, KoLeo, Sinkhorn-Knopp, Gram anchoring and distillation: the references' values and gradients, ranks, and what holds for any input."""

import math

import pytest
import torch
import torch.nn.functional as F
from processes import run_ranks

from ssl_locat.errors import UserError
from ssl_locat.objectives import Progress, Views, check_batch
from ssl_locat.objectives.dino import DINO
from ssl_locat.objectives.distill import Distill
from ssl_locat.objectives.gram import Gram
from ssl_locat.objectives.ibot import IBOT, masked_loss
from ssl_locat.objectives.koleo import KoLeo, nearest_distances
from ssl_locat.objectives.masking import Masks
from ssl_locat.objectives.targets import Center, centered, pair_loss, sinkhorn
from ssl_locat.runs import distributed

AT = Progress(step=0, epoch=50, total_epochs=100)


@pytest.fixture
def g(golden):
    return golden("ssl_losses")


def close(found, expected, name=""):
    """1e-6 of the largest value is what the references' own rounding leaves; gradients of logs lose a digit more."""
    bound = 2e-6 * expected.abs().max().item() + 1e-9
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=2e-5, atol=bound, msg=lambda m: f"{name}: {m}")


def students(g) -> torch.Tensor:
    return torch.stack([g[f"in.cls.student{i}"] for i in range(g.config["student_crops"])]).requires_grad_()


def test_class_targets_and_centre_equal_dinov2(g):
    """Its centre moves when it is next used; ours at the end of the step: the same numbers reach the same loss."""
    temperature, center = g.config["teacher_temp"], Center(48, 0.9)
    for index in (0, 1):
        teacher = g[f"in.cls.teacher{index}"]
        close(centered(teacher, center.center, temperature).exp(), g[f"out.v2.dino.teacher_probs{index}"])
        center.add(teacher)
        center.finish_step()
    close(center.center, g["out.v2.dino.center"])
    objective = DINO(num_prototypes=48)
    for index in (0, 1):
        objective(torch.zeros(6, 4, 48), g[f"in.cls.teacher{index}"].unflatten(0, (2, -1)), AT)
        objective.finish_step()
    close(objective.center, g["out.v2.dino.center"])


def test_pair_loss_equals_dinov2_times_its_pairs(g):
    student = students(g)
    loss = pair_loss(student, g["out.v2.dino.teacher_probs1"].unflatten(0, (2, -1)), 0.1, same_view=True) * 12
    close(loss, g["out.v2.dino.loss"])
    (gradient,) = torch.autograd.grad(loss, student)
    close(gradient, torch.stack([g[f"grad.v2.dino.student{i}"] for i in range(6)]))


@pytest.mark.parametrize("ignore", [True, False])
def test_pair_loss_equals_dinov3(g, ignore):
    student = students(g)
    loss = pair_loss(student, g["out.v2.dino.teacher_probs1"].unflatten(0, (2, -1)), 0.1, same_view=not ignore)
    close(loss, g[f"out.v3.dino.ignore_diagonal_{ignore}.loss"])
    close(torch.autograd.grad(loss, student)[0], g[f"grad.v3.dino.ignore_diagonal_{ignore}.student"])


def test_sinkhorn_equals_dinov2(g):
    close(sinkhorn(g["in.cls.sk_logits"], g.config["teacher_temp"]).exp(), g["out.v2.dino.sinkhorn"])
    close(sinkhorn(g["in.ibot.teacher_masked_logits"], g.config["teacher_temp"]).exp(), g["out.v2.ibot.sinkhorn"])


def ibot_of(g) -> IBOT:
    return IBOT(num_prototypes=48, teacher_temp=(g.config["teacher_temp"],) * 2)


def golden_weights(g) -> torch.Tensor:
    return g["out.v2.ibot.masks_weight"] / len(g["in.ibot.mask"])


def test_ibot_equals_dinov2(g):
    objective = ibot_of(g)
    teacher, weights = g["in.ibot.teacher_masked_logits"], golden_weights(g)
    close(centered(teacher, objective.center.center, 0.05).exp(), g["out.v2.ibot.teacher_probs_center0"])
    objective((teacher, weights), (teacher, weights), AT)
    objective.finish_step()
    close(objective.center.center, g["out.v2.ibot.center"])
    close(centered(teacher, objective.center.center, 0.05).exp(), g["out.v2.ibot.teacher_probs_center1"])
    student = g["in.ibot.student_masked"].requires_grad_()
    loss, _ = objective((student, weights), (teacher, weights), AT)
    close(loss, g["out.v2.ibot.loss_masked"])
    close(torch.autograd.grad(loss, student)[0], g["grad.v2.ibot.student_masked"])


def test_ibot_of_all_patches_equals_dinov2s_of_masked_ones(g):
    student, masks = g["in.ibot.student_all"].requires_grad_(), g["in.ibot.mask"]
    targets = (g["in.ibot.teacher_all_logits"] / g.config["teacher_temp"]).softmax(-1)[masks]
    loss = masked_loss(student[masks] / 0.1, targets, golden_weights(g))
    close(loss, g["out.v2.ibot.loss_all"])
    close(torch.autograd.grad(loss, student)[0], g["grad.v2.ibot.student_all"])


def test_koleo_equals_dinov2_and_dinov3(g):
    x = g["in.koleo.x"].requires_grad_()
    loss, _ = KoLeo()(x[None], x[None].detach(), AT)
    gradient = torch.autograd.grad(loss, x)[0]
    for theirs in ("v2.koleo", "v3.koleo_topk1"):
        close(loss, g[f"out.{theirs}.loss"])
        close(gradient, g[f"grad.{theirs}.x"])


def test_koleo_of_several_neighbours_equals_dinov3(golden):
    g = golden("koleo_topk2")
    x = g["in.x"].requires_grad_()
    for topk in g.config["topk"]:
        loss, _ = KoLeo(topk=topk)(x[None], x[None].detach(), AT)
        close(loss, g[f"out.v3_topk{topk}.loss"])
        close(torch.autograd.grad(loss, x)[0], g[f"grad.v3_topk{topk}.x"])


def test_koleo_says_how_many_neighbours_there_are():
    with pytest.raises(UserError, match=r"topk is 0.*at least 1"):
        KoLeo(topk=0)
    with pytest.raises(UserError, match=r"topk is 4, but.*has 4 images: each has 3 neighbours"):
        KoLeo(topk=4)(torch.randn(1, 4, 3), torch.zeros(1, 4, 3), AT)


GRAM = {
    "default": {"negatives": "zero"},
    "no_norm": {"negatives": "zero", "normalize": False},
    "no_remove_neg": {},
    "teacher_neg_only": {"negatives": "zero_teacher"},
    "batch_level": {"negatives": "zero", "level": "batch"},
}


@pytest.mark.parametrize("name", GRAM)
def test_gram_equals_dinov3(g, name):
    student = g["in.gram.student"].requires_grad_()
    loss, _ = Gram(**GRAM[name])(student[None], Views(None, patches=g["in.gram.teacher"][None]), AT)
    close(loss, g[f"out.v3.gram.{name}.loss"])
    close(torch.autograd.grad(loss, student)[0], g[f"grad.v3.gram.{name}.student"])


# ---- ranks: half of the rows each gives what all of them give one rank; DDP then averages gradients over ranks


def _rows():
    torch.manual_seed(0)
    rank, world = distributed.rank(), distributed.world_size()
    x, scores = torch.randn(12, 8), 3 * torch.randn(12, 20)
    sizes = [12] if world == 1 else [5, 7]  # ranks hide different numbers of patches
    uneven = scores.split(sizes)[rank]
    log_q = sinkhorn(uneven, 0.05)
    nothing = sinkhorn(scores if rank == 0 else scores[:0], 0.05)
    center = Center(20, 0.5)
    for part in uneven.split(4):  # micro-batches
        center.add(part)
    center.finish_step()
    mine = x.chunk(world)[rank].clone().requires_grad_()
    loss = KoLeo()(mine[None], mine[None], AT)[0]
    loss.backward()
    teacher = torch.randn(2, 12, 20).chunk(world, 1)[rank]
    dino, _ = DINO(num_prototypes=20, targets="sinkhorn")(torch.randn(4, 12, 20).chunk(world, 1)[rank], teacher, AT)
    return {
        "sinkhorn": log_q.tolist(),
        "nothing": nothing.tolist(),
        "center": center.center.tolist(),
        "koleo": loss.item(),
        "gradient": (mine.grad / world).tolist(),
        "dino": dino.item(),
    }


def test_two_ranks_equal_one():
    whole, parts = _rows(), run_ranks(_rows, 2)
    for name in ("sinkhorn", "gradient"):
        together = torch.tensor(parts[0][name] + parts[1][name])
        torch.testing.assert_close(together, torch.tensor(whole[name]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(parts[0]["nothing"]), torch.tensor(whole["nothing"]), rtol=1e-5, atol=1e-5)
    assert parts[1]["nothing"] == []
    for part in parts:
        torch.testing.assert_close(torch.tensor(part["center"]), torch.tensor(whole["center"]), rtol=1e-5, atol=1e-6)
    for name in ("koleo", "dino"):
        assert sum(part[name] for part in parts) / 2 == pytest.approx(whole[name], rel=1e-5)


# ---- what holds for any input


def test_sinkhorn_rows_sum_to_one_at_any_temperature():
    q = sinkhorn(100 * torch.randn(16, 8), 0.01).exp()
    torch.testing.assert_close(q.sum(1), torch.ones(16))
    assert q.isfinite().all()


def test_sinkhorn_shares_prototypes_equally_in_the_limit():
    q = sinkhorn(torch.randn(32, 8), 0.5, iterations=200).exp()
    torch.testing.assert_close(q.sum(0), torch.full((8,), 4.0), rtol=1e-4, atol=1e-4)


def test_targets_without_rows_are_empty_and_cost_nothing():
    student = torch.zeros(0, 6, requires_grad=True)
    for targets in ("centering", "sinkhorn"):
        objective = IBOT(num_prototypes=6, targets=targets)
        loss, metrics = objective((student, torch.zeros(0)), (student.detach(), torch.zeros(0)), AT)
        loss.backward()
        objective.finish_step()
        assert loss.item() == 0 and metrics["patch_entropy"].item() == 0
        assert objective.center is None or not objective.center.center.any()


def test_koleo_sums_over_global_views_and_leaves_local_ones_alone():
    """Beside a slow formula: -mean over images of log ||a - its nearest||, of unit vectors."""
    student, expected = torch.randn(3, 5, 4), 0.0
    for view in F.normalize(student[:2], dim=-1):
        nearest = [min((view[a] - view[b]).norm().item() for b in range(5) if b != a) for a in range(5)]
        expected -= sum(math.log(distance) for distance in nearest) / 5
    loss, _ = KoLeo()(student, torch.zeros(2, 5, 4), AT)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_koleo_pushes_neighbours_apart():
    x = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [0.0, -1.0]]), dim=-1).requires_grad_()
    before = nearest_distances(x)[0].item()
    KoLeo()(x[None], x[None].detach(), AT)[0].backward()
    assert nearest_distances((x - 0.01 * x.grad).detach())[0].item() > before


def test_equal_class_tokens_keep_koleo_finite():
    x = torch.ones(4, 8, requires_grad=True)
    loss, _ = KoLeo()(x[None], x[None].detach(), AT)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_gram_does_not_see_a_rotation():
    """Features may move as long as their similarities stay."""
    patches = torch.randn(2, 3, 9, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert Gram()(patches @ rotation, Views(None, patches=patches), AT)[0].item() < 1e-10


def test_only_hidden_patches_pass_the_patch_head():
    objective = IBOT(num_prototypes=10, hidden_dim=8, bottleneck_dim=4)
    head, seen = objective.make_head(6), []
    head.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    hidden = objective.make_masks([1, 2, 3], 2, (4, 4))
    masks = Masks.of(hidden)
    patches = torch.randn(2, 3, 16, 6)
    views = Views(torch.randn(2, 3, 6), patches=patches, masks=hidden.unflatten(0, (2, 3)), masked=masks.index)
    scores, weights = head(views)
    assert seen == [(int(hidden.sum()), 6)] and scores.shape == (int(hidden.sum()), 10)
    torch.testing.assert_close(scores, head.head(patches.flatten(0, 1)[hidden]))
    assert weights.sum().item() == pytest.approx(hidden.any(1).float().mean().item())
    first = Progress(step=0, epoch=0, total_epochs=100)
    assert objective.frozen(head, first) == list(head.head.last_layer.parameters())
    shared = IBOT(num_prototypes=10, hidden_dim=8, bottleneck_dim=4, shared_head=True)
    follower = shared.make_head(6)
    follower.share(lambda views: head.head(views.cls))
    torch.testing.assert_close(follower(views)[0], scores)
    assert shared.frozen(follower, first) == []


def test_distillation_of_itself_is_free():
    anchor = Views(torch.randn(2, 3, 8), patches=torch.randn(2, 3, 9, 8))
    objective = Distill("timm:x", patch_weight=0.5)
    loss, _ = objective((anchor.cls, anchor.patches), anchor, AT)
    assert math.isclose(loss.item(), 0, abs_tol=1e-6) and objective.finish_step() == {}


def test_distillation_without_projections_compares_the_patches_it_is_asked_for():
    views = Views(torch.randn(2, 3, 8), patches=torch.randn(2, 3, 9, 8), refined_patches=torch.randn(2, 3, 9, 8))
    for refined, patches in (False, views.patches), (True, views.refined_patches):
        cls, tokens = Distill("timm:x", refined=refined, project=False).make_head(8, 8, 8, 8)(views)
        assert cls is views.cls and tokens is patches


@pytest.mark.parametrize("refined", [False, True])
def test_distillation_equals_a_slow_formula(refined):
    """2 global and 2 local crops of 3 images: each global crop answers to its own tokens, each local one to both crops'."""
    cls, patches = torch.randn(4, 3, 8), torch.randn(2, 3, 5, 8)
    tokens = {"refined_patches" if refined else "patches": torch.randn(2, 3, 5, 8)}
    anchor = Views(torch.randn(2, 3, 8), **tokens)
    pairs = [(0, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    class_terms = [F.cosine_similarity(cls[s, b], anchor.cls[t, b], dim=0) for s, t in pairs for b in range(3)]
    patch_terms = [
        F.cosine_similarity(patches[t, b, n], next(iter(tokens.values()))[t, b, n], dim=0)
        for t in range(2)
        for b in range(3)
        for n in range(5)
    ]
    loss, metrics = Distill("timm:x", patch_weight=0.5, refined=refined)((cls, patches), anchor, AT)
    class_loss, patch_loss = 1 - torch.stack(class_terms).mean(), 1 - torch.stack(patch_terms).mean()
    torch.testing.assert_close(metrics, {"cls": class_loss, "patches": patch_loss})
    torch.testing.assert_close(loss, class_loss + 0.5 * patch_loss)


def test_the_smallest_batch_that_an_objective_asks_for_is_enough():
    losses = torch.nn.ModuleDict({"dino": DINO()})
    losses["dino"].min_images = 4
    check_batch(losses, 4)
    with pytest.raises(UserError, match=r"of which there are 3 .*expected at least 4"):
        check_batch(losses, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DINO(targets="sinkhornn"), "Did you mean 'sinkhorn'"),
        (lambda: IBOT(mask_shape="blocks"), "expected block or random"),
        (lambda: IBOT(mask_ratio=(0.5, 0.1)), "mask_ratio"),
        (lambda: Gram(negatives="drop"), "negatives is 'drop'"),
    ],
)
def test_wrong_options_are_explained(make, words):
    with pytest.raises(UserError, match=words):
        make()
