"""model.safetensors and config.json as timm's hub format has them, and as transformers reads them, too.

Both read one config.json: timm makes `architecture` with `model_args`; transformers' TimmWrapper does the same and passes the number of
classes itself, so it must not be among them. A model without LocAt gets timm's own name, so that timm alone can open it.
"""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from timm.models import save_for_hf
from timm.models._hub import save_config_for_hf
from torch import nn

from ssl_locat.errors import UserError
from ssl_locat.export.modeling import AUTO_MAP, FILE, write_modeling
from ssl_locat.models.families.front import LocAtModel
from ssl_locat.models.jumbo import Jumbo
from ssl_locat.models.registry import MODELS, TWINS

ATTACH = ("gaug", "prr", "pos_resize")


def write_timm(backbone: nn.Module, folder: Path, with_code: bool = False) -> None:
    """Write the two files into `folder`; with_code: a modeling file besides, for transformers where ssl_locat is not installed."""
    # timm's own classes refuse keys that they do not know among these
    channels = backbone.pretrained_cfg.get("channels")
    backbone.pretrained_cfg = {key: value for key, value in backbone.pretrained_cfg.items() if key != "channels"}
    save_for_hf(backbone, str(folder), safe_serialization=True, data_config={"input_size": backbone.pretrained_cfg["input_size"]})
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers gives num_classes itself, and would give it twice
    args = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
    config["architecture"], args = own_name(backbone, config["architecture"], args)
    config["model_args"] = args
    if channels:
        config["channels"] = channels  # which bands it reads, on which scale: load_backbone takes them from here
        backbone.pretrained_cfg = {**backbone.pretrained_cfg, "channels": channels}
    if with_code:
        config["auto_map"] = AUTO_MAP
        write_modeling(config["architecture"], folder / FILE)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    obey_umask(folder)


def architecture_of(backbone: nn.Module) -> tuple[str, dict]:
    """(name, options) with which `create_backbone` makes such a network again; what `write_timm` writes into config.json, without the weights."""
    config = get_model_config(backbone)
    args = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
    return own_name(backbone, config["architecture"], args)


def get_model_config(backbone: nn.Module) -> dict:
    """timm's own description of a model."""
    own = backbone.pretrained_cfg
    backbone.pretrained_cfg = {key: value for key, value in own.items() if key != "channels"}
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            save_config_for_hf(backbone, str(path), data_config={"input_size": own["input_size"]})
            found: dict = json.loads(path.read_text(encoding="utf-8"))
            return found
    finally:
        backbone.pretrained_cfg = own


def check_timm_target(folder: Path) -> None:
    """UserError where `write_timm_whole` could not write, before hours of training end in it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Give a folder, which may be new.")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not os.access(folder if folder.exists() else parent, os.W_OK):
        raise UserError(f"{folder} cannot be written. Mend its permissions, or give another folder.")


def write_timm_whole(backbone: nn.Module, folder: Path) -> None:
    """`write_timm` beside, then into `folder` file by file; other files there stay."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_timm(backbone, partial)
    folder.mkdir(exist_ok=True)
    # config.json last: without it the folder is no MODEL
    for name in sorted((path.name for path in partial.iterdir()), key=lambda name: name == "config.json"):
        os.replace(partial / name, folder / name)
    partial.rmdir()


def own_name(backbone: nn.Module, architecture: str, args: dict) -> tuple[str, dict]:
    """(timm's name, its options) of a model of ours that has nothing of LocAt's; others as they are."""
    plain = not (getattr(backbone, "has_gaug", False) or getattr(backbone, "prr", None) is not None)
    if not isinstance(backbone, LocAtModel) or isinstance(backbone, Jumbo) or not plain:
        return architecture, args
    if getattr(backbone, "pos_resize", "timm") != "timm":  # timm cannot resize positions that way
        return architecture, args
    args = {key: value for key, value in args.items() if key not in ATTACH}
    # without LocAt the weights are those of a plain timm model: it opens them where this package is not installed
    twin = architecture.removeprefix("locat_")
    if twin in TWINS:
        return twin, {**TWINS[twin], **args}
    if architecture in MODELS and "swin" not in architecture:
        size = architecture.removeprefix("locat").removeprefix("reg").split("_")[1]
        rope = "small" if size == "tiny" else size  # timm has no tiny one; the width is among the options
        name = f"vit_{rope}_patch16_rope_mixed_224" if "rope_mixed" in architecture else f"vit_{size}_patch16_224"
        options = {key: value for key, value in MODELS[architecture][1].items() if key not in ATTACH}
        return name, {**options, **args}
    return architecture, args


def obey_umask(folder: Path) -> None:
    """Give every file in a folder that this process made the permissions that its umask asks for: safetensors writes 0600."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)
