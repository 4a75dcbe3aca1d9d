"""Calls every operator on the GPU, forward and backward, at small sizes, for compute-sanitizer.

With ``--own`` it leaves out the matrix products that torch computes. initcheck does not see what they write on Hopper.
"""

import itertools
import os
import sys

import torch

from mobilemamba import ops


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


def mrffi_shapes(g: int, p: int, d: int, r: int, n: int, c: int) -> list[tuple[int, ...]]:
    """Of the weights for global, local and inner channels, rank, state size and all channels."""
    shapes = [(2 * d, g), (2 * d,), (d, 1, 3, 3), (d,), (2 * (r + 2 * n), d), (2, d, r), (2, d), (2, d, n), (2, d)]
    return [*shapes, (d,), (d,), (g, d), (g,), (g, 4, 5, 5), (p, 1, 7, 7), (p,), (p,), (p,), (c, c), (c,)]


@torch.no_grad()
def products(dtype: torch.dtype) -> None:
    """On packed weights: in matrices and images, aligned or not, in tiles of every size; and what is around them."""
    for inputs, outputs, side, kernel, stride in (
        (75, 45, 7, 1, 1),
        (64, 100, 9, 1, 1),
        (40, 100, 140, 1, 1),
        (3, 24, 21, 3, 2),
        (24, 48, 11, 3, 2),
        (16, 48, 100, 3, 1),
    ):
        x = leaf(2, side, side, inputs, dtype=dtype).permute(0, 3, 1, 2)
        weight = ops.pack_conv2d_weight(leaf(outputs, inputs, kernel, kernel, dtype=dtype))
        y = ops.packed_conv2d(x, weight, leaf(outputs, dtype=dtype), None, kernel, stride, "relu")
        ops.packed_conv2d(x, weight, leaf(outputs, dtype=dtype), y, kernel, stride)
    parameters = torch.float32 if dtype.itemsize == 2 else dtype
    os.environ["MOBILEMAMBA_CUDA_FORM"] = "kernel"  # at all sizes
    for c, hidden, side in ((75, 150, 12), (192, 384, 11), (200, 400, 5), (376, 752, 5), (447, 33, 4)):
        image = leaf(2, side, side, c, dtype=dtype).permute(0, 3, 1, 2)
        expand, project = (
            ops.pack_conv2d_weight(leaf(out, inputs, 1, 1, dtype=dtype)) for out, inputs in ((hidden, c), (c, hidden))
        )
        ops.ffn(image, image, expand, leaf(hidden, dtype=parameters), project, leaf(c, dtype=parameters))
    del os.environ["MOBILEMAMBA_CUDA_FORM"]
    for sizes in ((160, 32, 320, 10, 1, 197), (272, 76, 544, 17, 1, 384)):
        weights = [leaf(*shape, dtype=dtype if len(shape) == 2 else parameters) for shape in mrffi_shapes(*sizes)]
        for i in (0, 4, 11, 18):  # the matrices
            weights[i] = ops.pack_conv2d_weight(weights[i][:, :, None, None])
        image = leaf(3, 7, 9, sizes[-1], dtype=dtype).permute(0, 3, 1, 2)
        ops.mrffi(image, image, weights)


def norms(dtype: torch.dtype) -> None:
    """Convolutions and the feed-forward layer with the norms of training."""
    c, exact = 24, torch.promote_types(dtype, torch.float32)
    image, scale, shift = leaf(2, c, 9, 8, dtype=dtype), leaf(c, dtype=exact), leaf(c, dtype=exact)
    for weight, stride in ((leaf(c, c, 3, 3, dtype=dtype), 2), (leaf(c, 1, 3, 3, dtype=dtype), 1)):
        ops.conv_norm(image, weight, scale, shift, None, stride, "relu")[0].sum().backward()
    hidden = leaf(2 * c, dtype=exact), leaf(2 * c, dtype=exact)
    expand, project = leaf(2 * c, c, 1, 1, dtype=dtype), leaf(c, 2 * c, 1, 1, dtype=dtype)
    ops.ffn_norm(image, expand, *hidden, project, scale, shift)[0].sum().backward()


def main() -> None:
    torch.manual_seed(0)
    own = "--own" in sys.argv
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        # batch, channels, length, rank, state: one segment; several segments; a partial warp of channels
        for b, d, n, r, s in ((2, 33, 20, 3, 1), (1, 5, 300, 2, 1), (1, 40, 70, 17, 3)):
            shapes = [(b, d, n), (b, 2, r, n), (2, d, s), (b, 2, s, n), (b, 2, s, n), (2, d), (2, d, r), (2, d)]
            ops.bidirectional_scan(*[leaf(*shape, dtype=dtype) for shape in shapes]).sum().backward()
        sizes = (33, 5, 3), (33, 19, 22), (40, 9, 10)  # channels that are loaded one by one, and together
        for kernel, (c, height, width) in itertools.product((3, 5, 7, 9), sizes):
            image = leaf(2, c, height, width, dtype=dtype)
            ops.haar_conv2d(image, leaf(4 * c, 1, kernel, kernel, dtype=dtype)).sum().backward()
            for stride in (1, 2, 3):
                weight, bias = leaf(c, 1, kernel, kernel, dtype=dtype), leaf(c, dtype=dtype)
                residual = leaf(2, c, -(-height // stride), -(-width // stride), dtype=dtype)
                ops.depthwise_conv2d(image, weight, bias, residual, stride, "silu").sum().backward()
        if dtype.itemsize == 2 or not own:
            products(dtype)
        if own:
            continue
        norms(dtype)
        c = 24
        image = leaf(2, c, 7, 6, dtype=dtype)
        weights = [leaf(*shape, dtype=dtype) for shape in mrffi_shapes(16, 5, 40, 2, 1, c)]
        ops.mrffi(image, image, weights).sum().backward()
        shapes = [(2 * c, c), (2 * c,), (c, 2 * c), (c,)]
        ops.ffn(image, image, *[leaf(*shape, dtype=dtype) for shape in shapes]).sum().backward()
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
