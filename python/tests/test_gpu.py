"""A real model through a whole kvtierd with a GPU, real or emulated: `make demo-cuda`.

The worker prefills a short context with a fact in it, and asks for it. The GPU seals what lies
behind the recent window, attends to it where it was made, and again after the daemon was killed;
then a daemon without a GPU reads the same folder. All answer alike.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtier import Budget, Span
from kvtier.daemon import Daemon, find_daemon
from kvtier.demo import ANSWER_TOKENS, FACT, OPENING, SECRET, SYSTEM, ask, divergence, score_answer
from kvtier.worker import Worker

pytestmark = pytest.mark.gpu

TOKENS = 420
"""128 of them are sealed: in whole blocks of 64, behind a recent window of 256."""
MEMORY = "256m"
MAX_KL = 1e-3
"""Of an answer's tokens, in nats: what the GPU rounds."""


@pytest.fixture
def daemon_on(socket_folder: Path) -> Iterator[Callable[[str], Daemon]]:
    """daemon_on(gpu) -> a running daemon on the same folder, after the one before has ended."""
    if os.environ.get("REQUIRE_CUDA") != "1":
        pytest.skip("`make demo-cuda` has a kvtierd with GPU support and an emulated GPU")
    data = socket_folder / "data"
    data.mkdir()
    daemons: list[Daemon] = []

    def start(gpu: str) -> Daemon:
        flags = ["--log-level", "warn", "--gpu", gpu, "--gpu-audit", "1", "--read-all", "1"]
        daemon = Daemon(find_daemon(), data, flags)
        daemon.start()
        daemons.append(daemon)
        return daemon

    yield start
    for daemon in daemons:
        daemon.stop()


def test_model_on_the_gpu(daemon_on: Callable[[str], Daemon], load_model: Callable, corpus: str) -> None:
    model, tokenizer = load_model("smollm2")
    layers = model.config.layers
    opening = tokenizer.chat([("system", SYSTEM), ("user", OPENING)], open_end=True)
    fact = tokenizer.encode(FACT, add_bos=False)
    ids = [*opening, *fact, *tokenizer.encode(corpus, add_bos=False)][:TOKENS]
    assert len(opening) + len(fact) < 128, "the fact is to be among what is sealed"

    began = time.perf_counter()

    def passed(what: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {what}", flush=True)

    daemon = daemon_on(MEMORY)
    with daemon.session() as session:
        context = Worker(model, session, tokenizer).create()
        context.prefill(ids, spans=[Span(0, len(ids), "text")])
        passed(f"{len(ids)} tokens read")
        sealed = context.flush(seal=True).sealed
        assert sealed == 128
        gpu = session.client.status().gpu
        assert gpu.segments_sealed == gpu.segments_kept == layers, gpu
        passed(f"{sealed} of them sealed by the GPU, {layers} layers, each compared with the host's")
        with context.fork() as fork:
            answer = ask(fork, tokenizer, Budget.exact())
            assert all(account.bytes_gpu > 0 for account in fork.accounts)
            assert len(fork.accounts) == layers * answer.steps
        assert SECRET in answer.text.lower()
        status = session.client.status()
        assert not status.gpu_audits.given_up
        assert next(tier for tier in status.tiers if tier.name == "gpu").bytes_written == 0, "they never came up"
        passed(f"answered from where they were made: {answer.text}")

    daemon.kill()
    daemon.start()
    with daemon.session() as session:
        again = Worker(model, session, tokenizer).open(context.sequence_id)
        assert again.length == len(ids)
        question = answer.ids[:1]
        with again.fork() as fork:  # segments come up, a layer ahead
            fork.score(question, Budget.exact())
            for _ in range(200):
                if next(tier for tier in session.client.status().tiers if tier.name == "gpu").pieces >= layers * 3 * 8:
                    break
                time.sleep(0.05)
        with again.fork() as fork:
            fork.score(question, Budget.exact())
            assert all(account.bytes_gpu > 0 for account in fork.accounts)
        status = session.client.status()
        gpu = status.gpu
        assert gpu.segments_ahead_used > 0 and not status.gpu_audits.given_up, status
        passed(f"after a kill: {gpu.segments_ahead} segments came ahead, {gpu.segments_ahead_used} of them were used")
    daemon.stop()

    with daemon_on("off").session() as session:
        host = Worker(model, session, tokenizer).open(context.sequence_id)
        assert not session.client.status().HasField("gpu")
        with host.fork() as fork:
            rows = score_answer(fork, tokenizer, answer.ids, Budget.exact())
            assert all(account.bytes_gpu == 0 for account in fork.accounts)
    kl, same = divergence(rows, answer.logits)
    passed(f"the host agrees: KL {kl.max():.1e} at most, the same first choice in {same:.0%}")
    assert len(rows) == len(answer.logits) > 1
    assert kl.max() < MAX_KL and same == 1.0
    assert np.isfinite(answer.logits).all()
    assert answer.steps <= ANSWER_TOKENS
