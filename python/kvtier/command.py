"""What command-line programs on this package share: their daemon, tables, progress, errors."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from kvtier.daemon import Daemon, DaemonError, find_daemon, sparse_above
from kvtier.errors import KvtierError
from kvtier.session import Session

__all__ = ["Progress", "add_daemon_arguments", "clock", "open_session", "run_command", "size", "table"]


def add_daemon_arguments(parser: argparse.ArgumentParser, ram: str) -> None:
    """Add --addr, --data, --ram and --daemon, as ``open_session`` takes them."""
    group = parser.add_argument_group("daemon")
    group.add_argument("--addr", default=os.environ.get("KVTIER_ADDR", ""),
                       help="a running daemon: unix:///path/to/kvtier.sock or HOST:PORT; KVTIER_ADDR sets the "
                       "default (default: start one, and stop it at the end)")  # fmt: skip
    group.add_argument("--data", type=Path,
                       help="folder for the daemon that is started; what it holds is found again by the next run "
                       "(default: a temporary one)")  # fmt: skip
    group.add_argument("--ram", default=ram, help=f"RAM for sealed tokens of that daemon (default: {ram})")
    group.add_argument("--daemon", help="the kvtierd to start (default: $KVTIERD, or bin/kvtierd)")


@contextlib.contextmanager
def open_session(args: argparse.Namespace, holder: str) -> Iterator[Session]:
    """A session with the daemon at ``args.addr``, or with one started for it.

    The one that is started reads contexts above 1,024 tokens sparsely, so that also short examples
    show something. It is stopped at the end, and a temporary folder removed.

    Raises:
        ValueError: the address is none, or both a daemon and a data folder are named.
        DaemonError: the daemon did not start.
    """
    if args.addr:
        if args.data:
            raise ValueError("--data is for a daemon that is started: with --addr (or KVTIER_ADDR) leave it out")
        with Session(_target(args.addr), holder=holder) as session:
            yield session
        return
    binary = find_daemon(args.daemon)
    with contextlib.ExitStack() as stack:
        data = args.data
        if data is None:
            data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-"))) / "data"
        # The daemon's own folder has this mode, too: contexts are private.
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = ["--ram", args.ram, *sparse_above(1024), "--log-level", "warn"]
        daemon = stack.enter_context(Daemon(binary, data.resolve(), flags))
        yield stack.enter_context(daemon.session(holder=holder))


def _target(addr: str) -> str:
    if addr.startswith(("/", ".")):
        return f"unix://{os.path.abspath(addr)}"
    if not addr.startswith("unix:") and not addr.rpartition(":")[2].isdigit():
        raise ValueError(f"{addr!r} is no address: use unix:///path/to/kvtier.sock or HOST:PORT")
    return addr


def run_command(name: str, main: Callable[[], int]) -> int:
    """Run a program's main and turn what ends it into words and an exit status.

    Returns main's status; 2 where it could not run, 130 where it was interrupted.
    """

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # So that being terminated cleans up as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        return main()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; what was started has been stopped", file=sys.stderr)
        return 130
    except (KvtierError, DaemonError, OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


class Progress:
    """How far long work is, on standard error: a bar on a terminal, elsewhere a line every quarter."""

    def __init__(self, title: str, unit: str) -> None:
        self._title, self._unit = title, unit
        self._begin = time.perf_counter()
        self._quarter = 0

    def __call__(self, done: int, total: int) -> None:
        rate = done / max(1e-9, time.perf_counter() - self._begin)
        text = f"{done:,}/{total:,} {self._unit}, {rate:,.0f}/s"
        if sys.stderr.isatty():
            filled = 32 * done // total
            end = "\n" if done == total else ""
            print(f"\r  {self._title} [{'#' * filled:.<32}] {text} ", end=end, file=sys.stderr, flush=True)
        elif (quarter := 4 * done // total) != self._quarter:
            self._quarter = quarter
            print(f"  {self._title} {text}", file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: int = 2) -> str:
    """Rows in aligned columns, the first being the heads; `right` are columns set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes for people: 512 B, 3.1 KiB, 12.0 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def clock(seconds: float) -> str:
    """Seconds as HH:MM:SS."""
    whole = int(seconds)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"
