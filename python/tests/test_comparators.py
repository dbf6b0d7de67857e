"""Comparators against loops that follow their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.bench import comparators
from kvtier.bench.comparators import BLOCK, COMPARATORS, Body, answer

D, G = 24, 3


def _rows(seed: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, D)).astype(np.float32)


@pytest.fixture
def body() -> Body:
    return Body(_rows(1, 203), _rows(2, 203))  # the last block has 11 tokens


@pytest.fixture
def zone() -> tuple[np.ndarray, np.ndarray]:
    return _rows(3, 40), _rows(4, 40)


def _dense(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention as its definition has it, a loop over queries and tokens in float64."""
    out = np.zeros((len(q), v.shape[1]))
    for i, query in enumerate(q.astype(np.float64)):
        total = 0.0
        for key, value in zip(k, v, strict=True):
            weight = np.exp(query @ key)
            total += weight
            out[i] += weight * value
        out[i] /= total
    return out


def test_everything_is_dense(body: Body, zone: tuple) -> None:
    q = _rows(5, G)
    want = _dense(q, np.concatenate([body.k, zone[0]]), np.concatenate([body.v, zone[1]]))
    for name, comparator in COMPARATORS.items():
        got, moved = answer(comparator, q, body, zone, 10.0 * body.full_bytes)
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)
        index = {"quest": 2 * D * 13, "block-means": D * 13}.get(name, 0)
        assert moved == body.full_bytes + index, name


def test_nothing_is_the_exact_zone(body: Body, zone: tuple) -> None:
    q = _rows(5, G)
    want = _dense(q, *zone)
    for name, comparator in COMPARATORS.items():
        got, moved = answer(comparator, q, body, zone, 1.0)
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)
        assert moved == 0, name


def test_window_is_dense_over_what_it_keeps(body: Body, zone: tuple) -> None:
    q = _rows(5, G)
    got, moved = answer(comparators.window, q, body, zone, 50.9 * body.token_bytes)
    want = _dense(q, np.concatenate([body.k[-50:], zone[0]]), np.concatenate([body.v[-50:], zone[1]]))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert moved == 50 * (D + 3)


def test_oracle_takes_the_largest_weights(body: Body, zone: tuple) -> None:
    q = _rows(5, G)
    keys = np.concatenate([body.k, zone[0]])
    weights = np.zeros(len(body.k))
    for query in q:
        scores = np.exp([query @ key for key in keys])
        weights += (scores / scores.sum())[: len(body.k)]
    choice = comparators.oracle(q, body, zone[0], 20 * body.token_bytes)
    assert choice.tokens.tolist() == sorted(np.argsort(weights)[-20:].tolist())


def test_bounds_bound(body: Body) -> None:
    q = _rows(6, 50)
    bounds = comparators.block_scores_quest(q, body)
    assert bounds.shape == (50, 13)
    for i, query in enumerate(q):
        for b in range(13):
            block = body.k[b * BLOCK : (b + 1) * BLOCK]
            assert bounds[i, b] >= max(query @ key for key in block) - 1e-4
            channels = zip(query, block.min(0), block.max(0), strict=True)
            assert abs(bounds[i, b] - sum(max(x * low, x * high) for x, low, high in channels)) < 1e-4


@pytest.mark.parametrize(("name", "index"), [("quest", 2 * D), ("quest-free", 0), ("block-means", D)])
def test_blocks(body: Body, zone: tuple, name: str, index: int) -> None:
    # Block 4 lies in the query's direction, the short block 12 less so; the others are near zero,
    # so that even Quest's loose bounds tell them apart.
    q = _rows(7, 1)
    body.k[:] *= 0.1
    body.k[4 * BLOCK : 5 * BLOCK] = 2 * q
    body.k[12 * BLOCK :] = q
    budget = 13 * index + 2.5 * BLOCK * body.token_bytes
    choice = COMPARATORS[name](q, body, zone[0], budget)
    assert choice.tokens.tolist() == [*range(64, 80), *range(192, 203)]
    assert choice.bytes == 13 * index + 27 * body.token_bytes <= budget
    np.testing.assert_allclose(body.mean[12], q[0], rtol=1e-5)
