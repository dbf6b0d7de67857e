"""Round trips: what a call costs a worker, on both paths, beside what the daemon takes itself.

``python -m kvtier.roundtrip`` starts a daemon, opens a sequence with SmolLM2's shapes and a short
context, and asks one layer again and again: gRPC and the fast path in turn, so that noise falls on
both. It prints quantiles of the wall time and of what is left of it without the daemon's own time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from kvtier.bf16 import round_bf16, to_bf16
from kvtier.daemon import Daemon, find_daemon
from kvtier.session import Session
from kvtier.types import ModelSpec

__all__ = ["main", "measure"]

# One layer is asked, and a batch of one: 9 query heads, 3 KV heads, head_dim 64.
SPEC = ModelSpec(1, 9, 3, 64, b"round trip")
CONTEXT = 64


def measure(session: Session, sequence: str, rounds: int) -> tuple[list[float], list[float]]:
    """Wall times of `rounds` calls, and the same without the daemon's own time, in microseconds."""
    q = np.random.default_rng(1).standard_normal((1, SPEC.query_heads, SPEC.head_dim)).astype(np.float32)
    wall, tax = [], []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        result = session.attend(sequence, 0, CONTEXT - 1, q)
        took = time.perf_counter_ns() - start
        wall.append(took / 1e3)
        tax.append((took - result.account.ns_total) / 1e3)
    return wall, tax


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kvtier.roundtrip", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--daemon", help="the kvtierd to run (default: bin/kvtierd)")
    parser.add_argument("--rounds", type=int, default=20, help="turns of 200 calls on each path (default 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    times: dict[str, tuple[list[float], list[float]]] = {"fast path": ([], []), "gRPC": ([], [])}
    with tempfile.TemporaryDirectory(prefix="kvt-") as folder:
        daemon = Daemon(find_daemon(options.daemon), Path(folder) / "data", ["--log-level", "warn", "--audit", "0"])
        daemon.start()
        try:
            with daemon.session() as fast, daemon.session(fast_path="") as slow:
                if not fast.uses_fast_path:
                    raise SystemExit("the daemon offers no fast path")
                rng = np.random.default_rng(0)
                rows = to_bf16(round_bf16(rng.standard_normal((2, CONTEXT, SPEC.kv_heads, SPEC.head_dim)).astype(np.float32)))
                sequence = fast.create(SPEC).sequence_id
                fast.append(sequence, 0, 0, rows[0], rows[1])
                slow.open(sequence)
                for turn in range(options.rounds + 1):
                    for name, session in (("fast path", fast), ("gRPC", slow)):
                        wall, tax = measure(session, sequence, 200)
                        if turn > 0:  # the first turn warms up
                            times[name][0].extend(wall)
                            times[name][1].extend(tax)
        finally:
            daemon.stop()
    report = {
        name: {
            kind: {f"p{p}": round(float(np.percentile(values, p)), 1) for p in (10, 50, 90, 99)}
            for kind, values in (("wall_us", wall), ("without_daemon_us", tax))
        }
        for name, (wall, tax) in times.items()
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{'microseconds':44}{'p10':>9}{'p50':>9}{'p90':>9}{'p99':>9}")
    for name, kinds in report.items():
        for kind, label in (("wall_us", "round trip"), ("without_daemon_us", "without the daemon's own time")):
            print(f"{name + ', ' + label:44}"[:44] + "".join(f"{v:9.1f}" for v in kinds[kind].values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
