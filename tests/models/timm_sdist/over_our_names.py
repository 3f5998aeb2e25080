"""A pytest plugin that runs timm's own test_models.py over LocAt models and their vanilla twins, unchanged.

Before that file is imported, timm's `list_models` gives a pair of our names wherever it lists the timm model that they are like, and
`create_model` makes these small. LOCAT_PAIRS chooses the pairs (comma-separated, empty: all), LOCAT_OUTCOMES names a JSON file for what
came out: {test: {model: outcome}}.
"""

import json
import os
from pathlib import Path

import pytest
import timm
import torch

import ssl_locat.models  # noqa: F401  # registers our names

VIT = {"depth": 3}
# one size of image, which FX needs of the twin, too
SWIN = {"embed_dim": 32, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8), "strict_img_size": True}
# LocAt model -> (vanilla twin, timm's name for what the twin is, options that both are opened with)
PAIRS = {
    "locatvit_tiny": ("vit_tiny", "vit_tiny_patch16_224", VIT),
    "locatregvit_tiny": ("regvit_tiny", "vit_small_patch16_224", VIT),
    "locatvit_tiny_nopos": ("vit_tiny_nopos", "vit_tiny_patch16_224", VIT),
    "locatvit_tiny_rope_mixed": ("vit_tiny_rope_mixed", "vit_small_patch16_rope_mixed_224", VIT),
    "locatjumbo_tiny": ("jumbo_tiny", "vit_tiny_patch16_224", {**VIT, "num_class_tokens": 2}),
    "locatswin_tiny": ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", SWIN),
    **{
        f"locat_{name}": (name, name, {**VIT, **more})
        for name, more in {
            "vit_small_patch16_dinov3": {"dynamic_img_size": True},
            "vit_betwixt_patch16_rope_reg4_gap_256": {"dynamic_img_size": True},
            "vit_medium_patch16_gap_256": {"dynamic_img_size": True},
            "vit_small_patch16_36x1_224": {"dynamic_img_size": True},
            "vit_small_patch16_18x2_224": {"dynamic_img_size": True},
            "deit_tiny_distilled_patch16_224": {"dynamic_img_size": True},
            "deit3_small_patch16_224": {"dynamic_img_size": True},
            "eva02_tiny_patch14_224": {"dynamic_img_size": True},
        }.items()
    },
}
chosen = os.environ.get("LOCAT_PAIRS", "")
PAIRS = {name: pair for name, pair in PAIRS.items() if not chosen or name in chosen.split(",")}
OPTIONS = {name: pair[2] for ours, pair in PAIRS.items() for name in (ours, pair[0])}

list_models, create_model = timm.list_models, timm.create_model


def list_pairs(*args, **options) -> list[str]:
    """Pairs whose timm model the same call lists, tags left out."""
    found = {name.partition(".")[0] for name in list_models(*args, **options)}
    return [name for ours, (twin, like, _) in PAIRS.items() if like in found for name in (ours, twin)]


def create_small(name: str, *args, **options):
    return create_model(name, *args, **{**OPTIONS.get(name, {}), **options})


timm.list_models, timm.create_model = list_pairs, create_small
outcomes: dict[str, dict[str, str]] = {}


def pytest_configure(config):
    torch.set_num_threads(1)
    for marker in ("base", "forward", "backward", "cfg", "cfg_nonstd", "torchscript", "features", "fxforward", "fxbackward"):
        config.addinivalue_line("markers", f"{marker}: of timm")
    # torch announces the end of TorchScript, whose use is what is tested here; other warnings are timm's own, which the twins give, too
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.[a-z_]*` is (deprecated|not supported)")


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("model_name") in OPTIONS]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" or report.outcome != "passed":
        models = outcomes.setdefault(item.originalname, {})
        models[item.callspec.params["model_name"]] = report.outcome
    return report


def pytest_sessionfinish():
    if path := os.environ.get("LOCAT_OUTCOMES"):
        Path(path).write_text(json.dumps(outcomes, indent=1))
