"""Published checkpoints: recognises them, and converts their state dicts to this package's names and shapes.

The published modules and this package's compute the same. So a conversion renames every key, reshapes four kinds of
parameters and drops the Haar filters, which are constants.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["convert", "is_published", "rename"]

Rule = tuple[str, str | Callable[["re.Match[str]"], str]]


def _place(match: "re.Match[str]") -> str:
    """``blocks2.`` and ``blocks3.`` hold the transition (0: dw3, FFN; 1: merging; 2: dw3, FFN), then the blocks."""
    stage, index = int(match[1]) - 1, int(match[2])
    return f"stages.{stage}.blocks.{index - 3}." if index > 2 else f"stages.{stage}.transition.part{index}."


#: All rules are applied to a key, in this order.
RULES: tuple[Rule, ...] = (
    (r"^blocks1\.(\d+)\.", r"stages.0.blocks.\1."),
    (r"^blocks([23])\.(\d+)\.", _place),
    (r"transition\.part0\.([01])\.", r"transition.\1."),
    (r"transition\.part1\.", r"transition.2."),
    (r"transition\.part2\.([01])\.", lambda match: f"transition.{3 + int(match[1])}."),
    # wrappers without parameters of their own: a residual, and the split of the channels
    (r"\.m\.", "."),
    (r"\.attn\.", "."),
    # convolution and BatchNorm; in the classifiers, BatchNorm and a linear layer
    (r"\.c\.", ".conv."),
    (r"\.bn\.", ".norm."),
    (r"^(head|head_dist)\.l\.", r"\1.linear."),
    # layers of a block
    (r"\.dw([01])\.", r".depthwise\1."),
    (r"\.pw1\.", ".expand."),
    (r"\.pw2\.", ".project."),
    # patch merging
    (r"\.conv1\.", ".expand."),
    (r"\.conv2\.", ".depthwise."),
    (r"\.conv3\.", ".project."),
    (r"\.se\.fc1\.", ".squeeze_excite.reduce."),
    (r"\.se\.fc2\.", ".squeeze_excite.expand."),
    # the local part of MRFFI, one group in the published presets
    (r"\.local_op\.dwconv3x3\.", ".local_part.groups.0.0.conv."),
    (r"\.local_op\.bn1\.", ".local_part.groups.0.0.norm."),
    (r"\.local_op\.dwconv1x1\.", ".local_part.groups.0.2.conv."),
    (r"\.local_op\.bn2\.", ".local_part.groups.0.2.norm."),
    # its global part
    (r"\.global_op\.global_atten\.", ".global_part.ss2d."),
    (r"\.global_op\.base_scale\.weight$", ".global_part.base_scale"),
    (r"\.global_op\.wavelet_convs\.0\.weight$", ".global_part.wavelet.weight"),
    (r"\.global_op\.wavelet_scale\.0\.weight$", ".global_part.wavelet.scale"),
    (r"\.ss2d\.conv2d\.", ".ss2d.conv."),
    (r"\.ss2d\.out_norm\.", ".ss2d.norm."),
    (r"\.ss2d\.x_proj_weight$", ".ss2d.x_proj"),
    (r"\.ss2d\.dt_projs_(weight|bias)$", r".ss2d.dt_\1"),
    (r"\.ss2d\.A_logs$", ".ss2d.A_log"),
    (r"\.ss2d\.Ds$", ".ss2d.D"),
    (r"\.proj\.1\.", ".proj."),
)

#: Signs of the orthonormal Haar filters LL, LH, HL, HH. Their coefficients are +-0.5; published files hold 0.49999997.
HAAR_SIGNS = [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]


def is_published(state_dict: dict[str, Tensor]) -> bool:
    """Whether ``state_dict`` (keys without ``module.``) is a published checkpoint's."""
    return any(key.startswith(("patch_embed.0.c.", "blocks1.")) for key in state_dict)


def rename(key: str, distilled: bool) -> str:
    """This package's name of the published ``key``. Unknown parts stay as they are, so that the name fits no model.

    Args:
        distilled: whether the checkpoint has two heads.
    """
    for pattern, replacement in RULES:
        key = re.sub(pattern, replacement, key)
    if distilled:
        key = re.sub(r"^head\.", "head.labels.", key)
        key = re.sub(r"^head_dist\.", "head.teacher.", key)
    return key


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published ``state_dict`` (keys without ``module.``) with this package's names and shapes.

    Raises:
        ValueError: a stored Haar filter has other coefficients, or two keys name the same parameter.
    """
    distilled = any(key.startswith("head_dist.") for key in state_dict)
    converted: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if key.endswith((".wt_filter", ".iwt_filter")):
            _check_filter(key, tensor)
            continue
        name = rename(key, distilled)
        if name in converted:
            raise ValueError(f"{key}: a second key for the parameter {name}")
        converted[name] = _reshape(name, tensor)
    return converted


def _check_filter(key: str, tensor: Tensor) -> None:
    shape = tuple(tensor.shape)
    if tensor.dim() != 4 or shape[0] % 4 or shape[1:] != (1, 2, 2):
        raise ValueError(f"{key}: expected Haar filters of shape (4 * channels, 1, 2, 2), got {shape}")
    expected = torch.tensor(HAAR_SIGNS, device=tensor.device)[:, None].repeat(shape[0] // 4, 1, 1, 1) / 2
    error = (tensor.double() - expected).abs().amax().item() if tensor.numel() else 0.0
    if not error <= 1e-6:
        raise ValueError(f"{key}: expected the Haar filters of +-0.5, got values that differ by {error:.2g}")


def _reshape(name: str, tensor: Tensor) -> Tensor:
    """Reshape the four kinds of parameters whose shapes differ. An unexpected shape stays, and fits no model."""
    shape = tuple(tensor.shape)
    if name.endswith(".ss2d.A_log") and len(shape) == 2 and shape[0] % 2 == 0:
        return tensor.reshape(2, -1, shape[1])  # (2 * D, N) -> (2, D, N)
    if name.endswith(".ss2d.D") and len(shape) == 1 and shape[0] % 2 == 0:
        return tensor.reshape(2, -1)  # (2 * D) -> (2, D)
    if name.endswith((".base_scale", ".wavelet.scale")) and len(shape) == 4 and shape == (1, shape[1], 1, 1):
        return tensor.flatten()  # (1, C, 1, 1) -> (C)
    return tensor
