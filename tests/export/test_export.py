"""What is exported gives the same features as what was trained, in every format, or is not written at all."""

import ast
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from trained import trained_run  # noqa: F401

import ssl_locat
from ssl_locat.errors import CheckpointError, UserError
from ssl_locat.export.export import export
from ssl_locat.export.modeling import FILE, modeling_code
from ssl_locat.export.parity import TOLERANCE, BothTokens
from ssl_locat.models.attach import locat_args
from ssl_locat.models.backbone import create_backbone, load_backbone
from ssl_locat.models.tokens import features
from ssl_locat.runs.folder import save_tensors

SMALL = "?patch_size=8&img_size=32&depth=1&embed_dim=24&num_heads=2"


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_run_exports_to_timm_with_equal_features(trained_run, tmp_path, images, which):  # noqa: F811
    out = export(str(trained_run), str(tmp_path / "out"), which=which)
    trained = load_backbone(str(trained_run), which=which)
    by_timm = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.inference_mode():
        expected = features(trained, images)
        assert (features(by_timm, images) - expected).abs().max() <= 1e-6
        assert (ssl_locat.features(ssl_locat.load_backbone(str(out)), images) - expected).abs().max() <= 1e-6
        assert (by_timm(images) - expected).abs().max() <= 1e-6  # the plain call is what the card promises
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "locatvit_tiny" and config["pretrained_cfg"]["input_size"] == [3, 32, 32]


def test_steps_and_networks_differ_and_an_unknown_step_is_refused(trained_run, tmp_path):  # noqa: F811
    at_4 = load_file(export(str(trained_run), str(tmp_path / "a"), step=4) / "model.safetensors")
    newest = load_file(export(str(trained_run), str(tmp_path / "b")) / "model.safetensors")
    assert any(not torch.equal(at_4[name], newest[name]) for name in newest)
    with pytest.raises(CheckpointError, match="steps found"):
        export(str(trained_run), str(tmp_path / "c"), step=5)
    for model, choice in ((tmp_path / "a", {"which": "student"}), (f"timm:vit_tiny{SMALL}", {"step": 4})):
        with pytest.raises(UserError, match="is one network"):
            export(str(model), str(tmp_path / "c"), **choice)
    with pytest.raises(UserError, match="is one checkpoint"):
        export(str(trained_run / "checkpoints/step_00000004"), str(tmp_path / "c"), step=4)
    assert not list(tmp_path.glob("*c*"))


def test_the_head_goes_along_when_asked(trained_run, tmp_path):  # noqa: F811
    head = load_file(export(str(trained_run), str(tmp_path / "out"), with_head=True) / "head.safetensors")
    assert any(tensor.shape[0] == 32 for tensor in head.values())  # prototypes
    checkpoint = max((trained_run / "checkpoints").glob("step_*"))
    again = load_file(export(str(checkpoint), str(tmp_path / "again"), with_head=True) / "head.safetensors")
    assert head.keys() == again.keys() and all(torch.equal(head[name], again[name]) for name in head)
    with pytest.raises(UserError, match="holds a backbone alone"):
        export(f"timm:vit_tiny{SMALL}", str(tmp_path / "other"), with_head=True)


def test_the_card_says_data_recipe_scores_and_parity(trained_run, tmp_path):  # noqa: F811
    card = (export(str(trained_run), str(tmp_path / "my_model")) / "README.md").read_text()
    for part in ("# my_model", "textures-train-*.tar", "'dino'", "knn", "top1_k5", "after norm and PRR", "## Parity", "0.485"):
        assert part in card
    assert "import ssl_locat.models" in card and "{%" not in card and "{{" not in card


def test_the_code_of_the_card_runs(trained_run, tmp_path):  # noqa: F811
    out = export(str(trained_run), str(tmp_path / "out"))
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("local-dir:PATH", f"local-dir:{out}")
    subprocess.run([sys.executable, "-c", code + "\nassert features.shape == (2, 24)"], check=True, timeout=120)


def test_a_vanilla_export_loads_without_ssl_locat(tmp_path):
    out = export(f"timm:vit_tiny_patch16_224{SMALL}", str(tmp_path / "out"))
    code = f"import sys, timm; timm.create_model('local-dir:{out}', pretrained=True); assert 'ssl_locat' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_export_is_whole_or_absent_and_nothing_else_is_replaced(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("do not lose")
    (precious / "config.json").write_text("{}")  # as every model folder has
    with pytest.raises(UserError, match=r"would be lost: config.json, thesis.txt"):
        export(f"timm:vit_tiny{SMALL}", str(precious))
    (precious / "config.json").unlink()
    ours = export(f"timm:vit_tiny{SMALL}", str(tmp_path / "ours"))
    (ours / "notes.md").write_text("do not lose")
    with pytest.raises(UserError, match=r"would be lost: notes.md"):
        export(f"timm:vit_tiny{SMALL}", str(ours))
    assert (precious / "thesis.txt").exists() and (ours / "notes.md").exists()

    first = export(f"timm:vit_tiny{SMALL}", str(tmp_path / "out"))
    before = (first / "model.safetensors").read_bytes()
    torch.manual_seed(1)
    monkeypatch.setitem(TOLERANCE, "timm", -1.0)  # no export can be as near as that
    with pytest.raises(CheckpointError, match="differs by"):
        export(f"timm:vit_tiny{SMALL}", str(tmp_path / "out"))
    assert (first / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "out", "precious"]


