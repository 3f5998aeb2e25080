"""doctor looks at real machines, data and runs; nothing in it is faked but the time it takes to measure."""

import shutil

import pytest
from trained import trained_run, write_config  # noqa: F401

from ssl_locat.data.shards.textures import make_textures
from ssl_locat.doctor.doctor import doctor
from ssl_locat.errors import ConfigError, DataError, UserError
from ssl_locat.measure import step as step_measure
from ssl_locat.measure.images import sample_data
from ssl_locat.measure.step import step_device
from ssl_locat.pretraining import memory
from ssl_locat.pretraining.step_times import step_times


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(step_measure, "SECONDS", 0.01)


@pytest.fixture
def config(tmp_path):
    make_textures(tmp_path / "set", num_train=96, num_test=40, image_size=32, progress=False)
    return str(write_config(tmp_path))


@pytest.fixture
def said(capsys):
    """What was written to stderr; stdout must stay empty, it belongs to --json."""
    from ssl_locat.runs.log import console

    console.cache_clear()

    def read() -> str:
        out, err = capsys.readouterr()
        assert out == ""
        return err

    yield read
    console.cache_clear()


def test_the_machine_is_described(said):
    assert doctor() == 0
    text = said()
    for part in ("Environment", "torch 2.", "Attention on", "reference, sdpa", "Extras installed", "Slurm"):
        assert part in text


def test_a_config_is_measured_and_its_bottleneck_named(config, said):
    assert doctor(config, ["optim.global_batch_size=32"]) == 0
    text = said()
    for part in (
        "96 images",
        "100 % JPEG",
        "32..32 x 32..32 px",
        "6 steps of 32 images",
        "images/s",
        "First bottleneck: ",
        "Memory per rank: about 0.",
        "GB by count (",
    ):
        assert part in text
    assert "A global batch of 32 makes a noisy centre" in text


@pytest.mark.parametrize("mode", ["cpu", "device-photometric", "device"])
def test_crops_are_finished_as_they_were_cut(config, said, mode):
    """In every mode, so that a GPU, for which "auto" chooses another one than a CPU does, can be measured too."""
    assert doctor(config, ["optim.global_batch_size=32", f"crops.mode={mode}"]) == 0
    assert "images/s" in said()


@pytest.mark.gpu
def test_on_a_gpu_attention_takes_its_share(config):
    from ssl_locat.config.schema import load
    from ssl_locat.data.shards.index import open_dataset

    loaded = load(config, [])
    sample = sample_data([open_dataset(loaded.data.train)], loaded, step_device(loaded.device))
    times = step_times(loaded, sample.payload, 16)
    assert times.device.type == "cuda" and 0.01 < times.attention / (times.step + times.transfer) < 0.9


def test_ranks_come_from_the_profile(config, said):
    doctor(config, on="slurm,nodes=2,ntasks_per_node=2")
    assert "4 ranks x 1 accumulated x 4" in said()
    with pytest.raises(ConfigError, match="3 ranks"):
        doctor(config, on="slurm,nodes=3,ntasks_per_node=1")


@pytest.mark.parametrize(
    "on, times, warned",
    [
        (None, "1.00", False),
        ("slurm,nodes=1,ntasks_per_node=8", "1.00", False),
        ("slurm,nodes=1,ntasks_per_node=16", "2.00", True),
    ],
)
def test_how_often_samples_are_fetched_and_what_lies_in_memory_is_counted_for_local_data_too(config, said, on, times, warned):
    doctor(config, ["optim.global_batch_size=32", "data.workers=2"], on=on)
    text = said()
    assert f"a reader for 2 decoding workers: every sample fetched {times} times a pass" in text
    assert "Raw samples in memory: at most 1.00 GiB a rank (data.read_memory_gb=1), 0.00 of it for shuffling" in text
    assert ("so that each sample is fetched 2.0 times: give each rank" in text) is warned


def test_what_needs_much_memory_is_told(config, said, monkeypatch):
    """Windows that samples are shuffled in; scores of prototypes, were there many more."""
    counted = memory._scores
    monkeypatch.setattr(memory, "_scores", lambda *given: 10**6 * counted(*given))
    doctor(config, ["optim.global_batch_size=32", "data.read_memory_gb=0.00001"])
    text = said()
    assert "GiB a rank, more than data.read_memory_gb=1e-05: more ranks, smaller files" in text
    assert "GB are scores of prototypes: objective.prototype_block=8192 makes them a block at a time" in text


@pytest.mark.parametrize("epochs, every, times, costly", [(200, 50, 5, False), (20, 1, 21, True)])
def test_what_probes_cost_is_told_before_the_run(config, said, epochs, every, times, costly):
    doctor(config, ["optim.global_batch_size=32", f"optim.epochs={epochs}", f"probes.every_epochs={every}"])
    text = said()
    assert f"Probes: knn {times} times 136 images" in text
    assert ("Probes cost more than 5 % of the training: raise probes.every_epochs" in text) is costly


def test_damaged_data_is_counted_shown_and_stops(tmp_path, said):
    folder = tmp_path / "images"
    folder.mkdir()
    make_textures(tmp_path / "set", num_train=96, num_test=40, image_size=32, progress=False)
    from PIL import Image

    for number in range(20):
        Image.new("RGB", (40, 30), (number, 90, 9)).save(folder / f"{number:02d}.jpg")
    (folder / "07.jpg").write_bytes(b"this is no image")
    config = str(write_config(tmp_path, data={"train": str(folder), "workers": 0}, probes={}))
    assert doctor(config) == 2
    text = said()
    assert "Unreadable: 1 of 20" in text and "07" in text and "exit code 3" in text and "shards check" not in text  # a folder


def test_wrong_input_is_the_users_mistake(config, tmp_path):
    with pytest.raises(DataError):
        doctor(config, [f"data.train={tmp_path}/nothing-*.tar"])
    with pytest.raises(ConfigError):
        doctor("quickstartt")


def test_a_finished_run_is_explained(trained_run, said):  # noqa: F811
    assert doctor(str(trained_run)) == 0
    text = said()
    assert "Finished: 12 of 12 steps, 192 images" in text or "Finished: 12 steps, 192 images" in text
    assert "k-NN top-1" in text and "ssl-locat report" in text
    with pytest.raises(UserError, match="run folder"):
        doctor(str(trained_run), on="slurm")


@pytest.mark.parametrize(
    ("kind", "said_about_it"),
    [("preempt", "Preempted, and saved"), ("diverged", "Diverged"), ("outage", "did not answer"), ("", "Running, or stopped")],
)
def test_unfinished_runs_are_explained_by_their_last_event(trained_run, tmp_path, said, kind, said_about_it):  # noqa: F811
    from ssl_locat.runs.log import EventLog

    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    (run / "summary.json").unlink()
    lines = [line for line in (run / "events.jsonl").read_text().splitlines(keepends=True) if '"finish"' not in line]
    (run / "events.jsonl").write_text("".join(lines))
    if kind:
        EventLog(run).add(kind, step=12)
    doctor(str(run))
    assert said_about_it in said()
