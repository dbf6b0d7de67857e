"""Find a moment in a half-hour video whose frames lie in kvtier: more than 100,000 tokens.

The video, its embeddings and the attention layers are SYNTHETIC (synthetic.py); the daemon, what
it stores, reads and estimates are real. Frames are tokens with opaque content ids, shots are
labelled spans with timestamps. An event is planted at a known time; a query made from it has to
find that time again, reading a fifth of what is stored.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from synthetic import EMBEDDING, EVENT_SECONDS, Projection, Video

from kvtier import Account, Budget, ModelSpec, Session, Span, SpanKind, to_bf16
from kvtier.command import Progress, add_daemon_arguments, clock, open_session, run_command, size, table

F32 = NDArray[np.float32]

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 64
CHUNK_TOKENS = 4096
QUERY_STRIDE = 8  # one query in so many tells the daemon what to group tokens by
TOP_SHOTS = 4


@dataclasses.dataclass(slots=True)
class Moment:
    """A shot that a query attended to; shares are means over layers and query heads."""

    label: str
    mass: float
    read: float
    estimated: float


@dataclasses.dataclass(slots=True)
class Look:
    """One question to the video: what it attended to, and what it cost, sparse and exact.

    Attributes:
        strongest: second of the frame that the strongest tokens belong to, weighed by attention.
        error: relative distance of the sparse output from the exact one, mean over layers.
    """

    question: str
    shots: list[Moment]
    strongest: float
    sparse: Account
    exact: Account
    sparse_ms: float
    exact_ms: float
    error: float


def label_of(video: Video, shot: Any) -> str:
    """A shot's label, as 00:17:20-00:17:31 shot 83, scene 12."""
    begin, end = clock(shot.first / video.fps), clock(shot.last / video.fps)
    return f"{begin}-{end} shot {shot.number}, scene {shot.scene}"


def spans_of(video: Video) -> list[Span]:
    """A labelled span for every shot, in tokens."""
    p = video.patches
    return [Span(s.first * p, s.last * p, label_of(video, s), SpanKind.VIDEO) for s in video.shots]


