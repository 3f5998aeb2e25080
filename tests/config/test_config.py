"""Wrong input in a YAML ends in one message: place, key, value, what was expected, the nearest valid key."""

import subprocess
import sys

import pytest
import yaml

from ssl_locat.config.schema import Config, load
from ssl_locat.config.yaml_files import dump_yaml, load_yaml, names
from ssl_locat.errors import ConfigError

MINIMAL = """\
run_dir: runs/x
data: {train: "shards-{0..3}.tar"}
backbone: {name: locatvit_tiny}
objective: {name: dino}
optim:
  epochs: 10
  global_batch_size: 64
"""


@pytest.fixture
def config_file(tmp_path):
    def write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", names("configs/pretrain"))
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name):
    from ssl_locat.config.yaml_files import find

    config = load(name)
    assert config.data.train
    head = find(name, "configs/pretrain").read_text().split("\n\n")[0]
    for word in ("#", f"ssl-locat pretrain {name}", "loop.py"):
        assert word in head, f"{name}.yaml should open with what it is, its command and the file that reads it; missing: {word}"


def test_resolved_config_rebuilds_itself(config_file):
    config = load("quickstart", ["optim.lr=2e-3", "data.workers=0"])
    again = load(config_file(config.to_yaml()))
    assert again == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", ["unknown key 'optim.lrr'", "Did you mean 'lr'?"]),
        ("optimm.lr=1", ["unknown key 'optimm'", "Did you mean 'optim'?"]),
        ("optim.lr=fast", ["optim.lr is 'fast'", "number"]),
        ("optim.lr=true", ["lr is True", "number"]),
        ("optim.lr=-1", ["optim.lr is -1", "greater than 0"]),
        ("optim.epochs=null", ["exactly one of epochs and total_steps"]),
        ("optim.global_batch_size=null", ["optim.global_batch_size is None"]),
        ("optim.accumulate_steps=3", ["not divisible by accumulate_steps 3", "63, 66"]),
        ("crops.global_scale=[0.4, 2]", ["global_scale", "[0.4, 2.0]", "smallest <= largest <= 1"]),
        ("objective.name=dinoo", ["objective.name is 'dinoo'", "Did you mean 'dino'?", "package.module:Class"]),
        ("objective.num_prototpes=3", ["unknown key 'objective.num_prototpes'", "Did you mean 'num_prototypes'?"]),
        ("data.train=[{shards: a, wieght: 2}]", ["unknown key 'data.train.0.wieght'", "Did you mean 'weight'?"]),
        ("precision=fp61", ["precision is 'fp61'", "'fp32', 'bf16' or 'fp16'"]),
        ("optim.betas=[1.5, 2]", ["optim.betas.0 is 1.5", "less than 1"]),
        ("crops.std=[0.2, 0, 0.2]", ["crops.std.1 is 0", "greater than 0"]),
        ("teacher.momentum=[2, 3]", ["teacher.momentum.0 is 2", "less than or equal to 1"]),
        ("crops.blur_prob=[3, 0, 0]", ["crops.blur_prob.0 is 3", "less than or equal to 1"]),
        ("objective=[{name: dino}, {name: dino}]", ["objective", "dino, dino", "each once"]),
        ("objective=[]", ["objective", "at least one"]),
        ("nonsense", ["'nonsense'", "key.sub=value"]),
        ("checkpoint=5", ["checkpoint is 5; expected keys and values (every_steps, keep_last"]),
        ("crops=x", ["crops is 'x'; expected keys and values (global_size"]),
        ("optim.\u00b2=1", ["unknown key 'optim.\u00b2'"]),
        (f"optim.{'9' * 5000}=1", ["unknown key 'optim.999"]),
        (f"seed={'9' * 5000}", ["seed is '999", "integer"]),
        (f"seed={'[' * 3000}", ["seed is '[[", "integer"]),
        ("seed=2024-13-45", ["seed is '2024-13-45'", "integer"]),
    ],
)
def test_wrong_override_is_explained(config_file, override, expected):
    with pytest.raises(ConfigError) as error:
        load(config_file(MINIMAL), [override])
    for words in expected:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective=[3]", "objective.0 is 3; expected keys and values (name, weight, weight_until)."),
        ("objective={dino: 3}", "the key 'objective.name' is missing. It must be given: which loss"),
        ("objective.name=[a]", "objective.name is ['a']; it should be a valid string."),
    ],
)
def test_of_what_may_be_one_or_a_list_the_kind_that_was_meant_complains(config_file, override, expected):
    with pytest.raises(ConfigError) as error:
        load(config_file(MINIMAL), [override])
    (line,) = str(error.value).splitlines()
    assert expected in line


def test_error_names_file_and_line(config_file):
    path = config_file(MINIMAL.replace("  epochs: 10", "  epochs: ten"))
    with pytest.raises(ConfigError, match=r"run\.yaml:6: optim\.epochs is 'ten'"):
        load(path)


