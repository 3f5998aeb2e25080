"""The objective `metadata`: what its gradient does to head and backbone, and that unknown values and other ranks change nothing of the rest."""

import math

import pytest
import torch
from processes import run_ranks
from torch import nn

from ssl_locat.errors import ConfigError
from ssl_locat.models.backbone import create_backbone
from ssl_locat.objectives import Progress, Views
from ssl_locat.objectives.linear_reader import NEWEST, LinearReader
from ssl_locat.objectives.metadata import Metadata
from ssl_locat.objectives.neighbours import MEMORY, NEAREST, NeighbourReader
from ssl_locat.pretraining.student_teacher import StudentTeacher
from ssl_locat.runs import distributed

AT = Progress(0, 0.0, 1.0)
SIZES = {"season": 2, "camera": 3, "organ": 4}


def gradients(known: torch.Tensor, **options) -> tuple[torch.Tensor, list[torch.Tensor], dict]:
    """(of the class tokens, of the head's parameters, metrics) for tokens [2, 6, 8]; the head is the same each time."""
    torch.manual_seed(0)
    objective = Metadata(hidden_dim=16, **{"linear": 0.0, "neighbours": 0.0} | options)
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
    assert objective.make_head(8, metadata=SIZES)(Views(torch.randn(3, 5, 8))).shape == (3, 5, 7 + 8)


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
    objective = Metadata(nuisance=["camera"], linear=0.0, neighbours=0.0)
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
        ({"nuisance": ["camera"], "reversal": -1}, "at least 0"),
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


