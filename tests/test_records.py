"""The record: what is refused and how, whole writes, provenance, and what may be compared."""

import copy
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from made_records import ORIGIN, made

from cpdlm.config import Config, flat, to_dict
from experiments.families import along, families_of
from experiments.provenance import code_hash, git_state, is_commit
from experiments.records import Record, RecordError, load, load_all, validate, write


def test_a_record_survives_the_round_trip(tmp_path: Path) -> None:
    content = made(4)
    path = write(content, tmp_path / "C1")
    assert path == tmp_path / "C1" / "code-tiny-own-r4-n4-none-s0.json"
    record = load(path, tmp_path)
    assert record.content == content, "nothing is lost, and nothing has to be upgraded"
    assert (record.path, record.rank, record.seed, record.horizon) == ("C1/code-tiny-own-r4-n4-none-s0.json", 4, 0, 4)
    assert (record.target, record.variant) == ("own", "untied")


WRONG: list[tuple[str, Any, str]] = [
    ("schema", 2, "schema is 2, this version reads 1"),
    ("commit", None, "commit must be str, found None"),
    ("likelihood.joint_nll.mean", "high", "likelihood.joint_nll.mean must be int or float, found 'high'"),
    ("likelihood.joint_nll.mean", math.nan, "likelihood.joint_nll.mean is nan"),
    ("likelihood.position_nll", [], "likelihood.position_nll has 0 entries, config.horizon is 4"),
    ("training.curve", [{"loss": 1.0}], "training.curve has an entry without a step"),
    ("training.steps", True, "training.steps must be int, found True"),
    ("decoding.modes.greedy.per_prompt.passes", [1.0], "per_prompt.passes has 1 entries, prompts is 16"),
    ("decoding.modes.greedy.speedup", None, "decoding.modes.greedy.speedup must be an object"),
    ("seed", 3, "seed is 3, config.seed is 0"),
]
# What could not be, whatever the words: the field is named.
ODD: list[tuple[str, Any]] = [
    ("config.rank", 0),
    ("config.optim", []),
    ("config.optim.lr", "fast"),
    ("config.model.dtype", "float7"),
    ("config.decode.top_p", 1.5),
    ("started", "yesterday"),
    ("command", "python\x00"),
    ("seconds.train", -1.0),
    ("versions.torch", 2),
    ("training.clock", []),
    ("training.curve", [{"step": 1, "train/nll": None}]),
    ("likelihood.per_row.positions", []),
    ("likelihood.per_row.first_token_nll", [math.nan] * 60),
    ("decoding.modes.greedy.speedup.median", 0.0),
    ("decoding.modes.greedy.drafts_per_prompt.reached", [[]]),
    ("decoding.origin.hardware", {}),
]


@pytest.mark.parametrize(("field", "value", "said"), [*WRONG, *((field, value, field) for field, value in ODD)])
def test_a_value_that_cannot_be_is_named(field: str, value: Any, said: str) -> None:
    content: Any = made(2)
    *parents, last = field.split(".")
    place = content
    for part in parents:
        place = place[part]
    place[last] = value
    with pytest.raises(RecordError, match=f"here.json: .*{re.escape(said)}"):
        validate(content, "here.json")


def test_what_claims_are_made_of_sums_to_what_is_compared() -> None:
    for part, key, factor in (
        (("likelihood", "per_row"), "joint_nll", 0.8),
        (("decoding", "modes", "sampling", "per_prompt"), "tokens", 1.5),
    ):
        content: Any = made(2)
        place = content
        for name in part:
            place = place[name]
        place[key] = [factor * each for each in place[key]]
        with pytest.raises(RecordError, match=rf"{key} sums to .*, which is not"):
            validate(content, "here.json")


def test_every_committed_record_loads(committed: list[Record]) -> None:
    today = flat(to_dict(Config())).keys()
    assert len(committed) >= 225 and all(today <= flat(record.config).keys() for record in committed)


def test_a_record_with_fewer_settings_reads_as_one_of_today(tmp_path: Path) -> None:
    content = made(4)
    today = copy.deepcopy(content)
    content["config"]["loss"]["shortlist"] = content["config"]["loss"].pop("draft_vocabulary")
    del content["config"]["model"]["family"], content["config"]["evaluate"], content["likelihood"]["shortlist"]
    (tmp_path / "one.json").write_text(json.dumps(content))
    assert load(tmp_path / "one.json").content == today


def test_damaged_files_are_named_and_the_others_load(tmp_path: Path) -> None:
    good = write(made(1), tmp_path / "C1")
    (tmp_path / "C1" / "torn.json").write_bytes(good.read_bytes()[:200])
    (tmp_path / "C1" / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "odd.json").write_text(json.dumps(made(2) | {"seed": 3}))
    (tmp_path / ".hidden.json").write_text("not mine")
    (tmp_path / "joint_loss.json").write_text('{"benchmark": "joint loss"}')
    records, damaged = load_all(tmp_path)
    assert [record.path for record in records] == ["C1/code-tiny-own-r1-n4-none-s0.json"]
    assert len(damaged) == 4
    assert all(name in " ".join(damaged) for name in ("torn.json", "binary.json", "list.json", "odd.json"))
    with pytest.raises(RecordError, match="not a folder of records"):
        load_all(tmp_path / "nowhere")


