"""What a benchmark of answers reports: RULER's scores, and what is retained of right answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from kvtier.bench.stats import wilson

__all__ = ["Kept", "Outcome", "kept_references", "kept_samples", "references_found", "score"]


def references_found(text: str, references: Sequence[str]) -> list[bool]:
    """Which references an answer contains, whatever their case."""
    lowered = text.lower()
    return [reference.lower() in lowered for reference in references]


def score(text: str, references: Sequence[str], match_all: bool) -> float:
    """RULER's string_match_all, the share of references found, or string_match_part, 1 if any is."""
    found = references_found(text, references)
    return sum(found) / len(found) if match_all else float(any(found))


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """One answer to one question.

    Attributes:
        text: the answer.
        found: for each reference whether it is in the text.
        score: see ``score``.
        kl: KL in nats of the first answer token's distribution from the dense one's; 0 for dense.
    """

    text: str
    found: tuple[bool, ...]
    score: float
    kl: float

    @classmethod
    def of(cls, text: str, references: Sequence[str], match_all: bool, kl: float) -> Outcome:
        return cls(text, tuple(references_found(text, references)), score(text, references, match_all), kl)


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """How many of `of` right ones are right still.

    Attributes:
        share: kept / of; NaN if there was none to keep.
        low, high: Wilson's 95 % interval.
    """

    kept: int
    of: int
    share: float
    low: float
    high: float

    @classmethod
    def counted(cls, pairs: Sequence[tuple[bool, bool]]) -> Kept:
        """From (right before, right now)."""
        of = sum(before for before, _ in pairs)
        kept = sum(before and now for before, now in pairs)
        return cls(kept, of, kept / of if of else math.nan, *wilson(kept, of))

    def __str__(self) -> str:
        if not self.of:
            return "none to keep"
        return f"{self.kept}/{self.of} [{100 * self.low:.0f}, {100 * self.high:.0f}]"


def kept_samples(before: Sequence[Outcome], now: Sequence[Outcome]) -> Kept:
    """Retention: of the samples that were wholly right (score 1), those that are so now. Paired."""
    return Kept.counted([(b.score == 1, n.score == 1) for b, n in zip(before, now, strict=True)])


def kept_references(before: Sequence[Outcome], now: Sequence[Outcome]) -> Kept:
    """The same for single references: samples with many of them are seldom wholly right."""
    pairs = [pair for b, n in zip(before, now, strict=True) for pair in zip(b.found, n.found, strict=True)]
    return Kept.counted(pairs)
