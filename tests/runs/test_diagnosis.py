import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_locat.config.schema import load
from ssl_locat.errors import ConfigError, Diverged, UserError
from ssl_locat.label_free.rankme import rankme
from ssl_locat.models.backbone import create_backbone
from ssl_locat.objectives import Progress
from ssl_locat.objectives.dino import DINO
from ssl_locat.pretraining.student_teacher import StudentTeacher
from ssl_locat.runs import diagnosis
from ssl_locat.runs.diagnosis import Diagnosis


def test_feature_std_is_one_for_isotropic_and_zero_for_equal_features():
    features = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    assert diagnosis.feature_std(features).item() == pytest.approx(1, abs=0.02)
    assert diagnosis.feature_std(features[:1].expand(512, -1)).item() == pytest.approx(0, abs=1e-3)


def test_rankme_counts_directions():
    generator = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(64, 32, generator=generator)).Q
    assert rankme(orthogonal).item() == pytest.approx(32, rel=1e-3)
    three = torch.linalg.qr(torch.randn(64, 3, generator=generator)).Q @ torch.eye(3, 32)
    assert rankme(three).item() == pytest.approx(3, rel=1e-3)


def test_patch_cls_similarity_is_the_mean_cosine():
    cls = torch.tensor([[1.0, 0.0]])
    patches = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    assert diagnosis.patch_cls_similarity(cls, patches).item() == pytest.approx(0.5)


def test_center_drift_is_in_temperatures():
    assert diagnosis.center_drift(torch.zeros(8), torch.full((8,), 0.1), 0.05).item() == pytest.approx(2)


HEALTHY = {
    "loss": 4.0,
    "teacher_entropy": 2.0,
    "feature_std": 0.8,
    "rankme": 40.0,
    "patch_cls_similarity": 0.3,
    "center_drift": 0.1,
}
LN_K = math.log(512)
SICK = {
    "loss_at_ln_k": {"loss": LN_K},
    "uniform": {"teacher_entropy": LN_K},
    "collapse": {"teacher_entropy": 0.001, "loss": 0.01},
    "features_collapsing": {"feature_std": 0.03},
    "rank_falling": {"rankme": 8.0},
    "patches_collapsing": {"patch_cls_similarity": 0.97},
    "center_drifting": {"center_drift": 3.0},
}


@pytest.mark.parametrize("kind", diagnosis.KINDS)
def test_each_sign_warns_once_with_meaning_and_advice_and_again_after_recovery(kind):
    watch = Diagnosis(512)
    healthy = lambda step: watch.check(HEALTHY, step, 1000)  # noqa: E731
    sick = lambda step: watch.check(HEALTHY | SICK[kind], step, 1000)  # noqa: E731
    assert [healthy(step) for step in range(100, 400, 10)] == [[]] * 30
    given = [warning for step in range(400, 640, 10) for warning in sick(step)]
    assert [warning.kind for warning in given] == [kind]
    # twenty steps, a fifth of the run, three checks
    third = {"loss_at_ln_k": 610, "rank_falling": 620}.get(kind, 420)
    assert f"Step {third}: " in str(given[0]) and "What people change: " in str(given[0])
    assert not any(healthy(step) for step in range(640, 690, 10))
    assert [warning.kind for step in range(690, 930, 10) for warning in sick(step)] == [kind]


def test_records_without_a_signal_do_not_break_a_row():
    watch = Diagnosis(512)
    for step in range(100, 200):
        watch.check(HEALTHY, step, 1000)
    seen = []
    for step in range(200, 450):  # spread and rank are measured every tenth step only, as the loop does
        seen += watch.check({"loss": 4.0} | ({"rankme": 5.0} if step % 10 == 0 else {}), step, 1000)
    assert [warning.kind for warning in seen] == ["rank_falling"]


def test_early_steps_and_single_spikes_are_not_checked():
    watch = Diagnosis(512)
    assert not any(watch.check(HEALTHY | SICK["loss_at_ln_k"], step, 1000) for step in range(100))
    for step in range(100, 200, 2):
        assert watch.check(HEALTHY, step, 1000) == watch.check(HEALTHY | SICK["collapse"], step + 1, 1000) == []


def test_a_loss_that_falls_through_ln_k_is_not_stuck_there():
    """A sharp teacher starts above ln K; as quickstart.yaml's."""
    watch = Diagnosis(512)
    assert not any(watch.check(HEALTHY | {"loss": 6.6 - 0.006 * step}, step, 200) for step in range(200))
    stuck = [w.kind for step in range(200) for w in watch.check(HEALTHY | {"loss": 6.24}, step, 200)]
    assert stuck == ["loss_at_ln_k"]


CURVES = json.loads(Path(__file__).with_name("real_curves.json").read_text())


@pytest.mark.parametrize("run", CURVES)
def test_real_runs_are_told_from_each_other(run):
    """Metrics of real runs: the quickstart, which warns of nothing; the two of docs/watching.md; and others of their size whose teacher
    died (momentum 0.5), became uniform (centred, lr too low) or lost directions (no KoLeo)."""
    curve = CURVES[run]
    watch, seen = Diagnosis(curve["prototypes"]), []
    for step in range(1, curve["steps"] + 1):
        metrics = {}
        for name, column in curve["metrics"].items():
            place, off = divmod(step - column["first"], column["every"])
            if not off and place < len(column["values"]):
                metrics[name] = column["values"][place]
        seen += [warning.kind for warning in watch.check(metrics, step, curve["steps"])]
    assert sorted(seen) == curve["warnings"]


