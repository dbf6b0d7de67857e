"""Starting and stopping a kvtierd of one's own: what the demo and the tests share."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Self

from kvtier.client import Client
from kvtier.errors import KvtierError
from kvtier.session import Session

__all__ = ["Daemon", "DaemonError", "find_daemon"]

_STOP_SECONDS = 20.0


class DaemonError(RuntimeError):
    """The daemon did not start or did not stop as it should."""


def sparse_above(tokens: int, *, by_page: bool = True) -> list[str]:
    """Flags of a kvtierd that answers contexts above so many tokens sparsely, also where RAM holds all of them.

    Args:
        by_page: budgets are answered from whole pages, as a daemon does by itself; else line by line, and
            never exceeded.
    """
    return ["--read-all", str(tokens), "--read-all-in-ram", "0", *([] if by_page else ["--by-page=false"])]


def find_daemon(path: str | None = None) -> Path:
    """The kvtierd to run: `path`, $KVTIERD, or bin/kvtierd in a folder above this package.

    Raises FileNotFoundError if there is none.
    """
    for given in (path, os.environ.get("KVTIERD")):
        if given:
            if not os.access(given, os.X_OK):
                raise FileNotFoundError(f"{given} is not an executable file")
            return Path(given).resolve()
    for folder in (Path.cwd(), *Path(__file__).resolve().parents):
        built = folder / "bin" / "kvtierd"
        if os.access(built, os.X_OK):
            return built
    raise FileNotFoundError("no bin/kvtierd: build it (make build), or set KVTIERD to its path")


class Daemon:
    """A kvtierd process on a data folder. Start it with ``start`` or as a context manager.

    Args:
        binary: the kvtierd to run.
        data: its data folder; the sockets lie in it.
        arguments: further flags.
        ready_seconds: how long it may take to answer.
    """

    def __init__(
        self,
        binary: Path,
        data: Path,
        arguments: Sequence[str] = (),
        *,
        ready_seconds: float = 60.0,
    ) -> None:
        self.data = data
        self.target = f"unix://{data}/kvtier.sock"
        self.fast_path = str(data / "fast.sock")
        self.log_path = data.parent / f"{data.name}.log"
        # No TCP: two daemons of one machine must not meet at a port.
        self._command = [str(binary), "--data", str(data), "--listen", "", "--metrics", "", *arguments]
        self._ready_seconds = ready_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id; DaemonError if it is not running."""
        if self._process is None:
            raise DaemonError("kvtierd is not running")
        return self._process.pid

    def start(self) -> None:
        """Run it and wait until it answers."""
        if self._process is not None:
            raise DaemonError("kvtierd is already running")
        self._log = self.log_path.open("ab")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the terminal is for us; we then stop the daemon in order.
            start_new_session=True,
        )
        deadline = time.monotonic() + self._ready_seconds
        try:
            while not self._answers():
                if self._process.poll() is not None:
                    raise DaemonError(f"kvtierd ended with status {self._process.returncode}:\n{self.log_tail()}")
                if time.monotonic() > deadline:
                    raise DaemonError(f"kvtierd did not answer in time:\n{self.log_tail()}")
                time.sleep(0.02)
        except BaseException:
            self.kill()
            raise

    def _answers(self) -> bool:
        if not os.path.exists(self.data / "kvtier.sock"):
            return False
        # A socket file may be left over from a daemon that was killed: only an answer counts.
        with Client(self.target, timeout=2.0) as client:
            try:
                client.status()
            except KvtierError:
                return False
        return True

    def session(self, **arguments: object) -> Session:
        """A session with it; the arguments are ``Session``'s."""
        return Session(self.target, **arguments)  # type: ignore[arg-type]

    def stop(self) -> None:
        """End it in order (SIGTERM); DaemonError if it does not end or ends with an error."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise DaemonError(f"kvtierd did not stop within {_STOP_SECONDS:.0f} s") from None
        self._forget()
        if status != 0:
            raise DaemonError(f"kvtierd ended with status {status}:\n{self.log_tail()}")

    def kill(self) -> None:
        """End it at once (SIGKILL), as a crash would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            self._forget()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines it logged."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text("utf-8", "replace").splitlines()[-lines:])

    def _forget(self) -> None:
        self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        if exc_type is None:
            self.stop()
        else:
            # The first error is the one to report.
            with contextlib.suppress(DaemonError):
                self.stop()
