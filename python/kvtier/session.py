"""A worker's session: gRPC for control, the fast path for Append and Attend where there is one."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvtier.client import Client, OpenedSequence, PrefixMatch, TokenIds
from kvtier.errors import KvtierError, NotFoundError, ResourceExhaustedError, UnavailableError
from kvtier.fastpath import FastClient
from kvtier.types import Ack, AttendItem, AttendResult, Budget, ModelSpec, Profile, Span

__all__ = ["Session"]

T = TypeVar("T")

# The fast path's errors carry no delay of their own.
_RETRY_SECONDS = 0.05
# A fast socket that was not there is looked for again after this long.
_RECONNECT_SECONDS = 1.0


class Session:
    """A lease that is kept alive, and the quicker of two ways for each call.

    Args:
        target: gRPC address, as for ``Client``.
        fast_path: the fast socket's path, which must then be there; None looks for ``fast.sock``
            beside a ``unix://`` target's socket and does without if there is none; "" never uses it.
        lease_seconds: how long what this session holds outlives its process.
        holder: shown to people who list leases.
        timeout: seconds for each call that is not given its own.
        patience: seconds for which an append or attend is repeated while the daemon pushes back
            (ResourceExhaustedError).

    A daemon that was restarted is found again by the next call; sequences are opened anew by their
    ids. Appends are idempotent, so a call that failed with UnavailableError may be repeated.
    """

    def __init__(
        self,
        target: str,
        *,
        fast_path: str | None = None,
        lease_seconds: int = 60,
        holder: str = "",
        timeout: float = 60.0,
        patience: float = 30.0,
    ) -> None:
        self.client = Client(target, timeout=timeout)
        self.timeout = timeout
        self.patience = patience
        self._fast_path = _beside(target) if fast_path is None else fast_path
        self._fast: FastClient | None = None
        self._fast_next_try = 0.0
        self._lease_seconds = lease_seconds
        self._holder = holder or f"{os.uname().nodename}:{os.getpid()}"
        self._stop = threading.Event()
        try:
            self.lease_id, _ = self.client.create_lease(lease_seconds, self._holder)
            if fast_path:
                self._fast = FastClient(fast_path, timeout=timeout)
            else:
                self._fast_client()
        except BaseException:
            self.client.close()
            raise
        self._renewer = threading.Thread(target=self._renew, name="kvtier-lease", daemon=True)
        self._renewer.start()

    @property
    def uses_fast_path(self) -> bool:
        """Whether Append and Attend go over the fast path now."""
        return self._fast is not None and not self._fast.closed

    def close(self) -> None:
        """Revoke the lease and close both connections. What is committed stays."""
        self._stop.set()
        self._renewer.join(timeout=1)
        if self._fast is not None:
            self._fast.close()
        # The lease runs out by itself where the daemon cannot be told.
        with contextlib.suppress(KvtierError):
            self.client.revoke_lease(self.lease_id)
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fast_client(self) -> FastClient | None:
        """The fast connection, made anew if it broke; None means gRPC."""
        if self._fast is not None and not self._fast.closed:
            return self._fast
        self._fast = None
        now = time.monotonic()
        if self._fast_path and now >= self._fast_next_try:
            self._fast_next_try = now + _RECONNECT_SECONDS
            # Where nobody listens, or the file is a dead daemon's, gRPC serves instead.
            if os.path.exists(self._fast_path):
                with contextlib.suppress(UnavailableError):
                    self._fast = FastClient(self._fast_path, timeout=self.timeout)
        return self._fast

    def _renew(self) -> None:
        while not self._stop.wait(self._lease_seconds / 3):
            try:
                self.client.renew_lease(self.lease_id)
            except NotFoundError:  # it ran out, or the daemon was restarted
                with contextlib.suppress(KvtierError):
                    self._renew_lost()
            except KvtierError:
                continue  # not reachable now; the next round tries again

    def _renew_lost(self) -> None:
        self.lease_id, _ = self.client.create_lease(self._lease_seconds, self._holder)

    def _with_lease(self, call: Any) -> OpenedSequence:
        try:
            return call(self.lease_id)  # type: ignore[no-any-return]
        except NotFoundError as error:
            # A restarted daemon knows no leases. A sequence that is not there fails again below.
            if "LEASE" not in error.reason and "lease" not in error.message:
                raise
            self._renew_lost()
            return call(self.lease_id)  # type: ignore[no-any-return]

    # -- sequences ------------------------------------------------------------------------------

    def create(self, spec: ModelSpec, *, name: str = "", profile: Profile = Profile.UNSPECIFIED) -> OpenedSequence:
        """As ``Client.create``, under this session's lease."""
        return self._with_lease(lambda lease: self.client.create(spec, name=name, profile=profile, lease_id=lease))

    def open(self, sequence_id: str, *, spec: ModelSpec | None = None) -> OpenedSequence:
        """As ``Client.open``, under this session's lease."""
        return self._with_lease(lambda lease: self.client.open(sequence_id, spec=spec, lease_id=lease))

    def fork(
        self, sequence_id: str, at: int = 0, *, name: str = "", match: PrefixMatch | None = None
    ) -> OpenedSequence:
        """As ``Client.fork``, under this session's lease."""
        return self._with_lease(
            lambda lease: self.client.fork(sequence_id, at, name=name, match=match, lease_id=lease)
        )

    def match_prefix(
        self,
        spec: ModelSpec,
        token_ids: TokenIds,
        *,
        profile: Profile = Profile.UNSPECIFIED,
        allow_sparse: bool = False,
    ) -> PrefixMatch:
        """As ``Client.match_prefix``."""
        return self.client.match_prefix(spec, token_ids, profile=profile, allow_sparse=allow_sparse)

    def append(
        self,
        sequence_id: str,
        layer: int,
        start: int,
        k: NDArray[Any] | None = None,
        v: NDArray[Any] | None = None,
        *,
        token_ids: TokenIds | None = None,
        token_text: Sequence[bytes] | None = None,
        spans: Sequence[Span] = (),
        queries: NDArray[Any] | None = None,
        convert: bool = False,
        sparse_provenance: bool = False,
        timeout: float | None = None,
    ) -> Ack:
        """As ``Client.append``; rows go over the fast path, text and spans over gRPC."""
        fast = self._fast_client()
        if fast is None or k is None or v is None:
            return self._patiently(
                lambda: self.client.append(
                    sequence_id,
                    layer,
                    start,
                    k,
                    v,
                    token_ids=token_ids,
                    token_text=token_text,
                    spans=spans,
                    queries=queries,
                    convert=convert,
                    sparse_provenance=sparse_provenance,
                    timeout=timeout,
                )
            )
        ack = self._patiently(
            lambda: fast.append(
                sequence_id,
                layer,
                start,
                k,
                v,
                token_ids=token_ids,
                queries=queries,
                convert=convert,
                sparse_provenance=sparse_provenance,
                timeout=timeout,
            )
        )
        if token_text or spans:
            ack = self._patiently(
                lambda: self.client.append(
                    sequence_id,
                    layer,
                    start,
                    token_ids=token_ids,
                    token_text=token_text,
                    spans=spans,
                    timeout=timeout,
                )
            )
        return ack

    def attend(
        self,
        sequence_id: str,
        layer: int,
        start: int,
        q: NDArray[Any],
        *,
        k: NDArray[Any] | None = None,
        v: NDArray[Any] | None = None,
        token_ids: TokenIds | None = None,
        partial: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
        budget: Budget | None = None,
        timeout: float | None = None,
    ) -> AttendResult:
        """As ``Client.attend``."""
        item = AttendItem(sequence_id, start, q, k, v, token_ids, partial)
        return self.attend_many(layer, [item], budget=budget, timeout=timeout)[0]

    def attend_many(
        self,
        layer: int,
        items: Sequence[AttendItem],
        *,
        budget: Budget | None = None,
        timeout: float | None = None,
    ) -> list[AttendResult]:
        """As ``Client.attend_many``."""
        way: FastClient | Client = self._fast_client() or self.client
        return self._patiently(lambda: way.attend_many(layer, items, budget=budget, timeout=timeout))

    def _patiently(self, call: Callable[[], T]) -> T:
        """Repeat a call while the daemon is out of room, as long as `patience` lasts.

        The daemon pushes back until sealing has caught up; both calls may be repeated, because
        rows that were taken already are accepted again.
        """
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return call()
            except ResourceExhaustedError as error:
                delay = _RETRY_SECONDS if error.retry_delay is None else error.retry_delay
                if time.monotonic() + delay > deadline:
                    raise
                time.sleep(delay)

    def truncate(self, sequence_id: str, length: int) -> Ack:
        """As ``Client.truncate``."""
        return self.client.truncate(sequence_id, length)

    def flush(self, sequence_id: str, *, seal: bool = False, timeout: float | None = None) -> Ack:
        """As ``Client.flush``."""
        return self.client.flush(sequence_id, seal=seal, timeout=timeout)

    def close_sequence(self, sequence_id: str) -> Ack:
        """As ``Client.close_sequence``."""
        if self._fast is not None:
            self._fast.forget(sequence_id)
        return self.client.close_sequence(sequence_id)

    def delete(self, sequence_id: str) -> None:
        """As ``Client.delete``."""
        if self._fast is not None:
            self._fast.forget(sequence_id)
        self.client.delete(sequence_id)

    def pin(self, sequence_id: str, start: int = 0, end: int = 0) -> tuple[int, int]:
        """As ``Client.pin``, under this session's lease."""
        return self.client.pin(sequence_id, self.lease_id, start, end)


def _beside(target: str) -> str:
    for prefix in ("unix://", "unix:"):
        if target.startswith(prefix):
            return os.path.join(os.path.dirname(target.removeprefix(prefix)), "fast.sock")
    return ""
