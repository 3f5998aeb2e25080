"""Five whole training steps of the reference (facebookresearch/dino and LocAtViT's copy): every loss, gradient and weight."""

import pytest
import torch

from ssl_locat.models.backbone import create_backbone
from ssl_locat.objectives import Progress
from ssl_locat.objectives.dino import DINO
from ssl_locat.optim.optim import build_optimizer, clip_gradients, set_hyperparameters
from ssl_locat.optim.schedules import cosine
from ssl_locat.pretraining.student_teacher import StudentTeacher


def build(config: dict) -> tuple[StudentTeacher, DINO]:
    vit = config["vit"]
    backbone = create_backbone(
        "locatvit_tiny" if config["locat"] else "vit_tiny_patch16_224",
        img_size=vit["img_size"][0],
        patch_size=vit["patch_size"],
        embed_dim=vit["embed_dim"],
        depth=vit["depth"],
        num_heads=vit["num_heads"],
        drop_path_rate=0.0,
        pos_resize="dino",
    )
    head = config["head"]
    objective = DINO(
        num_prototypes=head["out_dim"],
        hidden_dim=head["hidden_dim"],
        bottleneck_dim=head["bottleneck_dim"],
        norm_last_layer=config["norm_last_layer"],
        teacher_temp=(config["warmup_teacher_temp"], config["teacher_temp"]),
        teacher_temp_warmup_epochs=config["warmup_teacher_temp_epochs"],
        frozen_last_layer_epochs=config["freeze_last_layer"],
    )
    return StudentTeacher(backbone, torch.nn.ModuleDict({"dino": objective})), objective


def ours(name: str) -> str:
    """The reference's parameter name -> ours."""
    return name.replace("head.", "heads.dino.", 1) if name.startswith("head.") else name


def key_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Without the key third of qkv.bias: its true gradient is 0, so that AdamW turns rounding noise into steps there."""
    if not name.endswith("attn.qkv.bias"):
        return tensor
    third = len(tensor) // 3
    return torch.cat([tensor[:third], tensor[2 * third :]])


@pytest.mark.parametrize("case", ["dino_steps_vit", "dino_steps_locatvit"])
def test_five_steps_equal_the_reference(golden, case):
    g = golden(case)
    config = g.config
    model, objective = build(config)
    state = {ours(name): tensor for name, tensor in g.state().items()}
    model.student.load_state_dict(state)
    model.teacher.load_state_dict(state)
    optimizer = build_optimizer(model.student, (0.9, 0.999))
    total, warmup = config["epochs"] * config["niter_per_ep"], config["warmup_epochs"] * config["niter_per_ep"]
    lr = config["lr"]
    for step in range(config["steps"]):
        at = Progress(step, step / config["niter_per_ep"], config["epochs"])
        rate = cosine(step, total, lr, config["min_lr"], warmup)
        decay = cosine(step, total, config["wd"], config["wd_end"])
        assert rate == pytest.approx(g[f"out.{step}.lr"][0].item(), rel=1e-12, abs=1e-18)
        assert decay == pytest.approx(g[f"out.{step}.wd"][0].item(), rel=1e-12)
        set_hyperparameters(optimizer, rate, decay)
        global_crops, local_crops = g[f"in.{step}.global"].flatten(0, 1), g[f"in.{step}.local"].flatten(0, 1)
        with torch.no_grad():
            teacher = model.teacher(global_crops, None, 2)["dino"]
        student = model.student(global_crops, local_crops, 2)["dino"]
        torch.testing.assert_close(teacher.flatten(0, 1), g[f"out.{step}.teacher_output"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(student.flatten(0, 1), g[f"out.{step}.student_output"], rtol=1e-4, atol=1e-5)
        loss, _ = objective(student, teacher, at)
        assert loss.item() == pytest.approx(g["out.loss"][step].item(), rel=1e-5)
        loss.backward()
        norms = g[f"out.{step}.grad_norms_before_clip"]
        clipped = clip_gradients(model.student.parameters(), config["clip_grad"])
        assert clipped.item() == pytest.approx(norms.square().sum().sqrt().item(), rel=1e-4)
        for parameter in objective.frozen(model.student.heads["dino"], at):
            parameter.grad = None
        if step in config["save_grads"]:
            expected = g.state(f"grad.{step}.clipped.")
            for name, parameter in model.student.named_parameters():
                reference = next((tensor for theirs, tensor in expected.items() if ours(theirs) == name), None)
                assert (parameter.grad is None) == (reference is None), name
                if reference is not None:
                    bound = 1e-4 * reference.abs().max().item() + 1e-7
                    torch.testing.assert_close(key_bias(name, parameter.grad), key_bias(name, reference), rtol=1e-4, atol=bound)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.finish_step()
        model.update_teacher(cosine(step, total, config["momentum_teacher"], 1.0))
        torch.testing.assert_close(objective.center, g[f"out.{step}.center"], rtol=1e-5, atol=1e-6)
        for which, network in (("student", model.student), ("teacher", model.teacher)):
            weights = network.state_dict()
            for name, expected in g.state(f"out.{step}.{which}.").items():
                found = weights[ours(name)]
                torch.testing.assert_close(
                    key_bias(name, found), key_bias(name, expected), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
