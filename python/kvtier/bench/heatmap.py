"""The needle grid as a heat map: SVG written by hand, to be opened in any browser."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["Panel", "colour", "draw", "write"]

_CELL_W, _CELL_H, _LEFT, _TOP, _GAP, _BOTTOM = 64, 26, 64, 70, 40, 54
# From wrong to right, as the heat maps that made the test known have it.
_STOPS = ((0.0, (0xD7, 0x30, 0x27)), (0.5, (0xFE, 0xE0, 0x8B)), (1.0, (0x1A, 0x98, 0x50)))
_NOTHING = "#d0d0d0"


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """One grid.

    Attributes:
        title: above it.
        scores: [depth][length], 0 to 1; NaN where nothing was measured.
    """

    title: str
    scores: Sequence[Sequence[float]]


def colour(score: float) -> str:
    """#rrggbb of a score in [0, 1]: red, yellow, green; grey for NaN."""
    if math.isnan(score):
        return _NOTHING
    score = min(1.0, max(0.0, score))
    for (low, a), (high, b) in zip(_STOPS, _STOPS[1:], strict=False):
        if score <= high:
            part = (score - low) / (high - low)
            return "#" + "".join(f"{round(x + part * (y - x)):02x}" for x, y in zip(a, b, strict=True))
    raise AssertionError("unreachable")


def draw(title: str, panels: Sequence[Panel], lengths: Sequence[int], depths: Sequence[float], note: str = "") -> str:
    """An SVG document: panels side by side, lengths across, depths downwards."""
    grid_w, grid_h = _CELL_W * len(lengths), _CELL_H * len(depths)
    width = _LEFT + (grid_w + _GAP) * len(panels)
    # Text does not wrap by itself: a narrow grid would cut what stands above and below it.
    width = max(width, 20 + 7 * max(len(note), round(1.3 * len(title))))
    height = _TOP + grid_h + _BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" text-anchor="middle">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="24" font-size="16" text-anchor="start">{escape(title)}</text>',
    ]
    for index, panel in enumerate(panels):
        left = _LEFT + index * (grid_w + _GAP)
        out.append(f'<text x="{left + grid_w / 2:g}" y="{_TOP - 12}">{escape(panel.title)}</text>')
        for row, depth in enumerate(depths):
            y = _TOP + row * _CELL_H
            if index == 0:
                out.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{100 * depth:.0f} %</text>')
            for column, score in enumerate(panel.scores[row]):
                out += _cell(left + column * _CELL_W, y, score)
        for column, length in enumerate(lengths):
            x = left + column * _CELL_W + _CELL_W / 2
            out.append(f'<text x="{x:g}" y="{_TOP + grid_h + 18}">{length}</text>')
    middle = _TOP + grid_h / 2
    out.append(f'<text x="14" y="{middle:g}" transform="rotate(-90 14 {middle:g})">depth</text>')
    out.append(f'<text x="10" y="{height - 14}" text-anchor="start" fill="#444">{escape(note)}</text>')
    out.append("</svg>\n")
    return "\n".join(out)


def _cell(x: int, y: int, score: float) -> list[str]:
    rect = f'<rect x="{x}" y="{y}" width="{_CELL_W - 1}" height="{_CELL_H - 1}" fill="{colour(score)}"/>'
    if math.isnan(score):
        return [rect]
    # White on the dark ends of the scale, black between them.
    ink = "white" if score < 0.15 or score > 0.85 else "black"
    return [rect, f'<text x="{x + _CELL_W / 2:g}" y="{y + 17}" fill="{ink}">{score:.2f}</text>']


def write(path: Path, svg: str) -> None:
    """Write the document, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg, "utf-8")
