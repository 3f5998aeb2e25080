"""Weights of others from a file or a folder: which model they are, what their images must look like, and where each answer comes from.

foreign = read_foreign(Path("dinov2_vits14_pretrain.pth"), {})
foreign.name, foreign.options        # for create_backbone
foreign.known                        # for fit
foreign.mean, foreign.std            # of RGB in 0..1, and `foreign.normalisation`: who says so
"""

import json
from pathlib import Path
from typing import NamedTuple

import timm
from safetensors import SafetensorError, safe_open

from ssl_locat.errors import CheckpointError, UserError, did_you_mean
from ssl_locat.models.architecture import HALF, recognise
from ssl_locat.models.layouts import IMAGENET, Known, convert
from ssl_locat.models.layouts_clip import OPENAI
from ssl_locat.models.weights import FOLDER_FILES, read_file


class Foreign(NamedTuple):
    name: str
    options: dict
    known: Known
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalisation: str  # in words: where mean and std come from
    guessed: bool  # whether that is a guess
    assumed: tuple[str, ...]  # what else the tensors do not show


def read_foreign(path: Path, given: dict) -> Foreign:
    """The weights in `path`, a file or a folder that transformers saved, and the model that they belong to.

    given: options of the user's, which go before what is recognised: `name`, `mean`, `std`, and those of the model.
    Raises CheckpointError for files that are no weights or of no known layout, UserError for a name that timm does not know.
    """
    given = dict(given)
    known, facts = read_known(path)
    mean, std = given.pop("mean", None), given.pop("std", None)
    name = given.get("name")
    if name is not None and not timm.is_model(name):
        raise UserError(f"{path}?name={name}: timm has no model {name!r}.{did_you_mean(str(name), timm.list_models())}")
    if any(".mlp.fc1_g." in name for name in known.state) and facts.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{path}: a gated MLP with hidden_act {facts['hidden_act']!r}; DINOv3's has 'silu', and timm's Eva, too"
        )
    architecture = recognise(known.state, str(path), known.layout.prefix, given)
    options, assumed = architecture.options, architecture.assumed
    known = known._replace(layout=known.layout._replace(prefix=architecture.prefix), grid=architecture.grid)
    given.pop("name", None)
    facts = {**facts, **(facts.get("vision_config") or {})}  # of an image tower beside a text tower
    if "num_attention_heads" in facts:
        options["num_heads"], assumed = facts["num_attention_heads"], ()
    if known.layout.act_layer:
        said = _activation(facts)
        options["act_layer"] = said or known.layout.act_layer
        if not said and "act_layer" not in given:
            assumed = (*assumed, f"{known.layout.act_layer}, say act_layer=quick_gelu or gelu otherwise")
    if "num_heads" in given:
        assumed = ()
    if name is not None:  # its own options say what the tensors do not: they go before what is assumed
        options = {key: options[key] for key in ("num_classes", "in_chans", "img_size", "no_embed_class") if key in options}
        assumed = ()
    if known.layout.pos_resize != "timm" and "pos_embed" in known.state:
        options["pos_resize"] = known.layout.pos_resize
    options = {**options, **given}
    (own_mean, own_std), words, guessed = normalisation(known, facts, name, options["num_classes"])
    if mean is not None or std is not None:
        words, guessed = "as given", False
    chosen = name or architecture.name
    return Foreign(chosen, options, known, tuple(mean or own_mean), tuple(std or own_std), words, guessed, assumed)


def _activation(facts: dict) -> str | None:
    """timm's name of the activation that a config.json or open_clip_config.json names; None where none does."""
    model = facts.get("model_cfg") or {}
    if model:
        return "quick_gelu" if model.get("quick_gelu") else "gelu"
    name = facts.get("hidden_act")
    return "gelu_tanh" if name in ("gelu_pytorch_tanh", "gelu_new") else name


def read_known(path: Path) -> tuple[Known, dict]:
    """The weights in a file or folder in timm's names, whose layout they had, and what the files beside them say."""
    file = weights_of(path) if path.is_dir() else path
    return convert(read_file(file), str(path)), beside(file)


def weights_of(folder: Path) -> Path:
    found = [folder / name for name in FOLDER_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} holds a config.json, but no weights: expected {' or '.join(FOLDER_FILES)}.")
    return found[0]


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def beside(file: Path) -> dict:
    """What config.json and preprocessor_config.json say about weights in the same folder; of a file of another name, what its own header says."""
    if file.name.startswith("open_clip_"):
        return read_json(file.with_name("open_clip_config.json"))
    if file.name in FOLDER_FILES:
        return {**read_json(file.with_name("config.json")), **read_json(file.with_name("preprocessor_config.json"))}
    return {"header": header(file)} if file.suffix == ".safetensors" else {}


def header(file: Path) -> dict:
    """mean and std that `supervised` noted in the header of the weights it wrote; {} for a file without."""
    try:
        with safe_open(file, "pt") as opened:
            noted = json.loads((opened.metadata() or {}).get("pretrained_cfg", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError):
        return {}  # `read_file` says what is wrong with it
    return noted if isinstance(noted, dict) and {"mean", "std"} <= noted.keys() else {}


def normalisation(known: Known, facts: dict, name: str | None, num_classes: int) -> tuple[tuple, str, bool]:
    """-> ((mean, std), who says so, whether it is a guess)."""
    if "image_mean" in facts and "image_std" in facts:
        return (facts["image_mean"], facts["image_std"]), "of preprocessor_config.json beside it", False
    own = facts.get("pretrained_cfg") or facts.get("preprocess_cfg") or {}
    if "mean" in own and "std" in own:
        return (own["mean"], own["std"]), "of config.json beside it", False
    if facts.get("header"):
        return (tuple(facts["header"]["mean"]), tuple(facts["header"]["std"])), "of the file's own header", False
    if name is not None:
        config = timm.get_pretrained_cfg(name)
        assert config is not None  # of a name that timm knows
        return (config.mean, config.std), f"of timm's {name}", False
    if known.layout.normalisation:
        return known.layout.normalisation, f"of {known.layout.name}", False
    if known.layout.name == "LocAtViT" and num_classes and "rope.freqs" not in known.state and "pos_embed" in known.state:
        return HALF, "of the release's classifiers", False
    if "norm_pre.weight" in known.state:
        return OPENAI, "CLIP's, a guess by the norm before its blocks: the file does not say it", True
    if "attn_pool.latent" in known.state:
        return HALF, "SigLIP's, a guess by its pooling: the file does not say it", True
    return IMAGENET, "ImageNet's, a guess: the file does not say it", True
