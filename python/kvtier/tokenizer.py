"""Tokenizers built from a GGUF file's own vocabulary, equal to llama.cpp's.

Two kinds: byte-level BPE (``tokenizer.ggml.model`` = gpt2, with the ``smollm`` pre-tokenizer) and
SentencePiece-style vocabularies (= llama), whose merges follow from the tokens' scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex
from tokenizers import Tokenizer as _Engine
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreSequence

__all__ = ["Tokenizer", "UnsupportedTokenizerError"]

# Token types of GGUF (the specification's tokenizer.ggml.token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in SentencePiece vocabularies

_CHATML = "<|im_start|>"
_GEMMA_TURN = "<start_of_turn>"


class UnsupportedTokenizerError(ValueError):
    """The file's tokenizer is of a kind that this code would get wrong."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        pieces: the vocabulary's token texts, as stored in the file.
        bos_id, eos_id: begin and end of text; None if the file has none.
        add_bos: whether the model expects bos_id at the beginning.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.pieces: list[str] = fields["tokens"]
        self._types: list[int] = fields["token_type"]
        self.bos_id: int | None = fields.get("bos_token_id")
        self.eos_id: int | None = fields.get("eos_token_id")
        self._chat_template: str = fields.get("chat_template", "")
        model = fields["model"]
        if model == "gpt2":
            self._byte_level = True
            self.add_bos = bool(fields.get("add_bos_token", False))
            self._add_space_prefix = False
            self._engine = _byte_level_engine(self.pieces, fields)
        elif model == "llama":
            self._byte_level = False
            self.add_bos = bool(fields.get("add_bos_token", True))
            self._add_space_prefix = bool(fields.get("add_space_prefix", True))
            self._engine = _sentencepiece_engine(self.pieces, self._types, fields["scores"])
        else:
            raise UnsupportedTokenizerError(f"tokenizer model {model!r} is not supported")
        # Tokens that are cut out of the text before anything else, longest first, as llama.cpp
        # does. Control tokens only where the caller says that the text may hold them.
        special = [
            (piece, token, kind)
            for token, (piece, kind) in enumerate(zip(self.pieces, self._types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN) and piece
        ]
        special.sort(key=lambda entry: len(entry[0].encode()), reverse=True)
        self._user_defined = [(p, t) for p, t, kind in special if kind == _USER_DEFINED]
        self._special = [(p, t) for p, t, _ in special]
        self._ids_of_special = {p: t for p, t, _ in special}
        self._bytes = [*map(self._piece_bytes, self.pieces, self._types)]

    @classmethod
    def from_gguf(cls, path: str | Path) -> Self:
        """Read the tokenizer of a GGUF file."""
        prefix = "tokenizer.ggml."
        fields = {}
        for name, field in gguf.GGUFReader(path).fields.items():
            if name.startswith(prefix):
                fields[name.removeprefix(prefix)] = field.contents()
            elif name == "tokenizer.chat_template":
                fields["chat_template"] = field.contents()
        return cls(fields)

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            add_bos: put bos_id first; None does what the file says.
            special: read control tokens such as <|im_start|> in the text as such. Leave it False
                for text from elsewhere, which could otherwise pretend to be another speaker.
        """
        ids: list[int] = []
        if (self.add_bos if add_bos is None else add_bos) and self.bos_id is not None:
            ids.append(self.bos_id)
        after_special = True  # a leading space is added at the beginning and after control tokens
        for part in self._partition(text, self._special if special else self._user_defined):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            if not self._byte_level:
                if self._add_space_prefix and after_special:
                    part = " " + part
                part = part.replace(" ", _SPACE)
            ids += self._engine.encode(part, add_special_tokens=False).ids
            after_special = False
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of token ids; control tokens appear only with `special`."""
        return self.decode_bytes(ids, special=special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The UTF-8 bytes of token ids; the end may cut a character."""
        return b"".join(self.token_bytes(token, special=special) for token in ids)

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for: b"" for control tokens, or their names with `special`."""
        if special and self._types[token] in (_CONTROL, _UNKNOWN):
            return self.pieces[token].encode()
        return self._bytes[token]

    def special_id(self, piece: str) -> int | None:
        """The id of a control or user-defined token by its text, None if there is none."""
        return self._ids_of_special.get(piece)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        names = ("<|im_end|>", "<end_of_turn>", "<|endoftext|>")
        ids = {self._ids_of_special[name] for name in names if name in self._ids_of_special}
        if self.eos_id is not None:
            ids.add(self.eos_id)
        return frozenset(ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether the file brings a chat template: models without one were not trained to chat."""
        return bool(self._chat_template)

    def chat(self, messages: Sequence[tuple[str, str]], *, answer: bool = True, open_end: bool = False) -> list[int]:
        """Token ids of a conversation in the model's own template.

        Args:
            messages: (role, text); roles are system, user and assistant. SmolLM2's template puts
                its default system message first if there is none. Texts are never read as control
                tokens.
            answer: end with the beginning of the assistant's message.
            open_end: leave the last message open, so that ``chat_continue`` can add to it.

        Raises:
            UnsupportedTokenizerError: the template is neither ChatML nor Gemma's.
        """
        ids = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        if _CHATML in self._ids_of_special and (_CHATML in self._chat_template or not self._chat_template):
            if not messages or messages[0][0] != "system":
                default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
                messages = [("system", default), *messages]
            opening, closing, roles = _CHATML, "<|im_end|>", {}
        elif _GEMMA_TURN in self._ids_of_special:
            opening, closing, roles = _GEMMA_TURN, "<end_of_turn>", {"assistant": "model"}
            if messages and messages[0][0] == "system":  # Gemma has no system role
                (_, system), (role, text), *rest = messages
                messages = [(role, f"{system}\n\n{text}"), *rest]
        else:
            raise UnsupportedTokenizerError("no chat template known for this model")
        for index, (role, text) in enumerate(messages):
            ids += self._one(opening)
            # The role's line and the text are one run of text to the tokenizer.
            ids += self.encode(f"{roles.get(role, role)}\n{text}", add_bos=False)
            if open_end and index == len(messages) - 1:
                return ids
            ids += self._one(closing) + self.encode("\n", add_bos=False)
        if answer:
            ids += self._one(opening)
            ids += self.encode(f"{roles.get('assistant', 'assistant')}\n", add_bos=False)
        return ids

    def chat_continue(self, text: str) -> list[int]:
        """Token ids that add `text` to a message left open, close it, and begin the answer."""
        chatml = _CHATML in self._ids_of_special
        opening, closing = (_CHATML, "<|im_end|>") if chatml else (_GEMMA_TURN, "<end_of_turn>")
        ids = self.encode(text, add_bos=False) + self._one(closing)
        ids += self.encode("\n", add_bos=False) + self._one(opening)
        return ids + self.encode("assistant\n" if chatml else "model\n", add_bos=False)

    def _one(self, piece: str) -> list[int]:
        return [self._ids_of_special[piece]]

    def _partition(self, text: str, special: Sequence[tuple[str, int]]) -> list[str | int]:
        """The text cut at special tokens: each token in turn over all that is still text."""
        parts: list[str | int] = [text] if text else []
        for piece, token in special:
            if piece not in text:
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int) or piece not in part:
                    cut.append(part)
                    continue
                first, *rest = part.split(piece)
                if first:
                    cut.append(first)
                for fragment in rest:
                    cut.append(token)
                    if fragment:
                        cut.append(fragment)
            parts = cut
        return parts

    def _piece_bytes(self, piece: str, kind: int) -> bytes:
        if kind in (_CONTROL, _UNKNOWN, _UNUSED):
            return b""
        if kind == _USER_DEFINED:
            return piece.encode()
        if self._byte_level:
            return bytes(_BYTE_OF[character] for character in piece)
        if kind == _BYTE:
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(_SPACE, " ").encode()


def _byte_level_engine(pieces: list[str], fields: Mapping[str, Any]) -> _Engine:
    if fields.get("pre") != "smollm":
        raise UnsupportedTokenizerError(f"pre-tokenizer {fields.get('pre')!r} is not supported")
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in fields["merges"])]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    engine = _Engine(BPE(vocab=vocabulary, merges=merges))
    # Each digit alone, then GPT-2's expression, on what lies between.
    engine.pre_tokenizer = PreSequence(
        [
            Split(Regex(r"\p{N}"), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return engine


def _sentencepiece_engine(pieces: list[str], types: Sequence[int], scores: Sequence[float]) -> _Engine:
    """BPE whose merges are all splits of a token into two others, the highest score first.

    SentencePiece merges the adjacent pair whose union scores best, the leftmost among equals
    (Kudo and Richardson, 2018, section 3.2).
    """
    vocabulary: dict[str, int] = {}
    normal: set[str] = set()
    for token, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        vocabulary.setdefault(piece, token)
        # Bytes and control tokens have names, not texts; user-defined ones are cut out before.
        if kind in (_NORMAL, _UNUSED):
            normal.add(piece)
    order = sorted(
        (t for t, kind in enumerate(types) if kind in (_NORMAL, _UNUSED)),
        key=lambda token: -scores[token],
    )
    merges = [
        (piece[:cut], piece[cut:])
        for piece in (pieces[token] for token in order)
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    unknown = next((p for p, kind in zip(pieces, types, strict=True) if kind == _UNKNOWN), "<unk>")
    return _Engine(
        BPE(
            vocab=vocabulary,
            merges=merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=unknown if unknown in vocabulary else None,
        )
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, as character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    for index, byte in enumerate(others):
        alphabet[chr(0x100 + index)] = byte
    return alphabet


_BYTE_OF = _byte_alphabet()


def as_token_text(tokenizer: Tokenizer, ids: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
    """The text of each token, control tokens by name: what the daemon shows people."""
    return [tokenizer.token_bytes(int(token), special=True) for token in ids]
