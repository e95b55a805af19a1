"""Runs a profile stage by stage: data, train, decode, report. `reproduce.sh` is this plus an environment.

    python -m experiments.pipeline --profile cpu --out runs/cpu [--only train,decode] [--data BUNDLE]

Every stage skips what is complete, so the same command continues a killed run. Training cells run as processes of
their own, as many at once as there are cores to share; decoding is timed, so it runs alone and in this process.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from cpdlm.config import Config, ConfigError
from experiments.suite import PROFILES, Cell, decode_groups

STAGES = ("data", "train", "decode", "report")


def main(arguments: list[str]) -> int:
    try:
        options = _options(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from cpdlm.files import WriteError
    from cpdlm.report.results import RecordError
    from cpdlm.training.storage import RunError, exclusive

    signal.signal(signal.SIGTERM, _pass_on)
    try:
        # Two sweeps in one folder would train the same cells and disturb each other's timings.
        with exclusive(Path(options.out)):
            return run(options)
    except (ConfigError, RunError, RecordError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it was", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """The stages in order; returns the exit code: 1 where a cell or a group failed (the others are run all the same)."""
    from cpdlm.files import check_writable

    cells, failures = PROFILES[options.profile](), list[str]()
    if options.data:
        cells = [_with(cell, {"data.bundle": options.data}) for cell in cells]
    stages: dict[str, Callable[[], str]] = {
        "data": lambda: _data(cells, options),
        "train": lambda: _train(cells, options, failures),
        "decode": lambda: _decode(cells, options, failures),
        "report": lambda: _report(cells, options, failures),
    }
    check_writable(Path(options.results or options.out))
    try:
        for number, name in enumerate(STAGES, start=2):
            if name in options.only:
                print(f"[{number}/5] {name} ...", flush=True)
                began = time.monotonic()
                outcome = stages[name]()
                print(f"[{number}/5] {name}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
    finally:
        for failure in failures:
            print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _data(cells: list[Cell], options: argparse.Namespace) -> str:
    from cpdlm.data.corpus import load_corpus

    made: dict[str, str] = {}
    for cell in cells:
        config = cell.config(options.out)
        key = f"{config.corpus}/{config.data.tokenizer}/{config.data.max_bytes}/{config.data.context}"
        if key not in made:
            corpus = load_corpus(config)
            made[key] = f"{config.corpus} ({config.data.tokenizer}): {len(corpus.train.tokens):,} training tokens"
    return "; ".join(made.values())


def _train(cells: list[Cell], options: argparse.Namespace, failures: list[str]) -> str:
    from experiments import cell as one

    pending = [cell for cell in cells if not one.is_trained(cell.config(options.out))]
    if not pending:
        return f"skipped: all {len(cells)} cells are complete"
    from tqdm import tqdm

    parent = one.sweep(options.profile, options.out, f"./reproduce.sh --profile {options.profile}")
    quiet = options.jobs > 1
    done_names = {cell.config(options.out).run_name for cell in cells} - {
        c.config(options.out).run_name for c in pending
    }
    with (
        ThreadPoolExecutor(options.jobs) as pool,
        tqdm(total=len(pending), desc="cells", unit="cell", disable=not quiet) as bar,
    ):
        running: dict[Future[int], Cell] = {}
        waiting = list(pending)
        while waiting or running:
            ready = [c for c in waiting if c.trunk is None or c.trunk.config(options.out).run_name in done_names]
            for cell in ready[: options.jobs - len(running)]:
                waiting.remove(cell)
                running[pool.submit(_run_cell, cell, options, parent, quiet)] = cell
            if not running:
                failures += [f"{cell.config(options.out).run_name}: its trunk failed" for cell in waiting]
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                name = cell.config(options.out).run_name
                if (code := future.result()) in (130, -2, -15):
                    raise KeyboardInterrupt
                if code == 0:
                    done_names.add(name)
                else:
                    log = Path(options.out) / name / "train.log"
                    failures.append(f"{name}: exit {code}; see {log}")
                    tqdm.write(f"failed: {failures[-1]}{_last_lines(log)}", file=sys.stderr)
                bar.update()
    return f"{len(pending)} of {len(cells)} cells run, {len(failures)} failed"


def _run_cell(cell: Cell, options: argparse.Namespace, parent: str, quiet: bool) -> int:
    """Train and evaluate one cell in a process of its own. Returns its exit code."""
    command = [sys.executable, "experiments/run.py", *cell.words(options.out), "--stage=train"]
    if parent:
        command.append(f"tracking.parent={parent}")
    threads = max(1, _cores() // options.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    root = Path(__file__).resolve().parent.parent
    if not quiet:
        return _wait(subprocess.Popen(command, cwd=root, env=environment))
    folder = Path(options.out) / cell.config(options.out).run_name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.log", "a") as log:
        return _wait(subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log))


_children: set[subprocess.Popen[bytes]] = set()


def _wait(child: subprocess.Popen[bytes]) -> int:
    _children.add(child)
    try:
        return child.wait()
    finally:
        _children.discard(child)


def _pass_on(number: int, frame: Any) -> None:
    """SIGTERM reaches this process alone: the training cells, too, leave their checkpoints and stop."""
    for child in list(_children):
        child.send_signal(signal.SIGTERM)
    raise KeyboardInterrupt


def _last_lines(log: Path, count: int = 5) -> str:
    """The end of a failed cell's log, where its error is."""
    if not log.is_file():
        return ""
    lines = [line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return "".join(f"\n    {line}" for line in lines[-count:])


def _decode(cells: list[Cell], options: argparse.Namespace, failures: list[str]) -> str:
    from experiments import cell as one

    trained = [cell for cell in cells if one.is_trained(cell.config(options.out))]
    groups = [
        (
            [cell.config(options.out) for cell in group.cells],
            group.reference.config(options.out) if group.reference is not None else None,
        )
        for group in decode_groups(trained, options.out)
    ]
    pending = [group for group in groups if not one.is_measured(*group)]
    if not pending:
        return f"skipped: all {len(groups)} groups are complete"
    for configs, reference in pending:
        try:
            one.measure(configs, reference)
        except Exception:
            failures.append(f"decoding {', '.join(config.run_name for config in configs)}:\n{traceback.format_exc()}")
    return f"{len(pending)} of {len(groups)} groups measured, {len(failures)} failed"


def _report(cells: list[Cell], options: argparse.Namespace, failures: list[str]) -> str:
    from experiments import cell as one

    results = Path(options.results or Path(options.out) / "results")
    written: list[tuple[Config, Path]] = []
    for cell in cells:
        config = cell.config(options.out)
        if one.is_trained(config):
            command = "python experiments/run.py " + " ".join(cell.words(options.out))
            folder = results / cell.folder
            path = one.write_record(config, command, folder, claim=cell.folder, profile=options.profile)
            written.append((config, path))
    text, figures = one.report(results, Path(options.out), publish=bool(options.results))
    one.log(written, options.profile, Path(options.out), figures)
    print(text, flush=True)
    return f"{len(written)} of {len(cells)} records under {results}"


def _with(cell: Cell, settings: dict[str, str]) -> Cell:
    trunk, reference = (_with(other, settings) if other is not None else None for other in (cell.trunk, cell.reference))
    return Cell(cell.folder, cell.overrides | settings, trunk, reference)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="cpu", help=" | ".join(PROFILES))
    parser.add_argument("--out", default="", help="folder of the runs (default: runs/PROFILE)")
    parser.add_argument("--results", default="", help="folder of the records (default: OUT/results)")
    parser.add_argument("--only", default=",".join(STAGES), help="comma list of stages: " + ", ".join(STAGES))
    parser.add_argument("--data", default="", help="token bundle made by `./dev bundle`; nothing is downloaded")
    parser.add_argument(
        "--jobs", type=int, default=0, help="training cells at once (default: one per core, one on a GPU)"
    )
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    for name in options.only:
        _known("--only", name, STAGES)
    _known("--profile", options.profile, tuple(PROFILES))
    options.out = options.out or f"runs/{options.profile}"
    options.jobs = options.jobs or _jobs()
    return options


def _jobs() -> int:
    import torch

    return 1 if torch.cuda.is_available() else min(8, _cores())


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _known(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{option} {value}: not one of {', '.join(allowed)}{guess}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