def _git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPDLM_COMMIT", raising=False)
    with pytest.warns(UserWarning, match="commit of .* is not known .*not a git repository.*records name its code by"):
        code, dirty = git_state(tmp_path)
    assert code == code_hash(tmp_path) and not dirty and not is_commit(code)
    _git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "x")
    commit, dirty = git_state(tmp_path)
    assert len(commit) == 40 and not dirty
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "new.json").write_text("{}")
    assert git_state(tmp_path) == (commit, False), "what a sweep writes is not a change of the code"
    (tmp_path / "new.py").write_text("2")
    assert git_state(tmp_path) == (commit, True)
    monkeypatch.setenv("GIT_DIR", str(Path(__file__).parents[1] / ".git"))
    assert git_state(tmp_path) == (commit, True), "GIT_DIR of another checkout says nothing of this one"
    monkeypatch.setenv("CPDLM_COMMIT", "abc-dirty")
    assert git_state(tmp_path) == ("abc", True)


def test_the_hash_of_the_code_is_that_of_its_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "cpdlm").mkdir()
    (tmp_path / "cpdlm" / "a.py").write_text("1")
    first = code_hash(tmp_path)
    assert len(first) == len("code-") + 64
    (tmp_path / "cpdlm" / "a.pyc").write_text("1")
    assert code_hash(tmp_path) == first
    (tmp_path / "cpdlm" / "a.py").rename(tmp_path / "cpdlm" / "b.py")
    assert code_hash(tmp_path) != first


def _records(*contents: dict[str, Any]) -> list[Record]:
    return [Record(f"{index}/{content['name']}.json", content) for index, content in enumerate(contents)]


def test_families_keep_other_data_and_settings_apart() -> None:
    other = made(2)
    other["data"]["sha256"] = "cd" * 32
    found, notes = families_of(_records(made(1), made(8), other, made(4, optim__steps=99)))
    assert sorted(family.ranks() for family in found) == [[1, 8], [2], [4]]
    assert len({family.label for family in found}) == 3
    assert any("optim.steps=99" in family.label for family in found)
    assert any("data.sha256=cd" in family.label for family in found)
    assert notes == []


def test_mixed_commits_hardware_and_duplicates_are_said() -> None:
    origin = copy.deepcopy(ORIGIN) | {"commit": "fedcba9876543210", "dirty": True, "started": "2026-02-01T00:00:00Z"}
    origin["hardware"] = ORIGIN["hardware"] | {"processor": "Another CPU"}  # type: ignore[operator]
    found, notes = families_of(_records(made(1), made(8, origin=origin), made(1, origin=origin)))
    text = "\n".join(notes)
    assert "0/code-tiny-own-r1-n4-none-s0.json left out: 2/code-tiny-own-r1-n4-none-s0.json is the same" in text
    assert found[0].cells["untied", 1][0].path.startswith("2/")
    assert "2 of 2 records come from uncommitted changes" in text
    _, notes = families_of(_records(made(1), made(8, origin=origin)))
    assert "records of 2 commits (0123456789, fedcba9876) are compared" in "\n".join(notes)
    assert "records trained on 2 kinds of hardware are compared" in "\n".join(notes)


def test_families_along_one_setting() -> None:
    """Of the base, the horizon and the balance each make a group; what differs in both is in neither."""
    made_of = [made(4), made(4, 1), made(4, horizon=8), made(4, balance="none"), made(4, horizon=2, balance="none")]
    families, _ = families_of([Record(f"{place}.json", content) for place, content in enumerate(made_of)])

    def groups(*free: str) -> list[set[tuple[int, str]]]:
        found = along(families, *free)
        return [{(family.horizon, family.settings["balance"]) for family in group} for group in found]

    assert sorted(map(sorted, groups("horizon"))) == [[(2, "none"), (4, "none")], [(4, "switch"), (8, "switch")]]
    assert groups("balance", "loss.balance_") == [{(4, "switch"), (4, "none")}]
    assert groups("seed") == []
    assert len(groups("horizon", "balance")[0]) == 4
    assert {family.label for family in families if family.horizon == 4} == {
        "code, tiny, n=4, self target",
        "code, tiny, n=4, self target, balance=none",
    }


def test_settings_that_no_run_has_leave_a_record_readable(tmp_path: Path) -> None:
    content = made(2)
    content["config"]["data"]["context"] = 2  # less than the horizon
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert load(tmp_path / "a.json").draft_flops() is None
