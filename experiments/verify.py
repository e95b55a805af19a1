"""Runs a committed record again, at its commit, and compares: what a number in the tables is worth.

    python -m experiments.verify results/C1/NAME.json        (./dev verify RECORD)

The commit is checked out into a temporary worktree. The record's command runs there with its outputs in a temporary
folder and this repository's downloads. Judged: settings, data, likelihoods (equal within a tolerance in nats), tokens
per target forward (inside the record's own 95% interval). Speeds depend on the machine: they are shown, not judged.
Exit code 0 where all agrees, 1 where something differs or the run fails, 2 where the record cannot be run again.
"""

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpdlm.config import INCIDENTAL, flat, is_name
from cpdlm.config.words import nearest
from cpdlm.files import owner, remove_partial
from cpdlm.terminal import Parser
from experiments.provenance import is_commit, run_git
from experiments.records import MODES, Record, RecordError, load

ROOT = Path(__file__).resolve().parent.parent
# Same machine, same versions, same number of threads give the same bits; another processor rounds differently.
TOLERANCE = 1e-3
# Where a run lies and what it tells others is not part of what it is.
_PLACES = (*INCIDENTAL, "model.trunk")
WEIGHTS = "model.safetensors"
_TEMPORARY = "cpdlm-verify-"  # begins the name of a folder under the temporary one


class VerifyError(ValueError):
    """The record cannot be run again: says why, and what to do."""


class RunFailed(RuntimeError):
    """The record's command ran and failed."""


@dataclass(frozen=True)
class Line:
    """One row of the comparison. agrees None: shown, not judged."""

    what: str
    expected: str
    found: str
    agrees: bool | None

    def __str__(self) -> str:
        word = {True: "agrees", False: "DIFFERS", None: "-"}[self.agrees]
        return f"{self.what:<34} {self.expected:>24} {self.found:>24}  {word}"


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(old: Record, new: Record, tolerance: float = TOLERANCE) -> list[Line]:
    """The rows of the table: every judged quantity, then what is shown only."""
    return [
        *_settings(old, new),
        *(_equal(f"data {key}", old["data"][key], new["data"][key]) for key in ("corpus", "sha256", "vocab_size")),
        *_likelihoods(old["likelihood"], new["likelihood"], tolerance),
        *(line for mode in MODES for line in _decoding(mode, old.mode(mode), new.mode(mode))),
        *_shown(old, new),
    ]


def _settings(old: Record, new: Record) -> list[Line]:
    before, after = flat(old.config), flat(new.config)
    keys = sorted({key for key in before.keys() | after.keys() if not key.startswith(_PLACES)})
    differing = [key for key in keys if before.get(key) != after.get(key)]
    lines = [_equal(key, before.get(key), after.get(key)) for key in differing]
    names = [Path(record.config["model"]["trunk"]).name for record in (old, new)]
    if names[0] != names[1]:
        lines.append(_equal("model.trunk", *names))
    return lines or [Line("settings", f"{len(keys)} of them", "the same", True)]


