"""RWKV-6: linear attention whose decay depends on the data, for each channel of the keys."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ConvNorm
from .sequences import in_heads, summed, two_directions, working

__all__ = ["RWKV6", "rwkv6", "shifted"]

torch.fx.wrap("working")  # a call in the graph of a tracer, which does not know the dtype


def decays(before: Tensor, after: Tensor) -> Tensor:
    """``exp(before_t - after_s)`` for s < t, otherwise 0: ``(..., L, d), (..., L, d) -> (..., t, s, d)``."""
    length = before.size(-2)
    earlier = torch.ones(length, length, dtype=torch.bool, device=before.device).tril(-1).unsqueeze(-1)
    return (before.unsqueeze(-2) - after.unsqueeze(-3)).masked_fill(~earlier, -float("inf")).exp()


def in_chunks(x: Tensor, rest: int, size: int) -> Tensor:
    """``(..., L, d) -> (..., chunks, size, d)``, filled up with ``rest`` zeros."""
    return F.pad(x, [0, 0, 0, rest]).unflatten(-2, [-1, size])


@torch.fx.wrap  # a call in the graph of a tracer, which does not know the number of chunks
def rwkv6(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, size: int) -> Tensor:
    """The output of RWKV-6 along a sequence, from its first position, in chunks.

    ``y_t = r_t (S_{t-1} + (bonus k_t) v_t^T)`` and ``S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T``, where decays and
    bonus multiply the rows of S, which has one for each channel of k. Positions of a chunk see each other through a
    matrix; the states at the chunks' starts are summed from all earlier chunks at once. Every exponent is at most 0.

    Args:
        r, k, v, log_decay: ``(..., L, d)``; the decays at most 0.
        bonus: ``(..., 1, d)``.
        size: positions of a chunk.

    Returns:
        ``(..., L, d)``.

    Source: "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (arXiv 2404.05892), section 4.2.
    """
    length = r.size(-2)
    rest = (size - length % size) % size
    own = (r * bonus * k).sum(-1, keepdim=True) * v
    r, k, v = in_chunks(r, rest, size), in_chunks(k, rest, size), in_chunks(v, rest, size)
    after = in_chunks(log_decay, rest, size).cumsum(-2)
    before = F.pad(after, [0, 0, 1, -1])
    within = torch.einsum("...td,...sd,...tsd->...ts", r, k, decays(before, after)) @ v
    total = after[..., -1, :]  # (..., chunks, d)
    added = (k * (total.unsqueeze(-2) - after).exp()).transpose(-2, -1) @ v  # what a chunk adds to the state
    ends = total.cumsum(-2)
    states = torch.einsum("...jid,...ide->...jde", decays(ends - total, ends), added)
    return (within + (r * before.exp()) @ states).flatten(-3, -2).narrow(-2, 0, length) + own


def shifted(x: Tensor) -> Tensor:
    """Each quarter of the channels moved by a pixel: right, left, down, up. ``(B, C, H, W) -> (B, C, H, W)``.

    Source: "Vision-RWKV" (arXiv 2403.02308): the form that RWKV's shift by a token has on images.
    """
    right, left, down, up = x.chunk(4, 1)
    right, left = F.pad(right, [1, -1, 0, 0]), F.pad(left, [-1, 1, 0, 0])
    return torch.cat([right, left, F.pad(down, [0, 0, 1, -1]), F.pad(up, [0, 0, -1, 1])], 1)


class RWKV6(nn.Module):
    """RWKV-6's time mixing over the pixels in two directions. ``(B, C, H, W) -> (B, C, H, W)``.

    As published: receptance, key, value, gate and decay each have an input of their own between the image and the
    shifted image, which depends on the data through a product of low rank; so does the decay. Each direction has its
    own decays and bonus. A norm for each head, the gate and a projection follow the sum of both directions.

    Args:
        dim: channels C, a multiple of 16.
        head: channels of a head.
        rank: of the products for the five inputs, and of that for the decay.
        size: positions of a chunk.
    """

    def __init__(self, dim: int, head: int = 16, rank: int = 32, size: int = 8) -> None:
        super().__init__()
        self.dim, self.heads, self.rank, self.size = dim, dim // head, rank, size
        self.mix = nn.Parameter(torch.full((6, dim), 0.5))
        self.mix_in = nn.Linear(dim, 5 * rank, bias=False)
        self.mix_out = nn.Parameter(torch.zeros(5, rank, dim))
        self.projections = nn.ModuleList(ConvNorm(dim, dim) for _ in range(4))  # receptance, key, value, gate
        self.decay_in = nn.Linear(dim, rank, bias=False)
        self.decay_out = nn.Parameter(torch.zeros(2, rank, dim))
        self.decay = nn.Parameter(torch.linspace(-6, -1, dim).repeat(2, 1))
        self.bonus = nn.Parameter(torch.zeros(2, self.heads, 1, head))
        self.norm = nn.GroupNorm(self.heads, dim)
        self.out_proj = ConvNorm(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        last = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        change = (shifted(x) - x).permute(0, 2, 3, 1)
        low = self.mix_in(last + change * self.mix[5]).tanh().unflatten(3, [5, self.rank])
        shares = torch.einsum("bhwir,ird->ibhwd", low, self.mix_out) + self.mix[:5, None, None, None]
        inputs = last + change * shares  # (5, B, H, W, C)
        projected: list[Tensor] = []
        for i, projection in enumerate(self.projections):
            projected.append(projection(inputs[i].permute(0, 3, 1, 2)))
        decay = torch.einsum("bhwr,krd->kbhwd", self.decay_in(inputs[4]).tanh(), self.decay_out)
        decay = -(working(decay) + working(self.decay)[:, None, None, None]).exp().permute(0, 1, 4, 2, 3)
        y = rwkv6(
            two_directions(working(in_heads(projected[0], self.heads))),
            two_directions(working(in_heads(projected[1], self.heads))),
            two_directions(working(in_heads(projected[2], self.heads))),
            torch.stack([in_heads(decay[0], self.heads), in_heads(decay[1], self.heads).flip(2)], 1),
            working(self.bonus),
            self.size,
        )
        y = self.norm(summed(y).to(x.dtype).transpose(1, 2).flatten(0, 1))
        y = y.view(batch, height, width, self.dim).permute(0, 3, 1, 2)
        return self.out_proj(y * F.silu(projected[3]))
