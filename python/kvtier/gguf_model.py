"""Decoder-only models from GGUF files, in numpy: everything of a layer except its attention.

``Model.forward`` asks a callable for attention, so that the same code runs with K/V of its own
(``kvtier.dense``) and with attention delegated to the daemon (``kvtier.worker``).

Supported: the ``llama`` and ``gemma3`` architectures. Weights are dequantised to float32 and stay
resident (4 bytes a parameter). A file that holds tensors or scaling rules this code does not know
is refused, since ignoring them would give plausible but wrong text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import gguf
import numpy as np
from numpy.typing import NDArray

from kvtier.bf16 import round_bf16
from kvtier.types import ElementType, ModelSpec

__all__ = ["Attend", "Model", "ModelConfig", "UnsupportedModelError"]

F32 = NDArray[np.float32]

# Gemma 3's sliding-window layers keep this base whatever the file's rope.freq_base says (Gemma 3
# Technical Report, 2025, section 2.1); every sixth layer is global (same section).
_GEMMA3_LOCAL_ROPE_BASE = 10_000.0
_GEMMA3_GLOBAL_EVERY = 6
# Changes whenever this file would give other K/V for the same weights.
_LAYOUT = b"kvtier-numpy-1;rope=half-split;kv=bf16"


class UnsupportedModelError(ValueError):
    """The file is of a kind that this decoder would compute wrongly."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a GGUF file says about its model.

    Attributes:
        windows, rope_bases: for each layer its sliding window (0: full) and RoPE base.
        rope_scale: positions of full layers are divided by this (linear scaling).
        embedding_scale: factor on token embeddings.
    """

    architecture: str
    name: str
    layers: int
    width: int
    query_heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_epsilon: float
    windows: tuple[int, ...]
    rope_bases: tuple[float, ...]
    rope_scale: float
    embedding_scale: float


@dataclasses.dataclass(slots=True)
class _Layer:
    attention_norm: F32
    qkv: F32  # [(H + 2G) d, D]
    output: F32  # [D, H d]
    ffn_norm: F32
    gate_up: F32  # [2F, D]
    down: F32  # [D, F]
    query_norm: F32 | None = None
    key_norm: F32 | None = None
    post_attention_norm: F32 | None = None
    post_ffn_norm: F32 | None = None


# (layer, q [n, H, d], k [n, G, d], v [n, G, d]) -> attention output [n, H, d], all float32.
Attend = Callable[[int, F32, F32, F32], F32]


class Model:
    """A GGUF model's weights and the parts of its layers that are not attention.

    K and V come out rounded to bfloat16 (as float32 values): the daemon holds them in bfloat16,
    and attention over equal rows is equal wherever it is computed.

    The two halves of a head's channels rotate together (the "half-split" order). Llama files have
    the pairs interleaved; their Q and K rows are reordered on loading, which changes no score.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: list[_Layer],
        embedding: F32,
        output: F32,
        output_norm: F32,
        rope_factors: F32 | None,
        fingerprint: bytes,
        path: Path,
    ) -> None:
        self.config = config
        self.path = path
        self.fingerprint = fingerprint
        self._layers = layers
        self._embedding = embedding
        self._output = output
        self._output_norm = output_norm
        self._rope_factors = rope_factors
        self._rope_tables: dict[tuple[float, float], tuple[F32, F32]] = {}
        self.spec = ModelSpec(
            layers=config.layers,
            query_heads=config.query_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            fingerprint=fingerprint,
            sliding_windows=config.windows if any(config.windows) else (),
            scale=config.head_dim**-0.5,
            kv_dtype=ElementType.BF16,
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a GGUF file. Raises UnsupportedModelError for a model this code cannot run."""
        path = Path(path)
        reader = gguf.GGUFReader(path)
        config = _read_config(reader)
        tensors = {tensor.name: tensor for tensor in reader.tensors}

        def take(name: str) -> F32:
            tensor = tensors.pop(name, None)
            if tensor is None:
                raise UnsupportedModelError(f"{path}: no tensor {name}")
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            shape = [int(size) for size in tensor.shape[::-1]]
            return np.ascontiguousarray(values.reshape(shape), dtype=np.float32)

        gemma = config.architecture == "gemma3"
        layers = []
        for index in range(config.layers):
            block = f"blk.{index}."
            q, k = take(block + "attn_q.weight"), take(block + "attn_k.weight")
            if not gemma:
                q, k = (_half_split(w, config.head_dim) for w in (q, k))
            layer = _Layer(
                attention_norm=take(block + "attn_norm.weight"),
                qkv=np.concatenate([q, k, take(block + "attn_v.weight")]),
                output=take(block + "attn_output.weight"),
                ffn_norm=take(block + "ffn_norm.weight"),
                gate_up=np.concatenate([take(block + "ffn_gate.weight"), take(block + "ffn_up.weight")]),
                down=take(block + "ffn_down.weight"),
            )
            if gemma:
                layer.query_norm = take(block + "attn_q_norm.weight")
                layer.key_norm = take(block + "attn_k_norm.weight")
                layer.post_attention_norm = take(block + "post_attention_norm.weight")
                layer.post_ffn_norm = take(block + "post_ffw_norm.weight")
            layers.append(layer)
        embedding = take("token_embd.weight")
        output = take("output.weight") if "output.weight" in tensors else embedding
        output_norm = take("output_norm.weight")
        factors = take("rope_freqs.weight") if "rope_freqs.weight" in tensors else None
        if tensors:
            raise UnsupportedModelError(f"{path}: unknown tensors {sorted(tensors)[:4]}")
        return cls(config, layers, embedding, output, output_norm, factors, _fingerprint(path), path)

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self._output.shape[0])

    def forward(self, token_ids: Sequence[int] | NDArray[Any], start: int | NDArray[np.int64], attend: Attend) -> F32:
        """Run all layers over tokens at positions [start, start+n).

        Args:
            start: the first token's position, or the position [n] of each: tokens of different
                sequences then go through the layers together, and `attend` tells them apart.

        Returns:
            The last layer's residual stream [n, D]; ``logits`` turns rows of it into logits.
        """
        config = self.config
        ids = np.asarray(token_ids, np.int64)
        n = len(ids)
        x = self._embedding[ids]
        if config.embedding_scale != 1.0:
            x = x * np.float32(config.embedding_scale)
        eps = config.norm_epsilon
        heads, groups, dim = config.query_heads, config.kv_heads, config.head_dim
        for index, layer in enumerate(self._layers):
            rows = _project(_rms(x, layer.attention_norm, eps), layer.qkv)
            rows = rows.reshape(n, heads + 2 * groups, dim)
            q, k, v = np.split(rows, (heads, heads + groups), axis=1)
            if layer.query_norm is not None and layer.key_norm is not None:
                q, k = _rms(q, layer.query_norm, eps), _rms(k, layer.key_norm, eps)
            cos, sin = self._rope(index, start, n)
            q, k = _rotate(q, cos, sin), round_bf16(_rotate(k, cos, sin))
            out = attend(index, q, k, round_bf16(v)).reshape(n, heads * dim)
            out = _project(out, layer.output)
            if layer.post_attention_norm is not None:
                out = _rms(out, layer.post_attention_norm, eps)
            x = x + out
            hidden = _project(_rms(x, layer.ffn_norm, eps), layer.gate_up)
            gate, up = hidden[:, : hidden.shape[1] // 2], hidden[:, hidden.shape[1] // 2 :]
            gate = _gelu(gate) if config.architecture == "gemma3" else _silu(gate)
            gate *= up
            out = _project(gate, layer.down)
            if layer.post_ffn_norm is not None:
                out = _rms(out, layer.post_ffn_norm, eps)
            x += out
        return x

    def logits(self, hidden: F32) -> F32:
        """Logits [n, vocabulary] of rows [n, D] that ``forward`` returned."""
        return _project(_rms(hidden, self._output_norm, self.config.norm_epsilon), self._output)

    def _rope(self, layer: int, start: int | NDArray[np.int64], n: int) -> tuple[F32, F32]:
        """cos and sin [n, 1, d/2] of a layer, for positions as in ``forward``."""
        end = start + n if isinstance(start, int) else int(start.max()) + 1
        config = self.config
        full = not config.windows[layer]
        key = (config.rope_bases[layer], config.rope_scale if full else 1.0)
        table = self._rope_tables.get(key)
        if table is None or len(table[0]) < end:
            # Angles in float64: at position 10^6 float32 would be off by a twentieth of a radian.
            size = max(4096, 1 << (end - 1).bit_length())
            dim = config.head_dim
            inverse = key[0] ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
            if self._rope_factors is not None:
                inverse /= self._rope_factors
            angles = (np.arange(size, dtype=np.float64) / key[1])[:, None, None] * inverse
            table = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
            self._rope_tables[key] = table
        where = slice(start, end) if isinstance(start, int) else start
        return table[0][where], table[1][where]


def _read_config(reader: gguf.GGUFReader) -> ModelConfig:
    fields = {name: field for name, field in reader.fields.items() if "tokenizer" not in name}
    architecture = fields["general.architecture"].contents()
    if architecture not in ("llama", "gemma3"):
        raise UnsupportedModelError(f"architecture {architecture!r}: only llama and gemma3 are known")

    def get(key: str, default: Any = None) -> Any:
        field = fields.get(f"{architecture}.{key}")
        return default if field is None else field.contents()

    if get("expert_count", 0):
        raise UnsupportedModelError("mixture-of-experts models are not supported")
    if get("attn_logit_softcapping", 0.0) or get("final_logit_softcapping", 0.0):
        raise UnsupportedModelError("logit softcaps are not supported")
    scaling = get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UnsupportedModelError(f"RoPE scaling {scaling!r} is not supported")
    layers, width = int(get("block_count")), int(get("embedding_length"))
    heads = int(get("attention.head_count"))
    head_dim = int(get("attention.key_length", width // heads))
    for key, want in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if int(get(key, want)) != want:
            raise UnsupportedModelError(f"{key} {get(key)} differs from the head dimension {head_dim}")
    base = float(get("rope.freq_base", 10_000.0))
    window = int(get("attention.sliding_window", 0) or 0)
    if architecture == "gemma3":
        full = [(index + 1) % _GEMMA3_GLOBAL_EVERY == 0 for index in range(layers)]
        windows = tuple(0 if is_full else window for is_full in full)
        bases = tuple(base if is_full else _GEMMA3_LOCAL_ROPE_BASE for is_full in full)
        embedding_scale = float(np.float32(np.sqrt(width)))
    else:
        if window:
            raise UnsupportedModelError("a sliding window in a llama model is not supported")
        windows, bases, embedding_scale = (0,) * layers, (base,) * layers, 1.0
    return ModelConfig(
        architecture=architecture,
        name=fields["general.name"].contents() if "general.name" in fields else architecture,
        layers=layers,
        width=width,
        query_heads=heads,
        kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        context=int(get("context_length", 0)),
        norm_epsilon=float(get("attention.layer_norm_rms_epsilon")),
        windows=windows,
        rope_bases=bases,
        rope_scale=float(get("rope.scaling.factor", 1.0)) if scaling == "linear" else 1.0,
        embedding_scale=embedding_scale,
    )


def _fingerprint(path: Path) -> bytes:
    """SHA-256 over the file's bytes and over what this code does with them."""
    digest = hashlib.sha256(_LAYOUT)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.digest()


def _half_split(weight: F32, head_dim: int) -> F32:
    """Rows of each head from interleaved pairs (0, 1), (2, 3) ... to halves (0, d/2), ..."""
    heads = weight.shape[0] // head_dim
    paired = weight.reshape(heads, head_dim // 2, 2, weight.shape[1])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(weight.shape)


def _project(x: F32, weight: F32) -> F32:
    """x [n, in] times weight [out, in] transposed."""
    if len(x) == 1:
        # As matrix times vector BLAS reads the weights row by row, once, on all cores.
        return (weight @ x[0])[None]
    return x @ weight.T


def _rms(x: F32, weight: F32, epsilon: float) -> F32:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019, eq. 4)."""
    mean: F32 = np.einsum("...i,...i->...", x, x)[..., None] / np.float32(x.shape[-1])
    scaled: F32 = x / np.sqrt(mean + np.float32(epsilon))
    return scaled * weight


def _rotate(x: F32, cos: F32, sin: F32) -> F32:
    """RoPE on [n, heads, d], channel i with channel i + d/2 (Su et al., 2021, section 3.4.2)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    out = np.empty(x.shape, np.float32)
    np.subtract(a * cos, b * sin, out=out[..., :half])
    np.add(b * cos, a * sin, out=out[..., half:])
    return out


def _silu(x: F32) -> F32:
    # exp overflows to infinity for very negative x, where the quotient's limit, 0, is right.
    with np.errstate(over="ignore"):
        out: F32 = x / (np.exp(-x) + 1)
    return out


def _gelu(x: F32) -> F32:
    """GELU by tanh (Hendrycks and Gimpel, 2016, section 2), as Gemma uses it."""
    inner: F32 = x * 0.7978845608028654 * (x * x * 0.044715 + 1)
    out: F32 = x * 0.5 * (np.tanh(inner) + 1)
    return out
