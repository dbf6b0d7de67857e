"""Real rows and queries of a model over a text, and how they are handed to a daemon.

The model reads the text once, densely. Its rows are then appended as a worker's would be, and its
queries asked, under as many budgets as one likes, without running the model again. Layers with a
sliding window take no part: the daemon answers them exactly.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvtier.bf16 import to_bf16
from kvtier.dense import DenseDecoder
from kvtier.gguf_model import Model
from kvtier.session import Session
from kvtier.types import ModelSpec

__all__ = ["Stream", "fill", "record"]

# One query in eight of the prefix goes with its rows, as kvtier.worker does it.
_QUERY_STRIDE = 8
_CHUNK = 512
# Grouping a long context on a busy machine takes a while.
_SEAL_SECONDS = 900.0


@dataclasses.dataclass(slots=True)
class Stream:
    """What a model's full-attention layers computed over a text of n tokens, s of them the prefix.

    Attributes:
        spec: of these layers alone.
        layers: their numbers in the model.
        prefix: s.
        k, v: [layers][n, G, d], bfloat16 bits.
        sampled: [layers][ceil(s / 8), H, d], queries of the prefix, bfloat16 bits.
        q: [layers][n - s, H, d] float32, every query after the prefix.
    """

    spec: ModelSpec
    layers: list[int]
    prefix: int
    k: list[NDArray[np.uint16]]
    v: list[NDArray[np.uint16]]
    sampled: list[NDArray[np.uint16]]
    q: list[NDArray[np.float32]]


def record(
    model: Model, token_ids: Sequence[int], prefix: int, progress: Callable[[int, int], None] | None = None
) -> Stream:
    """Read `token_ids` with exact attention; the first `prefix` of them, a multiple of 512, are the prefix."""
    if prefix % _CHUNK or not 0 < prefix < len(token_ids):
        raise ValueError(f"a prefix of {prefix} tokens: it must be a multiple of {_CHUNK}, with tokens after it")
    layers = [layer for layer, window in enumerate(model.config.windows) if not window]
    parts: dict[int, list[tuple[NDArray[np.float32], ...]]] = {layer: [] for layer in layers}

    def observe(layer: int, start: int, q: NDArray[np.float32], k: NDArray[np.float32], v: NDArray[np.float32]) -> None:
        if layer in parts:
            # A chunk lies on one side of the prefix's end, which is a multiple of its size.
            kept = to_bf16(q[::_QUERY_STRIDE]) if start < prefix else q.copy()
            parts[layer].append((kept, to_bf16(k), to_bf16(v)))

    DenseDecoder(model, observe).prefill(token_ids, _CHUNK, progress)
    stream = Stream(dataclasses.replace(model.spec, layers=len(layers), sliding_windows=()), layers, prefix, [], [], [], [])
    chunks = prefix // _CHUNK
    for layer in layers:
        rows = parts.pop(layer)
        stream.k.append(np.concatenate([k for _, k, _ in rows]))  # type: ignore[arg-type]
        stream.v.append(np.concatenate([v for _, _, v in rows]))  # type: ignore[arg-type]
        stream.sampled.append(np.concatenate([q for q, _, _ in rows[:chunks]]))  # type: ignore[arg-type]
        stream.q.append(np.concatenate([q for q, _, _ in rows[chunks:]]))
    return stream


def fill(session: Session, stream: Stream, name: str) -> str:
    """Append the prefix as a new sequence and seal all of it but the recent window. Returns its id."""
    sequence_id = session.create(stream.spec, name=name).sequence_id
    for start in range(0, stream.prefix, _CHUNK):
        end = min(start + _CHUNK, stream.prefix)
        for layer in range(len(stream.layers)):
            sampled = stream.sampled[layer][start // _QUERY_STRIDE : end // _QUERY_STRIDE]
            session.append(
                sequence_id, layer, start, stream.k[layer][start:end], stream.v[layer][start:end], queries=sampled
            )
    while session.flush(sequence_id, seal=True, timeout=_SEAL_SECONDS).sealed < stream.prefix - _CHUNK:
        time.sleep(0.2)
    return sequence_id
