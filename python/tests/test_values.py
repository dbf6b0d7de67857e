"""bfloat16, budgets, accounts, errors."""

from __future__ import annotations

import math

import grpc
import numpy as np
import pytest

import kvtier
from kvtier import Account, AttendItem, AttendMode, Budget, ModelSpec
from kvtier.errors import error_from_text, make_error


def test_bf16_rounds_to_nearest_even() -> None:
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32)
    got = kvtier.to_bf16(bits.view(np.float32))
    assert got.tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x3F80]


def test_bf16_keeps_specials() -> None:
    nan = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(kvtier.from_bf16(kvtier.to_bf16(nan))).all()
    specials = np.array([np.inf, -np.inf, 0.0, -0.0, 3.4e38], np.float32)
    got = kvtier.round_bf16(specials)
    assert got.tolist() == [np.inf, -np.inf, 0.0, 0.0, np.inf] and np.signbit(got[3])


def test_bf16_round_trip_is_exact() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[(every & 0x7F80) != 0x7F80]
    assert np.array_equal(kvtier.to_bf16(kvtier.from_bf16(finite)), finite)


def test_budgets_reach_the_wire() -> None:
    assert Budget.share(0.2).to_proto().share == pytest.approx(0.2)
    assert Budget.tokens(99).to_proto().tokens == 99
    assert Budget.target(0.01).to_proto().target_error == pytest.approx(0.01)
    assert Budget.exact().to_proto().mode == AttendMode.EXACT
    assert Budget.default().to_proto().mode == AttendMode.UNSPECIFIED


def test_waits_reach_the_wire() -> None:
    for seconds, us in [(None, 0), (0.02, 20_000), (1e-9, 1), (1e9, 0xFFFFFFFE), (math.inf, 0xFFFFFFFF)]:
        budget = Budget.share(0.2).waiting(seconds)
        assert budget.to_proto().read_wait_us == us and budget.share_of_bytes == 0.2
    for seconds in (0, -1.0, math.nan):
        with pytest.raises(kvtier.InvalidArgumentError):
            Budget.tokens(9).waiting(seconds)


def test_spec_round_trip() -> None:
    spec = ModelSpec(3, 4, 2, 64, b"f", sliding_windows=(0, 512, 0), scale=0.125)
    assert ModelSpec.from_proto(spec.to_proto()) == spec
    assert [spec.window(layer) for layer in range(3)] == [0, 512, 0]


def test_account_total() -> None:
    one = Account(bytes_ram=10, bytes_nvme=30, bytes_full=100, codec_error=0.02, mode=AttendMode.BUDGET, error_p95=0.1)
    two = Account(bytes_ram=0, bytes_nvme=20, bytes_full=100, codec_error=0.04, mode=AttendMode.BUDGET, target_missed=True)
    total = Account.total([one, two])
    assert total.bytes_sealed == 60 and total.share_read == pytest.approx(0.3)
    assert total.codec_error == pytest.approx(0.03) and total.mode == AttendMode.BUDGET
    assert total.error_p95 == pytest.approx(0.05) and total.target_missed
    assert Account.total([]).share_read == 0.0


@pytest.mark.parametrize("code", [*grpc.StatusCode])
def test_every_code_is_a_kvtier_error(code: grpc.StatusCode) -> None:
    error = make_error(code.value[0], "m", "R", 1.5)
    assert isinstance(error, kvtier.KvtierError)
    assert (error.code, error.reason, error.message, error.retry_delay) == (code, "R", "m", 1.5)


def test_fast_error_text() -> None:
    error = error_from_text(5, "SEQUENCE_NOT_FOUND: no sequence: x")
    assert isinstance(error, kvtier.NotFoundError)
    assert (error.reason, error.message) == ("SEQUENCE_NOT_FOUND", "no sequence: x")
    error = error_from_text(13, "it broke: badly")
    assert (error.reason, error.message) == ("", "it broke: badly")


def test_items_are_checked() -> None:
    q = np.zeros((2, 4, 16), np.float32)
    kv = np.zeros((2, 2, 16), np.float32)
    for bad in (
        AttendItem("s", 0, q[0]),
        AttendItem("s", 0, q, kv),
        AttendItem("s", 0, q, kv, kv[:1]),
        AttendItem("s", 0, q, kv.astype(np.float16), kv.astype(np.float16)),
        AttendItem("s", 0, q.astype(np.float64)),
        AttendItem("s", 0, q, token_ids=[1]),
        AttendItem("s", 0, q, partial=(q, q)),
    ):
        with pytest.raises(kvtier.InvalidArgumentError):
            bad.check()
