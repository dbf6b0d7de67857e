"""One text, read once, and many questions: each is asked of a fork, densely or through the daemon.

Forks take their steps together: the rows of all of them go through a layer at once, and one call
asks the daemon for the attention of all. That changes times, not answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvtier.bench.dense_forks import DenseForks
from kvtier.bf16 import to_bf16
from kvtier.dense import KVRows, dense_attention
from kvtier.types import Account, AttendItem, Budget, Profile
from kvtier.worker import Context, Worker

__all__ = ["Answer", "Script", "answer_densely", "answer_forks", "read"]

F32 = NDArray[np.float32]
Progress = Callable[[int, int], None]

# As Context.prefill samples queries for sealing.
_QUERY_STRIDE = 8
_CHUNK = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Script:
    """What a fork does.

    Attributes:
        question: token ids that it reads, the answer's given first words included.
        limit: most tokens of its answer.
    """

    question: Sequence[int]
    limit: int


@dataclasses.dataclass(slots=True)
class Answer:
    """What came of a script.

    Attributes:
        ids: the answer's tokens, without the one that ended it.
        first: [vocabulary], the logits of the answer's first token.
        account: the sum over all layers and steps; empty for dense answers.
    """

    ids: list[int]
    first: F32
    account: Account = dataclasses.field(default_factory=Account)


def read(
    worker: Worker, ids: Sequence[int], profiles: Sequence[Profile], progress: Progress | None = None
) -> tuple[list[KVRows], list[Context]]:
    """Read a text with dense attention, once: into rows for ``answer_densely``, and into a sealed
    context of each profile.

    What the contexts get is what ``Context.prefill`` would give them. The rows are the same K/V,
    unquantised: answers that differ later differ by what kvtier did.
    """
    model, session = worker.model, worker.session
    config = model.config
    tokens = np.asarray(ids, np.uint64)
    opened = [session.create(model.spec, profile=profile) for profile in profiles]
    rows = [KVRows(config.kv_heads, config.head_dim) for _ in range(config.layers)]
    for start in range(0, len(tokens), _CHUNK):
        part = tokens[start : start + _CHUNK]

        def attend(layer: int, q: F32, k: F32, v: F32, start: int = start, part: NDArray[np.uint64] = part) -> F32:
            window = config.windows[layer]
            sample = None if window else to_bf16(q[::_QUERY_STRIDE])
            for one in opened:
                session.append(
                    one.sequence_id, layer, start, to_bf16(k), to_bf16(v),
                    token_ids=None if layer else part, queries=sample,
                )  # fmt: skip
            rows[layer].append(k, v)
            return dense_attention(q, rows[layer].k, rows[layer].v, start, model.spec.scale, window)

        model.forward(part, start, attend)
        if progress is not None:
            progress(start + len(part), len(tokens))
    contexts = [worker.open(one.sequence_id) for one in opened]
    for context in contexts:
        context.flush(seal=True)
    return rows, contexts


@dataclasses.dataclass(slots=True)
class _Course:
    """How far a script has come."""

    script: Script
    read: int = 0  # tokens of the question that were read
    logits: F32 | None = None  # of the newest token, once the question is read
    first: F32 | None = None
    ids: list[int] = dataclasses.field(default_factory=list)
    accounts: list[Account] = dataclasses.field(default_factory=list)

    def next(self, stop: frozenset[int]) -> int | None:
        """The next step's token; None if it has finished."""
        if self.logits is None:
            return int(self.script.question[self.read])
        token = int(np.argmax(self.logits))
        if token in stop or len(self.ids) >= self.script.limit:
            return None
        self.ids.append(token)
        return token

    def took(self, tokens: int) -> bool:
        """Note that so many tokens were read or generated. Returns whether their logits are needed."""
        self.read = min(self.read + tokens, len(self.script.question))
        return self.read == len(self.script.question)

    def saw(self, logits: F32) -> None:
        self.logits = logits
        if self.first is None:
            self.first = logits

    def answer(self) -> Answer:
        assert self.first is not None
        return Answer(self.ids, self.first, Account.total(self.accounts))


def answer_densely(
    worker: Worker, rows: Sequence[KVRows], scripts: Sequence[Script], stop: frozenset[int]
) -> list[Answer]:
    """Every script's answer by dense attention over the text's `rows` (of ``read``)."""
    courses = [_Course(script) for script in scripts]
    forks = DenseForks(worker.model, rows, len(scripts))
    try:
        chosen: list[tuple[int, Sequence[int]]] = [(i, script.question) for i, script in enumerate(scripts)]
        while chosen:
            for (index, ids), logits in zip(chosen, forks.extend(chosen), strict=True):
                courses[index].took(len(ids))
                courses[index].saw(logits)
            chosen = [(i, [token]) for i, _ in chosen if (token := courses[i].next(stop)) is not None]
    finally:
        forks.close()
    return [course.answer() for course in courses]


def answer_forks(
    worker: Worker,
    context: Context,
    scripts: Sequence[Script],
    budget: Budget,
    stop: frozenset[int],
    *,
    whole_question: bool = False,
    progress: Progress | None = None,
) -> list[Answer]:
    """Ask every script's question of a fork of its own of `context`; the forks are deleted afterwards.

    Args:
        whole_question: read the question in one call instead of token by token. A call of n
            positions may read n times a budget, so this is only for budgets that read everything.
        progress: called as progress(steps done, steps at most).
    """
    forks = [context.fork() for _ in scripts]
    courses = [_Course(script) for script in scripts]
    most = max(script.limit + (0 if whole_question else len(script.question)) for script in scripts)
    try:
        for fork, course in zip(forks, courses, strict=True) if whole_question else ():
            course.saw(fork.extend(course.script.question, budget))
            course.took(len(course.script.question))
            course.accounts += fork.accounts
        active = list(zip(forks, courses, strict=True))
        done = 0
        while active:
            chosen = [(fork, course, course.next(stop)) for fork, course in active]
            running = [(fork, course, token) for fork, course, token in chosen if token is not None]
            if running:
                _step(worker, running, budget)
            active = [(fork, course) for fork, course, _ in running]
            done += 1
            if progress is not None:
                progress(done, most)
    finally:
        for fork in forks:
            fork.delete()
    return [course.answer() for course in courses]


def _step(worker: Worker, running: Sequence[tuple[Context, _Course, int]], budget: Budget) -> None:
    """One token more for each fork."""
    tokens = [token for _, _, token in running]
    positions = np.array([fork.length for fork, _, _ in running], np.int64)

    def attend(layer: int, q: F32, k: F32, v: F32) -> F32:
        items = [
            AttendItem(
                fork.sequence_id, fork.length, q[i : i + 1], k[i : i + 1], v[i : i + 1],
                token_ids=None if layer else [token],
            )
            for i, (fork, _, token) in enumerate(running)
        ]  # fmt: skip
        results = worker.session.attend_many(layer, items, budget=budget)
        for (_, course, _), result in zip(running, results, strict=True):
            if result.error is not None:
                raise result.error
            course.accounts.append(result.account)
        return np.concatenate([result.output for result in results])

    hidden = worker.model.forward(tokens, positions, attend)
    for fork, _, _ in running:
        fork.length += 1
    # Most of a question's tokens need no logits, which cost as much as several layers.
    asked = [index for index, (_, course, _) in enumerate(running) if course.took(1)]
    if asked:
        for index, logits in zip(asked, worker.model.logits(hidden[asked]), strict=True):
            running[index][1].saw(logits)
