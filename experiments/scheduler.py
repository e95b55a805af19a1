"""Where a sweep's jobs run: processes of this machine, or a SLURM cluster. One scheduler for both.

A job is a command line of this repository. `schedule` starts a job once those it needs have ended well. A launcher
decides what to do with the jobs that are ready: `Local` shares out cores or GPUs and gives timed jobs the machine to
themselves, `Slurm` submits arrays and lets the cluster decide.
"""

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cpdlm.config import ConfigError
from cpdlm.files import errors_named, write_json

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 130  # exit code of a run that was told to stop and left a checkpoint
GONE = -256  # a job of the cluster that left its queue without a result: cancelled, or its node was lost
SECONDS_TO_SAVE = 60.0


@dataclass(frozen=True)
class Job:
    """A command line.

    argv: after the Python interpreter, from the repository's root. log: takes it, and its output. needs: names of jobs
    before it. alone: it is timed, so nothing may run beside it.
    """

    name: str
    argv: tuple[str, ...]
    log: Path
    needs: frozenset[str] = field(default_factory=frozenset)
    alone: bool = False


class Launcher(Protocol):
    def start(self, ready: list[Job]) -> list[Job]:
        """Start what there is room for; returns what was started."""

    def wait(self) -> list[tuple[Job, int]]:
        """Jobs that have ended since the last call, with their exit codes (0: well); waits for one."""

    def stop(self) -> None:
        """Tell every running job to save and stop; back when all have."""


def schedule(jobs: list[Job], launcher: Launcher, ended: Callable[[Job, int], bool]) -> list[Job]:
    """Run all jobs in their order, as far as their needs allow.

    ended(job, exit code) says whether the jobs that need it may go on. Returns the jobs that never ran, since one that
    they need failed. Stops the running ones on any exception.
    """
    waiting, running, settled = list(jobs), list[Job](), set[str]()
    unmet = {job.name for job in jobs}
    try:
        while waiting or running:
            ready = [job for job in waiting if not job.needs & unmet]
            for job in launcher.start(ready) if ready else []:
                waiting.remove(job)
                running.append(job)
            if not running:
                return waiting  # each needs one that failed
            for job, code in launcher.wait():
                running.remove(job)
                settled.add(job.name)
                if ended(job, code):
                    unmet.discard(job.name)
    except BaseException:
        launcher.stop()
        raise
    return []


def _child(job: Job, environment: dict[str, str], first: Callable[[], Any], apart: bool) -> subprocess.Popen[bytes]:
    """The job's process. first: what it does before its command. apart: it has a session of its own."""
    with errors_named(job.log), open(job.log, "ab") as log:
        log.write(f"$ python {shlex.join(job.argv)}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, *job.argv],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=apart,
            preexec_fn=first,
        )


# --- this machine ----------------------------------------------------------------------------------------------------


