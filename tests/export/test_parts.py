"""The parts of an export by themselves: what is compared and when it fails, which scores a card shows, which name a model gets."""

from types import SimpleNamespace

import pytest
import timm
from torch import nn

from ssl_locat.errors import CheckpointError, UserError
from ssl_locat.export.export import WRITTEN, _check_target, _safe, model_card, scores_at
from ssl_locat.export.parity import TOLERANCE, BothTokens, compare, shapes_of
from ssl_locat.export.timm_folder import check_timm_target, obey_umask, own_name, write_timm_whole
from ssl_locat.models.backbone import create_backbone

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def locat():
    return create_backbone("locatvit_tiny", **TINY).eval()


def test_the_sizes_that_are_compared_differ_in_batch_and_in_sides():
    def model(patch, any_size):
        return SimpleNamespace(
            pretrained_cfg={"input_size": (3, 48, 64)},
            patch_embed=SimpleNamespace(patch_size=patch),
            dynamic_img_size=any_size,
        )

    assert shapes_of(model(8, True)) == shapes_of(model((8, 8), True)) == [(1, 48, 64), (3, 56, 88), (2, 24, 64)]
    assert shapes_of(model((16, 4), True)) == [(1, 48, 64), (3, 64, 76), (2, 16, 64)]
    assert shapes_of(model(8, False)) == [(1, 48, 64), (3, 48, 64)]
    fixed = model(8, True)
    del fixed.dynamic_img_size
    assert len(shapes_of(fixed)) == 2


def test_an_output_that_is_off_by_more_than_promised_is_refused(locat):
    assert TOLERANCE == {"timm": 1e-6, "pt2": 1e-4, "onnx": 1e-4}
    own, shapes = BothTokens(locat), [(1, 32, 32), (2, 16, 32)]
    assert compare(locat, own, shapes, 0.0) == 0.0

    def off(place: int, by: float):
        def outputs(images):
            found = [tokens.clone() for tokens in own(images)]
            if len(images) == 2:  # at the last size only
                found[place].view(-1)[3] += by * found[place].abs().max()
            return found

        return outputs

    assert compare(locat, off(1, 1e-3), shapes, 2e-3) == pytest.approx(1e-3, rel=1e-2)
    for place, name in enumerate(("class token", "patch tokens")):
        with pytest.raises(CheckpointError, match=rf"exported {name} at 2 x 16 x 32 differs by 1\.0e-03 .*\(allowed: 5e-04\)"):
            compare(locat, off(place, 1e-3), shapes, 5e-4)
    with pytest.raises(CheckpointError, match="differs by nan"):
        compare(locat, off(0, float("nan")), shapes, 1.0)


def test_a_card_shows_the_last_scores_up_to_its_step():
    run = SimpleNamespace(probes={"knn": [{"step": s, "top1": s} for s in (0, 4, 8)], "linear": [{"step": 8, "top1": 1}]})
    assert scores_at(run, [4]) == {"knn": {"step": 4, "top1": 4}}
    assert scores_at(run, [7]) == {"knn": {"step": 4, "top1": 4}}
    assert scores_at(run, [8]) == {"knn": {"step": 8, "top1": 8}, "linear": {"step": 8, "top1": 1}}
    assert scores_at(run, [4, 8]) == {} == scores_at(run, [])


def test_a_card_says_what_it_is_about(locat):
    plain = create_backbone("vit_tiny", **TINY)
    card = model_card(plain, "mine", None, "teacher", [], "onnx", [(1, 32, 32), (3, 32, 32)], {"timm": 2e-7})
    millions = sum(parameter.numel() for parameter in plain.parameters()) / 1e6
    assert f"{millions:.2f} M parameters, features of width 24" in card and "- timm: 2.0e-07" in card
    assert "images of 32 x 32 only" in card and "ssl_locat.models" not in card and "PRR" not in card
    assert "trust_remote_code" not in card and "None yet." in card and "Measured during training" not in card
    other = model_card(locat, "mine", None, "teacher", [], "pt2", [(1, 32, 32), (3, 40, 56)], {"timm": 0.0}, with_code=True)
    assert "any image size that the patch size divides" in other and "import ssl_locat.models" in other
    assert "trust_remote_code=True" in other and "model.pt2" in other
    # timm's own class knows nothing of it
    timms = timm.create_model("vit_tiny_patch16_224", **TINY)
    assert "ssl_locat.models" not in model_card(timms, "m", None, "teacher", [], "timm", [(1, 32, 32)], {"timm": 0.0})
    # half of LocAt is LocAt
    for half in ({"gaug": False}, {"prr": False}):
        backbone = create_backbone("locatvit_tiny", **TINY, **half)
        assert "registers the model" in model_card(backbone, "m", None, "teacher", [], "timm", [(1, 32, 32)], {"timm": 0.0})


