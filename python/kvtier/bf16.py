"""bfloat16 as numpy sees it: uint16 arrays holding the upper half of a float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["from_bf16", "round_bf16", "to_bf16"]


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, to nearest, ties to even.

    Args:
        x: any shape; other float types are converted to float32 first.

    Returns:
        The bfloat16 bit patterns, same shape. NaN stays NaN, and what is too large
        for bfloat16 becomes infinity.
    """
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF)
    rounded += (bits >> np.uint32(16)) & np.uint32(1)
    rounded >>= np.uint32(16)
    out = rounded.astype(np.uint16)
    # Rounding could carry a NaN's mantissa into infinity or wrap it around.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        out[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return out


def from_bf16(x: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 bit patterns to float32, exactly. Any shape, kept."""
    x = np.ascontiguousarray(x, dtype=np.uint16)
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 values rounded to what bfloat16 can represent, as float32."""
    return from_bf16(to_bf16(x))
