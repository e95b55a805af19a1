"""Every command of README.md and docs/ is run: shrunk to seconds where it would take minutes."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY, TINY_RETROFIT, small_pretrained

from cpdlm.config import parse
from experiments import plan, sweep
from experiments.run import several

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
NAMES = ("speed-up", "results", "reproducing", "processes", "data", "model", "scaling")
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
PAGES += [ROOT / "experiments" / "README.md", ROOT / "CONTRIBUTING.md"]
BENCH = ["--prompts", "2", "--new-tokens", "4", "--repeats", "1", "--warmups", "0"]
LAUNCHERS = ("torchrun", "srun", "experiments/run.py nodes=2")  # test_distributed.py and test_slurm.py run these


def blocks(language: str) -> list[str]:
    return [
        block for page in PAGES for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)
    ]


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    inline = [found for page in PAGES for found in re.findall(r"`(\./[a-z][^`]*|python [^`]*)`", page.read_text())]
    return list(dict.fromkeys(line for line in [*lines, *inline] if line and not line.startswith(LAUNCHERS)))


def test_the_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.encode()) <= 9 * 1024
    assert all(len(line) <= 200 for line in text.splitlines() if line.startswith("|"))
    assert all(len(paragraph) <= 4 * 125 for paragraph in text.split("\n\n") if paragraph[0] not in "|#<")


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("./")])
def test_scripts_exist_and_explain_themselves(command: str) -> None:
    """Their work is tested in test_scripts.py, test_tracking.py and test_report.py, and by .ci/run as a whole."""
    script, *words = command.split()
    done = subprocess.run(["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    named = [word for word in words if word.startswith("--")] + (words[:1] if script == "./dev" else [])
    assert all(word in done.stdout for word in named), f"{script} --help does not mention all of {named}"
    paths = [word for word in words if word.startswith(("results/", "tests/"))]
    assert all((ROOT / path).exists() for path in paths)


def test_scripts_of_the_suite_take_the_words_that_the_pages_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands():
        script, *words = [word for word in shlex.split(command)[1:] if "NAME" not in word] or [""]
        if "--help" in words or not command.startswith("python "):
            continue
        if script == "experiments/sweep.py":
            assert sweep.plan_of(sweep.parse(words)).cells, command
        elif script == "experiments/plan.py":
            assert plan.main(words) == 0, command


def run(words: list[str], folder: Path, command: str) -> str:
    done = subprocess.run(
        words,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and done.stdout, f"{command}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_commands_of_the_pages_run(tmp_path: Path) -> None:
    """In the order of the pages, in one folder, as a reader would: later commands find what earlier ones made."""
    corpus = tmp_path / "cpdlm"
    shutil.copytree(ROOT / "cpdlm", corpus, ignore=shutil.ignore_patterns("__pycache__"))
    small_pretrained(tmp_path / "my-llm", sorted(corpus.rglob("*.py")))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def f(x"}\n')
    # The size is part of a trunk's name on the pages, so it stays; everything slow shrinks.
    small = {key: value for key, value in TINY.items() if key != "size"} | {"data.cache": tmp_path / "cache"}
    ran = 0
    for command in commands():
        program, *given = shlex.split(command)
        settings = small | (TINY_RETROFIT if "speed-up" in given else {})
        shrunk = [
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
        ]
        if program == "cpdlm":
            shrunk = [*shrunk, f"corpus={corpus}"] if given[0] == "speed-up" else BENCH if given[0] == "bench" else []
            run([sys.executable, "-m", "cpdlm", *given, *shrunk], tmp_path, command)
        elif given[:1] == ["experiments/run.py"]:
            words = [word for word in given[1:] if "=" in word and not word.startswith("--")]
            shrunk += [f"corpus={corpus}", "devices=1", "parallel=auto"]
            if len(cells := several(words)) == 1:  # later commands look for it
                shrunk.append(f"name={parse(cells[0]).run_name}")
            run([sys.executable, str(ROOT / given[0]), *given[1:], *shrunk], tmp_path, command)
        elif given and given[0].startswith("experiments/bench/"):  # test_bench_*.py run their work
            said = run([sys.executable, str(ROOT / given[0]), "--help"], tmp_path, command)
            assert all(word in said for word in given if word.startswith("--")), said
        else:
            continue
        ran += 1
    assert ran >= 10
    shutil.copytree(tmp_path / "my-fast-llm", tmp_path / "my-model", dirs_exist_ok=True)
    for block in blocks("python"):
        run([sys.executable, "-c", block], tmp_path, block)


def test_the_site_builds_without_a_dead_link() -> None:
    done = subprocess.run(
        ["bash", "dev", "docs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"CPDLM_PYTHON": sys.executable},
    )
    assert done.returncode == 0 and "site/index.html" in done.stdout, done.stdout + done.stderr
