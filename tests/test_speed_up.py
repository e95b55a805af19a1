"""`cpdlm speed-up` from a model's folder to a faster one, and the command itself as it is installed."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY, TINY_RETROFIT, code_folder, small_pretrained
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from cpdlm import cli
from cpdlm.config import ConfigError, parse
from cpdlm.data.conversations import read_conversations
from cpdlm.hf.load import run_tokenizer
from cpdlm.speed_up import measured, plan

ROOT = Path(__file__).parents[1]


def test_a_model_becomes_a_faster_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, measured, exported; asked again, nothing is made anew; the folder writes what the model writes."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(12):
        (texts / f"{index}.py").write_text("".join(f"def f{i}(x):\n    return x + {i * index}\n" for i in range(40)))
    model = small_pretrained(tmp_path / "little", sorted(texts.glob("*.py")))
    (texts / "picture").write_bytes(bytes(9))
    # The preset's 8,192 tokens to draft from are more than this model has.
    left_out = {"size", "tracking.mlflow", "data.tokenizer", "loss.draft_vocabulary", "decode.draft_vocabulary"}
    small = {key: value for key, value in (TINY | TINY_RETROFIT).items() if key not in left_out}
    words = [f"{key}={value}" for key, value in small.items()]
    words += [f"corpus={texts}", f"data.cache={tmp_path / 'cache'}", "model.dtype=float32"]  # no near-ties
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as warned:
        assert cli.main(["speed-up", str(model), "--output", "fast", *words]) == 0
    written = "".join(warnings.formatwarning(each.message, each.category, "", 0) for each in warned)
    assert written.count("1 of 13 files are left out") == 1
    said = capsys.readouterr().out
    row = r" +[\d.]+ tokens/s +[\d.]+ per forward +[\d.]+ x \[[\d.]+, [\d.]+\] +\d+ MiB\n"
    rows = f"  AR{row}  prompt lookup{row}  this draft{row}"
    assert re.search(f"greedy\n{rows}sampling at T = 1\n{rows}\nOn this machine it ", said)
    (home,) = (tmp_path / "runs").iterdir()
    found = json.loads((home / "decode.json").read_bytes())
    assert set(found["modes"]) == {"greedy", "sampling"} and len(found["tried"]) == len(measured.CANDIDATES)

    def again(*arguments: object, **options: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr(measured, "interleaved", again)
    monkeypatch.setattr(plan, "measure_pace", again)
    assert cli.main(["speed-up", str(model), *words, "--output", "fast"]) == 0
    assert capsys.readouterr().out == said
    assert max(map(len, measured.lines("m", found, 40)[:-1])) <= 40
    loaded, text = AutoModelForCausalLM.from_pretrained("fast"), AutoTokenizer.from_pretrained("fast")
    ids = text("def f1(", return_tensors="pt")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(model)
    assert [loaded.config.draft, loaded.config.nodes] == [found["settings"][name] for name in ("draft", "nodes")]
    ours = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20)
    assert torch.equal(ours, GenerationMixin.generate(plain, ids, max_new_tokens=20))
    card = Path("fast/README.md").read_text()
    assert not [path for path in Path("fast").iterdir() if str(tmp_path).encode() in path.read_bytes()]
    assert f"cpdlm speed-up {model.name} " in card and "--output fast" in card and "cpdlm export" not in card
    assert "tokens per forward" in card
    shutil.rmtree(tmp_path / "cache")
    model.rename(tmp_path / "moved")
    words_T = run_tokenizer(home).encode(["def f1("])[0]
    assert words_T.tolist() == ids[0, -len(words_T) :].tolist(), "the run's folder is not whole without the cache"


def test_a_folder_that_holds_something_else_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["speed-up", "some-model", "--output", "mine"]) == 2
    assert "mine is a file" in capsys.readouterr().err
    assert cli.main(["speed-up", "some-model", "--output", "mine", "--dry-run"]) == 2
    assert "mine is a file" in capsys.readouterr().err
    assert cli.main(["speed-up", "some-model", "optim.stepz=3"]) == 2
    assert "did you mean optim.steps?" in capsys.readouterr().err


def test_what_starts_quickly_loads_nothing_slow() -> None:
    slow = ("mlflow", "lightning", "matplotlib", "datasets")
    code = "import sys, cpdlm, cpdlm.hf.load, cpdlm.text, cpdlm.generate; from cpdlm.cli import main; main(['--help'])"
    check = f"{code}; assert not [m for m in {slow} if m in sys.modules]"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_has_the_command_and_the_heads(tmp_path: Path) -> None:
    """Built without isolation, unpacked elsewhere: the command answers, and nothing of the suite is needed."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    built = subprocess.run([*pip, str(tmp_path / "there"), str(_copy(tmp_path))], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "there" / "cpdlm" / "released" / "smollm2.safetensors").is_file()
    for words in (["--help"], ["speed-up", "--help"], ["generate", "--help"], ["export", "--help"]):
        line = [sys.executable, "-m", "cpdlm", *words]
        done = subprocess.run(line, cwd=tmp_path / "there", capture_output=True, text=True)
        assert done.returncode == 0 and "cpdlm" in done.stdout, done.stderr
    assert (tmp_path / "there" / "bin" / "cpdlm").is_file()


