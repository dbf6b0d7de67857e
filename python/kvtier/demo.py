"""The whole life of a context, on a real model: read once, asked sparsely, killed, asked again.

The demo starts a daemon of its own, prefills a text of several thousand tokens with a fact hidden
in it, asks for the fact with sparse and with exact attention, kills the daemon (SIGKILL), starts
it anew, and asks once more without reading the text again. It ends with a report and exits with a
status other than 0 if an answer lacks the fact or what was measured is out of bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtier.client import Client
from kvtier.daemon import Daemon, DaemonError, find_daemon, sparse_above
from kvtier.errors import KvtierError
from kvtier.gguf_model import Model
from kvtier.models import find_model
from kvtier.tokenizer import Tokenizer
from kvtier.types import Account, Budget, Span, SpanKind
from kvtier.worker import Context, Worker

__all__ = ["Report", "main"]

F32 = NDArray[np.float32]

SECRET = "violet-otter-7291"
FACT = f"\n\nThe secret passphrase of the harbor master is {SECRET}.\n\n"
SYSTEM = "You are a helpful assistant. Answer questions about the text you are given."
OPENING = "Here is a text.\n\n"
QUESTION = "\n\nWhat is the secret passphrase of the harbor master? Answer with the passphrase only."
# The answer's first words are given: a model of 135M parameters otherwise sometimes begins to
# talk about the text instead. The passphrase itself has to come from the context.
LEAD = "The secret passphrase of the harbor master is"
# Behind the sinks and within the first segment of 2,048 tokens, so that it is sealed.
FACT_AT = 1500
ANSWER_TOKENS = 24
SUFFIXES = {".go", ".md", ".proto", ".py"}
SKIPPED = {".git", ".cache", ".venv", "v1", "testdata", "node_modules", "build"}

MAX_KL = 0.1
MIN_NVME_SHARE = 0.5


@dataclasses.dataclass(slots=True)
class Answer:
    """One way of asking.

    Attributes:
        text: the answer without its given first words.
        first_token_seconds: from the question to the answer's first token.
        account: the sum over all layers of the question and of every step.
        steps: decode steps among them.
        step_account: the sum over the decode steps alone.
        step_seconds: mean time of a decode step.
    """

    text: str
    ids: list[int]
    logits: F32
    first_token_seconds: float
    account: Account
    steps: int
    step_account: Account
    step_seconds: float


@dataclasses.dataclass(slots=True)
class Report:
    """What the demo measured; ``--report`` writes it as JSON."""

    model: str
    tokens: int
    tokens_sealed: int
    fact: str
    answer_sparse: str
    answer_exact: str
    answer_after_kill: str
    answers_equal_after_kill: bool
    top1_agreement: float
    kl_mean: float
    kl_max: float
    prefill_seconds: float
    first_token_cold_seconds: float
    first_token_warm_seconds: float
    first_token_after_kill_seconds: float
    restart_seconds: float
    step_seconds_sparse: float
    step_seconds_exact: float
    share_read_per_step: float
    bytes_per_step_ram: float
    bytes_per_step_nvme: float
    bytes_per_step_full: float
    nvme_share_of_sealed_bytes: float
    tokens_estimated_per_step: float
    estimated_error: float
    bits_per_value: float
    bits_per_value_bf16: float
    daemon_rss_bytes: int
    failures: list[str]


def build_text(folder: Path) -> str:
    """The sources and documents under `folder`, in a fixed order, as one text."""
    parts = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        generated = path.name.endswith(".pb.go")
        if path.suffix not in SUFFIXES or generated or SKIPPED & set(inside.parts) or not path.is_file():
            continue
        # The demo's own source holds the fact, which must be in the context only once.
        text = path.read_text("utf-8", "replace")
        if SECRET not in text:
            parts.append(f"// {inside}\n{text}")
    return "\n\n".join(parts)


def build_context(tokenizer: Tokenizer, folder: Path, count: int) -> tuple[list[int], list[Span]]:
    """About `count` token ids of a conversation's beginning with the fact in it, and their labels."""
    opening = tokenizer.chat([("system", SYSTEM), ("user", OPENING)], open_end=True)
    fact = tokenizer.encode(FACT, add_bos=False)
    room = count - len(opening) - len(fact)
    # Some four characters a token; twice that is surely enough to be cut.
    text = tokenizer.encode(build_text(folder)[: 8 * room + 100_000], add_bos=False)[:room]
    if len(text) < room:
        raise ValueError(f"{folder} holds only {len(text)} tokens of text, not {room}; choose another --text-dir")
    begin = len(opening) + FACT_AT
    ids = opening + text[:FACT_AT] + fact + text[FACT_AT:]
    spans = [
        Span(0, len(opening), "opening", SpanKind.TEXT),
        Span(len(opening), begin, "text, first part", SpanKind.FILE),
        Span(begin, begin + len(fact), "the fact", SpanKind.TEXT),
        Span(begin + len(fact), len(ids), "text, second part", SpanKind.FILE),
    ]
    return ids, spans


