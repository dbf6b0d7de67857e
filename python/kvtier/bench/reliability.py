"""The reliability diagram of stated errors, as SVG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

import numpy as np

__all__ = ["Call", "diagram"]

_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5a9e", "#c98a1b", "#555555")
_SIZE, _LEFT, _TOP, _BOTTOM = 360, 64, 44, 52
_BINS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One audited call: what was stated of its error, and what it was."""

    budget: str
    layer: int
    position: int
    share_read: float
    estimate: float
    p95: float
    true: float


def diagram(calls: Sequence[Call], title: str) -> str:
    """Stated errors against observed ones, on logarithmic axes.

    Calls of a budget are parted by what was stated into eight equal bins. The left panel sets the
    mean stated 95th percentile of a bin against the 95th percentile of its true errors; the right
    one the stated middle estimate against their median. Points on the diagonal are calibrated;
    those under it are stated too high.
    """
    if not calls:
        raise ValueError("no audited calls to draw")
    budgets = list(dict.fromkeys(call.budget for call in calls))
    values = [x for call in calls for x in (call.p95, call.estimate, call.true) if x > 0]
    low = 10 ** math.floor(math.log10(float(np.quantile(values, 0.005))))
    high = 10 ** math.ceil(math.log10(max(values)))
    width, height = 2 * (_SIZE + _LEFT) + 150, _TOP + _SIZE + _BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for panel, (name, quantile) in enumerate((("95th percentile", 0.95), ("median", 0.5))):
        left = _LEFT + panel * (_SIZE + _LEFT)
        out += _frame(left, low, high, name)
        for index, budget in enumerate(budgets):
            chosen = [call for call in calls if call.budget == budget]
            colour = _COLOURS[index % len(_COLOURS)]
            points = _bins(chosen, quantile)
            out += [
                f'<circle cx="{left + _SIZE * _place(x, low, high):.1f}" '
                f'cy="{_TOP + _SIZE * (1 - _place(y, low, high)):.1f}" r="4" fill="{colour}" fill-opacity="0.8"/>'
                for x, y in points
            ]
    for index, budget in enumerate(budgets):
        x, y = 2 * (_SIZE + _LEFT) + 16, _TOP + 16 + 20 * index
        out.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{_COLOURS[index % len(_COLOURS)]}"/>')
        out.append(f'<text x="{x + 10}" y="{y}">{escape(budget)}</text>')
    return "\n".join([*out, "</svg>", ""])


def _bins(calls: Sequence[Call], quantile: float) -> list[tuple[float, float]]:
    """(mean stated, quantile of true) of calls parted by what was stated."""
    stated = np.array([call.p95 if quantile > 0.5 else call.estimate for call in calls])
    true = np.array([call.true for call in calls])
    parts = np.array_split(np.argsort(stated, kind="stable"), _BINS)
    return [(float(stated[p].mean()), float(np.quantile(true[p], quantile))) for p in parts if len(p)]


def _place(x: float, low: float, high: float) -> float:
    """Where x lies on a logarithmic axis from low (0) to high (1), kept on it."""
    x = min(max(x, low), high)
    return (math.log10(x) - math.log10(low)) / (math.log10(high) - math.log10(low))


def _frame(left: float, low: float, high: float, name: str) -> list[str]:
    bottom = _TOP + _SIZE
    out = [
        f'<rect x="{left}" y="{_TOP}" width="{_SIZE}" height="{_SIZE}" fill="none" stroke="#888"/>',
        f'<path d="M{left} {bottom}L{left + _SIZE} {_TOP}" stroke="#888" stroke-dasharray="4 4"/>',
        f'<text x="{left + _SIZE / 2}" y="{bottom + 36}" text-anchor="middle">stated error, {name}</text>',
        f'<text transform="translate({left - 42} {_TOP + _SIZE / 2}) rotate(-90)" text-anchor="middle">'
        f"true error, {name}</text>",
    ]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = _place(10.0**power, low, high)
        x, y = left + _SIZE * at, bottom - _SIZE * at
        out.append(f'<path d="M{x:.1f} {bottom}v5M{left} {y:.1f}h-5" stroke="#888"/>')
        out.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{10.0**power:g}</text>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    return out
