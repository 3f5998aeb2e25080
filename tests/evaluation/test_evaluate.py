import inspect
import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from scenes import write_split
from trained import trained_run  # noqa: F401

from ssl_locat.config.yaml_files import LoadedYaml, load_yaml, names
from ssl_locat.errors import ConfigError, UserError
from ssl_locat.evaluation import PROTOCOLS
from ssl_locat.evaluation import evaluate as program
from ssl_locat.evaluation.shared.options import annotations, check_arguments
from ssl_locat.models.backbone import load_backbone

YAMLS = [name for name in names("eval") if name not in ("features", "compare")]


@pytest.mark.parametrize("name", YAMLS)
def test_every_shipped_protocol_names_its_function_and_only_its_keys(name):
    protocol, options = program.load_protocol(name, ["data.train=a", "data.test=b"] if name not in ("efficiency",) else [])
    parameters = inspect.signature(program.function_of(protocol)).parameters
    assert set(options) <= set(parameters)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_shipped_protocol_says_the_defaults(name):
    """From Python and from the command line, the same protocol is the same."""
    loaded = load_yaml(name, "eval").data
    for parameter in inspect.signature(program.function_of(name)).parameters.values():
        if parameter.name in loaded and parameter.name != "data":
            default = json.loads(json.dumps(parameter.default))
            assert loaded[parameter.name] == default, parameter.name


def test_every_protocol_has_a_yaml():
    assert {
        program.load_protocol(name, ["data.train=a", "data.test=b"] if name != "efficiency" else [])[0] for name in YAMLS
    } == set(PROTOCOLS)


@pytest.mark.parametrize(
    ("protocol", "overrides", "message"),
    [
        ("knm", [], "Did you mean 'knn'"),
        ("knn", ["data.train=a", "data.test=b", "temprature=0.1"], "unknown key 'temprature'. Did you mean 'temperature'"),
        ("knn", ["data.train=a"], "knn needs data.test"),
        ("linear", [], "linear needs data.train and data.test"),
    ],
)
def test_wrong_input_costs_a_second_and_one_message(protocol, overrides, message):
    with pytest.raises(ConfigError, match=message):
        program.load_protocol(protocol, overrides)


DATA = ["data.train=a", "data.test=b"]


@pytest.mark.parametrize(
    ("protocol", "override", "message"),
    [
        ("knn", "k=abc", "k is 'abc'; expected a whole number of at least 1 or a list of whole numbers of at least 1"),
        ("knn", "k=[-1]", r"k is \[-1\]; expected"),
        ("knn", "k=[]", r"k is \[\]; expected"),
        ("knn", "k=[0]", r"k is \[0\]; expected"),
        ("knn", "temperature=abc", "temperature is 'abc'; expected a number above 0 or a list of numbers above 0"),
        ("knn", "temperature=0", "temperature is 0; expected"),
        ("knn", "image_size=abc", "image_size is 'abc'; expected a whole number of at least 1 or null"),
        ("knn", "image_size=-8", "image_size is -8; expected"),
        ("knn", "image_size=0", "image_size is 0; expected"),
        ("knn", "batch_size=0", "batch_size is 0; expected"),
        ("knn", "batch_size=abc", "batch_size is 'abc'; expected"),
        ("knn", "batch_size=-1", "batch_size is -1; expected"),
        ("knn", "batch_size=true", "batch_size is True; expected"),
        ("knn", "workers=-1", "workers is -1; expected a whole number of at least 0"),
        ("knn", "workers=abc", "workers is 'abc'; expected"),
        ("knn", "seed=abc", "seed is 'abc'; expected"),
        ("knn", "data.num_classes=abc", "data.num_classes is 'abc'; expected"),
        ("knn", "data.max_bad=abc", "data.max_bad is 'abc'; expected"),
        ("knn", "data.train=5", "data.train is 5; expected shards or a folder"),
        ("knn", "data.image_key=5", "data.image_key is 5; expected text or null"),
        ("knn", "data.tset=b", "unknown key 'data.tset'. Did you mean 'test'"),
        ("knn", "data=5", r"data is 5; expected keys and values \(train, test"),
        ("knn", "protocol=[1]", r"protocol is \[1\]; known: knn"),
        ("linear", "epochs=abc", "epochs is 'abc'; expected"),
        ("linear", "lr=abc", "lr is 'abc'; expected a number above 0"),
        ("linear", "augment=maybe", "augment is 'maybe'; expected true or false"),
        ("linear_sweep", "patch_mean=[maybe]", "patch_mean is .*expected a list of true and false"),
        ("segmentation", "iterations=abc", "iterations is 'abc'; expected"),
        ("segmentation", "head=linaer", "expected one of mlp, linear. Did you mean 'linear'"),
        ("segmentation", "scale=[1]", r"scale is \[1\]; expected a list of 2, each a whole number of at least 1"),
        ("efficiency", "image_size=0", "image_size is 0; expected"),
        ("supervised", "distill={weight: 1}", "distill.model is missing; expected text"),
        ("supervised", "distill={model: x, wieght: 1}", "unknown key 'distill.wieght'. Did you mean 'weight'"),
        ("attention", "patches=[[2, 0]]", r"patches is \[\[2, 0\]\]; expected"),
    ],
)
def test_a_wrong_value_is_reported_before_torch_is_loaded(protocol, override, message):
    with pytest.raises(ConfigError, match=message):
        program.load_protocol(protocol, ([] if protocol == "efficiency" else DATA) + [override])


