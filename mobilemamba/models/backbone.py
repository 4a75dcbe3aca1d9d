"""The backbone: patch embedding, three stages of blocks with transitions between them, pooling and head."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import (
    FFN,
    ConvNorm,
    DropPath,
    Folded,
    FoldedLinear,
    PatchEmbedding,
    PatchMerging,
    ResidualDepthwise,
    fold_batchnorm,
    is_short,
)
from .mrffi import MRFFI

__all__ = ["MobileMamba"]

Logits = Tensor | tuple[Tensor, Tensor]


class FeatureInfo(TypedDict):
    """What is known of a stage's feature map before any image is seen."""

    num_chs: int  # channels
    reduction: int  # stride against the image, in pixels
    module: str  # name of the module that ends the stage


class Block(nn.Module):
    """``x + DropPath(g(x))``, ``g`` = dw3, FFN, MRFFI, dw3, FFN, each with a residual of its own.

    The identity is there twice, inside ``g`` and around it: that is how the published weights were trained.
    """

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.depthwise0 = ResidualDepthwise(dim)
        self.ffn0 = FFN(dim)
        self.mixer = mixer
        self.depthwise1 = ResidualDepthwise(dim)
        self.ffn1 = FFN(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn0(self.depthwise0(x))
        y = self.mixer(y, y)
        return x + self.drop_path(self.ffn1(self.depthwise1(y)))

    def fold(self) -> nn.Module:
        return FoldedBlock(self)


class FoldedBlock(nn.Module):
    """A :class:`Block` whose layers are folded: the residual around ``g`` is added by its last layer."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.depthwise0, self.ffn0, self.mixer = block.depthwise0, block.ffn0, block.mixer
        self.depthwise1, self.ffn1 = block.depthwise1, block.ffn1

    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn0(self.depthwise0(x))
        y = self.mixer(y, y)
        return self.ffn1(self.depthwise1(y), x)


class Transition(nn.Sequential):
    """Between stages: dw3 and FFN at the old width, patch merging, dw3 and FFN at the new width."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(
            ResidualDepthwise(dim), FFN(dim), PatchMerging(dim, out_dim), ResidualDepthwise(out_dim), FFN(out_dim)
        )


class Stage(nn.Module):
    """An optional transition, then blocks. ``(B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))`` with a transition."""

    def __init__(self, transition: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.transition = transition
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = self._checkpointed(block, x)
            else:
                x = block(x)
        return x

    @torch.jit.unused
    def _checkpointed(self, block: nn.Module, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which decides by itself what to recompute
            return block(x)
        return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(block)))


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Recomputation in the backward pass sees each batch a second time; the running statistics must not."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


class Classifier(nn.Module):
    """BatchNorm and a linear layer on pooled features. ``(B, C) -> (B, num_classes)``."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    @torch.no_grad()
    def fold(self) -> FoldedLinear:
        norm, linear = self.norm, self.linear
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        bias = linear.bias + linear.weight @ (norm.bias - norm.running_mean * scale)
        return FoldedLinear(linear.weight * scale, bias)


class DistilledClassifier(nn.Module):
    """Two classifiers: both outputs in training, their mean in evaluation."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.labels = Classifier(dim, num_classes)
        self.teacher = Classifier(dim, num_classes)

    def forward(self, x: Tensor) -> Logits:
        labels, teacher = self.labels(x), self.teacher(x)
        if self.training:
            return labels, teacher
        return (labels + teacher) / 2

    @torch.no_grad()
    def fold(self) -> FoldedLinear:
        labels, teacher = self.labels.conv, self.teacher.conv  # folded already; the mean of linear layers is one
        labels.weight.add_(teacher.weight).div_(2)
        labels.bias.add_(teacher.bias).div_(2)
        return self.labels


