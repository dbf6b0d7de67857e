"""ggml's flash attention on the processor, timed for ``kvbench kernels --peers`` and ``kvbench attend``.

The libraries are those inside llama-cpp-python; KVTIER_GGML names a folder with others (built for
this very processor, say). One operator answers one query position of all heads, as in decoding.
Its K/V are made up, and each output is held against attention in numpy over the same K/V,
dequantised: what is timed is known to be right.

As a program it holds the operators of one shape and answers, line by line on standard input and
output, so that another process can time its own work in turns with them:

    -> {"type": "q8_0", "layout": "head", "threads": 2}
    <- {"seconds": 0.0631, "error": 0.0042}

The first line it writes is about ggml: {"version": ..., "commit": ..., "features": [...]}.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape
from numpy.typing import NDArray

__all__ = ["LAYOUTS", "TYPES", "FlashAttention", "GgmlError", "Library", "Shape", "main"]

F32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

TYPES = {name: GGMLQuantizationType[name.upper()] for name in ("f16", "q8_0", "q4_0")}
# "head" is [head][token][dim], contiguous for an operator that goes head by head;
# "token" is [token][head][dim], as llama.cpp's cache has it.
LAYOUTS = ("head", "token")

_MISSING = (
    "llama-cpp-python, whose ggml is measured, is not installed: run "
    "'CMAKE_ARGS=-DGGML_NATIVE=OFF .venv/bin/python -m pip install llama-cpp-python' or 'make oracle' (compiled, in "
    "minutes), "
    "or name a folder with libggml-cpu by KVTIER_GGML"
)
# The largest error of an output that counts as right, relative; that of wrong ones is about 1. ggml
# rounds queries to 8 bits for q8_0 and q4_0 (.006), and sums values in float16 for f16, whose error
# grows with the context: .003 at 1,000 tokens, .036 at 65,536.
_TOLERANCE = 0.25


class GgmlError(Exception):
    """ggml is missing, or does not compute what it should."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """One layer's K/V and the queries of one position. query_heads is a multiple of kv_heads."""

    tokens: int
    head_dim: int
    kv_heads: int
    query_heads: int


