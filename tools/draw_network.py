"""Draws docs/network.svg and docs/mrffi.svg, the pictures of docs/how-it-works.md.

python tools/draw_network.py docs
"""

import argparse
import inspect
from pathlib import Path
from typing import Any

from mobilemamba.models import PRESETS, MobileMamba
from mobilemamba.models.mrffi import split_channels

BLUE, GREEN, ORANGE, GREY = "#dbe9f9", "#ddf2dd", "#fde9cf", "#eeeeee"
LINE = 'stroke="#444" stroke-width="1.5" fill="none"'


def s6() -> dict[str, Any]:
    """The constructor's arguments, defaults included."""
    parameters = inspect.signature(MobileMamba).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters} | PRESETS["s6"]


class Drawing:
    """Boxes, arrows and texts on white; ``x`` and ``y`` are centres in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13" text-anchor="middle" fill="#222">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 8 4 0 8z" fill="#444"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def text(self, x: float, y: float, *lines: str, **style: object) -> None:
        extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        for i, line in enumerate(lines):
            self.lines.append(f'<text x="{x:g}" y="{y + 4.5 + 17 * (i - (len(lines) - 1) / 2):g}"{extra}>{line}</text>')

    def box(self, x: float, y: float, width: float, height: float, fill: str, *lines: str) -> None:
        self.lines.append(
            f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="5" '
            f'fill="{fill}" stroke="#777"/>'
        )
        self.text(x, y, *lines)

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.lines.append(f'<polyline points="{path}" {LINE} marker-end="url(#tip)"/>')

    def plus(self, x: float, y: float, sign: str = "+") -> None:
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="white" stroke="#444"/>')
        self.text(x, y, sign)

    def __str__(self) -> str:
        return "\n".join([*self.lines, "</svg>\n"])


def residual_chain(drawing: Drawing, y: float, layers: list[tuple[str, str]], step: float, start: float) -> float:
    """Layers in a row, each with an arc around it; returns the x of the last sum."""
    x = start
    for fill, name in layers:
        drawing.arrow((x, y), (x + step - 106, y))
        drawing.box(x + step - 68, y, 76, 34, fill, name)
        drawing.arrow((x + step - 30, y), (x + step - 9, y))
        drawing.arrow((x + 10, y), (x + 10, y - 30), (x + step, y - 30), (x + step, y - 9))
        x += step
        drawing.plus(x, y)
        x += 9
    return x - 9


def network() -> str:
    options, pixels = s6(), 224
    widths, depths = options["widths"], options["depths"]
    drawing = Drawing(1010, 390, "The network s6: patch embedding, three stages, head; a block; a transition")
    sides = (14, 7, 4)
    drawing.box(62, 60, 96, 56, GREY, "image", f"3 x {pixels} x {pixels}")
    drawing.box(194, 60, 126, 56, BLUE, "patch embedding", "4 convolutions")
    drawing.arrow((110, 60), (131, 60))
    previous = 257.0
    for i, (width, depth, side) in enumerate(zip(widths, depths, sides, strict=True)):
        if i:
            drawing.arrow((previous, 60), (previous + 20, 60))
            drawing.box(previous + 66, 60, 92, 56, ORANGE, "transition")
            previous += 112
        x = previous + 77
        drawing.arrow((previous, 60), (x - 57, 60))
        drawing.box(x, 60, 114, 56, GREEN, f"stage {i + 1}", f"{depth} block{'s' * (depth > 1)}")
        drawing.text(x, 104, f"{width} x {side} x {side}", fill="#555")
        previous = x + 57
    drawing.arrow((previous, 60), (previous + 22, 60))
    drawing.box(previous + 56, 60, 68, 56, GREY, "mean,", "classes")

    drawing.text(20, 150, "A block", text_anchor="start", font_weight="bold")
    layers = [(BLUE, "dw 3x3"), (GREY, "FFN"), (GREEN, "MRFFI"), (BLUE, "dw 3x3"), (GREY, "FFN")]
    drawing.text(30, 215, "x")
    last = residual_chain(drawing, 215, layers, 150, 44)
    drawing.arrow((last + 9, 215), (last + 60, 215))
    drawing.plus(last + 69, 215)
    drawing.arrow((30, 224), (30, 252), (last + 69, 252), (last + 69, 224))
    drawing.arrow((last + 78, 215), (last + 108, 215))
    drawing.text(last + 118, 215, "y")

    drawing.text(20, 295, "A transition", text_anchor="start", font_weight="bold")
    last = residual_chain(drawing, 350, [(BLUE, "dw 3x3"), (GREY, "FFN")], 150, 44)
    drawing.text(30, 350, "x")
    drawing.arrow((last + 9, 350), (last + 40, 350))
    drawing.box(last + 125, 350, 170, 48, ORANGE, "patch merging", "half the side, new width")
    last = residual_chain(drawing, 350, [(BLUE, "dw 3x3"), (GREY, "FFN")], 150, last + 210)
    drawing.arrow((last + 9, 350), (last + 40, 350))
    drawing.text(last + 50, 350, "y")
    return str(drawing)


def mrffi() -> str:
    options = s6()
    drawing = Drawing(860, 500, "MRFFI: the global, local and identity parts of the channels")
    drawing.text(40, 240, "x")
    drawing.arrow((50, 240), (84, 240))
    drawing.box(120, 240, 72, 60, GREY, "split", "channels")
    drawing.arrow((156, 225), (190, 225), (190, 130), (218, 130))
    drawing.arrow((190, 200), (190, 265), (218, 265))
    drawing.arrow((156, 250), (175, 250), (175, 350), (278, 350))
    drawing.arrow((120, 270), (120, 430), (700, 430), (700, 296))

    drawing.lines.append('<rect x="205" y="22" width="450" height="290" rx="8" fill="none" stroke="#9b9" '
                         'stroke-dasharray="5 4"/>')  # fmt: skip
    drawing.text(215, 40, "global", text_anchor="start", font_weight="bold")
    drawing.box(270, 130, 104, 44, GREEN, "1x1 to u, z")
    drawing.arrow((322, 118), (340, 118), (340, 90), (352, 90))
    drawing.text(330, 82, "u")
    drawing.box(392, 90, 80, 44, BLUE, "dw 3x3,", "SiLU")
    drawing.arrow((432, 90), (448, 90))
    drawing.box(496, 90, 96, 44, GREEN, "scan in both", "directions")
    drawing.arrow((322, 142), (340, 142), (340, 175), (496, 175))
    drawing.arrow((496, 112), (496, 166))
    drawing.text(330, 162, "z")
    drawing.box(415, 175, 66, 30, GREY, "SiLU")
    drawing.text(503, 140, "LayerNorm", text_anchor="start")
    drawing.plus(496, 175, "x")
    drawing.arrow((505, 175), (536, 175))
    drawing.box(560, 175, 48, 36, GREEN, "1x1")
    drawing.arrow((584, 175), (620, 175), (620, 206))
    drawing.plus(620, 215)
    drawing.box(270, 265, 104, 44, ORANGE, "Haar", "transform")
    drawing.arrow((322, 265), (350, 265))
    drawing.box(406, 265, 112, 44, BLUE, "dw k x k of the", "4 sub-bands")
    drawing.arrow((462, 265), (490, 265))
    drawing.box(538, 265, 96, 44, ORANGE, "inverse", "transform")
    drawing.arrow((586, 265), (620, 265), (620, 224))
    drawing.arrow((629, 215), (672, 215))

    drawing.text(215, 338, "local", text_anchor="start", font_weight="bold")
    drawing.box(360, 350, 164, 44, BLUE, "dw k x k, ReLU,", "dw 1x1")
    drawing.arrow((442, 350), (660, 350), (660, 255), (672, 255))
    drawing.text(215, 418, "identity", text_anchor="start", font_weight="bold")

    drawing.box(700, 240, 56, 112, GREY, "join,", "ReLU")
    drawing.arrow((728, 240), (750, 240))
    drawing.box(776, 240, 52, 44, GREEN, "1x1")
    drawing.arrow((802, 240), (824, 240))
    drawing.text(836, 240, "y")

    shares = zip(options["widths"], options["global_ratios"], options["local_ratios"], strict=True)
    parts = [split_channels(*share) for share in shares]
    rows = [
        f"stage {i + 1}: {sum(part)} = {part[0]} + {part[1]} + {part[2]}, k = {kernel}"
        for i, (part, kernel) in enumerate(zip(parts, options["wavelet_kernels"], strict=True))
    ]
    title = "Channels of s6, global + local + identity, and k:"
    drawing.text(430, 472, title, "; ".join(rows), fill="#555", font_size=12)
    return str(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the two files go")
    folder = parser.parse_args().folder
    (folder / "network.svg").write_text(network())
    (folder / "mrffi.svg").write_text(mrffi())


if __name__ == "__main__":
    main()
