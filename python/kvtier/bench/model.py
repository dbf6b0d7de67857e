"""Teacher-force a real model with every layer sparse, and compare it with exact attention.

A text is read densely, once. Its continuation is then fed token by token to forks of that context:
one attends exactly over unquantised K/V (the truth), the others through the daemon at several
budgets and profiles, or through comparators at the bytes that the daemon transferred in the same
layer and step. Every stream keeps the K/V it computes itself, so errors feed on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtier.bench import corpora, rig, stats
from kvtier.bench.comparators import COMPARATORS
from kvtier.bench.progress import Progress
from kvtier.bench.streams import ComparatorStream, DaemonStream, ExactStream, Stream, feed, prefill, read_sealed
from kvtier.daemon import Daemon, DaemonError, find_daemon, sparse_above
from kvtier.dense import KVRows
from kvtier.errors import KvtierError
from kvtier.gguf_model import Model
from kvtier.models import find_model
from kvtier.session import Session
from kvtier.tokenizer import Tokenizer
from kvtier.types import Budget, Profile

__all__ = ["MethodResult", "Scores", "main", "measure"]

F32 = NDArray[np.float32]

_TOKENS = {"smollm2": 6144, "gemma3": 16384}
_FAMILIES = ("shares", "profiles", "comparators")
# The first tokens of a sequence, which the daemon keeps unquantised (docs/format.md, section 7).
_SINKS = 16


@dataclasses.dataclass(slots=True)
class MethodResult:
    """One method's figures over all positions. Divergences in nats; the error is relative.

    Attributes:
        method, share: what was measured; the share of the body's 4-bit bytes it was given, if any.
        transferred: share of those bytes that it moved, over all layers and positions.
        loss_change: its next-token loss less the exact one's.
        kl_interval, top1_interval: 95 %, by bootstrap and by Wilson.
        stated, stated_p95: the error the daemon stated with its answers, selection and codec together.
        kl: every position's divergence, for intervals and pairs.
    """

    method: str
    share: float | None
    transferred: float
    loss: float
    loss_change: float
    kl_mean: float
    kl_interval: tuple[float, float]
    kl_p50: float
    kl_p99: float
    kl_max: float
    top1: float
    top1_interval: tuple[float, float]
    stated: float | None
    stated_p95: float | None
    kl: list[float]


class Scores:
    """KL, loss and agreement of several rows of logits against the first, collected by position."""

    def __init__(self) -> None:
        self._kl: list[NDArray[np.float64]] = []
        self._loss: list[NDArray[np.float64]] = []
        self._same: list[NDArray[np.bool_]] = []

    def add(self, logits: F32, target: int) -> None:
        """Logits [streams, vocabulary] of one position, the exact ones first, and what came next."""
        self._kl.append(stats.kl_divergence(np.broadcast_to(logits[0], logits.shape), logits))
        self._loss.append(stats.next_token_loss(logits, np.full(len(logits), target)))
        top = logits.argmax(axis=-1)
        self._same.append(top == top[0])

    def exact_loss(self) -> float:
        """The mean loss of the first row."""
        return float(np.mean([loss[0] for loss in self._loss]))

    def of(self, row: int, method: str, share: float | None, stream: Stream) -> MethodResult:
        """The figures of one row."""
        kl, loss = np.array(self._kl)[:, row], np.array(self._loss)[:, row]
        same = [bool(each[row]) for each in self._same]
        moved, full = np.sum(stream.moved, axis=0) if stream.moved else (0.0, 0.0)
        stated = _stated(stream)
        return MethodResult(
            method=method,
            share=share,
            transferred=float(moved / full) if full else 0.0,
            loss=float(loss.mean()),
            loss_change=float(loss.mean()) - self.exact_loss(),
            kl_mean=float(kl.mean()),
            kl_interval=stats.bootstrap_mean(kl),
            kl_p50=float(np.quantile(kl, 0.5)),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            top1=sum(same) / len(same),
            top1_interval=stats.wilson(sum(same), len(same)),
            stated=float(stated.mean()) if len(stated) else None,
            stated_p95=float(np.quantile(stated, 0.95)) if len(stated) else None,
            kl=[round(float(value), 8) for value in kl],
        )


def _stated(stream: Stream) -> NDArray[np.float64]:
    """The errors that answers stated, one for each call; empty for who states none."""
    accounts = stream.accounts if isinstance(stream, DaemonStream) else []
    return np.array([np.hypot(account.estimated_error, account.codec_error) for account in accounts])


@dataclasses.dataclass(slots=True)
class _Prepared:
    """A text that was read: its exact rows, and for each profile the sequence that holds it."""

    rows: list[KVRows]
    sequences: dict[Profile, str]
    sealed: int


def _prepare(model: Model, session: Session, token_ids: Sequence[int], families: Sequence[str]) -> _Prepared:
    profiles = [Profile.BALANCED]
    if "profiles" in families:
        profiles += [Profile.NEUTRAL, Profile.EXACT]
    sequences = {profile: session.create(model.spec, profile=profile).sequence_id for profile in profiles}
    rows, _ = prefill(model, session, [*sequences.values()], token_ids, Progress("prefill"))
    sealed = {session.flush(sequence, seal=True).sealed for sequence in sequences.values()}
    if len(sealed) != 1 or min(sealed) <= _SINKS:
        raise ValueError(
            f"{len(token_ids)} tokens leave nothing sealed behind the recent window; ask for more --tokens"
        )
    for sequence in sequences.values():
        # In RAM, so that bytes are what a query asks for and not blocks of a disk.
        session.pin(sequence)
    return _Prepared(rows, sequences, sealed.pop())


def _streams(
    model: Model, session: Session, prepared: _Prepared, shares: Sequence[float], families: Sequence[str]
) -> Iterator[tuple[str, float | None, Stream]]:
    """All methods, the exact one first. Comparators come after the daemon's stream they follow."""

    def fork(profile: Profile, budget: Budget) -> DaemonStream:
        return DaemonStream(session, session.fork(prepared.sequences[profile]).sequence_id, budget)

    like: dict[float, DaemonStream] = {}
    # Copied before the exact stream extends them.
    rows = [row.copy() for row in prepared.rows]
    yield "exact", None, ExactStream(model, prepared.rows)
    if "profiles" in families:
        yield "kvtier, profile exact", None, fork(Profile.EXACT, Budget.exact())
        yield "kvtier, profile neutral", None, fork(Profile.NEUTRAL, Budget.exact())
        yield "kvtier, everything at 4 bits", None, fork(Profile.BALANCED, Budget.exact())
    if "shares" in families:
        for share in shares:
            like[share] = fork(Profile.BALANCED, Budget.share(share))
            yield "kvtier", share, like[share]
    if "comparators" in families:
        sealed = read_sealed(session, prepared.sequences[Profile.BALANCED], model, _SINKS, prepared.sealed)
        for share in shares:
            for name, comparator in COMPARATORS.items():
                yield name, share, ComparatorStream(model, rows, sealed, comparator, share, like.get(share))


