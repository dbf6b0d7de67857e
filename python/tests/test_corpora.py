"""The texts of the measurements: there, apart from each other, cut where asked."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.bench import corpora


def test_texts_are_there_and_apart() -> None:
    texts = {name: corpora.corpus(name) for name in corpora.CORPORA if name != "tuning-code"}
    assert all(len(text) > 200_000 for text in texts.values())
    assert "class BytesParser" in texts["held-out-code"] and "class HTTPStatus" in texts["held-out-code"]
    # The halves hold different topics, and about equally much.
    first, second = texts["tuning-docs"], texts["held-out-docs"]
    assert first.count('The "assert" statement\n***') == 1 and 'The "assert" statement\n***' not in second
    assert second.count('The "while" statement\n***') == 1 and 'The "while" statement\n***' not in first
    assert 0.9 < len(first) / len(second) < 1.1
    with pytest.raises(corpora.CorpusError, match="held-out-docs"):
        corpora.corpus("held-out")


def test_token_ranges(load_model: Callable) -> None:
    for name in ("smollm2", "gemma3"):
        _, tokenizer = load_model(name)
        begin = len(tokenizer.encode(""))
        text = corpora.corpus("held-out-docs")[:2000]
        whole = corpora.token_ids(tokenizer, text, 100)
        assert whole == tokenizer.encode(text)[:100]
        later = corpora.token_ids(tokenizer, text, 50, skip=40)
        assert len(later) == 50 and later[:begin] == whole[:begin]
        assert later[begin : 40 + begin] == whole[40 + begin : 80 + begin]
        with pytest.raises(corpora.CorpusError, match="ask for fewer"):
            corpora.token_ids(tokenizer, text, 100_000)


def test_command_line(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    corpora.add_arguments(parser)
    text, what = corpora.source(parser.parse_args([]))
    assert text == corpora.corpus("held-out-code") and what.startswith("held-out-code: ")
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    arguments = parser.parse_args(["--text", str(tmp_path / "a"), "--text", str(tmp_path / "b")])
    assert corpora.source(arguments) == ("one\ntwo", f"{tmp_path}/a, {tmp_path}/b")
    with pytest.raises(SystemExit):
        parser.parse_args(["--text", "x", "--corpus", "held-out-code"])
