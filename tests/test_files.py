"""Files and processes: one at a time, never for ever; modes follow the umask; how a process of several ends."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import save_file

from cpdlm import files
from cpdlm.files import LockHeld, locked, partial_folder, remove_partial, replaced_folder, write_bytes

HOLD = "import sys, time\nfrom pathlib import Path\nfrom cpdlm.files import locked\n" + (
    "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(float(sys.argv[2]))\n"
)


def holder(path: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, path, str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_lock_of_another_process_is_named_waited_for_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "QUIET_SECONDS", 0.05)
    path = tmp_path / "lock"
    process = holder(path, 60)
    with (
        pytest.raises(LockHeld, match=rf"lock is held by process {process.pid} on .* since 20.*waited 0 s"),
        locked(path, 0),
    ):
        pass
    assert not capsys.readouterr().err
    with pytest.raises(LockHeld, match=f"process {process.pid} .*waited 1 s"), locked(path, 0.6):
        pass
    assert f"waiting up to 1 s for {path}, held by process {process.pid} on" in capsys.readouterr().err
    process.kill()  # a killed holder holds nothing
    process.wait()
    with locked(path, 5):
        pass
    assert sorted(each.name for each in tmp_path.iterdir()) == ["lock"]


def test_the_cache_is_the_projects_own_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "platform", "linux")
    for given, found in (("", "/home/me/.cache"), ("relative", "/home/me/.cache"), ("/fast", "/fast")):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert files.default_cache() == Path(found) / "cpdlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert files.default_cache() == Path("/home/me/Library/Caches/cpdlm")
    (tmp_path / ".cache" / "cpdlm").mkdir(parents=True)
    assert files.default_cache() == Path(".cache/cpdlm")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody may write to")
def test_a_lock_that_may_not_be_written_is_not_waited_for() -> None:
    began = time.monotonic()
    with (
        pytest.raises(files.WriteError, match="cannot write /proc/lock: .*make it writable"),
        locked(Path("/proc/lock")),
    ):
        pass
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("flock")])
def test_without_flock_a_file_is_the_lock(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_flock(self: FileLock) -> None:
        raise error

    monkeypatch.setattr(FileLock, "_acquire", no_flock)
    with locked(tmp_path / "lock", 1):
        with pytest.raises(LockHeld, match=f"process {os.getpid()} on"), locked(tmp_path / "lock", 0):
            pass
    with locked(tmp_path / "lock", 0):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_bytes(tmp_path / "made" / "file", b"x")
        with replaced_folder(tmp_path / "folder") as aside:
            (aside / "inner").touch()
        with files.replaced(tmp_path / "weights") as temporary:
            save_file({}, temporary)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {
        "made": 0o777 & ~umask,
        "file": 0o666 & ~umask,
        "weights": 0o666 & ~umask,
        "folder": 0o777 & ~umask,
        "inner": 0o666 & ~umask,
    }


KILLED = "import os, sys\nfrom pathlib import Path\nfrom cpdlm.files import replaced, replaced_folder\n" + (
    "with replaced(Path(sys.argv[1])), replaced_folder(Path(sys.argv[2])):\n    os.kill(os.getpid(), 9)\n"
)


def test_what_the_killed_leave_is_removed_by_owner_and_age(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "file", tmp_path / "folder"], check=False)
    theirs = tmp_path / f"{files.PARTIAL}0123abcd-1-00-of-another-host"
    theirs.touch()
    assert len(list(tmp_path.iterdir())) == 3
    with partial_folder(tmp_path / "mine") as mine:
        remove_partial(tmp_path)
        assert set(tmp_path.iterdir()) == {mine, theirs}, "the living and other hosts keep theirs"
    os.utime(theirs, (0, 0))
    remove_partial(tmp_path)
    assert not list(tmp_path.iterdir())


# What torch's threads do now and then: abort while the interpreter is taken down.
PROGRAM = """
import atexit, os, sys
from cpdlm.processes import leave

class Aborts:
    def __del__(self, abort=os.abort):
        abort()

sys.kept = Aborts()
atexit.register(print, "at exit")
print("done")
{end}
"""


@pytest.mark.parametrize("code", [0, 3])
def test_it_leaves_with_its_code_and_output_and_is_not_aborted(code: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(end=f"leave({code})")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "done\nat exit\n"), done.stderr


def test_an_ordinary_end_would_be_aborted() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(end="sys.exit(0)")], capture_output=True, text=True)
    assert done.returncode < 0


def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.WriteError, match="cannot write .*file: No space left on device; make it writable, free"):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