def measure(
    model: Model,
    session: Session,
    token_ids: Sequence[int],
    positions: int,
    shares: Sequence[float],
    families: Sequence[str] = _FAMILIES,
) -> dict[str, Any]:
    """Prefill all of `token_ids` but the last positions + 1, feed the rest, and compare.

    Args:
        token_ids: the text; the last one is only a target.
        positions: how many tokens are fed one by one.
        shares: budgets of the body's 4-bit bytes, each in (0, 1].
        families: of "shares", "profiles" and "comparators", what to measure.

    Returns:
        ``tokens``, ``sealed``, ``positions``, ``layers`` that are sparse, ``exact_loss`` and
        ``methods``, a list of MethodResult.

    Raises ValueError if the text is so short that nothing is sealed, or if what was sealed changed
    on the way, so that methods would have had different exact zones.
    """
    count = len(token_ids) - positions - 1
    if positions < 1 or count < 1:
        raise ValueError(f"{len(token_ids)} tokens are too few for {positions} positions behind a text")
    prepared = _prepare(model, session, token_ids[:count], families)
    methods = [*_streams(model, session, prepared, shares, families)]
    scores, progress = Scores(), Progress("positions")
    streams = [stream for _, _, stream in methods]
    for i in range(positions):
        at = count + i
        scores.add(feed(model, streams, token_ids[at], at), token_ids[at + 1])
        progress(i + 1, positions)
    if any(stream.sealed != prepared.sealed for stream in streams if isinstance(stream, DaemonStream)):
        raise ValueError("more tokens were sealed on the way; ask for fewer --positions")
    return {
        "tokens": count,
        "sealed": prepared.sealed,
        "positions": positions,
        "layers": sum(1 for window in model.config.windows if not window),
        "exact_loss": scores.exact_loss(),
        "methods": [scores.of(i, *method) for i, method in enumerate(methods) if i],
    }


