"""Dump a model's post-RoPE queries, keys and values over a text, for experiments.

Writes OUT/L00.npz and so on, one file a layer, with float32 arrays
``q`` [N, H, d], ``k`` and ``v`` [N, G, d], and OUT/meta.json. Channels are in half-split order
(channel i rotates with i + d/2); k and v are rounded to bfloat16, as they are sent to the daemon.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvtier.dense import DenseDecoder
from kvtier.gguf_model import Model
from kvtier.models import find_model
from kvtier.tokenizer import Tokenizer

__all__ = ["capture", "main"]


def capture(
    model: Model,
    token_ids: Sequence[int],
    out: Path,
    layers: Sequence[int],
    chunk: int = 512,
) -> None:
    """Prefill `token_ids` densely and write the q, k and v of `layers` to folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    config, total = model.config, len(token_ids)
    wanted = {
        layer: (
            np.empty((total, config.query_heads, config.head_dim), np.float32),
            np.empty((total, config.kv_heads, config.head_dim), np.float32),
            np.empty((total, config.kv_heads, config.head_dim), np.float32),
        )
        for layer in layers
    }

    def observe(layer: int, start: int, *rows: NDArray[np.float32]) -> None:
        for target, source in zip(wanted.get(layer, ()), rows, strict=False):
            target[start : start + len(source)] = source

    def progress(done: int, of: int) -> None:
        print(f"\r{done}/{of} tokens", end="" if done < of else "\n", file=sys.stderr, flush=True)

    DenseDecoder(model, observe).prefill(token_ids, chunk, progress)
    for layer, (q, k, v) in wanted.items():
        np.savez(out / f"L{layer:02d}.npz", q=q, k=k, v=v)
    meta = {
        "model": config.name,
        "tokens": total,
        "layers": sorted(wanted),
        "windows": [config.windows[layer] for layer in sorted(wanted)],
        "scale": model.spec.scale,
        "token_ids": [int(token) for token in token_ids],
    }
    (out / "meta.json").write_text(json.dumps(meta))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvtier.capture", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3 or a GGUF file")
    parser.add_argument("--tokens", type=int, default=4096, help="how many tokens of the text")
    parser.add_argument("--text", type=Path, action="append", required=True, help="a text file; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="folder for the dumps")
    parser.add_argument("--layers", help="as 0,5,11; default: all that attend to everything")
    args = parser.parse_args(argv)
    path = find_model(args.model)
    text = "\n".join(file.read_text("utf-8", "replace") for file in args.text)
    ids = Tokenizer.from_gguf(path).encode(text)[: args.tokens]
    if len(ids) < args.tokens:
        print(f"the text has only {len(ids)} tokens", file=sys.stderr)
    if not ids:
        return 1
    model = Model.load(path)
    if args.layers:
        layers = [int(layer) for layer in args.layers.split(",")]
        if not all(0 <= layer < model.config.layers for layer in layers):
            parser.error(f"layers are 0 to {model.config.layers - 1}")
    else:
        layers = [i for i, window in enumerate(model.config.windows) if not window]
    capture(model, ids, args.out, layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
