"""Where documents come from: pinned packages, files, folders and Hugging Face datasets.

What a corpus *is* (`Origin.identity`) is known without reading it where pins say it; so a cached corpus loads at once.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpdlm.config import Config, ConfigError
from cpdlm.data.documents import Documents
from cpdlm.data.readers import CORPORA, read_packages
from cpdlm.data.streams import Stream, fetch_stream

READER_VERSION = 2  # raise when a reader changes what it yields
PIECE = 4096  # bytes of a single text file that make one document
HUB_BYTES = 200 * 10**6  # taken from a Hugging Face dataset when data.max_bytes is 0


@dataclass(frozen=True)
class Origin:
    """identity: what the documents are, JSON-able and without reading more than needed. read: the documents."""

    identity: dict[str, Any]
    read: Callable[[], Documents]
    provenance: list[dict[str, Any]]


def locate(config: Config, progress: bool = True) -> Origin:
    """The origin that `corpus` names. ConfigError where there is none such, or it is empty."""
    name = config.corpus
    if name in CORPORA:
        packages = CORPORA[name]
        return Origin(
            {
                "packages": [[p.name, p.version, p.sha256, p.reader, p.held_out] for p in packages],
                "reader": READER_VERSION,
            },
            lambda: read_packages(packages, Path(config.data.cache), progress),
            [package.provenance() for package in packages],
        )
    if name.startswith("hf:"):
        return _hub(config, progress)
    path = Path(name).expanduser()
    if not name or not path.exists():
        near = difflib.get_close_matches(name, CORPORA, n=1, cutoff=0.4)
        guess = f"; did you mean corpus={near[0]}?" if near else ""
        raise ConfigError(
            f"corpus={name!r} is neither {' nor '.join(CORPORA)} nor hf:NAME nor a file or folder that exists{guess}"
        )
    documents = _folder(path, name) if path.is_dir() else _file(path, name)
    return Origin(
        {"content": content_hash(documents.texts), "sources": documents.source_names, "reader": READER_VERSION},
        lambda: documents,
        [{"name": documents.source_names[0], "licence": "the user's own"}],
    )


def content_hash(texts: Sequence[bytes]) -> str:
    """sha256 over the sorted sha256 of the documents: the same whatever their order."""
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(text).digest() for text in texts))).hexdigest()


def _file(path: Path, name: str) -> Documents:
    content = path.read_bytes()
    if not content.strip():
        raise ConfigError(f"corpus={name} is empty; give a file with text in it")
    documents = Documents()
    documents.add_source(path.name, pieces(content))
    return documents


def pieces(content: bytes, size: int = PIECE) -> list[bytes]:
    """A text cut into documents of about `size` bytes, at blank lines where there are any, else at line ends.

    Nothing is lost: the pieces joined are the content. A line longer than 4 * size is cut within.
    """
    found: list[bytes] = []
    current = b""
    for paragraph in re.split(rb"(?<=\n)(?=[ \t\r]*\n)", content):
        parts = paragraph.splitlines(keepends=True) if len(paragraph) > size else [paragraph]
        for part in parts:
            for start in range(0, len(part), 4 * size):
                current += part[start : start + 4 * size]
                if len(current) >= size:
                    found.append(current)
                    current = b""
    if current.strip() or not found:
        found.append(current)
    elif current:
        found[-1] += current
    return found


def _folder(path: Path, name: str) -> Documents:
    def regular() -> Iterator[bytes]:
        for file in sorted(path.rglob("*")):
            if any(part.startswith(".") for part in file.relative_to(path).parts) or not file.is_file():
                continue
            content = file.read_bytes()
            # A NUL byte early on means a binary file, as git and grep have it.
            if content.strip() and b"\0" not in content[:8192]:
                yield content

    documents = Documents()
    documents.add_source(path.resolve().name, regular())
    if not documents.texts:
        raise ConfigError(f"corpus={name}: no text file in this folder; give a folder with text files, or a file")
    return documents


def _hub(config: Config, progress: bool) -> Origin:
    """A dataset's train split, streamed once up to data.max_bytes and kept in the cache."""
    name = config.corpus.removeprefix("hf:")
    limit, cache = config.data.max_bytes or HUB_BYTES, Path(config.data.cache)
    stream = Stream(name, limit, cache, config.data.column, config.train.timeout)
    meta = fetch_stream(stream, progress)

    def read() -> Documents:
        texts = stream.texts()
        return Documents(texts, [0] * len(texts), [name], notes={name: {"null_rows": meta["nulls"]}})

    return Origin(
        {"hub": name, "sha256": meta["sha256"], "reader": READER_VERSION},
        read,
        [{"name": name, "licence": "see its page on the Hugging Face hub", "column": meta["column"]}],
    )
