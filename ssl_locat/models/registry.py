"""The named models: LocAt and vanilla twins in timm's registry, created by `timm.create_model(NAME, ...)` after `import ssl_locat.models`.

    locatvit_small        vit_small          ViT with GAug and PRR, and without; sizes tiny, small, base, large
    locatregvit_small     regvit_small       the same with 4 registers
    locatvit_small_nopos  vit_small_nopos    without positional embeddings
    locatvit_small_rope_mixed, vit_small_rope_mixed    learned rotary frequencies instead of positional embeddings
    locatswin_tiny        (timm's swin_tiny_patch4_window7_224);  tiny and base
    locatjumbo_tiny       jumbo_tiny         one class token as wide as six;  tiny and base

    locat_NAME            NAME               any other model of the families (families/) by timm's own name, e.g. locat_vit_small_patch14_dinov2

All take timm's options of their class (`patch_size`, `img_size`, `drop_path_rate`, ...) and those of `attach_locat` (`gaug`, `prr`, `pos_resize`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    list_models,
    load_pretrained,
    model_entrypoint,
    register_model,
)
from timm.models._features import FeatureGetterNet
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as filter_eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as filter_swin
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as filter_vit
from torch import nn

from ssl_locat.errors import UserError
from ssl_locat.models.attach import attach_locat
from ssl_locat.models.families import FAMILIES, timms_filter
from ssl_locat.models.jumbo import Jumbo
from ssl_locat.models.positions import at_own_grid

SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
VIT = {"patch_size": 16, "dynamic_img_size": True}
ROPE_MIXED = {  # Heo et al., arXiv:2403.13298, as timm's vit_*_patch16_rope_mixed_224
    **VIT,
    "attn_type": "rope",
    "init_values": 1e-5,
    "global_pool": "token",
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_grid_indexing": "xy",
    "rope_temperature": 10.0,
    "rope_type": "mixed",
}
SWIN = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
}
VANILLA = {"gaug": False, "prr": False}
FEATURE_OPTIONS = ("out_indices", "out_map", "return_dict", "output_fmt", "norm", "prune", "feature_cls")  # of features_only


def build_locat(
    base: type, *, gaug: bool | dict = True, prr: bool | dict = True, pos_resize: str = "timm", **options: Any
) -> nn.Module:
    """A timm model of class `base` with LocAt attached."""
    return attach_locat(base(**options), gaug=gaug, prr=prr, pos_resize=pos_resize)


def named_models() -> dict[str, tuple]:
    """name -> (base class, options, filter of foreign state dicts); each LocAt name has a vanilla twin."""
    models: dict[str, tuple[type, dict[str, Any], Callable]] = {}
    kinds: list[tuple[str, type, dict[str, Any], Callable]]
    for size, shape in SIZES.items():
        kinds = [
            ("vit_{}", VisionTransformer, VIT, filter_vit),
            ("regvit_{}", VisionTransformer, {**VIT, "reg_tokens": 4}, filter_vit),
            ("vit_{}_nopos", VisionTransformer, {**VIT, "pos_embed": "none"}, filter_vit),
            ("vit_{}_rope_mixed", Eva, ROPE_MIXED, filter_eva),
        ]
        for suffix, base, options, load_filter in kinds:
            name = suffix.format(size)
            models[f"locat{name}"] = (base, {**options, **shape}, load_filter)
            models[name] = (base, {**options, **shape, **VANILLA}, load_filter)
    for size, stages in SWIN.items():
        models[f"locatswin_{size}"] = (
            SwinTransformer,
            {"patch_size": 4, "window_size": 7, "strict_img_size": False, **stages},
            filter_swin,
        )
    for size in ("tiny", "base"):
        models[f"locatjumbo_{size}"] = (Jumbo, {**VIT, **SIZES[size], "norm_patches": True}, filter_vit)
        models[f"jumbo_{size}"] = (Jumbo, {**VIT, **SIZES[size], **VANILLA}, filter_vit)
    return models


def register(name: str, base: type, defaults: dict, load_filter: Callable) -> None:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_model_with_cfg(
            partial(build_locat, base),
            name,
            pretrained,
            pretrained_filter_fn=partial(at_own_grid, load_filter),
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **{**defaults, **options},
        )

    create.__name__ = name  # timm registers under it
    create.__module__ = __name__
    register_model(create)


def register_twin(name: str, options: dict) -> None:
    """`locat_NAME`: timm's model NAME with LocAt. `pretrained=True` starts it from NAME's weights, or opens an export of its own."""

    def create(
        pretrained: bool = False, gaug: bool | dict = True, prr: bool | dict = True, pos_resize: str = "timm", **given: Any
    ) -> nn.Module:
        # feature maps alone: timm cuts blocks off, so that LocAt and the weights must be there before
        maps = {key: given.pop(key) for key in FEATURE_OPTIONS if key in given} if given.pop("features_only", False) else None
        if maps is not None and maps.pop("feature_cls", "getter") not in ("getter", FeatureGetterNet):
            raise UserError(f"locat_{name} gives feature maps by feature_cls='getter' alone, as timm's ViTs do")
        exported = isinstance(
            given.get("pretrained_cfg"), dict
        )  # a folder or hub repository, whose weights have GAug's among them
        model = model_entrypoint(name)(pretrained=pretrained and not exported, **{**options, **given})
        model = attach_locat(model, gaug=gaug, prr=prr, pos_resize=pos_resize)
        if pretrained and exported:
            load_pretrained(model, num_classes=model.num_classes, in_chans=model.in_chans, filter_fn=load_filter(model))
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": f"locat_{name}"}
        return model if maps is None else maps_of(model, maps)

    create.__name__ = f"locat_{name}"
    create.__module__ = __name__
    register_model(create)


def load_filter(model: Any) -> Callable | None:
    """timm's filter of weights for such a model; told the grid that they are of where timm would take it for a square."""
    timms: Any = timms_filter(model)
    return partial(at_own_grid, timms) if isinstance(model, VisionTransformer | Eva | SwinTransformer) else timms


def maps_of(model: Any, options: dict[str, Any]) -> nn.Module:
    """The model behind `features_only=True`: of the last three blocks, or every stage, and with what timm notes on it."""
    if "out_indices" not in options:
        reductions = {info["reduction"] for info in model.feature_info}
        options["out_indices"] = 3 if len(reductions) == 1 else tuple(range(len(model.feature_info)))
    getter: Any = FeatureGetterNet(model, **options)
    getter.pretrained_cfg = getter.default_cfg = model.pretrained_cfg
    getter.in_chans, getter._traits = model.in_chans, dict(model._traits)
    return getter


# timm's names of models that LocAt attaches to, and what makes them take images of any size
TWINS = {name: family.any_size for family in FAMILIES for module in family.modules for name in list_models(module=module)}
MODELS = named_models()
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,  # what pretraining here uses; the release's classifiers were trained with 0.5, see architecture.py
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc" if base is SwinTransformer else "head",
            "pool_size": (7, 7) if base is SwinTransformer else None,
            "fixed_input_size": base
            is SwinTransformer,  # as timm's; its models that take any size are told apart by strict_img_size
        }
        for name, (base, _, _) in MODELS.items()
    }
)
for _name in TWINS:  # pretrained=True gives a twin its model's weights, so it has that model's configs, too
    default_cfgs |= generate_default_cfgs({f"locat_{tagged}": cfg for tagged, cfg in get_arch_pretrained_cfgs(_name).items()})
for _name, _entry in MODELS.items():
    register(_name, *_entry)
for _name, _options in TWINS.items():
    register_twin(_name, _options)