def test_missing_key_is_named(config_file):
    with pytest.raises(ConfigError, match=r"key 'data\.train' is missing"):
        load(config_file(MINIMAL.replace('{train: "shards-{0..3}.tar"}', "{workers: 1}")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("- a\n- b", "expected `key: value` lines"),
        ("run_dir: [", r"run\.yaml:1: not valid YAML"),
        ("run_dir: a\nrun_dir: b", "run_dir is given twice"),
        ("run_dir: !!python/object/apply:os.getcwd []", "Only plain YAML values"),
        ("base: nowhere", "base file not found"),
        (
            "a: &a [*a]",
            r"run\.yaml:1: not valid YAML: aliases are not read; write the value of \*a out, or share it in a `base:` file",
        ),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", r"run\.yaml:2: not valid YAML: aliases are not read"),
        ("optim:\n  lr: 1\nseed: 2024-13-45", r"run\.yaml:3: '2024-13-45' cannot be read as a value \(month must be in 1"),
        ("seed: " + "9" * 5000, r"run\.yaml:1: '9{40}\.\.\.' cannot be read as a value"),
        ("seed: !!bool maybe", r"run\.yaml:1: 'maybe' cannot be read as a value"),
        ("seed: !!timestamp noon", r"run\.yaml:1: 'noon' cannot be read as a value"),
        ("seed: " + "[" * 3000, r"run\.yaml:1: not valid YAML: nested more than 50 levels deep"),
        ("[a]: 1", r"run\.yaml:1: found unhashable key"),
        ("a: \x07", r"run\.yaml: not valid YAML"),
    ],
)
def test_broken_file_is_explained(config_file, text, expected):
    with pytest.raises(ConfigError, match=expected):
        load(config_file(text))


def test_an_override_of_something_without_keys_is_explained(config_file):
    with pytest.raises(ConfigError, match=r"data\.train\.0 is 'a\.tar', which has no keys; give data\.train\.0 as a whole"):
        load(config_file(MINIMAL), ["data.train=[a.tar]", "data.train.0.weight=2"])


def test_a_glob_as_override_is_no_alias(config_file):
    assert load(config_file(MINIMAL), ["data.train=*.tar"]).data.train == "*.tar"


def test_bases_merge_and_a_circle_is_refused(config_file):
    config_file(MINIMAL, "below.yaml")
    config = load(config_file("base: below\noptim: {lr: 5e-3}"))
    assert config.optim.lr == 5e-3 and config.optim.global_batch_size == 64
    config_file("base: run.yaml", "other.yaml")
    with pytest.raises(ConfigError, match=r"circle: .*run\.yaml -> .*other\.yaml -> .*run\.yaml"):
        load(config_file("base: other.yaml"))


def test_missing_file_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match="Did you mean 'quickstart'"):
        load("quikstart")
    with pytest.raises(ConfigError, match="no such file"):
        load("nowhere.yaml")


def test_exponents_are_numbers(config_file):
    assert load(config_file(MINIMAL), ["optim.lr=5e-4"]).optim.lr == 5e-4


def test_config_never_changes():
    config = load("quickstart")
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3


def test_config_is_read_without_torch():
    code = "import sys; from ssl_locat.config.schema import load; load('quickstart'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_key_is_described_or_plain():
    plain = yaml.safe_load(load("quickstart").to_yaml())
    assert set(plain) == set(Config.model_fields)


def test_a_run_may_lie_at_home(config_file, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert load(config_file(MINIMAL), ["run_dir=~/runs/a"]).run_dir == "/somewhere/runs/a"


def test_what_is_written_has_no_aliases_which_the_loader_refuses(tmp_path):
    shared = [0.9, 0.999]
    path = tmp_path / "a.yaml"
    path.write_text(dump_yaml({"one": shared, "two": shared}))
    assert load_yaml(str(path)).data == {"one": shared, "two": shared}


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        ("epochs: 3", ["optim.total_steps=7"], (None, 7)),
        ("total_steps: 7", ["optim.epochs=3"], (3, None)),
        ("epochs: 3", ["optim.epochs=null", "optim.total_steps=7"], (None, 7)),
        ("epochs: 3", ["optim.total_steps=null"], (3, None)),
    ],
)
def test_one_length_takes_the_place_of_the_other(tmp_path, below, above, expected):
    """In a file over its base as on the command line; two in one place are still a mistake."""
    rest = "run_dir: r\ndata: {train: x}\nbackbone: {name: vit_tiny_patch16_224}\nobjective: {name: dino}\n"
    (tmp_path / "base.yaml").write_text(f"{rest}optim: {{{below}, global_batch_size: 8}}\n")
    optim = load(str(tmp_path / "base.yaml"), above).optim
    assert (optim.epochs, optim.total_steps) == expected
    given = {key.removeprefix("optim."): value for key, value in (item.split("=") for item in above) if value != "null"}
    lines = "".join(f"  {key}: {value}\n" for key, value in given.items()) or "  lr: 0.1\n"
    (tmp_path / "above.yaml").write_text(f"base: base.yaml\noptim:\n{lines}")
    optim = load(str(tmp_path / "above.yaml")).optim
    assert (optim.epochs, optim.total_steps) == expected
    with pytest.raises(ConfigError, match="exactly one of epochs and total_steps"):
        load(str(tmp_path / "base.yaml"), ["optim.epochs=1", "optim.total_steps=2"])
