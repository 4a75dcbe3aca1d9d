"""TTT-Linear: the state is a linear model that learns to reconstruct the sequence while it reads it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ConvNorm
from .sequences import in_heads, summed, two_directions, working

__all__ = ["TTTLinear", "ttt_linear"]

torch.fx.wrap("working")  # a call in the graph of a tracer, which does not know the dtype


@torch.fx.wrap  # a call in the graph of a tracer, which does not know the number of mini-batches
def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    size: int,
    eps: float = 1e-6,
) -> Tensor:
    """The output of TTT-Linear along a sequence, from its first position, in mini-batches.

    The inner model is ``f(x) = x + norm_weight LN(x W + b) + norm_bias``. At position t it has learned from each
    position s up to t by one step on ``|f(k_s) - v_s|^2 / 2`` with the learning rate ``rate_s``, where the gradients of
    a mini-batch are those at the W and b before it. The output is ``f(q_t)``. Inside a mini-batch the steps are summed
    as products of matrices (the dual form): ``q_t W_t = q_t W - sum_s (q_t . k_s) step_s``.

    Args:
        q, k, v: ``(..., L, d)``.
        rate: ``(..., L, 1)``.
        weight: ``(..., d, d)``: W before the first position.
        bias, norm_weight, norm_bias: ``(..., 1, d)``.
        size: positions of a mini-batch.
        eps: of LN.

    Returns:
        ``(..., L, d)``.

    Source: "Learning to (Learn at Test Time): RNNs with Expressive Hidden States" (arXiv 2407.04620), sections 2.4 and
    2.5.
    """
    length = q.size(-2)
    outputs: list[Tensor] = []
    for first in range(0, length, size):
        count = min(size, length - first)
        query, key = q.narrow(-2, first, count), k.narrow(-2, first, count)
        target = v.narrow(-2, first, count) - key
        centred = key @ weight + bias
        centred = centred - centred.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        normal = centred * scale
        grad = (normal * norm_weight + norm_bias - target) * norm_weight
        grad = (grad - grad.mean(-1, keepdim=True) - normal * (grad * normal).mean(-1, keepdim=True)) * scale
        step = rate.narrow(-2, first, count) * grad
        products = (query @ key.transpose(-2, -1) + 1).tril()  # 1 is the bias's input
        outputs.append(query @ weight + bias - products @ step)
        weight = weight - key.transpose(-2, -1) @ step
        bias = bias - step.sum(-2, keepdim=True)
    y = F.layer_norm(torch.cat(outputs, -2), [q.size(-1)], eps=eps)
    return q + y * norm_weight + norm_bias


class TTTLinear(nn.Module):
    """TTT-Linear over the pixels in two directions. ``(B, C, H, W) -> (B, C, H, W)``.

    Queries, keys and values are 1x1 convolutions of the image; a depthwise 3x3 convolution of queries and keys stands
    for the published short convolution. Each direction has its own inner model and learning rates, ``sigmoid(x)`` over
    the head's width and the mini-batch's size. LayerNorm and a 1x1 convolution follow the sum of both directions.

    Args:
        dim: channels C, a multiple of ``head``.
        head: channels of a head.
        size: positions of a mini-batch.
    """

    def __init__(self, dim: int, head: int = 16, size: int = 16) -> None:
        super().__init__()
        self.dim, self.heads, self.head, self.size = dim, dim // head, head, size
        self.in_proj = ConvNorm(dim, 3 * dim)
        self.conv = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)
        self.rate = nn.Linear(dim, 2 * self.heads)
        self.state_weight = nn.Parameter(0.02 * torch.randn(2, self.heads, head, head))
        self.state_bias = nn.Parameter(torch.zeros(2, self.heads, 1, head))
        self.state_norm_weight = nn.Parameter(torch.ones(2, self.heads, 1, head))
        self.state_norm_bias = nn.Parameter(torch.zeros(2, self.heads, 1, head))
        self.norm = nn.LayerNorm(dim)
        self.out_proj = ConvNorm(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        qk, v = self.in_proj(x).split([2 * self.dim, self.dim], 1)
        q, k = self.conv(qk).split(self.dim, 1)
        rate = self.rate(x.permute(0, 2, 3, 1)).sigmoid() / (self.head * self.size)
        forward, backward = rate.permute(0, 3, 1, 2).flatten(2).unsqueeze(-1).split(self.heads, 1)  # (B, heads, L, 1)
        y = ttt_linear(
            two_directions(working(in_heads(q, self.heads))),
            two_directions(working(in_heads(k, self.heads))),
            two_directions(working(in_heads(v, self.heads))),
            working(torch.stack([forward, backward.flip(2)], 1)),
            working(self.state_weight),
            working(self.state_bias),
            working(self.state_norm_weight),
            working(self.state_norm_bias),
            self.size,
        )
        y = self.norm(summed(y).to(x.dtype).transpose(1, 2)).transpose(1, 2)
        return self.out_proj(y.reshape(batch, self.dim, height, width))
