"""Runs what is missing of a claim, of all of them, or of a profile: data, training, decoding, report.

    python experiments/sweep.py claim=C3                        what the records under results/ lack
    python experiments/sweep.py claim=all profile=gpu --dry-run
    python experiments/sweep.py profile=smoke                   a profile of its own, into runs/smoke
    python experiments/sweep.py claim=C7 launcher=slurm slurm.partition=gpu slurm.gpus_per_node=1

The same command continues a sweep that was stopped or killed. `reproduce.sh` is this plus an environment.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # not experiments/, whose modules would hide others of the same name

from cpdlm.config import ConfigError
from experiments.pipeline import FAILED, STAGES, Plan, mixed_code, run
from experiments.profiles import PROFILES, SCALES, STUDIES, study
from experiments.scheduler import ROOT, Launcher, Local, Slurm
from experiments.suite import Cell
from experiments.tracking import claim_experiment

PROGRAM = "python experiments/sweep.py"
WORDS = {
    "claim": "C1 ... C8, or all (C6 by its own id only); without it the cells of a profile",
    "profile": f"with a claim: {' | '.join(SCALES)} (default: cpu); else {' | '.join(PROFILES)} (default: cpu)",
    "out": "folder of the runs (default: runs/PROFILE, runs/claims or runs/claims-gpu)",
    "results": "folder of the records (default: results with a claim, results/gpu on a GPU; else OUT/results); figures and README "
    "are redrawn from it (of a folder in results: from all of that), unless it is OUT/results",
    "only": f"comma list of stages: {', '.join(STAGES)} (default: all)",
    "data": "token bundle made by `./dev bundle`; nothing is downloaded",
    "jobs": "cells trained at once on this machine (default: one per core, 8 at most; one per GPU)",
    "launcher": "local | slurm (default: local)",
    "mix": "yes: add to records of other code or data, which is refused otherwise (default: no)",
    "slurm.KEY": "what sbatch is told: slurm.partition=NAME slurm.time=MINUTES slurm.gpus_per_node=1 ...",
}


@dataclass(frozen=True)
class Options:
    """The words of the command line, checked."""

    claim: str = ""
    profile: str = ""
    out: str = ""
    results: str = ""
    only: tuple[str, ...] = STAGES
    data: str = ""
    jobs: int = 0
    launcher: str = "local"
    mix: bool = False
    dry_run: bool = False
    slurm: dict[str, Any] = field(default_factory=dict)
    command: str = PROGRAM


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(f"usage: {PROGRAM} [WORD=VALUE ...] [--dry-run] [--help]\n\n{__doc__}")
        print("\n".join(f"  {key:<10} {meaning}" for key, meaning in WORDS.items()))
        print("  --dry-run  print the cells, their state and what they will cost; run nothing")
        return 0
    try:
        options = parse(arguments)
        with contextlib.chdir(ROOT):
            plan = plan_of(options)
            if options.dry_run:
                print(forecast(plan, options))
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

    signal.signal(signal.SIGTERM, _stop)
    try:
        # Two sweeps in one folder would train the same cells and disturb each other's timings.
        with exclusive(plan.out):
            return run(plan, launcher(plan, options))
    except (ConfigError, RunError, RecordError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it was", file=sys.stderr)
        return 130


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


# --- words -----------------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> Options:
    """Raises ConfigError naming the word and what to type instead."""
    given: dict[str, Any] = {}
    slurm: dict[str, Any] = {}
    for word in [word for word in arguments if word != "--dry-run"]:
        key, equals, value = word.partition("=")
        if key.startswith("slurm.") and value:
            slurm[key.removeprefix("slurm.")] = int(value) if value.isdigit() else value
        elif not equals or key not in WORDS:
            near = difflib.get_close_matches(key, WORDS, n=1)
            guess = f"; did you mean {near[0]}=?" if near else ""
            raise ConfigError(
                f"'{word}': write WORD=VALUE with one of {', '.join(WORDS)}{guess} (--help explains them)"
            )
        elif not value:
            raise ConfigError(f"{key}= needs a value")
        else:
            given[key] = value
    if "claim" in given:
        given["claim"] = _known("claim", given["claim"], ("all", *(each.id for each in STUDIES)))
        _known("profile", given.setdefault("profile", "cpu"), SCALES)
    else:
        _known("profile", given.setdefault("profile", "cpu"), tuple(PROFILES))
    if "only" in given:
        given["only"] = tuple(_known("only", name, STAGES) for name in given["only"].split(",") if name)
    if "jobs" in given:
        if not given["jobs"].isdigit() or int(given["jobs"]) < 1:
            raise ConfigError(f"jobs={given['jobs']}: write a number of at least 1")
        given["jobs"] = int(given["jobs"])
    _known("launcher", given.get("launcher", "local"), ("local", "slurm"))
    given["mix"] = _known("mix", given.get("mix", "no"), ("yes", "no")) == "yes"
    for key in ("out", "results", "data"):
        if key in given:
            given[key] = _place(given[key])
    if slurm and given.get("launcher") != "slurm":
        raise ConfigError(f"slurm.{next(iter(slurm))}={next(iter(slurm.values()))} needs launcher=slurm")
    command = " ".join([PROGRAM, *(word for word in arguments if word != "--dry-run")])
    return Options(**given, dry_run="--dry-run" in arguments, slurm=slurm, command=command)


def _place(path: str) -> str:
    """Relative to the repository where it lies inside, so that records name no machine."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute)


