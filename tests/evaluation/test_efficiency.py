"""Parameters and multiply-accumulates against the reference's counts and the paper's table."""

import json

import pytest
import timm
from conftest import SHARED

from ssl_locat.evaluation.protocols.efficiency import evaluate
from ssl_locat.models.backbone import create_backbone

FAMILIES = {"ViT": "vit_{}", "RegViT": "regvit_{}", "RoPEViT": "vit_{}_rope_mixed", "Swin": "swin_{}", "Jumbo": "jumbo_{}"}
SIZES = ["tiny", pytest.param("base", marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.timeout(900)  # Jumbo-B has 260 M parameters to initialise and to pass through, twice
def test_counts_of_both_twins(golden, family, size):
    golden("vit_plain")  # skips where the reference's numbers are not there
    rows = json.loads((SHARED / "golden" / "params_flops.json").read_text())["rows"]
    row = next(r for r in rows if (r["family"], r["size"]) == (family, size))
    name = FAMILIES[family].format(size)
    for kind, ours in (("base", f"{name}_patch4_window7_224" if family == "Swin" else name), ("locat", f"locat{name}")):
        found = evaluate(create_backbone(ours))
        assert found["params"] == row["params"][kind]
        assert found["gmacs"] == pytest.approx(row["gmacs"]["torch_flop_counter_half"][kind], rel=1e-3)
        assert found["params_added"] == (row["params"]["added"] if kind == "locat" else 0)
        published = row["paper_table1"][kind]
        assert (found["published_params_millions"], found["published_gmacs"]) == (published["params_m"], published["gflops"])
        assert found["gmacs"] == pytest.approx(published["gflops"], rel=0.01)
        assert found["params_backbone"] < found["params"]


def test_unpublished_models_have_no_published_numbers():
    found = evaluate(timm.create_model("locatvit_small", depth=1), image_size=32)
    assert "published_gmacs" not in found and found["gmacs"] > 0


def test_vanilla_by_timm_name_has_its_row():
    found = evaluate(create_backbone("vit_tiny_patch16_224"))
    assert found["published_gmacs"] == 1.26
