"""Runs what is missing of a claim, of all claims, or of a profile: data, training, decoding, report.

    python experiments/sweep.py claim=C3                        what the records under results/ lack
    python experiments/sweep.py claim=all profile=gpu --dry-run
    python experiments/sweep.py profile=smoke                   a profile of its own, into runs/smoke
    python experiments/sweep.py claim=C7 launcher=slurm slurm.partition=gpu slurm.gpus_per_node=1

The same command continues a sweep that was stopped or killed. `reproduce.sh` is this plus an environment.
"""

import contextlib
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # experiments/ would hide modules of the same name

import experiments

experiments.check_python()

from cpdlm.config import ConfigError
from experiments.claims import CLAIMS
from experiments.command import Command, one_of, pairs
from experiments.pipeline import run
from experiments.profiles import PROFILES, SCALES, study
from experiments.scheduler import ROOT, Launcher, Local, Slurm
from experiments.sweep_plan import STAGES, Plan

PROGRAM = "python experiments/sweep.py"
SETTINGS = {
    "claim": "C1 ... C8, or all (C6 by its own id only); without it the cells of a profile",
    "profile": f"with a claim: {' | '.join(SCALES)} (default: cpu); else {' | '.join(PROFILES)} (default: cpu)",
    "out": "folder of the runs (default: runs/PROFILE, runs/claims or runs/claims-gpu)",
    "results": "folder of the records (default: results with a claim, results/gpu on a GPU; else OUT/results); "
    "figures and README are redrawn from it, unless it is OUT/results",
    "only": f"comma list of stages: {', '.join(STAGES)} (default: all)",
    "data": "token bundle made by `./dev bundle`; nothing is downloaded",
    "jobs": "cells trained at once on this machine (default: one per core, 8 at most; one per GPU)",
    "launcher": "local | slurm (default: local)",
    "slurm.KEY": "what sbatch is told: slurm.partition=NAME slurm.time=MINUTES slurm.gpus_per_node=1 ...",
}


@dataclass(frozen=True)
class Options:
    """The words of the command line, checked."""

    claim: str = ""
    profile: str = "cpu"
    out: str = ""
    results: str = ""
    only: tuple[str, ...] = STAGES
    data: str = ""
    jobs: int = 0
    launcher: str = "local"
    dry_run: bool = False
    slurm: dict[str, Any] = field(default_factory=dict)
    command: str = PROGRAM


def main(arguments: list[str]) -> int:
    try:
        options = parse(arguments)
        with contextlib.chdir(ROOT):
            plan = plan_of(options)
            if options.dry_run:
                from experiments.forecast import forecast

                scale = "gpu" if options.profile in ("gpu", "retrofit-gpu", "paper") else "cpu"
                print(forecast(plan, scale, options.jobs))
                return 0
            return _run(plan, options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(plan: Plan, options: Options) -> int:
    # Slow imports come after the checks above.
    from cpdlm.files import WriteError
    from cpdlm.training.checkpoints import RunError, exclusive
    from experiments.records import RecordError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        # Two sweeps in one folder would train the same cells and disturb each other's timings.
        with exclusive(plan.out):
            return run(plan, launcher(plan, options))
    except (RunError, RecordError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it was", file=sys.stderr)
        return 130


def parse(arguments: list[str]) -> Options:
    """Raises ConfigError naming the word and what to type instead."""
    settings = "\n".join(f"  {key:<10} {meaning}" for key, meaning in SETTINGS.items())
    command = Command(PROGRAM, f"{__doc__}\n{settings}", "as listed above")
    command.add_argument("--dry-run", action="store_true", help="print cells, their state and cost; run nothing")
    flags = command.read(arguments)
    given: dict[str, Any] = dict(pairs(flags.settings, SETTINGS, "slurm."))
    slurm = {key.removeprefix("slurm."): given.pop(key) for key in list(given) if key.startswith("slurm.")}
    if "claim" in given:
        one_of("claim", given["claim"], ("all", *dict.fromkeys(each.id for each in CLAIMS)))
    one_of("profile", given.get("profile", "cpu"), SCALES if "claim" in given else PROFILES)
    one_of("launcher", given.get("launcher", "local"), ("local", "slurm"))
    if "only" in given:
        given["only"] = tuple(one_of("only", name, STAGES) for name in given["only"].split(",") if name)
    if "jobs" in given:
        if not given["jobs"].isdecimal() or not 1 <= int(given["jobs"]) <= 1024:
            raise ConfigError(f"jobs={given['jobs']}: write a number from 1 to 1024")
        given["jobs"] = int(given["jobs"])
    given |= {key: _from_root(given[key]) for key in ("out", "results", "data") if key in given}
    if slurm and given.get("launcher") != "slurm":
        key, value = next(iter(slurm.items()))
        raise ConfigError(f"slurm.{key}={value} needs launcher=slurm")
    given["slurm"] = {key: int(value) if value.isdigit() else value for key, value in slurm.items()}
    return Options(**given, dry_run=flags.dry_run, command=" ".join([PROGRAM, *flags.settings]))


def _from_root(path: str) -> str:
    """Relative to the repository where it lies inside, so that records name no machine."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute)


def plan_of(options: Options) -> Plan:
    """Raises ConfigError where a claim has no cells at that scale."""
    if options.claim:
        cells = study(options.claim, options.profile)
        if not cells:
            raise ConfigError(f"claim={options.claim} has no cells for profile={options.profile}; type profile=cpu")
        on_gpu = options.profile == "gpu"
        out = Path(options.out or ("runs/claims-gpu" if on_gpu else "runs/claims"))
        results = Path(options.results or ("results/gpu" if on_gpu else "results"))
    else:
        cells = PROFILES[options.profile]()
        out = Path(options.out or f"runs/{options.profile}")
        results = Path(options.results or out / "results")
    if options.data:
        cells = [cell.with_needs({"data.bundle": options.data}) for cell in cells]
    return Plan(
        title=options.claim or options.profile,
        cells=cells,
        out=out,
        results=results,
        command=options.command,
        experiment=f"cpdlm {options.claim}" if options.claim not in ("", "all") else "cpdlm",
        stages=options.only,
    )


def launcher(plan: Plan, options: Options) -> Launcher:
    """Where the jobs run."""
    if options.launcher == "slurm":
        return Slurm((plan.out / "slurm").absolute(), options.slurm)
    devices = _gpus()
    return Local(options.jobs or len(devices) or min(8, len(os.sched_getaffinity(0))), devices)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(number) for number in range(torch.cuda.device_count())]) if torch.cuda.is_available() else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
