"""Backbones by name and from wherever they lie.

    create_backbone("locatvit_small", patch_size=8)      a new one
    load_backbone("runs/dino")                           the teacher of a run's newest checkpoint
    init_weights(backbone, "timm:vit_small_patch16_224.dino")    start a new one from given weights

MODEL is a run folder, a checkpoint folder, an export folder, a folder that transformers saved, a file of weights (.safetensors, .pth),
`timm:NAME` (random weights; `timm:NAME?pretrained`, `timm:NAME?patch_size=8&depth=4`), or `hf-hub:NAME`. Files and folders of weights take
options too (`weights.pth?img_size=384`), for what their tensors do not show: `name` (a model of timm's), `mean` and `std`, `num_heads`, the
training size of models without positional embeddings, whether GAug or PRR is attached.
"""

import logging
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import hf_hub_download, snapshot_download
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from ssl_locat.config.models import check_exists
from ssl_locat.config.schema import Backbone
from ssl_locat.config.yaml_files import load_yaml
from ssl_locat.errors import CheckpointError, UserError, did_you_mean
from ssl_locat.models.architecture import as_told, recognise
from ssl_locat.models.foreign import normalisation, read_foreign, read_json, read_known
from ssl_locat.models.layouts import Known, Layout, same
from ssl_locat.models.moving import merged
from ssl_locat.models.registry import MODELS, TWINS
from ssl_locat.models.weights import FOLDER_FILES, fit, set_initial_grid, windows_of
from ssl_locat.runs.best import best_step, parse_step
from ssl_locat.runs.checkpoint import read_weights
from ssl_locat.runs.marker import problem, read_marker, step_folders, step_of

log = logging.getLogger(__name__)

ATTACH = ("gaug", "prr", "pos_resize")  # options of attach_locat
NOT_FOR_THE_CONSTRUCTOR = tuple(Backbone.model_fields)  # keys of a config's `backbone` that are no options of the model
NOT_OF_THE_WEIGHTS = ("num_classes", "in_chans", "img_size")  # options that a run chooses by itself


def create_backbone(name: str, **options: Any) -> nn.Module:
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
        raise UserError(f"backbone {name!r} takes no {attach[0]}: LocAt serves the names in docs/locat-on-timm.md")
    try:
        model = timm.create_model(name, **options)
    except UserError:
        raise
    except Exception as error:  # timm and torch raise whatever a number or a word that they do not expect leads to
        raise UserError(f"backbone {name!r} refuses its options {options}: {type(error).__name__}: {error}") from error
    if not hasattr(model, "patch_embed"):
        raise UserError(
            f"backbone {name!r} has no patch_embed, from which training and protocols here know its patches; choose a ViT or a Swin, or "
            "attach LocAt to it by attach_locat, in a program of your own"
        )
    return with_input_size(model) if "img_size" in options else model


def load_backbone(
    model: str | Path, which: str | None = None, step: int | str | None = None, average: int | None = None
) -> nn.Module:
    """The backbone of MODEL with its weights, in evaluation mode, on the CPU; its mean and std are in `pretrained_cfg`.

    Of a run: which: "teacher" (default) or "student"; step: which checkpoint, by its number, "last" (default), "best-dense" or "best-global";
    average: the uniform mean of so many checkpoints up to that one (`checkpoints_to_average`). Raises UserError or CheckpointError.
    """
    model = str(model)
    check_exists(model)
    if (which or step is not None or average is not None) and not is_run_or_checkpoint(model):
        raise UserError(
            f"{model} is one network; a teacher or student (which), a step and an average are chosen of a run folder."
        )
    if model.startswith("timm:"):
        backbone = create_from_timm(model.removeprefix("timm:"))
    elif model.startswith("hf-hub:"):
        backbone = load_from_hub(model)
    elif is_foreign(model):
        backbone = load_foreign(model)
    elif Path(folder_of(model), "config.json").is_file():
        path, options = split_options(model)
        config = read_json(folder_of(path) / "config.json")
        backbone = with_channels(create_pretrained(f"local-dir:{folder_of(path)}", **options), config)
    else:
        backbone = load_run(Path(model), which or "teacher", step, average)
    return backbone.eval()


def folder_of(model: str) -> Path:
    """The folder that a MODEL names, or in which the file of weights lies that it names."""
    path = Path(model.partition("?")[0])
    return path.parent if path.name in FOLDER_FILES else path


