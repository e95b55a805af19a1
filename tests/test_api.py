"""The library from Python: its documented examples run, and exported folders load where people load models."""

import doctest
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import cpdlm
import cpdlm.text
from cpdlm.hf.export import export
from tests.made_runs import make_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made")
    make_run(made / "run", {"rank": 2, "horizon": 3, "model.tie_first": True}, measured=False)
    export(made / "run", made / "my-fast-llm")
    return made / "my-fast-llm"


@pytest.mark.parametrize("module", [cpdlm, cpdlm.text], ids=["cpdlm", "cpdlm.text"])
def test_docstrings_run(module: object, folder: Path) -> None:
    done = doctest.testmod(module, globs={"cpdlm": cpdlm, "folder": folder})  # type: ignore[arg-type]
    assert done.attempted and not done.failed


def test_the_page_of_the_api_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    exec(block, {})


def test_a_prompt_that_does_not_fit_is_a_sentence(folder: Path) -> None:
    model = cpdlm.load(folder)
    for prompt, most, said in (("", 4, "the prompt is empty"), ("a", 10**6, "leaves room for"), ("a", 0, "at least 1")):
        with pytest.raises(ValueError, match=said):
            model.generate(prompt, most)
    with pytest.raises(RuntimeError, match="no such folder"):
        cpdlm.load("nowhere/at-all")


@pytest.mark.parametrize("weights", ["packed", "int8"])
def test_with_rounded_weights_the_chain_takes_the_place_of_branches(weights: str, folder: Path) -> None:
    model = cpdlm.load(folder, weights=weights)
    model.loaded = replace(model.loaded, drafting=("branched", 4))
    own = model.decode("def f1(", 30, temperature=1.0)
    assert (own == model.decode("def f1(", 30, temperature=1.0, draft="chain")) == (weights == "int8")


FOREIGN = """
import json, sys, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

assert not any(name.startswith("cpdlm") for name in sys.modules)
writer = pipeline("text-generation", model="my-fast-llm", trust_remote_code=True)
print(writer("def f1(", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"])
model = AutoModelForCausalLM.from_pretrained("my-fast-llm", trust_remote_code=True)
model.save_pretrained("again", max_shard_size="50KB")
(name,) = json.load(open("again/config.json"))["architectures"]
getattr(transformers, name).from_pretrained("again", trust_remote_code=True)  # as `transformers serve` loads it
"""


def test_tools_that_import_nothing_of_ours_load_a_folder(folder: Path) -> None:
    """Told to trust its code, which is an import of the installed package; saved again, in shards, it is the same."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(folder.parent / "modules")}
    where = {"cwd": folder.parent, "env": environment, "text": True, "capture_output": True}
    done = subprocess.run([sys.executable, "-c", FOREIGN], **where)
    assert done.returncode == 0, done.stderr
    text = cpdlm.load(folder).generate("def f1(", max_new_tokens=8)
    assert done.stdout == text + "\n"
    again = folder.parent / "again"
    assert len(list(again.glob("model-*.safetensors"))) > 1 and not (again / "model.py").exists()
    shutil.copy(folder / "tokenizer_config.json", again)
    shutil.copy(folder / "tokenizer.json", again)
    assert cpdlm.load(again).generate("def f1(", max_new_tokens=8) == text
    untold = FOREIGN.replace(", trust_remote_code=True", "")
    done = subprocess.run([sys.executable, "-c", untold], stdin=subprocess.DEVNULL, **where)
    assert done.returncode and "trust_remote_code=True" in done.stderr
