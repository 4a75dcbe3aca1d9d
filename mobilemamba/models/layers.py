"""The small layers that the network is built from: convolution with BatchNorm, FFN, patch merging, drop path."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import (
    conv_norm,
    depthwise_conv2d,
    ffn,
    ffn_norm,
    patch_embedding,
    patch_merging,
)
from . import checks
from .folded import (
    ChannelAffine,
    DenseConv2d,
    DepthwiseConv2d,
    Folded,
    are_plain,
    scale_and_shift,
)

__all__ = [
    "FFN",
    "ConvNorm",
    "DropPath",
    "FoldedFFN",
    "PatchEmbedding",
    "PatchMerging",
    "ResidualDepthwise",
    "SqueezeExcite",
]


class ConvNorm(nn.Module):
    """Bias-free "same" convolution, BatchNorm, activation. ``(B, C_in, H, W) -> (B, C_out, H', W')``.

    Args:
        norm_init: initial weight of the BatchNorm; 0 for the one that ends a residual branch.
        activation: "none" or "relu".
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        norm_init: float = 1.0,
        activation: str = "none",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_chans)
        self.activation = activation
        nn.init.constant_(self.norm.weight, norm_init)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not torch.jit.is_scripting():
            if self._trains_as_one(x):
                return self._train_as_one(x, residual, self.activation)
            if self._trains_folded(x):
                return self._train_folded(x, residual, self.activation)
        y = self.norm(self.conv(x))
        if self.activation == "relu":
            y = y.relu()
        return y if residual is None else y + residual

    @torch.jit.unused
    def _trains_as_one(self, x: Tensor) -> bool:
        """Whether one operator may stand for both layers: on a CPU, where it is faster, with statistics of a batch."""
        conv, norm = self.conv, self.norm
        if isinstance(x, torch.fx.Proxy) or not (are_plain(nn.Conv2d, conv) and are_plain(nn.BatchNorm2d, norm)):
            return False
        if norm.weight is None or norm.momentum is None or not (norm.training or norm.running_mean is None):
            return False
        stride = conv.stride[0]
        positions = x.size(0) * ((x.size(2) + stride - 1) // stride) * ((x.size(3) + stride - 1) // stride)
        return x.is_cpu and positions > 1

    @torch.jit.unused
    def _train_as_one(self, x: Tensor, residual: Tensor | None, activation: str, scale: Tensor | None = None) -> Tensor:
        """``scale``, ``(C_out,)``, multiplies the norm's output."""
        conv, norm = self.conv, self.norm
        weight: Tensor = norm.weight
        bias: Tensor = norm.bias
        if scale is not None:
            weight, bias = weight * scale, bias * scale
        y, mean, var = conv_norm(x, conv.weight, weight, bias, residual, conv.stride[0], activation, norm.eps)
        self._track(mean, var)
        return y

    @torch.jit.unused
    def _trains_folded(self, x: Tensor) -> bool:
        """Whether gradients go through the folded layer, on a CPU: a frozen norm is one more factor of the weight.

        The step takes 0.57 (nano) to 0.84 (s6) of the time with the norms as layers of their own.
        """
        conv, norm = self.conv, self.norm
        if isinstance(x, torch.fx.Proxy) or not (are_plain(nn.Conv2d, conv) and are_plain(nn.BatchNorm2d, norm)):
            return False
        if norm.weight is None or norm.training or norm.running_var is None:
            return False
        return self.training and x.is_cpu and torch.is_grad_enabled()

    @torch.jit.unused
    def _train_folded(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        conv = self.conv
        weight, bias = self.folded()
        if conv.groups == conv.in_channels == conv.out_channels:
            return depthwise_conv2d(x, weight, bias, residual, conv.stride[0], activation)
        if conv.kernel_size[0] == conv.stride[0] == 1:
            y = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        else:
            y = F.conv2d(x, weight, bias, conv.stride, conv.padding)
        y = y.relu() if activation == "relu" else y
        return y if residual is None else y + residual

    @torch.jit.unused
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics with those of a batch, ``(C_out,)``; the variance is unbiased."""
        norm = self.norm
        if norm.running_mean is not None and norm.running_var is not None and norm.training:
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)  # type: ignore[arg-type]
            norm.running_var.lerp_(var.to(norm.running_var.dtype), norm.momentum)  # type: ignore[arg-type]

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of one convolution that does the same with the running statistics."""
        scale, shift = scale_and_shift(self.norm)
        return self.conv.weight * scale[:, None, None, None], shift

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The same function as one layer, with the running statistics."""
        conv = self.conv
        weight, bias = self.folded()
        if conv.groups == conv.in_channels == conv.out_channels:
            if conv.kernel_size[0] == 1:
                return ChannelAffine(weight.flatten(), bias)
            return DepthwiseConv2d(weight, bias, conv.stride[0], self.activation)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return DenseConv2d(weight, bias, conv.stride[0], self.activation)


class PatchEmbedding(nn.Sequential):
    """Strided 3x3 convolutions with BatchNorm, and ReLU between them. The output is channels-last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # torch.vmap has no memory formats
        if not torch.jit.is_scripting():
            return self._with_relu(x)
        for layer in self:
            x = layer(x)
        return x

    @torch.jit.unused
    def _with_relu(self, x: Tensor) -> Tensor:
        """The layers in their order; a convolution that trains as one operator applies the ReLU after it."""
        layers = list(self)
        i = 0
        while i < len(layers):
            layer, i = layers[i], i + 1
            relu = i < len(layers) and type(layers[i]) is nn.ReLU and are_plain(nn.ReLU, layers[i])
            if relu and type(layer) is ConvNorm and are_plain(ConvNorm, layer) and layer._trains_as_one(x):
                x = layer._train_as_one(x, None, "relu")
                i += 1
            else:
                x = layer(x)
        return x

    def fold(self) -> nn.Module:
        convs: dict[str, DenseConv2d] = {}
        for name, conv in self.named_children():
            if isinstance(conv, DepthwiseConv2d):  # ConvNorm folds one channel to one channel so
                conv = DenseConv2d(conv.weight.detach(), conv.bias.detach(), conv.stride, "none")
            if isinstance(conv, DenseConv2d):
                convs[name] = conv
        for conv in list(convs.values())[:-1]:
            conv.activation = "relu"
        return FoldedPatchEmbedding(convs)


class FoldedPatchEmbedding(nn.Sequential):
    """A :class:`PatchEmbedding` with folded convolutions, which hold the parameters of one operator."""

    def __init__(self, convs: dict[str, DenseConv2d]) -> None:
        super().__init__(OrderedDict(convs))
        self.strides = [conv.stride for conv in convs.values()]

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # torch.vmap has no memory formats
        if not torch.jit.is_scripting():
            if not are_plain(DenseConv2d, *self):
                return super().forward(x)  # type: ignore[no-untyped-call]
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for conv in self:
            weights.append(conv.weight)  # type: ignore[arg-type]
            biases.append(conv.bias)  # type: ignore[arg-type]
        return patch_embedding(x, weights, biases, self.strides)

    def weights(self) -> list[Tensor]:
        weights: list[Tensor] = []
        for conv in self:
            weights += [conv.weight, conv.bias]  # type: ignore[list-item]
        return weights


class ResidualDepthwise(ConvNorm):
    """``x + BN(depthwise 3x3(x))``. ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, kernel=3, groups=dim, norm_init=0.0)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if not torch.jit.is_scripting():
            if self._trains_as_one(x):
                return self._train_as_one(x, x, "none")
            if self._trains_folded(x):
                return self._train_folded(x, None, "none")
        return x + self.norm(self.conv(x))

    def folded(self) -> tuple[Tensor, Tensor]:
        weight, bias = super().folded()
        weight[:, 0, 1, 1] += 1  # the residual is one more weight on the centre tap
        return weight, bias


class FFN(nn.Module):
    """``x + BN(1x1(ReLU(BN(1x1(x)))))`` with a hidden width of ``2 * dim``. ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand: nn.Module = ConvNorm(dim, 2 * dim, activation="relu")
        self.project: nn.Module = ConvNorm(2 * dim, dim, norm_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self._trains_as_one(x):
                return self._train_as_one(x)
        return self.project(self.expand(x), x)

    @torch.jit.unused
    def _trains_as_one(self, x: Tensor) -> bool:
        """As that of its layers."""
        layers = (self.expand, self.project)
        return are_plain(ConvNorm, *layers) and all(layer._trains_as_one(x) for layer in layers)  # type: ignore[operator]

    @torch.jit.unused
    def _train_as_one(self, x: Tensor) -> Tensor:
        expand, project = self.expand, self.project
        assert isinstance(expand, ConvNorm)
        assert isinstance(project, ConvNorm)
        y, expand_mean, expand_var, project_mean, project_var = ffn_norm(
            x,
            expand.conv.weight,
            expand.norm.weight,
            expand.norm.bias,
            project.conv.weight,
            project.norm.weight,
            project.norm.bias,
            expand.norm.eps,
            project.norm.eps,
        )
        expand._track(expand_mean, expand_var)
        project._track(project_mean, project_var)
        return y

    def fold(self) -> nn.Module:
        assert isinstance(self.expand, DenseConv2d)
        assert isinstance(self.project, DenseConv2d)
        return FoldedFFN(self.expand, self.project)


class FoldedFFN(Folded):
    """An :class:`FFN` whose convolutions are folded, with one more residual, as one operator."""

    matrices = ("expand_weight", "project_weight")
    sources = {"expand_weight": "expand", "project_weight": "project"}  # noqa: RUF012

    def __init__(self, expand: DenseConv2d, project: DenseConv2d) -> None:
        super().__init__()
        self.expand_weight, self.expand_bias = nn.Parameter(expand.weight.detach().flatten(1)), expand.bias
        self.project_weight, self.project_bias = nn.Parameter(project.weight.detach().flatten(1)), project.bias

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ffn(x, residual, self.expand_weight, self.expand_bias, self.project_weight, self.project_bias)

    def weights(self) -> list[Tensor]:
        return [self.expand_weight, self.expand_bias, self.project_weight, self.project_bias]


class SqueezeExcite(nn.Module):
    """Channel gate from the global mean. ``(B, C, H, W) -> (B, C, H, W)``; ``C/4`` hidden channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(dim, dim // 4, 1)
        self.expand = nn.Conv2d(dim // 4, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        reduce, expand = self.reduce, self.expand
        if not torch.jit.is_scripting():
            if not are_plain(nn.Conv2d, reduce, expand):
                return x * expand(reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        hidden = F.linear(x.mean((2, 3)), reduce.weight.flatten(1), reduce.bias).relu()
        gate = F.linear(hidden, expand.weight.flatten(1), expand.bias).sigmoid()
        return x * gate[:, :, None, None]

    @torch.no_grad()
    def fold(self) -> nn.Module:
        return FoldedSqueezeExcite(self)


class FoldedSqueezeExcite(nn.Module):
    """A :class:`SqueezeExcite` whose weights can be packed. ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, layer: SqueezeExcite) -> None:
        super().__init__()
        assert layer.reduce.bias is not None
        assert layer.expand.bias is not None
        self.reduce = DenseConv2d(layer.reduce.weight.detach(), layer.reduce.bias.detach(), 1, "relu")
        self.expand = DenseConv2d(layer.expand.weight.detach(), layer.expand.bias.detach(), 1, "none")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True))).sigmoid()


