"""Dump a model's post-RoPE queries, keys and values over a text, for measurements.

Writes OUT/L00.npz and so on, one file a layer, uncompressed, with arrays

- ``q`` [queries, H, d]: the queries of the last positions;
- ``q_sample`` [m, H, d] and ``q_sample_pos`` [m] (int64): every --sample-stride-th query before
  those, and its position;
- ``k`` and ``v`` [tokens, G, d];

and OUT/meta.json. Queries are not scaled. Channels are in half-split order (channel i rotates with
i + d/2); k and v are rounded to bfloat16, as they are sent to the daemon. float16 rounds again what
lies below its normal range and refuses what lies above it; float32 keeps every value.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtier.bench import corpora
from kvtier.dense import DenseDecoder
from kvtier.gguf_model import Model, UnsupportedModelError
from kvtier.models import find_model
from kvtier.tokenizer import Tokenizer

__all__ = ["capture", "main"]

F32 = NDArray[np.float32]


class _LayerDump:
    """One layer's arrays, filled as the chunks come."""

    def __init__(self, model: Model, tokens: int, queries: int, stride: int) -> None:
        config = model.config
        # Positions before the last `queries`: what a daemon may have seen before it seals.
        self.sample_pos = np.arange(0, tokens - queries, stride, dtype=np.int64)
        self.first_query = tokens - queries
        self.q = np.empty((queries, config.query_heads, config.head_dim), np.float32)
        self.q_sample = np.empty((len(self.sample_pos), config.query_heads, config.head_dim), np.float32)
        self.k = np.empty((tokens, config.kv_heads, config.head_dim), np.float32)
        self.v = np.empty((tokens, config.kv_heads, config.head_dim), np.float32)

    def take(self, start: int, q: F32, k: F32, v: F32) -> None:
        end = start + len(q)
        self.k[start:end], self.v[start:end] = k, v
        low, high = np.searchsorted(self.sample_pos, (start, end))
        self.q_sample[low:high] = q[self.sample_pos[low:high] - start]
        if end > self.first_query:
            begin = max(start, self.first_query)
            self.q[begin - self.first_query : end - self.first_query] = q[begin - start :]

    def save(self, path: Path, dtype: type[np.floating[Any]]) -> None:
        arrays = {"q": self.q, "q_sample": self.q_sample, "k": self.k, "v": self.v}
        with np.errstate(over="ignore"):  # told below
            stored = {name: array.astype(dtype) for name, array in arrays.items()}
        for name, array in stored.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{path.name}: {name} exceeds the range of {np.dtype(dtype)}; use float32")
        np.savez(path, q_sample_pos=self.sample_pos, **stored)  # type: ignore[arg-type]


def capture(
    model: Model,
    token_ids: Sequence[int],
    out: Path,
    layers: Sequence[int],
    *,
    queries: int = 512,
    sample_stride: int = 8,
    dtype: type[np.floating[Any]] = np.float32,
    chunk: int = 512,
    extra_meta: dict[str, object] | None = None,
) -> None:
    """Prefill `token_ids` densely and write the q, k and v of `layers` to folder `out`.

    Args:
        queries: how many of the last positions' queries are kept, 1 to len(token_ids).
        sample_stride: one in this many of the queries before them is kept as a sample.
        dtype: np.float32 or np.float16, of all arrays but the positions.
        chunk: tokens computed at once.
        extra_meta: further fields of meta.json.

    Raises ValueError if `queries` is out of range or a value does not fit `dtype`.
    """
    total = len(token_ids)
    if not 1 <= queries <= total:
        raise ValueError(f"the last {queries} queries of {total} tokens cannot be kept: name 1 to {total}")
    if sample_stride < 1:
        raise ValueError("the sample's stride is at least 1")
    out.mkdir(parents=True, exist_ok=True)
    config = model.config
    dumps = {layer: _LayerDump(model, total, queries, sample_stride) for layer in sorted(set(layers))}

    def observe(layer: int, start: int, q: F32, k: F32, v: F32) -> None:
        if layer in dumps:
            dumps[layer].take(start, q, k, v)

    def progress(done: int, of: int) -> None:
        print(f"\r{done}/{of} tokens", end="" if done < of else "\n", file=sys.stderr, flush=True)

    DenseDecoder(model, observe).prefill(token_ids, chunk, progress)
    for layer, dump in dumps.items():
        dump.save(out / f"L{layer:02d}.npz", dtype)
    meta = {
        "model": config.name,
        "tokens": total,
        "queries": queries,
        "sample_stride": sample_stride,
        "dtype": np.dtype(dtype).name,
        "layers": [*dumps],
        "windows": [config.windows[layer] for layer in dumps],
        "scale": model.spec.scale,
        **(extra_meta or {}),
        "token_ids": [int(token) for token in token_ids],
    }
    (out / "meta.json").write_text(json.dumps(meta))


def _layers(model: Model, names: str | None) -> list[int]:
    """The layers named as "0,5,11"; all that attend to everything if none are. Raises ValueError."""
    if not names:
        return [i for i, window in enumerate(model.config.windows) if not window]
    layers = [int(layer) for layer in names.split(",")]
    if not all(0 <= layer < model.config.layers for layer in layers):
        raise ValueError(f"layers are 0 to {model.config.layers - 1}")
    return layers


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvtier.capture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3 or a GGUF file (default: smollm2)")
    parser.add_argument("--tokens", type=int, default=4096, help="how many tokens of the text (default: 4096)")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text to leave out first")
    corpora.add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the dumps")
    parser.add_argument("--layers", help="as 0,5,11; default: all that attend to everything")
    parser.add_argument("--queries", type=int, default=512, help="last positions whose queries are kept (default: 512)")
    parser.add_argument("--sample-stride", type=int, default=8,
                        help="of the queries before those, one in this many is kept (default: 8)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default: float32")
    args = parser.parse_args(argv)
    if args.tokens < 1 or args.skip < 0 or args.sample_stride < 1:
        parser.error("--tokens and --sample-stride are at least 1, --skip at least 0")
    if not 1 <= args.queries <= args.tokens:
        parser.error(f"--queries is 1 to --tokens ({args.tokens})")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _arguments(argv)
    try:
        path = find_model(args.model)
        text, what = corpora.source(args)
        ids = corpora.token_ids(Tokenizer.from_gguf(path), text, args.tokens, args.skip)
        model = Model.load(path)
        capture(
            model, ids, args.out, _layers(model, args.layers),
            queries=args.queries, sample_stride=args.sample_stride,
            dtype=np.float16 if args.dtype == "float16" else np.float32,
            extra_meta={"text": what, "text_sha256": corpora.digest(text), "skip": args.skip},
        )  # fmt: skip
    except (OSError, ValueError, UnsupportedModelError) as error:
        print(f"kvtier.capture: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
