"""Files that are written whole or not at all: what was there before stays until the new file is on the disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
            f"cannot write {path}: {error.strerror or error}; make it writable, free some space or choose another folder "
            "(output=DIR), and run the same command again: nothing that was there is lost",
        ) from error


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`, as one process at a time may; where not `wait`, False if another one does.

    On a file system without locks everybody may: what is guarded must then be merely wasteful, not wrong.
    """
    with open(path, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:
            pass
        except OSError as error:
            if not wait and error.errno in (errno.EAGAIN, errno.EACCES):
                yield False
                return
        yield True
