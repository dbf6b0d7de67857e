"""The programs under examples/, small, as a user runs them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from kvtier.daemon import Daemon, find_daemon, sparse_above
from kvtier.gguf_model import Model
from kvtier.tokenizer import Tokenizer

pytestmark = pytest.mark.daemon

EXAMPLES = REPOSITORY / "examples"
VIDEO, CODEBASE = "video", "codebase"

# Two files that do not resemble each other, so that a question about one shows.
HARBOR = '''"""Ships in the harbor."""


class Harbor:
    """Ships lie at numbered piers."""

    def __init__(self, piers: int) -> None:
        self.ships: dict[int, str] = {}
        self.piers = piers

    def moor(self, ship: str, pier: int) -> None:
        """Tie a ship to a free pier."""
        if pier in self.ships:
            raise ValueError(f"pier {pier} is taken by {self.ships[pier]}")
        self.ships[pier] = ship
'''
RECIPES = '''"""Recipes for soup."""

SOUPS = {
    "onion": ["onions", "butter", "broth", "cheese"],
    "pea": ["dried peas", "bacon", "carrots"],
    "tomato": ["tomatoes", "cream", "basil"],
}


def shopping_list(soup: str, guests: int) -> list[str]:
    """What to buy for a soup, for so many guests."""
    return [f"{guests} portions of {item}" for item in SOUPS[soup]]
'''


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(program, *arguments, status=0) -> (its standard output, its standard error).

    In this process, because loading numpy and the rest anew takes longer than what is tested.
    """
    try:
        find_daemon()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.delenv("KVTIER_ADDR", raising=False)

    def run(program: str, *arguments: str, status: int = 0) -> tuple[str, str]:
        monkeypatch.syspath_prepend(str(EXAMPLES / program))
        try:
            got = importlib.import_module(program).main(arguments)
        except SystemExit as exit:  # argparse
            got = exit.code
        out, err = capsys.readouterr()
        assert got == status, out + err
        return out, err

    return run


def report(done: tuple[str, str]) -> dict[str, Any]:
    return json.loads(done[0])


@pytest.mark.parametrize("program", [VIDEO, CODEBASE])
def test_help(run: Run, program: str) -> None:
    out, _ = run(program, "--help")
    assert "--addr" in out and "--json" in out


def test_video_finds_the_event_and_is_found_again(run: Run, socket_folder: Path) -> None:
    few = ("--minutes", "4", "--tokens-per-frame", "20", "--event", "1:10", "--data", str(socket_folder / "data"))
    first = report(run(VIDEO, *few, "--json"))
    assert first["tokens"] == 4800 and first["tokens_found"] == 0 and first["event_at"] == 70
    assert first["event_found"] and 70 <= first["event_found_at"] <= 74
    event, scene = first["looks"]
    begin, end = event["shots"][0]["label"].split()[0].split("-")
    assert begin <= "00:01:10" < end and event["shots"][0]["mass"] > 0.3
    for look in (event, scene):
        sparse, exact = look["sparse"], look["exact"]
        assert sparse["bytes_ram"] + sparse["bytes_nvme"] < 0.6 * (exact["bytes_ram"] + exact["bytes_nvme"])
        assert sparse["tokens_estimated"] > 0 and exact["tokens_estimated"] == 0
        assert 0 < look["error"] < 0.2
        assert sum(shot["mass"] for shot in look["shots"]) == pytest.approx(1, abs=0.01)
    # Every shot of the scene that was asked for comes before any other.
    number = scene["question"].split()[3]
    expected = min(first["scene_shots"], 4)
    assert all(shot["label"].endswith(f"scene {number}") for shot in scene["shots"][:expected])
    assert [row[1] for row in first["ram"] if "pinned" in row[0]] == ["100%"] * 2

    again = report(run(VIDEO, *few, "--json"))
    assert again["tokens_found"] == 4800
    assert [look["shots"] for look in again["looks"]] == [look["shots"] for look in first["looks"]]
    # Another video is not taken for this one.
    assert report(run(VIDEO, *few, "--seed", "2", "--minutes", "2", "--json"))["tokens_found"] == 0


