"""Draws published top-1 against measured images/s, as the paper has it: one panel for each batch size and dtype.

    python benchmarks/plot.py FIGURE.svg RESULTS.json ...

The results are those of ``models.py --json``. Each network is drawn as its fastest contestant, compiled or not.
"""

import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["OURS", "draw", "is_available", "log_axis", "pyplot_with_stable_files", "save", "where"]

OURS = "MobileMamba"


def is_available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def points(results: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, str]]]:
    """Per family and kind of training: images/s, top-1 and network."""
    fastest: dict[str, dict[str, Any]] = {}
    for result in results:
        name = result["network"]
        if name not in fastest or result["median ms"] < fastest[name]["median ms"]:
            fastest[name] = result
    families = defaultdict(list)
    for name, result in fastest.items():
        for key, note in (("top1", ""), ("top1, distilled", ", distilled")):
            if result.get(key):
                rate = result["batch"] / result["median ms"] * 1e3
                label = name.upper() if result["family"] == OURS else ""
                families[result["family"] + note].append((rate, result[key], label))
    return {family: sorted(members) for family, members in sorted(families.items())}


def pyplot_with_stable_files() -> Any:
    """matplotlib.pyplot for files: the same figures give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = OURS
    from matplotlib import pyplot

    return pyplot


def log_axis(ax: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())


def where(settings: Mapping[str, Any]) -> str:
    """Where the results are from, in a line."""
    device = settings.get("gpu") or f"{settings['threads']} threads, {settings['cpu']}"
    return ", ".join(
        [device, f"torch {settings['torch']}", *(settings[key] for key in ("commit", "date") if key in settings)]
    )


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw(results: list[dict[str, Any]], settings: dict[str, Any], path: Path) -> None:
    pyplot = pyplot_with_stable_files()
    panels = defaultdict(list)
    for result in results:
        if "error" not in result and not result.get("training"):
            panels[result["batch"], result["dtype"]].append(result)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (5 * columns + 2, 4 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    axes = grid.flat[: len(panels)]
    for unused in grid.flat[len(panels) :]:
        unused.set_visible(False)
    families = sorted({family for members in panels.values() for family in points(members)})
    style = {}
    for i, family in enumerate(dict.fromkeys(family.removesuffix(", distilled") for family in families)):
        color = "black" if family == OURS else f"C{i}"
        style[family] = {"color": color, "linewidth": 2 if family == OURS else 1}
    for ax, ((batch, dtype), members) in zip(axes, panels.items(), strict=True):
        for family, series in points(members).items():
            distilled = family.endswith(", distilled")
            look = style[family.removesuffix(", distilled")]
            hollow = {"markerfacecolor": "white", "linestyle": "--"} if distilled else {}
            ax.plot(
                [rate for rate, _, _ in series],
                [accuracy for _, accuracy, _ in series],
                marker="o",
                label=family,
                **look,
                **hollow,
            )
            for rate, accuracy, label in series:
                ax.annotate(label, (rate, accuracy), xytext=(5, 4), textcoords="offset points", fontsize=8)
        log_axis(ax)
        ax.set_title(f"batch {batch}, {dtype}")
        ax.set_xlabel("images per second, measured")
        ax.grid(True, which="both", alpha=0.3)
    for ax in grid[:, 0]:
        ax.set_ylabel("ImageNet-1k top-1, published, %")
    handles = {line.get_label(): line for ax in axes for line in ax.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside center right", fontsize=8)
    figure.suptitle(where(settings), fontsize=9)
    save(figure, path)


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    contents = [json.loads(Path(name).read_text()) for name in sys.argv[2:]]
    draw([result for content in contents for result in content["results"]], contents[0], Path(sys.argv[1]))


if __name__ == "__main__":
    main()
