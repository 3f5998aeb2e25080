"""`ssl-locat bench`: rows have their shape, slow paths compute the same as ours, earlier runs are compared."""

import copy
import json

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from ssl_locat.benchmarks import attention, bench, crops, decoding, label_free, objectives, slow_step, start, step, timing
from ssl_locat.cli import commands
from ssl_locat.errors import UserError
from ssl_locat.objectives.dino import DINO
from ssl_locat.optim.optim import clip_gradients


@pytest.fixture(scope="module")
def rows():
    return attention.measure(4, 2, "fp32", torch.float32, repeats=2)


def test_rows_have_the_documented_columns(rows):
    assert {"plain", "reference", "sdpa", "tiled"} <= {row["variant"] for row in rows}
    for row in rows:
        assert set(bench.COLUMNS) <= set(row)
        assert row["value"] > 0 and row["ratio"] > 0
    assert all(row["ratio"] == 1 for row in rows if row["variant"] == row["baseline"])


def test_result_is_json_and_compares_with_an_earlier_one(rows, monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "cases", lambda quick: [("small", lambda: rows)])
    first = bench.run("attention", as_json=True)
    assert set(first) == {"hardware", "versions", "rows", "failed"} and first["failed"] == []
    assert first["hardware"]["cores"] >= 1 and first["versions"]["torch"]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(first))
    again = bench.run("attention", as_json=False, compare=earlier)
    assert all(row["earlier_ratio"] == row["ratio"] for row in again["rows"])


def test_a_case_that_fails_loses_no_other(rows, monkeypatch, capsys):
    def cases(quick):
        yield "first", lambda: rows[:1]
        yield "broken", lambda: 1 / 0
        yield "last", lambda: rows[1:]
        raise RuntimeError("no more")

    monkeypatch.setattr(attention, "cases", cases)
    monkeypatch.setitem(bench.BENCHES, "stream", "ssl_locat.benchmarks.is_not_there")
    monkeypatch.setitem(bench.BENCHES, "crops", "ssl_locat.benchmarks.is_not_there")
    monkeypatch.setitem(bench.BENCHES, "step", "ssl_locat.benchmarks.is_not_there")
    monkeypatch.setitem(bench.BENCHES, "start", "ssl_locat.benchmarks.is_not_there")
    monkeypatch.setitem(bench.BENCHES, "memory", "ssl_locat.benchmarks.is_not_there")
    with pytest.raises(typer.Exit) as stopped:
        commands.bench("all", as_json=True)
    assert stopped.value.exit_code == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == rows
    assert [(each["bench"], each["case"]) for each in printed["failed"]] == [
        ("attention", "broken"),
        ("attention", "setting up"),
        ("step", "setting up"),
        ("crops", "setting up"),
        ("stream", "setting up"),
        ("start", "setting up"),
        ("memory", "setting up"),
    ]
    assert printed["failed"][0]["error"] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("subject", bench.BENCHES)
def test_cases_have_names_of_their_own(subject):
    quick = [name for name, _ in bench.subject_cases(subject, True)]
    assert len(set(quick)) == len(quick) >= 2 and "setting up" not in quick


@pytest.mark.gpu
def test_kernel_time_is_what_the_kernels_take():
    x = torch.randn(4096, 4096, device="cuda")
    calls = {"one": lambda: x @ x, "two": lambda: x @ x @ x}
    timings, host = timing.kernel_times(calls, 5), timing.host_times(calls, 5)
    assert timings["two"].seconds == pytest.approx(2 * timings["one"].seconds, rel=0.2)
    assert host["one"].seconds < timings["one"].seconds


def test_compare_with_something_else_is_refused(tmp_path):
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[1]")
    with pytest.raises(UserError, match="not the JSON of an earlier bench"):
        bench.run("attention", compare=wrong)


