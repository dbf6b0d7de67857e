"""``kvbench needle``: the needle grid, length by depth, on a real model, drawn as a heat map.

A text of essays holds one needle at every depth of the grid; each is asked for on a fork of that
one context. A cell's score is the share of its needles that were found, over several texts. Text
and protocol are those of ``kvtier.bench.ruler``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtier.bench import heatmap, niah
from kvtier.bench import rig as rigs
from kvtier.bench.comparison import Comparison, compare, work
from kvtier.bench.haystack import Count
from kvtier.bench.questions import Haystack
from kvtier.bench.rig import Progress, Rig
from kvtier.bench.scoring import Kept, Outcome, kept_samples
from kvtier.daemon import DaemonError, sparse_above
from kvtier.errors import KvtierError

__all__ = ["Cell", "grid_text", "main"]

_ANSWER_TOKENS = 128


@dataclasses.dataclass(slots=True)
class Cell:
    """One length and depth.

    Attributes:
        found: for each way ("dense", "full", or a share) the outcome of each needle, in one order.
        depths: where the needles really lie.
    """

    length: int
    depth: float
    found: dict[str, list[Outcome]] = dataclasses.field(default_factory=dict)
    depths: list[float] = dataclasses.field(default_factory=list)

    def score(self, way: str) -> float:
        outcomes = self.found[way]
        return sum(outcome.score for outcome in outcomes) / len(outcomes)


def grid_text(length: int, depths: Sequence[float], rng: random.Random, count: Count) -> Haystack:
    """Essays of at most `length` tokens with a needle at every depth; question i asks for depth i's."""
    kind = next(kind for kind in niah.KINDS if kind.name == "niah_single_2")
    return niah.at_depths(kind, length, depths, rng, count)


def _grid(rig: Rig, args: argparse.Namespace) -> list[Cell]:
    cells = {(n, d): Cell(n, d) for n in args.lengths for d in args.depths}
    progress = Progress(sum(args.texts * work(n, len(args.depths), args.shares) for n in args.lengths))
    for length in args.lengths:
        for number in range(args.texts):
            rng = random.Random(f"needle/{length}/{number}/{args.seed}")
            hay = grid_text(length - rig.overhead, args.depths, rng, rig.count)
            title = f"{length} tokens, text {number + 1} of {args.texts}"
            found = compare(rig, hay, args.shares, True, _ANSWER_TOKENS, progress, title)
            for index, depth in enumerate(args.depths):
                cell = cells[length, depth]
                cell.depths.append(hay.depth(hay.questions[index]))
                for way, outcomes in _ways(found).items():
                    cell.found.setdefault(way, []).append(outcomes[index])
    progress.close()
    return [*cells.values()]


def _ways(found: Comparison) -> dict[str, list[Outcome]]:
    return {"dense": found.dense, "full": found.full, **{f"{share:g}": o for share, o in found.sparse.items()}}


def retention(cells: Sequence[Cell], way: str, before: str) -> Kept:
    """Of the needles that the way `before` found, those that `way` finds."""
    return kept_samples(
        [outcome for cell in cells for outcome in cell.found[before]],
        [outcome for cell in cells for outcome in cell.found[way]],
    )


def svg(cells: Sequence[Cell], model: str, args: argparse.Namespace) -> str:
    """The heat map: a panel for dense attention and one for each share."""
    by = {(cell.length, cell.depth): cell for cell in cells}
    panels = [
        heatmap.Panel(
            "dense" if way == "dense" else f"sparse, {100 * float(way):g} % of the bytes",
            [[by[length, depth].score(way) for length in args.lengths] for depth in args.depths],
        )
        for way in ("dense", *(f"{share:g}" for share in args.shares))
    ]
    note = f"share of {args.texts} needles a cell that were found; tokens of the text below"
    return heatmap.draw(f"Needles in a haystack, {model}", panels, args.lengths, args.depths, note)


def table(cells: Sequence[Cell], args: argparse.Namespace) -> str:
    """Rows of depths for each way, and what is retained."""
    ways = [*cells[0].found]
    head = f"{'depth':>7}" + "".join(f"   {way:>{7 * len(args.lengths)}}" for way in ways)
    lines = [head, " " * 7 + "".join("   " + "".join(f"{n:7}" for n in args.lengths) for _ in ways)]
    by = {(cell.length, cell.depth): cell for cell in cells}
    for depth in args.depths:
        scores = ("".join(f"{by[n, depth].score(way):7.2f}" for n in args.lengths) for way in ways)
        lines.append(f"{100 * depth:5.0f} %" + "".join("   " + part for part in scores))
    for share in ways[2:]:
        kl = [outcome.kl for cell in cells for outcome in cell.found[share]]
        lines.append(
            f"share {share}: kept of dense {retention(cells, share, 'dense')}, of the full read "
            f"{retention(cells, share, 'full')}; KL mean {sum(kl) / len(kl):.4f}, max {max(kl):.4f}"
        )
    return "\n".join(lines)


def _report(cells: Sequence[Cell], model: str, chat: bool, args: argparse.Namespace) -> dict[str, Any]:
    shares = [f"{share:g}" for share in args.shares]
    return {
        "model": model, "chat": chat, "seed": args.seed, "texts": args.texts, "lengths": args.lengths,
        "depths": args.depths,
        "retention": {
            share: {before: dataclasses.asdict(retention(cells, share, before)) for before in ("dense", "full")}
            for share in shares
        },
        "cells": [{**dataclasses.asdict(cell), "scores": {w: cell.score(w) for w in cell.found}} for cell in cells],
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvbench needle",
        description="The needle grid on a real model: which needles are found at which length and depth, densely and "
        "sparsely, as a heat map. Sparse attention begins with the question's first token.",
    )
    rigs.add_arguments(parser)
    parser.add_argument("--lengths", type=rigs.integers, default=(1024, 2048), metavar="N,N",
                        help="tokens of the texts, as 2048 or 2k (default: 1k,2k)")  # fmt: skip
    parser.add_argument("--depths", type=_depths, default=_depths("10"), metavar="N|D,D",
                        help="so many depths, evenly spread, or depths from 0 to 1 (default: 10)")  # fmt: skip
    parser.add_argument("--texts", type=int, default=2, help="texts a length, so needles a cell (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE.svg", help="draw the heat map")
    return parser


def _depths(text: str) -> tuple[float, ...]:
    if "," in text or "." in text:
        return tuple(dict.fromkeys(rigs.floats(text)))
    (number,) = rigs.integers(text)
    if not 2 <= number <= 40:
        raise argparse.ArgumentTypeError(f"{number} depths: give 2 to 40")
    return tuple(index / (number - 1) for index in range(number))


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.texts < 1:
        parser.error(f"--texts {args.texts}: give 1 or more")
    try:
        # As in ruler: read-all would answer from everything.
        with rigs.start(args, [*sparse_above(256, by_page=args.by_page), "--audit", "0"], args.lengths) as rig:
            cells, model, chat = _grid(rig, args), rig.name, rig.chat
        if args.out is not None:
            heatmap.write(args.out, svg(cells, model, args))
        if args.json is not None:
            text = json.dumps(rigs.without_nan(_report(cells, model, chat, args)), indent=1, ensure_ascii=False) + "\n"
            sys.stdout.write(text) if args.json == "-" else Path(args.json).write_text(text, "utf-8")
    except (ValueError, OSError, DaemonError, KvtierError) as error:
        print(f"kvbench needle: {error}", file=sys.stderr)
        return 1
    if args.json != "-":
        print(f"{model}, {args.texts} needles a cell, seed {args.seed}")
        print(table(cells, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
