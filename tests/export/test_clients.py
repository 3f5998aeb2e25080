"""Who can open an export: other people's programs in processes of their own, with ssl_locat and where it cannot be imported.

The table in docs/clients.md is what the slow test finds; `UPDATE=1 pytest -m slow tests/export/test_clients.py` writes it anew.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from ssl_locat.export.export import export
from ssl_locat.models import features, forward_tokens
from ssl_locat.models.backbone import load_backbone

pytest.importorskip("transformers", minversion="5", reason="transformers is not installed (pip install 'ssl_locat[dev]')")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
SMALL = "patch_size=8&img_size=32&depth=2&embed_dim=24&num_heads=2"
# name -> MODEL, format, and what it is in the table
EXPORTS = {
    "vanilla": (f"timm:vit_tiny?{SMALL}", "timm", "vanilla"),
    "locat": (f"timm:locatvit_tiny?{SMALL}", "timm", "LocAt"),
    "classifier": (f"timm:locatvit_tiny?{SMALL}&num_classes=5", "timm", "LocAt"),
    "vanilla_registers": (f"timm:regvit_tiny?{SMALL}", "timm", "vanilla"),
    "vanilla_rope": (f"timm:vit_tiny_rope_mixed?{SMALL}", "timm", "vanilla"),
    "vanilla_dinov3": (f"timm:vit_small_patch16_dinov3?{SMALL}", "timm", "vanilla"),
    "locat_rope": (f"timm:locatvit_tiny_rope_mixed?{SMALL}", "timm", "LocAt"),
    "locat_dinov3": (f"timm:vit_small_patch16_dinov3?{SMALL}&gaug=true&prr=true", "timm", "LocAt"),
    "jumbo": (f"timm:locatjumbo_tiny?{SMALL}", "timm", "LocAt"),
    "dino_positions": (f"timm:locatvit_tiny?{SMALL}&pos_resize=dino&gaug={{kernel: laplace}}", "timm", "LocAt"),
    "onnx": (f"timm:locatvit_tiny?{SMALL}", "onnx", "LocAt"),
    "onnx_vanilla": (f"timm:vit_tiny?{SMALL}", "onnx", "vanilla"),
    "pt2": (f"timm:locatvit_tiny?{SMALL}", "pt2", "LocAt"),
    "pt2_vanilla": (f"timm:vit_tiny?{SMALL}", "pt2", "vanilla"),
}
ALWAYS = ("vanilla", "locat", "classifier")
# greatest difference relative to the largest value: the same operations, or an exporter's
TOLERANCE = {"onnxruntime": 1e-4, "torch.export.load": 1e-4}


@torch.inference_mode()
def prepare(folder: Path, names) -> Path:
    """Write the exports, and what the models give for images 32 x 48 and for a picture."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 48, generator=generator)
    picture = torch.randint(0, 255, (40, 50, 3), generator=generator, dtype=torch.uint8)
    expected, exports = {"images": images, "picture": picture}, {}
    for name in names:
        spec, format, _ = EXPORTS[name]
        torch.manual_seed(0)
        out = export(spec, str(folder / name), format=format, with_code=True)
        model = load_backbone(out)
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
        pixels = transform(Image.fromarray(picture.numpy()))[None]
        expected |= {
            f"{name}.out": model(images),
            f"{name}.tokens": model.forward_features(images),
            f"{name}.class": features(model, images),
            f"{name}.raw": forward_tokens(model, images).patches,
            f"{name}.map": model.forward_intermediates(images, indices=[-1], norm=False, intermediates_only=True)[-1],
            f"{name}.pixels": pixels,
            f"{name}.picture_class": features(model, pixels),
        }
        exports[name] = {"folder": str(out), "program": None if format == "timm" else format, "classes": model.num_classes > 0}
    save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
    work = {"exports": exports, "expected": str(folder / "expected.safetensors"), "scratch": str(folder)}
    (folder / "work.json").write_text(json.dumps(work))
    return folder / "work.json"


def open_all(work: Path, mode: str) -> dict:
    """What tests/export/clients.py prints: its own process, its own cache of modules."""
    command = [sys.executable, str(Path(__file__).with_name("clients.py")), str(work), mode]
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(work.parent / f"modules_{mode}"),
        "HF_HOME": str(work.parent),
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def needs_the_package(client: str, name: str) -> bool:
    """Without ssl_locat, LocAt opens by its program or its generated code alone; AutoImageProcessor never makes the model."""
    if client == "ssl_locat.load_backbone":
        return True
    by_itself = "trust_remote_code" in client or client in ("AutoImageProcessor", "onnxruntime", "torch.export.load")
    return EXPORTS[name][2] == "LocAt" and not by_itself


def check(found: dict, mode: str) -> None:
    assert found["ssl_locat"] == (mode == "with")
    for client, exports in found["results"].items():
        for name, result in exports.items():
            if mode == "without" and needs_the_package(client, name):
                assert isinstance(result, str), f"{client} opened {name} without ssl_locat"
            else:
                assert not isinstance(result, str), f"{client}, {mode} ssl_locat, {name}: {result}"
                assert result <= TOLERANCE.get(client, 1e-6), f"{client}, {mode} ssl_locat, {name}: differs by {result:.1e}"


@pytest.mark.parametrize("mode", ["with", "without"])
def test_timm_and_transformers_open_exports(tmp_path, mode):
    check(open_all(prepare(tmp_path, ALWAYS), mode), mode)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_page_says_who_opens_what(tmp_path):
    work = prepare(tmp_path, EXPORTS)
    found = {mode: open_all(work, mode) for mode in ("with", "without")}
    for mode, one in found.items():
        check(one, mode)
    seconds = found["without"]["seconds"]
    assert seconds["load model.pt2"] < 60
    print({name: round(value, 2) for name, value in seconds.items()})
    rows = [
        "| client | vanilla, without ssl_locat | vanilla, with | LocAt, without ssl_locat | LocAt, with |",
        "|---|---|---|---|---|",
    ]
    for client in found["with"]["results"]:
        cells = [
            cell(client, found[mode]["results"][client], kind) for kind in ("vanilla", "LocAt") for mode in ("without", "with")
        ]
        rows.append(f"| {client} | {' | '.join(cells)} |")
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    before, _, rest = text.partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end of table -->")
    wanted = before + "<!-- table -->\n" + "\n".join(rows) + "\n<!-- end of table -->" + after
    if os.environ.get("UPDATE"):
        PAGE.write_text(wanted, encoding="utf-8")
    assert text == wanted, "docs/clients.md is not what was found; write it anew with UPDATE=1"


def cell(client: str, results: dict, kind: str) -> str:
    """One cell: what holds for every export of this kind that the client was given; `check` has compared the differences."""
    own = [result for name, result in results.items() if EXPORTS[name][2] == kind]
    return "no" if all(isinstance(result, str) for result in own) else f"yes, to {TOLERANCE.get(client, 1e-6):.0e}"
