"""The models for torch.hub: ``torch.hub.load(REPOSITORY, "s6", pretrained=True)``. docs/integrations.md shows it.

torch.hub runs this file in a copy of the repository, whose library is not built. So the installed package is used, or
the copy itself if its library is built in place.
"""

import importlib.util
import sys
from pathlib import Path

dependencies = ["torch"]


def _import_the_package() -> None:
    """Import mobilemamba: the installed one, or, where there is none, that of this folder.

    Raises:
        ImportError: neither can be used; one line that says how to install it.
    """
    here, before = Path(__file__).resolve().parent, sys.path[:]
    sys.path[:] = [entry for entry in before if Path(entry or ".").resolve() != here]  # torch.hub put it there
    installed = importlib.util.find_spec("mobilemamba") is not None
    try:
        if not installed:
            sys.path[:] = before
        importlib.import_module("mobilemamba")
    except ImportError:
        if installed:  # its error says what to do
            raise
        message = f"mobilemamba has no compiled library here: run `pip install {here}` and start Python again"
        raise ImportError(message) from None
    finally:
        sys.path[:] = before


_import_the_package()

from mobilemamba.zoo import b1, b2, b4, create_model, feature_extractor, nano, s6, t2, t4  # noqa: E402

__all__ = ["b1", "b2", "b4", "create_model", "feature_extractor", "nano", "s6", "t2", "t4"]
