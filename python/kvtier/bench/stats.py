"""What the measurements of this package have in common: divergences and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["agreement", "bootstrap_mean", "kl_divergence", "log_softmax", "next_token_loss", "wilson"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def log_softmax(logits: F32) -> F64:
    """Log-probabilities over the last dimension, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    out: F64 = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return out


def kl_divergence(exact: F32, other: F32) -> F64:
    """KL(exact || other) in nats, for each row of logits [n, vocabulary]."""
    p, q = log_softmax(exact), log_softmax(other)
    out: F64 = (np.exp(p) * (p - q)).sum(axis=-1)
    return np.maximum(out, 0)


def next_token_loss(logits: F32, targets: Sequence[int] | NDArray[np.int64]) -> F64:
    """Negative log-likelihood in nats of targets [n] under logits [n, vocabulary]."""
    rows = log_softmax(logits)
    out: F64 = -rows[np.arange(len(rows)), np.asarray(targets, np.int64)]
    return out


def agreement(exact: F32, other: F32) -> float:
    """Share of rows whose most probable token is the same."""
    return float((exact.argmax(axis=-1) == other.argmax(axis=-1)).mean())


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a proportion (E. B. Wilson, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    p, z2 = successes / trials, z * z
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(values: Sequence[float] | F64, draws: int = 2000, seed: int = 1) -> tuple[float, float]:
    """95 % percentile interval of the mean, by resampling."""
    x = np.asarray(values, np.float64)
    if not len(x):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = x[rng.integers(0, len(x), (draws, len(x)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
