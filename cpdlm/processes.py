"""Which process of a distributed run this is, by the environment that its launcher made, without torch; how it ends.

torchrun sets RANK, SLURM's srun SLURM_PROCID, Lightning's own launcher NODE_RANK and LOCAL_RANK. A process without a
launcher is the first of one.
"""

import atexit
import contextlib
import os
import platform
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import NoReturn

BEAT_SECONDS = 0.25  # between two looks at the clock
PAUSE_SECONDS = 1.0  # between two looks that are called a pause


def is_first_process() -> bool:
    """True in the one process of the run that writes files for all."""
    if is_torchrun():
        return os.environ["RANK"] == "0"
    if is_srun():
        return os.environ["SLURM_PROCID"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))


def is_launched() -> bool:
    """True where a launcher has made the other processes already."""
    return is_torchrun() or is_srun() or "LOCAL_RANK" in os.environ


def launched() -> int:
    """How many processes the launcher made, on all machines; 0 where it does not say."""
    return int(os.environ["WORLD_SIZE"] if is_torchrun() else os.environ["SLURM_NTASKS"] if is_srun() else 0)


def is_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_srun() -> bool:
    """As in Lightning, an interactive SLURM shell does not count. torchrun may run inside of srun, and comes first."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def leave(code: int) -> NoReturn:
    """End a process of a distributed run, whose work is done, without the interpreter's own shutdown.

    Threads of torch's process groups can abort there ("terminate called without an active exception": 4 of 17 runs
    with FSDP2 on gloo, torch 2.13, destroy_process_group or not). The whole run would then report a lost process.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class PauseWatch:
    """Notices when this process stands still: stopped (SIGSTOP, Ctrl-Z), or its machine asleep.

    A thread looks at the clock every BEAT_SECONDS. Whatever work goes on, it can do so: a look that comes PAUSE_SECONDS
    late means that nothing ran. The thread ends with the watch.
    """

    def __init__(self) -> None:
        self._lock, self._seconds, self._last = threading.Lock(), 0.0, time.monotonic()
        threading.Thread(target=_beat, args=[weakref.ref(self)], daemon=True).start()

    def total(self) -> float:
        """Seconds of all pauses since the watch began, one that has just ended included."""
        with self._lock:
            now = time.monotonic()
            if now - self._last > PAUSE_SECONDS:
                self._seconds += now - self._last
            self._last = now
            return self._seconds


def _beat(watch: weakref.ref[PauseWatch]) -> None:
    while (alive := watch()) is not None:
        alive.total()
        del alive
        time.sleep(BEAT_SECONDS)


def processor() -> str:
    """Its kind, as the system calls it; "unknown" where it does not."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
