"""The small layers in standard operators: convolutions, FFN, patch embedding and patch merging, the head."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.folded import DenseConv2d, DepthwiseConv2d, FoldedLinear
from ...models.layers import FoldedFFN, FoldedPatchEmbedding, FoldedPatchMerging, FoldedSqueezeExcite
from ...ops import pack_conv2d_weight

__all__ = [
    "PortableFFN",
    "PortableLinear",
    "PortableSqueezeExcite",
    "convolution",
    "dense",
    "depthwise",
    "patch_embedding",
    "patch_merging",
    "unpacked",
]


def unpacked(weight: Tensor, *shape: int) -> Tensor:
    """The weight of this shape, ``(out, in)`` or ``(out, in, k, k)``, that was packed by ``pack_conv2d_weight``."""
    if weight.dtype == torch.int8:
        raise ValueError("portable: expected a model that is not quantized: standard operators take its float weights")
    count = torch.Size(shape).numel()
    kernel = shape if len(shape) == 4 else (*shape, 1, 1)
    numbers = pack_conv2d_weight(torch.arange(1, count + 1, dtype=torch.float64).view(kernel)).flatten().long()
    flat = weight.new_empty(count + 1)
    flat[numbers] = weight.detach().flatten()  # number 0 is where the packed weight is filled up
    return flat[1:].view(shape)


def convolution(weight: Tensor, bias: Tensor | None = None, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A "same" convolution with these values; a matrix ``(out, in)`` stands for a 1x1 kernel."""
    weight = weight if weight.dim() == 4 else weight[:, :, None, None]
    out_chans, in_chans, size, _ = weight.shape
    conv = nn.Conv2d(in_chans * groups, out_chans, size, stride, size // 2, groups=groups, bias=bias is not None)
    conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return conv


def dense(layer: DenseConv2d, in_chans: int | None = None) -> nn.Module:
    """``in_chans`` is needed for a packed 1x1 kernel, whose rows may be filled up to an even length."""
    weight: Tensor = layer.weight
    if layer.packed:
        size = layer.kernel_size
        if in_chans is None:
            if size == 1:
                raise ValueError("a packed 1x1 convolution in a place of its own has no form in standard operators")
            in_chans = 2 * weight.size(1) // size**2
        weight = unpacked(weight, layer.bias.numel(), in_chans, size, size)
    conv = convolution(weight, layer.bias, layer.stride)
    return nn.Sequential(conv, nn.ReLU()) if layer.activation == "relu" else conv


def depthwise(layer: DepthwiseConv2d) -> nn.Module:
    conv = convolution(layer.weight, layer.bias, layer.stride, groups=layer.bias.numel())
    if layer.activation == "none":
        return conv
    return nn.Sequential(conv, {"relu": nn.ReLU, "silu": nn.SiLU}[layer.activation]())


def patch_embedding(layer: FoldedPatchEmbedding) -> nn.Module:
    return nn.Sequential(*(dense(conv) for conv in layer))  # type: ignore[arg-type]


class PortableFFN(nn.Module):
    """A :class:`FoldedFFN`. ``(B, C, H, W) -> (B, C, H, W)``; adds ``residual`` where given."""

    def __init__(self, layer: FoldedFFN) -> None:
        super().__init__()
        dim, hidden = layer.project_bias.numel(), layer.expand_bias.numel()
        expand: Tensor = layer.expand_weight
        project: Tensor = layer.project_weight
        if layer.packed:
            expand, project = unpacked(expand, hidden, dim), unpacked(project, dim, hidden)
        self.expand, self.project = convolution(expand, layer.expand_bias), convolution(project, layer.project_bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = x + self.project(F.relu(self.expand(x)))
        return y if residual is None else y + residual


class PortableSqueezeExcite(nn.Module):
    """A :class:`FoldedSqueezeExcite`. ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, layer: FoldedSqueezeExcite) -> None:
        super().__init__()
        hidden, dim = layer.reduce.bias.numel(), layer.expand.bias.numel()
        self.reduce, self.expand = dense(layer.reduce, dim), dense(layer.expand, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True))).sigmoid()


def patch_merging(layer: FoldedPatchMerging) -> nn.Module:
    hidden = layer.expand.bias.numel()
    return nn.Sequential(
        dense(layer.expand, hidden // 4),  # PatchMerging has four times as many hidden channels
        depthwise(layer.depthwise),
        PortableSqueezeExcite(layer.squeeze_excite),
        dense(layer.project, hidden),
    )


class PortableLinear(nn.Linear):
    """A :class:`FoldedLinear`. ``(B, in_chans) -> (B, out)``."""

    def __init__(self, layer: FoldedLinear, in_chans: int) -> None:
        conv: Any = dense(layer.conv, in_chans)
        super().__init__(in_chans, conv.out_channels)
        self.weight, self.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias
