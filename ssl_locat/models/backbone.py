"""Backbones by name and from wherever they lie.

    create_backbone("locatvit_small", patch_size=8)      a new one
    load_backbone("runs/dino")                           the teacher of a run's newest checkpoint
    init_weights(backbone, "timm:vit_small_patch16_224.dino")    start a new one from given weights

MODEL is a run folder, a checkpoint folder, an export folder, a file of weights (.safetensors, .pth), `timm:NAME` (random weights;
`timm:NAME?pretrained`, `timm:NAME?patch_size=8&depth=4`), or `hf-hub:NAME`. A file takes options too (`weights.pth?img_size=384`), for what
its tensors do not show: the training size of models without positional embeddings, whether PRR is attached.
"""

import logging
from pathlib import Path

import timm
import yaml
from torch import nn

from ssl_locat.config.models import check_exists
from ssl_locat.config.yaml_files import load_yaml
from ssl_locat.errors import CheckpointError, UserError, did_you_mean
from ssl_locat.models.official import HALF, recognise
from ssl_locat.models.registry import MODELS, TWINS
from ssl_locat.models.weights import fit, read_state, set_initial_grid
from ssl_locat.runs.checkpoint import problem, read_marker, read_weights

log = logging.getLogger(__name__)

ATTACH = ("gaug", "prr", "pos_resize")  # options of attach_locat
NOT_FOR_THE_CONSTRUCTOR = ("name", "init", "frozen_epochs")  # keys of a config's `backbone` that are no options of the model


def create_backbone(name: str, **options) -> nn.Module:
    """A timm model by name, freshly initialised, without a classifier unless `num_classes` is given.

    Options go to timm; ViTs are made to take images of any size (`dynamic_img_size`) unless told otherwise. `gaug`, `prr` and `pos_resize`
    of `attach_locat` are understood for timm's own names too. Raises UserError for an unknown name or option.
    """
    if not timm.is_model(name):
        raise UserError(
            f"backbone.name is {name!r}, which timm does not know; names of this project: {', '.join(MODELS)}; "
            f"timm's are listed by timm.list_models().{did_you_mean(name, timm.list_models())}"
        )
    options = {"num_classes": 0, **options}
    attach = [key for key in ATTACH if key in options]
    base = name.partition(".")[0]
    if base in TWINS:
        options = {**TWINS[base], **options}
        if attach:  # timm's own name with LocAt's options: its twin, with what is asked for alone
            name, options = f"locat_{name}", {"gaug": False, "prr": False, **options}
    elif attach and base not in MODELS and base.removeprefix("locat_") not in TWINS:
        raise UserError(f"backbone {name!r} takes no {attach[0]}: LocAt serves timm's ViTs and Swins")
    try:
        model = timm.create_model(name, **options)
    except UserError:
        raise
    except Exception as error:  # timm and torch raise whatever a number or a word that they do not expect leads to
        raise UserError(f"backbone {name!r} refuses its options {options}: {type(error).__name__}: {error}") from error
    if not hasattr(model, "patch_embed"):
        raise UserError(f"backbone {name!r} has no patches, which everything here is about; choose a ViT or a Swin")
    if "img_size" in options:  # the size it is made for; protocols take it as their default
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (model.in_chans, *model.patch_embed.img_size)}
    return model


def load_backbone(model: str | Path, which: str | None = None, step: int | None = None) -> nn.Module:
    """The backbone of MODEL with its weights, in evaluation mode, on the CPU; its mean and std are in `pretrained_cfg`.

    Of a run: which: "teacher" (default) or "student", step: which checkpoint (newest by default). Raises UserError or CheckpointError.
    """
    model = str(model)
    check_exists(model)
    if (which or step is not None) and not is_run_or_checkpoint(model):
        raise UserError(f"{model} is one network; a teacher or student (which) and a step are chosen of a run folder.")
    if model.startswith("timm:"):
        backbone = create_from_timm(model.removeprefix("timm:"))
    elif model.startswith("hf-hub:"):
        backbone = create_pretrained(model)
    elif Path(model.partition("?")[0]).is_file():
        backbone = load_weights_file(model)
    elif Path(model, "config.json").is_file():
        backbone = create_pretrained(f"local-dir:{model}")
    else:
        backbone = load_run(Path(model), which or "teacher", step)
    return backbone.eval()


def is_run_or_checkpoint(model: str | Path) -> bool:
    """Whether MODEL is a run folder or one of its checkpoints: what has a teacher, a student and their heads."""
    return any(Path(model, name).is_file() for name in ("config.yaml", "checkpoint.json"))