def ask(context: Context, tokenizer: Tokenizer, budget: Budget) -> Answer:
    """Ask for the fact at the end of a context, which is changed by it."""
    question = tokenizer.chat_continue(QUESTION) + tokenizer.encode(LEAD, add_bos=False)
    begin = time.perf_counter()
    logits = context.extend(question, budget)
    first = time.perf_counter() - begin
    asked = context.accounts
    begin = time.perf_counter()
    generation = context.generate(logits, ANSWER_TOKENS, budget, tokenizer.stop_ids)
    took = time.perf_counter() - begin
    steps = len(generation.ids)
    return Answer(
        text=tokenizer.decode(generation.ids).strip(),
        ids=generation.ids,
        logits=generation.logits,
        first_token_seconds=first,
        account=Account.total([*asked, *context.accounts]),
        steps=steps,
        step_account=Account.total(context.accounts),
        step_seconds=took / max(1, steps),
    )


def score_answer(context: Context, tokenizer: Tokenizer, ids: list[int], budget: Budget) -> F32:
    """Logits at an answer's positions when its tokens are forced: [len(ids) + 1, vocabulary]."""
    question = tokenizer.chat_continue(QUESTION) + tokenizer.encode(LEAD, add_bos=False)
    first = context.extend(question, budget)
    return np.concatenate([first[None], context.score(ids, budget)])


def divergence(exact: F32, other: F32) -> tuple[F32, float]:
    """KL(exact || other) in nats for each row, and the share of rows with the same top token."""

    def log_softmax(logits: F32) -> NDArray[np.float64]:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    p, q = log_softmax(exact), log_softmax(other)
    kl = (np.exp(p) * (p - q)).sum(-1)
    return kl.astype(np.float32), float((p.argmax(-1) == q.argmax(-1)).mean())


