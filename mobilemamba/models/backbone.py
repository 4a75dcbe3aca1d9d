"""The network: patch embedding, stages, pooling and head; and its fused form."""

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor, nn

from ..ops import backbone
from . import checks
from .folded import (
    DenseConv2d,
    DepthwiseConv2d,
    Folded,
    FoldedLinear,
    are_plain,
    check_foldable,
    fold_batchnorm,
    is_short,
)
from .heads import Classifier, DistilledClassifier, Logits
from .layers import ConvNorm, FoldedFFN, FoldedPatchEmbedding, FoldedPatchMerging, FoldedSqueezeExcite, PatchEmbedding
from .mixers import check_mixer
from .mrffi import MRFFI, FoldedMRFFI
from .quantization import input_scales
from .stages import Block, FoldedBlock, FoldedStage, FoldedTransition, Stage, Transition

__all__ = ["MobileMamba"]


class FeatureInfo(TypedDict):
    """What is known of a stage's feature map before any image is seen."""

    num_chs: int  # channels
    reduction: int  # stride against the image, in pixels
    module: str  # name of the module that ends the stage


#: The classes of the modules in a fused model, but for the first stage's transition.
FOLDED_LAYERS = frozenset(
    {
        DenseConv2d,
        DepthwiseConv2d,
        FoldedBlock,
        FoldedFFN,
        FoldedLinear,
        FoldedMRFFI,
        FoldedPatchEmbedding,
        FoldedPatchMerging,
        FoldedSqueezeExcite,
        FoldedStage,
        FoldedTransition,
        nn.ModuleList,
    }
)

#: Of the scan, and of other mixers: their initial states and norms, their decays, and how they mix neighbours.
NOT_DECAYED = frozenset(
    {"A_log", "D", "dt_bias", "state_bias", "state_norm_weight", "state_norm_bias", "decay", "bonus", "mix"}
)