def test_a_fall_of_the_spread_alone_is_no_collapse():
    """A common direction of all features does it; the quickstart's spread falls to a fifth while RankMe rises."""
    watch = Diagnosis(512)
    for step in range(100, 300, 10):
        watch.check(HEALTHY, step, 1000)
    assert not any(watch.check(HEALTHY | {"feature_std": 0.1}, step, 1000) for step in range(300, 600, 10))


def test_what_the_first_steps_undo_is_no_fall_nor_is_a_dip():
    """RankMe of an untrained network is high by chance."""
    watch = Diagnosis(512)
    for step in range(100):
        watch.check(HEALTHY | {"rankme": 200.0}, step, 1000)
    assert not any(watch.check(HEALTHY, step, 1000) for step in range(100, 300, 10))
    # resumed: it remembers both
    again = Diagnosis(512)
    again.load_state(json.loads(json.dumps(watch.state())))
    fallen = HEALTHY | {"rankme": 20.0}
    assert not any(again.check(fallen, step, 1000) for step in range(300, 450, 10))  # a dip
    assert not any(again.check(HEALTHY, step, 1000) for step in range(450, 500, 10))
    assert [w.kind for step in range(500, 800, 10) for w in again.check(fallen, step, 1000)] == ["rank_falling"]


def test_only_what_the_config_names_is_fatal():
    with pytest.raises(ConfigError, match="Did you mean 'collapse'"):
        Diagnosis(512, fatal=["collapses"])
    watch = Diagnosis(512, fatal=["collapse"], patience=1)
    assert watch.check(HEALTHY, 490, 1000) == []
    assert [w.kind for step in (500, 700) for w in watch.check(HEALTHY | {"rankme": 8.0}, step, 1000)] == ["rank_falling"]
    with pytest.raises(Diverged, match="names 'collapse' as fatal"):
        watch.check(HEALTHY | SICK["collapse"], 701, 1000)


def test_replay_comes_back_and_the_error_names_everything(tmp_path):
    batch = {"global_crops": torch.randn(4, 3, 8, 8).half(), "boxes": torch.arange(4)}
    path = diagnosis.save_replay(tmp_path / "replay" / "step_7_rank_1.safetensors", batch, step=7, rank=1, keys=["a/1", "b/2"])
    loaded, meta = diagnosis.load_replay(path)
    assert meta == {"step": 7, "rank": 1, "keys": ["a/1", "b/2"]}
    assert loaded.keys() == batch.keys() and all(torch.equal(loaded[name], batch[name]) for name in batch)
    message = str(diagnosis.not_finite(7, 1, {"loss": float("nan"), "grad_norm": 3.0}, [f"k{i}" for i in range(10)], path))
    for part in ("step 7", "rank 1", "loss nan", "grad_norm 3", "k7 and 2 more", f"--replay {path}", "lower lr"):
        assert part in message
    with pytest.raises(UserError, match="no such file"):
        diagnosis.load_replay(tmp_path / "none")


def train(steps: int = 40, lr: float = 3e-3, num_images: int = 32, **options) -> set[str]:
    """The kinds of warning that a short real training gives: a LocAtViT of one block, DINO, noise images."""
    torch.manual_seed(0)
    backbone = create_backbone("locatvit_tiny", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    shape = {"num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16, "frozen_last_layer_epochs": 0}
    dino = DINO(**(shape | options))
    model = StudentTeacher(backbone, nn.ModuleDict({"dino": dino}))
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=lr, weight_decay=0.0)
    images = torch.randn(num_images, 3, 16, 16).repeat(32 // num_images, 1, 1, 1)
    watch, seen = Diagnosis(32), set()
    for step in range(steps):
        views = torch.cat([images + 0.3 * torch.randn_like(images) for _ in range(2)])
        with torch.no_grad():
            targets, tokens = model.teacher(views, None, 2, with_tokens=True)
        loss, metrics = dino(model.student(views, None, 2)["dino"], targets["dino"], Progress(step, 1.0, 10.0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(0.9)
        classes = tokens.prefix[:, 0]
        signals = {
            "loss": loss.detach(),
            "feature_std": diagnosis.feature_std(classes),
            "rankme": rankme(classes),
            "patch_cls_similarity": diagnosis.patch_cls_similarity(classes, tokens.patches),
        }
        record = {name: float(value) for name, value in {**signals, **metrics, **dino.finish_step()}.items()}
        seen |= {warning.kind for warning in watch.check(record, step, steps)}
    return seen


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("uniform", {"teacher_temp": (1000.0, 1000.0)}),
        ("loss_at_ln_k", {"student_temp": 100.0, "lr": 1e-9}),
        ("collapse", {"center_momentum": 1.0, "teacher_temp": (0.01, 0.01), "lr": 1e-2}),  # no centring, sharp targets
        ("features_collapsing", {"num_images": 1}),
        ("rank_falling", {"lr": 0.5}),  # lower ones may collapse before the rank falls: which, hangs on rounding
        ("patches_collapsing", {"lr": 0.3}),
        ("center_drifting", {"center_momentum": 0.999}),
    ],
)
def test_each_mistake_is_noticed_in_a_real_training(kind, mistake):
    assert kind in train(**mistake)


def test_advice_knows_the_recipe():
    has = diagnosis.traits(load("quickstart"))
    assert {"koleo", "sinkhorn", "locat", "frozen_prototypes"} <= has
    for kind in diagnosis.KINDS:
        plain, told = diagnosis.advice(kind), diagnosis.advice(kind, has)
        assert "beside DINO" not in told and "LocAt on" not in told and "{" not in plain + told and ", ," not in told
    assert "more weight on KoLeo" in diagnosis.advice("rank_falling", has)
    assert "the KoLeo objective beside DINO" in diagnosis.advice("rank_falling")
