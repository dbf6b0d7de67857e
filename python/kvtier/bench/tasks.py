"""RULER's 13 tasks, by generators of our own with the published parameters.

After "RULER: What's the Real Context Size of Your Long-Context Language Models?" (Hsieh et al.,
2024), section 3 and appendix B. Where they differ from it:

- One text is asked many questions, where RULER makes a new text for each. It therefore holds several
  needles or chains (`facts`), of which a question wants one (or four); the others are distractors.
  Where there are more questions than that, they are asked again in other words.
- The essays are prose from Python's reference (``kvtier.bench.haystack.prose``).
- RULER's qa_1 (SQuAD) and qa_2 (HotpotQA) need data sets. In their places stand ``qa_one_hop`` and
  ``qa_two_hop``: made-up documents with planted facts. They are easier to read than the real ones
  and say nothing about natural questions.
- ``cwe`` and ``fwe`` have one question by nature: it is asked in different words.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from kvtier.bench import aggregation, niah, planted_qa
from kvtier.bench.haystack import Count
from kvtier.bench.questions import Haystack

__all__ = ["TASKS", "Task", "make"]


# (length in tokens, number of questions, facts, rng, count) -> Haystack
Make = Callable[[int, int, int, random.Random, Count], Haystack]


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One of the 13.

    Attributes:
        name: RULER's, or of what stands in its place.
        about: one line for people.
        match_all: all references must be found (string_match_all), or any (string_match_part).
        answer_tokens: how many tokens RULER lets a model generate.
    """

    name: str
    about: str
    make: Make
    match_all: bool
    answer_tokens: int


_ALL = (
    *(Task(kind.name, kind.about, kind.make, True, 128) for kind in niah.KINDS),
    Task("vt", "chains of variable assignments in noise: which names have the value?", aggregation.vt, True, 30),
    Task("cwe", "the 10 words that a numbered list repeats most", aggregation.cwe, True, 120),
    Task("fwe", "the 3 most frequent words of a coded text (zeta, alpha 2)", aggregation.fwe, True, 50),
    Task("qa_one_hop", "made-up documents, one planted fact answers (in place of qa_1)", planted_qa.one_hop, False, 32),
    Task("qa_two_hop", "made-up documents, two planted facts answer (in place of qa_2)", planted_qa.two_hop, False, 32),
)
TASKS = {task.name: task for task in _ALL}


def make(task: str, length: int, questions: int, facts: int, seed: int, count: Count) -> Haystack:
    """A text of at most `length` tokens, nearly as long, and `questions` different questions about it.

    Args:
        facts: how many needles or chains are asked about, where a text does not hold more by its
            nature (texts of needles, documents) or only one thing to ask (cwe, fwe). More of
            them are harder to tell apart, fewer make the questions more alike.

    Equal arguments give equal texts. Raises LengthError or ValueError if the length does not
    allow for the task or for so many questions.
    """
    rng = random.Random(f"{task}/{length}/{questions}/{facts}/{seed}")
    return TASKS[task].make(length, questions, facts, rng, count)
