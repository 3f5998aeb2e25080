"""DINO's loss, head, schedules, clipping and parameter groups against the reference's numbers, and what holds for any input."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssl_locat.benchmarks.timing import peak_bytes
from ssl_locat.config.schema import Objective
from ssl_locat.errors import UserError
from ssl_locat.models.backbone import create_backbone
from ssl_locat.objectives import Needs, Progress, Views, build
from ssl_locat.objectives.dino import DINO
from ssl_locat.objectives.heads import DINOHead, Prototypes
from ssl_locat.objectives.ibot import IBOT
from ssl_locat.objectives.targets import pair_loss
from ssl_locat.optim.optim import build_optimizer, clip_gradients, lr_scales, parameter_groups, set_hyperparameters
from ssl_locat.optim.schedules import LEARNING_RATES, constant_cooldown, cosine, decayed, stepwise
from ssl_locat.pretraining.student_teacher import StudentTeacher


def at(epoch: float) -> Progress:
    return Progress(step=0, epoch=epoch, total_epochs=100)


@pytest.mark.parametrize("case", ["dino_loss_2g0l", "dino_loss_2g8l"])
def test_loss_and_center_equal_the_reference(golden, case):
    g = golden(case)
    config = g.config
    objective = DINO(
        num_prototypes=config["out_dim"],
        teacher_temp=(config["warmup_teacher_temp"], config["teacher_temp"]),
        teacher_temp_warmup_epochs=config["warmup_teacher_temp_epochs"],
    )
    if "in.center0" in g:
        objective.center.copy_(g["in.center0"])
    for iteration, epoch in enumerate(config["epoch_of_iter"]):
        torch.testing.assert_close(objective.center, g[f"out.{iteration}.center_before"], rtol=1e-6, atol=1e-7)
        student = g[f"in.{iteration}.student"].unflatten(0, (config["ncrops"], -1)).requires_grad_()
        loss, _ = objective(student, g[f"in.{iteration}.teacher"].unflatten(0, (2, -1)), at(epoch))
        torch.testing.assert_close(loss.reshape(1), g[f"out.{iteration}.loss"], rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient.flatten(0, 1), g[f"grad.{iteration}.student"], rtol=1e-5, atol=1e-7)
        objective.finish_step()
        torch.testing.assert_close(objective.center, g[f"out.{iteration}.center_after"], rtol=1e-6, atol=1e-7)


def slow_dino(student, teacher, center, student_temp, teacher_temp):
    """Eq. 3 with the loop over pairs."""
    total, pairs = 0.0, 0
    for t, target in enumerate(((teacher - center) / teacher_temp).softmax(-1)):
        for s, scores in enumerate(student):
            if s != t:
                total = total - (target * (scores / student_temp).log_softmax(-1)).sum(-1).mean()
                pairs += 1
    return total / pairs


@pytest.mark.parametrize("views", [2, 5])
def test_vectorised_loss_equals_the_loop_over_pairs(views):
    student = torch.randn(views, 3, 16, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 16)
    objective = DINO(num_prototypes=16)
    objective.center.normal_()
    loss, metrics = objective(student, teacher, at(0))
    slow = slow_dino(student, teacher.double(), objective.center.double(), 0.1, 0.04)
    torch.testing.assert_close(loss.double(), slow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics["kl"] + metrics["teacher_entropy"], loss.detach())


@pytest.mark.parametrize("same_view", [False, True])
def test_pair_loss_has_the_gradient_of_its_definition_and_little_memory(same_view):
    scores, targets = torch.randn(6, 4, 500, requires_grad=True), torch.randn(2, 4, 500).softmax(-1)
    pairs = [(t, s) for t in range(2) for s in range(6) if same_view or s != t]
    plain = sum(-(targets[t] * (scores[s] / 0.1).log_softmax(-1)).sum(-1).mean() for t, s in pairs) / len(pairs)
    (expected,) = torch.autograd.grad(3 * plain, scores)
    (found,) = torch.autograd.grad(3 * pair_loss(scores, targets, 0.1, same_view), scores)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    peak = peak_bytes(lambda: pair_loss(scores, targets, 0.1, same_view).backward())
    assert peak < 2 * scores.nbytes


def test_loss_ignores_the_order_of_images():
    objective = DINO(num_prototypes=16)
    student, teacher, order = torch.randn(4, 6, 16), torch.randn(2, 6, 16), torch.randperm(6)
    assert torch.allclose(
        objective(student, teacher, at(0))[0], objective(student[:, order], teacher[:, order], at(0))[0], atol=1e-6
    )


def test_uniform_teacher_and_student_cost_ln_k():
    loss, metrics = DINO(num_prototypes=50)(torch.zeros(4, 3, 50), torch.zeros(2, 3, 50), at(0))
    assert math.isclose(loss.item(), math.log(50), rel_tol=1e-5)
    assert math.isclose(metrics["teacher_entropy"].item(), math.log(50), rel_tol=1e-5)


def test_center_does_not_depend_on_accumulation():
    whole, parts = DINO(num_prototypes=8), DINO(num_prototypes=8)
    student, teacher = torch.randn(3, 6, 8), torch.randn(2, 6, 8)
    whole(student, teacher, at(0))
    for piece in (slice(0, 3), slice(3, 6)):
        parts(student[:, piece], teacher[:, piece], at(0))
    whole.finish_step()
    parts.finish_step()
    torch.testing.assert_close(whole.center, parts.center)


@pytest.mark.parametrize("case", ["dino_head_norm_last", "dino_head_free_last", "dino_head_1layer", "dino_head_bn"])
def test_head_equals_the_reference(golden, case):
    g = golden(case)
    kw = g.config["kw"]
    head = DINOHead(
        kw["in_dim"],
        kw["out_dim"],
        hidden_dim=kw.get("hidden_dim", 2048),
        bottleneck_dim=kw["bottleneck_dim"],
        num_layers=kw.get("nlayers", 3),
        batch_norm=kw.get("use_bn", False),
        norm_last_layer=kw["norm_last_layer"],
    )
    head.load_state_dict(g.state())
    assert head.last_layer.weight_g.requires_grad == bool(g["out.requires_grad_weight_g"])
    for mode in ("eval", "train") if kw.get("use_bn") else ("eval",):
        head.train(mode == "train").zero_grad()
        x = g["in.x"].requires_grad_()
        y = head(x)
        torch.testing.assert_close(y, g[f"out.{mode}.y"], rtol=1e-5, atol=1e-6)
        (y * g["in.cot"]).sum().backward()
        for name, parameter in head.named_parameters():
            if f"grad.{mode}.param.{name}" in g:
                torch.testing.assert_close(parameter.grad, g[f"grad.{mode}.param.{name}"], rtol=1e-4, atol=1e-5)
        x.requires_grad_(False)


def test_prototypes_score_cosines():
    layer = Prototypes(4, 3, norm=True)
    x = nn.functional.normalize(torch.randn(5, 4), dim=-1)
    torch.testing.assert_close(layer(x), x @ nn.functional.normalize(layer.weight_v, dim=-1).T)


def test_head_accepts_views():
    head = DINO(num_prototypes=7, hidden_dim=8, bottleneck_dim=4).make_head(6)
    assert head(Views(torch.randn(4, 2, 6))).shape == (4, 2, 7)


@pytest.mark.parametrize("name", ["schedules", "schedules_start_cooldown"])
def test_schedules_equal_the_reference(golden, name):
    g = golden(name)
    for name, case in g.config["cosine"].items():
        per_epoch = case["niter_per_ep"]
        expected = g[f"out.cosine.{name}"]
        total, warmup = case["epochs"] * per_epoch, case.get("warmup_epochs", 0) * per_epoch
        ends = case["base_value"], case["final_value"]
        ours = [cosine(i, total, *ends, warmup, case.get("start_warmup_value", 0)) for i in range(total)]
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), expected, rtol=1e-12, atol=1e-18)
    for name, case in g.config["constcooldown"].items():
        expected, epochs = g[f"out.constcooldown.{name}"], case["num_epochs"]
        first = (
            len(expected) - epochs - 2
        )  # row 0: as constructed; then a row for each epoch, from 1 in the first set, from 0 in the second
        for group, lr in enumerate(case.get("lrs", [case.get("lr")])):
            column = expected[:, group] if expected.ndim == 2 else expected
            ours = [constant_cooldown(min(max(row - first, 0), epochs - 1), epochs, lr, 0.0) for row in range(len(column))]
            torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), column, rtol=1e-12, atol=1e-18)


@given(total=st.integers(1, 200), warmup=st.integers(0, 50), start=st.floats(0, 1), at=st.floats(0, 1))
def test_learning_rates_stay_between_their_ends(total, warmup, start, at):
    """At any fractional iteration; after the warm-up they never rise."""
    warmup = min(warmup, total)
    for schedule in LEARNING_RATES.values():
        values = [schedule(at * i + (1 - at) * warmup, total, 0.5, 0.01, warmup, start) for i in range(total)]
        assert all(min(start, 0.01) - 1e-12 <= value <= max(start, 0.5) + 1e-12 for value in values)
        after = [schedule(i, total, 0.5, 0.01, warmup, start) for i in range(warmup, total)]
        assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))


def test_teacher_temperature_is_constant_within_an_epoch():
    assert [stepwise(epoch, 0.04, 0.07, 3) for epoch in range(5)] == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.07])


def test_clipping_equals_the_reference(golden):
    g = golden("clip_gradients")
    order = ["b", "zero", "a.weight", "a.bias", "last_layer.weight"]
    parameters = []
    for name in order:
        parameter = nn.Parameter(torch.zeros_like(g[f"in.grad.{name}"]))
        parameter.grad = g[f"in.grad.{name}"]
        parameters.append(parameter)
    total = clip_gradients(parameters, g.config["clip"])
    assert math.isclose(total.item(), g["out.norms"].square().sum().sqrt().item(), rel_tol=1e-6)
    for name, parameter in zip(order, parameters, strict=True):
        torch.testing.assert_close(parameter.grad, g[f"out.grad_after.{name}"], rtol=1e-6, atol=1e-9)


def test_global_clipping_bounds_the_total_norm():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 5.0)
    clip_gradients(parameters, 2.0, "global")
    assert math.isclose(torch.cat([parameter.grad for parameter in parameters]).norm().item(), 2.0, rel_tol=1e-4)


@pytest.mark.parametrize("how", ["per_parameter", "global"])
def test_what_is_small_enough_is_not_clipped_and_zero_clips_nothing(how):
    for largest, factor in ((100.0, 1.0), (0.0, 1.0)):
        parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 5.0)
        assert clip_gradients(parameters, largest, how).item() == pytest.approx(5 * 7**0.5)
        for parameter in parameters:
            assert torch.equal(parameter.grad, torch.full_like(parameter, 5.0 * factor))


def test_a_decay_begins_at_nothing_and_ends_at_all():
    assert [decayed(iteration, 100, 20) for iteration in (0, 80, 85, 100, 130)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert decayed(99, 100, 0) == 0.0


def test_class_tokens_are_all_that_an_objective_is_given_unless_it_asks():
    assert not any(Needs())


def test_a_shared_head_brings_its_owners_options():
    options = {"num_prototypes": 7, "hidden_dim": 8, "bottleneck_dim": 4}
    losses = build([Objective(name="dino", **options), Objective(name="ibot", shared_head=True)])
    assert losses["ibot"].num_prototypes == 7 and losses["ibot"].center.center.shape[-1] == 7
    assert build([Objective(name="ibot", shared_head=True)])["ibot"].num_prototypes != 7


def test_biases_and_norms_are_not_decayed():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, 4)))
    decayed, plain = (group["params"] for group in parameter_groups(model))
    assert {id(parameter) for parameter in decayed} == {id(model.cls_token), id(model[0].weight)}
    assert len(plain) == 3


def student(name: str, loss: type[nn.Module] = IBOT, **options) -> nn.Module:
    losses = nn.ModuleDict({"loss": loss(num_prototypes=8, hidden_dim=16, bottleneck_dim=8)})
    return StudentTeacher(create_backbone(name, **options), losses).student


SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
SMALL_SWIN = {"img_size": 56, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4)}


def test_layer_decay_gives_early_blocks_less():
    """DINOv2's factors: decay^(L + 1 - layer), layer 0 before the blocks, L + 1 behind them."""
    model = student("locatregvit_tiny", **SMALL_VIT)
    scales = lr_scales(model, 0.9, 0.2)
    names = dict(model.named_parameters())
    assert scales.keys() == names.keys() and any(".gaug." in name for name in names)
    for name, scale in scales.items():
        expected = 1.0
        if name.startswith("backbone.blocks."):
            expected = 0.9 ** (3 - int(name.split(".")[2]))
        elif name.startswith("backbone.patch_embed."):
            expected = 0.2 * 0.9**4
        elif name in ("mask_token", "backbone.cls_token", "backbone.reg_token", "backbone.pos_embed"):
            expected = 0.9**4
        assert scale == pytest.approx(expected), name
    groups = parameter_groups(model, 0.9, 0.2)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {id(parameter) for parameter in names.values() if parameter.requires_grad}
    assert len(ids) == len(set(ids)) == len(trained) and set(ids) == trained
    # checkpoints keep groups by their place: their order must stay
    order = [(group["lr_scale"], group["name"]) for group in groups]
    assert order == sorted(order, key=lambda one: (-one[0], one[1])) and len(set(order)) == len(order)


