"""The stages between the patch embedding and the head: blocks, transitions, and what ``fuse()`` makes of them."""

from collections import OrderedDict
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import FFN, DropPath, PatchMerging, ResidualDepthwise

__all__ = ["Block", "FoldedBlock", "FoldedStage", "FoldedTransition", "Stage", "Transition"]


class Block(nn.Module):
    """``x + DropPath(g(x))``, where ``g`` is dw3, FFN, MRFFI, dw3, FFN, each with its own residual.

    ``(B, C, H, W) -> (B, C, H, W)``. The identity is added twice, inside ``g`` and around it: the published weights
    were trained that way.
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
    """A :class:`Block` with folded layers. Its last layer adds the residual around ``g``."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.depthwise0, self.ffn0, self.mixer = block.depthwise0, block.ffn0, block.mixer
        self.depthwise1, self.ffn1 = block.depthwise1, block.ffn1

    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn0(self.depthwise0(x))
        y = self.mixer(y, y)
        return self.ffn1(self.depthwise1(y), x)

    def weights(self) -> list[Tensor]:
        return (
            self.depthwise0.weights()  # type: ignore[operator]
            + self.ffn0.weights()  # type: ignore[operator]
            + self.mixer.weights()  # type: ignore[operator]
            + self.depthwise1.weights()  # type: ignore[operator]
            + self.ffn1.weights()  # type: ignore[operator]
        )


class Transition(nn.Sequential):
    """The layers between two stages: dw3 and FFN at the old width, patch merging, dw3 and FFN at the new width.

    ``(B, dim, H, W) -> (B, out_dim, ceil(H/2), ceil(W/2))``.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(
            ResidualDepthwise(dim), FFN(dim), PatchMerging(dim, out_dim), ResidualDepthwise(out_dim), FFN(out_dim)
        )

    def fold(self) -> nn.Module:
        return FoldedTransition(OrderedDict(self.named_children()))


class FoldedTransition(nn.Sequential):
    """A :class:`Transition` with folded layers."""

    def weights(self) -> list[Tensor]:
        weights: list[Tensor] = []
        for layer in self:
            weights += layer.weights()  # type: ignore[operator]
        return weights


class Stage(nn.Module):
    """A transition and then blocks: ``(B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))``.

    The first stage has ``nn.Identity()`` as its transition and keeps the shape.
    """

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
        if torch.compiler.is_compiling():  # torch.compile decides by itself what to recompute
            return block(x)
        return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _BuffersOfForward(block)))

    def fold(self) -> nn.Module:
        return FoldedStage(self)


class FoldedStage(nn.Module):
    """A :class:`Stage` with folded layers."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.transition, self.blocks = stage.transition, stage.blocks

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition(x)
        for block in self.blocks:
            x = block(x)
        return x

    def weights(self) -> list[Tensor]:
        weights: list[Tensor] = []
        if not isinstance(self.transition, nn.Identity):
            weights += self.transition.weights()  # type: ignore[operator]
        for block in self.blocks:
            weights += block.weights()  # type: ignore[operator]
        return weights


class _BuffersOfForward:
    """Context of the recomputation in the backward pass: ``module`` computes with copies of the forward pass's buffers.

    The recomputation shows a batch to the norms again. It updates the copies, so running statistics see the batch once,
    whatever the class and the options of the norm are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.before = [
            (owner._buffers, name, buffer.clone())
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]

    def __enter__(self) -> None:
        self.own = [buffers[key] for buffers, key, _ in self.before]
        for buffers, key, before in self.before:
            buffers[key] = before.clone()  # the next recomputation, with retain_graph, needs `before` again

    def __exit__(self, *error: object) -> None:
        for (buffers, key, _), own in zip(self.before, self.own, strict=True):
            buffers[key] = own
