"""The text of a Hugging Face dataset, streamed to disk.

FOLDER/texts.bin        the documents, end to end; offsets.npy: where each begins
       meta.json        sha256 of texts.bin, documents, column, rows without text (nulls); written last
       lengths.bin      of a reader at work: the bytes of each document
       position.json    of a reader at work: how much is sure to be on the disk, and the dataset's own position there

One process reads, and the others wait for it. A killed one loses what it read since its last note; the next one goes on
from there.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cpdlm.config import ConfigError
from cpdlm.config.words import first_line
from cpdlm.data.documents import FileTexts
from cpdlm.files import LOCK_SECONDS, file_sha256, locked, write_json
from cpdlm.progress import Bar

FORMAT = 2  # raise when the column is chosen, or rows are read, in another way
NOTE_BYTES = 32 * 2**20  # read between two notes of the position


@dataclass(frozen=True)
class Stream:
    """The first `limit` bytes, or a document more, of the train split of a dataset."""

    name: str  # of a dataset on the hub, or a folder
    limit: int
    cache: Path
    column: str = ""  # with the text; found where it is not given
    seconds: float = LOCK_SECONDS  # to wait for another process that reads it

    @property
    def corpus(self) -> str:
        return f"hf:{self.name}"

    @cached_property
    def folder(self) -> Path:
        """Its name holds what the text depends on: of a local dataset the files as they are now."""
        slug = re.sub(r"\W+", "-", self.name).strip("-")
        identity = json.dumps([FORMAT, self.name, self.column, _local_files(Path(self.name))])
        return self.cache / "hf" / f"{slug}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{self.limit}"

    @property
    def lengths(self) -> Path:
        return self.folder / "lengths.bin"

    @property
    def position(self) -> Path:
        return self.folder / "position.json"

    def meta(self) -> dict[str, Any] | None:
        """What meta.json says; None where the text is not whole."""
        try:
            meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text())
            offsets = np.load(self.folder / "offsets.npy")
            whole = file_sha256(self.folder / "texts.bin") == meta["sha256"]
            return meta if whole and len(offsets) == meta["documents"] + 1 and meta["nulls"] >= 0 else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def texts(self) -> FileTexts:
        return FileTexts(self.folder / "texts.bin", np.load(self.folder / "offsets.npy"))


def fetch_stream(stream: Stream) -> dict[str, Any]:
    """The stream's meta, once its text is whole in its folder: read, or read on, where it is not.

    ConfigError where the dataset cannot be read or has no text; what has been read stays.
    """
    stream.folder.mkdir(parents=True, exist_ok=True)
    with locked(stream.folder / "lock", stream.seconds):
        if (meta := stream.meta()) is not None:
            return meta
        if (stream.folder / "meta.json").exists():  # the text was damaged since
            for name in ("meta.json", "position.json"):
                (stream.folder / name).unlink(missing_ok=True)
        return _read(stream, *_open(stream))


def _local_files(folder: Path) -> list[Any]:
    """Path, size and times of every file of a local dataset; nothing for one on the hub."""
    if not folder.exists():
        return []
    files = ((path, path.stat()) for path in sorted(folder.resolve().rglob("*")) if path.is_file())
    return [[str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns] for path, state in files]


def _open(stream: Stream) -> tuple[Any, str]:
    """(the dataset, what tells its files from those of another version)."""
    try:
        from datasets import load_dataset_builder
    except ImportError as error:
        raise ConfigError(
            f"corpus={stream.corpus} needs a package: pip install datasets, or use corpus=code"
        ) from error
    try:
        builder = load_dataset_builder(stream.name)
        dataset = builder.as_streaming_dataset(split="train")
        if _has_nulls_alone(dataset):
            builder.info.features = None
        return dataset if dataset.features is not None else dataset._resolve_features(), str(builder.hash)
    except Exception as error:  # the hub client raises errors of many libraries
        raise _unreadable(stream, error) from error


def _has_nulls_alone(dataset: Any) -> bool:
    """Whether some column showed nothing else at first. Rows are then read as they are, not cast to that type."""
    return "null" in str(dataset.features)


def _unreadable(stream: Stream, error: Exception) -> ConfigError:
    reason = first_line(error)
    return ConfigError(
        f"corpus={stream.corpus} could not be read ({type(error).__name__}: {reason}). Check the name and the "
        "connection, and run again (what is here is not read twice), or use corpus=code, corpus=text, a file "
        "or a folder"
    )


@dataclass(frozen=True)
class Note:
    """How far a stream has been read. version: which files of the dataset. state: the dataset's own position."""

    version: str
    bytes: int = 0
    documents: int = 0
    nulls: int = 0
    state: dict[str, Any] | None = None

    @classmethod
    def of(cls, stream: Stream, version: str) -> "Note":
        """Where a killed reader stopped: at the beginning, if the dataset or what was read of it has changed since."""
        try:
            note = cls(**json.loads(stream.position.read_text()))
            texts, lengths = (stream.folder / "texts.bin").stat().st_size, stream.lengths.stat().st_size
            if note.version == version and texts >= note.bytes and lengths >= 8 * note.documents:
                return note
        except (OSError, ValueError, TypeError):
            pass
        stream.position.unlink(missing_ok=True)
        return cls(version)


