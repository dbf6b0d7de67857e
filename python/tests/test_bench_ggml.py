"""ggml's flash attention as a peer: what is timed computes attention."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from kvtier.bench import ggml
from kvtier.bench.ggml import FlashAttention, GgmlError, Library, Shape


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        return Library()
    except GgmlError as error:
        pytest.skip(str(error))


@pytest.mark.oracle
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ggml.LAYOUTS)
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.005), ("q8_0", 0.015), ("q4_0", 0.015)])
def test_equals_numpy(library: Library, kind: str, tolerance: float, layout: str, threads: int) -> None:
    for head_dim in (64, 128):
        op = FlashAttention(library, Shape(500, head_dim, 2, 6), kind, layout)
        assert op.run(threads) > 0
        assert op.error(op.expected()) < tolerance
        # Everything takes part: another value of the last token of the last head changes its rows only.
        before = op.output
        op.v[1, -1] = library.quantise(np.full((1, head_dim), 50, np.float32), ggml.TYPES[kind])[0]
        op.run(threads)
        changed = np.abs(op.output - before).max(axis=1) > 0
        assert not changed[:3].any() and changed[3:].all()
        assert op.error(op.expected()) < tolerance
        op.close()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ggml.TYPES)
def test_layouts_hold_the_same(library: Library, kind: str) -> None:
    shape = Shape(100, 64, 2, 4)
    one, other = (FlashAttention(library, shape, kind, layout) for layout in ggml.LAYOUTS)
    assert np.array_equal(one.k, other.k) and np.array_equal(one.v, other.v) and np.array_equal(one.q, other.q)
    one.run(1), other.run(1)
    np.testing.assert_allclose(one.output, other.output, rtol=1e-3, atol=1e-5)


@pytest.mark.oracle
def test_answers_lines(library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"type": "q8_0", "layout": "token", "threads": 2}
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{json.dumps(asked)}\n{json.dumps(asked | {'threads': 1})}\n"))
    assert ggml.main(["--tokens", "64", "--kv-heads", "2", "--query-heads", "4"]) == 0
    about, first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert about["version"] == library.version and set(about["features"]) <= set(ggml._FEATURES)
    assert first["seconds"] > 0 and second["seconds"] > 0 and max(first["error"], second["error"]) < 0.02


@pytest.mark.oracle
def test_wrong_output_has_no_time(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlashAttention, "error", lambda self, expected: 0.5)
    with pytest.raises(GgmlError, match="off by 0.5"):
        ggml._Operators(library, Shape(64, 64, 2, 4)).answer("f16", "head", 1)


def test_says_how_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("KVTIER_GGML", raising=False)
    assert ggml.main([]) == 1
    assert "pip install llama-cpp-python" in capsys.readouterr().err
    monkeypatch.setenv("KVTIER_GGML", str(tmp_path))
    assert ggml.main([]) == 1
    assert str(tmp_path) in capsys.readouterr().err
