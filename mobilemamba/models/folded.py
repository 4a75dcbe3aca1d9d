"""Folded layers, which ``fuse()`` makes, and the rules for folding: what may be folded, and how."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import depthwise_conv2d, pack_conv2d_weight, packed_conv2d, quantize_conv2d_weight

__all__ = [
    "ChannelAffine",
    "DenseConv2d",
    "DepthwiseConv2d",
    "Folded",
    "FoldedLinear",
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

    A layer's attribute ``unfolded`` has the names of its children that are called as they are, such as a user's mixer.

    Raises:
        ValueError: a part of a layer has hooks, or is of a class that is neither torch's nor this package's.
    """
    modules = list(model.named_modules())
    called = tuple(
        f"{name}.{child}.".lstrip(".") for name, layer in modules for child in getattr(layer, "unfolded", ())
    )
    for name, layer in modules:
        for inner, part in layer.named_modules(prefix=name) if hasattr(layer, "fold") else ():
            if f"{inner}.".startswith(called) and not f"{name}.".startswith(called):
                continue
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


def has_packed_products(weight: Tensor) -> bool:
    """Whether the kernels that multiply with ``weight`` read it packed: on CUDA those of tensor cores, in 16 bits.

    The other products on CUDA are torch's, for which a packed weight would be unpacked in every call.
    """
    if weight.device.type == "cuda":
        return is_short(weight) and torch.cuda.get_device_capability(weight.device)[0] >= 8
    return weight.device.type == "cpu"


def unpacked(weight: Tensor, shape: torch.Size) -> Tensor:
    """The weight of this shape, ``(out, in)`` or ``(out, in, k, k)``, that ``pack_conv2d_weight`` has packed."""
    out, in_chans, size = shape[0], shape[1], shape[2] if len(shape) == 4 else 1
    rows = weight.detach().permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:out, : in_chans * size**2]
    plain = rows.unflatten(1, (size, size, in_chans)).permute(0, 3, 1, 2)  # channels last in memory
    return plain.clone() if len(shape) == 4 else plain.reshape(shape).clone()


class Folded(nn.Module):
    """A folded layer. ``matrices`` names the parameters that have the dtype of the images.

    The other parameters are small: 16 bits would cost accuracy and save no time. So they stay float32 if the layer is
    cast to 16 bits. ``pack`` replaces the matrices by copies in the memory order of the kernels. After ``arrange`` they
    are packed wherever kernels read them so, and plain elsewhere, also when the layer moves or is cast. A memory format
    passed to ``to`` does not change the memory order of a parameter.

    ``sources`` has for each matrix that may be quantized the name of the layer, among those that were folded, whose
    input it multiplies; an empty name stands for the layer itself.
    """

    matrices: tuple[str, ...] = ()
    sources: dict[str, str] = {}  # noqa: RUF012  (TorchScript knows no ClassVar)

    def __init__(self) -> None:
        super().__init__()
        self.packed = self.arranged = False
        self.shapes: dict[str, torch.Size] = {}  # of the packed matrices

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

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        if self.arranged:
            self.arrange()
        return self

    @torch.no_grad()
    def arrange(self) -> None:
        """Pack or unpack the matrices, as it is best for their device and dtype, and from now on whenever these change.

        Quantized matrices stay as they are.
        """
        self.arranged = True
        matrices = [getattr(self, name) for name in self.matrices]
        if not all(matrix.is_floating_point() for matrix in matrices):
            return
        pack = all(map(has_packed_products, matrices))
        if pack and not self.packed:
            self.pack()
        elif self.packed and not pack:
            for name, matrix in zip(self.matrices, matrices, strict=True):
                plain = unpacked(matrix, self.shapes[name])
                setattr(self, name, nn.Parameter(plain, matrix.requires_grad))
            self.packed = False

    @torch.no_grad()
    def pack(self, scales: Mapping[str, tuple[float, int]] | None = None) -> None:
        """Pack the matrices, or quantize those whose input has a scale and a zero point in ``scales``."""
        if not self.packed:
            for name in self.matrices:
                weight = getattr(self, name)
                self.shapes[name] = weight.shape
                kernel = weight if weight.dim() == 4 else weight[:, :, None, None]
                if scales and name in scales:
                    setattr(self, name, nn.Parameter(quantize_conv2d_weight(kernel, *scales[name]), False))
                else:
                    setattr(self, name, nn.Parameter(pack_conv2d_weight(kernel), weight.requires_grad))
            self.packed = True


class DenseConv2d(Folded):
    """A folded convolution with activation."""

    matrices = ("weight",)
    sources = {"weight": ""}  # noqa: RUF012

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
