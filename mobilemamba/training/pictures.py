"""Pictures of training runs and of receptive fields, with matplotlib."""

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..weights.files import atomic_write
from .curves import Curves
from .receptive_field import SHARES, square_that_holds

__all__ = ["check_target", "draw_curves", "draw_fields"]

SUFFIXES = (".png", ".svg")

#: Colours that people with any colour vision tell apart: Okabe and Ito (2008), without yellow and black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES = ("-", "--", "-.", ":")  # the next one after each round of colours

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mobilemamba",  # equal figures give equal files
}

LEAST = 1e-4  # of the largest gradient: the darkest colour of a receptive field


def check_target(target: Path) -> None:
    """Refuse a picture that cannot be written.

    Raises:
        ValueError: its name has another ending than ``.png`` or ``.svg``.
        FileNotFoundError: there is no such folder.
        ImportError: matplotlib is missing.
    """
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{target}: expected a name that ends with {' or '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder to write {target.name} into")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("pictures need matplotlib: pip install '.[train]'")


def draw_curves(runs: Sequence[Curves], target: Path) -> None:
    """Draw the loss and the accuracy, AP or mIoU of ``runs`` side by side, with one legend.

    Args:
        runs: at least one with an epoch; runs without one are only in the legend.
        target: the file to write; its name ends with ``.png`` or ``.svg``.

    Raises:
        ValueError: the name has another ending, or no run has an epoch.
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    if not any(run.loss for run in runs):
        raise ValueError(f"{', '.join(str(run.path) for run in runs)}: expected a finished epoch, got none so far")
    check_target(target)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    columns = 1 if len(runs) == 1 else 2
    rows = math.ceil(len(runs) / columns)
    with matplotlib.rc_context({**STYLE, "axes.grid": True}):
        figure = Figure(figsize=(10, 4.2 + 0.22 * rows), layout="constrained")
        panels = figure.subplots(1, 2)
        handles = []
        longest = max(len(run.loss) for run in runs)
        for i, (run, name) in enumerate(zip(runs, _distinct_names(runs), strict=True)):
            look = {
                "color": COLOURS[i % len(COLOURS)],
                "linestyle": LINES[i // len(COLOURS) % len(LINES)],
                "linewidth": 1.8,
                "marker": "o" if longest <= 40 or len(run.loss) <= 1 else "",
                "markersize": 3.5,
            }
            for panel, values in zip(panels, (run.loss, run.accuracy), strict=True):
                epochs = sorted(values)
                (line,) = panel.plot(epochs, [values[epoch] for epoch in epochs], **look)
            line.set_label(f"{name}  ({run.state})")
            handles.append(line)
        measures = ", ".join(dict.fromkeys(run.measure for run in runs))
        for panel, title in zip(panels, ("training loss", f"test {measures}"), strict=True):
            panel.set_title(title, loc="left")
            panel.set_xlabel("epoch")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
        _save(figure, target)


def _distinct_names(runs: Sequence[Curves]) -> list[str]:
    """The runs' names; where several are the same, their paths."""
    names = [run.name for run in runs]
    return [str(run.path) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def draw_fields(fields: Mapping[str, Tensor], target: Path) -> None:
    """Draw effective receptive fields side by side, each over its largest gradient, with the squares of ``SHARES``.

    Args:
        fields: by name, ``(H, H)``, as :func:`effective_receptive_field` returns them; they may differ in size.
        target: as for :func:`draw_curves`.

    Raises: as :func:`check_target`; OSError if the file cannot be written.
    """
    check_target(target)
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = min(4, len(fields))
    rows = math.ceil(len(fields) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * columns + 0.9, 3.8 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel in panels[len(fields) :]:
            panel.set_visible(False)
        for panel, (name, field) in zip(panels, fields.items(), strict=False):
            pixels = (field / field.max()).clamp(min=LEAST).cpu().numpy()
            drawn = panel.imshow(pixels, norm=LogNorm(LEAST, 1), cmap="inferno", interpolation="nearest")
            told = []
            for share, line in zip(SHARES, LINES, strict=False):
                square = square_that_holds(field, share)
                corner = (square.first - 0.5, square.first - 0.5)  # the first pixel is from -0.5 to 0.5
                look: dict[str, Any] = {"edgecolor": COLOURS[4], "linewidth": 1.4, "linestyle": line}
                panel.add_patch(Rectangle(corner, square.side, square.side, fill=False, **look))
                told.append(f"{share:.0%} in {square.area:.1%}")
            panel.set_title(name, loc="left")
            panel.set_xlabel(", ".join(told).replace("%", " %"), fontsize=8)
        figure.colorbar(drawn, ax=panels, label="gradient over the largest one", shrink=0.8)
        _save(figure, target)


def _save(figure: Any, target: Path) -> None:
    content = io.BytesIO()
    metadata = {"Date": None} if target.suffix.lower() == ".svg" else {}
    figure.savefig(content, format=target.suffix[1:].lower(), dpi=150, metadata=metadata)
    atomic_write(target, lambda temporary: Path(temporary).write_bytes(content.getvalue()))