class PatchMerging(nn.Module):
    """Halves the resolution and changes the width. ``(B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))``."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.expand: nn.Module = ConvNorm(dim, hidden, activation="relu")
        self.depthwise: nn.Module = ConvNorm(hidden, hidden, kernel=3, stride=2, groups=hidden, activation="relu")
        self.squeeze_excite: nn.Module = SqueezeExcite(hidden)
        self.project: nn.Module = ConvNorm(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.squeeze_excite(self.depthwise(self.expand(x))))

    def fold(self) -> nn.Module:
        assert isinstance(self.expand, DenseConv2d)
        assert isinstance(self.depthwise, DepthwiseConv2d)
        assert isinstance(self.squeeze_excite, FoldedSqueezeExcite)
        assert isinstance(self.project, DenseConv2d)
        return FoldedPatchMerging(self.expand, self.depthwise, self.squeeze_excite, self.project)


class FoldedPatchMerging(nn.Module):
    """A :class:`PatchMerging` with folded layers, which hold the parameters of one operator."""

    def __init__(
        self,
        expand: DenseConv2d,
        depthwise: DepthwiseConv2d,
        squeeze_excite: FoldedSqueezeExcite,
        project: DenseConv2d,
    ) -> None:
        super().__init__()
        self.expand, self.depthwise, self.squeeze_excite, self.project = expand, depthwise, squeeze_excite, project

    def forward(self, x: Tensor) -> Tensor:
        expand, depthwise, gate, project = self.expand, self.depthwise, self.squeeze_excite, self.project
        if not torch.jit.is_scripting():
            if not are_plain(FoldedSqueezeExcite, gate):
                return project(gate(depthwise(expand(x))))
            convolutions = (expand, gate.reduce, gate.expand, project)
            if not (are_plain(DenseConv2d, *convolutions) and are_plain(DepthwiseConv2d, depthwise)):
                return project(gate(depthwise(expand(x))))
        w = self.weights()
        return patch_merging(x, w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9])

    def weights(self) -> list[Tensor]:
        squeeze, excite = self.squeeze_excite.reduce, self.squeeze_excite.expand
        return [
            self.expand.weight,
            self.expand.bias,
            self.depthwise.weight,
            self.depthwise.bias,
            squeeze.weight,
            squeeze.bias,
            excite.weight,
            excite.bias,
            self.project.weight,
            self.project.bias,
        ]


@torch.fx.wrap  # a call in the graph of a tracer, which does not know the number of dimensions
def drop_samples(x: Tensor, rate: float) -> Tensor:
    """``x`` with whole samples set to zero with probability ``rate``, and the others scaled up."""
    keep = 1.0 - rate
    mask = torch.empty([x.size(0)] + [1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
    return x * mask.div_(keep)


class DropPath(nn.Module):
    """Stochastic depth: in training, zeroes whole samples with probability ``rate`` and scales the rest up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = checks.real("drop path rate", rate, below=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        return drop_samples(x, self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