@torch.fx.wrap  # a call in the graph of a tracer, which cannot follow conditions on the shape
def checked_images(x: Tensor, in_chans: int) -> Tensor:
    """``x``, which are images ``(B, in_chans, H, W)``.

    Raises:
        ValueError: the shape or the type of the images does not fit.
    """
    if x.dim() != 4 or x.size(1) != in_chans:
        raise ValueError(f"input: expected images of shape (batch, {in_chans}, height, width), got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"input: expected images of a floating-point type, scaled and normalised, got {x.dtype}")
    if x.size(2) < 1 or x.size(3) < 1:
        raise ValueError(f"input: expected height and width of at least 1, got {list(x.shape)}")
    return x


class MobileMamba(nn.Module):
    """MobileMamba backbone with classifier: images ``(B, in_chans, H, W)`` -> logits ``(B, num_classes)``.

    H and W may be any size from 1 on, odd or even. Images are floating point, scaled and normalised.

    Args:
        num_classes: classes of the head. With 0 the model returns the pooled features ``(B, num_features)``.
        in_chans: image channels.
        distillation: two heads. Training returns the outputs of both as a tuple, evaluation returns their mean.
        widths: channels of each stage. Their number is the number of stages; the published networks have three. Each
            stage but the first halves the map.
        depths: number of blocks in each stage.
        global_ratios, local_ratios: for each stage, the shares of the channels that go to the global and to the local
            part of MRFFI. 0 leaves a part out. The identity part is the rest: none with a local ratio of 1.
        wavelet_kernels: for each stage, the kernel size on the Haar sub-bands, odd; 0 for no wavelet part.
            The operator of ``fuse()`` has one of size 1 with weights of zero then.
        local_kernels: for each stage, the kernel sizes of the local part; odd.
        patch_strides: strides of the 3x3 convolutions of the patch embedding. Their widths double up to ``widths[0]``.
        ssm_ratio: inner width of the scan over the width of the global part.
        d_state: state size of the scan.
        directions: of the scan: 2, or 1 for the one from the first pixel to the last one alone. The operator computes a
            second direction with parameters of zero then: it takes the time of two.
        mixer: what mixes the pixels in the global part: ``"mamba"``, the scan; ``"ttt"``, ``"mlstm"`` or ``"rwkv6"``
            (:mod:`mobilemamba.models.mixers`), in plain PyTorch; or a function of the channels C that makes a module
            ``(B, C, H, W) -> (B, C, H, W)``. ``ssm_ratio``, ``d_state`` and ``directions`` are the scan's.
        drop_path_rate: rate of stochastic depth in the last block. It rises linearly from 0 in the first block.

    Attributes:
        num_features: channels of the last feature map.
        feature_info: for each stage, its channels, its stride and the name of the module that ends it.

    Raises:
        ValueError: an argument is out of its range.

    Source: "MobileMamba: Lightweight Multi-Receptive Visual Mamba Network" (arXiv 2411.15941).
    """

    __constants__ = ("fused", "fused_head")  # torch.jit.script compiles only the branch that runs

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        distillation: bool = False,
        *,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        global_ratios: tuple[float, ...] = (0.8, 0.7, 0.6),
        local_ratios: tuple[float, ...] = (0.2, 0.2, 0.3),
        wavelet_kernels: tuple[int, ...] = (7, 5, 3),
        local_kernels: tuple[tuple[int, ...], ...] = ((7,), (5,), (3,)),
        patch_strides: tuple[int, ...] = (2, 2, 2, 2),
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        directions: int = 2,
        mixer: str | Callable[[int], nn.Module] = "mamba",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        in_chans = checks.integer("in_chans", in_chans)
        widths = checks.integers("widths", widths)
        count = len(widths)
        depths = checks.integers("depths", depths, count, least=0)
        global_ratios = checks.sequence("global_ratios", global_ratios, count)
        local_ratios = checks.sequence("local_ratios", local_ratios, count)
        wavelet_kernels = checks.sequence("wavelet_kernels", wavelet_kernels, count)
        local_kernels = checks.sequence("local_kernels", local_kernels, count)
        patch_strides = checks.integers("patch_strides", patch_strides)
        check_mixer(mixer)
        if mixer != "mamba" and (ssm_ratio, d_state, directions) != (2.0, 1, 2):
            raise ValueError(
                "ssm_ratio, d_state, directions: expected the defaults, since they are mamba's, got "
                f"{ssm_ratio}, {d_state}, {directions} with mixer={mixer!r:.100}"
            )
        drop_path_rate = checks.real("drop_path_rate", drop_path_rate, below=1)
        self.in_chans, self.num_features = in_chans, widths[-1]
        self.fused = False
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
        for i in range(count):
            transition = Transition(widths[i - 1], widths[i]) if i else nn.Identity()
            blocks = []
            for _ in range(depths[i]):
                mrffi = MRFFI(
                    widths[i],
                    global_ratios[i],
                    local_ratios[i],
                    wavelet_kernels[i],
                    local_kernels[i],
                    ssm_ratio,
                    d_state,
                    directions,
                    mixer,
                )
                blocks.append(Block(widths[i], mrffi, rates.pop(0)))
            stages.append(Stage(transition, blocks))
        self.stages = nn.ModuleList(stages)
        feature_info: list[FeatureInfo] = [
            {"num_chs": widths[i], "reduction": reduction * 2**i, "module": f"stages.{i}"} for i in range(count)
        ]
        self.feature_info = feature_info  # in two steps, as the head
        self._set_head(num_classes, distillation)

    def _set_head(self, num_classes: int, distillation: bool) -> None:
        num_classes = checks.integer("num_classes", num_classes, least=0)
        kind = DistilledClassifier if checks.flag("distillation", distillation) else Classifier
        head: nn.Module = kind(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = head  # in two steps: torch.jit.script warns of an annotated attribute of self
        self.fused_head = False
        self.num_classes, self.distillation = num_classes, distillation

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """The feature maps after each stage of images ``(B, in_chans, H, W)``.

        Returns:
            Maps ``(B, widths[i], ceil(H / stride), ceil(W / stride))``, channels-last in memory. The published presets
            have strides of 16, 32 and 64; ``feature_info`` has them for every model.

        Raises:
            ValueError: the shape or the type of the images does not fit.
        """
        x = checked_images(x, self.in_chans)
        if self.fused:
            if torch.jit.is_scripting() or self._runs_as_one(x, False):
                return self._run_fused(x, None, None)
        x = self.patch_embed(x)
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    @torch.jit.unused
    def _runs_as_one(self, x: Tensor, head: bool) -> bool:
        """Whether one operator may stand for the fused layers: none has hooks or was replaced, and no tracer asks."""
        if isinstance(x, torch.fx.Proxy) or not self._is_whole():
            return False
        first = self.stages[0].transition
        parts = (self.patch_embed, self.stages, self.head) if head else (self.patch_embed, self.stages)
        modules = (m for part in parts for m in part.modules() if m is not first)
        return all(type(m) in FOLDED_LAYERS and are_plain(type(m), m) for m in modules)

    @torch.jit.unused
    def __prepare_scriptable__(self) -> "MobileMamba":
        """What torch.jit.script compiles: layer by layer where one operator may not stand for the fused layers."""
        if not self.fused:
            return self
        scripted = copy.copy(self)
        scripted.fused = self._runs_as_one(torch.empty(0), False)
        scripted.fused_head = self.fused_head and self._runs_as_one(torch.empty(0), True)
        return scripted

    @torch.jit.unused
    def _is_whole(self) -> bool:
        """Whether the stages are built as the operator expects. Users take layers out, or set the eps of a norm."""
        blocks: list[nn.Module] = []
        for i, stage in enumerate(self.stages):
            if type(stage.transition) is not (FoldedTransition if i else nn.Identity):
                return False
            blocks += stage.blocks  # type: ignore[arg-type]
        if not all(type(block) is FoldedBlock and type(block.mixer) is FoldedMRFFI for block in blocks):
            return False
        return len(self.stages) > 0 and len({block.mixer.eps for block in blocks}) <= 1  # type: ignore[union-attr]

    def _run_fused(self, x: Tensor, head_weight: Tensor | None, head_bias: Tensor | None) -> list[Tensor]:
        weights = self.patch_embed.weights()  # type: ignore[operator]
        depths: list[int] = []
        eps = 1e-5
        for stage in self.stages:
            weights += stage.weights()  # type: ignore[operator]
            depths.append(len(stage.blocks))  # type: ignore[arg-type]
            for block in stage.blocks:  # type: ignore[union-attr]
                eps = block.mixer.eps
        strides = self.patch_embed.strides
        return backbone(x, weights, strides, depths, head_weight, head_bias, eps)  # type: ignore[arg-type]

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
            The map after the last stage. With ``stages=True`` the list of all maps, as :meth:`forward_stages`
            returns it.

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
        """Pooling and classifier on the last feature map ``(B, num_features, H, W)``.

        Returns:
            Logits ``(B, num_classes)``, or a tuple of two where the model has two heads and trains. With
            ``pre_logits=True`` the pooled features ``(B, num_features)``.
        """
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Logits:
        if self.fused_head:
            if torch.jit.is_scripting() or self._runs_as_one(x, True):
                head = self.head.weights()  # type: ignore[operator]
                return self._run_fused(checked_images(x, self.in_chans), head[0], head[1])[-1]
        return self.forward_head(self.forward_stages(x)[-1])

    @torch.jit.unused
    def reset_classifier(self, num_classes: int, distillation: bool | None = None) -> None:
        """Replace the head by a fresh one on the model's device, in its dtype and its mode (training or evaluation).

        The parameters of the new head require gradients, also if the others are frozen.

        Args:
            num_classes: classes of the new head; 0 for no head.
            distillation: whether the new head is two heads; None keeps the model's choice.

        Raises:
            ValueError: an argument is out of its range or of another type. The head stays then.
        """
        *_, last = self.stages.parameters()
        with last.device:
            self._set_head(num_classes, self.distillation if distillation is None else distillation)
        self.head.to(next(self.parameters()).dtype).train(self.training)

    @torch.jit.unused
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save memory in training at the price of time: keep only the input of each block and recompute the rest.

        It has no effect under ``torch.compile``, which decides by itself what to recompute.
        """
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.unused
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of the state space. They get no weight decay, though some have two dimensions."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in NOT_DECAYED}

    @torch.jit.unused
    def fuse(self) -> "MobileMamba":
        """A copy for inference, in evaluation mode, with every BatchNorm and scale folded into a neighbouring layer.

        Outputs are equal up to rounding. BatchNorm goes into its convolution or linear layer, the residual of a
        depthwise convolution into its centre tap, ``base_scale`` into ``out_proj``, the wavelet scale into the wavelet
        kernel, and two heads become one. Another mixer than the scan runs as before, in plain PyTorch, with its
        convolutions folded. A model in float16 or bfloat16 is folded in float32; its biases, depthwise
        kernels and scan parameters stay in float32.

        For 16 bits cast the copy: ``model.fuse().to(torch.bfloat16)``. Under autocast a copy in float32 casts its
        matrices again in every call. On a GPU, :class:`CUDAGraphs` calls the copy with one launch.

        The copy can be moved, cast, copied, pickled, scripted, compiled and exported. Its parameters have the memory
        order of the kernels, which safetensors does not store: keep the model that it is made from.

        Raises:
            ValueError: a layer has hooks or was replaced (pruning, LoRA), or a BatchNorm has no running statistics.
        """
        fused = self._folded()
        for module in fused.modules():
            if isinstance(module, Folded):
                module.arrange()
        return fused.eval().requires_grad_(False)

    @torch.jit.unused
    def quantize(self, batches: Iterable[Tensor]) -> "MobileMamba":
        """A copy as :meth:`fuse` makes it, whose matrix products run in 8 bits, for inference on the CPU.

        The inputs and the weights of the products are rounded to 8 bits; their sums are exact. An input has one range,
        which is chosen on the images of ``batches``; an output channel has its own scale. The scan and its small
        projection, LayerNorm, depthwise and wavelet convolutions, the gates, the first convolution and the head are as
        in :meth:`fuse`. The copy takes images in float32, or in 16 bits once it is cast. It has no gradients.

        Args:
            batches: images ``(B, in_chans, H, W)`` as the model gets them, scaled and normalised: some hundreds, as
                they will occur, without labels.

        Raises:
            ValueError: as :meth:`fuse`; the model is not on the CPU or is fused already; or there are no images.
            FloatingPointError: the input of a product is not finite.
        """
        scales = input_scales(self, batches)
        fused = self._folded()
        for name, module in fused.named_modules():
            if isinstance(module, Folded):
                found = {
                    matrix: scales.get(f"{name}.{source}".rstrip(".")) for matrix, source in module.sources.items()
                }
                module.pack({matrix: scale for matrix, scale in found.items() if scale})
        return fused.eval().requires_grad_(False)

    @torch.jit.unused
    def _folded(self) -> "MobileMamba":
        """A folded copy, not yet packed."""
        check_foldable(self)
        first = next(self.parameters())
        fused = copy.deepcopy(self).eval()
        if is_short(first):
            fold_batchnorm(fused.float())
            fused.to(first.dtype)
        else:
            fold_batchnorm(fused)
        fused.distillation = False
        fused.fused = isinstance(fused.patch_embed, FoldedPatchEmbedding) and fused._is_whole()
        fused.fused_head = fused.fused and isinstance(fused.head, FoldedLinear)
        return fused
