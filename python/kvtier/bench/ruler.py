"""``kvbench ruler``: RULER's 13 tasks on a real model, and what sparse attention retains of them.

The model reads a text with dense attention. Then, from the first token of the question on, it is
attended in three ways, each on forks of that one context: densely; from everything that the daemon
stores in the profile balanced (mode exact); and sparsely, one token a step, at each share. A sparse
answer is judged by whether it is right where the others are. ``kvtier.bench.tasks`` says where the
tasks differ from RULER's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtier.bench import rig as rigs
from kvtier.bench.check_short import Closeness, check
from kvtier.bench.comparison import Comparison, compare, joined, work
from kvtier.bench.questions import Haystack
from kvtier.bench.rig import Progress, Rig
from kvtier.bench.scoring import Kept, Outcome, kept_references, kept_samples
from kvtier.bench.tasks import TASKS, make
from kvtier.daemon import DaemonError, sparse_above
from kvtier.errors import KvtierError

__all__ = ["Summary", "main", "summarise"]

# Quick, and a small model can do them.
_DEFAULT_TASKS = ("niah_single_1", "niah_multikey_2", "vt", "qa_one_hop")
_FIGURE_KL = 1e-4


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """One task at one length and share.

    Attributes:
        facts: different references among the samples; fewer than samples where wordings repeat.
        dense_score, full_score, score: mean RULER scores, 0 to 1.
        kept_of_dense, kept_of_full: retention, of samples that dense attention or the full read
            get wholly right.
        references_of_dense, references_of_full: the same of single references.
        kl_mean, kl_max: KL of the first answer token from dense, nats, over all samples.
        full_kl_mean, full_kl_max: the same of the full read.
        read: transferred bytes as a share of the sealed ones.
    """

    task: str
    length: int
    tokens: int
    sealed: int
    share: float
    samples: int
    facts: int
    dense_score: float
    full_score: float
    score: float
    kept_of_dense: Kept
    kept_of_full: Kept
    references_of_dense: Kept
    references_of_full: Kept
    kl_mean: float
    kl_max: float
    full_kl_mean: float
    full_kl_max: float
    read: float


def summarise(task: str, length: int, facts: int, found: Comparison) -> list[Summary]:
    """One summary for each share."""

    def mean(outcomes: Sequence[Outcome]) -> float:
        return sum(outcome.score for outcome in outcomes) / len(outcomes)

    full_kl = [outcome.kl for outcome in found.full]
    summaries = []
    for share, sparse in found.sparse.items():
        kl = [outcome.kl for outcome in sparse]
        summaries.append(
            Summary(
                task, length, found.tokens, found.sealed, share, len(sparse), facts,
                mean(found.dense), mean(found.full), mean(sparse),
                kept_samples(found.dense, sparse), kept_samples(found.full, sparse),
                kept_references(found.dense, sparse), kept_references(found.full, sparse),
                sum(kl) / len(kl), max(kl), sum(full_kl) / len(full_kl), max(full_kl), found.read[share],
            )
        )  # fmt: skip
    return summaries


def _samples(task: str, length: int, hay: Haystack, found: Comparison) -> list[dict[str, Any]]:
    """Every question with all its answers, for the JSON."""
    rows = []
    for index, question in enumerate(hay.questions):
        rows.append(
            {
                "task": task,
                "length": length,
                "question": question.text.strip(),
                "references": question.answers,
                "depth": hay.depth(question),
                "dense": dataclasses.asdict(found.dense[index]),
                "full": dataclasses.asdict(found.full[index]),
                "sparse": {f"{share:g}": dataclasses.asdict(o[index]) for share, o in found.sparse.items()},
            }
        )
    return rows


def table(summaries: Sequence[Summary]) -> str:
    """Summaries as lines for people."""
    head = (
        f"{'task':16} {'length':>6} {'share':>5} {'read':>5} {'n':>3}  {'dense':>5} {'full':>5} {'sparse':>6}  "
        f"{'kept of dense [95 %]':22} {'kept of full [95 %]':22} {'KL mean':>8} {'max':>7}  {'full KL':>8} {'max':>7}"
    )
    lines = [head]
    for s in summaries:
        lines.append(
            f"{s.task:16} {s.length:6} {s.share:5.2f} {s.read:5.2f} {s.samples:3}  {s.dense_score:5.2f} "
            f"{s.full_score:5.2f} {s.score:6.2f}  {s.kept_of_dense!s:22} {s.kept_of_full!s:22} "
            f"{s.kl_mean:8.4f} {s.kl_max:7.4f}  {s.full_kl_mean:8.4f} {s.full_kl_max:7.4f}"
        )
    for share in dict.fromkeys(s.share for s in summaries):
        rows = [s for s in summaries if s.share == share]
        for title, pick in (("dense", "kept_of_dense"), ("full", "kept_of_full"),
                            ("dense, by reference", "references_of_dense"),
                            ("full, by reference", "references_of_full")):  # fmt: skip
            lines.append(f"share {share:g}, all tasks, kept of {title}: {_together([getattr(s, pick) for s in rows])}")
    hopeless = [f"{s.task} ({s.length})" for s in summaries if not s.kept_of_dense.of and s.share == summaries[0].share]
    if hopeless:
        lines += textwrap.wrap(
            f"no sample was right under dense attention, so only KL says anything: {', '.join(hopeless)}", 110
        )
    return "\n".join(lines)


def _together(parts: Sequence[Kept]) -> Kept:
    pairs = [(True, True)] * sum(p.kept for p in parts) + [(True, False)] * sum(p.of - p.kept for p in parts)
    return Kept.counted(pairs)


def check_table(results: Sequence[Closeness]) -> str:
    """Closeness as lines for people, with the worst of each profile last."""
    lines = [
        f"{'task':16} {'length':>6} {'sealed':>6} {'profile':8} {'n':>5} {'KL mean':>9} {'largest':>9} {'first':>9} "
        f"{'logits':>9}  whole"
    ]
    for r in results:
        lines.append(
            f"{r.task:16} {r.length:6} {r.sealed:6} {r.profile:8} {r.positions:5} {r.kl_mean:9.2e} {r.kl_all:9.2e} {r.kl_first:9.2e} "
            f"{r.logit:9.2e}  {'yes' if r.whole else 'NO'}"
        )
    for profile in dict.fromkeys(r.profile for r in results):
        of = [r for r in results if r.profile == profile]
        worst, largest = max(r.kl_mean for r in of), max(r.kl_all for r in of)
        said = f"{'within' if worst <= _FIGURE_KL else 'NOT within'} {_FIGURE_KL:g}"
        lines.append(f"{profile}: mean KL of any task at most {worst:.2e}, {said}; of any answer token {largest:.2e}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure. Returns what ``--json`` writes."""
    jobs = [(task, length) for length in args.lengths for task in args.tasks]
    # read-all would answer short contexts from everything; an audit would only cost time.
    flags = [] if args.check_short else [*sparse_above(256, by_page=args.by_page), "--audit", "0"]
    report: dict[str, Any] = {key: getattr(args, key) for key in ("seed", "questions", "facts", "texts", "check_short")}
    with rigs.start(args, flags, args.lengths) as rig:
        report |= {"model": rig.name, "chat": rig.chat, "tasks": [], "samples": []}
        hays = {
            (task, length): [
                make(task, length - rig.overhead, args.questions, args.facts, args.seed * 1000 + text, rig.count)
                for text in range(args.texts)
            ]
            for task, length in jobs
        }
        if args.check_short:
            _run_check(rig, hays, report)
        else:
            _run_tasks(rig, hays, args, report)
    return report