def test_layer_decay_of_swin_follows_its_stages():
    scales = lr_scales(student("locatswin_tiny", DINO, **SMALL_SWIN), 0.5, 1.0)
    order = ["patch_embed.proj", "layers.0.blocks.0.attn.qkv", "layers.0.blocks.1.attn.qkv", "layers.1.blocks.0.attn.qkv", "norm"]
    rates = [scales[f"backbone.{name}.weight"] for name in order]
    assert rates == sorted(rates) and len(set(rates)) == len(rates) and rates[-1] == 1


def test_lr_and_decay_of_a_step_follow_the_groups():
    model = student("locatvit_tiny", **SMALL_VIT)
    optimizer = build_optimizer(model, (0.9, 0.999), layer_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_hyperparameters(optimizer, 1e-2, 0.1)
    optimizer.step()  # AdamW's first step is lr * sign(gradient), besides the decay
    for name, layers in (("backbone.blocks.0.attn.qkv", 3), ("backbone.blocks.2.attn.qkv", 1), ("backbone.norm", 0)):
        moved = before[f"{name}.bias"] - model.get_parameter(f"{name}.bias")
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-2 * 0.5**layers), rtol=1e-4, atol=1e-8)
    weight = before["backbone.blocks.0.attn.qkv.weight"]
    moved = weight - model.get_parameter("backbone.blocks.0.attn.qkv.weight")
    torch.testing.assert_close(moved, 1e-2 * 0.5**3 * (1 + 0.1 * weight), rtol=1e-3, atol=1e-8)


def test_layer_decay_needs_a_backbone_that_tells_its_layers():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(UserError, match="no group_matcher"):
        parameter_groups(model, layer_decay=0.9)


def test_frozen_prototypes_only_at_first():
    objective = DINO(num_prototypes=7, hidden_dim=8, bottleneck_dim=4, frozen_last_layer_epochs=1)
    head = objective.make_head(6)
    assert set(objective.frozen(head, at(0.9))) == set(head.last_layer.parameters())
    assert objective.frozen(head, at(1.0)) == []
