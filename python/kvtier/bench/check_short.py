"""Short contexts at the daemon's default settings: are they read whole, and how near is that to dense?"""

from __future__ import annotations

import dataclasses

import numpy as np

from kvtier.bench.dense_forks import DenseForks
from kvtier.bench.forks import Script, answer_densely, read
from kvtier.bench.questions import Haystack
from kvtier.bench.rig import Rig
from kvtier.bench.stats import kl_divergence
from kvtier.types import AttendMode, Profile

__all__ = ["PROFILES", "Closeness", "check"]

PROFILES = {"exact": Profile.EXACT, "neutral": Profile.NEUTRAL}


@dataclasses.dataclass(slots=True)
class Closeness:
    """How far a profile's logits are from dense ones, over all questions of one text.

    Attributes:
        positions: answer positions compared.
        kl_first: largest KL of an answer's first token, nats.
        kl_mean, kl_all: mean and largest KL of all answer tokens, the dense answer's tokens being forced.
        logit: largest difference of any logit.
        whole: whether every answer came from everything stored.
    """

    task: str
    length: int
    tokens: int
    sealed: int
    profile: str
    positions: int = 0
    kl_first: float = 0.0
    kl_mean: float = 0.0
    kl_all: float = 0.0
    logit: float = 0.0
    whole: bool = True


def check(rig: Rig, hay: Haystack, task: str, length: int, answer_tokens: int) -> list[Closeness]:
    """Ask a text's questions with the default budget of contexts of each profile."""
    worker, model = rig.worker, rig.worker.model
    prompt = rig.prompt(hay.text)
    rows, contexts = read(worker, prompt, [*PROFILES.values()])
    results = [
        Closeness(task, length, len(prompt), context.ack.sealed, name)
        for name, context in zip(PROFILES, contexts, strict=True)
    ]
    scripts = [Script(rig.question(q), rig.limit(q, answer_tokens)) for q in hay.questions]
    answers = answer_densely(worker, rows, scripts, rig.stop(hay.questions[0]))
    for script, answer in zip(scripts, answers, strict=True):
        forced = [*script.question, *answer.ids]
        first = len(script.question) - 1
        dense = DenseForks(model, rows, 1)
        exact = model.logits(dense.hidden([(0, forced)])[first:])
        dense.close()
        for result, context in zip(results, contexts, strict=True):
            fork = context.fork()
            try:
                other = fork.extend(forced, all_logits=True)[first:]
                result.whole &= all(account.mode == AttendMode.EXACT for account in fork.accounts)
            finally:
                fork.delete()
            kl = kl_divergence(exact, other)
            result.positions += len(kl)
            result.kl_mean += (float(kl.mean()) - result.kl_mean) * len(kl) / result.positions
            result.kl_first = max(result.kl_first, float(kl[0]))
            result.kl_all = max(result.kl_all, float(kl.max()))
            result.logit = max(result.logit, float(np.abs(exact - other).max()))
    for context in contexts:
        context.delete()
    return results
