"""What ``ruler`` and ``needle`` run on: a model, a daemon of its own, prompts, and progress."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvtier.bench.questions import Question
from kvtier.daemon import Daemon, find_daemon
from kvtier.gguf_model import Model
from kvtier.models import find_model
from kvtier.tokenizer import Tokenizer
from kvtier.worker import Worker

__all__ = ["Progress", "Rig", "add_arguments", "floats", "integers", "shares", "start", "without_nan"]

_SYSTEM = "You are a helpful assistant. Answer questions about the text you are given."
# Questions and answers come after a text of the length asked for.
_ROOM = 256
# Least tokens of a text: below it nothing is sealed, and dense and sparse attention are the same.
_LEAST = 512


class Rig:
    """A model with its prompts, and the session through which it asks.

    Attributes:
        worker, tokenizer: the model.
        chat: whether prompts follow the model's chat template.
        overhead: tokens of the prompt in front of the text.
    """

    def __init__(self, worker: Worker, tokenizer: Tokenizer, chat: bool) -> None:
        self.worker = worker
        self.tokenizer = tokenizer
        self.chat = chat
        self.overhead = len(self.prompt(""))
        # A newline ends an answer of one reference; it may part those of several.
        lines = {token for token in range(len(tokenizer)) if b"\n" in tokenizer.token_bytes(token)}
        self._stops = {True: tokenizer.stop_ids | lines, False: tokenizer.stop_ids}

    @property
    def name(self) -> str:
        return self.worker.model.config.name

    def count(self, text: str) -> int:
        """Tokens of a text amid others."""
        return len(self.tokenizer.encode(text, add_bos=False))

    def prompt(self, text: str) -> list[int]:
        """Token ids up to the text's end: what is read densely."""
        if self.chat:
            return self.tokenizer.chat([("system", _SYSTEM), ("user", text)], open_end=True)
        return self.tokenizer.encode(text)

    def question(self, question: Question) -> list[int]:
        """Token ids that follow the text: the question and the answer's given first words."""
        if self.chat:
            return self.tokenizer.chat_continue(question.text) + self.tokenizer.encode(question.lead, add_bos=False)
        return self.tokenizer.encode(f"{question.text} {question.lead}", add_bos=False)

    def limit(self, question: Question, most: int) -> int:
        """Most tokens of an answer: enough for all references with words between them, as RULER's
        128 are for a model that talks on. Answers longer than that cost time and decide nothing.
        """
        return min(most, self.count(", ".join(question.answers)) + 3 * len(question.answers) + 8)

    def stop(self, question: Question) -> frozenset[int]:
        """Tokens that end the answer."""
        return self._stops[len(question.answers) == 1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that ``ruler`` and ``needle`` share."""
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3, or a GGUF file (default: smollm2)")
    parser.add_argument("--chat", choices=("auto", "on", "off"), default="auto",
                        help="prompts in the model's chat template; auto: if the file has one")  # fmt: skip
    parser.add_argument("--shares", type=shares, default=(0.2,), metavar="S,S",
                        help="budgets as shares of the sealed bytes (default: 0.2)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="other texts for every seed (default: 1)")
    add_by_page(parser)
    parser.add_argument("--daemon", metavar="FILE", help="the kvtierd to run (default: $KVTIERD, bin/kvtierd)")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", default=None,
                        help="write figures and answers to FILE; without one, to standard output")  # fmt: skip


def add_by_page(parser: argparse.ArgumentParser) -> None:
    """The flag that says how budgets are answered."""
    parser.add_argument("--by-page", action="store_true",
                        help="answer budgets from whole pages, as a daemon does by itself: up to three times the share "
                        "is read then (default: line by line, the share and no more)")  # fmt: skip


@contextlib.contextmanager
def start(args: argparse.Namespace, flags: Sequence[str], lengths: Sequence[int]) -> Iterator[Rig]:
    """A rig on a daemon of its own in a temporary folder; both end with the context.

    Raises ValueError if a length does not fit the model.
    """
    binary, path = find_daemon(args.daemon), find_model(args.model)
    model, tokenizer = Model.load(path), Tokenizer.from_gguf(path)
    longest = model.config.context - _ROOM if model.config.context else max(lengths)
    for length in lengths:
        if not _LEAST <= length <= longest:
            raise ValueError(f"length {length}: {model.config.name} takes texts of {_LEAST} to {longest} tokens here")
    chat = args.chat == "on" or (args.chat == "auto" and tokenizer.has_chat_template)
    with tempfile.TemporaryDirectory(prefix="kvbench-") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        daemon = Daemon(binary, data, ["--log-level", "warn", *flags])
        # A machine that is busy answers late; that is no failure of what is measured here.
        with daemon, daemon.session(holder="kvbench", timeout=600.0) as session:
            yield Rig(Worker(model, session), tokenizer, chat)


class Progress:
    """Lines on standard error: what is under way, and how long the rest may take.

    Args:
        total: work in all, in any unit; ``stage`` says how much of it a part is.
    """

    def __init__(self, total: float) -> None:
        self._total = total
        self._done = 0.0
        self._begin = time.monotonic()
        self._shown = -math.inf

    @contextlib.contextmanager
    def stage(self, name: str, work: float) -> Iterator[Callable[[int, int], None]]:
        """A part of the work; yields a function of (steps done, steps in all)."""

        def show(done: int, steps: int) -> None:
            now = time.monotonic()
            if now - self._shown < (0.2 if sys.stderr.isatty() else 30.0):
                return
            self._shown = now
            self._show(f"{name} {done}/{steps}", self._done + work * min(1.0, done / max(1, steps)))

        show(0, 1)
        yield show
        self._done += work

    def _show(self, what: str, done: float) -> None:
        spent = time.monotonic() - self._begin
        left = ""
        # Of the very first steps nothing follows.
        if done > 0.01 * self._total:
            left = f", {_minutes(spent * (self._total - done) / done)} left"
        line = f"  {100 * done / self._total:3.0f} %{left}: {what}"
        end, begin = ("", "\r\033[K") if sys.stderr.isatty() else ("\n", "")
        print(begin + line, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def integers(text: str) -> tuple[int, ...]:
    """Numbers parted by commas; k stands for 1,024."""
    try:
        parts = text.lower().replace(" ", "").split(",")
        values = tuple(int(p[:-1]) * 1024 if p.endswith("k") else int(p) for p in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers parted by commas, as 2048 or 2k,4k") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers above 0")
    return values


def floats(text: str) -> tuple[float, ...]:
    """Numbers in [0, 1] parted by commas."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers parted by commas, as 0.2,0.1") from None
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers from 0 to 1")
    return values


def shares(text: str) -> tuple[float, ...]:
    """Numbers in (0, 1] parted by commas."""
    values = floats(text)
    if not all(values):
        raise argparse.ArgumentTypeError(f"{text!r}: a share of 0 reads nothing; give numbers above 0")
    return values


def without_nan(value: Any) -> Any:
    """The same for JSON, which has no NaN: null where nothing could be measured."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
