"""Ask a question about a folder of sources, and see which files the answer attended to.

A model reads the files once; kvtier keeps what it read, one labelled span a file, under a name.
The next run finds it by its tokens and asks at once. The answer comes from sparse attention; the
daemon's Explain says, for each of the answer's tokens, what attention each file received.

Some tokens receive attention whatever is asked: a model rests its attention on full stops, line
ends and what stands last. So a neutral question is asked, too, and files are ranked by what they
received beyond that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sources import Repository, find_sources, read_source

from kvtier import Account, Budget
from kvtier.command import Progress, add_daemon_arguments, open_session, run_command, size, table
from kvtier.gguf_model import Model
from kvtier.models import find_model
from kvtier.tokenizer import Tokenizer
from kvtier.worker import Context, Worker

QUESTION = "What does package tiertest do?"
NEUTRAL = "Say something about this."
NEUTRAL_TOKENS = 4
BLOCK = 64  # tokens that are found again are whole blocks of this size
# Room behind the files for a question and its answer.
RESERVE = 320
CONTEXT = {"smollm2": 8192, "gemma3": 32768}


@dataclasses.dataclass(slots=True)
class FileAttention:
    """What one file received; shares are means over steps, layers and query heads.

    Attributes:
        mass: share of all attention.
        read: part of it whose values were read, or kept exact; the rest was estimated.
        neutral: `mass` when the neutral question is asked instead, scaled so that all files together
            have what they have now (a long answer takes attention from all of them); 0 if not asked.
        gain: mass - neutral.
        one_head: the largest gain in a single query head.
    """

    path: str
    tokens: int
    mass: float
    read: float
    neutral: float
    gain: float
    one_head: float


class Watch:
    """Gathers what labelled spans receive, step by step, in the layers that attend to everything."""

    def __init__(self, context: Context, worker: Worker, repository: Repository) -> None:
        self._context, self._client, self._repository = context, worker.session.client, repository
        spec = worker.model.spec
        self.layers = [layer for layer in range(spec.layers) if not spec.window(layer)]
        self.query_heads = spec.query_heads
        self.steps = 0
        self._outside = 0.0
        self._read: Counter[str] = Counter()  # label -> sum over steps and layers
        self._heads: dict[str, NDArray[np.float64]] = {}  # label -> [layers, H], sum over steps
        self._lines: Counter[tuple[str, int]] = Counter()  # (path, line) -> sum over all

    def step(self) -> None:
        """Ask every layer what its last query did."""
        self.steps += 1
        for index, layer in enumerate(self.layers):
            explained = self._client.explain(
                self._context.sequence_id, layer, top=32, top_spans=len(self._repository.spans) + 1
            )
            self._outside += explained.mass_unlabelled
            for s in explained.spans:
                self._read[s.span.label] += s.mass_exact + s.mass_read
                self.heads(s.span.label)[index] += s.head_mass
            for head in explained.heads:
                for token in head.tokens:
                    if found := self._repository.find(token.position):
                        self._lines[found[0].path, found[1]] += token.weight

    def heads(self, label: str) -> NDArray[np.float64]:
        """[layers, H]: attention of a span in each head, summed over steps."""
        return self._heads.setdefault(label, np.zeros((len(self.layers), self.query_heads)))

    def mass(self, label: str) -> float:
        """Share of the attention a span received."""
        return float(self.heads(label).mean()) / self.steps

    def read(self, label: str) -> float:
        """Part of ``mass`` whose values were read."""
        return self._read[label] / (self.steps * len(self.layers))

    @property
    def outside(self) -> float:
        """Share of the attention that the question and the answer itself received."""
        return self._outside / (self.steps * len(self.layers))

    def lines(self) -> Counter[tuple[str, int]]:
        """(path, line) -> share of the attention, as far as the 32 strongest tokens of each head tell."""
        calls = self.steps * len(self.layers) * self.query_heads
        return Counter({line: weight / calls for line, weight in self._lines.items()})


def prepare(worker: Worker, repository: Repository, name: str) -> tuple[Context, int]:
    """The repository as a stored context: found, or read now. Returns (it, tokens found).

    Where only the beginning is found, as after a change of a file, the rest is read on a fork.
    """
    ids, session = repository.ids, worker.session
    match = session.match_prefix(worker.model.spec, ids)
    matched, found = match.tokens, match.sequence_id
    if found and len(ids) - matched < BLOCK:
        stored = worker.open(found)
        if stored.length >= len(ids):
            return stored, len(ids)
        stored.close()
    progress = Progress("reading", "tokens")
    if not matched:
        context = worker.create(name=name)
        context.prefill(ids, spans=repository.spans, chunk=256, progress=progress)
    else:
        context = Context(worker, session.fork(found, matched, name=name, match=match))
        # Exact attention, so that what is stored is what prefill would have made.
        for start in range(matched, len(ids), 256):
            context.extend(ids[start : start + 256], Budget.exact(), spans=_from(repository, start))
            progress(context.length, len(ids))
    context.flush(seal=True)
    return context, matched


def _from(repository: Repository, start: int) -> list[Any]:
    return [span for span in repository.spans if span.end > start]


def ask(
    worker: Worker, stored: Context, repository: Repository, question: str, count: int, share: float
) -> tuple[str, Watch, dict[str, Any]]:
    """Ask on a fork of the stored context, watching each step. Returns (answer, watch, costs)."""
    tokenizer, budget, n = worker.tokenizer, Budget.share(share), len(repository.ids)
    assert tokenizer is not None
    # A fork is made at a block's end; the tokens behind it, fewer than a block, are read again.
    at = n // BLOCK * BLOCK
    rest = [*repository.ids[at:], *tokenizer.chat_continue(f"\n\n{question}")]
    fork = Context(worker, worker.session.fork(stored.sequence_id, at, name=f"codebase: {question}"[:200]))
    watch = Watch(fork, worker, repository)
    answer: list[int] = []
    accounts: list[Account] = []
    decode = 0.0
    try:
        begin = time.perf_counter()
        logits = fork.extend(rest, budget, spans=_from(repository, at))
        first = time.perf_counter() - begin
        progress = Progress("answering", "tokens")
        while True:
            # The last query is the one that chooses the token that comes now.
            watch.step()
            token = int(np.argmax(logits))
            if token in tokenizer.stop_ids or len(answer) == count:
                break
            answer.append(token)
            begin = time.perf_counter()
            logits = fork.step(token, budget)
            decode += time.perf_counter() - begin
            accounts += fork.accounts
            progress(len(answer), count)
    finally:
        fork.delete()
    cost = Account.total(accounts)
    steps = max(1, len(answer))
    costs = {
        "first_token_seconds": first,
        "step_seconds": decode / steps,
        "mode": cost.mode.name.lower(),
        "share_read": cost.share_read,
        "bytes_ram_per_step": cost.bytes_ram / steps,
        "bytes_nvme_per_step": cost.bytes_nvme / steps,
        "estimated_error": cost.estimated_error,
        "answer_tokens": len(answer),
    }
    return tokenizer.decode(answer).strip(), watch, costs


def rank(repository: Repository, watch: Watch, neutral: Watch | None) -> list[FileAttention]:
    """The files by the attention that they received beyond a neutral question's, most first."""
    files = []
    scale = _scale(repository, watch, neutral)
    for source in repository.kept:
        path, mass = source.path, watch.mass(source.path)
        before = scale * neutral.mass(path) if neutral else 0.0
        heads = watch.heads(path) / watch.steps
        if neutral:
            heads = heads - scale * neutral.heads(path) / neutral.steps
        files.append(
            FileAttention(path, len(source.ids), mass, watch.read(path), before, mass - before, float(heads.max()))
        )
    return sorted(files, key=lambda file: -file.gain)


