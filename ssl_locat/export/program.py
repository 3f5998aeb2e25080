"""model.onnx and model.pt2: the backbone as a program that runs without this package, at any size that the patch divides."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssl_locat.errors import UserError
from ssl_locat.export.parity import TOLERANCE, BothTokens, compare, shapes_of

log = logging.getLogger(__name__)

AXES = {0: "batch", 2: "height", 3: "width"}  # of the images, as ONNX names them


def write_program(backbone: nn.Module, path: Path) -> tuple[Callable, list[tuple[int, int, int]]]:
    """Write model.onnx or model.pt2; returns the written file as a function, and the sizes (batch, height, width) it was made for.

    Any batch size; any image size where the architecture's graph allows it, else the size it was trained at.
    """
    module, (channels, height, width) = BothTokens(backbone.eval()), backbone.pretrained_cfg["input_size"]
    shapes = shapes_of(backbone)
    # two images: the exporter takes a size of 1 for a constant
    images = torch.zeros(2, channels, height, width)
    write = {".onnx": _write_onnx, ".pt2": _write_pt2}[path.suffix]
    if len({shape[1:] for shape in shapes}) > 1:
        try:
            outputs = write(module, images, {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, path)
            # some graphs export, and are wrong at other sizes
            compare(backbone, outputs, shapes, TOLERANCE[path.suffix[1:]])
            return outputs, shapes
        except Exception as error:  # exporters raise whatever they like for a shape that they cannot keep open
            log.debug("%s with open image sizes failed: %s", path.suffix[1:], error)
            log.warning(
                "%s: this architecture exports at %d x %d only; other formats take any size.", path.suffix[1:], height, width
            )
    # the batch stays open
    return write(module, images, {0: Dim.AUTO}, path), [(1, height, width), (3, height, width)]


class PlainOperations(TorchFunctionMode):
    """While exporting: what exporters translate wrongly, said in operations that they know.

    Fused attention has strides that the decomposition for ONNX gets wrong; repeat_interleave with a symbolic count does not repeat there; and
    a convolution cuts off the rest of a side that the patch does not divide, where timm refuses: a reshape cannot.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        plain = {
            F.scaled_dot_product_attention: _plain_attention,
            torch.Tensor.repeat_interleave: _plain_repeat,
            F.conv2d: _patches,
        }
        return plain.get(function, function)(*args, **(kwargs or {}))


def _plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v


def _plain_repeat(x, repeats, dim):
    # [..., n, ...] -> [..., n, 1, ...] -> [..., n, repeats, ...] -> [..., n * repeats, ...]
    dim %= x.ndim
    return x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :]).flatten(dim, dim + 1)


def _patches(images, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    rows, cols = weight.shape[2:]  # of pixels in a patch
    if (tuple(stride), tuple(padding), groups) != ((rows, cols), (0, 0), 1):
        return F.conv2d(images, weight, bias, stride, padding, dilation, groups)
    cut = images.unflatten(2, (-1, rows)).unflatten(4, (-1, cols))  # [B, C, H / rows, rows, W / cols, cols]
    # a patch as one row: [B, H / rows, W / cols, C * rows * cols] @ [C * rows * cols, D]
    out = cut.permute(0, 2, 4, 1, 3, 5).flatten(3) @ weight.flatten(1).T
    return (out if bias is None else out + bias).permute(0, 3, 1, 2)


def _program(module: nn.Module, images: Tensor, dynamic: dict) -> torch.export.ExportedProgram:
    with PlainOperations(), torch.no_grad():
        return torch.export.export(module, (images,), dynamic_shapes={"images": dynamic})


def _write_pt2(module: nn.Module, images: Tensor, dynamic: dict, path: Path) -> Callable:
    # decomposed, since the regions without autocast that GAug opens cannot be written with symbolic sizes
    torch.export.save(_program(module, images, dynamic).run_decompositions(), path)
    return torch.export.load(path).module()


def _write_onnx(module: nn.Module, images: Tensor, dynamic: dict, path: Path) -> Callable:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError:
        raise UserError("ONNX export needs onnx, onnxruntime and onnxscript: pip install 'ssl_locat[onnx]'.") from None
    names = ["class_token", "patch_tokens"]
    program = torch.onnx.export(_program(module, images, dynamic), input_names=["images"], output_names=names, verbose=False)
    assert program is not None  # given to whoever names no file
    _name_axes(program.model.graph)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(array) for array in session.run(names, {"images": images.numpy()})]


def _name_axes(graph: Any) -> None:
    """The open axes by what they are, instead of the exporter's `s77`; that of the patches, a formula of two others, too."""
    (images,) = graph.inputs
    # the same symbol stands wherever a size follows from this one
    names = {str(images.shape[axis].value): name for axis, name in AXES.items() if not isinstance(images.shape[axis], int)}
    for value in (images, *graph.outputs, *(out for node in graph for out in node.outputs)):
        if value.shape is not None:
            for axis, dim in enumerate(value.shape):
                if not isinstance(dim, int) and str(dim.value) in names:
                    value.shape[axis] = names[str(dim.value)]
    for value in graph.outputs:
        if len(value.shape) == 3 and not isinstance(value.shape[1], int):
            value.shape[1] = "patches"