def is_foreign(model: str) -> bool:
    """Whether MODEL is a bare file of weights or a folder of transformers'. A folder with timm's config.json says itself what it is, and so
    does the file of weights in it, but for one that is asked to be opened as another model (`?name=`)."""
    path, options = split_options(model)
    if Path(path).is_file() and (Path(path).name not in FOLDER_FILES or "name" in options):
        return True
    config = read_json(folder_of(path) / "config.json")
    if not config:
        return Path(path).is_file() or Path(path, "open_clip_config.json").is_file()
    return "architecture" not in config and "model_type" in config


def is_run_or_checkpoint(model: str | Path) -> bool:
    """Whether MODEL is a run folder or one of its checkpoints: what has a teacher, a student and their heads."""
    return any(Path(model, name).is_file() for name in ("config.yaml", "checkpoint.json"))


def init_weights(backbone: nn.Module, source: str) -> list[str]:
    """Start `backbone` from the weights of `source`, which is a MODEL; vanilla weights fit a LocAt twin, whose GAug stays as it is.

    Positional embeddings and patch kernels are resized where they differ. Returns the names of what the weights did not have.
    Here `timm:NAME` means its pretrained weights. Raises CheckpointError for weights of another architecture.
    """
    check_exists(source)
    if not source.startswith(("timm:", "hf-hub:")) and is_foreign(source):
        path, given = split_options(source)
        known, facts = read_known(Path(path))
        known = as_told(known, given)
        log.info("%s: %s", source, known.layout.name)
        try:
            missing = fit(backbone, known, source)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{options_of(known, source)}") from None
        (mean, std), _, guessed = normalisation(known, facts, given.get("name"), 0)
        if not guessed:
            compare_normalisation(backbone, mean, std, source)
        return missing
    other = load_start(source)
    missing = fit(backbone, weights_of_model(other, source), source)
    if getattr(other, "has_gaug", False) and getattr(backbone, "has_gaug", False):
        set_initial_grid(backbone, other.gaug_options["initial_grid"])
    compare_normalisation(backbone, other.pretrained_cfg["mean"], other.pretrained_cfg["std"], source)
    return missing


def load_start(source: str) -> nn.Module:
    """The network itself that `init_weights` starts from: as `load_backbone`, but `timm:NAME` with its pretrained weights."""
    if source.startswith("timm:"):
        return create_pretrained(source.removeprefix("timm:").removesuffix("?pretrained"), num_classes=0).eval()
    return load_backbone(source)


def options_of(known: Known, source: str) -> str:
    """The keys of a config that make a backbone for these weights, as a sentence; nothing where the tensors do not show them."""
    try:
        name, options, *_ = recognise(known.state, source, known.layout.prefix)
    except CheckpointError:
        return ""
    options = {key: value for key, value in options.items() if key not in NOT_OF_THE_WEIGHTS}
    return " They fit " + " ".join(f"backbone.{key}={value}" for key, value in {"name": name, **options}.items()) + "."


def weights_of_model(model: nn.Module, source: str) -> Known:
    """The weights of a model that is open already, which knows its grid and how its positions are resized."""
    grid, table = getattr(model.patch_embed, "grid_size", None), getattr(model, "pos_embed", None)
    prefix = None if table is None or grid is None else table.shape[1] - grid[0] * grid[1]
    layout = Layout(source, lambda weights: True, same, prefix, getattr(model, "pos_resize", "timm"))
    return Known(layout, model.state_dict(), windows_of(model) if isinstance(model, SwinTransformer) else grid)


def compare_normalisation(backbone: nn.Module, mean: tuple, std: tuple, source: str) -> None:
    """Say it where the weights were trained on images of another mean and std than `backbone` will see."""
    own = getattr(backbone, "pretrained_cfg", None) or {}
    if own and len(own["mean"]) == len(mean) and (tuple(own["mean"]), tuple(own["std"])) != (tuple(mean), tuple(std)):
        log.warning(
            "%s was trained on images with mean %s and std %s; here they have mean %s and std %s (crops.mean, crops.std).",
            source,
            *(list(numbers) for numbers in (mean, std, own["mean"], own["std"])),
        )


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


