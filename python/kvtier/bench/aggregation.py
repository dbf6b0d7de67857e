"""Tracing and aggregation: RULER's vt, cwe and fwe (Hsieh et al., 2024, sections 3.2 and 3.3)."""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Sequence

from kvtier.bench import haystack
from kvtier.bench.haystack import Count, LengthError
from kvtier.bench.questions import Haystack, Question, vary

__all__ = ["cwe", "fwe", "vt"]

_HOPS = 4  # assignments after a chain's first: five names
_COMMON = 10
_CODED_LETTERS = 6
_ALPHA = 2.0
# Below this length RULER repeats common words 6 times and others once, above 30 and 3 times.
_LONG = 4096


def vt(length: int, questions: int, facts: int, rng: random.Random, count: Count) -> Haystack:
    """Variable tracking: chains of five names in noise; which names have a value?

    The introduction holds one solved example, as RULER's prompt does.
    """
    intro = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
        + _vt_example()
        + "\nMemorize and track the chain(s) of variable assignment hidden in the following text.\n"
    )
    room = length - count(intro)
    # Chains fill at most half of the text.
    each = count(" ".join(_chain(random.Random(1))[1])) + _HOPS + 1
    number = min(facts, questions, room // 2 // each)
    if number < 1:
        raise LengthError(f"{length} tokens are too few for a chain of {_HOPS + 1} assignments; ask for more")
    chains = [_chain(rng) for _ in range(number)]
    needles = [assignment for _, assignments, _ in chains for assignment in assignments]
    # An assignment follows the one it refers to: the depths of each chain ascend.
    depths = [depth for _ in chains for depth in sorted(rng.sample(haystack.DEPTHS, _HOPS + 1))]

    def text(n: int) -> str:
        return intro + "\n".join(haystack.insert([haystack.NOISE] * n, needles, depths))

    made = []
    for subject, wording in vary(rng, number, len(_VT_WORDS), questions):
        value, assignments, names = chains[subject]
        lead = (
            "According to the chain(s) of variable assignment in the text above, "
            f"{_HOPS + 1} variables are assigned the value {value}, they are:"
        )
        made.append(
            Question("\nQuestion: " + _VT_WORDS[wording].format(value=value), lead, tuple(names), tuple(assignments))
        )
    return Haystack(text(haystack.fit(text, length, count)), tuple(made))


_VT_WORDS = (
    "Find all variables that are assigned the value {value} in the text above.",
    "Which variables are assigned the value {value} in the text above?",
    "List all variables that have the value {value} in the text above.",
    "In the text above, which variables hold the value {value}?",
    "Name every variable that is assigned the value {value} in the text above.",
    "What are the variables with the value {value} in the text above?",
)


def _chain(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """(value, assignments, names)."""
    value = str(rng.randint(10_000, 99_999))
    names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(_HOPS + 1)]
    assignments = [f"VAR {names[0]} = {value}."]
    assignments += [f"VAR {name} = VAR {before}." for before, name in itertools.pairwise(names)]
    return value, assignments, names


def _vt_example() -> str:
    value, assignments, names = _chain(random.Random(7))
    return (
        "\n".join(haystack.insert([haystack.NOISE] * 3, assignments, [0.1, 0.3, 0.5, 0.7, 0.9]))
        + f"\nQuestion: {_VT_WORDS[0].format(value=value)} Answer: According to the chain(s) of variable assignment "
        f"in the text above, {_HOPS + 1} variables are assigned the value {value}, they are: {', '.join(names)}.\n"
    )


# One question, in 24 wordings.
_CWE_WORDS = tuple(
    f"{begin} {middle} {end}"
    for begin in (
        "What are the 10 most common words",
        "Which 10 words are the most common",
        "Name the 10 most common words",
        "List the 10 words that appear most often",
    )
    for middle in ("in the above", "of the above", "in the given")
    for end in ("list?", "numbered list?")
)
_FWE_WORDS = tuple(
    f"{begin} {middle} {end}?"
    for begin in (
        "What are the three most frequently appeared words",
        "Which three words appear most often",
        "What are the three most common words",
        "Which three words are the most frequent",
    )
    for middle in ("in the above", "in the given", "within the above")
    for end in ("coded text", "text")
)


def cwe(length: int, questions: int, _facts: int, rng: random.Random, count: Count) -> Haystack:
    """Common words: ten words are repeated 30 times (6 below 4,096 tokens), all others 3 times (once).

    A solved example of 20 words comes first (RULER's one shot).
    """
    often, seldom = (30, 3) if length >= _LONG else (6, 1)
    words = rng.sample(haystack.vocabulary(), len(haystack.vocabulary()))
    example_words, words = words[:_COMMON], words[_COMMON:]
    # The example is about words that the list itself does not have.
    shown = _numbered(random.Random(3), example_words[:4], 3, example_words[4:], 1)
    intro = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    head = (
        f"{intro}{shown}\nQuestion: What are the 4 most common words in the above list? "
        f"Answer: The top 4 words that appear most often in the list are: {_ranked(example_words[:4])}\n\n{intro}"
    )
    common, others = words[:_COMMON], words[_COMMON:]
    order = rng.random()

    def text(n: int) -> str:
        # The same order for any n, so that the text grows with it.
        return head + _numbered(random.Random(order), common, often, others[:n], seldom)

    size = haystack.fit(text, length, count, most=len(others))
    lead = f"The top {_COMMON} words that appear most often in the list are: 1."
    made = [
        Question("\nQuestion: " + _CWE_WORDS[wording], lead, tuple(common))
        for _, wording in vary(rng, 1, len(_CWE_WORDS), questions)
    ]
    return Haystack(text(size), tuple(made))


def _numbered(rng: random.Random, common: Sequence[str], often: int, others: Sequence[str], seldom: int) -> str:
    words = [word for word in common for _ in range(often)] + [word for word in others for _ in range(seldom)]
    rng.shuffle(words)
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _ranked(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def fwe(length: int, questions: int, _facts: int, rng: random.Random, count: Count) -> Haystack:
    """Frequent words: coded words whose frequencies follow a zeta distribution; the most frequent is dots."""
    size = max(20, length // 50)
    # A set would come in another order in every process: keep that of drawing.
    drawn = dict.fromkeys("".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS)) for _ in range(2 * size))
    words = ["...", *list(drawn)[: size - 1]]
    intro = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    order = rng.random()

    def text(n: int) -> str:
        shares = [rank**-_ALPHA * 6 / math.pi**2 for rank in range(1, len(words) + 1)]  # zeta(2) = pi^2/6
        coded = [word for word, share in zip(words, shares, strict=True) for _ in range(int(n * share))]
        random.Random(order).shuffle(coded)
        return intro + " ".join(coded)

    # Fewer would leave the fourth word as frequent as the third.
    size = haystack.fit(text, length, count, least=100)
    lead = "According to the coded text above, the three most frequently appeared words are:"
    explain = "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    made = [
        Question(explain + _FWE_WORDS[wording], lead, tuple(words[1:4]))
        for _, wording in vary(rng, 1, len(_FWE_WORDS), questions)
    ]
    return Haystack(text(size), tuple(made))
