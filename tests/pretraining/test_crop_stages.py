"""Stages of a run with other crops and batch sizes (`crops` as a list): what is a function of the samples seen alone, and what people are told."""

import itertools
import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import Command, run_command, run_ranks
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.data.images.crops import MultiCrop, StagedCrops, low_frequencies
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.data.stream.read_ahead import Share
from ssl_locat.errors import ConfigError
from ssl_locat.models.tokens import features
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.memory import memory_of, without_memory
from ssl_locat.pretraining.operations import operations_of_run, operations_of_stages
from ssl_locat.pretraining.parts import build_model, check, rates
from ssl_locat.pretraining.probe_costs import training_forwards
from ssl_locat.pretraining.stages import RunStage, stage_at, stages_of, steps_left, stretches, work
from ssl_locat.report.page import stages as rows_of
from ssl_locat.runs.history import open_run
from ssl_locat.runs.log import _Bar, read_jsonl

# 96 images twice: 192 samples; stage 1 to sample 96 in 3 steps of 32, stage 2 to 144 in 3 of 16 (the last begins before 144), stage 3 in 3 of 16
STAGES = (
    "crops.stages=[{until: 0.5, global_size: 16, local_size: 8, batch_size: 32, jitter_prob: 0.0, solarize_prob: [0, 0, 0]}, "
    "{until: 0.75, global_size: 24, low_frequencies_of: [32, 16], num_local: 3}, {until: 1.0}]"
)


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("textures")
    make_textures(folder / "set", num_train=96, num_test=40, image_size=32, progress=False)
    return folder / "set"


@pytest.fixture
def tiny(textures, tmp_path):
    path = write_config(textures, tmp_path)
    return lambda *overrides, run="run": load(str(path), [f"run_dir={tmp_path}/{run}", STAGES, *overrides])


def seen(run_dir: str) -> list[int]:
    return [record["samples_seen"] for record in read_jsonl(Path(run_dir) / "metrics.jsonl")]


# --- which step is of which stage ----------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
    st.lists(st.integers(1, 40), min_size=4, max_size=4),
    st.integers(1, 900),
    st.integers(0, 60),
)
def test_what_is_left_after_any_step_is_what_was_left_before_it(lengths, batches, total, done):
    """A resumed run, wherever it was stopped, goes on with the very steps that the unbroken one has."""
    ends = [min(end, total) for end in itertools.accumulate(lengths)]
    stages = [RunStage(n, end, None, batch) for n, (end, batch) in enumerate(zip(ends, batches, strict=False))]
    steps = [(s.number, s.batch) for s, _, count in stretches(stages, 0, total) for _ in range(count)]
    assert len(steps) == steps_left(stages, 0, total)
    samples = 0
    for number, batch in steps[:done]:
        assert stage_at(stages, samples)[::3] == (number, batch)
        samples += batch
    assert [(s.number, s.batch) for s, _, count in stretches(stages, samples, total) for _ in range(count)] == steps[done:]
    assert sum(batch for _, batch in steps) - steps[-1][1] < total <= sum(batch for _, batch in steps)


@given(st.integers(0, 50), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 8)), min_size=1, max_size=4), st.integers(1, 3))
def test_all_ranks_together_read_each_position_once_whatever_the_batches(start, parts, world):
    """parts: (steps, micro-batch) one after the other."""
    first, later, position, count = parts[0][1], [], start, 0
    for index, (steps, micro) in enumerate(parts):
        later += [(position, micro)] if index else []
        position, count = position + steps * micro * world, count + steps
    shares = [Share(start, first, rank, world, tuple(later)) for rank in range(world)]
    read = [place for number in range(count) for share in shares for place in share(number)]
    assert read == list(range(start, position))


def test_rates_follow_the_batch_of_the_stage(tiny):
    config = tiny()
    _, _, length = check(config)
    assert (length.total_samples, length.total_steps) == (192, 9)
    small, plain = (rates(config, length, 32 * k) for k in (1, 4))
    same = rates(config.model_copy(update={"crops": config.crops.model_copy(update={"stages": []})}), length, 32)
    assert small.lr == 2 * same.lr and small.momentum == same.momentum**2 and small.weight_decay == same.weight_decay
    assert plain.lr < same.lr * 1.01


# --- crops ---------------------------------------------------------------------------------------------------------------------


def test_low_frequencies_are_kept_exactly_and_others_are_gone():
    """cos(2 pi 3 x / side) is the same wave on fewer pixels; one of 20 periods has none of its own on 32."""

    def wave(side: int, periods: int):
        return torch.cos(2 * torch.pi * periods * torch.arange(side) / side).expand(1, 3, side, side)

    torch.testing.assert_close(low_frequencies(wave(64, 3) + 0.7, 32), wave(32, 3) + 0.7, atol=1e-5, rtol=0)
    torch.testing.assert_close(low_frequencies(wave(63, 3).mT, 27), wave(27, 3).mT, atol=1e-5, rtol=0)
    torch.testing.assert_close(low_frequencies(wave(64, 20), 32), torch.zeros(1, 3, 32, 32), atol=1e-5, rtol=0)
    crops = torch.randn(2, 3, 16, 16)
    assert low_frequencies(crops, 16) is crops


