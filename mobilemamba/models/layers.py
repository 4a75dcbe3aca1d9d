"""The small layers that the network is built from: convolution with BatchNorm, FFN, patch merging, drop path."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import (
    conv_norm,
    depthwise_conv2d,
    ffn,
    ffn_norm,
    pack_conv2d_weight,
    packed_conv2d,
    patch_embedding,
    patch_merging,
)
from . import checks

__all__ = [
    "FFN",
    "ChannelAffine",
    "ConvNorm",
    "DenseConv2d",
    "DepthwiseConv2d",
    "DropPath",
    "Folded",
    "FoldedFFN",
    "FoldedLinear",
    "PatchEmbedding",
    "PatchMerging",
    "ResidualDepthwise",
    "SqueezeExcite",
    "are_plain",
    "check_foldable",
    "fold_batchnorm",
    "in_order",
    "is_short",
    "scale_and_shift",
]


def fold_batchnorm(module: nn.Module) -> nn.Module:
    """Fold every BatchNorm under ``module``, in place if possible, and return the module to use instead.

    A layer takes part by defining ``fold()``, which is called after its children were folded.
    """
    for name, child in module.named_children():
        setattr(module, name, fold_batchnorm(child))
    fold = getattr(module, "fold", None)
    return fold() if fold is not None else module


def check_foldable(model: nn.Module) -> None:
    """Refuse layers that do more than :func:`fold_batchnorm` knows of: their hooks or changes would be lost.

    Raises:
        ValueError: a part of a layer has hooks, or is of a class that is neither torch's nor this package's.
    """
    for name, layer in model.named_modules():
        for inner, part in layer.named_modules(prefix=name) if hasattr(layer, "fold") else ():
            if part._forward_hooks or part._forward_pre_hooks:
                raise ValueError(
                    f"fuse: {inner} has hooks, which the fused layer would not run; remove them before "
                    "(for pruning: torch.nn.utils.prune.remove)"
                )
            if ".parametrizations." in inner:
                continue  # a parametrized weight is folded with the value that it has
            known = type(part).forward.__module__.startswith(("torch.nn.", f"{__package__}."))
            if not known or "forward" in part.__dict__:
                raise ValueError(
                    f"fuse: {inner} is a {type(part).__name__} with a forward of its own, which the fused layer would "
                    "not run; put the original layer back before (for LoRA: merge the adapters)"
                )


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``(C,)`` and ``(C,)``: a BatchNorm in evaluation multiplies by the first and adds the second."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None or norm.weight is None:
        raise ValueError(f"fuse: expected a BatchNorm with running statistics, weight and bias, got {norm}")
    assert norm.running_mean is not None  # as running_var
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def in_order(weight: Tensor, *dims: int) -> nn.Parameter:
    """The same weight with the memory order ``dims``; a kernel reads its own order without a copy."""
    inverse = sorted(range(len(dims)), key=lambda i: dims[i])
    return nn.Parameter(weight.detach().permute(dims).contiguous().permute(inverse))


def are_plain(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether a call of each module does only what ``kind.forward`` does, so that an operator may read its parameters.

    It does more where a module was replaced (LoRA, quantization) or has hooks (pruning, sharding). Then it is called.
    """
    forward = kind.forward
    for m in modules:
        if type(m).forward is not forward or "forward" in m.__dict__:
            return False
        if m._forward_pre_hooks or m._forward_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
    return True


def is_short(tensor: Tensor) -> bool:
    """Whether the dtype has 16 bits."""
    return tensor.dtype in (torch.float16, torch.bfloat16)


class Folded(nn.Module):
    """A folded layer. ``matrices`` names the parameters that have the dtype of the images.

    The other parameters are small: 16 bits would cost accuracy and save no time. So they stay float32 if the layer is
    cast to 16 bits. ``pack`` replaces the matrices by copies in the memory order of the CPU kernel. A memory format
    passed to ``to`` does not change the memory order of a parameter.
    """

    matrices: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.packed = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Folded":
        small = [p for name, p in self.named_parameters(recurse=False) if name not in self.matrices]
        kept = {id(tensor) for p in small for tensor in (p, p.grad)}

        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in kept and is_short(result) and not is_short(tensor):
                result = tensor.to(result.device, torch.float32)
            if result.shape == tensor.shape and result.stride() != tensor.stride():
                as_it_was = torch.empty_strided(tensor.shape, tensor.stride(), dtype=result.dtype, device=result.device)
                result = as_it_was.copy_(result)
            return result

        return super()._apply(apply, recurse)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def pack(self) -> None:
        if not self.packed:
            for name in self.matrices:
                weight = getattr(self, name)
                kernel = weight if weight.dim() == 4 else weight[:, :, None, None]
                setattr(self, name, nn.Parameter(pack_conv2d_weight(kernel), weight.requires_grad))
            self.packed = True


class DenseConv2d(Folded):
    """A folded convolution with activation."""

    matrices = ("weight",)

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, activation: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.kernel_size, self.stride, self.activation = weight.size(3), stride, activation

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return packed_conv2d(x, self.weight, self.bias, None, self.kernel_size, self.stride, self.activation)
        bias = self.bias.to(x.dtype)
        if self.kernel_size == 1 and self.stride == 1:
            y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), bias).permute(0, 3, 1, 2)
        else:
            y = F.conv2d(x, self.weight, bias, self.stride, self.kernel_size // 2)
        return y.relu_() if self.activation == "relu" else y


class FoldedLinear(nn.Module):
    """A folded linear layer whose weight can be packed. ``(B, C) -> (B, out)``."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.conv = DenseConv2d(weight[:, :, None, None], bias, 1, "none")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :, None, None]).flatten(1)

    def weights(self) -> list[Tensor]:
        return [self.conv.weight, self.conv.bias]


class DepthwiseConv2d(Folded):
    """A folded depthwise convolution with activation, as one operator."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, activation: str) -> None:
        super().__init__()
        self.weight, self.bias = in_order(weight, 1, 2, 3, 0), nn.Parameter(bias)
        self.stride, self.activation = stride, activation

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, None, self.stride, self.activation)

    def weights(self) -> list[Tensor]:
        return [self.weight, self.bias]


class ChannelAffine(nn.Module):
    """A folded depthwise 1x1 convolution: one weight and bias per channel."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


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
