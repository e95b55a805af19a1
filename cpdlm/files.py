"""Files that are written whole or not at all, and the one lock of the project."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

LOCK_SECONDS = 1800.0  # to wait for another process that builds what this one needs
QUIET_SECONDS = 5.0  # of waiting, before it is announced
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # the file system has no such locks


class WriteError(OSError):
    """A place that cannot be written: names it and what to do. What was there before is still there."""


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well; else the old file stays."""
    with errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well; else the old one stays."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".partial-{folder.name}-"))
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".partial-{folder.name}-"))
    try:
        yield aside
        aside.chmod(0o755)
        if folder.exists():
            os.replace(folder, old / folder.name)
        os.replace(aside, folder)
    finally:
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one step; raises WriteError with the old file untouched."""
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`write_bytes` of sorted, indented JSON."""
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode())


def check_writable(folder: Path) -> None:
    """Raise WriteError now rather than after hours of work."""
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable.") as probe:
            probe.write(b" ")


@contextlib.contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Turn an OSError into a WriteError that names `path` and says what to do."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}; make it writable, free some space or choose another "
            "folder (output=DIR), and run the same command again: nothing that was there is lost",
        ) from error


class LockHeld(WriteError):
    """Another process holds a lock, and has not given it back in the time that was allowed; `holder` says which."""

    def __init__(self, path: Path, holder: str, seconds: float) -> None:
        super().__init__(
            f"{path} is held by {holder}; waited {seconds:.0f} s. Wait for that process or end it, and run the same "
            "command again"
        )
        self.holder = holder


@contextlib.contextmanager
def locked(path: Path, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock file `path`, as one process at a time may; the holder describes itself in `path`.holder.

    Waits `seconds` at most, then raises LockHeld. A wait of more than QUIET_SECONDS is announced on stderr. Where the
    file system has no flock, the lock is a file that exists: filelock removes that of a process of this host that is
    gone. OSError where the lock cannot be written.
    """
    lock = _acquired(path, seconds)
    note = _holder_note(path)
    try:
        with contextlib.suppress(OSError):  # only for the words of those who wait
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            note.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since} ({shlex.join(sys.argv)})")
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _acquired(path: Path, seconds: float) -> BaseFileLock:
    lock: BaseFileLock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=min(seconds, QUIET_SECONDS))
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_FLOCK:
                raise
            lock = SoftFileLock(path.with_name(f"{path.name}.soft"))
            lock.acquire(timeout=min(seconds, QUIET_SECONDS))
    except Timeout:
        if seconds > QUIET_SECONDS:
            print(f"waiting up to {seconds:.0f} s for {path}, held by {_holder(path)}", file=sys.stderr, flush=True)
        try:
            lock.acquire(timeout=max(0.0, seconds - QUIET_SECONDS), poll_interval=0.2)
        except Timeout:
            raise LockHeld(path, _holder(path), seconds) from None
    return lock


def _holder_note(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")


def _holder(path: Path) -> str:
    try:
        return _holder_note(path).read_text() or "another process"
    except OSError:
        return "another process"
