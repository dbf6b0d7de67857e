"""Needles in a haystack: eight of RULER's tasks (Hsieh et al., 2024, appendix B, table 5)."""

from __future__ import annotations

import dataclasses
import random
import uuid
from collections.abc import Sequence

from kvtier.bench import haystack
from kvtier.bench.haystack import Count, LengthError
from kvtier.bench.questions import Haystack, Question, vary

__all__ = ["KINDS", "Kind", "at_depths", "needle_sentence"]

_INTRO = (
    "Some special magic {what}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {what}s afterwards.\n"
)
# The first is RULER's own. The others serve where a text has fewer needles than questions.
_ONE = (
    "What is the special magic {what} for {key} mentioned in the provided text?",
    "Which special magic {what} for {key} does the provided text mention?",
    "Tell me the special magic {what} for {key} that was mentioned in the provided text.",
    "According to the provided text, what is the special magic {what} for {key}?",
    "The provided text mentions a special magic {what} for {key}. What is it?",
    "Find the special magic {what} for {key} in the provided text.",
)
_MANY = (
    "What are all the special magic {what}s for {key} mentioned in the provided text?",
    "Which special magic {what}s for {key} does the provided text mention?",
    "Tell me all the special magic {what}s for {key} that were mentioned in the provided text.",
    "According to the provided text, what are the special magic {what}s for {key}?",
    "The provided text mentions special magic {what}s for {key}. What are they?",
    "Find all the special magic {what}s for {key} in the provided text.",
)
_ONE_LEAD = "The special magic {what} for {key} mentioned in the provided text is"
_MANY_LEAD = "The special magic {what}s for {key} mentioned in the provided text are"


