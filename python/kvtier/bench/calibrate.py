"""Measure how well the daemon's stated errors hold, on a real model over a text.

The model reads a text; its queries are then asked of a daemon that audits every sparse answer. A
call is one layer's answer at one position, and its error the mean over query heads. The report says
how many calls had a true error of at most the stated 95th percentile, by group of layers and by
budget. The daemon starts knowing nothing of the model and learns as it goes: all calls count, the
first ones too.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtier.bench import corpora
from kvtier.bench.reliability import Call, diagram
from kvtier.bench.stats import wilson
from kvtier.bench.recorded import Stream, fill, record
from kvtier.bf16 import from_bf16
from kvtier.client import Client
from kvtier.daemon import Daemon, DaemonError, find_daemon, sparse_above
from kvtier.dense import dense_attention
from kvtier.errors import KvtierError
from kvtier.gguf_model import Model
from kvtier.models import ModelNotFoundError, find_model
from kvtier.session import Session
from kvtier.tokenizer import Tokenizer
from kvtier.types import Budget

__all__ = ["Answer", "Row", "main", "report_of", "run", "summarise"]

_MOST_GROUPS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """What was found of one group of layers under one budget.

    Attributes:
        budget, layers: as "share 0.2" and "0-5", or "all".
        calls: audited calls.
        coverage, low, high: share of calls whose error was at most the stated 95th percentile, and
            its 95 % interval by Wilson, which takes calls for independent; neighbours are not.
        stated_over_true: median of stated 95th percentile over true error.
        estimate_over_true: median of the stated middle estimate over true error.
        true_mean, true_p95: of true errors.
        share_read: mean share of the sealed 4-bit bytes moved.
    """

    budget: str
    layers: str
    calls: int
    coverage: float
    low: float
    high: float
    stated_over_true: float
    estimate_over_true: float
    true_mean: float
    true_p95: float
    share_read: float


def summarise(calls: Sequence[Call], layers: Sequence[int]) -> list[Row]:
    """One row for every budget and group of neighbouring layers, and one for all layers."""
    groups = [[*map(int, part)] for part in np.array_split(np.asarray(layers), min(_MOST_GROUPS, len(layers)))]
    rows = []
    for budget in dict.fromkeys(call.budget for call in calls):
        chosen = [call for call in calls if call.budget == budget]
        for group in groups:
            name = f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0])
            rows += _row(budget, name, [call for call in chosen if call.layer in group])
        rows += _row(budget, "all", chosen)
    return rows


def _row(budget: str, layers: str, calls: Sequence[Call]) -> list[Row]:
    if not calls:
        return []
    true = np.maximum([call.true for call in calls], 1e-9)
    stated = np.array([call.p95 for call in calls])
    held = int((true <= stated).sum())
    low, high = wilson(held, len(calls))
    return [
        Row(
            budget, layers, len(calls), held / len(calls), low, high,
            float(np.median(stated / true)),
            float(np.median(np.array([call.estimate for call in calls]) / true)),
            float(true.mean()), float(np.quantile(true, 0.95)),
            float(np.mean([call.share_read for call in calls])),
        )
    ]  # fmt: skip


class _Auditor:
    """Collects what the daemon's audits found, and keeps its queue from running over."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._newest = 0
        self.calls: list[Call] = []
        self.ratios: dict[str, list[float]] = collections.defaultdict(list)

    def collect(self, expected: int, budget: str, layers: Sequence[int]) -> None:
        """Wait for `expected` audits of calls under `budget`; those that do not come are not counted."""
        patience = time.monotonic() + 10
        while expected > 0 and time.monotonic() < patience:
            audits = self._client.audits(after=self._newest).audits
            for audit in audits:
                self._newest = audit.number
                self.calls.append(
                    Call(budget, layers[audit.layer], audit.position, audit.share_read,
                         audit.estimated_error, audit.error_p95, audit.true_error)
                )  # fmt: skip
                self.ratios[budget].append(audit.true_error / max(float(np.mean(audit.head_raw_errors)), 2e-4))
            expected -= len(audits)
            if audits:
                patience = time.monotonic() + 10
            else:
                time.sleep(0.02)


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its error against attention over the unquantised rows, mean over query heads."""

    budget: str
    layer: int
    error: float
    missed: bool
    share_read: float


def run(
    session: Session, stream: Stream, budgets: dict[str, Budget], positions: int, name: str
) -> tuple[list[Call], dict[str, list[float]], list[Answer]]:
    """Ask `positions` positions' queries under every budget.

    Returns the audited calls, by budget the ratios of true to raw errors, and all answers.
    """
    sequence_id = fill(session, stream, name)
    auditor = _Auditor(session.client)
    rows = stream.k[0].shape[0] - stream.prefix
    asked = np.unique(np.linspace(0, rows - 1, min(positions, rows)).astype(int))
    dense = [(from_bf16(k), from_bf16(v)) for k, v in zip(stream.k, stream.v, strict=True)]
    answers: list[Answer] = []
    appended, scale = 0, stream.spec.scale or stream.spec.head_dim**-0.5
    for done, at in enumerate(asked):
        position = stream.prefix + int(at)
        for layer in range(len(stream.layers)):
            fresh = slice(stream.prefix + appended, position + 1)
            session.append(sequence_id, layer, fresh.start, stream.k[layer][fresh], stream.v[layer][fresh])
        appended = int(at) + 1
        exact = [
            dense_attention(stream.q[layer][at : at + 1], k[: position + 1], v[: position + 1], position, scale)
            for layer, (k, v) in enumerate(dense)
        ]
        for label, budget in budgets.items():
            results = [
                session.attend(sequence_id, layer, position, stream.q[layer][at : at + 1], budget=budget)
                for layer in range(len(stream.layers))
            ]
            answers += [
                Answer(label, stream.layers[layer], _error(result.output, exact[layer]),
                       result.account.target_missed, result.account.share_read)
                for layer, result in enumerate(results)
            ]  # fmt: skip
            auditor.collect(sum(result.account.tokens_estimated > 0 for result in results), label, stream.layers)
        print(f"\r  {name}: {done + 1}/{len(asked)} positions", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return auditor.calls, auditor.ratios, answers


def _error(output: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """Relative error of outputs [n, H, d], mean over n and H."""
    norms = np.linalg.norm(exact, axis=-1)
    return float((np.linalg.norm(output - exact, axis=-1) / np.maximum(norms, 1e-20)).mean())


def _targets(answers: Sequence[Answer], budgets: dict[str, Budget]) -> list[dict[str, Any]]:
    """How targets were kept, by target: against unquantised rows, the codec's error included."""
    out = []
    for label, budget in budgets.items():
        chosen = [answer for answer in answers if answer.budget == label]
        if not budget.target_error or not chosen:
            continue
        met = [answer for answer in chosen if not answer.missed]
        kept = sum(answer.error <= budget.target_error for answer in met)
        low, high = wilson(kept, len(met))
        out.append({
            "target": budget.target_error, "answers": len(chosen), "missed": len(chosen) - len(met),
            "kept": kept / len(met) if met else None, "low": low, "high": high,
            "share_read": float(np.mean([answer.share_read for answer in chosen])),
        })  # fmt: skip
    return out


