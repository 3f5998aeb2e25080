"""Jumbo: a ViT whose class token is J times as wide as a patch token and has an MLP of its own (Fuller et al., arXiv:2502.15021).

In attention the wide token is J tokens; behind it, they are one vector of J * D that passes a wide MLP, which all blocks share.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, get_device_dtype, trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ssl_locat.errors import UserError


class JumboBlock(Block):
    """timm's block for the patches, and the shared wide MLP, with this block's norm and scale, for the class token."""

    def __init__(self, dim: int, num_class_tokens: int, init_values: float | None = None, drop_path: float = 0.0, **options: Any):
        super().__init__(dim, init_values=init_values, drop_path=drop_path, **options)
        wide = num_class_tokens * dim
        self.num_class_tokens = num_class_tokens
        self.norm3 = nn.LayerNorm(wide)
        self.ls3 = LayerScale(wide, init_values=init_values) if init_values else nn.Identity()
        self.drop_path3 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.shared: tuple[nn.Module, ...] = ()  # the model's wide MLP; in a tuple, so that the model alone owns its parameters

    def __prepare_scriptable__(self) -> "JumboBlock":
        """What TorchScript compiles in its place: it knows no modules in tuples, and lets blocks share one."""
        # a copy without __init__: it shares all parameters with the block that it stands for
        block = self.__new__(type(self))
        block.__dict__ = {**self.__dict__, "_modules": {**self._modules, "wide_mlp": self.shared[0]}}
        return block

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        # [B, J * D] and [B, N, D]
        wide, patches = x[:, : self.num_class_tokens].flatten(1), x[:, self.num_class_tokens :]
        wide = wide + self.drop_path3(self.ls3(self.transform_wide(self.norm3(wide))))
        patches = patches + self.drop_path2(self.ls2(self.mlp(self.norm2(patches))))
        return torch.cat([wide.unflatten(1, [self.num_class_tokens, -1]), patches], dim=1)

    def transform_wide(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.wide_mlp(x)
        else:
            return self.shared[0](x)


class JumboNorm(nn.LayerNorm):
    """Normalises the class token of [B, J + N, D] as one vector of J * D; patches by a norm of the model's own, or not at all."""

    def __init__(self, num_class_tokens: int, dim: int, for_patches: nn.Module | None):
        super().__init__(num_class_tokens * dim)
        self.num_class_tokens = num_class_tokens
        self.for_patches = (for_patches,)

    def __prepare_scriptable__(self) -> "JumboNorm":
        norm = self.__new__(type(self))
        norm.__dict__ = {**self.__dict__, "_modules": {**self._modules, "own_norm": self.for_patches[0] or nn.Identity()}}
        return norm

    def forward(self, x: Tensor) -> Tensor:
        wide = F.layer_norm(x[:, : self.num_class_tokens].flatten(1), self.normalized_shape, self.weight, self.bias, self.eps)
        patches = self.norm_patches(x[:, self.num_class_tokens :])
        return torch.cat([wide.unflatten(1, [self.num_class_tokens, -1]), patches], dim=1)

    def norm_patches(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.own_norm(x)
        else:
            return x if self.for_patches[0] is None else self.for_patches[0](x)


class Jumbo(VisionTransformer):
    """A timm VisionTransformer with a wide class token; `class_token` in models/tokens.py gives all J parts side by side.

    Args:
        num_class_tokens: J, how many times wider than a patch token.
        norm_patches: a final norm for patches too; the release has it with LocAt only.
        jumbo_mlp_ratio: hidden size of the shared wide MLP, in widths of the class token; by default the patches' mlp_ratio.
        options: as of VisionTransformer; positions are added to patches only, pooling is by the class token.
    """

    def __init__(
        self,
        num_class_tokens: int = 6,
        norm_patches: bool = False,
        num_classes: int = 1000,
        init_values: float | None = 1e-4,
        global_pool: str = "token",
        jumbo_mlp_ratio: float | None = None,
        **options: Any,
    ):
        if global_pool != "token":
            raise UserError(f"Jumbo pools by its class token, not by global_pool={global_pool!r}; leave it out")
        for name in ("class_token", "reg_tokens", "block_fn", "no_embed_class"):
            if name in options:
                raise UserError(f"Jumbo has no option {name}: it has one wide class token, without a position, and no registers")
        block: Any = partial(JumboBlock, num_class_tokens=num_class_tokens)
        super().__init__(num_classes=0, init_values=init_values, no_embed_class=True, block_fn=block, **options)
        dim = self.embed_dim
        self.num_prefix_tokens = num_class_tokens
        self.num_features = self.head_hidden_size = num_class_tokens * dim
        self.cls_token = nn.Parameter(torch.empty(1, num_class_tokens, dim))
        # timm's start of a class token
        nn.init.normal_(self.cls_token, std=1e-6)
        wide, ratio = num_class_tokens * dim, options.get("mlp_ratio", 4.0) if jumbo_mlp_ratio is None else jumbo_mlp_ratio
        self.jumbo_mlp = Mlp(wide, int(wide * ratio))
        for layer in (self.jumbo_mlp.fc1, self.jumbo_mlp.fc2):
            trunc_normal_(layer.weight, std=0.02)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        for each in self.blocks:
            # in a tuple, as a module would be registered, saved and counted once in every block
            each.shared = (self.jumbo_mlp,)
        self.norm_patches = nn.LayerNorm(dim) if norm_patches else None
        self.norm = JumboNorm(num_class_tokens, dim, self.norm_patches)
        self.reset_classifier(num_classes)
        self.register_load_state_dict_pre_hook(drop_copies_of_the_shared_mlp)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head: all classes start equally (un)likely, as in the release."""
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
            return
        self.head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self))
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, -math.log(num_classes))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        if prune_norm:
            self.norm_patches = None
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x[:, : self.num_prefix_tokens].flatten(1)


def drop_copies_of_the_shared_mlp(module: nn.Module, state: dict, prefix: str, *_: Any) -> None:
    """The release writes the shared MLP once per block besides; its names are dropped before the check of names."""
    for name in [n for n in state if n.startswith(f"{prefix}blocks.") and ".jumbo_mlp." in n]:
        del state[name]
