"""timm's own tests, unchanged, over our names: no test that the vanilla twin passes may fail. See timm_sdist/README.md."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

HERE = Path(__file__).parent / "timm_sdist"
SHA256 = "ffb62c6df02601a96c2fda403723a7f96a806897ee061d1009c1f3135fb64eb7"  # of timm-1.0.31/tests/test_models.py
# what its tests say of vision transformers, but for the ones that download weights
ASKED = {
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs_non_std",
    "test_model_forward_torchscript",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
}


def run_timms_tests(folder: Path, pairs: str = "", select: str = "not pretrained") -> dict[str, dict[str, str]]:
    """{test: {model: outcome}} of these pairs of over_our_names.py (all: "")."""
    file = HERE / "timm_test_models.py"
    outcomes = folder / "outcomes.json"
    environment = os.environ | {
        "LOCAT_PAIRS": pairs,
        "LOCAT_OUTCOMES": str(outcomes),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[2])]),
    }
    command = [sys.executable, "-m", "pytest", str(file), "-p", "over_our_names", "-c", os.devnull, "--rootdir", str(folder)]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-k", select], env=environment, cwd=folder, capture_output=True, text=True
    )  # fmt: skip
    assert outcomes.exists(), done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(outcomes.read_text())
    failed = {
        f"{test}[{ours}]"
        for test, models in found.items()
        for ours, outcome in models.items()
        if ours.startswith("locat") and outcome != "passed" and models.get(twin_of(ours)) == "passed"
    }
    assert not failed, f"{sorted(failed)} fail where the vanilla twin passes:\n{done.stdout[-12000:]}"
    return found


def twin_of(name: str) -> str:
    if name == "locatswin_tiny":
        return "swin_tiny_patch4_window7_224"
    return name.removeprefix("locat_") if name.startswith("locat_") else name.removeprefix("locat")


def test_the_file_is_timms():
    assert hashlib.sha256((HERE / "timm_test_models.py").read_bytes()).hexdigest() == SHA256


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="the file is of timm 1.0.31, whose twins pass all of these")
def test_locatvit_passes_what_its_twin_passes(tmp_path):
    found = run_timms_tests(tmp_path, "locatvit_tiny", " or ".join(sorted(ASKED)) + " and not pretrained")
    assert {test for test, models in found.items() if models.get("locatvit_tiny") == "passed"} >= ASKED


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_family_passes_what_its_twin_passes(tmp_path):
    found = run_timms_tests(tmp_path)
    assert (
        sum(outcome == "passed" for models in found.values() for name, outcome in models.items() if name.startswith("locat"))
        > 100
    )
