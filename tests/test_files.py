"""The lock: one process at a time, never for ever, and whoever waits or gives up says for whom."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from cpdlm import files
from cpdlm.files import LockHeld, locked

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