class _Progress:
    """A bar on a terminal, a line for every tenth elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._begin = time.perf_counter()
        self._tenth = -1

    def __call__(self, done: int, total: int) -> None:
        rate = done / (time.perf_counter() - self._begin)
        if sys.stdout.isatty():
            filled = 32 * done // total
            bar = "#" * filled + "." * (32 - filled)
            print(f"\r  {self._title} [{bar}] {done}/{total}, {rate:.0f} tokens/s ", end="", flush=True)
            if done == total:
                print()
        elif (tenth := 10 * done // total) != self._tenth:
            self._tenth = tenth
            print(f"  {self._title} {done}/{total}, {rate:.0f} tokens/s", flush=True)


def run(args: argparse.Namespace) -> Report:
    """The demo proper. Everything it starts has ended when it returns or raises."""
    binary = find_daemon(args.daemon)
    path = find_model(args.model)
    print(f"Loading {path.name}", flush=True)
    model, tokenizer = Model.load(path), Tokenizer.from_gguf(path)
    ids, spans = build_context(tokenizer, args.text_dir, args.tokens)
    sparse, exact = Budget.share(args.share), Budget.exact()
    flags = ["--ram", args.ram, *sparse_above(1024), "--log-level", "warn", *args.daemon_flag]
    with tempfile.TemporaryDirectory(prefix="kvtier-demo-") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        daemon = Daemon(binary, data, flags)
        with daemon:
            print(f"Started {binary.name} with {args.ram} of RAM for sealed tokens", flush=True)
            with daemon.session(holder="kvtier demo") as session:
                worker = Worker(model, session, tokenizer)
                context = worker.create(name="demo")
                begin = time.perf_counter()
                context.prefill(ids, spans=spans, progress=_Progress("prefill"))
                prefill = time.perf_counter() - begin
                sealed = context.flush(seal=True).sealed
                print(f"  {len(ids)} tokens in {prefill:.1f} s, {sealed} of them sealed", flush=True)

                print("Asking with sparse attention, then exactly, of forks of the same context", flush=True)
                with context.fork(name="demo, sparse") as fork:
                    warm = ask(fork, tokenizer, sparse)
                with context.fork(name="demo, exact") as fork:
                    dense = ask(fork, tokenizer, exact)
                with context.fork(name="demo, forced") as fork:
                    forced = score_answer(fork, tokenizer, dense.ids, sparse)
                kl, same = divergence(dense.logits, forced)
                print(f"  sparse: {warm.text}\n  exact:  {dense.text}", flush=True)
                rss = session.client.status().rss_bytes
                bits = _bits_per_value(session.client, context.sequence_id)

                print("Killing the daemon (SIGKILL), starting it anew, asking without prefill", flush=True)
                daemon.kill()
            begin = time.perf_counter()
            daemon.start()
            restart = time.perf_counter() - begin
            with daemon.session(holder="kvtier demo") as session:
                again, missing = _ask_again(Worker(model, session, tokenizer), context, tokenizer, sparse, len(ids))
            print(f"  sparse: {again.text}", flush=True)
    steps = max(1, warm.steps)
    sealed_bytes = warm.account.bytes_sealed
    nvme = warm.account.bytes_nvme / sealed_bytes if sealed_bytes else 0.0
    report = Report(
        model=model.config.name,
        tokens=len(ids),
        tokens_sealed=sealed,
        fact=SECRET,
        answer_sparse=warm.text,
        answer_exact=dense.text,
        answer_after_kill=again.text,
        answers_equal_after_kill=again.ids == warm.ids,
        top1_agreement=same,
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        prefill_seconds=prefill,
        first_token_cold_seconds=prefill + warm.first_token_seconds,
        first_token_warm_seconds=warm.first_token_seconds,
        first_token_after_kill_seconds=again.first_token_seconds,
        restart_seconds=restart,
        step_seconds_sparse=warm.step_seconds,
        step_seconds_exact=dense.step_seconds,
        share_read_per_step=warm.step_account.share_read,
        bytes_per_step_ram=warm.step_account.bytes_ram / steps,
        bytes_per_step_nvme=warm.step_account.bytes_nvme / steps,
        bytes_per_step_full=warm.step_account.bytes_full / steps,
        nvme_share_of_sealed_bytes=nvme,
        tokens_estimated_per_step=warm.step_account.tokens_estimated / steps,
        estimated_error=warm.step_account.estimated_error,
        bits_per_value=bits,
        bits_per_value_bf16=16.0,
        daemon_rss_bytes=rss,
        failures=[*missing],
    )
    report.failures += _failures(report)
    return report


def _ask_again(
    worker: Worker, before: Context, tokenizer: Tokenizer, budget: Budget, tokens: int
) -> tuple[Answer, list[str]]:
    """The question to the stored context after a restart, and what was lost of it."""
    context = worker.open(before.sequence_id)
    missing = []
    if context.length != tokens:
        missing.append(f"{context.length} of {tokens} tokens are there after the restart")
    with context.fork(name="demo, after kill") as fork:
        return ask(fork, tokenizer, budget), missing


def _bits_per_value(client: Client, sequence_id: str) -> float:
    """Bits a sealed value takes, all sealed spans together, everything counted."""
    spans = client.describe(sequence_id).sealed
    tokens = sum(span.tokens for span in spans)
    return sum(span.bits_per_value * span.tokens for span in spans) / tokens if tokens else 0.0


def _failures(report: Report) -> list[str]:
    failures = []
    for title, text in (
        ("sparse", report.answer_sparse),
        ("exact", report.answer_exact),
        ("sparse, after the kill", report.answer_after_kill),
    ):
        if SECRET not in text:
            failures.append(f"the {title} answer lacks the fact: {text!r}")
    if not report.answers_equal_after_kill:
        failures.append("the answer after the kill differs from the one before")
    if report.tokens_sealed <= FACT_AT + 200:
        failures.append(f"only {report.tokens_sealed} tokens are sealed; the fact is not among them")
    if report.nvme_share_of_sealed_bytes < MIN_NVME_SHARE:
        failures.append(f"only {report.nvme_share_of_sealed_bytes:.0%} of the sealed bytes came from NVMe")
    if not report.kl_mean <= MAX_KL:
        failures.append(f"KL to exact attention is {report.kl_mean:.4f}, more than {MAX_KL}")
    return failures


def show(report: Report) -> None:
    """Print a report for people."""
    mib = 1 << 20
    lines: list[tuple[str, str]] = [
        ("context", f"{report.tokens} tokens, {report.tokens_sealed} sealed"),
        ("answer, sparse", report.answer_sparse),
        ("answer, exact", report.answer_exact),
        (
            "answer after kill -9",
            report.answer_after_kill + (" (the same)" if report.answers_equal_after_kill else " (NOT the same)"),
        ),
        (
            "agreement with exact",
            f"top-1 {report.top1_agreement:.1%}, KL {report.kl_mean:.4f} mean, {report.kl_max:.4f} max",
        ),
        ("first token, cold", f"{report.first_token_cold_seconds:.2f} s (reading the context)"),
        ("first token, warm", f"{report.first_token_warm_seconds:.2f} s"),
        (
            "first token after kill",
            f"{report.first_token_after_kill_seconds:.2f} s (and {report.restart_seconds:.2f} s to restart)",
        ),
        (
            "decode step",
            f"{report.step_seconds_sparse * 1e3:.0f} ms sparse, {report.step_seconds_exact * 1e3:.0f} ms exact",
        ),
        (
            "read per step",
            f"{report.share_read_per_step:.1%} of {report.bytes_per_step_full / mib:.2f} MiB: "
            f"{report.bytes_per_step_ram / mib:.2f} MiB from RAM, {report.bytes_per_step_nvme / mib:.2f} MiB from NVMe",
        ),
        ("sealed bytes from NVMe", f"{report.nvme_share_of_sealed_bytes:.1%} (question and answer)"),
        ("tokens estimated", f"{report.tokens_estimated_per_step:.0f} per step, over all layers and KV heads"),
        ("estimated error", f"{report.estimated_error:.4f}"),
        ("compression", f"{report.bits_per_value:.2f} bits a value, {report.bits_per_value_bf16:.0f} unsealed"),
        ("daemon's memory", f"{report.daemon_rss_bytes / mib:.0f} MiB resident"),
    ]
    print("\nReport")
    for title, text in lines:
        print(f"  {title:<23} {text}")
    for failure in report.failures:
        print(f"FAILED: {failure}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvtier.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--daemon", help="the kvtierd binary (default: $KVTIERD, or bin/kvtierd)")
    parser.add_argument("--daemon-flag", action="append", default=[], help="a further flag for it; may be repeated")
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3 or a GGUF file (default: smollm2)")
    parser.add_argument("--tokens", type=int, default=6400, help="tokens of context, at least 6000 (default: 6400)")
    # A text that every machine has and that does not change with this repository: what the small
    # model finds in it stays comparable.
    parser.add_argument("--text-dir", type=Path, default=Path(asyncio.__file__).parent,
                        help="folder whose sources are the text (default: Python's own asyncio package)")  # fmt: skip
    parser.add_argument("--ram", default="16MiB", help="the daemon's RAM for sealed tokens (default: 16MiB)")
    parser.add_argument("--share", type=float, default=0.2, help="share of the sealed bytes to read (default: 0.2)")
    parser.add_argument("--report", type=Path, help="write the report as JSON to this file")
    args = parser.parse_args(argv)
    if args.tokens < 6000:
        parser.error("--tokens must be at least 6000")
    if not 0 < args.share <= 1:
        parser.error("--share must be in (0, 1]")
    return args


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 (a bound missed), 2 (it could not run), 130."""
    args = _arguments(argv)
    # So that being terminated cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        report = run(args)
    except KeyboardInterrupt:
        print("\nInterrupted; everything that was started has been stopped.", file=sys.stderr)
        return 130
    except (KvtierError, DaemonError, FileNotFoundError, ValueError) as error:
        print(f"The demo could not run: {error}", file=sys.stderr)
        return 2
    show(report)
    if args.report:
        content: dict[str, Any] = dataclasses.asdict(report)
        args.report.write_text(json.dumps(content, indent=2) + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
