"""The text of a Hugging Face dataset, streamed to disk shard by shard.

FOLDER/texts.bin        the documents, end to end; offsets.npy: where each begins
       meta.json        sha256 of texts.bin, documents, column; written last
       shards/I.bin     what is here of shard I, a file of the dataset; I.lengths: the bytes of each document
       shards/I.json    how much of that is sure to be on the disk, and the dataset's own position behind it
       shards/I.lock    held by the process that reads shard I

The first process that finds a shard free reads it, be it of a distributed run or of another machine with the same
folder. The text is that of the stream from its beginning, whoever read it. A killed process loses what it read since its last
note; the next one goes on from there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cpdlm.config import ConfigError
from cpdlm.data.documents import FileTexts
from cpdlm.files import LOCK_SECONDS, LockHeld, locked

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOENT)
NOTE_BYTES = 32 * 2**20  # read between two notes of the position


@dataclass(frozen=True)
class Stream:
    """The first `limit` bytes, or a document more, of the train split of a dataset."""

    name: str  # of a dataset on the hub, or a folder
    limit: int
    cache: Path

    @property
    def corpus(self) -> str:
        return f"hf:{self.name}"

    @property
    def folder(self) -> Path:
        slug = re.sub(r"\W+", "-", self.name).strip("-")
        return self.cache / "hf" / f"{slug}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}-{self.limit}"

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def meta(self) -> dict[str, Any] | None:
        """What meta.json says; None where the text is not whole."""
        try:
            meta: dict[str, Any] = json.loads((self.folder / "meta.json").read_text())
            offsets = np.load(self.folder / "offsets.npy")
            with open(self.folder / "texts.bin", "rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == meta["sha256"]
            return meta if whole and len(offsets) == meta["documents"] + 1 else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def texts(self) -> FileTexts:
        return FileTexts(self.folder / "texts.bin", np.load(self.folder / "offsets.npy"))


def fetch_stream(stream: Stream, progress: bool = True) -> dict[str, Any]:
    """The stream's meta, once its text is whole in its folder: read, or read on, where it is not.

    ConfigError where the dataset cannot be read or has no text; what has been read stays.
    """
    stream.folder.mkdir(parents=True, exist_ok=True)
    with locked(stream.folder / "lock"):
        if (meta := stream.meta()) is not None:
            return meta
        (stream.folder / "meta.json").unlink(missing_ok=True)
        stream.shards.mkdir(exist_ok=True)
    try:
        dataset = _open(stream)
        with tqdm(
            total=stream.limit, desc=f"streaming {stream.name}", unit="B", unit_scale=True, disable=not progress
        ) as bar:
            bar.update(sum(_note(stream, index).bytes for index in range(dataset.num_shards)))
            read_shards(stream, dataset, wait=False, advance=bar.update)
            read_shards(stream, dataset, wait=True, advance=bar.update)  # those that others had, or left unfinished
        with locked(stream.folder / "lock"):
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
    before, first_open = 0, 0
    for index in range(dataset.num_shards):
        while first_open < index and (note := _note(stream, first_open)).whole:
            before, first_open = before + note.bytes, first_open + 1
        if before >= stream.limit:
            return
        try:
            with locked(stream.shards / f"{index}.lock", LOCK_SECONDS if wait else 0):
                if (stream.folder / "meta.json").exists():
                    return  # another process has joined the shards
                if not _note(stream, index).whole:
                    _read_shard(stream, index, dataset.shard(num_shards=dataset.num_shards, index=index), advance)
        except LockHeld:
            if wait:
                raise
        except FileNotFoundError:
            if (stream.folder / "meta.json").exists():  # another process has joined the shards: they are gone
                return
            raise


def _open(stream: Stream) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"corpus={stream.corpus} needs a package: pip install datasets, or use corpus=code"
        ) from error
    try:
        return load_dataset(stream.name, split="train", streaming=True)
    except Exception as error:  # the hub client raises errors of many libraries
        raise _unreadable(stream, error) from error


def _unreadable(stream: Stream, error: Exception) -> ConfigError:
    reason = (str(error).splitlines() or [""])[0]
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
    total, documents, column = note.bytes, note.documents, note.column
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
            aside.write_text(json.dumps(asdict(Note(total, documents, column, shard.state_dict(), whole))))
            os.replace(aside, stream.shards / f"{index}.json")

        try:
            for row in shard:
                column = column or text_column(row, stream.corpus)
                text = (row[column] or "").encode()
                if not text.strip():
                    continue
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
        except ConfigError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK:
                raise
            raise _unreadable(stream, error) from error
        write_note(True)


def _join(stream: Stream, shards: int) -> dict[str, Any]:
    """One file of the shards in order, up to the limit; then they go."""
    lengths, digest, column, left = [np.zeros(0, np.int64)], hashlib.sha256(), "", stream.limit
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
    meta = {"sha256": digest.hexdigest(), "documents": len(offsets) - 1, "column": column}
    aside = stream.folder / "meta.partial"
    aside.write_text(json.dumps(meta))
    os.replace(aside, stream.folder / "meta.json")
    shutil.rmtree(stream.shards, ignore_errors=True)
    return meta


def text_column(row: dict[str, Any], corpus: str) -> str:
    """The column that holds the text: text, content, story or document, else the only one with strings."""
    strings = [column for column, value in row.items() if isinstance(value, str)]
    for column in ("text", "content", "story", "document"):
        if column in strings:
            return column
    if len(strings) == 1:
        return strings[0]
    raise ConfigError(
        f"corpus={corpus}: cannot tell which column is the text; there are {', '.join(row)}. "
        "Export it to a text file and give that as corpus="
    )