def run_onnx(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array) for array in session.run(["class_token", "patch_tokens"], {"images": images.numpy()})]


def check_program(out, run, name, sizes):
    module = BothTokens(load_backbone(str(out))).eval()
    for batch, height, width in sizes:
        images = torch.randn(batch, 3, height, width)
        with torch.inference_mode():
            for expected, given in zip(module(images), run(out / name, images), strict=True):
                torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        "locatvit_tiny",
        pytest.param("vit_tiny", marks=pytest.mark.slow),
        pytest.param("locatregvit_tiny", marks=pytest.mark.slow),
        pytest.param("locatvit_tiny_rope_mixed", marks=pytest.mark.slow),
    ],
)
def test_onnx_equals_the_model_at_several_sizes_and_batches(name, tmp_path):
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    out = export(f"timm:{name}{SMALL}", str(tmp_path / "out"), format="onnx")
    check_program(out, run_onnx, "model.onnx", [(1, 32, 32), (4, 48, 64), (2, 16, 40)])
    assert "any image size" in (out / "README.md").read_text()
    import onnxruntime

    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [o.shape[:2] for o in session.get_outputs()] == [["batch", 24], ["batch", "patches"]]
    for odd in ((1, 3, 33, 32), (1, 3, 32, 36)):  # timm refuses them, too
        with pytest.raises(Exception, match=r"cannot be reshaped|Reshape"):
            session.run(None, {"images": torch.zeros(odd).numpy()})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("pos_resize", ["timm", "dino"])
def test_torch_export_equals_the_model_and_loads_with_torch_alone(tmp_path, pos_resize):
    out = export(f"timm:locatvit_tiny{SMALL}&pos_resize={pos_resize}", str(tmp_path / "out"), format="pt2")
    run = lambda path, images: torch.export.load(path).module()(images)  # noqa: E731
    check_program(out, run, "model.pt2", [(1, 32, 32), (4, 48, 64)])
    code = f"import sys, torch; torch.export.load({str(out / 'model.pt2')!r}); assert 'ssl_locat' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_unknown_format_and_model_are_users_mistakes(tmp_path):
    with pytest.raises(UserError, match="timm, onnx, pt2"):
        export(f"timm:vit_tiny{SMALL}", str(tmp_path / "out"), format="coreml")
    with pytest.raises(UserError, match="run folder"):
        export(str(tmp_path / "nothing"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "attached"),
    [
        (
            "&gaug={kernel: laplace, alpha: one, initial_grid: [3, 3]}&prr={num_heads: 4}&pos_resize=dino",
            {
                "gaug": {"kernel": "laplace", "alpha": "one", "initial_grid": (3, 3)},
                "prr": {"num_heads": 4},
                "pos_resize": "dino",
            },
        ),
        ("&gaug=false", {"gaug": False, "prr": {"num_heads": 2}}),
    ],
)
def test_exported_models_keep_the_options_of_locat(options, attached, tmp_path, images):
    out = export(f"timm:locatvit_tiny{SMALL}{options}", str(tmp_path / "out"))
    again = load_backbone(str(out))
    assert locat_args(again) == attached
    # built anew from the options alone, without what the folder says about them
    direct = create_backbone("locatvit_tiny", patch_size=8, img_size=32, depth=1, embed_dim=24, num_heads=2, **attached).eval()
    direct.load_state_dict(load_file(out / "model.safetensors"))
    with torch.inference_mode():
        torch.testing.assert_close(features(again, images), features(direct, images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_obey_the_umask(trained_run, tmp_path, umask):  # noqa: F811
    before = os.umask(umask)
    try:
        out = export(str(trained_run), str(tmp_path / "out"), with_head=True, with_code=True)
        save_tensors({"x": torch.zeros(2)}, tmp_path / "features.safetensors")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (*out.iterdir(), tmp_path / "features.safetensors")}
    assert {"model.safetensors", "head.safetensors", "config.json", "README.md", FILE} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_vanilla_exports_carry_timms_own_name(tmp_path):
    for name, own in {
        "vit_tiny": "vit_tiny_patch16_224",
        "regvit_tiny": "vit_tiny_patch16_224",
        "vit_small_nopos": "vit_small_patch16_224",
        "vit_tiny_rope_mixed": "vit_small_patch16_rope_mixed_224",
        "locatvit_tiny": "locatvit_tiny",
    }.items():
        config = json.loads((export(f"timm:{name}{SMALL}", str(tmp_path / name)) / "config.json").read_text())
        assert config["architecture"] == own and "num_classes" not in config["model_args"]
        if own != name:
            assert not {"gaug", "prr", "pos_resize"} & config["model_args"].keys()


@pytest.mark.parametrize(
    "name",
    [
        *("locatvit_tiny", "locatvit_tiny_rope_mixed", "locatjumbo_tiny", "locatswin_tiny", "locat_vit_small_patch16_dinov3"),
        *("locat_beit_base_patch16_224", "locat_naflexvit_base_patch16_gap", "locat_hiera_tiny_224", "locat_volo_d1_224"),
    ],
)
def test_the_generated_code_stands_alone(name, tmp_path):
    code = modeling_code(name)
    (tmp_path / "modeling.py").write_text(code)
    undefined = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821,F811", str(tmp_path / "modeling.py")]
    found = subprocess.run(undefined, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    names = {alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in names} - sys.stdlib_module_names == {"torch", "timm", "transformers"}
    assert code == modeling_code(name)  # the same each time