def _copy(folder: Path) -> Path:
    """The library's sources alone: a build leaves folders beside them."""
    source = folder / "source"
    shutil.copytree(ROOT / "cpdlm", source / "cpdlm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    return source


PACE = plan.Pace(
    horizon=4,
    forward={1: 20.0, 2: 20.5, 4: 21.0, 8: 23.0, 16: 30.0},
    draft=0.5,
    draft_all=9.0,
    states=1e-3,
    heads=1e-3,
    writing=2e-3,
    width=64,
    parameters=10**6,
    head_parameters=10**5,
    peak=10**9,
)


def test_a_plan_picks_what_pays() -> None:
    """Long windows where forwards of many tokens cost little, a draft vocabulary where the whole one costs much, and as
    many steps as there is time for."""
    assert plan.best_horizon(PACE) > plan.best_horizon(replace(PACE, forward={1: 20.0, 16: 320.0})) == 3
    words = [*plan.SETTINGS, "model=x", "horizon=6"]
    base = parse(words)
    config = parse([*words, *plan._picked(base, PACE, 600.0)])
    assert config.loss.draft_vocabulary == 8192
    assert plan._seconds(config, PACE)[1] == pytest.approx(600.0, rel=0.01)
    assert "loss.draft_vocabulary=0" in plan._picked(base, replace(PACE, draft_all=0.6), 600.0)
    words += ["data.text=sampled", "data.states=256"]
    config = parse([*words, *plan._picked(parse(words), PACE, 600.0)])
    assert sum(plan._seconds(config, PACE)[:2]) == pytest.approx(600.0, rel=0.02)
    wide = replace(PACE, width=2**14)
    config = parse([*words, "data.states_gib=1", *plan._picked(parse([*words, "data.states_gib=1"]), wide, 600.0)])
    assert config.data.states * (4 * 2**14 + 4) <= 2**30, "what is kept exceeds data.states_gib"
    assert sum(plan._seconds(config, wide)[:2]) == pytest.approx(600.0, rel=0.02)


def test_a_disk_that_is_too_small_is_named(tmp_path: Path) -> None:
    plan._check_disks({tmp_path / "runs" / "deep": 10, tmp_path: 10})
    with pytest.raises(ConfigError, match=f"{tmp_path}/b: the plan takes .* GiB of that disk"):
        plan._check_disks({tmp_path: shutil.disk_usage(tmp_path).free, tmp_path / "b": 2**34})


@pytest.mark.parametrize("slow", ["bfloat16", "float32"])
def test_the_precision_is_the_one_that_multiplies_faster(
    slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(kind: type, maps: list[torch.Tensor], times: int) -> float:
        assert maps[0].shape[1] == 32 and len(maps) == 64
        return 9.0 if maps[0].dtype == getattr(torch, slow) else 2.0

    monkeypatch.setattr("cpdlm.decoding.prepared._milliseconds", timed)
    monkeypatch.setattr(plan, "measure_pace", lambda *_: PACE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    texts = tmp_path / "texts"
    texts.mkdir()
    model = small_pretrained(tmp_path / "little", list(code_folder(texts).iterdir()))
    words = (f"data.cache={tmp_path / 'cache'}", f"output={tmp_path / 'runs'}")
    asked = plan.Request(str(model), tmp_path / "fast", str(texts), settings=words)
    made, (fast,) = plan.make_plan(asked, lambda line: None), {"bfloat16", "float32"} - {slow}
    assert made.config.model.dtype == fast
    assert f"in {fast} (products take 2.0 ms, in {slow} 9.0)" in made.lines[0]

    def again(*arguments: object) -> None:
        raise AssertionError("it was given")

    monkeypatch.setattr(plan, "product_times", again)
    made = plan.make_plan(replace(asked, settings=(*words, f"model.dtype={slow}")), lambda line: None)
    assert made.config.model.dtype == slow and f"in {slow} (as given)" in made.lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--minutes", "0"], "--minutes 0 is no time to train in; give at least 1"),
        (["--minutes", "nan"], "is no time to train in"),
        (["--minutes", "inf"], "is no time to train in"),
        (["name=mine"], "name= is how a killed speed-up is found again"),
        (["--corpus", "code", "--chat", "chat.jsonl"], "--corpus and --chat are two texts"),
        (["--corpus", "nowhere", "--dry-run"], "corpus='nowhere' is neither code"),
        (["--chat", "none.jsonl"], "none.jsonl: there is no such file"),
        (
            ["--chat", "chat.jsonl"],
            "line 2 of chat.jsonl is no conversation .*--skip-broken .data.skip_broken=true. leaves out",
        ),
        (["--chat", "chat.jsonl", "--skip-broken"], "model=code brings code of its own"),
        ([], "model=code brings code of its own .auto_map in its config.json., which is not executed"),
    ],
)
def test_bad_input_is_a_sentence_before_any_work(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    (tmp_path / "chat.jsonl").write_text(f"{turns}\n{{broken\n{turns}\n")
    _bringing_code(tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["speed-up", "code", *words]) == 2
    assert re.search(said, capsys.readouterr().err)


def _bringing_code(folder: Path) -> None:
    folder.mkdir()
    foreign = {"model_type": "foreign", "auto_map": {"AutoConfig": "its.Config", "AutoModelForCausalLM": "its.Model"}}
    (folder / "config.json").write_text(json.dumps(foreign))


def test_bench_says_of_a_model_what_speed_up_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _bringing_code(tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "code", "--tasks", "prompts.jsonl"]) == 2
    assert "model=code brings code of its own" in capsys.readouterr().err


def test_an_adapter_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "their/model"}))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["speed-up", "lora"]) == 2
    assert re.search(r"lora is an adapter .*merge_and_unload", capsys.readouterr().err)
    assert cli.main(["generate", "--model", "lora", "--prompt", "a"]) == 2
    assert re.search(r"lora is an adapter .*PeftModel", capsys.readouterr().err)


def test_what_a_broken_line_leaves_is_used(tmp_path: Path) -> None:
    turns = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    content = f"{json.dumps(turns)}\n{{broken\n".encode()
    with pytest.warns(UserWarning, match="1 lines are left out: line 2 of c.jsonl is no conversation"):
        assert len(read_conversations(Path("c.jsonl"), content, "c", skip_broken=True)) == 1
    with pytest.warns(UserWarning, match="line 2"), pytest.raises(ConfigError, match="line 1 of c.jsonl"):
        read_conversations(Path("c.jsonl"), content, "c", skip_broken=True)
        read_conversations(Path("c.jsonl"), b"{broken\n", "c", skip_broken=True)