def _print(rows: Iterable[Row]) -> None:
    print(f"  {'budget':14}{'layers':>8}{'calls':>7}{'coverage':>10}{'95 % interval':>16}"
          f"{'p95/true':>10}{'est/true':>10}{'true mean':>11}{'p95':>8}{'read':>7}")  # fmt: skip
    for r in rows:
        interval = f"{r.low:.3f}-{r.high:.3f}"
        print(f"  {r.budget:14}{r.layers:>8}{r.calls:>7}{r.coverage:>10.3f}{interval:>16}"
              f"{r.stated_over_true:>10.2f}{r.estimate_over_true:>10.2f}{r.true_mean:>11.4f}{r.true_p95:>8.4f}"
              f"{r.share_read:>7.3f}")  # fmt: skip


def _budgets(args: argparse.Namespace) -> dict[str, Budget]:
    shares = {f"share {share:g}": Budget.share(share) for share in args.share}
    return shares | {f"target {error:g}": Budget.target(error) for error in args.target}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvbench calibrate", description=(__doc__ or "").partition("\n")[0])
    corpora.add_arguments(parser)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3 or a GGUF file (default: smollm2)")
    parser.add_argument("--prefix", type=int, default=4096, help="tokens that are sealed, a multiple of 512")
    parser.add_argument("--rows", type=int, default=256, help="tokens after them, whose queries are asked")
    parser.add_argument("--positions", type=int, default=128, help="how many of these positions are asked")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text to leave out at its start")
    parser.add_argument("--share", type=float, nargs="*", default=[0.1, 0.2, 0.4], help="budgets by share")
    parser.add_argument("--target", type=float, nargs="*", default=[0.05], help="budgets by target error")
    parser.add_argument("--daemon", help="the kvtierd binary (default: $KVTIERD, or bin/kvtierd)")
    parser.add_argument("--daemon-flag", action="append", default=[], help="a further flag for it; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--svg", type=Path, help="draw the reliability diagram to this file")
    parser.add_argument("--priors", action="store_true", help="also print quantiles of true over raw errors")
    return parser


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    text, source = corpora.source(args)
    path = find_model(args.model)
    ids = corpora.token_ids(Tokenizer.from_gguf(path), text, args.prefix + args.rows, args.skip)
    model = Model.load(path)
    print(f"Reading {len(ids)} tokens with {path.name}", file=sys.stderr)
    report, calls = report_of(
        record(model, ids, args.prefix), _budgets(args), args.positions, find_daemon(args.daemon), args.daemon_flag
    )
    if args.svg:
        args.svg.write_text(diagram(calls, f"{path.stem}, {source}"))
    return {
        "model": path.name, "text": source, "text_sha256": corpora.digest(text), "skip": args.skip, **report
    }  # fmt: skip


