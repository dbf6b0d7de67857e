"""A text and the questions asked of it."""

from __future__ import annotations

import dataclasses
import random

__all__ = ["Haystack", "Question", "vary"]


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """A question about a text.

    Attributes:
        text: what follows the text.
        lead: the answer's first words, which are given.
        answers: the references; the task says whether all or one of them must be found.
        needles: sentences of the text that hold the answer; none where the whole text does.
    """

    text: str
    lead: str
    answers: tuple[str, ...]
    needles: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Haystack:
    """A text and questions about it.

    Attributes:
        text: with the task's introduction.
        facts: different references among the questions: how many independent things are asked.
    """

    text: str
    questions: tuple[Question, ...]

    @property
    def facts(self) -> int:
        return len({question.answers for question in self.questions})

    def depth(self, question: Question) -> float:
        """Where in the text (0 to 1, by characters) the question's first needle lies; NaN without needles."""
        if not question.needles:
            return float("nan")
        return min(self.text.index(needle) for needle in question.needles) / len(self.text)


def vary(
    rng: random.Random, subjects: int, wordings: int, questions: int, *, mixed: bool = False
) -> list[tuple[int, int]]:
    """(subject, wording) of each question, all different: every subject is asked once before any is again.

    All are asked in the first wording (RULER's own) as long as that makes different questions;
    with `mixed` in any. Raises ValueError if there are not that many questions.
    """
    if questions > subjects * wordings:
        raise ValueError(
            f"{questions} different questions cannot be asked of this text, only {subjects * wordings}; "
            "ask for fewer (--questions) or of a longer text (--lengths)"
        )
    order = rng.sample(range(subjects), subjects)
    first = [rng.randrange(wordings) if mixed else 0 for _ in range(subjects)]
    return [(order[i % subjects], (first[i % subjects] + i // subjects) % wordings) for i in range(questions)]
