"""A folder's files as one context: which fit, where each lies, and which line a token is of."""

from __future__ import annotations

import bisect
import dataclasses
import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path

from kvtier import Span, SpanKind
from kvtier.tokenizer import Tokenizer

__all__ = ["Repository", "Source", "find_sources", "read_source"]

SYSTEM = "You answer questions about source code. Be brief."
OPENING = "Here are files of a repository."
# Folders that hold no sources of the repository's own.
SKIPPED = {"node_modules", "vendor", "testdata", "build", "dist", "__pycache__"}
LARGEST_FILE = 1 << 20


@dataclasses.dataclass(slots=True)
class Source:
    """One file as tokens.

    Attributes:
        path: relative to the folder, with slashes.
        ids: a heading line with the path, then the text.
        begins: offset of each token in bytes of the file's text; negative in the heading.
        text: the file's bytes as they were encoded.
    """

    path: str
    ids: list[int]
    begins: list[int]
    text: bytes

    def line_of(self, token: int) -> int:
        """The line, from 1, in which a token begins; 0 for the heading with the path."""
        begin = self.begins[token]
        if begin < 0:
            return 0
        # A token may begin with the end of the line before: what it says is on its own line.
        rest = self.text[begin : begin + 64]
        begin += len(rest) - len(rest.lstrip(b"\r\n"))
        return self.text.count(b"\n", 0, begin) + 1

    def line(self, number: int) -> str:
        """The text of a line, from 1; the heading for 0."""
        return (
            self.text.split(b"\n")[number - 1].decode("utf-8", "replace").strip() if number else f"=== {self.path} ==="
        )


def find_sources(folder: Path, match: Sequence[str], skip: Sequence[str]) -> list[str]:
    """The files under `folder` whose name or path fits a pattern of `match` and none of `skip`, sorted.

    Hidden files and folders, links and files above 1 MiB are passed over.

    Raises:
        ValueError: `folder` is none, or no file is left.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f not in SKIPPED and not f.startswith(".")]
        for name in files:
            path = Path(root) / name
            inside = path.relative_to(folder).as_posix()
            wanted = _fits(inside, match) and not _fits(inside, skip) and not name.startswith(".")
            if wanted and path.is_file() and not path.is_symlink() and path.stat().st_size <= LARGEST_FILE:
                found.append(inside)
    if not found:
        raise ValueError(f"no file under {folder} matches {' '.join(match)}: see --match and --skip")
    return sorted(found)


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(path, p) or fnmatch.fnmatch(path.rpartition("/")[2], p) for p in patterns)


def read_source(folder: Path, path: str, tokenizer: Tokenizer) -> Source:
    """One file as tokens; bytes that are no UTF-8 are replaced."""
    text = (folder / path).read_text("utf-8", "replace")
    heading = f"\n\n=== {path} ===\n"
    ids = tokenizer.encode(heading + text, add_bos=False)
    begins, at = [], -len(heading.encode())
    for token in ids:
        begins.append(at)
        at += len(tokenizer.token_bytes(token))
    return Source(path, ids, begins, text.encode())


class Repository:
    """As many sources as fit into a context, between a conversation's opening and the question.

    Args:
        sources: candidates, by path.
        tokenizer: of the model that reads them.
        room: tokens that the context may have.
        order: which come first while there is room: "size" (smallest, so that most files fit) or "path".

    Attributes:
        kept, left: the sources that fit, by path, and those that do not.
        ids: the context's tokens.
        spans: the opening and each file, labelled.

    Raises ValueError if not even one file fits.
    """

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, room: int, order: str) -> None:
        self.ids = tokenizer.chat([("system", SYSTEM), ("user", OPENING)], open_end=True)
        self.spans = [Span(0, len(self.ids), "opening of the conversation", SpanKind.TEXT)]
        left_room = room - len(self.ids)
        taken = set()
        for source in sorted(sources, key=lambda s: len(s.ids)) if order == "size" else sources:
            if len(source.ids) <= left_room:
                taken.add(source.path)
                left_room -= len(source.ids)
        self.kept = [source for source in sources if source.path in taken]
        self.left = [source for source in sources if source.path not in taken]
        if not self.kept:
            smallest = min(len(source.ids) for source in sources)
            raise ValueError(f"the smallest file has {smallest:,} tokens, and only {left_room:,} fit: see --tokens")
        for source in self.kept:
            start = len(self.ids)
            self.ids += source.ids
            self.spans.append(Span(start, len(self.ids), source.path, SpanKind.FILE))
        self._starts = [span.start for span in self.spans[1:]]

    def find(self, position: int) -> tuple[Source, int] | None:
        """The file of a position and the line, as ``Source.line_of`` counts; None outside all files."""
        index = bisect.bisect_right(self._starts, position) - 1
        if index < 0 or position >= len(self.ids):
            return None
        source = self.kept[index]
        return source, source.line_of(position - self._starts[index])
