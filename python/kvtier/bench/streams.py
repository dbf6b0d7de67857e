"""Ways of attending to one context, step by step: exactly, by the daemon, by a comparator.

A stream holds K and V of what it is fed itself, so that each lives with its own errors. Streams
that are fed the same tokens go through the model together (``feed``), which reads the weights once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvtier.bench.comparators import Body, Comparator, answer
from kvtier.bf16 import from_bf16, to_bf16
from kvtier.dense import KVRows, dense_attention
from kvtier.gguf_model import Model
from kvtier.session import Session
from kvtier.types import Account, Budget

__all__ = ["ComparatorStream", "DaemonStream", "ExactStream", "Sealed", "Stream", "feed", "prefill", "read_sealed"]

F32 = NDArray[np.float32]

# As the worker samples them: one query in eight tells the daemon how tokens are seen.
_QUERY_STRIDE = 8
_READ_ROWS = 4096


class Stream(Protocol):
    """One way of attending.

    Attributes:
        moved: bytes of the sealed body (transferred, all at 4 bits), for each call over one.
    """

    moved: list[tuple[float, float]]

    def attend(self, layer: int, position: int, token_id: int, q: F32, k: F32, v: F32) -> F32:
        """Take a token's k, v [1, G, d] and answer its queries q [1, H, d]: [1, H, d]."""
        ...


def prefill(
    model: Model,
    session: Session,
    sequence_ids: Sequence[str],
    token_ids: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
    chunk: int = 512,
) -> tuple[list[KVRows], F32]:
    """Read a text densely, once, and append its K/V to several empty sequences.

    Returns:
        Each layer's rows, and the last token's logits [vocabulary].
    """
    config = model.config
    rows = [KVRows(config.kv_heads, config.head_dim) for _ in range(config.layers)]
    ids = np.asarray(token_ids, np.uint64)

    def attend(layer: int, q: F32, k: F32, v: F32) -> F32:
        start, window = rows[layer].length, config.windows[layer]
        k16, v16 = to_bf16(k), to_bf16(v)
        queries = None if window else to_bf16(q[::_QUERY_STRIDE])
        for sequence in sequence_ids:
            session.append(sequence, layer, start, k16, v16, queries=queries,
                           token_ids=ids[start : start + len(q)] if layer == 0 else None)  # fmt: skip
        rows[layer].append(k, v)
        return dense_attention(q, rows[layer].k, rows[layer].v, start, model.spec.scale, window)

    last: F32 | None = None
    for first in range(0, len(ids), chunk):
        last = model.forward(ids[first : first + chunk], first, attend)[-1:]
        if progress is not None:
            progress(min(first + chunk, len(ids)), len(ids))
    if last is None:
        raise ValueError("no tokens")
    return rows, model.logits(last)[0]


class ExactStream:
    """Dense attention over unquantised K/V: the truth that the others are held against.

    Args:
        rows: each layer's rows; they are extended in place.
    """

    def __init__(self, model: Model, rows: list[KVRows]) -> None:
        self._model, self._rows = model, rows
        self.moved: list[tuple[float, float]] = []

    def attend(self, layer: int, position: int, token_id: int, q: F32, k: F32, v: F32) -> F32:
        rows = self._rows[layer]
        rows.append(k, v)
        window = self._model.config.windows[layer]
        return dense_attention(q, rows.k, rows.v, rows.length - 1, self._model.spec.scale, window)


class DaemonStream:
    """Attention delegated to the daemon.

    Attributes:
        accounts: those of all calls of layers with a sealed body, in order.
        last: bytes that each layer's last call transferred.
        sealed: tokens that were sealed at the last call; -1 before the first.
    """

    def __init__(self, session: Session, sequence_id: str, budget: Budget) -> None:
        self._session, self._sequence, self._budget = session, sequence_id, budget
        self.accounts: list[Account] = []
        self.moved: list[tuple[float, float]] = []
        self.last: dict[int, float] = {}
        self.sealed = -1

    def attend(self, layer: int, position: int, token_id: int, q: F32, k: F32, v: F32) -> F32:
        result = self._session.attend(
            self._sequence, layer, position, q, k=k, v=v,
            token_ids=[token_id] if layer == 0 else None, budget=self._budget,
        )  # fmt: skip
        self.sealed = result.ack.sealed
        account = result.account
        if account.bytes_full:
            self.accounts.append(account)
            self.moved.append((account.bytes_sealed, account.bytes_full))
            self.last[layer] = account.bytes_sealed
        return result.output