def test_video_says_what_is_wrong(run: Run, tmp_path: Path) -> None:
    assert "not within a video of 00:04:00" in run(VIDEO, "--minutes", "4", "--event", "5:00", status=2)[1]
    assert "is no time" in run(VIDEO, "--event", "noon", status=2)[1]
    assert "is no address" in run(VIDEO, "--minutes", "1", "--addr", "nowhere", status=2)[1]
    both = run(VIDEO, "--minutes", "1", "--addr", "127.0.0.1:9", "--data", str(tmp_path), status=2)[1]
    assert "leave it out" in both
    assert "UNAVAILABLE" in run(VIDEO, "--minutes", "1", "--addr", "127.0.0.1:9", status=2)[1]


@pytest.fixture
def folder(
    tmp_path: Path, load_model: Callable[[str], tuple[Model, Tokenizer]], monkeypatch: pytest.MonkeyPatch
) -> Path:
    model, tokenizer = load_model("smollm2")  # skips where it is not installed
    # Loading takes seconds: once for all tests.
    monkeypatch.setattr(Model, "load", lambda path: model)
    monkeypatch.setattr(Tokenizer, "from_gguf", lambda path: tokenizer)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "harbor.py").write_text(HARBOR)
    (tmp_path / "src" / "recipes.py").write_text(RECIPES)
    (tmp_path / "src" / "long.py").write_text("x = [\n" + "    1,\n" * 400 + "]\n")
    (tmp_path / "src" / ".hidden.py").write_text("hidden = True\n")
    return tmp_path


def test_codebase_shows_the_file_that_was_asked_for(
    run: Run, folder: Path, start_daemon: Callable[..., Daemon]
) -> None:
    daemon = start_daemon(*sparse_above(64))
    few = ("--match", "*.py", "--tokens", "850", "--answer-tokens", "3", "--addr", daemon.target)
    ships = report(run(CODEBASE, str(folder), *few, "--json", "--ask", "What does the class Harbor do?"))
    assert ships["files_kept"] == ["src/harbor.py", "src/recipes.py"]
    assert [file["path"] for file in ships["files_left_out"]] == ["src/long.py"]
    assert ships["tokens_found"] == 0 and ships["costs"]["answer_tokens"] == 3
    assert ships["files"][0]["path"] == "src/harbor.py" and ships["files"][0]["gain"] > 0
    assert ships["lines"][0]["path"] == "src/harbor.py" and ships["lines"][0]["text"] == "class Harbor:"
    assert sum(file["gain"] for file in ships["files"]) == pytest.approx(0, abs=1e-6)
    shares = [file["mass"] for file in ships["files"]] + [ships["opening_mass"], ships["question_and_answer_mass"]]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert all(line["text"] in HARBOR + RECIPES or line["line"] == 0 for line in ships["lines"])

    # The context is found by its tokens; only the question is read.
    soup = report(run(CODEBASE, str(folder), *few, "--json", "--ask", "What soups are there?"))
    assert soup["tokens_found"] == soup["tokens"] == ships["tokens"]
    assert soup["files"][0]["path"] == "src/recipes.py" and soup["files"][0]["gain"] > 0
    with daemon.session() as session:  # forks of the questions are gone, the context has its name
        assert [s.name for s in session.client.list()] == [f"codebase {folder.name}"]

    # After a change, what comes before it is found, and the rest read.
    (folder / "src" / "recipes.py").write_text(RECIPES.replace("butter", "margarine"))
    changed, _ = run(CODEBASE, str(folder), *few, "--no-neutral", "--ask", "Is there butter?")
    assert "tokens were found in the daemon, the rest read" in changed and "attention" in changed


def test_codebase_says_what_is_wrong(run: Run, folder: Path) -> None:
    assert "is not a folder" in run(CODEBASE, str(folder / "no"), status=2)[1]
    assert "no file under" in run(CODEBASE, str(folder), "--match", "*.rs", status=2)[1]
    assert "see --tokens" in run(CODEBASE, str(folder), "--match", "*.py", "--tokens", "500", status=2)[1]
    assert "no such file" in run(CODEBASE, str(folder), "--match", "*.py", "--model", "nothing", status=2)[1]
