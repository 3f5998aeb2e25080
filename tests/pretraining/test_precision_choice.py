"""`precision: auto`: decided by timing the run's own steps, said, written down, kept by every resume and the same on all ranks."""

import logging
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from tiny_run import losses, write_config

from ssl_locat.config.schema import load
from ssl_locat.data.shards.textures import make_textures
from ssl_locat.measure.images import sample_data
from ssl_locat.pretraining import precision_choice, setup
from ssl_locat.pretraining.loop import pretrain
from ssl_locat.pretraining.memory import memory_of
from ssl_locat.pretraining.parts import check
from ssl_locat.pretraining.precision_choice import decide_precision, low_precision, measure_steps
from ssl_locat.pretraining.step_times import step_times
from ssl_locat.runs import folder
from ssl_locat.runs.folder import cpu_features, cpu_instructions, read_config

CPU = torch.device("cpu")
OBJECTIVE = (
    "{name: dino, num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16, batch_norm: true, targets: sinkhorn, min_images: 1}"
)
LENGTH = ["optim.epochs=null", "optim.total_steps=4", "checkpoint.every_steps=2", "log.every_steps=1", "precision=auto"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    make_textures(folder / "set", num_train=64, num_test=10, image_size=32, progress=False)
    return write_config(folder / "set", folder)


def test_16_bits_are_tried_where_the_machine_multiplies_them(monkeypatch):
    for features, expected in ((set(), None), ({"avx2", "avx512f"}, None), ({"avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16")):
        monkeypatch.setattr(precision_choice, "cpu_features", lambda features=features: features)
        assert low_precision(CPU) == expected
    for capability, expected in (((6, 1), None), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert low_precision(torch.device("cuda")) == expected


def test_the_faster_one_is_taken_and_fp32_in_doubt(config_file, monkeypatch):
    config = load(str(config_file), LENGTH)
    monkeypatch.setattr(precision_choice, "cpu_features", lambda: {"avx512_bf16"})
    for fp32, expected in ((1.2, "bf16"), (1.02, "fp32"), (0.5, "fp32")):
        monkeypatch.setattr(precision_choice, "measure_steps", lambda *_, fp32=fp32: ({"fp32": fp32, "bf16": 1.0}, 8))
        chosen, why = decide_precision(config, CPU, 16)
        assert chosen == expected and f"{1000 * fp32:.1f} ms in fp32, 1000.0 ms in bf16" in why
    monkeypatch.setattr(precision_choice, "cpu_features", set)
    assert decide_precision(config, CPU, 16) == ("fp32", "this cpu has no instructions that multiply 16-bit numbers")


def test_the_choice_is_written_down_and_kept(config_file, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    config = load(str(config_file), [*LENGTH, f"run_dir={tmp_path / 'run'}"])
    monkeypatch.setattr(precision_choice, "cpu_features", lambda: {"avx512_bf16"})
    monkeypatch.setattr(precision_choice, "_GAIN", 0.0)  # whatever is faster here
    pretrain(config)
    assert read_config(config.run_dir).precision == "bf16" and "precision auto: bf16 (forward and backward of" in caplog.text
    whole = losses(config.run_dir)
    # on a machine that would choose otherwise
    monkeypatch.setattr(setup, "decide_precision", None)
    on = config.model_copy(update={"run_dir": str(tmp_path / "on")})
    pretrain(on, resume=f"{config.run_dir}/checkpoints/step_00000002")
    assert losses(on.run_dir) == {step: whole[step] for step in (3, 4)}
    assert read_config(on.run_dir).precision == "bf16"
    assert "precision auto: bf16 (as at the first start of this run)" in caplog.text


def test_a_real_step_is_timed_in_each_precision(config_file):
    """With a loss that gathers, heads of its own and masks, of as few images as there are."""
    head = "num_prototypes: 32, hidden_dim: 32, bottleneck_dim: 16, targets: sinkhorn, min_images: 1"
    config = load(str(config_file), [*LENGTH, f"objective=[{{name: dino, {head}}}, {{name: ibot, {head}}}]"])
    seconds, images = measure_steps(config, CPU, 3, ("fp32", "bf16"))
    assert min(seconds.values()) > 0 and list(seconds) == ["fp32", "bf16"] and images == 3
    assert memory_of(config).total == memory_of(config.model_copy(update={"precision": "fp32"})).total


def test_tf32_is_a_setting(config_file, tmp_path):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for value in ("true", "false"):
            setup.set_up(load(str(config_file), [f"tf32={value}", f"run_dir={tmp_path / value}"]))
            assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if value == "true" else "ieee")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_instructions_are_named_as_people_do(monkeypatch):
    assert cpu_features() or not Path("/proc/cpuinfo").exists()
    for features, expected in (
        ({"avx2"}, ["AVX2"]),
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, ["AVX-512", "bf16", "AMX"]),
        (set(), []),
    ):
        monkeypatch.setattr(folder, "cpu_features", lambda features=features: features)
        assert cpu_instructions() == expected


@pytest.mark.slow  # two processes
def test_ranks_agree(config_file, tmp_path):
    """Each believes its own numbers alone would decide; rank 0's do, and both take part in what losses gather."""
    found = run_ranks(_precision_on_ranks, 2, config_file, tmp_path, seconds=120)
    assert found == [["fp32", True], ["fp32", True]]


@pytest.mark.slow  # two processes
def test_one_rank_times_steps_while_the_others_wait(config_file):
    """As rank 0 does for crops.mode on a GPU: Sinkhorn and batch norm would else wait for ranks that take no steps."""
    assert run_ranks(_timed_on_one_rank, 2, config_file, seconds=120) == [[1, 2], [1, 2]]


def _timed_on_one_rank(file: Path) -> list:
    from ssl_locat.runs.distributed import alone, broadcast_object, rank, world_size

    config = load(str(file), [*LENGTH, f"objective={OBJECTIVE}", "precision=fp32"])
    found = None
    if rank() == 0:
        datasets = check(config)[0]
        payload = sample_data(datasets, config, CPU).payload
        with alone():
            found = world_size()
            assert step_times(config, payload, 4).step > 0
    return [broadcast_object(found), world_size()]


def _precision_on_ranks(file: Path, folder: Path) -> list:
    from ssl_locat.runs.distributed import rank

    precision_choice.cpu_features = lambda: {"avx512_bf16"} if rank() == 0 else set()  # type: ignore[assignment]
    precision_choice._GAIN = 1e9 if rank() == 0 else 0.0
    config = load(str(file), [*LENGTH, f"objective={OBJECTIVE}", f"run_dir={folder}/ranks"])
    pretrain(config)
    return [read_config(config.run_dir).precision, len(losses(config.run_dir)) == 4]
