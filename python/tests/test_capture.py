"""Dumps hold what the dense decoder computed, at the positions they name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvtier import capture
from kvtier.dense import DenseDecoder


def test_dump(load_model: Callable, corpus: str, tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2")
    ids = tokenizer.encode(corpus)[:110]
    rows: dict[int, list] = {2: [], 9: []}

    def observe(layer: int, start: int, *qkv: np.ndarray) -> None:
        if layer in rows:
            rows[layer].append(qkv)

    DenseDecoder(model, observe).prefill(ids, 110)
    # Chunks of 48 cut both the sample (every third of the first 70) and the kept queries (40).
    capture.capture(model, ids, tmp_path, [9, 2], queries=40, sample_stride=3, chunk=48,
                    extra_meta={"text": "asyncio"})  # fmt: skip
    for layer, [(q, k, v)] in rows.items():
        dump = np.load(tmp_path / f"L{layer:02d}.npz")
        assert dump["q_sample_pos"].tolist() == list(range(0, 70, 3))
        for name, want in (("q", q[70:]), ("q_sample", q[0:70:3]), ("k", k), ("v", v)):
            assert dump[name].shape == want.shape and dump[name].dtype == np.float32
            # bfloat16's rounding may fall the other way where BLAS sums another number of rows.
            np.testing.assert_allclose(dump[name], want, rtol=8e-3, atol=2e-3)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["layers"] == [2, 9] and meta["token_ids"] == ids and meta["text"] == "asyncio"
    assert (meta["tokens"], meta["queries"], meta["sample_stride"]) == (110, 40, 3)


def test_float16(load_model: Callable, tmp_path: Path) -> None:
    model, _ = load_model("smollm2")
    dump = capture._LayerDump(model, 6, 2, 2)
    rows = np.random.default_rng(1).standard_normal((6, 9, 64)).astype(np.float32)
    dump.take(0, rows, rows[:, :3], rows[:, 3:6])
    dump.save(tmp_path / "a.npz", np.float16)
    stored = np.load(tmp_path / "a.npz")
    assert (stored["q"] == rows[4:].astype(np.float16)).all() and stored["q"].dtype == np.float16
    assert (stored["q_sample"] == rows[[0, 2]].astype(np.float16)).all()
    dump.k[3, 0, 0] = 1e5
    with pytest.raises(ValueError, match="k exceeds the range of float16"):
        dump.save(tmp_path / "b.npz", np.float16)


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert capture.main(["--model", "no-such-model", "--out", str(tmp_path)]) == 2
    assert "known names: smollm2, gemma3" in capsys.readouterr().err
    for wrong in (["--tokens", "100", "--queries", "101"], ["--skip", "-1"], ["--sample-stride", "0"]):
        with pytest.raises(SystemExit):
            capture.main([*wrong, "--out", str(tmp_path)])
