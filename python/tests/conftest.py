"""Fixtures: a reference server in this process, a real daemon, the models, llama.cpp."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reference_server import FastServer, GrpcServer, Store

from kvtier.daemon import Daemon, find_daemon
from kvtier.gguf_model import Model
from kvtier.models import ModelNotFoundError, find_model
from kvtier.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]



@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder with a short name: a Unix socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kvt-") as folder:
        yield Path(folder)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def fast_server(store: Store, socket_folder: Path) -> Iterator[tuple[FastServer, str]]:
    path = socket_folder / "fast.sock"
    server = FastServer(store, path)
    yield server, str(path)
    server.stop()


@pytest.fixture
def grpc_server(store: Store, socket_folder: Path) -> Iterator[str]:
    path = socket_folder / "kvtier.sock"
    server = GrpcServer(store, path)
    yield f"unix://{path}"
    server.stop()


def _model_path(name: str) -> Path:
    try:
        return find_model(name)
    except ModelNotFoundError as error:
        pytest.skip(str(error))


_loaded: dict[str, tuple[Model, Tokenizer]] = {}


@pytest.fixture(scope="session")
def load_model() -> Callable[[str], tuple[Model, Tokenizer]]:
    """load_model(name) -> (model, tokenizer), loaded once."""

    def load(name: str) -> tuple[Model, Tokenizer]:
        if name not in _loaded:
            path = _model_path(name)
            _loaded[name] = Model.load(path), Tokenizer.from_gguf(path)
        return _loaded[name]

    return load


@pytest.fixture(scope="session")
def model_path() -> Callable[[str], Path]:
    return _model_path


@pytest.fixture(scope="session")
def corpus() -> str:
    """Real text that does not change with this repository: sources of Python's standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    return "\n\n".join(file.read_text("utf-8") for file in sorted(folder.glob("*.py")))


@pytest.fixture
def start_daemon(socket_folder: Path) -> Iterator[Callable[..., Daemon]]:
    """start_daemon(*flags) -> a running daemon on a folder of its own."""
    try:
        binary = find_daemon()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    daemons: list[Daemon] = []

    def start(*flags: str) -> Daemon:
        data = socket_folder / f"data{len(daemons)}"
        data.mkdir()
        daemon = Daemon(binary, data, ["--log-level", "warn", *flags])
        daemon.start()
        daemons.append(daemon)
        return daemon

    yield start
    for daemon in daemons:
        daemon.stop()


@pytest.fixture(scope="session")
def llama() -> Callable[[str, bool, int], object]:
    """llama(model name, vocabulary only, context) -> llama_cpp.Llama on the same file."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

    def load(name: str, vocab_only: bool = True, context: int = 0) -> object:
        return llama_cpp.Llama(
            str(_model_path(name)), vocab_only=vocab_only, n_ctx=context or 512, n_batch=512,
            logits_all=not vocab_only, verbose=False, n_threads=os.cpu_count(),
        )  # fmt: skip

    return load