class _InitParams(ctypes.Structure):
    """struct ggml_init_params of ggml.h."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


_POINTER, _INT, _LONG, _FLOAT, _SIZE = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_size_t,
)
# Result and arguments, as in ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h. A context,
# a tensor, a graph and a backend are pointers that are only handed on.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_version": (ctypes.c_char_p, []),
    "ggml_commit": (ctypes.c_char_p, []),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead": (_SIZE, []),
    "ggml_init": (_POINTER, [_InitParams]),
    "ggml_free": (None, [_POINTER]),
    "ggml_new_tensor_4d": (_POINTER, [_POINTER, _INT, _LONG, _LONG, _LONG, _LONG]),
    "ggml_permute": (_POINTER, [_POINTER, _POINTER, _INT, _INT, _INT, _INT]),
    "ggml_get_data": (_POINTER, [_POINTER]),
    "ggml_quantize_chunk": (_SIZE, [_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER]),
    "ggml_flash_attn_ext": (_POINTER, [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _FLOAT, _FLOAT]),
    "ggml_new_graph": (_POINTER, [_POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_backend_cpu_init": (_POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [_POINTER, _INT]),
    "ggml_backend_alloc_ctx_tensors": (_POINTER, [_POINTER, _POINTER]),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_graph_compute": (_INT, [_POINTER, _POINTER]),
    "ggml_backend_free": (None, [_POINTER]),
}
_FEATURES = ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "neon",
             "dotprod", "matmul_int8", "sve")  # fmt: skip


class Library:
    """ggml, loaded, with its backend for the processor.

    Attributes:
        version, commit: of ggml, as "0.9.4".
        features: instruction sets it was built for, as "avx2".
    """

    def __init__(self, folder: Path | None = None) -> None:
        path = _find(folder)
        try:
            self.c = ctypes.CDLL(str(path))  # what it depends on lies beside it
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self.c, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise GgmlError(f"{path}: {error}") from error
        self.backend = self.c.ggml_backend_cpu_init()
        self.version = self.c.ggml_version().decode()
        self.commit = self.c.ggml_commit().decode()
        self.features = [name for name in _FEATURES if getattr(self.c, f"ggml_cpu_has_{name}", int)()]

    def quantise(self, x: F32, kind: GGMLQuantizationType) -> Bytes:
        """Rows x [n][d] in a type: bytes [n][bytes of a row]."""
        x = np.ascontiguousarray(x)
        out = np.empty(quant_shape_to_byte_shape(x.shape, kind) if kind != TYPES["f16"] else (len(x), 2 * x.shape[1]),
                       np.uint8)  # fmt: skip
        wrote = self.c.ggml_quantize_chunk(kind, x.ctypes.data, out.ctypes.data, 0, len(x), x.shape[1], None)
        if wrote != out.nbytes:
            raise GgmlError(f"{kind.name}: {wrote} bytes of {x.shape[0]} rows, not {out.nbytes}")
        return out


def _find(folder: Path | None) -> Path:
    """The library that holds the kernels."""
    if folder is None and (named := os.environ.get("KVTIER_GGML")):
        folder = Path(named)
    if folder is None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise GgmlError(_MISSING)
        folder = Path(spec.submodule_search_locations[0]) / "lib"
    for name in ("libggml-cpu.so", "libggml-cpu.dylib"):
        if (folder / name).exists():
            return (folder / name).absolute()
    raise GgmlError(f"{folder} holds no libggml-cpu; {_MISSING}")


class FlashAttention:
    """GGML_OP_FLASH_ATTN_EXT over made-up K/V of one type and layout.

    Attributes:
        q: queries [query_heads][head_dim].
        k, v: rows as they are stored, [kv_heads][tokens][bytes of a row], views into ggml's memory.
    """

    def __init__(self, library: Library, shape: Shape, kind: str, layout: str, seed: int = 1) -> None:
        self._library, self._shape, self._kind = library, shape, TYPES[kind]
        c = library.c
        self._context = c.ggml_init(_InitParams(16 * c.ggml_tensor_overhead() + c.ggml_graph_overhead(), None, True))
        q = c.ggml_new_tensor_4d(self._context, GGMLQuantizationType.F32, shape.head_dim, 1, shape.query_heads, 1)
        k, v = self._table(layout), self._table(layout)
        out = c.ggml_flash_attn_ext(self._context, q, k, v, None, self._scale, 0, 0)
        self._graph = c.ggml_new_graph(self._context)
        c.ggml_build_forward_expand(self._graph, out)
        self._buffer = c.ggml_backend_alloc_ctx_tensors(self._context, library.backend)
        if not self._buffer:
            raise GgmlError(f"no memory for {shape.tokens} tokens")
        self.q = self._floats(q)
        self._out = self._floats(out)
        self.k, self.v = self._rows(k, layout), self._rows(v, layout)
        self._fill(np.random.default_rng(seed))

    def close(self) -> None:
        """Free ggml's memory; views into it are dead."""
        self._library.c.ggml_backend_buffer_free(self._buffer)
        self._library.c.ggml_free(self._context)

    def run(self, threads: int) -> float:
        """Answer once, on so many threads: seconds."""
        c, backend = self._library.c, self._library.backend
        c.ggml_backend_cpu_set_n_threads(backend, threads)
        begin = time.perf_counter()
        status = c.ggml_backend_graph_compute(backend, self._graph)
        seconds = time.perf_counter() - begin
        if status != 0:
            raise GgmlError(f"ggml_backend_graph_compute: status {status}")
        return seconds

    @property
    def output(self) -> F32:
        """What the last run answered: [query_heads][head_dim]."""
        return self._out.copy()

    def expected(self) -> F32:
        """Attention in numpy over the same K/V, dequantised: [query_heads][head_dim]."""
        out = []
        for head, q in enumerate(np.split(self.q, self._shape.kv_heads)):
            scores = q @ self._floats_of(self.k[head]).T * self._scale
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out.append(weights / weights.sum(axis=1, keepdims=True) @ self._floats_of(self.v[head]))
        return np.concatenate(out)

    def error(self, expected: F32) -> float:
        """|output - expected| / |expected| of the last run."""
        return float(np.linalg.norm(self._out - expected) / np.linalg.norm(expected))

    @property
    def _scale(self) -> float:
        return float(self._shape.head_dim**-0.5)

    def _floats_of(self, rows: Bytes) -> F32:
        rows = np.ascontiguousarray(rows)
        if self._kind == TYPES["f16"]:
            return rows.view(np.float16).astype(np.float32)
        return np.asarray(dequantize(rows, self._kind), np.float32)

    def _table(self, layout: str) -> int:
        """A tensor of keys or values, which the operator sees as [kv_heads][tokens][head_dim]."""
        c, s = self._library.c, self._shape
        if layout == "head":
            return int(c.ggml_new_tensor_4d(self._context, self._kind, s.head_dim, s.tokens, s.kv_heads, 1))
        stored = c.ggml_new_tensor_4d(self._context, self._kind, s.head_dim, s.kv_heads, s.tokens, 1)
        return int(c.ggml_permute(self._context, stored, 0, 2, 1, 3))

    def _memory(self, tensor: int, size: int) -> Bytes:
        address = self._library.c.ggml_get_data(tensor)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def _floats(self, tensor: int) -> F32:
        heads, d = self._shape.query_heads, self._shape.head_dim
        return self._memory(tensor, 4 * heads * d).view(np.float32).reshape(heads, d)

    def _rows(self, tensor: int, layout: str) -> Bytes:
        s = self._shape
        row = self._library.quantise(np.zeros((1, s.head_dim), np.float32), self._kind).nbytes
        memory = self._memory(tensor, s.kv_heads * s.tokens * row)
        if layout == "head":
            return memory.reshape(s.kv_heads, s.tokens, row)
        return memory.reshape(s.tokens, s.kv_heads, row).transpose(1, 0, 2)

    def _fill(self, rng: np.random.Generator) -> None:
        """Normal numbers, head by head, so that the whole is never there as floats."""
        self.q[:] = rng.standard_normal(self.q.shape, np.float32)
        for table in (self.k, self.v):
            for head in table:
                x = rng.standard_normal((self._shape.tokens, self._shape.head_dim), np.float32)
                head[:] = self._library.quantise(x, self._kind)