def report_of(
    stream: Stream, budgets: dict[str, Budget], positions: int, daemon_binary: Path, flags: Sequence[str]
) -> tuple[dict[str, Any], list[Call]]:
    """Ask a fresh daemon, with further `flags`, and sum up. Returns the report and its calls."""
    with tempfile.TemporaryDirectory(prefix="kvtier-calibrate-") as folder:
        daemon = Daemon(daemon_binary, Path(folder) / "data", [*sparse_above(0), "--audit", "1", *flags])
        with daemon, daemon.session() as session:
            calls, ratios, answers = run(session, stream, budgets, positions, "calibrate")
    report = {
        "prefix": stream.prefix,
        "rows": [dataclasses.asdict(row) for row in summarise(calls, stream.layers)],
        "targets": _targets(answers, budgets),
        "errors": {  # against unquantised rows
            label: float(np.mean([answer.error for answer in answers if answer.budget == label])) for label in budgets
        },
        "priors": {k: np.quantile(v, (np.arange(20) + 0.5) / 20).round(3).tolist() for k, v in ratios.items() if v},
    }
    return report, calls


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        report = _measure(args)
    except (corpora.CorpusError, DaemonError, KvtierError, ModelNotFoundError, OSError, ValueError) as error:
        print(f"kvbench calibrate: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{report['model']}, {report['text']}, {report['prefix']} tokens sealed")
    _print(Row(**row) for row in report["rows"])
    for t in report["targets"]:
        kept = "" if t["kept"] is None else f"; of the others {t['kept']:.3f} kept it ({t['low']:.3f}-{t['high']:.3f})"
        print(f"  target {t['target']:g}, codec included: {t['missed']} of {t['answers']} answers said that they "
              f"missed it{kept}; read {t['share_read']:.3f}")  # fmt: skip
    if args.priors:
        for budget, quantiles in report["priors"].items():
            print(f"  true over raw, {budget}: {', '.join(map(str, quantiles))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
