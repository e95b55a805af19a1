"""`launcher=slurm` on a real SLURM of one node: arrays, failures, a job that is requeued, one that is pre-empted."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from one_node_slurm import Unavailable, cluster
from test_scheduler import ran

from experiments import scheduler
from experiments.scheduler import Job, Slurm

pytestmark = pytest.mark.slow

# Counts to 10 in a file; told to stop, it saves and exits as a training run does, and continues from there.
COUNTING = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
count = int((here / 'count').read_text()) if (here / 'count').is_file() else 0
(here / 'starts').open('a').write(f'{count} ')
while count < 10:
    time.sleep(0.5)
    count += 1
    (here / 'count').write_text(str(count))
    if stopping:
        print('saved at', count, flush=True)
        sys.exit(130)
print('done')
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for jobs, with SLURM_CONF set."""
    pytest.importorskip("submitit", reason="submitit is not installed (pip install cpdlm[slurm])")
    with pytest.MonkeyPatch.context() as patch:
        try:
            with cluster() as environment:
                for name, value in environment.items():
                    patch.setenv(name, value)
                yield tmp_path_factory.mktemp("slurm")
        except Unavailable as reason:
            pytest.skip(f"no SLURM here: {reason}")


def counting(folder: Path, name: str, *needs: str, code: str = COUNTING, alone: bool = False) -> Job:
    (folder / name).mkdir(parents=True, exist_ok=True)
    return Job(name, ("-c", code, str(folder / name)), folder / name / "log", frozenset(needs), alone)


def run(folder: Path, jobs: list[Job]) -> dict[str, int]:
    return ran(jobs, Slurm(folder / "slurm", {"time": 10}, poll_seconds=0.5))[0]


def starts(folder: Path, name: str) -> list[int]:
    return [int(word) for word in (folder / name / "starts").read_text().split()]


def test_jobs_run_as_an_array_in_the_order_of_their_needs(slurm: Path) -> None:
    quick = "import os; print(os.environ['OMP_NUM_THREADS'], [n for n in os.environ if n.startswith('SLURM_')])"
    jobs = [
        counting(slurm / "a", "trunk", code=quick),
        counting(slurm / "a", "heads", "trunk", code=quick),
        counting(slurm / "a", "bad", code="raise RuntimeError('out of ideas')"),
        counting(slurm / "a", "timed", code=quick, alone=True),
    ]
    assert run(slurm / "a", jobs) == {"trunk": 0, "heads": 0, "bad": 1, "timed": 0}
    assert "RuntimeError: out of ideas" in jobs[2].log.read_text()
    assert jobs[0].log.read_text().splitlines()[-1] == "1 []"
    assert (slurm / "a/slurm/jobs.json").read_text().strip() == "{}"


@pytest.mark.parametrize("how", ["requeued", "preempted"])
def test_a_killed_job_is_requeued_and_continues_where_it_was(how: str, slurm: Path) -> None:
    """scontrol requeue kills it from outside; SIGUSR2 is the warning of a pre-emption or of the time limit."""
    folder = slurm / how
    job = counting(folder, "cell")
    command = [
        sys.executable,
        "-c",
        f"""
import sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_slurm import counting, run
folder = Path({str(folder)!r})
print(run(folder, [counting(folder, 'cell')]))
""",
    ]
    sweeping = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=scheduler.ROOT)
    until = time.monotonic() + 60
    while not (folder / "cell/count").is_file() or int((folder / "cell/count").read_text() or 0) < 3:
        assert time.monotonic() < until
        time.sleep(0.1)
    (number,) = subprocess.run(["squeue", "-h", "-o", "%A"], capture_output=True, text=True, check=True).stdout.split()
    stop = ["scontrol", "requeue", number] if how == "requeued" else ["scancel", "--signal", "USR2", number]
    subprocess.run(stop, check=True)
    said, _ = sweeping.communicate(timeout=240)
    assert said.strip() == "{'cell': 0}"
    first, second = starts(folder, "cell")
    assert first == 0 and second >= 3, "it went on from what it had saved"
    assert "saved at" in job.log.read_text() and job.log.read_text().endswith("done\n")


def test_a_killed_sweep_finds_its_job_again_and_a_cancelled_job_is_a_failure(slurm: Path) -> None:
    folder = slurm / "found"
    job = counting(folder, "cell")
    first = Slurm(folder / "slurm", {"time": 10}, poll_seconds=0.5)
    first.start([job])
    second = Slurm(folder / "slurm", {"time": 10}, poll_seconds=0.5)
    second.start([job])
    assert second.wait() == [(job, 0)] and starts(folder, "cell") == [0]
    cancelled = counting(folder, "cancelled")
    second.start([cancelled])
    subprocess.run(["scancel", next(iter(second._ids.values()))], check=True)
    assert second.wait() == [(cancelled, scheduler.GONE)]