class _Operators:
    """The operators of one shape, each made when it is first asked for; every output is checked."""

    def __init__(self, library: Library, shape: Shape) -> None:
        self._library, self._shape = library, shape
        self._made: dict[tuple[str, str], tuple[FlashAttention, F32]] = {}

    def answer(self, kind: str, layout: str, threads: int) -> dict[str, float]:
        if (kind, layout) not in self._made:
            made = FlashAttention(self._library, self._shape, kind, layout)
            made.run(threads)  # so that threads and memory are there
            self._made[kind, layout] = made, made.expected()
        op, expected = self._made[kind, layout]
        seconds, error = op.run(threads), op.error(expected)
        if not error <= _TOLERANCE:
            raise GgmlError(f"{kind}, layout {layout}: its output is off by {error:.3f}, so its time says nothing")
        return {"seconds": seconds, "error": error}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvtier.bench.ggml", description=(__doc__ or "").split("\n")[0])
    for flag, default in (("tokens", 4096), ("head-dim", 128), ("kv-heads", 8), ("query-heads", 32)):
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default: {default}")
    args = parser.parse_args(argv)
    try:
        library = Library()
        _say({"version": library.version, "commit": library.commit, "features": library.features})
        operators = _Operators(library, Shape(args.tokens, args.head_dim, args.kv_heads, args.query_heads))
        for line in sys.stdin:
            asked = json.loads(line)
            _say(operators.answer(asked["type"], asked["layout"], asked["threads"]))
    except GgmlError as error:
        print(f"kvbench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # it reaches whoever asks, too
        return 130
    return 0


def _say(x: dict[str, Any]) -> None:
    print(json.dumps(x), flush=True)


if __name__ == "__main__":
    sys.exit(main())