class Local:
    """`slots` processes at once, each with its share of the cores (threads pinned to them) and, where there are, a GPU.

    A job that is timed gets the whole machine, and the first GPU. Children end with this process, and leave a
    checkpoint.
    """

    def __init__(self, slots: int, devices: Sequence[str] = ()) -> None:
        self.slots, self.devices = slots, list(devices)
        self.cores = sorted(os.sched_getaffinity(0))
        self._running: dict[subprocess.Popen[bytes], tuple[Job, int]] = {}

    def start(self, ready: list[Job]) -> list[Job]:
        started = []
        for job in [job for job in ready if not job.alone]:
            used = {slot for _, slot in self._running.values()}
            free = [slot for slot in range(self.slots) if slot not in used]
            if not free or any(other.alone for other, _ in self._running.values()):
                break
            self._start(job, free[0], self._share(free[0]))
            started.append(job)
        timed = [job for job in ready if job.alone]
        if timed and not self._running:
            self._start(timed[0], 0, self.cores)
            started.append(timed[0])
        return started

    def wait(self) -> list[tuple[Job, int]]:
        while True:
            codes = {child: child.poll() for child in self._running}
            ended = [(child, code) for child, code in codes.items() if code is not None]
            if ended:
                return [(self._running.pop(child)[0], code) for child, code in ended]
            time.sleep(0.05)

    def stop(self) -> None:
        for child in self._running:
            child.send_signal(signal.SIGTERM)
        for child in self._running:
            try:
                child.wait(SECONDS_TO_SAVE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._running.clear()

    def _share(self, slot: int) -> list[int]:
        """The cores of a slot; more slots than cores share them."""
        each = len(self.cores) // self.slots
        return self.cores[slot * each : (slot + 1) * each] or [self.cores[slot % len(self.cores)]]

    def _start(self, job: Job, slot: int, cores: list[int]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(len(cores))}
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        job.log.parent.mkdir(parents=True, exist_ok=True)
        libc = ctypes.CDLL(None)

        def bind() -> None:
            os.sched_setaffinity(0, cores)
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: kill -9 of the sweep must leave no orphan behind

        # Ctrl-C reaches the sweep, which then tells each child once.
        self._running[_child(job, environment, bind, apart=True)] = (job, slot)


# --- a cluster -------------------------------------------------------------------------------------------------------


class Worker:
    """What runs on a node: the job's command as a child.

    Pre-empted or out of time, the child saves and the job is queued again (`checkpoint` is what submitit calls).
    Requeued by the cluster, the job leaves no result and goes on from its checkpoint.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        alone = "SLURM_CPUS_ON_NODE" if self.job.alone else "SLURM_CPUS_PER_TASK"
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get(alone, "1")}
        for name in [name for name in environment if name.startswith(("SLURM_", "SRUN_", "SUBMITIT_"))]:
            del environment[name]  # Lightning would take the job for one process of a distributed run
        # The cluster's warning (SIGUSR2) is for submitit; whoever is not told of it dies of it.
        self.child = _child(self.job, environment, lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN), apart=False)
        while (code := self.child.poll()) is None:
            time.sleep(0.1)
        if code in (STOPPED, -signal.SIGTERM):
            os._exit(STOPPED)  # no result: the cluster stopped it, and may be about to start it again
        return code

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)
            until = time.monotonic() + SECONDS_TO_SAVE
            while self.child.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
        return DelayedSubmission(Worker(self.job))


class Slurm:
    """Jobs as arrays of a SLURM cluster, through submitit; folder must be seen by every node.

    settings: what sbatch is told, by submitit's names (partition, time in minutes, cpus_per_task, gpus_per_node, ...).
    A job that a killed sweep left behind is found again by its id. Works without accounting: results are files, and a
    job that is neither in the queue nor has one is gone.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None = None, poll_seconds: float = 5.0) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError(
                "launcher=slurm needs submitit: pip install 'cpdlm[slurm]', or type launcher=local"
            ) from error
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "launcher=slurm: there is no sbatch on this machine; run it on a login node, or launcher=local"
            )
        self.folder, self.settings, self.poll_seconds = folder, settings or {}, poll_seconds
        self._submitit, self._book = submitit, folder / "jobs.json"
        self._ids: dict[str, str] = json.loads(self._book.read_text()) if self._book.is_file() else {}
        self._running: dict[str, tuple[Job, Any]] = {}

    def start(self, ready: list[Job]) -> list[Job]:
        queued = self._queued()
        for job in ready:
            if self._ids.get(job.name) in queued:
                self._running[job.name] = (job, self._submitit.SlurmJob(self.folder, self._ids[job.name]))
        for alone in (False, True):
            chosen = [job for job in ready if job.alone == alone and job.name not in self._running]
            if not chosen:
                continue
            executor = self._submitit.SlurmExecutor(folder=self.folder, max_num_timeout=100)
            here = {"job_name": "cpdlm", "setup": [f"cd {shlex.quote(str(ROOT))}"]} | (
                {"exclusive": True} if alone else {}
            )
            for job in chosen:
                job.log.parent.mkdir(parents=True, exist_ok=True)
            try:
                executor.update_parameters(**(here | self.settings))
                with executor.batch():
                    handles = [executor.submit(Worker(job)) for job in chosen]
            except Exception as error:
                raise ConfigError(f"sbatch refused the jobs ({str(error).strip()}); see slurm.KEY=VALUE") from error
            self._running |= {job.name: (job, handle) for job, handle in zip(chosen, handles, strict=True)}
            self._ids |= {job.name: handle.job_id for job, handle in zip(chosen, handles, strict=True)}
        write_json(self._book, self._ids)
        return ready

    def wait(self) -> list[tuple[Job, int]]:
        missing: dict[str, int] = {}
        while True:
            ended = [
                (job, code) for job, handle in self._running.values() if (code := _result(job, handle)) is not None
            ]
            queued = self._queued()
            for name, (job, handle) in self._running.items():
                missing[name] = 0 if handle.job_id in queued else missing.get(name, 0) + 1
                if missing[name] > 3 and _result(job, handle) is None:  # files of other nodes may come late
                    ended.append((job, GONE))
            if ended:
                for job, _ in ended:
                    self._forget(job.name)
                return list({job.name: (job, code) for job, code in ended}.values())
            time.sleep(self.poll_seconds)

    def stop(self) -> None:
        if self._running:
            subprocess.run(["scancel", *(handle.job_id for _, handle in self._running.values())], check=False)
        for name in list(self._running):
            self._forget(name)

    def _queued(self) -> set[str]:
        """Ids of every job and array task that the cluster still has; all of ours where it does not answer."""
        asked = subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=False)
        return set(asked.stdout.split()) if asked.returncode == 0 else set(self._ids.values())

    def _forget(self, name: str) -> None:
        del self._running[name]
        self._ids.pop(name, None)
        write_json(self._book, self._ids)


def _result(job: Job, handle: Any) -> int | None:
    """Exit code of a job of the cluster, None while it has none; an error of the worker goes to the job's log."""
    if not Path(handle.paths.result_pickle).is_file():
        return None
    error = handle.exception()
    if error is None:
        return int(handle.result())
    with open(job.log, "a") as log:
        log.write(str(error))
    return 1
