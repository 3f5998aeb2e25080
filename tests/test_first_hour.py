"""What a newcomer meets in the first hour: answers before torch is imported, help with examples, keys by other projects' names."""

import os
import subprocess
import sys

import pytest

from ssl_locat import cli
from ssl_locat.config import habits
from ssl_locat.config.models import NAMES, doubt, known_names
from ssl_locat.config.schema import Config, load
from ssl_locat.config.yaml_files import names
from ssl_locat.errors import ConfigError
from ssl_locat.measure.machine import Load, band

# command lines that are wrong, and a part of what is said; none needs torch to be told
MISTAKES = {
    "pretrain nope": "nor a folder of images or shards",
    "pretrain quickstrat": "Did you mean 'quickstart'?",
    "pretrain no/such/folder": "nor a folder of images or shards",
    "pretrain quickstart batch_size=64": "optim.global_batch_size=64",
    "pretrain quickstart --lr 0.1": "optim.lr=0.1",
    "pretrain quickstart --batch-size=32": "optim.global_batch_size=32",
    "pretrain quickstart epochs=3": "optim.epochs=3",
    "pretrain quickstart precision=bf16-mixed": "precision=bf16",
    "pretrain quickstart data.make=null data.train=nowhere": "nowhere does not exist",
    "pretrain quickstart data.make=null data.train=nowhere/*.tar": "matches nothing",
    "pretrain quickstart --on nowhere": "Shipped in launch/",
    "pretrain quickstart probes.knnn={}": "Did you mean 'knn'",
    "pretrain quickstart backbone.init=nowhere": "there is no nowhere",
    "init nowhere": "nowhere does not exist",
    "doctor nowhere": "neither a YAML file nor a shipped name",
    "evaluate nowhere runs/x": "neither a YAML file nor a shipped name",
    "evaluate knn nowhere data.train=. data.test=.": "there is no nowhere",
    "evaluate knn vit_small_patch16_224 data.train=. data.test=.": "Did you mean timm:vit_small_patch16_224?",
    "evaluate knn runs/x --batch_size 8": "batch_size=8",
    "export nowhere out": "there is no nowhere",
    "features nowhere . out": "there is no nowhere",
    "features timm:vit_tiny_patch16_224 nowhere out": "nowhere does not exist",
    "report nowhere": "nowhere is no folder",
    "table nowhere": "Shipped in eval/tables",
}


def answer(capsys, line: str) -> tuple[int, str]:
    code = cli.run_command(line.split())
    shown = capsys.readouterr()
    return code, shown.out + shown.err


ALL_AT_ONCE = """
import json, sys
from ssl_locat import cli
codes = [cli.run_command(line.split()) for line in json.loads(sys.argv[1])]
print(json.dumps({"codes": codes, "loaded": sorted({"torch", "timm", "torchvision", "matplotlib"} & set(sys.modules))}))
"""


def test_mistakes_are_answered_without_torch(tmp_path, capsys, monkeypatch):
    import json

    lines = [line for line in MISTAKES if not line.startswith("features timm:")]
    done = subprocess.run(
        [sys.executable, "-c", ALL_AT_ONCE, json.dumps(lines)], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"codes": [2] * len(lines), "loaded": []}, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", MISTAKES)
def test_each_mistake_says_what_to_do(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = answer(capsys, line)
    assert code == 2 and MISTAKES[line] in said, said


@pytest.mark.parametrize("command", ["", *(command.callback.__name__ for command in cli.app.registered_commands)])
def test_every_help_has_an_example_and_answers_to_h(command, capsys):
    code, said = answer(capsys, f"{command} -h".strip())
    assert code == 0 and "Examples:" in said and "<bool>" not in said
    assert f"ssl-locat {command}".strip() in said.split("Examples:")[1]


def test_help_lists_what_ships_and_the_keys_of_a_protocol(capsys):
    assert all(name in answer(capsys, "table --help")[1] for name in names("eval/tables"))
    assert all(name in answer(capsys, "pretrain --help")[1].replace("\n", " ") for name in ("quickstart", "slurm"))
    said = answer(capsys, "evaluate knn --help")[1]
    assert "temperature" in said and "a number above 0" in said and "data.max_bad" in said
    assert "patches" in answer(capsys, "evaluate features --help")[1]


def test_the_shell_completes_names():
    environment = {
        **os.environ,
        "_SSL_LOCAT_COMPLETE": "complete_bash",
        "COMP_WORDS": "ssl-locat pretrain quick",
        "COMP_CWORD": "2",
    }
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'ssl-locat'; from ssl_locat.cli import main; main()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["quickstart"], done.stderr


LEAVES = """
import atexit, multiprocessing, sys, threading, time
from ssl_locat.cli import leave
def late():
    time.sleep(0.3)
    print("thread", flush=True)
if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    child.start()
    print(child.pid)
    atexit.register(print, "handler")
    threading.Thread(target=late).start()
    sys.stdout.write("buffered ")
    leave(5)
"""


def test_leaving_waits_for_threads_and_handlers_and_ends_children():
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=60)
    pid, *words = done.stdout.split()
    assert done.returncode == 5 and words == ["buffered", "thread", "handler"], done.stdout + done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_foreign_keys_lead_to_keys_that_exist():
    free = {"backbone": None, "objective": None}  # options of a part, which its own signature knows
    for theirs, ours in habits.HABITS.items():
        section, _, key = ours.partition(".")
        field = Config.model_fields[section]
        assert section in free or not key or key in field.annotation.model_fields, f"{theirs} -> {ours}"


def test_a_nested_foreign_key_is_answered_too():
    with pytest.raises(ConfigError, match=r"unknown key 'optim\.batch_size'\. Here it is optim\.global_batch_size"):
        load("quickstart", ["optim.batch_size=8"])


def test_a_probe_set_to_null_is_off():
    assert "knn" in load("quickstart").probes.options
    assert load("quickstart", ["probes.knn=null"]).probes.options == {}


def test_model_names_are_those_of_this_timm_and_never_the_reason_to_refuse(monkeypatch):
    known = known_names()
    if known is None:
        pytest.skip("the list of names was made from another timm")
    # in a process of its own: other tests register models
    listing = subprocess.run([sys.executable, "-m", "ssl_locat.models.names"], capture_output=True, text=True, check=True).stdout
    assert NAMES.read_text() == listing, "python -m ssl_locat.models.names > ssl_locat/config/model_names.txt"
    assert "Did you mean 'locatvit_tiny'" in doubt("locatvit_tny") and doubt("vit_small_patch16_224.dino") is None


@pytest.mark.parametrize(
    ("seconds", "load", "said"),
    [
        (3600, Load(0.1, 2), "48 to 75 min"),
        (3600, Load(9, 2), "9 to 75 min"),
        (40, Load(0, 1), "32 to 50 s"),
        (200_000, Load(0, 1), "1.9 to 2.9 d"),
    ],
)
def test_estimates_are_bands_and_say_when_the_machine_is_busy(seconds, load, said):
    assert band(seconds, load) == said
    assert ("busy now, load 9 on 2 cores" in load.words()) is (load.processes > 2)
