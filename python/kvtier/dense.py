"""Dense attention in numpy, and a decoder that keeps its own K/V: the oracle of every test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvtier.gguf_model import Model

__all__ = ["DenseDecoder", "KVRows", "dense_attention"]

F32 = NDArray[np.float32]

# Scores computed at once: small enough to stay in a core's cache share, large enough for BLAS.
_SCORES = 1 << 19


def dense_attention(q: F32, k: F32, v: F32, start: int, scale: float, window: int = 0) -> F32:
    """Causal softmax attention.

    Args:
        q: [n, H, d] at positions [start, start+n).
        k, v: [t, G, d] at positions [0, t), t >= start+n.
        window: 0, or the number of last positions a query sees, its own included.

    Returns:
        [n, H, d].
    """
    n, heads, dim = q.shape
    groups = k.shape[1]
    share = heads // groups
    out = np.empty((n, heads, dim), np.float32)
    total = start + n
    block = max(16, min(n, _SCORES // (share * max(1, min(total, (window or total) + 256)))))
    for first in range(0, n, block):
        last = min(n, first + block)
        rows = last - first
        end = start + last
        begin = max(0, start + first - window + 1) if window else 0
        query = np.arange(start + first, end)[:, None]
        # Only the newest columns can lie after a query, only the oldest before its window.
        diagonal = max(begin, start + first)
        future = np.arange(diagonal, end)[None] > query
        edge = min(end, begin + rows) if window else begin
        past = (query - np.arange(begin, edge)[None]) >= window if window else None
        for group in range(groups):
            part = q[first:last, group * share : (group + 1) * share]
            part = np.ascontiguousarray(part.swapaxes(0, 1)).reshape(share * rows, dim)
            scores = (part * np.float32(scale)) @ k[begin:end, group].T
            cube = scores.reshape(share, rows, end - begin)
            cube[:, :, diagonal - begin :][:, future] = -np.inf
            if past is not None:
                cube[:, :, : edge - begin][:, past] = -np.inf
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            mixed = scores @ v[begin:end, group]
            mixed /= scores.sum(axis=1, keepdims=True)
            out[first:last, group * share : (group + 1) * share] = mixed.reshape(share, rows, dim).swapaxes(0, 1)
    return out


class KVRows:
    """K and V of one layer, [length, G, d] each, in buffers that grow."""

    __slots__ = ("_k", "_v", "length")

    def __init__(self, groups: int, dim: int, capacity: int = 0) -> None:
        # Group-major, so that one head's rows are contiguous for BLAS.
        self._k = np.empty((groups, capacity, dim), np.float32)
        self._v = np.empty((groups, capacity, dim), np.float32)
        self.length = 0

    def append(self, k: F32, v: F32) -> None:
        """Add rows [n, G, d]."""
        end = self.length + len(k)
        if end > self._k.shape[1]:
            capacity = max(512, 1 << (end - 1).bit_length())
            for name in ("_k", "_v"):
                old = getattr(self, name)
                new = np.empty((old.shape[0], capacity, old.shape[2]), np.float32)
                new[:, : self.length] = old[:, : self.length]
                setattr(self, name, new)
        self._k[:, self.length : end] = k.swapaxes(0, 1)
        self._v[:, self.length : end] = v.swapaxes(0, 1)
        self.length = end

    @property
    def k(self) -> F32:
        return self._k[:, : self.length].swapaxes(0, 1)

    @property
    def v(self) -> F32:
        return self._v[:, : self.length].swapaxes(0, 1)

    def copy(self) -> KVRows:
        groups, _, dim = self._k.shape
        other = KVRows(groups, dim, self.length)
        other.append(self.k, self.v)
        return other


class DenseDecoder:
    """A model with its own K/V and exact attention.

    Args:
        model: the weights.
        observe: called as observe(layer, start, q, k, v) for every layer of every chunk.
    """

    def __init__(
        self,
        model: Model,
        observe: Callable[[int, int, F32, F32, F32], None] | None = None,
    ) -> None:
        self.model = model
        self.length = 0
        self._observe = observe
        self._rows = [KVRows(model.config.kv_heads, model.config.head_dim) for _ in range(model.config.layers)]

    def _attend(self, layer: int, q: F32, k: F32, v: F32) -> F32:
        if self._observe is not None:
            self._observe(layer, self.length, q, k, v)
        rows = self._rows[layer]
        rows.append(k, v)
        config = self.model.config
        return dense_attention(q, rows.k, rows.v, self.length, self.model.spec.scale, config.windows[layer])

    def hidden(self, token_ids: Sequence[int] | NDArray[Any]) -> F32:
        """Append tokens (any number, computed at once). Returns the residual stream [n, D]."""
        hidden = self.model.forward(token_ids, self.length, self._attend)
        self.length += len(hidden)
        return hidden

    def prefill(
        self,
        token_ids: Sequence[int] | NDArray[Any],
        chunk: int = 512,
        progress: Callable[[int, int], None] | None = None,
    ) -> F32:
        """Append tokens in chunks. Returns the last one's logits [vocabulary]."""
        if not len(token_ids):
            raise ValueError("no tokens")
        for first in range(0, len(token_ids), chunk):
            hidden = self.hidden(token_ids[first : first + chunk])
            if progress is not None:
                progress(min(first + chunk, len(token_ids)), len(token_ids))
        return self.model.logits(hidden[-1:])[0]

    def step(self, token_id: int) -> F32:
        """Append one token. Returns its logits [vocabulary]."""
        return self.model.logits(self.hidden([token_id]))[0]

    def score(self, token_ids: Sequence[int] | NDArray[Any]) -> F32:
        """Append tokens. Returns all their logits [n, vocabulary]."""
        return self.model.logits(self.hidden(token_ids))

    def generate(self, logits: F32, count: int, stop: Sequence[int] = ()) -> list[int]:
        """Greedy continuation from `logits`: at most `count` tokens, ending before one of `stop`."""
        ids: list[int] = []
        while len(ids) < count and (token := int(np.argmax(logits))) not in stop:
            ids.append(token)
            logits = self.step(token)
        return ids

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length {length} is not in [0, {self.length}]")
        self.length = length
        for rows in self._rows:
            rows.length = length

    def fork(self) -> Self:
        """A decoder that continues from here on its own."""
        other = type(self)(self.model, self._observe)
        other.length = self.length
        other._rows = [rows.copy() for rows in self._rows]
        return other
