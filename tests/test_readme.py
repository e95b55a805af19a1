"""Every command of the README is run: shrunk to a fraction of a second where it would take minutes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_suite import TINY, TINY_RETROFIT, small_pretrained

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

# What the continuous integration script runs whole, since a test cannot run the test command.
WHOLE = ("./reproduce.sh", "./dev test")
# Run with --help here; their work is tested in test_scripts.py, test_tracking.py and test_tables_figures.py.
DOORS = ("./dev ui", "./dev setup", "./dev report", "./dev verify RECORD", "./dev lint")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    inline = re.findall(r"`(\./[a-z][^`]*|python [^`]*)`", README)
    return sorted({line for line in [*lines, *inline] if line})


def test_the_readme_has_commands() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", [c for c in commands() if "python " not in c])
def test_scripts_named_in_the_readme_exist_and_explain_themselves(command: str) -> None:
    assert command.startswith((*WHOLE, *DOORS)), f"no test runs `{command}`"
    ci = (ROOT / ".ci" / "run").read_text()
    if command in ("./dev test", "./reproduce.sh --profile smoke"):
        assert command.removeprefix("./") in ci
    script = command.split()[0]
    done = subprocess.run(["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for word in command.split()[1:2]:
        assert word.lstrip("-") in done.stdout, f"{script} --help does not mention {word}"


@pytest.mark.slow
def test_cells_of_the_readme_run(tmp_path: Path) -> None:
    """In the README's order, in one folder, as a reader would: the heads find the trunk that was trained before them."""
    corpus = tmp_path / "cpdlm"  # the folder that the README takes as a corpus of one's own
    shutil.copytree(ROOT / "cpdlm", corpus, ignore=shutil.ignore_patterns("__pycache__"))
    lines = [c.split("#")[0].strip() for block in blocks("bash") for c in block.splitlines()]
    cells = [line for line in lines if line.startswith("python experiments/run.py")]
    assert len(cells) >= 6
    # The size is part of the trunk's name in the README, so it stays; everything slow shrinks.
    small = {key: value for key, value in TINY.items() if key != "size"} | {"data.cache": tmp_path / "cache"}
    small_pretrained(tmp_path / "my-llm", sorted(corpus.rglob("*.py")))
    for command in cells:
        _, script, *given = shlex.split(command)
        here = small | TINY_RETROFIT if any(word.startswith("model=") for word in given) else small
        words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in here.items()]
        extra = [
            *words,
            *([] if any(w.startswith("corpus=") for w in given) else [f"corpus={corpus}", f"name={_name(given)}"]),
        ]
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *given, *extra],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    for line in (line for line in lines if "python -m cpdlm." in line):
        done = subprocess.run(
            ["bash", "-c", line.replace("python -m", f"{shlex.quote(sys.executable)} -m")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0 and done.stdout, f"{line}\n{done.stderr[-2000:]}"
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]


def _name(given: list[str]) -> str:
    """The name that the run would have had on the corpus of the README."""
    from cpdlm.config import parse

    return parse([word for word in given if "=" in word and not word.startswith("--")]).run_name
