"""Where a result comes from: commit, machine and versions."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from cpdlm.bench.hardware import hardware

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
    """{"commit", "dirty", "hardware", "versions", "started"}: where and from what this process runs."""
    commit, dirty = git_state()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit, "dirty": dirty, "hardware": hardware(), "versions": versions(), "started": started}


def versions() -> dict[str, str]:
    """Python and every package of PACKAGES that is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_state(root: Path | None = None) -> tuple[str, bool]:
    """(commit, dirty) of this code; ("unknown", False) outside git.

    CPDLM_COMMIT stands in where the code was copied without .git ("HASH" or "HASH-dirty"). Generated files (results,
    figures, README) do not make the tree dirty, since a sweep writes them while it runs.
    """
    given = os.environ.get("CPDLM_COMMIT", "")
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    root = root or Path(__file__).resolve().parents[1]
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if not top or not commit or Path(top).resolve() != root.resolve():
        return "unknown", False
    generated = [f":(exclude){path}" for path in ("results", "paper_figures", "README.md")]
    return commit, bool(_git(root, "status", "--porcelain", "--", ".", *generated))


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
