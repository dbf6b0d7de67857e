"""The same questions answered in several ways: densely, from everything stored, and sparsely."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvtier.bench.forks import Answer, Script, answer_densely, answer_forks, read
from kvtier.bench.questions import Haystack
from kvtier.bench.rig import Progress, Rig
from kvtier.bench.scoring import Outcome
from kvtier.bench.stats import kl_divergence
from kvtier.types import Budget, Profile

__all__ = ["Comparison", "compare", "joined", "work"]

# How long the parts take beside reading one token of the text; only for the time left.
_DENSE, _FULL, _SPARSE = 60, 90, 200


@dataclasses.dataclass(slots=True)
class Comparison:
    """Outcomes of one text's questions, in the order of the questions.

    Attributes:
        tokens, sealed: tokens of the text, and those of them that were sealed.
        dense: by dense attention of the same model over unquantised K/V.
        full: by everything that the daemon stores (mode exact) in the profile balanced.
        sparse: by share.
        read: by share, what was transferred of the sealed bytes.
    """

    tokens: int
    sealed: int
    dense: list[Outcome]
    full: list[Outcome]
    sparse: dict[float, list[Outcome]]
    read: dict[float, float]


def work(length: int, questions: int, shares: Sequence[float]) -> float:
    """The work of ``compare`` in the unit of its progress."""
    return length + questions * (_DENSE + _FULL + _SPARSE * len(shares))


def compare(
    rig: Rig,
    hay: Haystack,
    shares: Sequence[float],
    match_all: bool,
    answer_tokens: int,
    progress: Progress,
    title: str,
) -> Comparison:
    """Read a text once, densely, and ask all its questions in every way.

    Whatever comes after the text, from the question's first token on, is attended in that way.
    """
    worker, questions = rig.worker, hay.questions
    stop = rig.stop(questions[0])
    scripts = [Script(rig.question(q), rig.limit(q, answer_tokens)) for q in questions]
    prompt = rig.prompt(hay.text)
    with progress.stage(f"{title}, reading, token", len(prompt)) as step:
        rows, (context,) = read(worker, prompt, [Profile.BALANCED], step)
    try:
        with progress.stage(f"{title}, dense answers", _DENSE * len(questions)):
            dense = answer_densely(worker, rows, scripts, stop)
        exact = np.stack([answer.first for answer in dense])

        def outcomes(answers: Sequence[Answer]) -> list[Outcome]:
            kl = kl_divergence(exact, np.stack([answer.first for answer in answers]))
            return [
                Outcome.of(rig.tokenizer.decode(answer.ids), question.answers, match_all, float(nats))
                for question, answer, nats in zip(questions, answers, kl, strict=True)
            ]

        with progress.stage(f"{title}, full read, step", _FULL * len(questions)) as step:
            full = answer_forks(worker, context, scripts, Budget.exact(), stop, whole_question=True, progress=step)
        comparison = Comparison(len(prompt), context.ack.sealed, outcomes(dense), outcomes(full), {}, {})
        for share in shares:
            with progress.stage(f"{title}, share {share:g}, step", _SPARSE * len(questions)) as step:
                answers = answer_forks(worker, context, scripts, Budget.share(share), stop, progress=step)
            comparison.sparse[share] = outcomes(answers)
            everything = sum(answer.account.bytes_full for answer in answers)
            comparison.read[share] = sum(answer.account.bytes_sealed for answer in answers) / max(1, everything)
    finally:
        context.delete()
    return comparison


def joined(parts: Sequence[Comparison]) -> Comparison:
    """The outcomes of several texts as one; tokens and shares read are means."""
    n = len(parts)
    shares = parts[0].sparse
    return Comparison(
        sum(part.tokens for part in parts) // n,
        sum(part.sealed for part in parts) // n,
        [outcome for part in parts for outcome in part.dense],
        [outcome for part in parts for outcome in part.full],
        {share: [outcome for part in parts for outcome in part.sparse[share]] for share in shares},
        {share: sum(part.read[share] for part in parts) / n for share in shares},
    )