def test_pairwise_loss_equals_ours():
    objective = DINO(num_prototypes=24)
    objective.center.normal_()
    student, teacher = torch.randn(5, 3, 24, requires_grad=True), torch.randn(2, 3, 24)
    ours, _ = objective(student, teacher, step.PROGRESS)
    slow = slow_step.pairwise_loss(student, teacher, objective.center, 0.1, 0.04)
    torch.testing.assert_close(slow, ours, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (slow, ours)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_clipping_and_teacher_update_equal_ours():
    model, _ = step.tiny_pair(16)
    pairs = [(p, torch.nn.Parameter(p.detach().clone())) for p in model.student.parameters() if p.requires_grad]
    for ours, slow in pairs:
        ours.grad = torch.randn_like(ours)
        slow.grad = ours.grad.clone()
    clip_gradients([ours for ours, _ in pairs], 3.0)
    slow_step.clip_each([slow for _, slow in pairs], 3.0)
    for ours, slow in pairs:
        torch.testing.assert_close(ours.grad, slow.grad)
    before = [p.clone() for p in model.teacher.parameters()]
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(0.1)
    model.update_teacher(0.9)
    fast = [p.clone() for p in model.teacher.parameters()]
    for parameter, value in zip(model.teacher.parameters(), before, strict=True):
        parameter.data.copy_(value)
    slow_step.update_each(model.teacher, model.student, 0.9)
    for parameter, value in zip(model.teacher.parameters(), fast, strict=True):
        torch.testing.assert_close(parameter, value)


def test_both_dino_steps_stay_together():
    """Five whole steps each from the same weights: the comparison compares the same computation."""
    model, objective = step.tiny_pair(32)
    slow_model, slow_objective = copy.deepcopy((model, objective))
    crops = torch.randn(2 * 4, 3, 32, 32), torch.randn(4 * 4, 3, 16, 16)
    ours, slow = step.our_stepper(model, objective), step.slow_stepper(slow_model, slow_objective)
    for _ in range(5):
        assert abs(ours(*crops) - slow(*crops)) < 1e-3


def test_peak_memory_counts_what_lives_at_once():
    def call():
        first = torch.zeros(1000)
        del first
        both = torch.zeros(1000), torch.zeros(500)
        return both[0].view(10, 100)

    assert timing.peak_bytes(call) == 6000


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_masked_patch_loss_costs_no_more_than_its_tokens():
    """Operations, counted: what iBOT adds to a DINO step is its head on the hidden patches, forward and backward, and the teacher's forward."""
    make = objectives.COMBINATIONS
    (dino, ibot), batch = (objectives.Step(make[name](), 2) for name in ("dino", "dino + ibot")), 2
    head, hidden = ibot.model.student.heads["ibot"].head, len(ibot.masks.index)
    assert 0 < hidden < 2 * batch * 64
    tokens = torch.randn(hidden, objectives.SIZE["embed_dim"], requires_grad=True)
    alone = flops(lambda: head(tokens).sum().backward()) + flops(lambda: head(tokens.detach()))
    added = flops(lambda: ibot.loss().backward()) - flops(lambda: dino.loss().backward())
    assert 0.99 * alone < added <= 1.001 * alone


def test_locat_needs_little_more_memory_than_vanilla():
    """The goal at 512 px is 1.2x; the same at a size that a test can afford."""
    vanilla, locat = (step.make_model(name, 224) for name in ("vit_tiny_patch16_224", "locatvit_tiny"))
    peaks = []
    for model in (vanilla, locat):
        one, two = (
            timing.peak_bytes(lambda m=model, b=b: step.forward_backward(m, torch.randn(b, 3, 224, 224), torch.float32))
            for b in (1, 2)
        )
        peaks.append(two - one)
    assert peaks[1] <= 1.2 * peaks[0]


def test_start_measures_processes_and_names_one_that_ends_otherwise(monkeypatch):
    monkeypatch.setattr(start, "base_seconds", lambda repeats: 10.0)
    (row,) = start.measure_command("help", ["--help"], 0, 1)
    assert set(bench.COLUMNS) <= set(row) and 0 < row["value"] < 10 and row["ratio"] == row["value"] / 10
    with pytest.raises(RuntimeError, match="ended with 2"):
        start.measure_command("wrong", ["pretrain", "nowhere"], 0, 1)
    assert list(dict(start.cases(True))) == [*start.COMMANDS, "load_backbone"]


def test_each_format_is_decoded_beside_its_librarys_reader(monkeypatch):
    monkeypatch.setattr(decoding, "SIDE", 48)
    found = [row for _, measure in decoding.cases(crops.make_jpegs(2, 48, 48), repeats=2) for row in measure()]
    assert [row["variant"] for row in found[1::2]] == ["ours"] * len(decoding.FORMATS)
    assert all(row["value"] > 0 and row["unit"] == "images/s/core" and row["baseline"] != "ours" for row in found)
    assert {row["baseline"] for row in found} == {"pillow", "opencv", "numpy", "tifffile", "pydicom"}


def test_each_label_free_measure_has_its_row_in_the_step_bench():
    """On few images: the shares themselves are measured by `bench step`."""
    found = {row["variant"]: row for row in label_free.rows(repeats=2, count=16)}
    measures = {"DSE", "RankMe", "LiDAR", "alpha-ReQ", "uniformity", "alignment", "norm outliers"}
    assert found.keys() == {*measures, "forward passes, images", "forward passes, crops", "all"}
    assert all(row["bench"] == "step" and row["unit"] == "%" and row["value"] > 0 for row in found.values())
    parts = sum(row["value"] for name, row in found.items() if name != "all")
    assert found["all"]["value"] == pytest.approx(parts) and parts < 2
    assert "label-free measures" in [case for case, _ in step.cases(quick=False)]