def clouds(told: float, count: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [1, count, 6] of labels 0, 1, 2, and these."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    tokens = torch.randn(1, count, 6, generator=generator)
    tokens[0, :, 0] += told * labels
    return tokens, labels


def test_a_linear_reader_explains_what_least_squares_does():
    tokens, labels = clouds(1.0)
    design = torch.cat([tokens[0], torch.ones(400, 1)], 1).double()
    wanted = nn.functional.one_hot(labels).double()
    left = wanted - design @ torch.linalg.lstsq(design, wanted).solution
    explained = ((wanted.var(0, correction=0) - left.square().mean(0)) / wanted.mean(0)).sum()
    assert LinearReader(6, 3)(tokens, labels).item() == pytest.approx(explained.item(), abs=2e-3)


def test_its_gradient_brings_the_means_together_at_full_strength():
    tokens, labels = clouds(1.0)
    reader = LinearReader(6, 3)
    for seed in range(30):  # the newest part counts a tenth by now
        reader(*clouds(1.0, seed=seed))
    moving = tokens.clone().requires_grad_()
    before = reader(moving, labels)
    before.backward()
    step = 0.01
    fresh = LinearReader(6, 3)
    change = fresh(tokens - step * 400 * moving.grad, labels) - LinearReader(6, 3)(tokens, labels)
    slope = -step * 400 * moving.grad.square().sum()
    assert change < 0 and 0.5 < change / slope < 1.5 and NEWEST < 0.2


def test_a_batch_that_says_nothing_leaves_the_reader_as_it_was():
    reader = LinearReader(6, 3)
    tokens, labels = clouds(1.0)
    before = reader(tokens, labels)
    moving = tokens.clone().requires_grad_()
    again = reader(moving, torch.full_like(labels, -1))
    again.backward()
    torch.testing.assert_close(again, before)
    assert moving.grad.abs().max() == 0


def _on_this_rank(count):
    tokens, labels = clouds(1.0)
    part = slice(distributed.rank() * count, (distributed.rank() + 1) * count)
    moving = tokens[:, part].clone().requires_grad_()
    explained = LinearReader(6, 3)(moving, labels[part])
    explained.backward()
    return explained.item(), moving.grad.tolist()


@pytest.mark.slow
def test_ranks_read_all_their_images():
    (one, whole), *_ = run_ranks(_on_this_rank, 1, 400)
    found = run_ranks(_on_this_rank, 2, 200)
    assert all(value == pytest.approx(one, rel=1e-5) for value, _ in found)
    halves = torch.cat([torch.tensor(gradient) for _, gradient in found], 1) / 2  # DDP averages over ranks
    torch.testing.assert_close(halves, torch.tensor(whole), rtol=1e-4, atol=1e-8)


# --- neighbours ---------------------------------------------------------------------------------------------------------------


def slowly(memory: list[tuple[torch.Tensor, int]], tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """As loops over pairs, in float64; memory: (token, label)."""
    views, count = tokens.shape[:2]
    unit = nn.functional.normalize(tokens.double(), dim=-1)
    everyone = [(unit[v, i], int(labels[i]), i) for v in range(views) for i in range(count)]
    everyone += [(token.double(), label, None) for token, label in memory]
    found = []
    for v in range(views):
        for i in range(count):
            label = int(labels[i])
            others = [(t, other) for t, other, image in everyone if other >= 0 and image != i] if label >= 0 else []
            if all(other == label for _, other in others):  # nobody to be told from
                found.append(0.0)
                continue
            squares = [float((unit[v, i] - t).square().sum()) for t, _ in others]
            weights = [math.exp(-square / sorted(squares)[NEAREST - 1]) for square in squares]
            different = sum(weight for weight, (_, other) in zip(weights, others, strict=True) if other != label)
            found.append(-math.log(different / sum(weights)))
    return sum(found) / len(found)


def test_neighbours_are_what_they_say_pair_by_pair():
    reader, memory = NeighbourReader(6), []
    for step in range(3):
        tokens, labels = clouds(1.0, 40, step)
        tokens, labels = tokens[0].unflatten(0, (2, 20)), labels[:20]
        labels[::7] = -1
        assert reader(tokens, labels).item() == pytest.approx(slowly(memory, tokens, labels), rel=1e-4)
        unit = nn.functional.normalize(tokens, dim=-1)
        memory = [(unit[v, i], int(labels[i])) for v in range(2) for i in range(20)] + memory


def test_neighbours_of_what_cannot_be_told_are_what_guessing_gives():
    reader, generator = NeighbourReader(16), torch.Generator().manual_seed(1)
    found = [
        reader(torch.randn(2, 32, 16, generator=generator), torch.randint(2, (32,), generator=generator)).item()
        for _ in range(40)
    ]
    assert sum(found) / 40 == pytest.approx(math.log(2), abs=0.02)


def test_neighbours_see_what_no_line_parts():
    tokens = torch.randn(1, 300, 3, generator=torch.Generator().manual_seed(2))
    tokens[..., 2] = 1
    inside = (tokens[0, :, 0].abs() < 0.6).long()  # the others lie on both sides
    assert NeighbourReader(3)(tokens, inside) > NeighbourReader(3)(tokens, inside.flip(0)) + 0.5
    assert LinearReader(3, 2)(tokens, inside) < LinearReader(3, 2)(tokens, (tokens[0, :, 0] > 0).long()) / 3


def test_its_gradient_mixes_labels():
    tokens, labels = clouds(2.0)
    moving = tokens.clone().requires_grad_()
    before = NeighbourReader(6)(moving, labels)
    before.backward()
    assert NeighbourReader(6)(tokens - 20 * moving.grad, labels) < before.detach() - 0.01


@pytest.mark.parametrize("value", [-1, 1])
def test_a_batch_of_one_value_or_of_none_has_no_neighbours_to_be_told_from(value):
    tokens, labels = clouds(1.0)
    moving = tokens.clone().requires_grad_()
    found = NeighbourReader(6)(moving, torch.full_like(labels, value))
    found.backward()
    assert found.item() == 0 and moving.grad.abs().max() == 0


def test_16_bit_tokens_are_read_in_full():
    tokens, labels = clouds(1.0)
    rounded = tokens.bfloat16()
    for reader in (NeighbourReader, lambda width: LinearReader(width, 3)):
        assert reader(6)(rounded, labels).item() == reader(6)(rounded.float(), labels).item()


def _neighbours_on_this_rank(count):
    reader, found = NeighbourReader(6), []
    for step in range(MEMORY // 400 + 2):  # until the memory is full and forgets
        tokens, labels = clouds(1.0, 400, step)
        tokens, labels = tokens[0].unflatten(0, (2, 200)), labels[:200]
        part = slice(distributed.rank() * count, (distributed.rank() + 1) * count)
        moving = tokens[:, part].clone().requires_grad_()
        value = reader(moving, labels[part])
        value.backward()
        found.append((value.item(), moving.grad.tolist()))
    return found, reader.tokens.tolist(), reader.labels.tolist()


@pytest.mark.slow
def test_ranks_find_neighbours_among_all_their_images():
    (whole, memory, known), *_ = run_ranks(_neighbours_on_this_rank, 1, 200)
    halves = run_ranks(_neighbours_on_this_rank, 2, 100)
    for step, (value, gradient) in enumerate(whole):
        both = [found[step] for found, _, _ in halves]
        assert sum(each for each, _ in both) / 2 == pytest.approx(value, rel=1e-4)
        parts = torch.cat([torch.tensor(part) for _, part in both], 1) / 2  # DDP averages over ranks
        torch.testing.assert_close(parts, torch.tensor(gradient), rtol=1e-3, atol=1e-7)
    for _, remembered, labels in halves:
        torch.testing.assert_close(torch.tensor(remembered), torch.tensor(memory))
        assert labels == known
