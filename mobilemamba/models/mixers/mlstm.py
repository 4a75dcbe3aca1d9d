"""mLSTM, xLSTM's memory of matrices with exponential gates, in its parallel form."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ConvNorm
from .sequences import working

__all__ = ["MLSTM", "mlstm"]

torch.fx.wrap("working")  # a call in the graph of a tracer, which does not know the dtype


@torch.fx.wrap  # a call in the graph of a tracer, which does not know the number of positions
def mlstm(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
    """The sum of the outputs of an mLSTM from the first position on and one from the last position back.

    Each direction is ``C_t = f_t C_{t-1} + i_t v_t k_t^T``, ``n_t = f_t n_{t-1} + i_t k_t`` and
    ``h_t = C_t q_t / max(|n_t . q_t|, 1)`` with ``i = exp(input_gate)`` and ``f = sigmoid(forget_gate)``. All positions
    are computed at once: both directions have the products ``q_t . k_s`` in common, and each has its own decays, whose
    largest one is taken out of the exponential (the stabilizer). Memory and time grow with the square of L.

    Args:
        q, k, v: ``(B, heads, L, d)``; k is divided by the root of d here.
        input_gate, forget_gate: ``(B, 2, heads, L)``, before their activations; 2 are the directions.

    Returns:
        ``(B, heads, L, d)``.

    Source: "xLSTM: Extended Long Short-Term Memory" (arXiv 2405.04517), equations 19 to 27 and appendix A.3.
    """
    length, width = q.size(2), q.size(3)
    kept = F.logsigmoid(forget_gate)
    forward, backward = kept[:, 0].cumsum(-1), kept[:, 1].flip(-1).cumsum(-1).flip(-1)
    total = torch.stack([forward, backward], 1)
    decay = total.unsqueeze(-1) - total.unsqueeze(-2) + input_gate.unsqueeze(-2)  # (B, 2, heads, t, s)
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    decay = decay.masked_fill(~torch.stack([seen, seen.transpose(0, 1)])[:, None], -float("inf"))
    largest = decay.amax(-1, keepdim=True).detach()
    products = q @ k.transpose(2, 3) * width**-0.5
    scores = products.unsqueeze(1) * (decay - largest).exp()
    scores = scores / torch.maximum(scores.sum(-1, keepdim=True).abs(), (-largest).exp())
    return scores.sum(1) @ v


class MLSTM(nn.Module):
    """xLSTM's mLSTM block over the pixels in two directions. ``(B, C, H, W) -> (B, C, H, W)``.

    As published: two projections to twice the width, one of them the gate; a short convolution (here depthwise 3x3)
    before queries and keys, which like the values are projections in blocks of four channels; a norm for each head; a
    learned skip from the convolution; the gate; a projection back. Each direction has its own input and forget gates.

    Args:
        dim: channels C, a multiple of 16.
        heads: number of heads.
    """

    def __init__(self, dim: int, heads: int = 4) -> None:
        super().__init__()
        inner = 2 * dim
        self.inner, self.heads = inner, heads
        self.in_proj = ConvNorm(dim, 2 * inner)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.qk_proj = nn.Parameter(torch.empty(2, inner // 4, 4, 4).uniform_(-0.5, 0.5))
        self.v_proj = nn.Parameter(torch.empty(inner // 4, 4, 4).uniform_(-0.5, 0.5))
        self.gates = nn.Linear(inner, 4 * heads)
        with torch.no_grad():  # small input gates; the heads forget after different distances
            self.gates.weight.mul_(0.1)
            self.gates.bias.copy_(torch.cat([torch.zeros(2 * heads), torch.linspace(3, 6, heads).repeat(2)]))
        self.norm = nn.GroupNorm(heads, inner)
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_proj = ConvNorm(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        values, z = self.in_proj(x).split(self.inner, 1)
        u = F.silu(self.conv(values)).permute(0, 2, 3, 1).flatten(1, 2)  # (B, L, inner)
        blocks = u.unflatten(2, [-1, 4])
        q, k = torch.einsum("blni,pnoi->pblno", blocks, self.qk_proj).flatten(3).unbind(0)
        v = torch.einsum("blni,noi->blno", values.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, [-1, 4]), self.v_proj)
        gates = working(self.gates(u)).transpose(1, 2).unflatten(1, [2, 2, self.heads])  # (B, kind, direction, ...)
        y = mlstm(self._heads(q), self._heads(k), self._heads(v.flatten(2)), gates[:, 0], gates[:, 1])
        y = y.transpose(1, 2).flatten(2).to(x.dtype)  # (B, L, inner)
        y = self.norm(y.flatten(0, 1)).view_as(u) + self.skip * u
        y = y * F.silu(z.permute(0, 2, 3, 1).flatten(1, 2))
        return self.out_proj(y.transpose(1, 2).reshape(batch, self.inner, height, width))

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, L, inner) -> (B, heads, L, d)``."""
        return working(x.unflatten(2, [self.heads, -1]).transpose(1, 2))
