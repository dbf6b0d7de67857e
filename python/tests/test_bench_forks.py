"""Many questions at once give the answers that each gives alone, and both commands run."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from reference_server import FastServer, Store

from kvtier import Budget, Session
from kvtier.bench import needle, ruler
from kvtier.bench.forks import Script, answer_densely, answer_forks, read
from kvtier.bench.stats import kl_divergence
from kvtier.dense import DenseDecoder
from kvtier.types import Profile
from kvtier.worker import Worker


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_together_as_alone(
    name: str, load_model: Callable, corpus: str, grpc_server: str, fast_server: tuple[FastServer, str], store: Store
) -> None:
    model, tokenizer = load_model(name)
    text = tokenizer.encode(corpus)[: 530 if name == "gemma3" else 150]  # beyond Gemma's window of 512
    stop = tokenizer.stop_ids
    scripts = [Script(tokenizer.encode(t, add_bos=False), n) for t, n in (("def close(", 3), ("\nimport os, ", 2))]
    oracle = DenseDecoder(model)
    oracle.prefill(text)
    want = []
    for script in scripts:
        first = oracle.prefill(script.question)
        want.append((first, oracle.generate(first, script.limit, [*stop])))
        oracle.truncate(len(text))

    with Session(grpc_server, fast_path=fast_server[1]) as session:
        worker = Worker(model, session)
        rows, (context,) = read(worker, text, [Profile.BALANCED])
        assert context.length == len(text)
        ways = [
            answer_densely(worker, rows, scripts, stop),
            answer_forks(worker, context, scripts, Budget.exact(), stop),
            answer_forks(worker, context, scripts, Budget.exact(), stop, whole_question=True),
        ]
        # Nothing of one question is left for the next.
        assert rows[0].length == context.length == len(text)
        ways.append(answer_densely(worker, rows, scripts[1:], stop))
    for answers in ways:
        for answer, (first, ids) in zip(answers, want[-len(answers) :], strict=True):
            assert answer.ids == ids
            # Sums in another order may round a K or V to the next bfloat16: that, and no more.
            assert kl_divergence(first[None], answer.first[None]).max() < 1e-3


@pytest.mark.daemon
@pytest.mark.slow
def test_commands(tmp_path: Path, load_model: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    load_model("smollm2")  # or skip
    out = tmp_path / "ruler.json"
    assert ruler.main(["--tasks", "niah_single_1", "--lengths", "700", "--questions", "2", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    (summary,) = report["tasks"]
    assert summary["sealed"] > 300 and summary["samples"] == len(report["samples"]) == 2
    assert 0 < summary["read"] < 0.25 and 0 < summary["full_kl_mean"] < summary["kl_max"]
    assert "niah_single_1" in capsys.readouterr().out

    assert ruler.main(["--check-short", "--tasks", "qa_one_hop", "--lengths", "700", "--questions", "1", "--json"]) == 0
    exact, neutral = json.loads(capsys.readouterr().out)["tasks"]
    assert exact["whole"] and neutral["whole"] and exact["kl_all"] < neutral["kl_all"] <= 1e-4

    svg = tmp_path / "grid.svg"
    assert needle.main(["--lengths", "700", "--depths", "0,1", "--texts", "1", "--out", str(svg)]) == 0
    ElementTree.parse(svg)
    assert "kept of dense" in capsys.readouterr().out
