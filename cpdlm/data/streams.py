"""The text of a Hugging Face dataset, streamed to disk shard by shard.

FOLDER/texts.bin        the documents, end to end; offsets.npy: where each begins
       meta.json        sha256 of texts.bin, documents, column, rows without text (nulls); written last
       shards/version   which files of the dataset the shards are of
       shards/I.bin     what is here of shard I, a file of the dataset; I.lengths: the bytes of each document
       shards/I.json    how much of that is sure to be on the disk, and the dataset's own position behind it
       shards/I.lock    held by the process that reads shard I

The first process that finds a shard free reads it, be it of a distributed run or of another machine with the same
folder. The text is that of the stream from its beginning, whoever read it. A killed process loses what it read since
its last note; the next one goes on from there.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cpdlm.config import ConfigError
from cpdlm.config.words import first_line
from cpdlm.data.documents import FileTexts
from cpdlm.files import LOCK_SECONDS, LockHeld, file_sha256, locked, write_json
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
    def shards(self) -> Path:
        return self.folder / "shards"

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
        (stream.folder / "meta.json").unlink(missing_ok=True)
    try:
        dataset, version = _open(stream)
        _start_over_for_other_files(stream, version)
        with Bar(total=stream.limit, desc=f"streaming {stream.name}", unit="B", unit_scale=True) as bar:
            bar.update(sum(_note(stream, index).bytes for index in range(dataset.num_shards)))
            read_shards(stream, dataset, wait=False, advance=bar.update)
            read_shards(stream, dataset, wait=True, advance=bar.update)  # those that others had, or left unfinished
        with locked(stream.folder / "lock", stream.seconds):
            return stream.meta() or _join(stream, dataset.num_shards)
    except ConfigError:
        if not any(path.stat().st_size for path in stream.shards.glob("*.bin")):
            shutil.rmtree(stream.folder, ignore_errors=True)
        raise


def read_shards(stream: Stream, dataset: Any, wait: bool, advance: Callable[[int], Any]) -> None:
    """Read the shards that are not whole, in order until the limit.

    wait: for a shard that another process reads, instead of leaving it out. advance: called with the bytes of each
    document.
    """
    for index in range(dataset.num_shards):
        if _bytes_before(stream, index) >= stream.limit:
            return
        try:
            with locked(stream.shards / f"{index}.lock", stream.seconds if wait else 0):
                if (stream.folder / "meta.json").exists():
                    return  # another process has joined the shards
                if not _note(stream, index).whole:
                    _read_shard(stream, index, dataset.shard(num_shards=dataset.num_shards, index=index), advance)
        except OSError as error:
            if (stream.folder / "meta.json").exists():  # another process has joined the shards: they are gone
                return
            if wait or not isinstance(error, LockHeld):
                raise


def _local_files(folder: Path) -> list[Any]:
    """Path, size and times of every file of a local dataset; nothing for one on the hub."""
    if not folder.exists():
        return []
    files = ((path, path.stat()) for path in sorted(folder.resolve().rglob("*")) if path.is_file())
    return [[str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns] for path, state in files]


def _start_over_for_other_files(stream: Stream, version: str) -> None:
    """Drop the shards of a killed reader where the dataset has changed since: they would not fit together."""
    with locked(stream.folder / "lock", stream.seconds):
        note = stream.shards / "version"
        if note.is_file() and note.read_text() != version:
            shutil.rmtree(stream.shards)
        if not (stream.folder / "meta.json").exists():
            stream.shards.mkdir(exist_ok=True)
            note.write_text(version)


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
    """How far a shard has been read. state: the dataset's own position. whole: there is no more, or no need of it."""

    bytes: int = 0
    documents: int = 0
    column: str = ""
    nulls: int = 0
    state: dict[str, Any] | None = None
    whole: bool = False


def _note(stream: Stream, index: int) -> Note:
    try:
        return Note(**json.loads((stream.shards / f"{index}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return Note()


def _bytes_before(stream: Stream, index: int) -> int:
    """Bytes of the shards before this one, as far as they are whole without a gap."""
    total = 0
    for earlier in range(index):
        note = _note(stream, earlier)
        if not note.whole:
            break
        total += note.bytes
    return total


def _read_shard(stream: Stream, index: int, shard: Any, advance: Callable[[int], Any]) -> None:
    note = _note(stream, index)
    if note.state is not None:
        shard.load_state_dict(note.state)
    total, documents, nulls = note.bytes, note.documents, note.nulls
    column = text_column({name: str(getattr(kind, "dtype", kind)) for name, kind in shard.features.items()}, stream)
    if _has_nulls_alone(shard):
        shard.info.features = None
    with (
        open(stream.shards / f"{index}.bin", "ab") as text_file,
        open(stream.shards / f"{index}.lengths", "ab") as length_file,
    ):
        text_file.truncate(note.bytes)
        length_file.truncate(8 * note.documents)

        def write_note(whole: bool) -> None:
            for file in (text_file, length_file):
                file.flush()
                os.fsync(file.fileno())
            aside = stream.shards / f"{index}.partial"
            aside.write_text(json.dumps(asdict(Note(total, documents, column, nulls, shard.state_dict(), whole))))
            os.replace(aside, stream.shards / f"{index}.json")

        for text in _texts(stream, shard, column):
            if text is None:
                nulls += 1
            elif text.strip():
                text_file.write(text)
                length_file.write(np.int64(len(text)).tobytes())
                total, documents = total + len(text), documents + 1
                advance(len(text))
                if total >= stream.limit:
                    break
                if total - note.bytes >= NOTE_BYTES:
                    write_note(False)
                    note = _note(stream, index)
                    if _bytes_before(stream, index) + total >= stream.limit:
                        break
        write_note(True)


def _texts(stream: Stream, shard: Any, column: str) -> Iterator[bytes | None]:
    """Of every row; None for one without."""
    try:
        for row in shard:
            yield None if row.get(column) is None else row[column].encode()
    except Exception as error:  # the hub client raises errors of many libraries
        raise _unreadable(stream, error) from error


def _join(stream: Stream, shards: int) -> dict[str, Any]:
    """One file of the shards in order, up to the limit; then they go."""
    lengths, digest, column, left = [np.zeros(0, np.int64)], hashlib.sha256(), "", stream.limit
    nulls = sum(_note(stream, index).nulls for index in range(shards))
    with open(stream.folder / "texts.partial", "wb") as file:
        for index in range(shards):
            note = _note(stream, index)
            if left <= 0 or not note.documents:
                continue
            lengths_here = np.fromfile(stream.shards / f"{index}.lengths", np.int64, note.documents)
            wanted = int(np.searchsorted(np.cumsum(lengths_here), left)) + 1  # with the document that reaches the limit
            lengths.append(lengths_here[:wanted])
            size, column = int(lengths[-1].sum()), column or note.column
            left -= size
            with open(stream.shards / f"{index}.bin", "rb") as shard:
                while size:
                    part = shard.read(min(size, 2**24))
                    assert part, "a shard is shorter than its note says"
                    digest.update(part)
                    file.write(part)
                    size -= len(part)
        file.flush()
        os.fsync(file.fileno())
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
    if len(offsets) == 1:
        raise ConfigError(f"corpus={stream.corpus} has no text in its train split")
    os.replace(stream.folder / "texts.partial", stream.folder / "texts.bin")
    np.save(stream.folder / "offsets.npy", offsets)
    meta = {"sha256": digest.hexdigest(), "documents": len(offsets) - 1, "column": column, "nulls": nulls}
    write_json(stream.folder / "meta.json", meta)
    shutil.rmtree(stream.shards, ignore_errors=True)
    return meta


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