# The texts of each (task, length).
Hays = dict[tuple[str, int], list[Haystack]]


def _run_check(rig: Rig, hays: Hays, report: dict[str, Any]) -> None:
    progress = Progress(sum(length * len(texts) for (_, length), texts in hays.items()))
    for (task, length), texts in hays.items():
        for hay in texts:
            with progress.stage(f"{task} {length}", length):
                report["tasks"] += check(rig, hay, task, length, TASKS[task].answer_tokens)
    progress.close()


def _run_tasks(rig: Rig, hays: Hays, args: argparse.Namespace, report: dict[str, Any]) -> None:
    progress = Progress(sum(work(n, args.questions, args.shares) * len(texts) for (_, n), texts in hays.items()))
    for (task, length), texts in hays.items():
        kind, parts = TASKS[task], []
        for hay in texts:
            parts.append(
                compare(rig, hay, args.shares, kind.match_all, kind.answer_tokens, progress, f"{task} {length}")
            )
            report["samples"] += _samples(task, length, hay, parts[-1])
        report["tasks"] += summarise(task, length, sum(hay.facts for hay in texts), joined(parts))
        # What a long run has found so far survives its interruption.
        if args.json not in (None, "-"):
            _write_json(args.json, report)
    progress.close()


def _write_json(target: str, report: dict[str, Any]) -> None:
    plain = {**report, "tasks": [dataclasses.asdict(item) for item in report["tasks"]]}
    text = json.dumps(rigs.without_nan(plain), indent=1, ensure_ascii=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, "utf-8")


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {task.name:16} {task.about}" for task in TASKS.values())
    parser = argparse.ArgumentParser(
        prog="kvbench ruler",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="RULER's tasks on a real model: what sparse attention retains of dense answers.\n\n"
        f"tasks:\n{listing}",
        epilog="Generators are kvtier's own, with RULER's parameters; one text is asked many questions, so it\n"
        "may hold more needles than RULER's. The QA tasks ask about made-up documents: RULER's data sets are\n"
        "not used. A length is that of the text; question and answer come on top.",
    )
    rigs.add_arguments(parser)
    parser.add_argument("--tasks", default=",".join(_DEFAULT_TASKS), metavar="T,T",
                        help=f"tasks, or all (default: {','.join(_DEFAULT_TASKS)})")  # fmt: skip
    parser.add_argument("--lengths", type=rigs.integers, default=(2048,), metavar="N,N",
                        help="tokens of the texts, as 2048 or 2k (default: 2048)")  # fmt: skip
    parser.add_argument("--questions", type=int, default=20, help="questions for each text, 1 to 24 (default: 20)")
    parser.add_argument("--facts", type=int, default=4,
                        help="needles or chains asked about, where the task leaves it open (default: 4)")  # fmt: skip
    parser.add_argument("--texts", type=int, default=1, help="texts for each task and length (default: 1)")
    parser.add_argument("--check-short", action="store_true",
                        help="instead: at the daemon's default settings, where short contexts are read whole, how near "
                        "are the profiles exact and neutral to dense?")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    args.tasks = list(TASKS) if args.tasks == "all" else args.tasks.split(",")
    if unknown := [task for task in args.tasks if task not in TASKS]:
        parser.error(f"unknown task {unknown[0]}; there are {', '.join(TASKS)}")
    if not 1 <= args.questions <= 24:
        parser.error(f"--questions {args.questions}: give 1 to 24")
    if args.facts < 1 or args.texts < 1:
        parser.error("--facts and --texts: give 1 or more")
    try:
        report = run(args)
    except (ValueError, OSError, DaemonError, KvtierError) as error:
        print(f"kvbench ruler: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        _write_json(args.json, report)
    if args.json != "-":
        print(f"{report['model']}, {args.texts} x {args.questions} questions a task, seed {args.seed}")
        print((check_table if args.check_short else table)(report["tasks"]))
    # A figure that is missed is a negative finding; of retention none is demanded here.
    return int(args.check_short and not all(r.kl_mean <= _FIGURE_KL for r in report["tasks"]))


if __name__ == "__main__":
    sys.exit(main())
