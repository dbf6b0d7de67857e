"""Questions about made-up documents, in the places of RULER's qa_1 and qa_2.

RULER takes its question-answering tasks from SQuAD and HotpotQA: documents with the answer among
others. Those data sets are not part of kvtier. Here people and firms are invented, each has a
document of its own, and every document is a distractor for the questions about all others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvtier.bench import haystack, words
from kvtier.bench.haystack import Count
from kvtier.bench.questions import Haystack, Question, vary

__all__ = ["one_hop", "two_hop"]

_INTRO = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nThe following are given documents.\n\n"
)
_ASK = "\n\nAnswer the question based on the given documents. Only give me the answer.\n\nQuestion: "


_BORN = "{name} was born in {city}."
_WORKS = "{name} works as a {job}."
_PLAYS = "In the evenings {name} plays the {instrument}."
_ONE_HOP = (
    ("In which city was {name} born?", "{name} was born in", _BORN),
    ("What does {name} work as?", "{name} works as a", _WORKS),
    ("Which instrument does {name} play?", "{name} plays the", _PLAYS),
)
_TWO_HOP = (
    "In which city does the company that {name} works for have its head office?",
    "{name} works for a company. In which city is its head office?",
    "Where is the head office of the company that employs {name}?",
    "Which city is home to the head office of the company that {name} works for?",
)


def one_hop(length: int, questions: int, _facts: int, rng: random.Random, count: Count) -> Haystack:
    """Each document tells of one person: where born, which work, which instrument. One fact answers."""
    people = _people(rng)
    lives = {
        name: {
            "name": name,
            "city": rng.choice(words.CITIES),
            "job": rng.choice(words.JOBS),
            "instrument": rng.choice(words.INSTRUMENTS),
        }
        for name in people
    }

    def document(index: int, filler: random.Random) -> str:
        given = lives[people[index]]
        return _mixed(filler, [_BORN.format(**given), _WORKS.format(**given), _PLAYS.format(**given)])

    text, number = _documents(document, length, rng, count)
    made = []
    for subject, kind in vary(rng, number, len(_ONE_HOP), questions, mixed=True):
        given = lives[people[subject]]
        question, lead, sentence = _ONE_HOP[kind]
        answer = given[("city", "job", "instrument")[kind]]
        made.append(
            Question(_ASK + question.format(**given), lead.format(**given), (answer,), (sentence.format(**given),))
        )
    return Haystack(text, tuple(made))


def two_hop(length: int, questions: int, _facts: int, rng: random.Random, count: Count) -> Haystack:
    """Documents of people name their firms, documents of firms their cities. Both are needed."""
    people = _people(rng)
    firms = [f"{firm} {trade}" for firm in words.FIRMS for trade in words.TRADES]
    rng.shuffle(firms)
    city = {firm: rng.choice(words.CITIES) for firm in firms}
    job = {name: rng.choice(words.JOBS) for name in people}

    # A person's document and a firm's come together or not at all; _documents mixes them.
    def document(index: int, filler: random.Random) -> str:
        name, firm = people[index // 2], firms[index // 2]
        if index % 2:
            return _mixed(filler, [f"{firm} has its head office in {city[firm]}."])
        return _mixed(filler, [_WORKS.format(name=name, job=job[name]), f"{name} works for {firm}."])

    text, number = _documents(document, length, rng, count, together=2)
    made = []
    for subject, wording in vary(rng, number // 2, len(_TWO_HOP), questions):
        name, firm = people[subject], firms[subject]
        needles = (f"{name} works for {firm}.", f"{firm} has its head office in {city[firm]}.")
        lead = f"The company that {name} works for has its head office in"
        made.append(Question(_ASK + _TWO_HOP[wording].format(name=name), lead, (city[firm],), needles))
    return Haystack(text, tuple(made))


def _people(rng: random.Random) -> list[str]:
    """Full names; many share a first or a last one, so that neither alone tells people apart."""
    names = [f"{first} {last}" for first in words.FIRST_NAMES for last in words.LAST_NAMES]
    rng.shuffle(names)
    return names


def _mixed(rng: random.Random, facts: Sequence[str]) -> str:
    """Facts and two sentences about something else, in random order."""
    sentences = [*facts, *rng.sample(haystack.prose(), 2)]
    rng.shuffle(sentences)
    return " ".join(sentences)


def _documents(
    document: Callable[[int, random.Random], str], length: int, rng: random.Random, count: Count, together: int = 1
) -> tuple[str, int]:
    """Numbered documents, as many as `length` tokens hold (a multiple of `together`), and their number."""
    seed = rng.random()

    def text(n: int) -> str:
        filler = random.Random(seed)
        documents = [document(index, filler) for index in range(n * together)]
        random.Random(seed).shuffle(documents)
        return _INTRO + "\n\n".join(f"Document {number}:\n{body}" for number, body in enumerate(documents, 1))

    most = len(words.FIRMS) * len(words.TRADES) if together > 1 else len(words.FIRST_NAMES) * len(words.LAST_NAMES)
    number = haystack.fit(text, length, count, most=most)
    return text(number), number * together
