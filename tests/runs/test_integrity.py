"""A checkpoint is loaded as it was written, or refused in one message: bit flips, zeros, exchanged files, folders and types, malformed JSON."""

import hashlib
import json
import random
import shutil
import struct
import time

import pytest
import torch
from test_checkpoint import build, saved, train

from ssl_locat.errors import CheckpointError
from ssl_locat.runs.checkpoint import Checkpointer, problem, read_weights
from ssl_locat.runs.marker import DTYPES, KINDS, LONGEST_HEADER, MARKER, write_seal


def tensors(folder):
    return next(folder.glob("*.safetensors"))


def flip_a_bit(folder, _other):
    data = bytearray(tensors(folder).read_bytes())
    data[-100] ^= 1
    tensors(folder).write_bytes(data)


def zero_a_block(folder, _other):
    data = tensors(folder).read_bytes()
    tensors(folder).write_bytes(data[:-512] + bytes(512))


def take_the_other_steps_file(folder, other):
    shutil.copy(tensors(other), tensors(folder))


def exchange_folders(folder, other):
    beside = folder.with_name("beside")
    folder.rename(beside), other.rename(folder), beside.rename(other)


def change_a_type(folder, _other):
    """Integers of the same width: same sizes, other numbers."""
    data = tensors(folder).read_bytes()
    tensors(folder).write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"I32"'))


def edit_the_marker(folder, _other):
    content = json.loads((folder / MARKER).read_text())
    content["meta"]["samples_seen"] += 1
    (folder / MARKER).write_text(json.dumps(content))


def add_a_file(folder, other):
    shutil.copy(tensors(other), folder / "a.safetensors")


DAMAGE = [flip_a_bit, zero_a_block, take_the_other_steps_file, exchange_folders, change_a_type, edit_the_marker, add_a_file]


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_damaged_is_never_loaded_and_the_intact_one_before_it_is_taken(tmp_path, damage, caplog):
    saved(tmp_path, 1, 2, 3)
    first, second, third = sorted((tmp_path / "checkpoints").iterdir())
    damage(third, second)
    found = Checkpointer(tmp_path).newest()
    assert found == (first if damage is exchange_folders else second)
    assert f"{third} is passed over" in caplog.text
    model, optimizer = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="step_00000003"):
        Checkpointer(tmp_path).load(third, {"student": model}, optimizer)
    with pytest.raises(CheckpointError, match="step_00000003"):
        read_weights(third, "student.")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def without_hashes(folder):
    """As version 0.1 wrote it."""
    content = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({key: value for key, value in content.items() if key not in ("sha256", "seal")}))


def test_a_checkpoint_without_hashes_loads_with_one_line_and_its_types_are_compared(tmp_path, caplog):
    saved(tmp_path, 1)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    without_hashes(folder)
    model, optimizer = build()
    assert Checkpointer(tmp_path).load(folder, {"student": model}, optimizer)["step"] == 1
    assert caplog.text.count("its contents cannot be checked") == 1
    change_a_type(folder, None)
    with pytest.raises(CheckpointError, match=r"differs in type .*int32 saved, torch\.float32 here"):
        Checkpointer(tmp_path).load(folder, {"student": model}, optimizer)


MALFORMED = [
    lambda header: header.clear(),
    lambda header: header.update({"student.scale": []}),
    lambda header: header["student.scale"].update(data_offsets=[-4, 0]),
    lambda header: header["student.scale"].update(data_offsets=[4, 0]),
    lambda header: header["student.scale"].update(data_offsets="x"),
    lambda header: header["student.scale"].update(shape=[10**18]),
    lambda header: header["student.scale"].update(shape=[-1]),
    lambda header: header["student.scale"].update(shape=None),
    lambda header: header["student.scale"].update(dtype="F7"),
    lambda header: header["student.scale"].update(dtype=7),
    lambda header: header["__metadata__"].update(DCP_SHARDING_INFO="{}"),
    lambda header: header["__metadata__"].update(DCP_SHARDING_INFO="[" * 100_000),
    lambda header: header["__metadata__"].update(DCP_SHARDING_INFO=json.dumps({"student.scale": {"saved_offsets": [7]}})),
    lambda header: header.pop("student.scale"),
    lambda header: header.update({"student.scale2": header.pop("student.scale")}),
]


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_each_malformed_header_is_one_message(tmp_path, number):
    """Of a checkpoint without hashes, where nothing but the header itself can tell."""
    saved(tmp_path, 1)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    without_hashes(folder)
    data = tensors(folder).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    MALFORMED[number](header)
    text = json.dumps(header).encode()
    tensors(folder).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    content = json.loads((folder / MARKER).read_text())
    content["files"] = {tensors(folder).name: tensors(folder).stat().st_size}
    (folder / MARKER).write_text(json.dumps(content))
    if number in (2, 3, 5, 6):
        assert "does not fit" in problem(folder)
    model, optimizer = build()
    with pytest.raises(CheckpointError):
        Checkpointer(tmp_path).load(folder, {"student": model}, optimizer)


