"""verify: a record is run again at its commit, its results are judged and its speeds shown."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from made_records import made

from experiments import verify
from experiments.records import Record


def moved(name: str, by: float) -> Any:
    return lambda r: r["likelihood"][name].update(mean=r["likelihood"][name]["mean"] + by)


PACE = made(4)["decoding"]["modes"]["greedy"]["tokens_per_pass"]["high"] + 0.01
CHANGES: list[tuple[Any, list[str]]] = [
    (lambda r: None, []),
    (moved("joint_nll", 9e-4), []),
    (moved("joint_nll", 2e-3), ["joint NLL (nats)"]),
    (lambda r: r["data"].update(sha256="cd" * 32), ["data sha256"]),
    (lambda r: r["config"]["optim"].update(lr=1.0), ["optim.lr"]),
    (lambda r: r["config"].update(output="elsewhere"), []),
    (lambda r: r["config"]["data"].update(cache="elsewhere"), []),
    (lambda r: r["config"]["model"].update(trunk="runs/other"), ["model.trunk"]),
    (
        lambda r: r["decoding"]["modes"]["greedy"]["tokens_per_pass"].update(mean=PACE),
        ["greedy: tokens per target forward"],
    ),
    (lambda r: r["decoding"]["modes"]["greedy"]["speedup"].update(median=0.1), []),
    (lambda r: r["hardware"].update(processor="Another"), []),
]


@pytest.mark.parametrize(("change", "differs"), CHANGES)
def test_verify_judges_results_and_only_shows_speeds(change: Any, differs: list[str]) -> None:
    content = made(4)
    change(content)
    lines = verify.compare(Record("made.json", made(4)), Record("made.json", content))
    assert [line.what for line in lines if line.agrees is False] == differs


STUB = """
import json, pathlib, sys
given = dict(word.split("=", 1) for word in sys.argv[1:])
record = json.loads(pathlib.Path("template.json").read_text())
folder = pathlib.Path(given["output"]) / record["name"]
folder.mkdir(parents=True)
(folder / (record["name"] + ".json")).write_text(json.dumps(record))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose run.py writes the record it was committed with."""
    root = tmp_path / "repository"
    (root / "experiments").mkdir(parents=True)
    (root / "results/C1").mkdir(parents=True)
    (root / "experiments/run.py").write_text(STUB)
    (root / "template.json").write_text(json.dumps(made(4)))
    commit(root)
    return root


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(root), *identity, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def commit(root: Path) -> None:
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "one")


def save(root: Path, **changes: Any) -> Path:
    content = made(4) | {"commit": git(root, "rev-parse", "HEAD")} | changes
    path = root / "results/C1" / f"{content['name']}.json"
    path.write_text(json.dumps(content))
    return path


def test_verify_runs_a_record_again_at_its_commit(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(repository)
    (repository / "experiments/run.py").write_text("raise SystemExit(7)")  # the code of today must not matter
    assert verify.main([str(path)], repository) == 0
    assert "judged quantities agree" in capfd.readouterr().out
    likelihood = made(4)["likelihood"]
    likelihood["first_token_nll"]["mean"] += 0.5
    rows = likelihood["per_row"]
    rows["first_token_nll"] = [
        nll + 0.5 * count for nll, count in zip(rows["first_token_nll"], rows["positions"], strict=True)
    ]
    assert verify.main([str(save(repository, likelihood=likelihood))], repository) == 1
    out = capfd.readouterr().out
    assert re.search(r"first-token NLL \(nats\) .* DIFFERS", out) and "1 of" in out
    assert git(repository, "worktree", "list").count("\n") == 0  # nothing stays behind


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"dirty": True}, 2, "uncommitted changes"),
        ({"commit": "0" * 40}, 2, "is not in this clone"),
        ({"command": "rm everything"}, 2, "not `python experiments/run.py"),
        ({"command": "python experiments/run.py 'rank=2"}, 2, "its command is"),
        ({"command": "python experiments/run.py nonsense"}, 1, "exit code 1"),
        ({"schema": 99}, 2, "schema is 99"),
        # What would be written outside the temporary folder, or is no setting.
        ({"command": "python experiments/run.py name=../../out"}, 2, "'../../out' is not the name of a run"),
        ({"command": "python experiments/run.py rank=2 --print-config"}, 2, "'--print-config', which is not a setting"),
    ],
)
def test_verify_says_what_cannot_be_repeated(
    changes: dict[str, Any], code: int, said: str, repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(save(repository, **changes))], repository) == code
    assert said in capfd.readouterr().err