class MobileMamba(nn.Module):
    """MobileMamba backbone with classifier. Images ``(B, in_chans, H, W)`` of any H and W -> logits ``(B, classes)``.

    Args:
        num_classes: classes of the head; 0 returns the pooled features ``(B, num_features)``.
        in_chans: image channels.
        distillation: two heads; in training the model returns both outputs, in evaluation their mean.
        widths: channels of the three stages.
        depths: blocks of the three stages.
        global_ratios, local_ratios: shares of the channels for the parts of MRFFI, per stage.
        wavelet_kernels: kernel size on the Haar sub-bands, per stage.
        local_kernels: kernel sizes of the local part, a tuple per stage.
        patch_strides: strides of the 3x3 convolutions of the patch embedding, whose widths double up to ``widths[0]``.
        ssm_ratio, d_state: inner width ratio and state size of the scan.
        drop_path_rate: stochastic depth, rising linearly over the blocks from 0 to this.

    Source: "MobileMamba: Lightweight Multi-Receptive Visual Mamba Network" (arXiv 2411.15941).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        distillation: bool = False,
        *,
        widths: tuple[int, int, int],
        depths: tuple[int, int, int],
        global_ratios: tuple[float, float, float] = (0.8, 0.7, 0.6),
        local_ratios: tuple[float, float, float] = (0.2, 0.2, 0.3),
        wavelet_kernels: tuple[int, int, int] = (7, 5, 3),
        local_kernels: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = ((7,), (5,), (3,)),
        patch_strides: tuple[int, ...] = (2, 2, 2, 2),
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.distillation = num_classes, in_chans, distillation
        self.num_features = widths[-1]
        reduction = 1
        stem: list[nn.Module] = []
        chans = in_chans
        for i, stride in enumerate(patch_strides):
            out_chans = widths[0] // 2 ** (len(patch_strides) - 1 - i)
            stem += [nn.ReLU()] if stem else []
            stem.append(ConvNorm(chans, out_chans, kernel=3, stride=stride))
            chans = out_chans
            reduction *= stride
        self.patch_embed = PatchEmbedding(*stem)

        rates = [drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        stages = []
        for i in range(3):
            transition = Transition(widths[i - 1], widths[i]) if i else nn.Identity()
            blocks = []
            for _ in range(depths[i]):
                mixer = MRFFI(
                    widths[i],
                    global_ratios[i],
                    local_ratios[i],
                    wavelet_kernels[i],
                    local_kernels[i],
                    ssm_ratio,
                    d_state,
                )
                blocks.append(Block(widths[i], mixer, rates.pop(0)))
            stages.append(Stage(transition, blocks))
        self.stages = nn.ModuleList(stages)
        self.feature_info: list[FeatureInfo] = [
            {"num_chs": widths[i], "reduction": reduction * 2**i, "module": f"stages.{i}"} for i in range(3)
        ]
        self.head = self._make_head()

    def _make_head(self) -> nn.Module:
        if self.num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {self.num_classes}")
        if self.num_classes == 0:
            return nn.Identity()
        kind = DistilledClassifier if self.distillation else Classifier
        return kind(self.num_features, self.num_classes)

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The feature maps after stages 1, 2 and 3: strides 16, 32 and 64 in the published presets."""
        if x.dim() != 4 or x.size(1) != self.in_chans:
            raise ValueError(
                f"input: expected images of shape (batch, {self.in_chans}, height, width), got {list(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"input: expected images of a floating-point type, scaled and normalised, got {x.dtype}")
        if x.size(2) < 1 or x.size(3) < 1:
            raise ValueError(f"input: expected height and width of at least 1, got {list(x.shape)}")
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    @overload
    def forward_features(self, x: Tensor, stages: Literal[False] = False) -> Tensor: ...
    @overload
    def forward_features(self, x: Tensor, stages: Literal[True]) -> list[Tensor]: ...
    @overload
    def forward_features(self, x: Tensor, stages: bool) -> Tensor | list[Tensor]: ...

    # TorchScript chooses an overload by the types of the arguments, not by their values: a call without `stages` takes
    # the first one, a call with `stages` the second one. It does not know the overloads in a subclass.
    if not TYPE_CHECKING:

        @torch.jit._overload_method
        def forward_features(self, x: Tensor, stages: None = None) -> Tensor: ...
        @torch.jit._overload_method
        def forward_features(self, x: Tensor, stages: bool) -> list[Tensor]: ...  # noqa: F811

    def forward_features(self, x: Tensor, stages: bool = False) -> Tensor | list[Tensor]:
        """Feature maps of images ``(B, in_chans, H, W)``.

        Returns:
            The last map ``(B, num_features, H/64, W/64)``; with ``stages=True`` the list of all three maps, as
            :meth:`forward_stages` returns it. Published presets have strides of 16, 32 and 64; sizes are rounded up.

        Raises:
            ValueError: as :meth:`forward_stages`.

        ``torch.jit.script`` compiles calls with ``stages=True`` and calls without ``stages``. A subclass of this class
        calls :meth:`forward_stages` instead.
        """
        maps = self.forward_stages(x)
        if torch.jit.is_scripting():
            if stages is None:
                return maps[-1]
            if not stages:
                raise ValueError("forward_features: expected stages=True or no stages in TorchScript, got stages=False")
            return maps
        return maps if stages else maps[-1]

    @overload
    def forward_head(self, x: Tensor, pre_logits: Literal[False] = False) -> Logits: ...
    @overload
    def forward_head(self, x: Tensor, pre_logits: Literal[True]) -> Tensor: ...
    @overload
    def forward_head(self, x: Tensor, pre_logits: bool) -> Logits: ...

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Logits:
        """Pooling and classifier on the last feature map; ``pre_logits`` stops after pooling."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Logits:
        return self.forward_head(self.forward_stages(x)[-1])

    @torch.jit.unused
    def reset_classifier(self, num_classes: int, distillation: bool | None = None) -> None:
        """Replace the head by a fresh one for ``num_classes`` classes (0: none), on the model's device and dtype."""
        self.num_classes = num_classes
        if distillation is not None:
            self.distillation = distillation
        self.head = self._make_head().to(next(self.parameters()))

    @torch.jit.unused
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep only the input of each block and recompute the rest.

        ``torch.compile`` disregards it: it decides by itself what to recompute.
        """
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.unused
    def no_weight_decay(self) -> set[str]:
        """Names of parameters with more than one dimension that are not decayed: those of the state space."""
        leaves = ("A_log", "D", "dt_bias")
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in leaves}

    @torch.jit.unused
    def fuse(self) -> "MobileMamba":
        """A copy for inference with equal outputs, in evaluation mode, every BatchNorm and scale folded away.

        Exact in real arithmetic: BatchNorm into its convolution or linear layer, the residual of a depthwise
        convolution into its centre tap, ``base_scale`` into ``out_proj``, the wavelet scale into the wavelet kernel,
        two heads into one. A model in 16 bits is folded in float32; its biases, depthwise kernels and scan parameters
        stay so.

        The copy can be moved, cast, copied, pickled, scripted, compiled and exported. Its parameters lie in the orders
        of the kernels, which safetensors does not store: keep the model that it is made from.
        """
        first = next(self.parameters())
        fused = copy.deepcopy(self).eval()
        fused = fold_batchnorm(fused.float()).to(first.dtype) if is_short(first) else fold_batchnorm(fused)
        fused.distillation = False
        for module in fused.modules():
            if isinstance(module, Folded) and next(module.parameters()).device.type == "cpu":
                module.pack()
        return fused.requires_grad_(False)