@dataclasses.dataclass(frozen=True, slots=True)
class Sealed:
    """What the daemon's balanced codes say of a sealed span, and where it lies.

    Attributes:
        bodies: for each layer that attends to everything, a Body for each KV head.
        begin, end: the body's positions: behind the first tokens, which stay unquantised.
    """

    bodies: dict[int, list[Body]]
    begin: int
    end: int


def read_sealed(session: Session, sequence_id: str, model: Model, begin: int, end: int) -> Sealed:
    """Read positions [begin, end) back as the daemon decodes them."""
    config = model.config
    bodies = {}
    for layer in (layer for layer, window in enumerate(config.windows) if not window):
        k = np.empty((config.kv_heads, end - begin, config.head_dim), np.float32)
        v = np.empty_like(k)
        for first in range(begin, end, _READ_ROWS):
            count = min(_READ_ROWS, end - first)
            k16, v16, _ = session.client.read_kv(sequence_id, layer, first, count)
            at = slice(first - begin, first - begin + count)
            k[:, at], v[:, at] = from_bf16(k16).swapaxes(0, 1), from_bf16(v16).swapaxes(0, 1)
        bodies[layer] = [Body(k[group], v[group]) for group in range(config.kv_heads)]
    return Sealed(bodies, begin, end)


class ComparatorStream:
    """A comparator over the sealed body, and exact attention over what the daemon keeps exact.

    Args:
        rows: each layer's prefilled rows, of which the exact zone is copied.
        share: of the body's 4-bit bytes, what each call may transfer ...
        like: ... unless this stream, fed before it at each layer, says how much it transferred.
    """

    def __init__(
        self,
        model: Model,
        rows: Sequence[KVRows],
        sealed: Sealed,
        comparator: Comparator,
        share: float,
        like: DaemonStream | None = None,
    ) -> None:
        self._model, self._sealed, self._comparator = model, sealed, comparator
        self._share, self._like = share, like
        self.moved: list[tuple[float, float]] = []
        self._zones = [_zone(row, window, sealed) for row, window in zip(rows, model.config.windows, strict=True)]

    def attend(self, layer: int, position: int, token_id: int, q: F32, k: F32, v: F32) -> F32:
        zone, config, scale = self._zones[layer], self._model.config, self._model.spec.scale
        zone.append(k, v)
        if config.windows[layer]:
            return dense_attention(q, zone.k, zone.v, zone.length - 1, scale, config.windows[layer])
        bodies = self._sealed.bodies[layer]
        full = sum(body.full_bytes for body in bodies)
        may = self._like.last[layer] if self._like is not None else self._share * full
        group_heads = config.query_heads // config.kv_heads
        out, moved = np.empty_like(q), 0.0
        for group, body in enumerate(bodies):
            heads = slice(group * group_heads, (group + 1) * group_heads)
            out[0, heads], bytes_read = answer(
                self._comparator, q[0, heads] * np.float32(scale), body,
                (zone.k[:, group], zone.v[:, group]), may / len(bodies),
            )  # fmt: skip
            moved += bytes_read
        self.moved.append((moved, full))
        return out


def _zone(rows: KVRows, window: int, sealed: Sealed) -> KVRows:
    """The rows that stay exact: a window's, or the first tokens and the open tail."""
    k, v = rows.k, rows.v
    zone = KVRows(k.shape[1], k.shape[2])
    if window:
        zone.append(k[-window:], v[-window:])
    else:
        zone.append(k[: sealed.begin], v[: sealed.begin])
        zone.append(k[sealed.end :], v[sealed.end :])
    return zone


def feed(model: Model, streams: Sequence[Stream], token_id: int, position: int) -> F32:
    """Feed one token to all streams. Returns their logits [streams, vocabulary]."""
    n = len(streams)

    def attend(layer: int, q: F32, k: F32, v: F32) -> F32:
        out = np.empty_like(q)
        for i, stream in enumerate(streams):
            row = slice(i, i + 1)
            out[row] = stream.attend(layer, position, token_id, q[row], k[row], v[row])
        return out

    return model.logits(model.forward(np.full(n, token_id), np.full(n, position), attend))