class Library:
    """Videos in the daemon's hands.

    Args:
        session: the connection.
        projection: stands for the model that attends.
    """

    def __init__(self, session: Session, projection: Projection) -> None:
        self.session = session
        self.projection = projection
        self.spec = ModelSpec(
            LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, projection.fingerprint("kvtier example, synthetic video")
        )

    def store(self, video: Video, name: str, progress: Callable[[int, int], None]) -> tuple[str, int]:
        """Put a video into the daemon, unless its content is there. Returns (sequence id, tokens found)."""
        ids = np.concatenate([video.content_ids(video.embeddings(f, f + 1)) for f in range(video.frames)])
        match = self.session.match_prefix(self.spec, ids)
        matched, found = match.tokens, match.sequence_id
        # Names cover whole blocks of 64 tokens; what is missing of the last one is no reason to read again.
        if found and len(ids) - matched < 64 and self.session.client.describe(found).info.ack.accepted == len(ids):
            self.session.open(found)
            return found, len(ids)
        sequence = self.session.create(self.spec, name=name).sequence_id
        spans = spans_of(video)
        step = max(1, CHUNK_TOKENS // video.patches)
        for first in range(0, video.frames, step):
            last = min(video.frames, first + step)
            self._append(sequence, video, first, last, ids, spans)
            progress(last * video.patches, video.tokens)
        self.session.flush(sequence, seal=True, timeout=600)
        return sequence, 0

    def _append(
        self, sequence: str, video: Video, first: int, last: int, ids: NDArray[np.uint64], spans: list[Span]
    ) -> None:
        x, start, end = video.embeddings(first, last), first * video.patches, last * video.patches
        for layer in range(LAYERS):
            k, v = self.projection.keys_values(layer, x, start)
            q = self.projection.queries(layer, x, start)[::QUERY_STRIDE]
            self.session.append(
                sequence, layer, start, to_bf16(k), to_bf16(v), convert=True, queries=to_bf16(q),
                token_ids=ids[start:end] if layer == 0 else None,
            )  # fmt: skip
        # A span may be sent once every layer has its tokens.
        ending = [span for span in spans if start < span.end <= end]
        if ending:
            self.session.append(sequence, 0, start, token_ids=ids[start:end], spans=ending)

    def look(self, sequence: str, video: Video, question: str, embedding: F32, share: float) -> Look:
        """Ask with one embedding [EMBEDDING], sparsely and then exactly, on a fork of the video."""
        fork = self.session.fork(sequence, name=f"video, {question}").sequence_id
        try:
            sparse, outputs, sparse_ms = self.attend(fork, video, embedding, Budget.share(share))
            shots, strongest = self._attended(fork, video)
            exact, truth, exact_ms = self.attend(fork, video, embedding, Budget.exact())
        finally:
            self.session.delete(fork)
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(outputs, truth, strict=True)]
        return Look(question, shots, strongest, sparse, exact, sparse_ms, exact_ms, float(np.mean(errors)))

    def attend(self, fork: str, video: Video, embedding: F32, budget: Budget) -> tuple[Account, list[F32], float]:
        """One attend a layer from the embedding, as one more token behind the video.

        Returns (what all layers cost, their outputs [H, d], milliseconds).
        """
        accounts, outputs, ms, position = [], [], 0.0, video.tokens
        for layer in range(LAYERS):
            k, v = self.projection.keys_values(layer, video.question[None], position)
            q = self.projection.queries(layer, embedding[None], position)
            begin = time.perf_counter()
            # Rows that are there already are accepted again, as they are equal.
            result = self.session.attend(fork, layer, position, q, k=k, v=v, budget=budget)
            ms += 1e3 * (time.perf_counter() - begin)
            accounts.append(result.account)
            outputs.append(result.output[0])
        return Account.total(accounts), outputs, ms

    def _attended(self, fork: str, video: Video) -> tuple[list[Moment], float]:
        moments: dict[str, Moment] = {}
        rest = [
            Moment(f"{max(0, len(video.shots) - TOP_SHOTS)} other shots", 0, 0, 0),
            Moment("the question itself", 0, 0, 0),
        ]
        weights: Counter[int] = Counter()
        for layer in range(LAYERS):
            explained = self.session.client.explain(fork, layer, top=64, top_spans=len(video.shots))
            for s in explained.spans:
                m = moments.setdefault(s.span.label, Moment(s.span.label, 0, 0, 0))
                m.mass += s.mass / LAYERS
                m.read += s.mass_read / LAYERS
                m.estimated += (s.mass_scanned + s.mass_estimated) / LAYERS
            for head in explained.heads:
                for token in head.tokens:
                    if token.position < video.tokens:
                        weights[token.position // video.patches] += token.weight
            rest[1].mass += explained.mass_unlabelled / LAYERS
        ranked = sorted(moments.values(), key=lambda m: -m.mass)
        for m in ranked[TOP_SHOTS:]:
            rest[0].mass, rest[0].read, rest[0].estimated = (
                rest[0].mass + m.mass, rest[0].read + m.read, rest[0].estimated + m.estimated
            )  # fmt: skip
        return ranked[:TOP_SHOTS] + rest, weights.most_common(1)[0][0] / video.fps


def in_ram(library: Library, sequence: str, video: Video, embedding: F32, share: float) -> list[list[str]]:
    """The event's question again while its shot is pinned, and with everything prefetched."""
    session = library.session
    shot = video.shot_at(video.event_frames[0])
    first, last = shot.first * video.patches, shot.last * video.patches
    fork = session.fork(sequence, name="video, pin and prefetch").sequence_id
    rows = [["", "shot in RAM", "video in RAM", "from RAM", "from NVMe"]]

    def ask(what: str) -> None:
        account, _, _ = library.attend(fork, video, embedding, Budget.share(share))
        of_shot, of_all = _shares_in_ram(session, sequence, first, last)
        rows.append([what, f"{of_shot:.0%}", f"{of_all:.0%}", size(account.bytes_ram), size(account.bytes_nvme)])

    try:
        ask("before")
        pin, _ = session.pin(sequence, first, last)
        _settle(session, sequence)
        ask(f"shot {shot.number} pinned")
        # What reads everything moves everything through RAM; the pin holds against it.
        library.attend(fork, video, embedding, Budget.exact())
        ask("after reading everything")
        session.client.unpin(pin)
        session.client.prefetch(sequence, range(LAYERS))
        _settle(session, sequence)
        ask("unpinned, all prefetched")
    finally:
        session.delete(fork)
    return rows


def _shares_in_ram(session: Session, sequence: str, first: int, last: int) -> tuple[float, float]:
    """Shares of the pieces that lie in RAM: of sealed spans that hold tokens [first, last), and of all."""
    sealed = session.client.describe(sequence).sealed
    layers = session.client.residency(sequence).layers
    touched = [i for i, span in enumerate(sealed) if span.start < last and span.start + span.tokens > first]
    of_shot = [layer.ram_share[i] for layer in layers for i in touched]
    of_all = [share for layer in layers for share in layer.ram_share]
    return float(np.mean(of_shot or [0])), float(np.mean(of_all or [0]))


def _settle(session: Session, sequence: str, seconds: float = 5.0) -> None:
    """Wait until the background stops bringing pieces into RAM."""
    before, deadline = -1, time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = sum(plane.bytes_ram for plane in session.client.residency(sequence).planes)
        if now == before:
            return
        before = now
        time.sleep(0.2)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Store the video, ask, and return what is to be shown."""
    frames = round(args.minutes * 60 * args.fps)
    video = Video(frames, args.fps, args.tokens_per_frame, args.event, args.seed)
    projection = Projection(LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, args.seed)
    with open_session(args, "video example") as session:
        library = Library(session, projection)
        begin = time.perf_counter()
        sequence, found = library.store(video, args.name, Progress("storing", "tokens"))
        took = time.perf_counter() - begin
        try:
            rng = np.random.default_rng((args.seed, 2))
            noise = (rng.standard_normal((2, EMBEDDING)) / np.sqrt(EMBEDDING)).astype(np.float32)
            scene = Counter(s.scene for s in video.shots).most_common(1)[0][0]
            # As from an encoder of words: near what is looked for, not equal to it.
            event, place = video.event + 0.5 * noise[0], video.scenes[scene] + 0.5 * noise[1]
            event, place = event / np.linalg.norm(event), place / np.linalg.norm(place)
            looks = [
                library.look(sequence, video, "when does the event happen?", event, args.share),
                library.look(sequence, video, f"when is scene {scene} shown?", place, args.share),
            ]
            ram = in_ram(library, sequence, video, event, args.share)
            info = session.client.describe(sequence)
        finally:
            session.close_sequence(sequence)
    at = video.event_frames[0] / video.fps
    return {
        "synthetic": True,
        "minutes": args.minutes,
        "frames": frames,
        "tokens": video.tokens,
        "tokens_found": found,
        "store_seconds": took,
        "stored_bytes": info.info.sealed_bytes,
        "tokens_sealed": info.info.ack.sealed,
        "shots": len(video.shots),
        "event_at": at,
        "event_found_at": looks[0].strongest,
        "event_found": at <= looks[0].strongest <= at + EVENT_SECONDS,
        "scene_shots": sum(s.scene == scene for s in video.shots),
        "looks": [dataclasses.asdict(look) for look in looks],
        "ram": ram,
    }


def show(report: dict[str, Any]) -> None:
    """Print a report for people."""
    n, took = report["tokens"], report["store_seconds"]
    geometry = f"{LAYERS} layers, {QUERY_HEADS} query heads, {KV_HEADS} KV heads of {HEAD_DIM}"
    frames = f"{report['minutes']:g} min, {report['frames']:,} frames, {report['shots']} shots"
    print(f"Video (synthetic)  {frames}, {n:,} tokens")
    print(f"Attention          {geometry}; random projections with RoPE")
    if report["tokens_found"]:
        print(f"Stored             found by its content ids in {took:.1f} s, nothing was read again")
    else:
        sealed = f"{report['tokens_sealed']:,} sealed in {size(report['stored_bytes'])}"
        print(f"Stored             {n:,} tokens in {took:.1f} s, {sealed}")
    for look in report["looks"]:
        print(f"\n{look['question'].capitalize()}")
        rows = [["attention", "read", "estimated", "when"]]
        rows += [[f"{s[key]:.1%}" for key in ("mass", "read", "estimated")] + [s["label"]] for s in look["shots"]]
        print(table(rows, right=(0, 1, 2)))
        rows = [["", "read", "of all", "RAM", "NVMe", "time"]]
        for way in ("sparse", "exact"):
            a = look[way]
            read = a["bytes_ram"] + a["bytes_nvme"]
            rows.append([way, size(read), f"{read / max(1, a['bytes_full']):.1%}", size(a["bytes_ram"]),
                         size(a["bytes_nvme"]), f"{look[way + '_ms']:.0f} ms"])  # fmt: skip
        print(table(rows, right=(1, 2, 3, 4, 5)))
        a = look["sparse"]
        said = f"the daemon said {a['estimated_error']:.1%}, and {a['codec_error']:.1%} for the codec"
        print(f"  the sparse output differs from the exact one by {look['error']:.1%} ({said})")
    print("\nNVMe is read in blocks of 4 KiB, so that a sparse query moves more from there than it asks for.")
    print("\nThe event's question again: where its bytes come from")
    print(table(report["ram"], right=(1, 2, 3, 4)))
    verdict = "found" if report["event_found"] else "NOT FOUND"
    print(f"\nThe event was planted at {clock(report['event_at'])} and {verdict}: the strongest frame is at "
          f"{clock(report['event_found_at'])}.")  # fmt: skip


def _time(text: str) -> float:
    try:
        parts = [float(part) for part in text.split(":")]
        if not 1 <= len(parts) <= 3 or min(parts) < 0:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: use HH:MM:SS, MM:SS or seconds") from None
    return sum(part * 60**i for i, part in enumerate(reversed(parts)))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="length of the video (default: 30)")
    parser.add_argument("--fps", type=float, default=1, help="frames a second (default: 1)")
    parser.add_argument("--tokens-per-frame", type=int, default=64, help="tokens of a frame (default: 64)")
    parser.add_argument("--event", type=_time, help="when the event happens, as 00:17:23 (default: after 58 %% of it)")
    parser.add_argument("--share", type=float, default=0.2, help="share of the sealed bytes to read (default: 0.2)")
    parser.add_argument("--seed", type=int, default=1, help="another seed is another video (default: 1)")
    parser.add_argument("--name", default="example video", help="the sequence's name (default: example video)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_daemon_arguments(parser, ram="16MiB")
    args = parser.parse_args(argv)
    seconds = args.minutes * 60
    args.event = float(int(0.58 * seconds)) if args.event is None else args.event
    if not 1 <= round(seconds * args.fps) <= 1_000_000 or not 1 <= args.tokens_per_frame <= 4096:
        parser.error("a video has 1 to 1,000,000 frames of 1 to 4,096 tokens: see --minutes, --fps, --tokens-per-frame")
    if int(args.event * args.fps) >= round(seconds * args.fps):
        parser.error(f"--event {clock(args.event)} is not within a video of {clock(seconds)}")
    if not 0 < args.share <= 1:
        parser.error("--share must be in (0, 1]")
    if args.seed < 0:
        parser.error("--seed must not be negative")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, 1 (the event was not found), 2 (it could not run) or 130."""
    args = arguments(argv)

    def work() -> int:
        report = run(args)
        if args.json:
            print(json.dumps(report, indent=2))
        else:
            show(report)
        return 0 if report["event_found"] else 1

    return run_command("video", work)


if __name__ == "__main__":
    sys.exit(main())