def test_every_option_of_every_protocol_is_checked():
    """An argument without a type of options.py could hold anything."""
    for name, target in [*PROTOCOLS.items(), ("features", "ssl_locat.evaluation.protocols.dump:dump")]:
        module, _, function = target.partition(":")
        parameters = inspect.signature(getattr(import_module(module), function)).parameters.values()
        keywords = {item.name for item in parameters if item.kind is item.KEYWORD_ONLY}
        assert set(annotations(target)) == keywords, name
        for item in parameters:
            if item.kind is item.KEYWORD_ONLY and item.default is not item.empty:
                check_arguments(target, {item.name: item.default}, LoadedYaml(name, {}))


@pytest.mark.parametrize("choice", ["step=abc", "step=-1", "which=both"])
def test_a_network_that_no_run_has_is_refused_before_anything_is_loaded(choice):
    words = {"which": "expected which=teacher or which=student", "step": "expected the number of a step, last, best-dense"}
    with pytest.raises(UserError, match=words[choice.partition("=")[0]]):
        program.run("knn", "timm:vit_tiny", [choice, "data.train=a", "data.test=b"])


def test_an_image_size_that_patches_do_not_fill_is_reported():
    with pytest.raises(UserError, match=r"image_size 100 is not a multiple of the backbone's patch size 16. Nearest: 96 or 112"):
        program.evaluate("timm:vit_tiny", "efficiency", image_size=100)


def test_which_and_step_choose_the_network_of_a_run(trained_run):  # noqa: F811
    options = {"data": {"test": f"{trained_run.parent}/set/textures-test-*.tar"}, "images": 8, "workers": 0, "out": None}
    overrides = [f"data.test={options['data']['test']}", "images=8", "workers=0", "out=null"]
    scores = set()
    for choice in ({}, {"which": "student"}, {"step": 4}, {"which": "student", "step": 4}):
        found = program.run("locality", str(trained_run), [*overrides, *(f"{key}={value}" for key, value in choice.items())])[
            "metrics"
        ]
        assert found == pytest.approx(program.evaluate(load_backbone(trained_run, **choice), "locality", **options), abs=1e-6)
        scores.add(found["locality"])
    assert len(scores) == 4


def test_checking_imports_no_torch():
    code = "import sys, ssl_locat.evaluation.evaluate as e; e.load_protocol('knn', ['data.train=a', 'data.test=b']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_run_gives_the_documented_shape_and_the_module_is_the_function(tmp_path):
    data = write_split(tmp_path, num_train=16, num_test=8)
    model = "timm:test_vit"
    result = program.run(
        "knn", model, [f"data.train={data['train']}", f"data.test={data['test']}", "k=[3]", "workers=0", "image_size=160"]
    )
    assert set(result) == {"protocol", "model", "data", "metrics", "seconds"}
    assert set(result["metrics"]) == {"top1_k3", "top5_k3", "train_images", "test_images"}
    json.dumps(result)

    import ssl_locat
    from ssl_locat.models.backbone import create_backbone

    torch.manual_seed(0)
    backbone = create_backbone("locatvit_tiny", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    scores = ssl_locat.evaluate(backbone, "knn", data=data, k=[3], workers=0)
    assert scores["top5_k3"] >= scores["top1_k3"] > 25
    with pytest.raises(ConfigError, match="Did you mean 'workers'"):
        ssl_locat.evaluate(backbone, "knn", data=data, worker=0)
    with pytest.raises(ConfigError, match=r"evaluate\('knn'\): k is 'all'; expected"):
        ssl_locat.evaluate(backbone, "knn", data=data, k="all")


def test_model_card_gets_one_row_per_protocol_and_data(tmp_path):
    (tmp_path / "README.md").write_text("# A backbone\n\nText.\n")
    row = {
        "name": "knn",
        "protocol": "knn",
        "tokens": program.tokens_read("knn", {}),
        "data": {"train": "a.tar", "test": "b.tar"},
        "metrics": {"top1_k20": 50.0},
    }
    program.add_to_card(tmp_path, row)
    program.add_to_card(tmp_path, row | {"metrics": {"top1_k20": 60.0}})
    program.add_to_card(tmp_path, row | {"data": {"train": "c.tar", "test": "b.tar"}})
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# A backbone")
    assert card.count("| knn |") == 2 and "60.00" in card and "train: a.tar; test: b.tar" in card
    assert len(json.loads((tmp_path / "scores.json").read_text())) == 2