def _scale(repository: Repository, watch: Watch, neutral: Watch | None) -> float:
    """What makes the neutral question's attention to all files together equal to the question's."""
    if neutral is None:
        return 0.0
    of_question, of_neutral = (sum(w.mass(source.path) for source in repository.kept) for w in (watch, neutral))
    return of_question / of_neutral


def rank_lines(repository: Repository, watch: Watch, neutral: Watch | None, count: int) -> list[dict[str, Any]]:
    """Lines as files are ranked, with their text."""
    gains = watch.lines()
    if neutral:
        scale = _scale(repository, watch, neutral)
        gains.subtract({line: scale * weight for line, weight in neutral.lines().items()})
    texts = {source.path: source for source in repository.kept}
    return [
        {"path": path, "line": line, "gain": gain, "text": texts[path].line(line)}
        for (path, line), gain in gains.most_common(count)
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prepare the context, ask, and return what is to be shown."""
    paths = find_sources(args.folder, args.match, args.skip)
    model_path = find_model(args.model)
    tokenizer = Tokenizer.from_gguf(model_path)
    sources = [read_source(args.folder, path, tokenizer) for path in paths]
    question = len(tokenizer.encode(args.ask, add_bos=False))
    room = (args.tokens or CONTEXT.get(args.model, 8192)) - RESERVE - question - args.answer_tokens
    repository = Repository(sources, tokenizer, room, args.order)
    fit = f"{len(repository.kept)} of {len(sources)} files fit, {len(repository.ids):,} tokens"
    print(f"{fit}; loading {model_path.name}", file=sys.stderr, flush=True)
    model = Model.load(model_path)
    with open_session(args, "codebase example") as session:
        worker = Worker(model, session, tokenizer)
        name = args.name or f"codebase {args.folder.resolve().name}"
        begin = time.perf_counter()
        stored, found = prepare(worker, repository, name)
        took = time.perf_counter() - begin
        try:
            answer, watch, costs = ask(worker, stored, repository, args.ask, args.answer_tokens, args.share)
            neutral = None
            if args.neutral:
                _, neutral, _ = ask(worker, stored, repository, NEUTRAL, NEUTRAL_TOKENS, args.share)
        finally:
            stored.close()
    files = rank(repository, watch, neutral)
    return {
        "model": model.config.name,
        "folder": str(args.folder),
        "tokens": len(repository.ids),
        "tokens_found": found,
        "prepare_seconds": took,
        "kept_until_next_run": bool(args.addr or args.data),
        "files_kept": [source.path for source in repository.kept],
        "files_left_out": [{"path": source.path, "tokens": len(source.ids)} for source in repository.left],
        "question": args.ask,
        "answer": answer,
        "steps": watch.steps,
        "layers": len(watch.layers),
        "query_heads": model.spec.query_heads,
        "costs": costs,
        "neutral_question": NEUTRAL if neutral else None,
        "files": [dataclasses.asdict(file) for file in files],
        "opening_mass": watch.mass(repository.spans[0].label),
        "question_and_answer_mass": watch.outside,
        "lines": rank_lines(repository, watch, neutral, args.lines),
    }


def show(report: dict[str, Any], top: int) -> None:
    """Print a report for people."""
    left, costs, n, took = report["files_left_out"], report["costs"], report["tokens"], report["prepare_seconds"]
    print(f"Context   {len(report['files_kept'])} files, {n:,} tokens, {report['model']}")
    if left:
        names = ", ".join(file["path"] for file in left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        print(
            f"Left out  {len(left)} files, {sum(file['tokens'] for file in left):,} tokens, for lack of room: {names}"
        )
    if report["tokens_found"] == n:
        print(f"Reading   found in the daemon in {took:.2f} s; no token was read again")
    elif report["tokens_found"]:
        print(f"Reading   {report['tokens_found']:,} tokens were found in the daemon, the rest read in {took:.1f} s")
    else:
        kept = (
            "kept for the next run" if report["kept_until_next_run"] else "gone after this run: give --data to keep it"
        )
        print(f"Reading   {n:,} tokens in {took:.1f} s; {kept}")
    print(f"\nQuestion  {report['question']}\nAnswer    {report['answer'] or '(empty)'}")
    moved = costs["bytes_ram_per_step"] + costs["bytes_nvme_per_step"]
    how = (
        "from all that is stored" if costs["mode"] == "exact" else f"from {costs['share_read']:.0%} of the sealed bytes"
    )
    print(f"Cost      each of {costs['answer_tokens']} tokens {how} ({size(moved)}), estimated error "
          f"{costs['estimated_error']:.3f}; first token after {costs['first_token_seconds']:.1f} s, then "
          f"{1e3 * costs['step_seconds']:.0f} ms each")  # fmt: skip
    beyond = (
        f', beyond what they receive when asked "{report["neutral_question"]}"' if report["neutral_question"] else ""
    )
    print(f"\nFiles by the attention they received{beyond}")
    print(f"(means over {report['steps']} steps, {report['layers']} layers, {report['query_heads']} query heads)")
    _show_files(report, top)
    print("\nLines, likewise, as far as their strongest tokens tell")
    rows = [["gain", "where", "line"]]
    for line in report["lines"]:
        where = f"{line['path']}:{line['line']}" if line["line"] else f"{line['path']} (its name)"
        rows.append([f"{line['gain']:+.2%}", where, line["text"][:70]])
    print(table(rows, right=(0,)))


def _show_files(report: dict[str, Any], top: int) -> None:
    rows = [["", "gain", "one head", "attention", "neutral", "of it read", "tokens", "file"]]

    def add(number: str, file: dict[str, Any], name: str) -> None:
        read = f"{file['read'] / file['mass']:.0%}" if file["mass"] else "-"
        rows.append([number, f"{file['gain']:+.2%}", f"{file['one_head']:+.1%}", f"{file['mass']:.2%}",
                     f"{file['neutral']:.2%}", read, f"{file['tokens']:,}", name])  # fmt: skip

    files = report["files"]
    for number, file in enumerate(files[:top], 1):
        add(str(number), file, file["path"])
    if rest := files[top:]:
        both = {key: sum(file[key] for file in rest) for key in ("mass", "read", "gain", "neutral", "tokens")}
        add("", {**both, "one_head": max(file["one_head"] for file in rest)}, f"{len(rest)} other files")
    for name in ("question_and_answer", "opening"):
        rows.append(["", "", "", f"{report[name + '_mass']:.2%}", "", "", "", name.replace("_", " ")])
    if report["neutral_question"] is None:  # then a gain is the attention itself
        rows = [row[:1] + row[2:4] + row[5:] for row in rows]
    print(table(rows, right=range(len(rows[0]) - 1)))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).resolve().parents[2],
                        help="folder with the sources (default: this repository)")  # fmt: skip
    parser.add_argument("--ask", default=QUESTION, help=f"the question (default: {QUESTION})")
    parser.add_argument("--match", action="append", help="pattern of files to read; may be repeated (default: *.go)")
    parser.add_argument("--skip", action="append",
                        help="pattern of files to pass over; may be repeated (default: *_test.go *.pb.go)")  # fmt: skip
    parser.add_argument("--order", choices=("size", "path"), default="size",
                        help="which files come first while there is room: by size (the default), or path")  # fmt: skip
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3 or a GGUF file (default: smollm2)")
    parser.add_argument("--tokens", type=int, help="tokens of context (default: the model's, 8,192 or 32,768)")
    parser.add_argument("--answer-tokens", type=int, default=24, help="longest answer (default: 24)")
    parser.add_argument("--share", type=float, default=0.2, help="share of the sealed bytes to read (default: 0.2)")
    parser.add_argument("--neutral", action=argparse.BooleanOptionalAction, default=True,
                        help="also ask a neutral question and rank by what was received beyond it")  # fmt: skip
    parser.add_argument("--top", type=int, default=8, help="files to show (default: 8)")
    parser.add_argument("--lines", type=int, default=8, help="lines to show (default: 8)")
    parser.add_argument("--name", help="the context's name in the daemon (default: codebase and the folder's name)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_daemon_arguments(parser, ram="64MiB")
    args = parser.parse_args(argv)
    args.match, args.skip = args.match or ["*.go"], args.skip or ["*_test.go", "*.pb.go"]
    if not args.ask.strip():
        parser.error("--ask must not be empty")
    if not 0 < args.share <= 1:
        parser.error("--share must be in (0, 1]")
    if not 1 <= args.answer_tokens <= 512 or args.top < 1 or args.lines < 0:
        parser.error("--answer-tokens is 1 to 512, --top at least 1, --lines at least 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, 2 (it could not run) or 130 (interrupted)."""
    args = arguments(argv)

    def work() -> int:
        report = run(args)
        if args.json:
            print(json.dumps(report, indent=2))
        else:
            show(report, args.top)
        return 0

    return run_command("codebase", work)


if __name__ == "__main__":
    sys.exit(main())
