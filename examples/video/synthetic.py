"""A SYNTHETIC video: frames as embeddings, and an attention layer's projections of them.

No camera and no model is involved. A real pipeline has a vision encoder where ``Video`` is, and a
trained model where ``Projection`` is; what the daemon sees has the same form: content ids, keys
with RoPE, values, queries.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Projection", "Shot", "Video"]

F32 = NDArray[np.float32]

EMBEDDING = 128  # dimensions of a patch's embedding
SCENES = 24
EVENT_SECONDS = 4.0


@dataclasses.dataclass(frozen=True, slots=True)
class Shot:
    """Consecutive frames [first, last) of one scene; scenes come back, as places in a film do."""

    number: int
    scene: int
    first: int
    last: int


def _unit(x: F32) -> F32:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Video:
    """Frames of patches. A patch's embedding is its scene, where it lies in the frame, a slow
    drift within the shot, and noise; the event takes a quarter of the patches for four seconds.

    Args:
        frames: how many.
        fps: frames in a second.
        patches: tokens of one frame.
        event_at: second at which the event begins.
        seed: equal seeds give equal videos.
    """

    def __init__(self, frames: int, fps: float, patches: int, event_at: float, seed: int) -> None:
        self.frames, self.fps, self.patches, self.seed = frames, fps, patches, seed
        rng = np.random.default_rng(seed)
        self.scenes = _unit(rng.standard_normal((SCENES, EMBEDDING)).astype(np.float32))
        self.places = _unit(rng.standard_normal((patches, EMBEDDING)).astype(np.float32))
        self.event = _unit(rng.standard_normal(EMBEDDING).astype(np.float32))
        # What the question is asked with has a key, too; it is like nothing that is shown.
        self.question = _unit(rng.standard_normal(EMBEDDING).astype(np.float32))
        self.event_frames = range(int(event_at * fps), min(frames, int(np.ceil((event_at + EVENT_SECONDS) * fps))))
        self.shots: list[Shot] = []
        first = 0
        while first < frames:
            others = [s for s in range(SCENES) if not self.shots or s != self.shots[-1].scene]
            last = min(frames, first + max(1, round(rng.uniform(5, 25) * fps)))
            self.shots.append(Shot(len(self.shots) + 1, int(rng.choice(others)), first, last))
            first = last

    @property
    def tokens(self) -> int:
        return self.frames * self.patches

    def shot_at(self, frame: int) -> Shot:
        """The shot that a frame belongs to."""
        return next(shot for shot in self.shots if shot.first <= frame < shot.last)

    def embeddings(self, first: int, last: int) -> F32:
        """Unit vectors [(last - first) * patches, EMBEDDING] of frames [first, last)."""
        return np.concatenate([self._frame(index) for index in range(first, last)])

    def _frame(self, index: int) -> F32:
        # Each frame has a generator of its own, so that frames can be made in any order.
        rng = np.random.default_rng((self.seed, index))
        shot = self.shot_at(index)
        drift = np.random.default_rng((self.seed, -1 & 0xFFFF, shot.number)).standard_normal(EMBEDDING)
        noise = rng.standard_normal((self.patches, EMBEDDING)) / np.sqrt(EMBEDDING)
        along = (index - shot.first) / max(1, shot.last - shot.first)
        x = self.scenes[shot.scene] + 0.5 * self.places + 0.4 * noise + 0.3 * along * drift / np.sqrt(EMBEDDING)
        if index in self.event_frames:
            taken = slice(0, max(1, self.patches // 4))
            x[taken] = self.event + 0.3 * self.scenes[shot.scene] + 0.3 * self.places[taken] + 0.4 * noise[taken]
        return _unit(x.astype(np.float32))

    @staticmethod
    def content_ids(embeddings: F32) -> NDArray[np.uint64]:
        """An opaque 64-bit id for each row: a digest of what is shown. Equal content has equal ids,
        so that a video that was read once is found again."""
        rows = np.ascontiguousarray(embeddings.astype(np.float16))
        digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
        # The highest bit stays free: the all-ones id means "no id" to the daemon.
        return np.frombuffer(digests, "<u8") >> np.uint64(1)


class Projection:
    """Fixed random projections of embeddings to one model's q, k and v, with RoPE on q and k.

    As in trained heads, what looks alike scores high: a query head's matrix is mostly that of its
    KV head. A quarter of each head's channels rotate (partial RoPE, as in GPT-NeoX); over 100,000
    positions full rotation would turn random projections into noise.

    Attributes:
        layers, query_heads (H), kv_heads (G), head_dim (d): the geometry.
    """

    # Of the softmax: enough that 64 tokens of an event stand out among 100,000, not that they take all.
    sharpness = 2.0

    def __init__(self, layers: int, query_heads: int, kv_heads: int, head_dim: int, seed: int) -> None:
        self.layers, self.query_heads, self.kv_heads, self.head_dim = layers, query_heads, kv_heads, head_dim
        rng = np.random.default_rng((seed, 1))
        shape = (layers, kv_heads, EMBEDDING, head_dim)
        self._wk = rng.standard_normal(shape).astype(np.float32)
        self._wv = rng.standard_normal(shape).astype(np.float32)
        other = rng.standard_normal((layers, query_heads, EMBEDDING, head_dim)).astype(np.float32)
        own = np.repeat(self._wk, query_heads // kv_heads, axis=1)
        self._wq = self.sharpness * (0.95 * own + math.sqrt(1 - 0.95**2) * other)
        self._rotary = head_dim // 4
        self._frequencies = 10_000.0 ** (-np.arange(0, self._rotary, 2) / self._rotary)

    def keys_values(self, layer: int, x: F32, start: int) -> tuple[F32, F32]:
        """k and v [n, G, d] of embeddings x [n, EMBEDDING] at positions [start, start + n)."""
        return self._rope(self._project(x, self._wk[layer]), start), self._project(x, self._wv[layer])

    def queries(self, layer: int, x: F32, start: int) -> F32:
        """q [n, H, d] of embeddings x [n, EMBEDDING] at positions [start, start + n)."""
        return self._rope(self._project(x, self._wq[layer]), start)

    @staticmethod
    def _project(x: F32, w: F32) -> F32:
        return np.ascontiguousarray(np.einsum("ne,hed->nhd", x, w, optimize=True))

    def _rope(self, x: F32, start: int) -> F32:
        angle = np.arange(start, start + len(x))[:, None, None] * self._frequencies
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        half = self._rotary // 2
        a, b = x[..., :half].copy(), x[..., half : self._rotary].copy()
        x[..., :half], x[..., half : self._rotary] = a * cos - b * sin, a * sin + b * cos
        return x

    def fingerprint(self, *parts: Any) -> bytes:
        """A digest of what changes K and V for equal content, for the model spec."""
        digest = hashlib.sha256(repr(parts).encode())
        digest.update(self._wk.tobytes() + self._wv.tobytes())
        return digest.digest()
