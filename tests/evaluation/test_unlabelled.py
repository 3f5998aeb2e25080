"""Label-free measures as a protocol and as a probe: the same numbers, without labels, whatever the batch size."""

import pytest
from trained import trained_run, write_config  # noqa: F401

from ssl_locat.config.schema import load
from ssl_locat.evaluation.evaluate import run
from ssl_locat.evaluation.protocols.unlabelled import chosen_patches, evaluate
from ssl_locat.models.backbone import create_backbone
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.runs.log import read_jsonl

NAMES = {"dse", "dse_inter", "dse_intra_1", "dse_intra_8", "dse_dim", "rankme", "alpha_req", "alpha_req_r2"}
NAMES |= {"uniformity", "norm_outliers", "lidar", "alignment"}


def test_a_run_is_measured_without_labels(trained_run, tmp_path):  # noqa: F811
    data = f"data.test={trained_run.parent}/set/textures-test-*.tar"
    result = run("unlabelled", str(trained_run), [data, "images=24", "workers=0"])
    assert set(result["metrics"]) == NAMES
    again = run("unlabelled", str(trained_run), [data, "images=24", "workers=0", "batch_size=7"])
    assert again["metrics"] == pytest.approx(result["metrics"], rel=1e-3)


def test_without_views_there_is_nothing_to_compare_them_by(trained_run):  # noqa: F811
    backbone = create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    data = {"train": f"{trained_run.parent}/set/textures-test-*.tar"}  # no test set: the training images serve
    scores = evaluate(backbone, data=data, images=16, views=1, workers=0)
    assert set(scores) == NAMES - {"lidar", "alignment"}


def test_it_is_a_probe_and_training_never_notices(trained_run, tmp_path):  # noqa: F811
    config = write_config(trained_run.parent, run_dir=str(tmp_path / "probed"))
    probed = load(str(config), ["probes={every_steps: 6, unlabelled: {images: 16, views: 2, workers: 0}}"])
    pretrain(probed)
    records = read_jsonl(tmp_path / "probed/probes/unlabelled.jsonl")
    assert [record["step"] for record in records] == [0, 6, 12] and {"dse", "lidar"} <= set(records[0])
    losses = [
        [record["loss"] for record in read_jsonl(folder / "metrics.jsonl")] for folder in (trained_run, tmp_path / "probed")
    ]
    assert losses[0] == losses[1]


def test_the_same_patches_are_taken_from_every_image():
    places = chosen_patches(1369, 256, seed=0)
    assert len(places) == 256 and places.tolist() == sorted(set(places.tolist())) and places.equal(chosen_patches(1369, 256, 0))
    assert chosen_patches(49, 256, 0).tolist() == list(range(49))
