"""Files that are no weights, or not those of a model we know: a message, whatever torch or timm ran into."""

import pytest
import torch

from ssl_locat.errors import CheckpointError
from ssl_locat.models.backbone import create_backbone, init_weights, load_backbone

PATCH = {"patch_embed.proj.weight": torch.zeros(48, 3, 8, 8)}
FIRST = {**PATCH, "blocks.0.norm1.weight": torch.zeros(48)}


@pytest.mark.parametrize("text", ["hello world\n", "a\n", ".", "RRRR", "t1", "1.5 2.5\n", "<html></html>", ""])
def test_a_text_file_is_no_weights(tmp_path, text):
    (tmp_path / "weights.pth").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"weights.pth is no file of weights: expected what torch.save wrote, or a .safetensors"
    ):
        load_backbone(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (PATCH, r"no blocks.0, blocks.1, \.\.\., so these are not weights"),
        ({0: torch.zeros(3)}, "holds no weights: expected a state dict"),
        ({"model": {1: torch.zeros(3)}}, "holds no weights: expected a state dict"),
        ({**PATCH, 0: torch.zeros(3)}, r"no blocks.0"),
        ({**FIRST, "jumbo_mlp.fc1.weight": torch.zeros(3, 3)}, r"not weights of a timm, DINO or LocAt model, .*'cls_token'"),
        ({**FIRST, "pos_embed": torch.zeros(48)}, "do not fit this"),
        (
            {**PATCH, "layers.0.blocks.0.norm1.weight": torch.zeros(48), "layers.0.blocks.0.attn.gaug.x": torch.zeros(1)},
            "names are alike",
        ),
    ],
)
def test_a_state_dict_of_something_else_is_reported(tmp_path, state, message):
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        load_backbone(str(tmp_path / "weights.pth"))


def test_tensors_that_cannot_be_converted_are_reported(tmp_path):
    torch.save({"patch_embed.proj.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"do not fit this VisionTransformer: shape .* is invalid"):
        init_weights(create_backbone("vit_tiny_patch16_224", depth=1), str(tmp_path / "weights.pth"))
