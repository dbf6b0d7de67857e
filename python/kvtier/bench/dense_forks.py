"""Dense answers to many questions about one text, at once: what sparse answers are compared with.

The rows of all questions lie behind the text's rows in one buffer, and a mask keeps them apart. So
the layers' matrices are read once for all questions, as for the forks of ``kvtier.bench.forks``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvtier.dense import KVRows
from kvtier.gguf_model import Model

__all__ = ["DenseForks"]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

_TEXT = -1


class DenseForks:
    """Continuations of one text, each of which sees the text and itself.

    Args:
        model: the weights.
        rows: the text's K/V of each layer, kept unchanged but for room behind them.
        forks: how many continuations there are.
    """

    def __init__(self, model: Model, rows: Sequence[KVRows], forks: int) -> None:
        self._model = model
        self._rows = rows
        self._length = rows[0].length
        # Of every row of the buffers: its position, and whose it is.
        self._positions = np.arange(self._length, dtype=np.int64)
        self._owners = np.full(self._length, _TEXT, np.int64)
        self.lengths = np.full(forks, self._length, np.int64)

    def extend(self, tokens: Sequence[tuple[int, Sequence[int]]]) -> list[F32]:
        """Add tokens to forks.

        Args:
            tokens: (fork, its next tokens); a fork occurs once.

        Returns:
            The logits [n, vocabulary] of each entry's last token, as rows; ``hidden`` gives more.
        """
        hidden = self.hidden(tokens)
        ends = np.cumsum([len(ids) for _, ids in tokens]) - 1
        return [*self._model.logits(hidden[ends])]

    def hidden(self, tokens: Sequence[tuple[int, Sequence[int]]]) -> F32:
        """As ``extend``; returns the residual stream of all tokens, entry after entry."""
        owners = np.concatenate([np.full(len(ids), fork, np.int64) for fork, ids in tokens])
        positions = np.concatenate([self.lengths[fork] + np.arange(len(ids)) for fork, ids in tokens])
        self._owners = np.concatenate([self._owners, owners])
        self._positions = np.concatenate([self._positions, positions])

        def attend(layer: int, q: F32, k: F32, v: F32) -> F32:
            self._rows[layer].append(k, v)
            return self._attention(layer, q, owners, positions)

        hidden = self._model.forward([token for _, ids in tokens for token in ids], positions, attend)
        for fork, ids in tokens:
            self.lengths[fork] += len(ids)
        return hidden

    def close(self) -> None:
        """Take the forks' rows away: the text is again as it was."""
        for rows in self._rows:
            rows.length = self._length

    def _attention(self, layer: int, q: F32, owners: I64, positions: I64) -> F32:
        rows, config = self._rows[layer], self._model.config
        window = config.windows[layer]
        # A window needs none of the text before the first position's.
        begin = max(0, int(positions.min()) - window + 1) if window else 0
        n, heads, dim = q.shape
        share = heads // config.kv_heads
        at, whose = self._positions[begin:], self._owners[begin:]
        hidden = (at[None] > positions[:, None]) | ((whose != _TEXT)[None] & (whose[None] != owners[:, None]))
        if window:
            hidden |= positions[:, None] - at[None] >= window
        out = np.empty((n, heads, dim), np.float32)
        scale = np.float32(self._model.spec.scale)
        for head in range(heads):
            group = head // share
            scores = (q[:, head] * scale) @ rows.k[begin:, group].T
            scores[hidden] = -np.inf
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            out[:, head] = (scores @ rows.v[begin:, group]) / scores.sum(axis=1, keepdims=True)
        return out
