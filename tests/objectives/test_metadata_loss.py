"""The objective `metadata`: what its gradient does to head and backbone, and that unknown values and other ranks change nothing of the rest."""

import pytest
import torch
from torch import nn

from ssl_locat.errors import ConfigError
from ssl_locat.models.backbone import create_backbone
from ssl_locat.objectives import Progress, Views
from ssl_locat.objectives.metadata import Metadata
from ssl_locat.pretraining.student_teacher import StudentTeacher

AT = Progress(0, 0.0, 1.0)
SIZES = {"season": 2, "camera": 3, "organ": 4}


def gradients(known: torch.Tensor, **options) -> tuple[torch.Tensor, list[torch.Tensor], dict]:
    """(of the class tokens, of the head's parameters, metrics) for tokens [2, 6, 8]; the head is the same each time."""
    torch.manual_seed(0)
    objective = Metadata(hidden_dim=16, **options)
    head = objective.make_head(8, metadata=SIZES)
    tokens = torch.randn(2, 6, 8, requires_grad=True)
    loss, metrics = objective(head(Views(tokens)), known, AT)
    found = torch.autograd.grad(loss, [tokens, *head.parameters()])
    return found[0], list(found[1:]), metrics | {"loss": loss.detach()}


def labels(*columns: list[int]) -> torch.Tensor:
    return torch.tensor(columns).T.contiguous()


TRUTH = labels([0, 1, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2], [3, 2, 1, 0, 3, 2])


def test_a_nuisance_teaches_the_head_and_turns_the_backbone_away():
    helps, own, _ = gradients(TRUTH, informative=["camera"])
    harms, same, _ = gradients(TRUTH, nuisance=["camera"], reversal=2.0)
    torch.testing.assert_close(harms, -2 * helps)
    for a, b in zip(own, same, strict=True):
        torch.testing.assert_close(a, b)


def test_each_field_has_a_head_of_its_own():
    both, _, metrics = gradients(TRUTH, nuisance=["camera"], informative=["organ"])
    assert both.abs().sum() > 0 and {"camera_accuracy", "organ_accuracy"} < set(metrics)
    objective = Metadata(nuisance=["camera"], informative=["organ"], layers=1)
    assert objective.make_head(8, metadata=SIZES)(Views(torch.randn(3, 5, 8))).shape == (3, 5, 7)


def test_what_says_nothing_moves_nothing():
    unknown = TRUTH.clone()
    unknown[[1, 4]] = -1
    tokens, _, metrics = gradients(unknown, nuisance=["camera"])
    assert tokens[:, [1, 4]].abs().max() == 0 and tokens[:, [0, 2, 3, 5]].abs().min() > 0
    torch.testing.assert_close(metrics["camera_known"], torch.tensor(4 / 6))
    torch.testing.assert_close(tokens[:, [0, 2, 3, 5]], gradients(TRUTH, nuisance=["camera"])[0][:, [0, 2, 3, 5]])
    tokens, head, metrics = gradients(torch.full_like(TRUTH, -1), nuisance=["camera"])
    assert tokens.abs().max() == 0 and all(each.abs().max() == 0 for each in head) and metrics["camera_accuracy"] == 0


def test_parts_of_a_batch_add_up_to_the_whole():
    """Ranks and micro-batches average: a part that says little must not weigh as much as one that says all."""
    objective = Metadata(nuisance=["camera"])
    head = objective.make_head(8, metadata=SIZES)
    tokens, truth = torch.randn(2, 6, 8), TRUTH.clone()
    truth[:2] = -1
    whole = objective(head(Views(tokens)), truth, AT)[0]
    halves = [objective(head(Views(tokens[:, part])), truth[part], AT)[0] for part in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(whole, sum(halves) / 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "at least one name"),
        ({"nuisance": ["camera"], "informative": ["camera"]}, "each once"),
        ({"nuisance": "camera"}, "a list of names"),
        ({"nuisance": ["camera"], "reversal": 0}, "above 0"),
        ({"nuisance": ["cameras"]}, r"Did you mean 'camera'\? Say there which member"),
    ],
)
def test_mistakes_are_told(options, said):
    with pytest.raises(ConfigError, match=said):
        Metadata(**options).make_head(8, metadata=SIZES)


def test_student_and_teacher_hand_it_the_labels():
    objective = Metadata(nuisance=["camera"])
    backbone = create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    backbone.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    model = StudentTeacher(backbone, nn.ModuleDict({"metadata": objective}), metadata=SIZES)
    crops = torch.randn(4, 3, 32, 32)
    targets, _ = model.targets(crops, 2, metadata=TRUTH[:2])
    loss, _ = objective(model.student(crops, None, 2)["metadata"], targets["metadata"], AT)
    loss.backward()
    assert targets["metadata"] is not None and model.student.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
