"""Texts long enough for long contexts, from what is on every machine that has Python and PyTorch: nothing is downloaded or copied.

Code is the standard library's own source files, prose the documents of this package. Held-out texts share nothing with them: code is
PyTorch's own source, prose the language reference that Python's `help()` shows. They are the same wherever Python and PyTorch are; a
hash of every document says so.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path

import torch

KINDS = ("code", "prose", "mixed")
LEAST_BYTES = 40_000  # of a source file: short ones are mostly imports


@dataclass(frozen=True)
class Document:
    """Pieces of text one after the other, by what they are."""

    kind: str
    sources: tuple[str, ...]
    ids: torch.Tensor  # [N]
    sha256: str  # of the text

    @property
    def name(self) -> str:
        """What a result file calls it."""
        return f"{self.kind} {self.sha256[:12]} ({', '.join(self.sources)})"


Piece = tuple[str, str]  # (name, text)


def _files(folder: str | None) -> Iterator[Piece]:
    """Source files of a folder that are long enough, by name."""
    for path in sorted(Path(folder or ".").glob("*.py")) if folder else ():
        if path.stat().st_size >= LEAST_BYTES:
            yield path.name, path.read_text("utf-8")


def _topics() -> Iterator[Piece]:
    topics = import_module("pydoc_data.topics").topics
    yield from ((f"help({name!r})", topics[name]) for name in sorted(topics))


def packaged_prose() -> dict[str, str]:
    """The documents that come with the package, by name."""
    folder = resources.files("twilight_ops.data") / "prose"
    return {
        path.name: path.read_text("utf-8") for path in sorted(folder.iterdir(), key=lambda path: path.name) if path.name.endswith(".txt")
    }


def _pieces(kind: str, held_out: bool) -> Iterator[Piece]:
    if kind == "code":
        return _files(os.path.dirname(torch.__file__ if held_out else os.__file__))
    return _topics() if held_out else iter(packaged_prose().items())


def _in_turn(*streams: Iterator[Piece]) -> Iterator[Piece]:
    for pieces in itertools.zip_longest(*streams):
        yield from (piece for piece in pieces if piece is not None)


def build(kind: str, count: int, tokens: int, encode: Callable[[str], Sequence[int]], held_out: bool = False) -> list[Document]:
    """`count` documents of at least `tokens` tokens each, no piece in two of them; mixed: one of code, one of prose, one of both in turn.

    Args:
        encode: token ids of a text.

    Raises:
        ValueError: this machine's texts are too short.
    """
    if kind not in KINDS:
        raise ValueError(f"text: expected one of {', '.join(KINDS)}, got {kind!r}")
    code, prose = (_pieces(name, held_out) for name in ("code", "prose"))
    streams = {"code": code, "prose": prose, "mixed": _in_turn(code, prose)}
    kinds = itertools.cycle(("code", "prose", "mixed") if kind == "mixed" else (kind,))
    return [_document(name, streams[name], tokens, encode, held_out) for name in itertools.islice(kinds, count)]


def _document(kind: str, pieces: Iterator[Piece], tokens: int, encode: Callable[[str], Sequence[int]], held_out: bool) -> Document:
    ids: list[int] = []
    sources, digest = [], hashlib.sha256()
    while len(ids) < tokens:
        found = next(pieces, None)
        if found is None:
            which = "held-out " if held_out else ""
            raise ValueError(
                f"text: expected {tokens} tokens of {which}{kind}, got {len(ids)} left on this machine; ask for fewer or shorter ones"
            )
        source, text = found
        ids += encode(text)
        sources.append(source)
        digest.update(text.encode())
    return Document(("held-out " if held_out else "") + kind, tuple(sources), torch.tensor(ids), digest.hexdigest())
