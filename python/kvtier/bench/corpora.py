"""The texts that measurements read: two for tuning, two held out for reporting.

Whatever is adjusted (budgets, shares, codes) is adjusted on the tuning texts; figures that are
reported come from the held-out ones. All of them are on any machine that can build kvtier: Go's
and Python's own sources and documentation. Each is a fixed function of the Go or Python version,
which ``describe`` names.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import platform
import pydoc_data.topics
import subprocess
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from kvtier.tokenizer import Tokenizer

__all__ = [
    "CORPORA",
    "DEFAULT_CORPUS",
    "CorpusError",
    "add_arguments",
    "corpus",
    "describe",
    "digest",
    "source",
    "token_ids",
]

CORPORA = {
    "tuning-code": "Go's net/http package, sources without tests",
    "tuning-docs": "first half of Python's reference by topic (pydoc_data.topics)",
    "held-out-code": "Python's email and http packages, sources",
    "held-out-docs": "second half of Python's reference by topic (pydoc_data.topics)",
}
DEFAULT_CORPUS = "held-out-code"


class CorpusError(ValueError):
    """A text is not on this machine, or is too short."""


@functools.cache
def corpus(name: str) -> str:
    """The text `name`, one of ``CORPORA``. Raises CorpusError if it is not on this machine."""
    match name:
        case "tuning-code":
            folder = _go_root() / "src" / "net" / "http"
            return _join(file for file in sorted(folder.glob("*.go")) if not file.name.endswith("_test.go"))
        case "held-out-code":
            library = Path(sysconfig.get_paths()["stdlib"])
            return _join(file for part in ("email", "http") for file in sorted((library / part).rglob("*.py")))
        case "tuning-docs":
            return _topics()[0]
        case "held-out-docs":
            return _topics()[1]
    raise CorpusError(f"no text {name!r}; there are {', '.join(CORPORA)}")


def describe(name: str) -> str:
    """What the text `name` is, with the version it came from."""
    if name == "tuning-code":
        version = (_go_root() / "VERSION").read_text().split("\n")[0]
    else:
        version = f"Python {platform.python_version()}"
    return f"{CORPORA[name]} ({version})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --corpus and --text, which exclude each other; ``source`` reads what they chose."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--corpus",
        choices=sorted(CORPORA),
        default=DEFAULT_CORPUS,
        help=f"a text that is on every machine (default: {DEFAULT_CORPUS}); report figures from held-out ones only",
    )
    group.add_argument("--text", type=Path, action="append", help="a text file instead; may be repeated")


def source(args: argparse.Namespace) -> tuple[str, str]:
    """(text, what it is) for parsed arguments. Raises CorpusError or OSError if it cannot be read."""
    if args.text:
        text = "\n".join(file.read_text("utf-8", "replace") for file in args.text)
        return text, ", ".join(str(file) for file in args.text)
    return corpus(args.corpus), f"{args.corpus}: {describe(args.corpus)}"


def token_ids(tokenizer: Tokenizer, text: str, count: int, skip: int = 0) -> list[int]:
    """`count` token ids of `text` from its token `skip` on, after a BOS if the model wants one.

    Raises CorpusError if the text has fewer. The ids are those of the whole text, so that two
    ranges of one text that do not overlap share no token.
    """
    ids = tokenizer.encode(text)
    begin = tokenizer.encode("")
    if ids[: len(begin)] != begin:
        begin = []
    ids = ids[len(begin) :]
    if skip + count - len(begin) > len(ids):
        raise CorpusError(f"the text has {len(ids)} tokens, not the {skip + count} asked for; ask for fewer")
    return [*begin, *ids[skip : skip + count - len(begin)]]


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal: whether two reports are about the same one."""
    return hashlib.sha256(text.encode()).hexdigest()


def _join(files: Iterable[Path]) -> str:
    parts = [f"# {file.name}\n{file.read_text('utf-8', 'replace')}" for file in files]
    if not parts:
        raise CorpusError("the sources of this text are not installed; give a text of your own (--text)")
    return "\n\n".join(parts)


@functools.cache
def _topics() -> tuple[str, str]:
    """The two halves, parted between topics, nearest to the middle by length."""
    topics = [f"{name}\n\n{text}" for name, text in sorted(pydoc_data.topics.topics.items())]
    middle, before = sum(map(len, topics)) / 2, 0
    for index, text in enumerate(topics):
        if before + len(text) / 2 >= middle:
            return "\n\n".join(topics[:index]), "\n\n".join(topics[index:])
        before += len(text)
    raise CorpusError("this Python has no reference by topic")


@functools.cache
def _go_root() -> Path:
    root = os.environ.get("GOROOT", "")
    if not root:
        try:
            root = subprocess.run(["go", "env", "GOROOT"], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            raise CorpusError("no go command, whose sources the text tuning-code is") from None
    if not (Path(root) / "src" / "net" / "http").is_dir():
        raise CorpusError(f"{root} has no sources of net/http")
    return Path(root)
