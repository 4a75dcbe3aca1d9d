"""Our presets beside the peers' front: a figure, and our time over the front's at the same accuracy.

    python benchmarks/front.py FIGURE.svg RESULTS.json ...

The results are those of ``models.py --json``, which has ``--front FIGURE`` for one run. Each network is there with the
fastest of its runtimes, the peers at their published accuracy, ours at the distilled one. The front has the peers that
no faster peer reaches in accuracy. Between two neighbours its time is interpolated linearly; below the first it is that
one's, which no less accurate peer undercuts; above the last there is none.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import plot

__all__ = ["Point", "cases", "draw", "front_of", "points", "table", "time_at"]

Case = tuple[int, str]  # batch and type


@dataclass(frozen=True)
class Point:
    """A network in one case, with the fastest of its contestants."""

    title: str
    family: str
    top1: float
    ms: float
    contestant: str


def cases(results: Iterable[Mapping[str, Any]]) -> dict[Case, list[Point]]:
    """The networks that have an accuracy, by case."""
    found: dict[Case, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        if not any(result.get(fact) for fact in ("error", "training", "plain", "int8")):  # 8 bits: another accuracy
            found[result["batch"], result["dtype"]].append(result)
    order = sorted(found, key=lambda case: (case[0], case[1] != "float32", case[1]))
    return {case: points(found[case]) for case in order}


def points(results: Iterable[Mapping[str, Any]]) -> list[Point]:
    fastest: dict[str, Mapping[str, Any]] = {}
    for result in results:
        name = result["network"]
        if name not in fastest or result["median ms"] < fastest[name]["median ms"]:
            fastest[name] = result
    chosen = []
    for name, result in fastest.items():
        top1 = result.get("top1, distilled") or result.get("top1")
        if top1:
            title = result.get("title", name)
            chosen.append(Point(title, result["family"], top1, result["median ms"], result["model"]))
    return chosen


def front_of(points: Iterable[Point]) -> list[Point]:
    """The peers that are more accurate than all faster ones, fastest first."""
    front: list[Point] = []
    for point in sorted((p for p in points if p.family != plot.OURS), key=lambda p: (p.ms, -p.top1)):
        if not front or point.top1 > front[-1].top1:
            front.append(point)
    return front


def time_at(front: list[Point], top1: float) -> float | None:
    """The front's time in ms at this accuracy; None above it."""
    if front and top1 <= front[0].top1:
        return front[0].ms
    for low, high in pairwise(front):
        if low.top1 < top1 <= high.top1:
            return low.ms + (high.ms - low.ms) * (top1 - low.top1) / (high.top1 - low.top1)
    return None


def ours_of(points: Iterable[Point]) -> list[Point]:
    return sorted((point for point in points if point.family == plot.OURS), key=lambda point: (point.top1, point.ms))


def milliseconds(ms: float) -> str:
    return f"{ms:.1f}" if ms < 99.95 else f"{ms:.0f}"


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Two tables in Markdown: ours / the front's = ratio; and the front with the runtime of each peer."""
    found = cases(results)
    heads = [f"batch {batch}, {dtype}" for batch, dtype in found]
    lines = [f"| preset (top-1) | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
    for name, top1 in dict.fromkeys((p.title, p.top1) for members in found.values() for p in ours_of(members)):
        cells = []
        for members in found.values():
            mine = next((point for point in ours_of(members) if point.title == name), None)
            peers = None if mine is None else time_at(front_of(members), top1)
            if mine is None:
                cells.append("-")
            elif peers is None:
                cells.append(f"{milliseconds(mine.ms)} / none")
            else:
                cells.append(f"{milliseconds(mine.ms)} / {milliseconds(peers)} = {mine.ms / peers:.2f}")
        lines.append(f"| {name} ({top1}) | {' | '.join(cells)} |")
    lines += ["", "The front: top-1, median ms, contestant.", ""]
    for head, members in zip(heads, found.values(), strict=True):
        front = (f"{p.contestant} ({p.top1}) {milliseconds(p.ms)}" for p in front_of(members))
        lines.append(f"- {head}: {'; '.join(front)}")
    return "\n".join(lines)


def draw(results: Iterable[Mapping[str, Any]], settings: Mapping[str, Any], path: Path) -> None:
    pyplot = plot.pyplot_with_stable_files()
    found = cases(results)
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(6 * columns, 4.5 * rows), squeeze=False, layout="constrained"
    )
    for unused in grid.flat[len(found) :]:
        unused.set_visible(False)
    families = sorted({p.family for members in found.values() for p in members} - {plot.OURS})
    colors = {family: f"C{i}" for i, family in enumerate(families)}
    for ax, ((batch, dtype), members) in zip(grid.flat, found.items(), strict=False):
        front, ours = front_of(members), ours_of(members)
        for family, color in colors.items():
            own = [point for point in members if point.family == family]
            ax.plot([p.ms for p in own], [p.top1 for p in own], "o", color=color, markersize=5, label=family)
        ax.plot([p.ms for p in front], [p.top1 for p in front], color="gray", linewidth=1, label="the peers' front")
        ax.plot([p.ms for p in ours], [p.top1 for p in ours], "s-", color="black", linewidth=2, label=plot.OURS)
        for point in front:
            place = {"xytext": (-5, 4), "textcoords": "offset points", "fontsize": 7, "color": "dimgray", "ha": "right"}
            ax.annotate(point.title, (point.ms, point.top1), **place)
        for point in ours:
            peers = time_at(front, point.top1)
            label = point.title if peers is None else f"{point.title}: {point.ms / peers:.2f}"
            place = {"xytext": (6, -9), "textcoords": "offset points", "fontsize": 8}
            ax.annotate(label, (point.ms, point.top1), weight="bold", **place)
        plot.log_axis(ax)
        ax.margins(x=0.15)
        ax.set_title(f"batch {batch}, {dtype}")
        ax.set_xlabel("ms, median, under the fastest runtime")
        ax.grid(True, which="both", alpha=0.3)
    for ax in grid[:, 0]:
        ax.set_ylabel("ImageNet-1k top-1, published, %")
    handles = {line.get_label(): line for ax in grid.flat[: len(found)] for line in ax.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"{plot.where(settings)}; number: our time / the front's at the same accuracy", fontsize=9)
    plot.save(figure, path)


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    contents = [json.loads(Path(name).read_text()) for name in sys.argv[2:]]
    results = [result for content in contents for result in content["results"]]
    print(table(results))
    draw(results, contents[0], Path(sys.argv[1]))


if __name__ == "__main__":
    main()