def create_pretrained(name: str, **options: Any) -> nn.Module:
    """A timm model with the weights that timm, a folder (`local-dir:`) or the hub (`hf-hub:`) holds for it."""
    if ":" not in name and not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}.{did_you_mean(name, timm.list_models())}")
    options = {**TWINS.get(name.split(".")[0], {}), **options}
    if any(key in options for key in ATTACH) and name.split(".")[0] in TWINS:
        name, options = f"locat_{name}", {"gaug": False, "prr": False, **options}
    try:
        model = timm.create_model(name, pretrained=True, **options)
    except (RuntimeError, OSError, AssertionError, ValueError, KeyError) as error:
        raise CheckpointError(f"{name.removeprefix('local-dir:')}: its weights cannot be loaded: {error}") from error
    return with_input_size(model) if "img_size" in options else model


def with_input_size(model: nn.Module) -> nn.Module:
    """Note the image size that the model is made for: protocols take it as their default, and an export says it."""
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (model.in_chans, *model.patch_embed.img_size)}
    return model


def with_channels(model: nn.Module, config: dict) -> nn.Module:
    """Note which bands of a file it reads, and on which scale (a config's data.channels), where an export of ours says so."""
    if config.get("channels"):
        model.pretrained_cfg = {**model.pretrained_cfg, "channels": config["channels"]}
    return model


def load_from_hub(model: str) -> nn.Module:
    """`hf-hub:NAME[?key=value]`: a repository of timm's or ours, or one of transformers' whose layout is known."""
    name, options = split_options(model)
    repository, _, revision = name.removeprefix("hf-hub:").partition("@")
    try:
        config = read_json(Path(hf_hub_download(repository, "config.json", revision=revision or None)))
        if "architecture" in config:
            return with_channels(create_pretrained(name, **options), config)
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=["*.json", "*.safetensors", "*.bin"])
    except (RuntimeError, OSError, ValueError) as error:  # huggingface_hub's and httpx's descend from these
        raise CheckpointError(f"{model}: cannot be loaded from the hub: {error}") from error
    return load_foreign(model.replace(name, folder, 1))


def load_foreign(spec: str) -> nn.Module:
    """`PATH` or `PATH?key=value` of weights without a config of timm's; what model they are shows in their names and shapes."""
    path, given = split_options(spec)
    foreign = read_foreign(Path(path), given)
    backbone = create_backbone(foreign.name, **foreign.options)
    fit(backbone, foreign.known, path)
    if isinstance(given.get("gaug"), dict) and "initial_grid" in given["gaug"]:  # goes before what the tables show
        set_initial_grid(backbone, given["gaug"]["initial_grid"])
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "mean": foreign.mean, "std": foreign.std}
    size = "x".join(str(side) for side in backbone.patch_embed.img_size)
    log.log(
        logging.WARNING if foreign.guessed else logging.INFO,
        "%s: %s, opened as %s (%s px%s); mean %s and std %s (%s%s)",
        path,
        foreign.known.layout.name,
        foreign.name,
        size,
        "".join(f"; assumed: {words}" for words in foreign.assumed),
        [round(number, 3) for number in foreign.mean],
        [round(number, 3) for number in foreign.std],
        foreign.normalisation,
        "; give ?mean=[...]&std=[...] or ?name=NAME of a timm model" if foreign.guessed else "",
    )
    return backbone


def load_run(folder: Path, which: str, step: int | str | None, average: int | None = None) -> nn.Module:
    """From a run folder, or from one of its checkpoints."""
    if which not in ("teacher", "student"):
        raise UserError(f"which is {which!r}; a run has a teacher and a student")
    run = folder.parent.parent if (folder / "checkpoint.json").is_file() else folder
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{folder} is neither a run folder (no config.yaml), nor an export (no config.json), nor a checkpoint of a run"
        )
    checkpoints = chosen_checkpoints(folder, step, average)
    config = load_yaml(str(run / "config.yaml")).data
    settings = config["backbone"]
    options = {key: value for key, value in settings.items() if key not in NOT_FOR_THE_CONSTRUCTOR}
    backbone = create_backbone(settings["name"], **{"img_size": config["crops"]["global_size"], **options})
    crops = config["crops"]
    read = {"mean": tuple(crops["mean"]), "std": tuple(crops["std"]), "channels": (config.get("data") or {}).get("channels")}
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, **read}
    backbone.load_state_dict(mean_weights(checkpoints, f"{which}.backbone."))
    restore_grid(backbone, checkpoints[-1])
    return backbone