def test_what_a_marker_without_a_seal_lacks_or_has_of_another_type_is_named(tmp_path):
    saved(tmp_path, 1)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    without_hashes(folder)
    whole = json.loads((folder / MARKER).read_text())
    for name in KINDS:
        (folder / MARKER).write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        assert problem(folder) == f"{MARKER} lacks {name}"
        for value in "x", True:
            (folder / MARKER).write_text(json.dumps({**whole, name: value}))
            assert problem(folder) == f"{MARKER}: {name} is {value!r}"


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "7", "{", "\0", "[" * 100_000, '{"format": 1}', '{"format": 1, "step": "x"}', "\ud800"],
    ids=lambda text: repr(text[:9]),
)
def test_each_malformed_marker_is_one_message(tmp_path, text):
    saved(tmp_path, 1)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    (folder / MARKER).write_bytes(text.encode("utf-8", "surrogatepass"))
    model, optimizer = build()
    assert Checkpointer(tmp_path).newest() is None
    with pytest.raises(CheckpointError):
        Checkpointer(tmp_path).load(folder, {"student": model}, optimizer)


@pytest.mark.parametrize("hashed", [True, False])
def test_fuzzed_files_load_as_written_or_are_refused(tmp_path, hashed, pytestconfig):
    """Fixed seed. Without hashes only names, headers and the marker are damaged: nothing could tell a number that is another."""
    saved(tmp_path, 1)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    if not hashed:
        without_hashes(folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    header = 8 + struct.unpack("<Q", tensors(folder).read_bytes()[:8])[0]
    model, optimizer = build()
    Checkpointer(tmp_path).load(folder, {"student": model}, optimizer)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng, refused = random.Random(0), 0
    cases = 150 * pytestconfig.getoption("--fuzz-factor")
    for _ in range(cases):
        name = rng.choice(sorted(whole))
        data = bytearray(whole[name])
        end = len(data) if hashed or name == MARKER else header
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(end)
            change = rng.randrange(3)
            data[at : at + change] = bytes([rng.randrange(256)]) * (1 if change < 2 else rng.randrange(3))
        (folder / name).write_bytes(data)
        try:
            Checkpointer(tmp_path).load(folder, {"student": model}, optimizer)
            assert not hashed or data == whole[name]
        except CheckpointError:
            refused += 1
        if hashed:
            assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
        (folder / name).write_bytes(whole[name])
    assert refused > cases / 2


def test_weights_that_are_no_numbers_are_warned_of(tmp_path, caplog):
    model, optimizer = build()
    train(model, optimizer, 0, 1)
    with torch.no_grad():
        model.body[0].weight[0, 0] = float("nan")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"student": model}, optimizer, {}, block=True)
    checkpointer.load(checkpointer.newest(), {"student": model}, optimizer)
    assert "1 tensors hold NaN or infinity, student.body.0.weight first" in caplog.text


def test_hashes_are_those_of_sha256sum_and_are_made_while_the_file_is_written(tmp_path):
    saved(tmp_path, 1)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    content = json.loads((folder / MARKER).read_text())
    assert content["sha256"] == {tensors(folder).name: hashlib.sha256(tensors(folder).read_bytes()).hexdigest()}
    assert problem(folder, contents=True) is None
    seal = content.pop("seal")
    assert json.loads(write_seal(content))["seal"] == seal


@pytest.mark.slow
def test_what_hashing_costs(tmp_path):
    """A gigabyte of weights: printed; a save with hashes takes less than twice the time of writing and hashing one after the other."""
    model = torch.nn.Linear(16_000, 16_000, bias=False)  # 1.02 GB
    optimizer = torch.optim.SGD(model.parameters())
    checkpointer = Checkpointer(tmp_path)
    began = time.monotonic()
    checkpointer.save(1, {"student": model}, optimizer, {}, block=True)
    save = time.monotonic() - began
    data = tensors(tmp_path / "checkpoints/step_00000001").read_bytes()
    began = time.monotonic()
    hashlib.sha256(data).hexdigest()
    plain = time.monotonic() - began
    began = time.monotonic()
    assert Checkpointer(tmp_path).newest()
    check = time.monotonic() - began
    print(f"{len(data) / 1e9:.2f} GB: saved in {save:.2f} s, checked in {check:.2f} s, SHA-256 alone {plain:.2f} s")
    assert check < 3 * plain + 1


def test_sizes_of_types_are_those_of_the_format():
    floats = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64}
    floats |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool}
    integers = {f"I{8 << n}": getattr(torch, f"int{8 << n}") for n in range(4)}
    integers |= {f"U{8 << n}": getattr(torch, f"uint{8 << n}") for n in range(4)}
    assert {name: dtype.itemsize for name, dtype in (floats | integers).items()} == DTYPES
    assert LONGEST_HEADER == 100_000_000  # safetensors' own
