"""Which patches are hidden from the student, and that what is hidden stays hidden."""

import random

import pytest
import torch

from ssl_locat.models.backbone import create_backbone
from ssl_locat.models.tokens import forward_tokens
from ssl_locat.objectives import Progress
from ssl_locat.objectives.ibot import IBOT
from ssl_locat.objectives.koleo import KoLeo
from ssl_locat.objectives.masking import Masks, _one_block, draw_masks
from ssl_locat.pretraining.student_teacher import StudentTeacher


@pytest.mark.parametrize("shape", ["block", "random"])
def test_shares_are_the_published_ones(shape):
    masks = draw_masks(range(1000), 2, (14, 14), shape, 0.5, (0.1, 0.5))
    share = masks.float().mean(1)
    masked = share[share > 0]
    assert masks.shape == (2000, 196)
    assert len(masked) / 2000 == pytest.approx(0.5, abs=0.04)
    assert masked.min() >= 19 / 196 and masked.max() <= 0.5
    assert masked.mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("shape", ["block", "random"])
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 4), (3, 9), (37, 20)])
def test_any_grid_and_ratio_gives_exactly_what_is_asked(shape, grid):
    cells = grid[0] * grid[1]
    for ratio in (0.0, 0.3, 1.0):
        masks = draw_masks([5, 6], 2, grid, shape, 1.0, (ratio, ratio))
        assert masks.sum(1).tolist() == [int(cells * ratio)] * 4


def test_blocks_are_more_connected_than_single_patches():
    def neighbours(shape):
        maps = draw_masks(range(100), 1, (14, 14), shape, 1.0, (0.3, 0.3)).unflatten(1, (14, 14))
        return (maps[:, :, 1:] & maps[:, :, :-1]).float().mean().item()

    assert neighbours("block") > 2 * neighbours("random")


def test_blocks_lie_anywhere_and_an_attempt_that_does_not_fit_is_not_the_last():
    blocks = [_one_block(random.Random(seed), 3, 12, 0, 8) for seed in range(100)]
    # about half of the first attempts are too high for three rows
    assert sum(block > 0 for block in blocks) >= 95
    for corner in (0, 11, 24, 35):
        assert any(block >> corner & 1 for block in blocks)


def test_a_mask_depends_on_its_seed_alone():
    together = draw_masks([1, 2, 3], 2, (7, 7), "block", 0.5, (0.1, 0.5)).unflatten(0, (2, 3))
    for index, seed in enumerate([1, 2, 3]):
        assert torch.equal(together[:, index], draw_masks([seed], 2, (7, 7), "block", 0.5, (0.1, 0.5)))
    assert Masks.of(together[0]).index.tolist() == together[0].flatten().nonzero().flatten().tolist()


@pytest.fixture(params=["vit_tiny", "locatvit_tiny", "locatvit_tiny_rope_mixed"])
def model(request) -> tuple[StudentTeacher, torch.nn.ModuleDict]:
    torch.manual_seed(0)
    backbone = create_backbone(request.param, img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    losses = torch.nn.ModuleDict({"ibot": IBOT(num_prototypes=8, hidden_dim=16, bottleneck_dim=8), "koleo": KoLeo(min_images=1)})
    return StudentTeacher(backbone, losses), losses


def test_hidden_pixels_do_not_matter_and_keep_their_place(model):
    """The student's tokens do not change with what is hidden; the teacher's do; the grid keeps all patches."""
    pair, _ = model
    crops = torch.randn(4, 3, 32, 32)
    hidden = torch.zeros(4, 16, dtype=torch.bool)
    hidden[:, 5] = True
    other = crops.clone()
    other[:, :, 8:16, 8:16] += 1  # patch 5
    masks = Masks.of(hidden)
    assert forward_tokens(pair.student.backbone, crops, masks=hidden, mask_token=pair.student.mask_token).patches.shape[1] == 16
    for network, same in ((pair.student, True), (pair.teacher, False)):
        a, b = (network(images, None, 2, masks)["ibot"][0] for images in (crops, other))
        assert torch.equal(a, b) == same


def test_the_mask_token_learns_and_the_teacher_follows(model):
    pair, losses = model
    crops = torch.randn(8, 3, 32, 32)
    masks = pair.make_masks(losses, [1, 2, 3, 4], crops)
    again = pair.make_masks(losses, [1, 2, 3, 4], crops)
    assert torch.equal(masks.hidden, again.hidden) and masks.hidden.any()
    targets, _ = pair.targets(crops, 2, masks)
    outputs = pair.student(crops, torch.randn(4, 3, 16, 16), 2, masks)
    loss, _ = losses["ibot"](outputs["ibot"], targets["ibot"], Progress(0, 0.0, 1.0))
    loss.backward()
    assert pair.student.mask_token.grad.abs().sum() > 0
    assert not pair.teacher.mask_token.requires_grad
