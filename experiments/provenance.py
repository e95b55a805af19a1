"""Where a result comes from: commit, machine and versions."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import warnings
from pathlib import Path
from typing import Any

from cpdlm.bench.hardware import hardware

CODE = "code-"  # begins what stands for a commit where git does not tell
GIT_SECONDS = 120.0
PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "torchmetrics",
    "numpy",
    "omegaconf",
    "datasets",
    "tokenizers",
    "mlflow",
    "matplotlib",
)


def provenance() -> dict[str, Any]:
    """{"commit", "dirty", "hardware", "load", "versions", "started"}: where and from what this process runs.

    load: processes that wanted to run over the last minute, this one's threads among them.
    """
    commit, dirty = git_state()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    machine = {"hardware": hardware(), "load": round(os.getloadavg()[0], 2)}
    return {"commit": commit, "dirty": dirty, **machine, "versions": versions(), "started": started}


def versions() -> dict[str, str]:
    """Python and every package of PACKAGES that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_state(root: Path | None = None) -> tuple[str, bool]:
    """(commit, dirty) of this code; (a hash of the code, False), and a warning, where git does not tell.

    CPDLM_COMMIT stands in where the code was copied without .git ("HASH" or "HASH-dirty"). Generated files (results,
    figures, README) do not make the tree dirty, since a sweep writes them while it runs.
    """
    given = os.environ.get("CPDLM_COMMIT", "")
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    root = (root or Path(__file__).resolve().parents[1]).resolve()
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            raise NoGit("it is not a repository of its own")
        generated = [f":(exclude){path}" for path in ("results", "paper_figures", "README.md")]
        return _git(root, "rev-parse", "HEAD"), bool(_git(root, "status", "--porcelain", "--", ".", *generated))
    except NoGit as error:
        code = code_hash(root)
        warnings.warn(f"the commit of {root} is not known ({error}); records name its code by {code}", stacklevel=2)
        return code, False


def is_commit(name: str) -> bool:
    """Whether `git_state` found git to ask."""
    return not name.startswith(CODE)


def code_hash(root: Path) -> str:
    """code-SHA256 over the names and contents of the Python files of `root`: stands in for a commit."""
    digest = hashlib.sha256()
    for package in ("cpdlm", "experiments"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return f"{CODE}{digest.hexdigest()}"


class NoGit(Exception):
    """git cannot say what this code is; the message says why."""


def run_git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """git on the checkout at `root`, whatever the environment says of another one (GIT_DIR and its like).

    Where there is no git, or it is not done after GIT_SECONDS, the return code is 127 and stderr says so.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {"LC_ALL": "C"}
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, timeout=GIT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _git(root: Path, *arguments: str) -> str:
    done = run_git(root, *arguments)
    if done.returncode != 0:
        raise NoGit((done.stderr.strip() or "git failed").splitlines()[0])
    return done.stdout.strip()
