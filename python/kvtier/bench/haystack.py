"""What tasks are made of: prose, noise, words, and facts put into a text at chosen depths.

The prose stands in for the essays of RULER's haystacks. It is the running text of ``held-out-docs``
(``kvtier.bench.corpora``): Python's reference by topic, of which this half tunes nothing.
"""

from __future__ import annotations

import bisect
import functools
import random
import re
from collections.abc import Callable, Sequence

from kvtier.bench import corpora
from kvtier.bench.words import ADJECTIVES, NOUNS

__all__ = ["DEPTHS", "NOISE", "Count", "LengthError", "fit", "insert", "keys", "prose", "spread", "vocabulary"]

# text -> its number of tokens
Count = Callable[[str], int]

# RULER places needles at these 40 depths (Hsieh et al., 2024, scripts/data/synthetic/niah.py).
DEPTHS = tuple(index / 39 for index in range(40))

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class LengthError(ValueError):
    """A task cannot be made at the length asked for."""


@functools.cache
def prose() -> tuple[str, ...]:
    """Sentences of plain English, in order: paragraphs without code, tables or markup."""
    text = corpora.corpus("held-out-docs")
    sentences: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split()).replace("*", "").replace('"', "")
        # Of the rest, most would read as anything but prose: signatures, grammar, lists.
        if re.match(r"[A-Z][a-z]* ", line) and line.endswith(".") and not re.search(r"[=<>|{}\[\]\\]|::|->|>>>", line):
            sentences += re.split(r"(?<=[a-z)]\.) (?=[A-Z])", line)
    unique = dict.fromkeys(sentence for sentence in sentences if 5 <= len(sentence.split()) <= 50)
    return tuple(unique)


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Common English words of 4 to 9 letters, in alphabetical order: those of the prose, and more."""
    words = set(re.findall(r"(?<![\w.'-])[a-z]{4,9}(?![\w'-])", " ".join(prose())))
    return tuple(sorted(words.union(ADJECTIVES, NOUNS)))


def keys(rng: random.Random, count: int) -> list[str]:
    """`count` different keys such as "elegant-otter", or as many as there are."""
    count = min(count, len(ADJECTIVES) * len(NOUNS))
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[pair // len(NOUNS)]}-{NOUNS[pair % len(NOUNS)]}" for pair in pairs]


def spread(rng: random.Random, count: int) -> list[float]:
    """`count` depths of RULER's grid in random order, each used before any is used again."""
    depths: list[float] = []
    while len(depths) < count:
        depths += rng.sample(DEPTHS, len(DEPTHS))
    return depths[:count]


def insert(units: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """`units` with every needle put before the unit that lies at its depth (0 first, 1 last) by characters."""
    ends = [0]
    for unit in units:
        ends.append(ends[-1] + len(unit) + 1)
    out = list(units)
    # From the end, so that the places of those yet to come stay as they are.
    order = sorted(range(len(needles)), key=lambda index: depths[index], reverse=True)
    for index in order:
        target = depths[index] * ends[-1]
        at = bisect.bisect_left(ends, target)
        if at > 0 and target - ends[at - 1] < ends[at] - target:
            at -= 1
        out.insert(at, needles[index])
    return out


def fit(make: Callable[[int], str], length: int, count: Count, least: int = 1, most: int = 1 << 20) -> int:
    """The largest size n in [least, most] for which make(n) has at most `length` tokens.

    `make` must give texts that grow with n. Raises LengthError if even make(least) is longer, or
    if make(most) is much shorter: then the task has too little material for the length.
    """
    tokens = count(make(least))
    if tokens > length:
        raise LengthError(f"{length} tokens are too few for this task: its smallest text has {tokens}; ask for more")
    low, high = least, least + 1
    while high <= most and count(make(high)) <= length:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if count(make(middle)) <= length:
            low = middle
        else:
            high = middle
    if low == most and (tokens := count(make(most))) < 0.95 * length:
        raise LengthError(f"{length} tokens are too many for this task: its longest text has {tokens}; ask for fewer")
    return low