def init_weights(backbone: nn.Module, source: str) -> list[str]:
    """Start `backbone` from the weights of `source`, which is a MODEL; vanilla weights fit a LocAt twin, whose GAug stays as it is.

    Positional embeddings and patch kernels are resized where they differ. Returns the names of what the weights did not have.
    Here `timm:NAME` means its pretrained weights. Raises CheckpointError for weights of another architecture.
    """
    if Path(source).is_file():
        return fit(backbone, read_state(Path(source)), source)
    if source.startswith("timm:"):
        given = create_pretrained(source.removeprefix("timm:").removesuffix("?pretrained"), num_classes=0)
    else:
        given = load_backbone(source)
    missing = fit(backbone, given.state_dict(), source)
    if getattr(given, "has_gaug", False) and getattr(backbone, "has_gaug", False):
        set_initial_grid(backbone, given.gaug_options["initial_grid"])
    return missing


def create_from_timm(spec: str) -> nn.Module:
    """`NAME`, `NAME?pretrained` or `NAME?key=value&key=value`."""
    name, options = split_options(spec)
    if options.pop("pretrained", False):
        return create_pretrained(name, **options)
    return create_backbone(name, **options)


def split_options(spec: str) -> tuple[str, dict]:
    """'NAME?key=value&flag' -> ('NAME', {'key': value, 'flag': True}); values are read as YAML, e.g. gaug={kernel: laplace}."""
    name, _, query = spec.partition("?")
    options = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        try:
            options[key] = yaml.safe_load(value) if equals else True
        except yaml.YAMLError:
            raise UserError(
                f"{spec}: the value of {key!r} is {value!r}; expected YAML, such as 16, false or {{kernel: laplace}}"
            ) from None
    return name, options


def create_pretrained(name: str, **options) -> nn.Module:
    """A timm model with the weights that timm, a folder (`local-dir:`) or the hub (`hf-hub:`) holds for it."""
    if ":" not in name and not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}.{did_you_mean(name, timm.list_models())}")
    options = {**TWINS.get(name.split(".")[0], {}), **options}
    if any(key in options for key in ATTACH) and name.split(".")[0] in TWINS:
        name, options = f"locat_{name}", {"gaug": False, "prr": False, **options}
    try:
        return timm.create_model(name, pretrained=True, **options)
    except (RuntimeError, OSError, AssertionError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name.removeprefix('local-dir:')}: its weights cannot be loaded: {error}") from error


def load_weights_file(spec: str) -> nn.Module:
    """`PATH` or `PATH?key=value` of a bare state dict; what model it is shows in its names and shapes."""
    path, given = split_options(spec)
    state = read_state(Path(path))
    name, options = recognise(state, path)
    backbone = create_backbone(name, **{**options, **given})
    fit(backbone, state, path)
    if options["num_classes"] and "rope" not in name and "swin" not in name and name.startswith("locat"):
        backbone.pretrained_cfg = {**backbone.pretrained_cfg, "mean": HALF, "std": HALF}
    return backbone


def load_run(folder: Path, which: str, step: int | None) -> nn.Module:
    """From a run folder, or from one of its checkpoints."""
    if which not in ("teacher", "student"):
        raise UserError(f"which is {which!r}; a run has a teacher and a student")
    run = folder.parent.parent if (folder / "checkpoint.json").is_file() else folder
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{folder} is neither a run folder (no config.yaml), nor an export (no config.json), nor a checkpoint of a run"
        )
    checkpoint = find_checkpoint(folder, step)
    config = load_yaml(str(run / "config.yaml")).data
    settings = config["backbone"]
    options = {key: value for key, value in settings.items() if key not in NOT_FOR_THE_CONSTRUCTOR}
    backbone = create_backbone(settings["name"], **{"img_size": config["crops"]["global_size"], **options})
    crops = config["crops"]
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "mean": tuple(crops["mean"]), "std": tuple(crops["std"])}
    backbone.load_state_dict(read_weights(checkpoint, f"{which}.backbone."))
    restore_grid(backbone, checkpoint)
    return backbone


def restore_grid(backbone: nn.Module, checkpoint: Path) -> None:
    """The patch grid that GAug's constants belong to: after `init` it is that of the first weights, not of this run's crops."""
    grid = read_marker(checkpoint)["meta"].get("initial_grid")
    if grid:
        set_initial_grid(backbone, tuple(grid))


def find_checkpoint(run: Path, step: int | None) -> Path:
    """The newest whole checkpoint of a run, or that of `step`; of a checkpoint, itself."""
    if (run / "checkpoint.json").is_file():
        if step is not None:
            raise UserError(f"{run} is one checkpoint; give its run folder to choose by step.")
        return run
    folders = sorted((run / "checkpoints").glob("step_" + "[0-9]" * 8))
    for path in reversed(folders) if step is None else [path for path in folders if path.name == f"step_{step:08d}"]:
        if not (wrong := problem(path, contents=True)):
            return path
        log.warning("%s is passed over: %s", path, wrong)
    found = ", ".join(str(int(path.name[5:])) for path in folders) or "none"
    wanted = "no whole checkpoint yet" if step is None else f"no whole checkpoint of step {step}"
    raise CheckpointError(f"{run} holds {wanted}; steps found: {found}. `ssl-locat doctor {run}` says how far the run came.")
