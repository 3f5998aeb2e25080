"""What people do with a backbone next: the files that docs/use-your-backbone.md shows, on real images, with an export of LocAt."""

import importlib
import shlex
import sys

import pytest
import torch
from test_docs import DOCS, ROOT

from ssl_locat.export.timm_folder import write_timm
from ssl_locat.models.backbone import create_backbone

EXAMPLES = DOCS / "examples"
pytestmark = [
    # of libraries that the examples use, none of it ours to mend
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """An export folder: a LocAtViT of four blocks, its weights as they start."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("export")
    options = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    write_timm(create_backbone("locatvit_tiny", **options), folder)
    return str(folder)


@pytest.fixture
def example(monkeypatch):
    """`example("segment")` -> its main."""

    def load(name: str, *needs: str):
        for package in needs:
            pytest.importorskip(package, reason=f"{package} is not installed; the extra `examples` has it")
        monkeypatch.syspath_prepend(EXAMPLES)
        return importlib.import_module(name).main

    yield load
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_segmentation_learns(example, backbone, shared_data):
    main, data = example("segment", "segmentation_models_pytorch"), shared_data("camvid")
    sets = [backbone, f"{data}/camvid-train-000000.tar", f"{data}/camvid-val-000000.tar"]
    scores = main(
        [
            *sets,
            *[
                "--classes",
                "11",
                "--images",
                "16",
                "--size",
                "64",
                "--steps",
                "30",
                "--batch",
                "4",
                "--width",
                "16",
                "--lr",
                "0.003",
            ],
        ]
    )
    assert scores["last_loss"] < 0.8 * scores["first_loss"] and scores["miou"] > 0.05


def test_detection_learns(example, backbone, shared_data):
    main, data = example("detect"), shared_data("coco128seg")
    options = "--classes 81 --images 12 --size 64 --steps 30 --lr 0.002"
    scores = main([backbone, f"{data}/coco128seg-train-000000.tar", *options.split()])
    assert scores["last_loss"] < 0.9 * scores["first_loss"] and scores["boxes"] > 0 and scores["best_overlap"] > 0.1


def test_retrieval_is_better_than_chance(example, backbone, shared_data):
    main, data = example("retrieve", "faiss"), shared_data("eurosat_rgb")
    sets = [backbone, f"{data}/eurosat_rgb-train-000000.tar", f"{data}/eurosat_rgb-test-000000.tar"]
    scores = main([*sets, "--images", "200"])
    assert scores["indexed"] == 200 and scores["precision"] > 2 * scores["chance"]


def test_finetuning_learns(example, backbone, shared_data):
    main, data = example("finetune"), shared_data("eurosat_rgb")
    sets = [backbone, f"{data}/eurosat_rgb-train-000000.tar", f"{data}/eurosat_rgb-test-000000.tar"]
    scores = main([*sets, *["--classes", "10", "--images", "192", "--epochs", "6", "--batch", "32", "--lr", "0.003"]])
    assert scores["last_loss"] < scores["first_loss"] and scores["top1"] > 0.15


def test_the_page_shows_the_files_that_are_tested():
    page = (DOCS / "use-your-backbone.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'--8<-- "docs/examples/{path.name}"' in page, f"{path.name} is not included"
    for command in (line for line in page.splitlines() if line.startswith("python docs/examples/")):
        assert (ROOT / shlex.split(command)[1]).is_file(), command
