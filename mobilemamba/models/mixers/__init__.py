"""Token mixers that the global part may have instead of the selective scan, in plain PyTorch."""

from collections.abc import Callable

from torch import nn

from .mlstm import MLSTM
from .rwkv6 import RWKV6
from .ttt import TTTLinear

__all__ = ["MIXERS", "MLSTM", "RWKV6", "Mixer", "TTTLinear", "check_mixer", "make_mixer"]

#: A name, or a function of the channels C that makes a module ``(B, C, H, W) -> (B, C, H, W)``.
Mixer = str | Callable[[int], nn.Module]

#: The mixers by name, besides ``"mamba"``, which is the scan of this package's operators.
MIXERS: dict[str, Callable[[int], nn.Module]] = {"ttt": TTTLinear, "mlstm": MLSTM, "rwkv6": RWKV6}


def check_mixer(mixer: Mixer) -> None:
    """Refuse what is neither a known name nor a function.

    Raises:
        ValueError: the message has the names.
    """
    known = mixer in ("mamba", *MIXERS) if isinstance(mixer, str) else callable(mixer)
    if not known:
        names = ", ".join(["mamba", *MIXERS])
        raise ValueError(f"mixer: expected one of {names}, or a function of the channels, got {mixer!r:.100}")


def make_mixer(mixer: Mixer, dim: int) -> nn.Module:
    """The module of a mixer other than ``"mamba"`` for ``dim`` channels.

    Raises:
        ValueError: the name is unknown, or the function returned something else than a module.
    """
    check_mixer(mixer)
    made = MIXERS[mixer](dim) if isinstance(mixer, str) else mixer(dim)
    if not isinstance(made, nn.Module):
        raise ValueError(f"mixer: expected a function that returns a module, got {made!r:.100} from it")
    return made