def show(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    lines = [
        f"{report['model']}, {report['text']}",
        f"{report['tokens']} tokens read, {report['sealed']} sealed; {report['positions']} positions teacher-forced, "
        f"{report['layers']} layers sparse; loss of exact attention {report['exact_loss']:.4f}",
        "",
        f"{'method':<28} {'asked':>5} {'moved':>6} {'loss':>8} {'KL mean':>8} {'95 % interval':>15} "
        f"{'p50':>8} {'p99':>7} {'max':>7} {'top-1':>5} {'stated':>6}",
    ]
    for r in report["methods"]:
        asked = "" if r.share is None else f"{r.share:.2f}"
        stated = "" if r.stated is None else f"{r.stated:.4f}"
        interval = f"{r.kl_interval[0]:.5f} {r.kl_interval[1]:.5f}"
        lines.append(
            f"{r.method:<28} {asked:>5} {r.transferred:>6.3f} {r.loss_change:>+8.4f} {r.kl_mean:>8.5f} {interval:>15} "
            f"{r.kl_p50:>8.5f} {r.kl_p99:>7.4f} {r.kl_max:>7.4f} {r.top1:>5.3f} {stated:>6}"
        )
    return "\n".join([*lines, "", *_LEGEND])


_LEGEND = (
    "asked, moved: share of the sealed body's 4-bit bytes, the exact zone apart. loss: change against exact attention.",
    "KL: from exact attention over unquantised K/V, nats. stated: relative error of a layer, mean of what answers say.",
    "Comparators may move what kvtier moved in the same layer and step, and read the same codes. quest's index is",
    "2 bytes a channel for each block of 16, block-means' 1, quest-free's and the oracle's nothing. One whose index",
    "alone exceeds its bytes reads only the exact zone.",
)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kvbench model", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3 or a GGUF file (default: smollm2)")
    parser.add_argument("--tokens", type=int, help="tokens read densely first (default: 6144, gemma3 16384)")
    parser.add_argument("--positions", type=int, default=256, help="tokens then fed one by one (default: 256)")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text to leave out first")
    corpora.add_arguments(parser)
    parser.add_argument("--shares", default=".1,.2,.3", help="shares of the body's 4-bit bytes (default: .1,.2,.3)")
    rig.add_by_page(parser)
    parser.add_argument("--methods", default=",".join(_FAMILIES),
                        help="what to measure, of shares, profiles, comparators (default: all)")  # fmt: skip
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE beside the table, or instead of it"
    )
    parser.add_argument("--daemon", help="the kvtierd binary (default: $KVTIERD, or bin/kvtierd)")
    parser.add_argument("--daemon-flag", action="append", default=[], help="a further flag for it; may be repeated")
    args = parser.parse_args(argv)
    args.tokens = args.tokens or _TOKENS.get(args.model, 6144)
    args.families = args.methods.split(",")
    try:
        args.share_list = [float(share) for share in args.shares.split(",")]
    except ValueError:
        parser.error(f"--shares {args.shares}: give numbers, as .1,.2")
    if not all(0 < share <= 1 for share in args.share_list):
        parser.error("--shares must be above 0 and at most 1")
    if not set(args.families) <= set(_FAMILIES):
        parser.error(f"--methods {args.methods}: give some of {', '.join(_FAMILIES)}")
    if args.positions < 1 or args.tokens < 1 or args.skip < 0:
        parser.error("--positions and --tokens must be at least 1, --skip at least 0")
    return args


@contextlib.contextmanager
def _own_daemon(args: argparse.Namespace) -> Iterator[Session]:
    """A session with a daemon of our own, on a folder that is removed afterwards."""
    # Nothing is read whole for being short, and no audits take time from the queries.
    flags = [*sparse_above(0, by_page=args.by_page), "--audit", "0", "--ram", "4GiB", "--log-level", "warn"]
    flags += args.daemon_flag
    binary = find_daemon(args.daemon)
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        with Daemon(binary, data, flags) as daemon, daemon.session(holder="kvbench model", timeout=600.0) as session:
            yield session


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure as the parsed arguments say. Returns the report."""
    path = find_model(args.model)
    text, what = corpora.source(args)
    ids = corpora.token_ids(Tokenizer.from_gguf(path), text, args.tokens + args.positions + 1, args.skip)
    model = Model.load(path)
    if len(ids) > model.config.context > 0:
        raise ValueError(f"{len(ids)} tokens: the model's context is {model.config.context}; ask for fewer --tokens")
    about = {"model": model.config.name, "text": what, "text_sha256": corpora.digest(text), "skip": args.skip}
    with _own_daemon(args) as session:
        return about | measure(model, session, ids, args.positions, args.share_list, args.families)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 (it could not run), 130 (interrupted)."""
    args = _arguments(argv)
    # So that being terminated stops the daemon as Ctrl-C does.
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        report = run(args)
        if args.json != "-":
            print(show(report))
        if args.json:
            content = report | {"methods": [dataclasses.asdict(result) for result in report["methods"]]}
            encoded = json.dumps(content, indent=1) + "\n"
            if args.json == "-":
                sys.stdout.write(encoded)
            else:
                Path(args.json).write_text(encoded)
    except KeyboardInterrupt:
        print("\nInterrupted; everything that was started has been stopped.", file=sys.stderr)
        return 130
    except (KvtierError, DaemonError, OSError, ValueError) as error:
        print(f"kvbench model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
