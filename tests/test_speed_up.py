"""`cpdlm speed-up` from a model's folder to a faster one, and the command itself as it is installed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY, TINY_RETROFIT, small_pretrained
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from cpdlm import cli, speed_up
from cpdlm.hf.load import run_tokenizer

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
    # The preset's 8,192 tokens to draft from are more than this model has.
    left_out = {"size", "tracking.mlflow", "data.tokenizer", "loss.draft_vocabulary", "decode.draft_vocabulary"}
    small = {key: value for key, value in (TINY | TINY_RETROFIT).items() if key not in left_out}
    words = [f"{key}={value}" for key, value in small.items()]
    words += [f"corpus={texts}", f"data.cache={tmp_path / 'cache'}"]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["speed-up", str(model), "--output", "fast", *words]) == 0
    said = capsys.readouterr().out
    row = r"\s+[\d.]+\s+[\d.]+\s+[\d.]+\s+[\d.]+ \([\d.]+ to [\d.]+\)"
    assert re.search(f"greedy{row}\nsampling{row}\n", said) and "output is unchanged" in said
    (home,) = (tmp_path / "runs").iterdir()
    measured = json.loads((home / "decode.json").read_bytes())
    assert set(measured["modes"]) == {"greedy", "sampling"} and len(measured["shortlist"]) == 300

    def again(*arguments: object, **options: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr(speed_up, "measure", again)
    assert cli.main(["speed-up", str(model), *words, "--output", "fast"]) == 0
    assert capsys.readouterr().out == said
    loaded, text = AutoModelForCausalLM.from_pretrained("fast"), AutoTokenizer.from_pretrained("fast")
    ids = text("def f1(", return_tensors="pt")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(model)
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
    assert cli.main(["speed-up", "some-model", "optim.stepz=3"]) == 2
    assert "did you mean optim.steps?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code", ["import cpdlm", "from cpdlm.cli import main; main(['--help'])", "import cpdlm.hf.load"]
)
def test_what_starts_quickly_loads_nothing_slow(code: str) -> None:
    slow = ("mlflow", "lightning", "matplotlib", "datasets")
    check = f"{code}; import sys; assert not [m for m in {slow} if m in sys.modules]"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
