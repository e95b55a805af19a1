"""Where documents come from: pinned packages, files, folders and Hugging Face datasets.

What a corpus *is* (`Origin.identity`) is known without reading it where pins say it; so a cached corpus loads at once.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cpdlm.config import Config, ConfigError
from cpdlm.config.words import nearest
from cpdlm.data.conversations import read_conversations
from cpdlm.data.documents import Documents
from cpdlm.data.readers import CORPORA, read_packages
from cpdlm.data.streams import Stream, fetch_stream

READER_VERSION = 2  # raise when a reader changes what it yields
PIECE = 4096  # bytes of a single text file that make one document
NOT_TEXT = "no text (it has NUL bytes); unpack it, or convert it to UTF-8 (iconv -t UTF-8)"
HUB_BYTES = 200 * 10**6  # taken from a Hugging Face dataset when data.max_bytes is 0


@dataclass(frozen=True)
class Origin:
    """identity: what the documents are, JSON-able and without reading more than needed. read: the documents."""

    identity: dict[str, Any]
    read: Callable[[], Documents]
    provenance: list[dict[str, Any]]


def locate(config: Config) -> Origin:
    """The origin that `corpus` names. ConfigError where there is none such, or it is empty."""
    name = config.corpus
    if name in CORPORA:
        packages = CORPORA[name]
        return Origin(
            {
                "packages": [[p.name, p.version, p.sha256, p.reader, p.held_out] for p in packages],
                "reader": READER_VERSION,
            },
            lambda: read_packages(packages, Path(config.data.cache)),
            [package.provenance() for package in packages],
        )
    if name.startswith("hf:"):
        return _hub(config)
    path = Path(name).expanduser()
    if not name or not (path.is_file() or path.is_dir()):
        guess = nearest(name, CORPORA, "corpus={}", cutoff=0.4)
        raise ConfigError(
            f"corpus={name!r} is neither {' nor '.join(CORPORA)} nor hf:NAME nor a file or folder that exists{guess}"
        )
    try:
        documents = _folder(path, name) if path.is_dir() else _file(path, name, config.data.skip_broken)
    except OSError as error:
        raise ConfigError(
            f"corpus={name}: {error.filename} cannot be read ({error.strerror or error}); make it readable, or give a "
            "folder without it"
        ) from error
    return Origin(
        {"content": content_hash(documents.texts), "sources": documents.source_names, "reader": READER_VERSION},
        lambda: documents,
        [{"name": documents.source_names[0], "licence": "the user's own"}],
    )


def content_hash(texts: Sequence[bytes]) -> str:
    """sha256 over the sorted sha256 of the documents: the same whatever their order."""
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(text).digest() for text in texts))).hexdigest()


def is_text(content: bytes) -> bool:
    """In UTF-8 or another code of single bytes. A NUL byte early on means something else, as git and grep have it."""
    return b"\0" not in content[:8192]


def _file(path: Path, name: str, skip_broken: bool) -> Documents:
    content = path.read_bytes()
    if not content.strip():
        raise ConfigError(f"corpus={name} is empty; give a file with text in it")
    if not is_text(content):
        raise ConfigError(f"corpus={name} is {NOT_TEXT}")
    documents = Documents(conversations=path.suffix == ".jsonl")
    texts = read_conversations(path, content, name, skip_broken) if documents.conversations else pieces(content)
    documents.add_source(path.name, texts)
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
    """Every text file is a document. What is hidden is not looked at; what is no text is left out and counted."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    files: list[Path] = []
    for folder, inner, found in os.walk(path, onerror=refuse):
        inner[:] = [each for each in inner if not each.startswith(".")]
        files += [Path(folder) / each for each in found if not each.startswith(".")]
    texts, left_out = [], []
    for file in sorted(file for file in files if file.is_file()):
        content = file.read_bytes()
        if not is_text(content):
            left_out.append(f"{file} is {NOT_TEXT}")
        elif content.strip():
            texts.append(content)
    if not texts:
        raise ConfigError(
            f"corpus={name}: no text file in this folder{': ' + left_out[0] if left_out else ''}; "
            "give a folder with text files, or a file"
        )
    if left_out:
        warnings.warn(f"corpus={name}: {len(left_out)} of {len(files)} files are left out: {left_out[0]}", stacklevel=2)
    documents, source = Documents(), path.resolve().name
    documents.add_source(source, texts)
    documents.notes[source] = {"files": len(files), "not_text": len(left_out)}
    return documents


def _hub(config: Config) -> Origin:
    """A dataset's train split, streamed once up to data.max_bytes and kept in the cache."""
    name = config.corpus.removeprefix("hf:")
    limit, cache = config.data.max_bytes or HUB_BYTES, Path(config.data.cache)
    stream = Stream(name, limit, cache, config.data.column, config.train.timeout)
    meta = fetch_stream(stream)

    def read() -> Documents:
        texts = stream.texts()
        return Documents(texts, [0] * len(texts), [name], notes={name: {"null_rows": meta["nulls"]}})

    return Origin(
        {"hub": name, "sha256": meta["sha256"], "reader": READER_VERSION},
        read,
        [{"name": name, "licence": "see its page on the Hugging Face hub", "column": meta["column"]}],
    )
