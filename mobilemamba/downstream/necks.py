"""The published feature pyramid, for feature maps of three stages at strides 16, 32 and 64."""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..models import checks

__all__ = ["FeaturePyramid", "WithNeck"]


class FeaturePyramid(nn.Module):
    """Feature pyramid with finer levels by transposed convolutions: a dictionary of maps -> a dictionary of maps.

    Every input passes a 1x1 convolution. Top-down, each map adds the coarser one by nearest-neighbour interpolation to
    its exact size. The first finer level is a transposed 2x2 convolution with stride 2 of the finest sum; each further
    one continues from the one before it. A 3x3 convolution ends every level. The coarser level is a 3x3 convolution
    with stride 2 of the last input itself. No level has a normalisation or an activation.

    Args:
        in_channels: channels of each input, finest first.
        out_channels: channels of every level.
        finer: number of levels below the finest input, each of half the stride.
        coarser: whether there is one more level, of twice the stride of the last input.

    The input is a dictionary with one map ``(B, in_channels[i], H_i, W_i)`` per stage, finest first. The output has the
    keys ``"0"``, ``"1"``, ... finest first. A finer level has exactly 2 (4, ...) times the height and width of the
    finest input, the coarser level has half of the last input's, rounded up.

    Initial values are the published ones: Xavier-uniform weights and, in the transposed convolutions, Kaiming-normal
    weights (fan out); zero biases.

    Raises:
        ValueError: an argument is out of its range.

    Differs from torchvision's ``FeaturePyramidNetwork``, which has neither finer levels nor these initial values, and
    whose coarser levels are a pooling of the last level, or two convolutions.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int = 256, finer: int = 0, coarser: bool = False
    ) -> None:
        super().__init__()
        channels = checks.integers("in_channels", tuple(in_channels))
        self.out_channels = out_channels = checks.integer("out_channels", out_channels)
        levels = range(checks.integer("finer", finer, least=0))
        self.lateral = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in channels)
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(out_channels, out_channels, 2, 2) for _ in levels)
        self.finer_output = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in levels)
        last = nn.Conv2d(channels[-1], out_channels, 3, 2, 1)
        self.coarser = nn.ModuleList([last] if checks.flag("coarser", coarser) else [])
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.xavier_uniform_(m.weight)
            elif isinstance(m, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = list(maps.values())
        sums = [lateral(inputs[i]) for i, lateral in enumerate(self.lateral)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[-2:], mode="nearest")
        levels = [output(sums[i]) for i, output in enumerate(self.output)]
        x = sums[0]
        for upsample, output in zip(self.upsample, self.finer_output, strict=True):
            x = upsample(x)
            levels.insert(0, output(x))
        for conv in self.coarser:
            levels.append(conv(inputs[-1]))
        named: dict[str, Tensor] = OrderedDict()
        for i, level in enumerate(levels):
            named[str(i)] = level
        return named


class WithNeck(nn.Module):
    """A feature extractor and its neck: images ``(B, C, H, W)`` -> the neck's maps.

    Args:
        body: module that returns the maps of its stages by name.
        neck: module that takes and returns such maps.
        out_channels: channels of the neck's maps; torchvision's detectors read it.
        strides: of the neck's maps in pixels.
    """

    def __init__(self, body: nn.Module, neck: nn.Module, out_channels: int | list[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.body, self.neck = body, neck
        self.out_channels, self.strides = out_channels, list(strides)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.neck(self.body(x))
