"""What others would read of a sealed body, at equal bytes and from the same 4-bit codes.

A comparator chooses tokens of one KV head for one query position. The chosen tokens and the exact
zone (first tokens, open tail) are attended; what was not chosen is dropped and the rest
renormalised, as these methods do it.

Bytes are counted in the comparators' favour: exactly the bytes of what is read, with no cache
lines, no steps of the keys and no padding; see each one for its index.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK", "COMPARATORS", "Body", "Choice", "Comparator", "answer", "attention", "block_scores_quest"]

F32 = NDArray[np.float32]
Indices = NDArray[np.intp]

BLOCK = 16  # consecutive tokens that block methods read together


@dataclasses.dataclass(frozen=True)
class Body:
    """One KV head's sealed tokens, in order of position, as the daemon decodes them.

    Attributes:
        k, v: [t, d].
    """

    k: F32
    v: F32

    @property
    def token_bytes(self) -> int:
        """Bytes of a token: 4 bits for each channel of K and V, and 3 bytes of the value's scale."""
        return int(self.k.shape[1]) + 3

    @property
    def full_bytes(self) -> int:
        """Bytes of all tokens, as the daemon's account counts them in ``bytes_full``."""
        return len(self.k) * self.token_bytes

    @property
    def blocks(self) -> int:
        """Blocks of consecutive tokens; the last may be short."""
        return -(-len(self.k) // BLOCK)

    @functools.cached_property
    def least(self) -> F32:
        """[blocks, d]: each channel's least key."""
        least: F32 = np.minimum.reduceat(self.k, self._starts)
        return least

    @functools.cached_property
    def most(self) -> F32:
        """[blocks, d]: each channel's largest key."""
        most: F32 = np.maximum.reduceat(self.k, self._starts)
        return most

    @functools.cached_property
    def mean(self) -> F32:
        """[blocks, d]: mean keys."""
        lengths = np.diff([*self._starts, len(self.k)])[:, None].astype(np.float32)
        return (np.add.reduceat(self.k, self._starts) / lengths).astype(np.float32)

    @property
    def _starts(self) -> NDArray[np.int64]:
        return np.arange(0, len(self.k), BLOCK)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """Tokens to read, ascending, and what choosing and reading them transfers."""

    tokens: Indices
    bytes: float


# (scaled queries [g, d], body, exact zone's keys [z, d], bytes that may be transferred) -> choice.
Comparator = Callable[[F32, Body, F32, float], Choice]


def attention(q: F32, k: F32, v: F32) -> F32:
    """Softmax attention of scaled queries q [g, d] over k, v [t, d]. Returns [g, d]."""
    weights = _softmax(q @ k.T)
    return (weights @ v).astype(np.float32, copy=False)


def answer(comparator: Comparator, q: F32, body: Body, zone: tuple[F32, F32], budget: float) -> tuple[F32, float]:
    """A comparator's attention output [g, d] for scaled queries q [g, d], and the bytes it moved.

    Args:
        zone: keys and values [z, d] that are attended in any case and cost nothing here.
        budget: bytes that may be transferred of the body.
    """
    zone_k, zone_v = zone
    choice = comparator(q, body, zone_k, budget)
    k = np.concatenate([body.k[choice.tokens], zone_k])
    v = np.concatenate([body.v[choice.tokens], zone_v])
    return attention(q, k, v), choice.bytes


def oracle(q: F32, body: Body, zone_k: F32, budget: float) -> Choice:
    """The tokens of the largest weight, summed over the group; it is told the weights for nothing."""
    scores = np.concatenate([q @ body.k.T, q @ zone_k.T], axis=1)
    weights = _softmax(scores)[:, : len(body.k)].sum(axis=0)
    tokens = _top(weights, int(budget / body.token_bytes))
    return Choice(tokens, len(tokens) * body.token_bytes)


def window(q: F32, body: Body, zone_k: F32, budget: float) -> Choice:
    """The newest tokens (StreamingLLM: sinks, which are in the zone, and a window; Xiao et al., 2023)."""
    count = min(len(body.k), int(budget / body.token_bytes))
    return Choice(np.arange(len(body.k) - count, len(body.k)), count * body.token_bytes)


def block_scores_quest(q: F32, body: Body) -> F32:
    """Upper bounds [g, blocks] of scores, from each channel's least and largest key in a block.

    Quest, Tang et al., 2024, algorithm 1: the sum over channels of max(q least, q most), here as
    one product for the positive and one for the negative part of q.
    """
    return (np.maximum(q, 0) @ body.most.T + np.minimum(q, 0) @ body.least.T).astype(np.float32, copy=False)


def quest(q: F32, body: Body, zone_k: F32, budget: float) -> Choice:
    """Blocks by Quest's bounds. Its index: two bounds of 1 byte a channel for every block."""
    return _blocks(block_scores_quest(q, body), body, budget, 2 * body.k.shape[1])


def quest_free(q: F32, body: Body, zone_k: F32, budget: float) -> Choice:
    """Blocks by Quest's bounds, and the bounds cost nothing."""
    return _blocks(block_scores_quest(q, body), body, budget, 0)


def block_means(q: F32, body: Body, zone_k: F32, budget: float) -> Choice:
    """Blocks by the score of their mean key. Its index: a mean of 1 byte a channel for every block."""
    return _blocks(q @ body.mean.T, body, budget, body.k.shape[1])


COMPARATORS: dict[str, Comparator] = {
    "oracle": oracle,
    "quest": quest,
    "quest-free": quest_free,
    "block-means": block_means,
    "window": window,
}


def _blocks(scores: F32, body: Body, budget: float, summary_bytes: int) -> Choice:
    """The best blocks for what the summaries leave of the budget; queries of a group are compared
    by the largest share that one of them gives to a block."""
    left = budget - body.blocks * summary_bytes
    if left < 0:
        # Not even the index can be read, so nothing is known and nothing is chosen.
        return Choice(np.empty(0, np.intp), 0.0)
    # Float64: in float32 the shares of a sharp head's other blocks would all be 0, and equal.
    rank = _softmax(scores.astype(np.float64)).max(axis=0)
    blocks = _top(rank, int(left / (BLOCK * body.token_bytes)))
    tokens = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    tokens = tokens[tokens < len(body.k)]
    return Choice(tokens, body.blocks * summary_bytes + len(tokens) * body.token_bytes)


def _top(rank: NDArray[Any], count: int) -> Indices:
    """Indices of the `count` largest, ascending."""
    if count >= len(rank):
        return np.arange(len(rank))
    if count <= 0:
        return np.empty(0, np.intp)
    return np.sort(np.argpartition(rank, len(rank) - count)[len(rank) - count :])


def _softmax(scores: NDArray[Any]) -> NDArray[Any]:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