def _read(stream: Stream, dataset: Any, version: str) -> dict[str, Any]:
    """Read to the end or to the limit. The meta of what is then there."""
    shutil.rmtree(stream.folder / "shards", ignore_errors=True)  # of earlier versions
    note = Note.of(stream, version)
    if note.state is not None:
        dataset.load_state_dict(note.state)
    total, documents, nulls = note.bytes, note.documents, note.nulls
    column = text_column({name: str(getattr(kind, "dtype", kind)) for name, kind in dataset.features.items()}, stream)
    if _has_nulls_alone(dataset):
        dataset.info.features = None
    with (
        open(stream.folder / "texts.bin", "ab") as text_file,
        open(stream.lengths, "ab") as length_file,
        Bar(total=stream.limit, initial=total, desc=f"streaming {stream.name}", unit="B", unit_scale=True) as bar,
    ):
        text_file.truncate(note.bytes)
        length_file.truncate(8 * note.documents)

        def on_disk() -> Note:
            for file in (text_file, length_file):
                file.flush()
                os.fsync(file.fileno())
            done = Note(version, total, documents, nulls, dataset.state_dict())
            write_json(stream.position, asdict(done))
            return done

        try:
            for text in _texts(stream, dataset, column) if total < stream.limit else ():
                if text is None:
                    nulls += 1
                elif text.strip():
                    text_file.write(text)
                    length_file.write(np.int64(len(text)).tobytes())
                    total, documents = total + len(text), documents + 1
                    bar.update(len(text))
                    if total >= stream.limit:
                        break
                    if total - note.bytes >= NOTE_BYTES:
                        note = on_disk()
        except Exception:  # the connection is lost. An interrupt may be in the middle of a row: the last note stays
            on_disk()
            raise
        on_disk()
    if not documents:
        raise ConfigError(f"corpus={stream.corpus} has no text in its train split")
    lengths = np.fromfile(stream.lengths, np.int64)
    np.save(stream.folder / "offsets.npy", np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
    digest = file_sha256(stream.folder / "texts.bin")
    meta = {"sha256": digest, "documents": documents, "column": column, "nulls": nulls}
    write_json(stream.folder / "meta.json", meta)
    stream.lengths.unlink()
    stream.position.unlink(missing_ok=True)
    return meta


def _texts(stream: Stream, dataset: Any, column: str) -> Iterator[bytes | None]:
    """Of every row; None for one without."""
    try:
        for row in dataset:
            yield None if row.get(column) is None else row[column].encode()
    except Exception as error:  # the hub client raises errors of many libraries
        raise _unreadable(stream, error) from error


def text_column(kinds: dict[str, str], stream: Stream) -> str:
    """The column of the text in the whole set: the given one, else text, content, story or document, else the only one.

    kinds: the type of each column. One that has shown nothing but nulls so far ("null") may hold strings.
    """
    possible = [column for column, kind in kinds.items() if kind in ("string", "large_string", "null")]
    there = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
    if stream.column:
        if stream.column in possible:
            return stream.column
        raise ConfigError(f"data.column={stream.column}: {stream.corpus} has no such column of text; there are {there}")
    for column in ("text", "content", "story", "document"):
        if column in possible:
            return column
    if len(possible) == 1:
        return possible[0]
    raise ConfigError(
        f"corpus={stream.corpus}: cannot tell which column is the text; there are {there}. "
        "Name one of strings: data.column=COLUMN"
    )
