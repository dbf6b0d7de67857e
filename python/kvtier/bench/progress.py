"""Progress of long work on standard error, with an estimate of the time left."""

from __future__ import annotations

import sys
import time

__all__ = ["Progress"]


class Progress:
    """Call it as progress(done, total): one changing line on a terminal, a line a tenth elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._begin = time.monotonic()
        self._tenth = -1

    def __call__(self, done: int, total: int) -> None:
        spent = time.monotonic() - self._begin
        left = spent * (total - done) / done if done else 0.0
        text = f"{self._title} {done}/{total}, {_span(spent)} spent, {_span(left)} left"
        if sys.stderr.isatty():
            print(f"\r{text:<78}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif (tenth := 10 * done // total) != self._tenth:
            self._tenth = tenth
            print(text, file=sys.stderr, flush=True)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
