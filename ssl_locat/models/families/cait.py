"""CaiT: patches among themselves by attention whose heads talk; then a class token that only asks, and lies nowhere."""

from timm.models.cait import Cait, ClassAttn, TalkingHeadAttn
from torch import Tensor

from ssl_locat.models.families.front import Family, GaugFront, LocAtFixed, blocks_of, patch_grid, project


class GaugTalkingHeads(GaugFront):
    project = project

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D], patches alone."""
        q, k, v = self.project(x)
        grid = self.patches[0].grid_size
        coefficients = self.gaug(q, grid, k=k, x=x)
        logits = self.talk(q @ k.mT * self.scale, self.proj_l)  # [B, heads, N, N]
        # behind the talk: heads exchange what they found, while a bump belongs to its own query (a negative weight would turn it over)
        weights = (logits + self.gaug.bias(coefficients, grid).to(logits.dtype)).softmax(-1)
        weights = self.attn_drop(self.talk(weights, self.proj_w))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))

    @staticmethod
    def talk(logits: Tensor, mix) -> Tensor:
        return mix(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LocAtCait(LocAtFixed):
    def place_gaugs(self, stages) -> None:
        super().place_gaugs(stages)
        for attention in stages[0]:
            attention.num_prefix_tokens = 0  # the class token comes after these blocks


CAIT = Family(
    Cait,
    ("cait",),
    LocAtCait,
    {TalkingHeadAttn: GaugTalkingHeads},
    blocks_of,
    patch_grid,
    where="among the patches of the image, added behind the heads' talk",
    kept={ClassAttn: "the class token alone asks, and it lies nowhere in the image"},
)