@pytest.mark.parametrize("mode", ["cpu", "device-photometric", "device"])
def test_low_frequencies_are_those_of_the_larger_crops_in_every_mode(mode):
    image = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
    small, large = (MultiCrop(size, size // 2, 2, mode=mode, low_frequencies_of=of) for size, of in ((16, (32, 16)), (32, None)))
    found, whole = (crops.finish(crops.collate([crops.cut(image, 3)]), "cpu") for crops in (small, large))
    torch.testing.assert_close(found.global_crops, low_frequencies(whole.global_crops, 16))
    torch.testing.assert_close(found.local_crops, low_frequencies(whole.local_crops, 8))


def test_a_stages_crops_are_what_the_same_network_sees_in_evaluation(tiny):
    """Positions are resized and GAug's widths follow the grid as they do there: one forward pass for both."""
    config = tiny()
    model, _ = build_model(config, torch.device("cpu"))
    backbone = model.teacher.backbone
    images = torch.randn(2, 3, 16, 16)
    views, tokens = model.targets(images, 2)
    assert tokens.grid == (2, 2) and tuple(backbone.patch_embed.grid_size) == (4, 4)
    backbone.eval()
    torch.testing.assert_close(
        views["dino"], model.teacher.heads["dino"](type("V", (), {"cls": features(backbone, images)[:, None]}))
    )


# --- runs ----------------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_at_a_change_of_stage_goes_on_to_the_same_losses(tiny):
    whole = tiny("checkpoint.every_steps=1", "checkpoint.keep_last=20", run="whole")
    summary = pretrain(whole)
    assert summary["steps"] == 9 and summary["samples_seen"] == 192
    assert seen(whole.run_dir) == [32, 64, 96, 112, 128, 144, 160, 176, 192]
    again = tiny("checkpoint.every_steps=1", "checkpoint.keep_last=20", run="again")
    pretrain(again, resume=f"{whole.run_dir}/checkpoints/step_00000003")
    assert losses(again.run_dir) == {step: loss for step, loss in losses(whole.run_dir).items() if step > 3}
    changes = [
        (event["step"], event["number"], event["batch"])
        for event in read_jsonl(f"{whole.run_dir}/events.jsonl")
        if event["kind"] == "stage"
    ]
    assert changes == [(3, 2, 16), (6, 3, 16)]
    rows = rows_of(open_run(whole.run_dir))
    assert [row[1:6] for row in rows[:3]] == [
        ("0", "3", "96", "32", "2 x 16 + 2 x 8"), ("3", "3", "48", "16", "2 x 24 + 3 x 16"), ("6", "3", "48", "16", "2 x 32 + 2 x 16"),
    ]  # fmt: skip


def both(path: str, overrides: list[str]) -> None:
    pretrain(load(path, overrides))


@pytest.mark.slow
def test_two_ranks_see_what_one_sees(textures, tmp_path):
    """The same samples, crops and batches, so the same losses but for the order of sums."""
    path = str(write_config(textures, tmp_path))
    common = [STAGES, "backbone.drop_path_rate=0", "log.every_steps=1"]
    pretrain(load(path, [*common, f"run_dir={tmp_path}/one"]))
    run_ranks(both, 2, path, [*common, f"run_dir={tmp_path}/two"])
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert seen(tmp_path / "one") == seen(tmp_path / "two")
    assert list(one) == list(two) and all(two[step] == pytest.approx(one[step], rel=1e-4) for step in one)


@pytest.mark.slow
def test_killed_around_the_changes_of_stage_and_resumed_losses_are_bit_identical(textures, tmp_path):
    config = str(write_config(textures, tmp_path))
    common = [STAGES, "optim.epochs=6", "data.workers=2"]
    assert run_command("pretrain", config, *common, f"run_dir={tmp_path}/whole").returncode == 0
    expected, run, rng = losses(tmp_path / "whole"), tmp_path / "broken", random.Random(0)
    common += ["checkpoint.every_steps=1", f"run_dir={run}"]
    for step in (8, 10, 17, 19):  # the stages change at 9 and 18
        process = Command("pretrain", config, *common)
        while process.poll() is None and len(losses(run)) < step:
            time.sleep(0.02)
        time.sleep(0.05 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run_command("pretrain", config, *common).returncode == 0
    assert losses(run) == expected and len(expected) == 27


def test_a_replay_is_finished_as_its_stage_was(tiny):
    """What a step that went wrong saw is saved as it was cut, and says of which stage it is."""
    config = tiny()
    crops = StagedCrops([stage.crops.options() for stage in config.crops.resolved()])
    image = torch.zeros(40, 40, 3, dtype=torch.uint8).numpy()
    sides = []
    for of_stage in crops.stages:
        payload = of_stage.collate([of_stage.cut(image, 1)])
        sides.append((crops.finish(payload, "cpu").global_crops.shape[-1], len(crops.finish(payload, "cpu").local_crops)))
    assert sides == [(16, 2), (24, 3), (32, 2)]


# --- what is told and counted --------------------------------------------------------------------------------------------------


def test_operations_memory_and_probes_count_each_stage(tiny):
    config = tiny()
    small, middle, large = operations_of_stages(config).stages
    assert small < middle < large
    assert operations_of_run(config) == pytest.approx(0.5 * small + 0.25 * middle + 0.25 * large)
    assert training_forwards(config) == pytest.approx(0.5 * (4 / 4 + 2 / 16) + 0.25 * (4 * 0.5625 + 3 / 4) + 0.25 * (4 + 2 / 4))
    # half as many pixels a side at four times the batch take more than the last stage: its scores and crops grow with the images
    networks = without_memory(config)
    wide = tiny(STAGES.replace("batch_size: 32", "batch_size: 256"))
    assert (
        memory_of(wide, 1, networks).total
        > memory_of(config, 1, networks).total
        == memory_of(tiny("crops.stages=[]"), 1, networks).total
    )


def test_the_eta_knows_that_later_steps_cost_more():
    stages = [RunStage(0, 50, None, 10), RunStage(1, 100, None, 10)]
    bar = _Bar("x", 10, "steps", 0)
    bar.work = work(stages, 0, 0, 100, [1.0, 3.0])
    bar.update()
    bar.done, bar.began = 5, time.monotonic() - 4  # four steps in four seconds
    assert "ETA 15 s" in bar.words()


def test_a_dry_run_lists_the_stages(textures, tmp_path, capsys):
    config = write_config(textures, tmp_path)
    from ssl_locat.pretraining.summary import dry_run

    dry_run(load(str(config), [STAGES]))
    said = capsys.readouterr().out
    assert "stage 1, to 50 % of the run: 96 images in 3 steps of 32, from step 0; crops 2 x 16 + 2 x 8 px" in said
    assert "of what the last stage's whole crops would cost throughout" in said


@pytest.mark.parametrize(
    ("crops", "words"),
    [
        ("[{until: 0.5}, {until: 0.4}]", "stage 2 ends at until 0.4, stage 1 at 0.5: each stage ends later than the one before it"),
        ("[{until: 0.5}, {until: 0.9}]", "the last stage ends at until 0.9: nothing says how the run goes on. Set it to 1.0"),
        ("[{until: 50}, {until: 1.0}]", "until is 50; it should be less than or equal to 1"),
        ("[{global_size: 16}, {until: 1.0}]", "'crops.0.until' is missing"),
        ("[{until: 0.5, gobal_size: 16}, {until: 1.0}]", "Did you mean 'global_size'"),
        ("[{until: 0.5, mean: [0.5, 0.5, 0.5]}, {until: 1.0}]", "Here it is crops.mean"),
        ("[{until: 0.5, low_frequencies_of: [16, 8]}, {until: 1.0, global_size: 32, local_size: 16}]", "smaller than the crops made of it"),
        ("[{until: 0.5, batch_size: 7}, {until: 1.0}]", "batch_size of stage 1 is 7, not divisible by optim.accumulate_steps 2"),
        ("[{until: 0.5, global_size: 20}, {until: 1.0, global_size: 32, local_size: 16}]", "global_size is 20 pixels in stage 1"),
        ("[]", "is an empty list"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_the_users_words(textures, tmp_path, crops, words):
    path = write_config(textures, tmp_path)
    with pytest.raises(ConfigError) as refused:
        check(load(str(path), [f"crops={crops}", "optim.accumulate_steps=2"]))
    assert words in str(refused.value)


def test_what_a_stage_does_not_name_is_as_beside_the_list_and_the_resolved_config_says_the_same(tiny, tmp_path):
    stages = json.dumps(
        [{"until": 0.5, "global_size": 16}, {"until": 1.0, "global_size": 48, "num_local": 3, "keep_patches": 0.5}]
    )
    by_list, by_key = tiny(f"crops={stages}"), tiny(f"crops.stages={stages}")
    for config, local, count in ((by_list, 96, 8), (by_key, 16, 2)):
        (tmp_path / "resolved.yaml").write_text(config.to_yaml())
        for read in (config, load(str(tmp_path / "resolved.yaml"))):
            first, last = (stage.crops for stage in read.crops.resolved())
            assert (first.global_size, first.local_size, first.num_local, first.keep_patches) == (16, local, count, 1.0)
            assert (last.global_size, last.local_size, last.num_local, last.keep_patches) == (48, local, 3, 0.5)
            assert read.crops.global_size == 48 and last.options() == read.crops.options()
        assert load(str(tmp_path / "resolved.yaml")) == config
    assert stages_of(by_list, 100)[0].ends == 50