def test_a_card_holds_no_credentials():
    secret = "https://user:secret@host/data?token=secret"
    for value in (secret, [secret], {"train": secret}):
        assert "secret" not in str(_safe(value)) and "host/data" in str(_safe(value))
    assert _safe(3) == 3 and _safe(0.5) == 0.5 and _safe("plain") == "plain"


def test_only_an_export_of_ours_without_additions_is_replaced(tmp_path):
    _check_target(tmp_path / "new")
    _check_target(tmp_path)  # empty
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"would be lost: model\.safetensors"):
        _check_target(tmp_path)
    (tmp_path / "README.md").write_text("Made with love")
    with pytest.raises(UserError, match=r"would be lost: README.md, model.safetensors"):
        _check_target(tmp_path)
    (tmp_path / "README.md").write_text("Made with ssl_locat.")
    for name in WRITTEN - {"README.md"}:
        (tmp_path / name).touch()
    _check_target(tmp_path)
    for name in "abcdef":
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"would be lost: a, b, c, d, e, \.\.\.\. "):
        _check_target(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        _check_target(tmp_path / "a")


def test_a_model_without_locat_gets_timms_name_and_options():
    def named(architecture: str, backbone: nn.Module | None = None, **args):
        plain = backbone or create_backbone(architecture, **TINY)
        return own_name(plain, architecture, {"img_size": 32, "gaug": False, "prr": None, "pos_resize": "timm"} | args)

    assert named("vit_tiny")[0] == "vit_tiny_patch16_224" and not {"gaug", "prr", "pos_resize"} & named("vit_tiny")[1].keys()
    assert named("vit_tiny")[1]["img_size"] == 32
    assert named("vit_tiny_rope_mixed")[0] == "vit_small_patch16_rope_mixed_224"  # timm has no tiny one
    twin = create_backbone(
        "locat_vit_small_patch16_dinov3", gaug=False, prr=False, img_size=32, depth=1, embed_dim=24, num_heads=2
    )
    assert named("locat_vit_small_patch16_dinov3", twin)[0] == "vit_small_patch16_dinov3"
    dino = create_backbone("vit_tiny", **TINY, pos_resize="dino")
    assert named("vit_tiny", dino, pos_resize="dino")[0] == "vit_tiny"  # timm cannot resize positions that way
    # one half of LocAt keeps its name, and so does what is no model of ours
    for half in ({"gaug": False}, {"prr": False}):
        assert named("locatvit_tiny", create_backbone("locatvit_tiny", **TINY, **half))[0] == "locatvit_tiny"
    assert own_name(nn.Linear(1, 1), "resnet18", {"a": 1}) == ("resnet18", {"a": 1})


def test_a_model_is_put_whole_into_a_folder_that_may_be_new_and_keeps_its_other_files(tmp_path):
    plain, folder = create_backbone("vit_tiny", **TINY), tmp_path / "a/b/out"
    check_timm_target(folder)
    write_timm_whole(plain, folder)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "a/b/.out.partial").mkdir()  # of one that was killed
    write_timm_whole(plain, folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["out"]
    with pytest.raises(UserError, match=r"notes\.txt is a file\. Give a folder"):
        check_timm_target(folder / "notes.txt")


def test_files_get_what_the_folder_has_and_folders_keep_their_own(tmp_path):
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "file").touch(mode=0o600)
    tmp_path.chmod(0o755)
    obey_umask(tmp_path)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700
