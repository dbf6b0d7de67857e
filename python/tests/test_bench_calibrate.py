"""The calibration report: what it counts, what it draws, and a run against a real daemon."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from kvtier import Budget
from kvtier.bench.calibrate import run, summarise
from kvtier.bench.reliability import Call, diagram
from kvtier.bench.recorded import Stream
from kvtier.bf16 import to_bf16
from kvtier.daemon import Daemon, find_daemon, sparse_above
from kvtier.types import ModelSpec


def calls(count: int, held: int) -> list[Call]:
    """`count` calls of layer 3, of which `held` err less than stated."""
    return [Call("share 0.2", 3, i, 0.2, 0.01, 0.02, 0.01 if i < held else 0.03) for i in range(count)]


def test_rows_count_what_held() -> None:
    rows = summarise([*calls(100, 95), Call("share 0.2", 9, 0, 0.2, 0.01, 0.02, 0.04)], [3, 9])
    assert [(row.layers, row.calls) for row in rows] == [("3", 100), ("9", 1), ("all", 101)]
    assert rows[0].coverage == 0.95
    assert rows[0].low < 0.95 < rows[0].high
    assert rows[0].stated_over_true == pytest.approx(2)
    assert rows[1].coverage == 0


def test_diagram_is_svg_and_tells_calibrated_from_not() -> None:
    rng = np.random.default_rng(1)
    stated = 0.1 * np.exp(rng.normal(size=400))
    drawn = [Call("share 0.2", 0, i, 0.2, s / 2, s, s * float(rng.uniform(0, 1.05))) for i, s in enumerate(stated)]
    root = ET.fromstring(diagram(drawn, "a <title> & more"))
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2 * 8 + 1
    # On the diagonal of the left panel: x and y count from the lower left corner.
    for circle in circles[:8]:
        right, up = float(circle.attrib["cx"]) - 64, 44 + 360 - float(circle.attrib["cy"])
        assert abs(right - up) < 20
    with pytest.raises(ValueError, match="no audited calls"):
        diagram([], "")


def test_run_pairs_what_was_stated_with_the_truth(tmp_path: Path) -> None:
    try:
        binary = find_daemon()
    except FileNotFoundError:
        pytest.skip("no kvtierd: make build")
    rng = np.random.default_rng(2)
    spec = ModelSpec(layers=2, query_heads=4, kv_heads=2, head_dim=32, fingerprint=b"random")
    prefix, rows = 2560, 8
    k, v = (rng.normal(size=(2, prefix + rows, 2, 32)).astype(np.float32) for _ in range(2))
    q = rng.normal(size=(2, prefix + rows, 4, 32)).astype(np.float32)
    stream = Stream(
        spec, [4, 7], prefix, [*to_bf16(k)], [*to_bf16(v)], [*to_bf16(q[:, :prefix:8])], [*q[:, prefix:]]
    )  # fmt: skip
    budgets = {"share 0.2": Budget.share(0.2), "target 1e-05": Budget.target(1e-5)}
    with Daemon(binary, tmp_path / "data", [*sparse_above(0), "--audit", "1"]) as daemon, daemon.session() as session:
        found, ratios, answers = run(session, stream, budgets, 4, "random")
    # The codec alone errs more than 1e-5: everything was read, and there is nothing to audit.
    assert {call.budget for call in found} == {"share 0.2"}
    assert sorted((call.layer, call.position) for call in found) == sorted(
        (layer, prefix + at) for layer in (4, 7) for at in (0, 2, 4, 7)
    )
    assert all(answer.missed == (answer.budget != "share 0.2") for answer in answers)
    # The dense oracle agrees: who reads everything errs less, by the codec's error alone.
    errors = [np.mean([a.error for a in answers if a.missed == missed]) for missed in (False, True)]
    assert 1e-4 < errors[1] < errors[0] < 1
    assert all(0 < call.true < 1 and call.p95 >= call.estimate > 0 for call in found)
    assert len(ratios["share 0.2"]) == 8
