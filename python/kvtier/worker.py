"""A worker that keeps no K/V: it runs a model in numpy and asks the daemon for attention.

A ``Worker`` is a model and a session; a ``Context`` is one of the daemon's sequences in its hands.

Prefill computes attention itself and streams K/V to the daemon, so the worker holds K/V only while
it lasts. Everything after it (questions, decoding, continuing a stored context) is delegated: one
Attend for each layer, with the step's own rows appended in the same call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvtier.bf16 import to_bf16
from kvtier.client import OpenedSequence
from kvtier.dense import KVRows, dense_attention
from kvtier.errors import NotFoundError
from kvtier.gguf_model import Model
from kvtier.session import Session
from kvtier.tokenizer import Tokenizer, as_token_text
from kvtier.types import Account, Ack, Budget, Profile, Span

__all__ = ["Context", "Generation", "Worker"]

F32 = NDArray[np.float32]
TokenIds = Sequence[int] | NDArray[Any]

# Positions between two sampled queries. The daemon groups tokens by what queries see of them; one
# in eight is enough to know that, at an eighth of the queries' bytes.
_QUERY_STRIDE = 8
_CHUNK = 512
# How often a prefix is matched whose sequence is changed before it is forked.
_MATCHES = 4


@dataclasses.dataclass(slots=True)
class Generation:
    """A greedy continuation.

    Attributes:
        ids: the new tokens, without the one that stopped it.
        logits: [len(ids) + 1, vocabulary]: row i chose ids[i]; the last row what came after them
            (the stop token, or what would have been next).
        stopped: whether a stop token ended it, rather than the count.
    """

    ids: list[int]
    logits: F32
    stopped: bool


class Worker:
    """A model whose attention is delegated through a session.

    Args:
        model: the weights.
        session: the connection to the daemon; not closed by the worker.
        tokenizer: given, tokens carry their text to the daemon, for people who inspect it.
    """

    def __init__(self, model: Model, session: Session, tokenizer: Tokenizer | None = None) -> None:
        self.model = model
        self.session = session
        self.tokenizer = tokenizer

    def create(self, *, name: str = "", profile: Profile = Profile.UNSPECIFIED) -> Context:
        """A new, empty context."""
        return Context(self, self.session.create(self.model.spec, name=name, profile=profile))

    def open(self, sequence_id: str) -> Context:
        """A stored context, to be continued where it ends.

        Raises FailedPreconditionError if it was made by another model.
        """
        return Context(self, self.session.open(sequence_id, spec=self.model.spec))

    def resume(
        self,
        token_ids: TokenIds,
        *,
        name: str = "",
        profile: Profile = Profile.UNSPECIFIED,
        allow_sparse: bool = False,
    ) -> Context:
        """A context that begins with the longest stored prefix of `token_ids`, empty if none is.

        The caller continues with ``extend(token_ids[context.length:])``, or ``prefill`` if the
        context is empty. Never all of `token_ids` are taken from the store: logits need at least
        one token to be computed.
        """
        for _ in range(_MATCHES):
            match = self.session.match_prefix(
                self.model.spec, token_ids, profile=profile, allow_sparse=allow_sparse
            )
            matched = match.tokens
            if matched >= len(token_ids):
                matched = (len(token_ids) - 1) // 64 * 64
            if not matched:
                break
            with contextlib.suppress(NotFoundError):  # it was changed or deleted meanwhile
                return Context(self, self.session.fork(match.sequence_id, matched, name=name, match=match))
        return self.create(name=name, profile=profile)


class Context:
    """One sequence of the daemon, as its worker uses it. Not safe for several threads.

    Attributes:
        sequence_id: its id in the daemon.
        length: tokens it has.
        ack: how far the daemon had accepted it at the last call.
        accounts: what each layer's Attend of the last ``extend``, ``step`` or ``score`` cost, in
            the order of the calls.
    """

    def __init__(self, worker: Worker, opened: OpenedSequence) -> None:
        self._worker = worker
        self._model = worker.model
        self._session = worker.session
        self.sequence_id = opened.sequence_id
        self.length = opened.ack.accepted
        self.ack = opened.ack
        self.exact_until = opened.exact_until
        self.accounts: list[Account] = []

    # -- filling --------------------------------------------------------------------------------

    def prefill(
        self,
        token_ids: TokenIds,
        *,
        chunk: int = _CHUNK,
        spans: Sequence[Span] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> F32:
        """Fill an empty context with exact attention computed here.

        Args:
            chunk: tokens computed at once.
            spans: labelled ranges of these tokens.
            progress: called as progress(tokens done, tokens in all) after every chunk.

        Returns:
            The last token's logits [vocabulary].

        Raises:
            ValueError: the context is not empty, or there are no tokens.
        """
        if self.length:
            raise ValueError("prefill needs an empty context; extend continues a stored one")
        if not len(token_ids):
            raise ValueError("no tokens")
        ids = np.asarray(token_ids, np.uint64)
        config = self._model.config
        rows = [KVRows(config.kv_heads, config.head_dim) for _ in range(config.layers)]

        def attend(layer: int, q: F32, k: F32, v: F32) -> F32:
            start = self.length
            window = config.windows[layer]
            self.ack = self._session.append(
                self.sequence_id, layer, start, to_bf16(k), to_bf16(v),
                token_ids=ids[start : start + len(q)] if layer == 0 else None,
                # Only layers that are stored in groups have a use for the sample.
                queries=None if window else to_bf16(q[::_QUERY_STRIDE]),
            )  # fmt: skip
            rows[layer].append(k, v)
            return dense_attention(q, rows[layer].k, rows[layer].v, start, self._model.spec.scale, window)

        last: F32 | None = None
        for first in range(0, len(ids), chunk):
            part = ids[first : first + chunk]
            last = self._model.forward(part, first, attend)[-1:]
            self.length += len(part)
            self._label(part, first, spans)
            if progress is not None:
                progress(self.length, len(ids))
        assert last is not None
        return self._model.logits(last)[0]

    def extend(
        self,
        token_ids: TokenIds,
        budget: Budget | None = None,
        *,
        chunk: int = _CHUNK,
        all_logits: bool = False,
        spans: Sequence[Span] = (),
    ) -> F32:
        """Add tokens with attention delegated: a question over a stored prefix, or one token.

        Args:
            budget: how much each Attend may read; None is the daemon's default.
            chunk: tokens computed at once, one Attend a layer.
            all_logits: return every token's logits and not the last one's alone.
            spans: labelled ranges of these tokens.

        Returns:
            Logits [vocabulary] of the last token, or [n, vocabulary].
        """
        if not len(token_ids):
            raise ValueError("no tokens")
        ids = np.asarray(token_ids, np.uint64)
        self.accounts = []
        logits: list[F32] = []
        for first in range(0, len(ids), chunk):
            part = ids[first : first + chunk]
            hidden = self._delegated(part, budget)
            if len(part) > 1 or spans:
                self._label(part, self.length - len(part), spans)
            if all_logits:
                logits.append(self._model.logits(hidden))
            elif first + len(part) == len(ids):
                logits.append(self._model.logits(hidden[-1:]))
        return np.concatenate(logits) if all_logits else logits[0][0]

    def step(self, token_id: int, budget: Budget | None = None) -> F32:
        """Add one token. Returns its logits [vocabulary]."""
        return self.extend((token_id,), budget)

    def _delegated(self, ids: NDArray[np.uint64], budget: Budget | None) -> F32:
        start = self.length
        attend_remote, sequence_id, accounts = self._session.attend, self.sequence_id, self.accounts

        def attend(layer: int, q: F32, k: F32, v: F32) -> F32:
            result = attend_remote(
                sequence_id, layer, start, q, k=k, v=v,
                token_ids=ids if layer == 0 else None, budget=budget,
            )  # fmt: skip
            self.ack = result.ack
            accounts.append(result.account)
            return result.output

        hidden = self._model.forward(ids, start, attend)
        self.length = start + len(ids)
        return hidden

    def _label(self, ids: NDArray[np.uint64], start: int, spans: Sequence[Span]) -> None:
        tokenizer = self._worker.tokenizer
        end = start + len(ids)
        # A span is sent with the chunk in which it ends, as it may not reach past its append.
        ending = [span for span in spans if start < span.end <= end]
        if tokenizer is None and not ending:
            return
        self._session.append(
            self.sequence_id, 0, start, token_ids=ids,
            token_text=as_token_text(tokenizer, ids.tolist()) if tokenizer else None,
            spans=ending,
        )  # fmt: skip

    # -- using ----------------------------------------------------------------------------------

    def stream(
        self, logits: F32, count: int, budget: Budget | None = None, stop: Sequence[int] | frozenset[int] = ()
    ) -> Iterator[tuple[int, F32]]:
        """Greedy continuation from `logits`, token by token: yields (token, its logits).

        Ends after `count` tokens or before a token of `stop`.
        """
        for _ in range(count):
            token = int(np.argmax(logits))
            if token in stop:
                return
            logits = self.step(token, budget)
            yield token, logits

    def generate(
        self, logits: F32, count: int, budget: Budget | None = None, stop: Sequence[int] | frozenset[int] = ()
    ) -> Generation:
        """Greedy continuation from `logits` by at most `count` tokens.

        Afterwards ``accounts`` holds those of all its steps.
        """
        accounts: list[Account] = []
        ids: list[int] = []
        rows = [logits]
        for token, after in self.stream(logits, count, budget, stop):
            ids.append(token)
            rows.append(after)
            accounts += self.accounts
        self.accounts = accounts
        return Generation(ids, np.stack(rows), stopped=int(np.argmax(rows[-1])) in stop)

    def score(self, token_ids: TokenIds, budget: Budget | None = None) -> F32:
        """Teacher-forced decoding: tokens added one step at a time.

        Returns their logits [n, vocabulary]. Unlike ``extend(all_logits=True)`` every token is a
        decode step of its own, as in ``generate``. ``accounts`` holds those of all steps.
        """
        accounts: list[Account] = []
        rows = []
        for token in np.asarray(token_ids, np.int64).tolist():
            rows.append(self.step(token, budget))
            accounts += self.accounts
        self.accounts = accounts
        return np.stack(rows) if rows else np.empty((0, self._model.vocabulary), np.float32)

    def fork(self, at: int = 0, *, name: str = "") -> Context:
        """A new context that begins with the first `at` tokens of this one; 0 means all."""
        return Context(self._worker, self._session.fork(self.sequence_id, at, name=name))

    def truncate(self, length: int) -> Ack:
        """Take tokens back from the end."""
        self.ack = self._session.truncate(self.sequence_id, length)
        self.length = length
        return self.ack

    def flush(self, *, seal: bool = False) -> Ack:
        """Make what is accepted power-safe, and seal what lies behind the recent window if asked."""
        self.ack = self._session.flush(self.sequence_id, seal=seal)
        return self.ack

    def close(self) -> Ack:
        """End the use of the sequence; what is committed stays."""
        return self._session.close_sequence(self.sequence_id)

    def delete(self) -> None:
        """Remove the sequence from the daemon."""
        self._session.delete(self.sequence_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
