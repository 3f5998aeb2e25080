import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scenes import write_split

from ssl_locat.evaluation.protocols import segmentation as seg
from ssl_locat.evaluation.shared.seg_datasets import open_scenes
from ssl_locat.models.backbone import create_backbone


def test_head_and_loss_match_the_reference(golden):
    case = golden("seg_head")
    config = case.config
    head = seg.make_head("mlp", config["dim"], config["channels"], config["classes"], paper_compat=True)
    names = {"conv.conv.": "0.", "conv.gn.": "1.", "conv_seg.": "3."}

    def ours(name: str) -> str:
        theirs = next(old for old in names if name.startswith(old))
        return names[theirs] + name.removeprefix(theirs)

    head.load_state_dict({ours(name): tensor for name, tensor in case.state().items()})
    x = case["in.x"].requires_grad_()
    logits, masks = head(x), case["in.label"][:, 0]
    torch.testing.assert_close(logits, case["out.logits"], rtol=1e-5, atol=2e-5)
    loss = seg.segmentation_loss(logits, masks, paper_compat=True)
    torch.testing.assert_close(loss[None], case["out.loss_mmseg_avg_all_pixels"], rtol=1e-6, atol=0)
    valid = seg.segmentation_loss(logits, masks, paper_compat=False)
    torch.testing.assert_close(valid[None], case["out.loss_torch_avg_valid_pixels"], rtol=1e-6, atol=0)
    predicted = F.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False).argmax(1)
    assert (predicted == case["out.pred"]).all()

    loss.backward()
    gradients = {ours(name): tensor for name, tensor in case.state("grad.param.").items()}
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4 * gradients[name].abs().max().item())
    torch.testing.assert_close(x.grad, case["grad.in.x"], rtol=1e-4, atol=1e-4 * case["grad.in.x"].abs().max().item())


def test_one_cycle_matches_torch(golden):
    expected = golden("schedules")["out.seg_onecycle.20k"]
    ours = torch.tensor([seg.one_cycle(i, 20_000, 1e-3) for i in range(20_000)], dtype=torch.float64)
    torch.testing.assert_close(ours, expected.flatten(), rtol=1e-9, atol=1e-18)


def test_augmentation_gives_whole_crops_of_known_classes():
    from ssl_locat.evaluation.shared.seg_augment import augment, pad

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    mask = rng.integers(0, 4, (60, 90))
    mask[:10] = 255
    for seed in range(20):
        view, labels = pad(*augment(image, mask, seed, crop=64, scale=(256, 64)), 64, np.array([124, 116, 104]))
        assert view.shape == (64, 64, 3) and labels.shape == (64, 64) and view.dtype == np.uint8
        assert set(np.unique(labels)) <= {0, 1, 2, 3, 255}
        again, _ = pad(*augment(image, mask, seed, crop=64, scale=(256, 64)), 64, np.array([124, 116, 104]))
        assert (view == again).all()


def test_unknown_head_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        seg.make_head("linaer", 8, 8, 2, paper_compat=False)


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_learns_coloured_squares(tmp_path, head):
    torch.manual_seed(0)
    backbone = create_backbone("locatvit_tiny", img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=3)
    data = write_split(tmp_path, num_train=24, num_test=6) | {"num_classes": 5}
    settings = {"data": data, "head": head, "hidden": 64, "image_size": 32, "scale": (64, 32), "batch_size": 8, "lr": 0.02}
    scores = seg.evaluate(backbone, **settings, iterations=60, per_class=True, paper_compat=head == "mlp", workers=0)
    assert scores["miou"] > 30  # all background is 15
    assert {"iou_0", "iou_4", "pixel_accuracy", "mean_accuracy"} <= set(scores)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("paper_compat", [True, False])
def test_padding_of_test_images_is_cut_or_stretched(tmp_path, paper_compat):
    """An image of 24 x 40 in patches of 16: a grid of 2 x 3 = 32 x 48. Class 1 in its last column alone: pixels 32 to 48."""
    for name, pixels in (("images", np.zeros((24, 40, 3), np.uint8)), ("masks", np.zeros((24, 40), np.uint8))):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    scenes = open_scenes({"test": str(tmp_path), "num_classes": 2}, "test")

    def read(images):
        assert images.shape[2:] == (32, 48)
        return F.one_hot(torch.tensor([[0, 0, 1]] * 2), 2).permute(2, 0, 1)[None].float()

    confusion = seg.test_whole(
        read, torch.nn.Identity(), scenes, {}, (40, 24), (0.0,) * 3, (1.0,) * 3, 16, 0, torch.device("cpu"),
        paper_compat=paper_compat,
    )  # fmt: skip
    # bilinear: the classes part in the middle between the last two patches' centres, at 32 of 48 pixels
    assert confusion[0, 1] == 24 * (40 - (round(40 * 32 / 48) if paper_compat else 32))


def test_stopped_and_continued_equals_unbroken(tmp_path, monkeypatch):
    torch.manual_seed(0)
    backbone = create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    data = write_split(tmp_path, num_train=6, num_test=3) | {"num_classes": 5}
    settings = {"data": data, "hidden": 16, "image_size": 32, "scale": (64, 32), "batch_size": 4, "iterations": 9, "workers": 0}
    monkeypatch.setattr(seg, "SAVE_EVERY", 4)
    unbroken = seg.evaluate(backbone, **settings)
    save = seg.save_progress

    def killed(path, step, *rest):
        save(path, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(seg, "save_progress", killed)
    file = str(tmp_path / "progress.safetensors")
    with pytest.raises(KeyboardInterrupt):
        seg.evaluate(backbone, **settings, resume_file=file)
    monkeypatch.setattr(seg, "save_progress", save)
    assert seg.evaluate(backbone, **settings, resume_file=file) == unbroken
