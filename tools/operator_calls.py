"""Calls every operator on the GPU, forward and backward, at small sizes, for compute-sanitizer."""

import itertools

import torch

from mobilemamba import ops


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        # batch, channels, length, rank, state: one segment; several segments; a partial warp of channels
        for b, d, n, r, s in ((2, 33, 20, 3, 1), (1, 5, 300, 2, 1), (1, 40, 70, 17, 3)):
            shapes = [(b, d, n), (b, 2, r, n), (2, d, s), (b, 2, s, n), (b, 2, s, n), (2, d), (2, d, r), (2, d)]
            ops.bidirectional_scan(*[leaf(*shape, dtype=dtype) for shape in shapes]).sum().backward()
        for kernel, (height, width) in itertools.product((3, 7, 9), ((5, 3), (19, 22))):
            image = leaf(2, 33, height, width, dtype=dtype)
            ops.haar_conv2d(image, leaf(132, 1, kernel, kernel, dtype=dtype)).sum().backward()
            for stride in (1, 2, 3):
                weight, bias = leaf(33, 1, kernel, kernel, dtype=dtype), leaf(33, dtype=dtype)
                residual = leaf(2, 33, -(-height // stride), -(-width // stride), dtype=dtype)
                ops.depthwise_conv2d(image, weight, bias, residual, stride, "silu").sum().backward()
        g, p, d, r, n, c = 16, 5, 40, 2, 1, 24  # global, local, inner, rank, state, channels
        shapes = [(2 * d, g), (2 * d,), (d, 1, 3, 3), (d,), (2 * (r + 2 * n), d), (2, d, r), (2, d), (2, d, n), (2, d)]
        shapes += [(d,), (d,), (g, d), (g,), (g, 4, 5, 5), (p, 1, 7, 7), (p,), (p,), (p,), (c, c), (c,)]
        image = leaf(2, c, 7, 6, dtype=dtype)
        ops.mrffi(image, image, [leaf(*shape, dtype=dtype) for shape in shapes]).sum().backward()
        shapes = [(2 * c, c), (2 * c,), (c, 2 * c), (c,)]
        ops.ffn(image, image, *[leaf(*shape, dtype=dtype) for shape in shapes]).sum().backward()
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
