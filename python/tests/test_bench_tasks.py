"""RULER's tasks as made here: what the texts hold, how long they are, how answers are scored."""

from __future__ import annotations

import collections
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest

from kvtier.bench import heatmap, needle
from kvtier.bench.haystack import LengthError, fit, insert, prose
from kvtier.bench.scoring import Outcome, kept_references, kept_samples, score
from kvtier.bench.tasks import TASKS, make


def words(text: str) -> int:
    """A count of tokens that needs no model."""
    return len(re.findall(r"\w+|\S", text))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1024, 4096])
def test_text(task: str, length: int) -> None:
    hay = make(task, length, 20, 4, 1, words)
    assert 0.9 * length < words(hay.text) <= length
    assert len(hay.questions) == len({question.text for question in hay.questions}) == 20
    for question in hay.questions:
        assert question.answers and all(answer in hay.text for answer in question.answers)
        # The given words and the question may not give away what is asked for.
        assert not any(answer.lower() in (question.text + question.lead).lower() for answer in question.answers)
        assert all(hay.text.count(sentence) == 1 for sentence in question.needles)
        # vt's names follow from one another: only the first has the value beside it.
        together = " ".join(question.needles)
        assert not question.needles or all(answer in together for answer in question.answers)
        assert math.isnan(hay.depth(question)) or 0 <= hay.depth(question) <= 1
    assert make(task, length, 20, 4, 1, words) == hay
    assert make(task, length, 20, 4, 2, words).text != hay.text


def test_numbers_of_references() -> None:
    counts = {task: {len(q.answers) for q in make(task, 2048, 5, 4, 1, words).questions} for task in TASKS}
    several = {"niah_multivalue": {4}, "niah_multiquery": {4}, "vt": {5}, "cwe": {10}, "fwe": {3}}
    assert counts == {task: several.get(task, {1}) for task in TASKS}


@pytest.mark.parametrize(("length", "often", "seldom"), [(2048, 6, 1), (4096, 30, 3)])
def test_common_words(length: int, often: int, seldom: int) -> None:
    hay = make("cwe", length, 2, 4, 1, words)
    listed = re.findall(r"\d+\. ([a-z]+)", hay.text.split("most often.\n")[2])
    counts = collections.Counter(listed)
    common = set(hay.questions[0].answers)
    assert len(common) == 10 and {counts.pop(word) for word in common} == {often}
    assert set(counts.values()) == {seldom}


def test_frequent_words() -> None:
    hay = make("fwe", 4096, 2, 4, 1, words)
    counts = collections.Counter(hay.text.split("coded words. ")[1].split())
    ranked = counts.most_common(5)
    assert [word for word, _ in ranked[:4]] == ["...", *hay.questions[0].answers]
    # Zeta with alpha 2: the second is a quarter of the first, and the fourth is told from the fifth.
    assert ranked[0][1] / ranked[1][1] == pytest.approx(4, rel=0.1) and ranked[3][1] > ranked[4][1]


def test_chains_are_told_in_order() -> None:
    hay = make("vt", 2048, 4, 4, 1, words)
    for question in hay.questions:
        places = [hay.text.index(assignment) for assignment in question.needles]
        assert places == sorted(places) and len(places) == 5
        assert re.search(r"value (\d+)", question.text)[1] in question.needles[0]  # type: ignore[index]


def test_two_hops_need_two_documents() -> None:
    hay = make("qa_two_hop", 2048, 8, 4, 1, words)
    documents = hay.text.split("Document ")
    for question in hay.questions:
        person, firm = ([i for i, d in enumerate(documents) if sentence in d] for sentence in question.needles)
        assert len(person) == len(firm) == 1 and person != firm
        assert question.answers[0] not in documents[person[0]]


def test_needles_lie_at_their_depths(load_model: Callable) -> None:
    _, tokenizer = load_model("smollm2")

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_bos=False))

    depths = [0, 0.25, 0.5, 0.75, 1]
    hay = needle.grid_text(4096, depths, random.Random(3), count)
    assert 4096 - 80 < count(hay.text) <= 4096
    # To within a long sentence; at 0 the introduction is before it.
    assert [hay.depth(question) for question in hay.questions] == pytest.approx(depths, abs=0.02)


def test_insert_keeps_everything() -> None:
    units = list(prose()[:40])
    got = insert(units, ["A", "B", "C"], [0.5, 1.0, 0.0])
    assert got[0] == "C" and got[-1] == "B" and [x for x in got if x not in "ABC"] == units
    assert insert([], ["A"], [0.3]) == ["A"]


def test_fit() -> None:
    assert fit(lambda n: "a " * n, 100, words) == 100
    assert fit(lambda n: "a " * n, 100, words, least=100, most=100) == 100
    with pytest.raises(LengthError, match="ask for more"):
        fit(lambda n: "a " * n, 5, words, least=6)
    with pytest.raises(LengthError, match="ask for fewer"):
        fit(lambda n: "a " * n, 100, words, most=50)
    with pytest.raises(LengthError, match="too few"):
        make("niah_multivalue", 100, 4, 4, 1, words)
    with pytest.raises(ValueError, match="ask for fewer"):
        make("cwe", 2048, 30, 4, 1, words)


def test_score() -> None:
    assert score("It is 12 and ABC.", ["12", "abc"], True) == 1
    assert score("It is 12.", ["12", "abc"], True) == 0.5
    assert score("It is 12.", ["12", "abc"], False) == 1
    assert score("", ["12"], False) == 0


def test_retention_is_paired() -> None:
    def outcomes(*texts: str) -> list[Outcome]:
        return [Outcome.of(text, ["1", "2"], True, 0) for text in texts]

    before, now = outcomes("1 2", "1 2", "1", ""), outcomes("1 2", "2", "1 2", "1 2")
    # What only became right counts for nothing.
    assert (kept_samples(before, now).kept, kept_samples(before, now).of) == (1, 2)
    assert (kept_references(before, now).kept, kept_references(before, now).of) == (4, 5)
    assert kept_references(before, now).low == pytest.approx(0.3755, abs=1e-3)
    nothing = kept_samples(outcomes("", "3"), now[:2])
    assert nothing.of == 0 and math.isnan(nothing.share) and str(nothing) == "none to keep"


def test_heat_map_is_xml() -> None:
    panels = [
        heatmap.Panel("dense <1>", [[0.0, 1.0], [0.5, math.nan], [1.0, 1.0]]),
        heatmap.Panel("sparse & so", [[1.0] * 2] * 3),
    ]
    root = ElementTree.fromstring(heatmap.draw("a <title> & more", panels, [1024, 2048], [0, 0.5, 1], "note"))
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"dense <1>", "sparse & so", "a <title> & more", "0 %", "50 %", "1024", "2048", "note"} <= set(texts)
    fills = collections.Counter(element.get("fill") for element in root.iter(f"{space}rect"))
    # One cell has no figure and no number in it.
    assert fills[heatmap.colour(1)] == 9 and fills[heatmap.colour(math.nan)] == 1
    assert texts.count("1.00") == 9 and texts.count("0.50") == 1
    assert heatmap.colour(0) == "#d73027" and heatmap.colour(1) == "#1a9850" and heatmap.colour(0.5) == "#fee08b"