def _known(key: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={value}: not one of {', '.join(allowed)}{guess}")
    return value


# --- the plan --------------------------------------------------------------------------------------------------------


def plan_of(options: Options) -> Plan:
    """Raises ConfigError where a claim has no cells at that scale."""
    if options.claim:
        cells = study(options.claim, options.profile)
        if not cells:
            raise ConfigError(f"claim={options.claim} has no cells for profile={options.profile}; type profile=cpu")
        chosen = [each.id for each in STUDIES] if options.claim == "all" else [options.claim]
        comparisons = [study(each, options.profile) for each in chosen if options.claim != "all" or each != "C6"]
        on_gpu = options.profile == "gpu"
        out = Path(options.out or ("runs/claims-gpu" if on_gpu else "runs/claims"))
        results = Path(options.results or ("results/gpu" if on_gpu else "results"))
    else:
        cells, comparisons = PROFILES[options.profile](), []
        out = Path(options.out or f"runs/{options.profile}")
        results = Path(options.results or out / "results")
    if options.data:
        cells = [cell.with_needs({"data.bundle": options.data}) for cell in cells]
        comparisons = [[c.with_needs({"data.bundle": options.data}) for c in each] for each in comparisons]
    return Plan(
        title=options.claim or options.profile,
        cells=cells,
        out=out,
        results=results,
        command=options.command,
        comparisons=[each for each in comparisons if each],
        experiment=claim_experiment(options.claim) if options.claim not in ("", "all") else "cpdlm",
        stages=options.only,
        mix=options.mix,
        shown=Path("results") if results.parts[:1] == ("results",) else results,
        publish=results != out / "results",
    )


def launcher(plan: Plan, options: Options) -> Launcher:
    if options.launcher == "slurm":
        return Slurm((plan.out / "slurm").absolute(), options.slurm)
    devices = _gpus()
    return Local(options.jobs or len(devices) or min(8, len(os.sched_getaffinity(0))), devices)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(number) for number in range(torch.cuda.device_count())]) if torch.cuda.is_available() else []


# --- the forecast ----------------------------------------------------------------------------------------------------


def forecast(plan: Plan, options: Options) -> str:
    """The table of --dry-run: every cell, its state, and what it will cost by a model fitted to the records."""
    from experiments import cell as one
    from experiments import cost
    from experiments.records import load_all

    roots = {path for path in (plan.results, ROOT / "results") if path.is_dir()}
    records = [record for root in roots for record in load_all(root)[0]]
    scale = "gpu" if options.profile in ("gpu", "retrofit-gpu", "paper") else "cpu"
    model = cost.CostModel.of({record["name"]: record for record in records}.values(), scale)
    costs = cost.estimates(model, plan.needed)
    lines = [f"{'cell':<56} {'state':<22} {'train':>7} {'decode':>7} {'memory':>9}"]
    to_train: list[Cell] = []
    for cell in complete_once(plan):
        folder = plan.out / cell.name
        if cell.name not in costs:
            lines.append(f"{cell.name:<56} {'finished':<22}")
            continue
        trained = one.is_trained(cell.config(str(plan.out)))
        to_train += [] if trained else [cell]
        state = "trained" if trained else "failed before" if (folder / FAILED).is_file() else "to run"
        if cell.name in plan.finished:
            state = "for its weights" if not trained else "finished"
        each = costs[cell.name]
        lines.append(
            f"{cell.name:<56} {state:<22} {_time(0 if trained else each.train):>7} {_time(each.decode):>7} {_mebibytes(each.memory):>9}"
        )
    jobs = options.jobs or (1 if scale == "gpu" else min(8, len(os.sched_getaffinity(0))))
    unknown = sum(math.isnan(costs[cell.name].train) for cell in plan.pending)
    left = cost.wall_seconds(to_train, costs, jobs, plan.pending)
    lines += [
        "",
        f"{len(plan.cells)} cells, {len({c.setting for c in plan.cells})} without counting seeds: {len(plan.finished)} finished, "
        f"{len(plan.pending)} to finish, {len(to_train)} to train; about {_time(left)} with {jobs} at once"
        + (f" and {unknown} cells on a model of which there are no records" if unknown else ""),
        model.text(),
        *(f"mixed: {line}{'' if plan.mix else '; refused without mix=yes'}" for line in mixed_code(plan)),
    ]
    return "\n".join(lines)


def complete_once(plan: Plan) -> list[Cell]:
    """The plan's cells and those that they need, once each."""
    return list({cell.name: cell for cell in (*plan.needed, *plan.cells)}.values())


def _mebibytes(memory: float) -> str:
    return "?" if math.isnan(memory) else f"{memory / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