def restore_grid(backbone: nn.Module, checkpoint: Path) -> None:
    """The patch grid that GAug's constants belong to: after `init` it is that of the first weights, not of this run's crops."""
    grid = read_marker(checkpoint)["meta"].get("initial_grid")
    if grid:
        set_initial_grid(backbone, tuple(grid))


def chosen_checkpoints(folder: Path, step: int | str | None = None, average: int | None = None) -> list[Path]:
    """The checkpoint that `step` means, or those to average up to it, by step."""
    return [find_checkpoint(folder, step)] if average is None else checkpoints_to_average(folder, average, step)


def find_checkpoint(run: Path, step: int | str | None) -> Path:
    """The newest whole checkpoint of a run (None, "last"), that of a step, or the one kept as "best-dense" or "best-global"; of a
    checkpoint, itself."""
    if (run / "checkpoint.json").is_file():
        if step is not None:
            raise UserError(f"{run} is one checkpoint; give its run folder to choose by step.")
        return run
    if isinstance(step, str):
        step = parse_step(step)
    if isinstance(step, str):
        step = None if step == "last" else best_step(run, step.removeprefix("best-"))
    folders = step_folders(run / "checkpoints")
    for path in reversed(folders) if step is None else [path for path in folders if step_of(path) == step]:
        if not (wrong := problem(path, contents=True)):
            return path
        log.warning("%s is passed over: %s", path, wrong)
    found = ", ".join(str(step_of(path)) for path in folders) or "none"
    wanted = "no whole checkpoint yet" if step is None else f"no whole checkpoint of step {step}"
    raise CheckpointError(f"{run} holds {wanted}; steps found: {found}. `ssl-locat doctor {run}` says how far the run came.")


def checkpoints_to_average(run: Path, count: int, step: int | str | None = None) -> list[Path]:
    """The last `count` milestones of a run (`checkpoint.milestone_every_steps`), or without such its last checkpoints, up to `step`; by step.

    What lies evenly on the run's line: a checkpoint that is kept as the best one of long ago is none of them. Raises UserError or
    CheckpointError where there are not so many, or one is damaged: an average of fewer would not be what was asked for.
    """
    if (run / "checkpoint.json").is_file():
        raise UserError(f"{run} is one checkpoint; give its run folder to average several.")
    if count < 2:
        raise UserError(f"average is {count}; expected 2 or more checkpoints.")
    last = step_of(find_checkpoint(run, step))
    settings = load_yaml(str(run / "config.yaml")).data.get("checkpoint") or {}
    every, keep = settings.get("milestone_every_steps"), settings.get("keep_last", 3)
    folders = step_folders(run / "checkpoints")
    line = [path for path in folders if step_of(path) % every == 0] if every else folders[-keep:]
    line = [path for path in line if step_of(path) <= last]
    if len(line) < count:
        there = ", ".join(str(step_of(path)) for path in line) or "none"
        raise CheckpointError(
            f"{run} holds {len(line)} {'milestones' if every else 'checkpoints'} to average up to step {last} (of steps {there}), not {count}. "
            + ("" if every else "A run keeps more with checkpoint.milestone_every_steps.")
        )
    return line[-count:]


def read_plain(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors of a checkpoint under `prefix`; adapters of a backbone (backbone.trainable: lora) merged into the weights beside them."""
    weights = read_weights(checkpoint, prefix)
    if not any(".lora_A." in name for name in weights):
        return weights
    lora = read_marker(checkpoint)["meta"]["config"]["backbone"]["lora"]
    return merged(weights, lora["alpha"] / lora["rank"])


def mean_weights(checkpoints: list[Path], prefix: str) -> dict[str, Tensor]:
    """Tensors of the checkpoints under `prefix`, averaged uniformly, one checkpoint in memory at a time; what is no float is the last one's."""
    *others, last = checkpoints
    weights = read_plain(last, prefix)
    if not others:
        return weights
    sums = {name: tensor.double() for name, tensor in weights.items() if tensor.is_floating_point()}
    for path in others:
        for name, tensor in read_plain(path, prefix).items():
            if name in sums:
                sums[name] += tensor
    return weights | {name: (total / len(checkpoints)).to(weights[name].dtype) for name, total in sums.items()}