def _likelihoods(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[Line]:
    lines = [_equal("test positions", old["positions"], new["positions"])]
    terms = {
        what: (old[key], new[key]) for what, key in (("joint NLL", "joint_nll"), ("first-token NLL", "first_token_nll"))
    }
    pairs = zip(old["position_nll"], new["position_nll"], strict=False)
    terms |= {f"NLL of position {number}": pair for number, pair in enumerate(pairs, start=1)}
    for what, (before, after) in terms.items():
        near = abs(before["mean"] - after["mean"]) <= tolerance
        lines.append(Line(f"{what} (nats)", f"{before['mean']:.6f}", f"{after['mean']:.6f}", near))
    return lines


def _decoding(mode: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> list[Line]:
    if old is None:
        return []
    if new is None:
        return [Line(f"{mode}: decoding", "measured", "missing", False)]
    low, high, mean = old["tokens_per_pass"]["low"], old["tokens_per_pass"]["high"], new["tokens_per_pass"]["mean"]
    inside = low - 1e-9 <= mean <= high + 1e-9
    speedups = [f"{side['speedup']['median']:.3f}" for side in (old, new)]
    rates = [f"{side['tokens_per_second']['speculative']:.1f}" for side in (old, new)]
    return [
        Line(f"{mode}: tokens per target forward", f"{low:.4f} to {high:.4f}", f"{mean:.4f}", inside),
        Line(f"{mode}: speed-up", speedups[0], speedups[1], None),
        Line(f"{mode}: tokens/s", rates[0], rates[1], None),
    ]


def _shown(old: Record, new: Record) -> list[Line]:
    pairs = {
        f"{group.removesuffix('s')} {key}": (str(old[group].get(key)), str(new[group].get(key)))
        for group in ("hardware", "versions")
        for key in sorted(old[group].keys() | new[group].keys())
    }
    pairs["trunk sha256"] = old.trunk_sha256[:16], new.trunk_sha256[:16]
    return [Line(what, before, after, None) for what, (before, after) in pairs.items() if before != after]


def _equal(what: str, before: Any, after: Any) -> Line:
    left, right = (text if len(text) <= 24 else text[:21] + "..." for text in (str(before), str(after)))
    return Line(what, left, right, before == after)


# --- running again ---------------------------------------------------------------------------------------------------


def check(path: Path, root: Path) -> Record:
    """The record, if it can be run again; raises VerifyError."""
    if not path.is_file():
        names = {str(found.relative_to(root)) for found in (root / "results").rglob("*.json")}
        guess = nearest(str(path), sorted(names), cutoff=0.4) if names else "; results/ has no record yet"
        raise VerifyError(f"{path}: there is no such record{guess}")
    try:
        record = load(path)
    except RecordError as error:
        raise VerifyError(str(error)) from error
    commit, why = record["commit"], ""
    if not is_commit(commit):
        why = f" comes from code without a commit ({commit[:20]}); only that of a commit can be had again"
    elif record["dirty"]:
        why = f" comes from uncommitted changes on {commit[:10]}; only a record of a clean commit can be repeated"
    elif run_git(root, "cat-file", "-e", f"{commit}^{{commit}}").returncode != 0:
        fetch = "git fetch --unshallow (or git fetch --all) gets the history"
        why = f": commit {commit[:10]} is not in this clone; {fetch}"
    if why:
        raise VerifyError(f"{path}{why}")
    _words(record)
    return record


def rerun(record: Record, source: Path, tree: Path, output: Path, root: Path) -> Record:
    """Run the record's command in `tree` with everything it writes under `output`; raises RunFailed."""
    extra: list[str] = []
    trunk = record.config["model"]["trunk"]
    if trunk and not record.is_pretrained:
        extra.append(f"model.trunk={_trunk(record, source, tree, output, root)}")
    _run(record, [*_words(record), *extra], tree, output, root)
    return _written(output, record["name"])


def _trunk(record: Record, source: Path, tree: Path, output: Path, root: Path) -> Path:
    """The frozen trunk of the record: its weights if they are still here, else trained again from its own record."""
    trunk = Path(record.config["model"]["trunk"])
    digest = record.trunk_sha256
    kept = root / trunk
    if digest and (kept / WEIGHTS).is_file() and hashlib.sha256((kept / WEIGHTS).read_bytes()).hexdigest() == digest:
        print(f"trunk: {trunk} is still here, with the recorded weights")
        return kept
    folders = (source.parent.parent, root / "results")
    for found in (each for folder in folders for each in _records(folder, f"{trunk.name}.json")):
        if found["commit"] == record["commit"] and not found["dirty"]:
            print(f"trunk: training {trunk.name} again from {found.path}")
            _run(found, [*_words(found), "--stage=train"], tree, output, root)
            return output / trunk.name
    raise VerifyError(
        f"the frozen trunk {trunk} is not here with the recorded weights, and no clean record {trunk.name}.json of the "
        "same commit tells how to train it; keep the trunk's record beside this one"
    )


def _run(record: Record, words: list[str], tree: Path, output: Path, root: Path) -> None:
    indices = [f"output={output}", f"data.cache={root / '.cache' / 'cpdlm'}", "tracking.mlflow=false"]
    bundle = record.config["data"]["bundle"]
    if bundle:
        indices.append(f"data.bundle={root / bundle if (root / bundle).is_dir() else ''}")
    threads = record["hardware"]["threads"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CPDLM_", "MLFLOW_TRACKING"))}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    # Later words win, so the places replace those of the record.
    done = subprocess.run([sys.executable, *words, *indices], cwd=tree, env=environment, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        raise RunFailed(
            f"the command ended with exit code {done.returncode} (see above): {shlex.join(['python', *words])}"
        )


def _words(record: Record) -> list[str]:
    """The words after `python` of the record's command; raises VerifyError for one that is not of this suite."""
    try:
        words = shlex.split(record["command"])
    except ValueError:  # a quotation without an end
        words = []
    if words[:2] != ["python", "experiments/run.py"]:
        raise VerifyError(f"{record.path}: its command is {record['command']!r}, not `python experiments/run.py ...`")
    names = [word.removeprefix("name=") for word in words if word.startswith("name=")]
    trunk = record.config["model"]["trunk"]
    for name in (record["name"], *names, *([Path(trunk).name] if trunk else [])):
        if not is_name(name):
            said = "is not the name of a run; nothing is run outside its own folder"
            raise VerifyError(f"{record.path}: {name!r} {said}")
    for word in words[2:]:
        if word.startswith("-") and not word.startswith("--stage="):
            raise VerifyError(f"{record.path}: its command has the word {word!r}, which is not a setting")
    return words[1:]


def _written(output: Path, name: str) -> Record:
    for record in _records(output, "*.json"):
        if record["name"] == name:
            return record
    raise RunFailed(f"the command wrote no record named {name}")


def _records(folder: Path, pattern: str) -> Iterator[Record]:
    """Those that can be read."""
    for path in sorted(folder.rglob(pattern)):
        with contextlib.suppress(RecordError):
            yield load(path)


def verify(path: Path, root: Path, tolerance: float) -> bool:
    """Run again and print the table; True where everything judged agrees. Raises VerifyError or RunFailed."""
    record = check(path, root)
    began = time.monotonic()
    remove_partial(Path(tempfile.gettempdir()), _TEMPORARY)
    run_git(root, "worktree", "prune")
    folder = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{owner()}-"))
    tree, output = folder / "tree", folder / "runs"
    try:
        added = run_git(root, "worktree", "add", "--detach", str(tree), record["commit"])
        if added.returncode != 0:
            raise VerifyError(f"git could not check out {record['commit'][:10]}: {added.stderr.strip()}")
        print(f"{record['name']} at {record['commit'][:10]}: {record['command']}", flush=True)
        lines = compare(record, rerun(record, path.resolve(), tree, output, root), tolerance)
    finally:
        run_git(root, "worktree", "remove", "--force", str(tree))
        shutil.rmtree(folder, ignore_errors=True)
        run_git(root, "worktree", "prune")
    print(f"\n{'':<34} {'recorded':>24} {'run again':>24}")
    for line in lines:
        print(line)
    differing = [line.what for line in lines if line.agrees is False]
    judged = sum(line.agrees is not None for line in lines)
    seconds = f"{time.monotonic() - began:.0f} s"
    if differing:
        print(f"\n{len(differing)} of {judged} differ ({seconds}): {', '.join(differing)}")
    else:
        print(f"\nall {judged} judged quantities agree, likelihoods within {tolerance:g} nats ({seconds})")
    return not differing


def main(arguments: list[str], root: Path = ROOT) -> int:
    parser = Parser(prog="./dev verify", description="Run a record again at its commit and compare.")
    parser.add_argument("record", type=Path, help="results/CLAIM/NAME.json")
    near = f"nats (default: {TOLERANCE:g}, for the same kind of machine)"
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="X", help=near)
    options = parser.parse_args(arguments)
    try:
        return 0 if verify(options.record, root, options.tolerance) else 1
    except (VerifyError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, VerifyError) else 1
    except KeyboardInterrupt:
        print("\nstopped; nothing was changed", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
