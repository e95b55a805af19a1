"""Files that are written whole or not at all, and the one lock of the project."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

LOCK_SECONDS = 1800.0  # to wait for another process that builds what this one needs
QUIET_SECONDS = 5.0  # of waiting, before it is announced
PARTIAL = ".partial-"  # begins the name of what is not whole yet
PARTIAL_SECONDS = 7 * 86400.0  # after which what another host left unfinished is nobody's
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # the file system has no such locks


def default_cache() -> Path:
    """Where the library keeps what it downloads: .cache/cpdlm of the working folder where that is (a checkout of this
    project), else the user's cache."""
    here = Path(".cache") / "cpdlm"
    if here.is_dir():
        return here
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # others are to be ignored (XDG Base Directory Specification)
        return given / "cpdlm"
    home = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA", "~")}.get(sys.platform, "~/.cache")
    return Path(home).expanduser() / "cpdlm"


class WriteError(OSError):
    """A place that cannot be written: names it and what to do. What was there before is still there."""


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well; else the old file stays."""
    with errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = beside(path)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode & 0o777  # as the umask says; safetensors makes its files 0600
        try:
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well; else the old one stays."""
    old = beside(folder)
    with partial_folder(folder) as aside:
        yield aside
        if folder.exists():
            os.replace(folder, old)
        os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def beside(path: Path) -> Path:
    """A new name in the folder of `path` for what is not whole yet; `remove_partial` finds there whose it is."""
    return path.with_name(f"{PARTIAL}{owner()}-{uuid.uuid4().hex[:8]}-{path.name[-80:]}")


def owner() -> str:
    """HOST-PID of this process; what its host calls processes is told apart by namespaces."""
    return f"{_host()}-{os.getpid()}"


def is_gone(left_by: str) -> bool:
    """Whether `left_by`, an `owner` of any time, was a process of this host that has ended."""
    host, _, number = left_by.partition("-")
    if host != _host() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


@lru_cache(maxsize=1)
def _host() -> str:
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def remove_partial(folder: Path, prefix: str = PARTIAL) -> None:
    """Delete what killed processes left unfinished in `folder`: of this host at once, of others after PARTIAL_SECONDS.

    prefix: of their names, before an `owner`.
    """
    for left in folder.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):
            left_by = "-".join(left.name.removeprefix(prefix).split("-")[:2])
            if is_gone(left_by) or time.time() - left.lstat().st_mtime > PARTIAL_SECONDS:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


@contextlib.contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` for as long as the block lasts."""
    folder = beside(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` in one step; raises WriteError with the old file untouched."""
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`write_bytes` of sorted, indented JSON."""
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode())


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path) -> None:
    """Raise WriteError now rather than after hours of work."""
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = beside(folder / "writable")
        try:
            probe.write_bytes(b" ")
        finally:
            probe.unlink(missing_ok=True)


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
            "folder (output=DIR, data.cache=DIR), and run the same command again: nothing that was there is lost",
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
    gone. WriteError where the lock cannot be written.
    """
    with errors_named(path):
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
    path.open("ab").close()  # filelock takes a file that may not be written for one that is held, and waits
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
