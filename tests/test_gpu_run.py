"""The GPU's 25 minutes, without a GPU: the plan adds up, every setting is one, and every step runs, tiny."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import chunks, gpu_run, records
from experiments.gpu_run import Step, steps
from tests.tiny import TINY, code_folder, small_pretrained


def test_the_plan_fits_and_every_setting_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = steps()
    assert sum(step.minutes for step in planned) <= gpu_run.TOTAL_MINUTES + 1e-9
    assert max(step.minutes for step in planned) <= gpu_run.MINUTES and [s.part for s in planned] == sorted(
        s.part for s in planned
    )
    for name in gpu_run.DRAFTS:
        config = gpu_run.resolved(gpu_run.smollm2(name), tmp_path)
        assert config.optim.steps * config.data.batch_rows * config.data.context >= gpu_run.POSITIONS
    trunk = gpu_run.resolved(gpu_run.trunk_56m(), tmp_path)
    assert trunk.optim.steps * trunk.data.batch_rows * trunk.data.context > 49e6
    assert gpu_run.resolved(gpu_run.heads_56m(8, 2), tmp_path).decode.prompt_tokens + 128 == 1024
    assert gpu_run.main(["--plan"]) == 0 and "llama-8b" in capsys.readouterr().out


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that needs nothing of the pack, on which every step takes seconds; the folder of what is kept."""
    work, placed = tmp_path / "work", gpu_run.placed
    (work / "texts").mkdir(parents=True)
    small_pretrained(work / "model", sorted(code_folder(work / "texts").glob("*.py")))
    (work / "few.jsonl").write_text('{"prompt": "def f(x):"}\n{"prompt": "def g(y):"}\n')
    few = {"train.decode_prompts": 0, "data.release": 0, "corpus": str(work / "texts")}
    heads = {"model.trunk": str(work / "model"), "model.dtype": "float32", "data.tokenizer": "model"}
    heads |= {"loss.draft_vocabulary": 100, "decode.draft_vocabulary": 100, "loss.normaliser_tokens": 50}

    def tiny(words: dict[str, Any], work: Path) -> dict[str, Any]:
        small = placed(words, work) | TINY | few
        if "model.family" not in words:
            return small
        return {key: value for key, value in (small | heads | {"loss.target_top": 8}).items() if key != "size"}

    monkeypatch.setattr(gpu_run, "placed", tiny)
    monkeypatch.setattr(gpu_run, "SEEDS", 1)
    sizes = "--prompts 2 --new-tokens 4 --repeats 1 --warmups 0"
    monkeypatch.setattr(gpu_run, "TASKS", f"--tasks {work / 'few.jsonl'} --methods generate,chain {sizes}")
    speeds = "--quick --dtypes float32 --ranks 1 --batch-ranks 1 --batches --repeats 1 --warmups 0 --new-tokens 4"
    for name in ("LLAMA", "SMALL"):
        monkeypatch.setattr(gpu_run, name, speeds)
    every = [replace(step, minutes=10.0, needs=()) for step in steps()]
    monkeypatch.setattr(gpu_run, "steps", lambda: every)
    return work


@pytest.mark.slow  # eight trainings, for a script that is borrowed for 25 minutes
def test_every_step_runs_and_is_not_run_twice(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    words = ["--minutes", "60", "--work", str(work), "--home", str(home)]
    assert gpu_run.main(words) == 0, capsys.readouterr().err
    done = {path.name for path in (work / "done").iterdir()}
    assert done == {step.name for step in gpu_run.steps()}
    assert records.load(work / "records" / "56m-r8-s0.json").mode("sampling") is not None
    assert len(list((work / "records").glob("tasks_gpu_*.json"))) == 4
    capsys.readouterr()
    assert gpu_run.main(words) == 0 and ": at most" not in capsys.readouterr().err
    # The next machine has what came home.
    assert chunks.unpack(home, tmp_path / "new", tmp_path / "kept") == {"home"}
    assert {path.name for path in (tmp_path / "new" / "runs" / "gpu" / "done").iterdir()} == done
    assert (tmp_path / "new/runs/gpu/runs/trunk-56m/model.safetensors").is_file()


def test_a_step_that_fails_or_lacks_its_pack_costs_no_other_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(work: Path) -> None:
        raise RuntimeError("a bug")

    made = [
        Step(1, "a", 1.0, ("model",), fails),
        Step(1, "b", 1.0, (), fails),
        Step(2, "c", 1.0, (), lambda work: None),
    ]
    monkeypatch.setattr(gpu_run, "steps", lambda: made)
    assert gpu_run.call(tmp_path, 9.0, set()) == ["a", "b"]
    said = capsys.readouterr().err
    assert "a: waits for model" in said and "b: failed" in said and "c: done" in said
    assert json.loads((tmp_path / "tried.json").read_text()) == {"b": 1, "c": 1}
    assert gpu_run.call(tmp_path, 0.5, {"model"}) == ["a", "b"] and "no time left" in capsys.readouterr().err


def test_chunks_of_several_calls_are_one_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 4096)
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    parts = chunks.write_chunks("tokens", {"deep/file": tmp_path / "file"}, tmp_path / "pack")
    assert len(parts) > 2
    last = parts[-1].read_bytes()
    parts[-1].unlink()
    assert chunks.unpack(tmp_path / "pack", tmp_path / "root", tmp_path / "kept") == set()
    for part in parts[:-1]:
        part.unlink()
    parts[-1].write_bytes(last)
    assert chunks.unpack(tmp_path / "pack", tmp_path / "root", tmp_path / "kept") == {"tokens"}
    assert (tmp_path / "root" / "deep" / "file").read_bytes() == (tmp_path / "file").read_bytes()