def needle_sentence(key: str, value: str, what: str = "number") -> str:
    """RULER's needle."""
    return f"One of the special magic {what}s for {key} is: {value}."


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """A row of RULER's table.

    Attributes:
        hay: "noise", "essay" or "needles".
        key, value: "word", "number" or "uuid".
        keys: keys in the text for each one that is asked for.
        values: values of each key.
        asked: keys in one question.
    """

    name: str
    about: str
    hay: str
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def make(self, length: int, questions: int, facts: int, rng: random.Random, count: Count) -> Haystack:
        """See ``kvtier.bench.tasks.make``."""
        intro = _INTRO.format(what=self.value)
        room = length - count(intro)
        subjects = self._subjects(room, min(facts, questions), rng, count)
        values = {key: tuple(_value(self.value, rng) for _ in range(self.values)) for key in subjects}
        needles = {key: tuple(needle_sentence(key, v, self.value) for v in values[key]) for key in subjects}
        flat = [needle for key in subjects for needle in needles[key]]
        rng.shuffle(flat)
        text = intro + self._text(flat, room, rng, count)
        # A text of nothing but needles holds as many as fit.
        subjects = [key for key in subjects if needles[key][0] in text]
        if self.asked > 1:
            # Any four of the keys make a question of their own.
            groups = _groups(rng, subjects, self.asked, questions)
        else:
            asked = subjects if self.hay == "needles" else subjects[: max(1, len(subjects) // self.keys)]
            groups = [(key,) for key in asked]
        made = []
        for subject, wording in vary(rng, len(groups), len(_ONE), questions):
            group = groups[subject]
            answers = tuple(value for key in group for value in values[key])
            many = len(answers) > 1
            names = {"what": self.value, "key": _listed(group)}
            made.append(
                Question(
                    "\n" + (_MANY if many else _ONE)[wording].format(**names),
                    (_MANY_LEAD if many else _ONE_LEAD).format(**names),
                    answers,
                    tuple(needle for key in group for needle in needles[key]),
                )
            )
        return Haystack(text, tuple(made))

    def _subjects(self, room: int, facts: int, rng: random.Random, count: Count) -> list[str]:
        """The keys: what `facts` asked ones need, but needles fill at most half of a text of something else."""
        example = needle_sentence(_key(self.key, rng), _value(self.value, rng), self.value)
        each = self.values * (count("\n" + example) + 1)
        # Of needles alone surely more than fit: _text takes what does.
        number = 2 * room // each if self.hay == "needles" else min(self._wanted(facts), room // 2 // each)
        if number < max(self.asked, self.keys):
            raise LengthError(f"{room} tokens are too few for this task's needles; ask for more")
        if self.key == "word":
            return haystack.keys(rng, number)
        return [_key(self.key, rng) for _ in range(number)]

    def _wanted(self, facts: int) -> int:
        # Two keys more than one question asks for make 15 different questions.
        return self.asked + 2 if self.asked > 1 else self.keys * facts

    def _text(self, needles: Sequence[str], room: int, rng: random.Random, count: Count) -> str:
        if self.hay == "needles":
            return "\n".join(needles[: haystack.fit(lambda n: "\n".join(needles[:n]), room, count, most=len(needles))])
        return _buried(self.hay, needles, haystack.spread(rng, len(needles)), room, rng, count)


def _key(kind: str, rng: random.Random) -> str:
    return _uuid(rng) if kind == "uuid" else haystack.keys(rng, 1)[0]


def _value(kind: str, rng: random.Random) -> str:
    return _uuid(rng) if kind == "uuid" else str(rng.randint(1_000_000, 9_999_999))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _groups(rng: random.Random, subjects: Sequence[str], size: int, wanted: int) -> list[tuple[str, ...]]:
    groups: dict[frozenset[str], tuple[str, ...]] = {}
    # Few keys have few groups: give up looking for more after a while.
    for _ in range(20 * wanted):
        group = tuple(rng.sample(list(subjects), size))
        groups.setdefault(frozenset(group), group)
        if len(groups) == wanted:
            break
    return list(groups.values())


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def at_depths(kind: Kind, length: int, depths: Sequence[float], rng: random.Random, count: Count) -> Haystack:
    """An essay of at most `length` tokens with a needle at every depth; question i asks for depth i's."""
    intro = _INTRO.format(what=kind.value)
    keys = haystack.keys(rng, len(depths))
    values = [_value(kind.value, rng) for _ in depths]
    needles = [needle_sentence(key, value, kind.value) for key, value in zip(keys, values, strict=True)]
    text = intro + _buried(kind.hay, needles, depths, length - count(intro), rng, count)
    return Haystack(
        text,
        tuple(
            Question(
                "\n" + _ONE[0].format(what=kind.value, key=key),
                _ONE_LEAD.format(what=kind.value, key=key),
                (value,),
                (needle,),
            )
            for key, value, needle in zip(keys, values, needles, strict=True)
        ),
    )


def _buried(
    hay: str, needles: Sequence[str], depths: Sequence[float], room: int, rng: random.Random, count: Count
) -> str:
    """As much noise or essay as `room` tokens hold, with the needles at their depths."""
    separator, units = ("\n", (haystack.NOISE,)) if hay == "noise" else (" ", haystack.prose())
    # Essays begin at a place of their own in every text.
    first = rng.randrange(len(units))

    def text(n: int) -> str:
        return separator.join(haystack.insert([units[(first + i) % len(units)] for i in range(n)], needles, depths))

    return text(haystack.fit(text, room, count))


KINDS = (
    Kind("niah_single_1", "word -> number in repeated noise", "noise"),
    Kind("niah_single_2", "word -> number in essays", "essay"),
    Kind("niah_single_3", "word -> uuid in essays", "essay", value="uuid"),
    Kind("niah_multikey_1", "as single_2, with three more keys for each one asked", "essay", keys=4),
    Kind("niah_multikey_2", "word -> number, the text is needles", "needles"),
    Kind("niah_multikey_3", "uuid -> uuid, the text is needles", "needles", key="uuid", value="uuid"),
    Kind("niah_multivalue", "four numbers of one word in essays", "essay", values=4),
    Kind("niah_multiquery", "the numbers of four words in essays", "essay", asked=4),
)
