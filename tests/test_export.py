"""From a run to a folder that stands alone: weights, tokenizer, draft vocabulary, card."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
)

from cpdlm import cli
from cpdlm.decoding.cache import Text
from cpdlm.files import WriteError, write_json
from cpdlm.hf import CpdlmForCausalLM, export
from cpdlm.hf.load import run_tokenizer
from cpdlm.training.checkpoints import RunError
from tests.made_runs import LISTED, bpe_run, listed_run, make_run
from tests.test_hf_model import same_weights


def test_a_run_becomes_a_folder_that_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trunk, run, folder = tmp_path / "trunk", tmp_path / "heads", tmp_path / "exported"
    make_run(trunk, {"rank": 1, "horizon": 1, "balance": "none"})
    model = make_run(run, {"model.trunk": str(trunk)})
    assert cli.main(["export", str(run), str(folder)]) == 0
    said = capsys.readouterr().out.split()
    names = {path.name for path in folder.iterdir()}
    assert {Path(line).name for line in said} == names >= {"model.safetensors", "tokenizer.json", "README.md"}
    for path in trunk.iterdir():
        path.unlink()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    same_weights(model, loaded.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("def main(", "né € 😀\n\ttab", "<|endof"):
        ids = tokenizer(text)["input_ids"]
        assert ids == [256, *text.encode()] and tokenizer.decode(ids, skip_special_tokens=True) == text
    both = tokenizer(["a", "a longer one"], padding=True, return_tensors="pt")
    assert both["attention_mask"][0].tolist() == [0] * 11 + [1] * 2 and len(tokenizer) == 257
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (256, 256)
    assert loaded.generate(**both, max_new_tokens=8).shape[0] == 2
    card = (folder / "README.md").read_text()
    front = {"library_name", "pipeline_tag", "tags"}
    assert (metadata_load(folder / "README.md") or {}).keys() == front, "nothing else is known"
    for word in ("rank, horizon, link | 2, 4, none", "1.77", "1.23 [1.10, 1.31]", "sympy 1.14.0 (BSD-3-Clause)"):
        assert word in card, word
    assert cli.main(["export", str(run), str(folder)]) == 2, "the trunk is gone"
    assert "trunk" in capsys.readouterr().err
    assert cli.main(["speed-up", str(folder), "--dry-run", "--output", str(tmp_path / "more")]) == 2
    assert "has heads already; give the model that they were trained on" in capsys.readouterr().err


def test_an_export_that_ends_half_way_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = tmp_path / "run", tmp_path / "exported"
    make_run(run, {})
    export.export(run, folder)
    (folder / "model-00001-of-00002.safetensors").touch()  # of a larger one, before
    (folder / "chat_template.jinja").touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cpdlm.hf.export._save_tokenizer", full)
        with pytest.raises(SafetensorError):
            export.export(run, folder)
        patch.setattr("cpdlm.hf.export.CpdlmForCausalLM.save_pretrained", full)
        with pytest.raises(WriteError, match=f"cannot write {folder}: No space left"):
            export.export(run, folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    export.export(run, folder)
    assert before.keys() - {path.name for path in folder.iterdir()} == {
        "model-00001-of-00002.safetensors",
        "chat_template.jinja",
    }, "another model's parts are read with this one"
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "by the umask, as all files"


def test_a_draft_vocabulary_goes_with_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are on it, all of it is written by the target, and it is there after loading, saving and widening."""
    windows: list[Tensor] = []
    run_window = Text.run

    def spy(self: Text, window_BS: Tensor, *rest: Any) -> Tensor:
        windows.append(window_BS[:, 1:])
        return run_window(self, window_BS, *rest)

    monkeypatch.setattr(Text, "run", spy)
    export.export(listed_run(tmp_path / "run"), tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "from the 20 most frequent tokens, 91.3% of the training text" in card
    text = {"input_ids": torch.tensor([[256, 100, 101], [256, 7, 9]]), "attention_mask": torch.ones(2, 3)}
    chosen = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}

    def drafted(model: CpdlmForCausalLM) -> set[int]:
        windows.clear()
        assert model.generate(**text, **chosen).tolist() == GenerationMixin.generate(model, **text, **chosen).tolist()
        return {int(token) for window in windows for token in window.flatten()}

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert drafted(loaded) <= set(LISTED)
    loaded.save_pretrained(tmp_path / "again")
    wide = CpdlmForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float64)
    assert drafted(wide) <= set(LISTED) and wide.model._draft_table_VD.dtype == torch.float64
    loaded.model.use_draft_vocabulary(None)
    assert drafted(loaded) - set(LISTED)


def test_the_card_is_code_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", {}, measured=False)
    export.export(tmp_path / "run", tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "Its speed was not measured." in card
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.startswith("def main(")


def test_a_bpe_goes_with_its_model(tmp_path: Path) -> None:
    run = bpe_run(tmp_path)
    export.export(run, tmp_path / "mine")
    ours, theirs = run_tokenizer(run), AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.eos
    for text in ("alpha beta", "naïve €", " kappa  iota\n"):
        ids = ours.encode([text])[0].tolist()
        assert theirs(text)["input_ids"] == [ours.bos, *ids] and theirs.decode(ids) == ours.decode(ids) == text


def test_a_run_needs_neither_cache_nor_corpus_for_its_tokenizer(tmp_path: Path) -> None:
    run = bpe_run(tmp_path)
    ids = run_tokenizer(run).encode(["alpha beta"])[0].tolist()
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "words.txt").unlink()
    export.export(run, tmp_path / "mine")
    assert AutoTokenizer.from_pretrained(tmp_path / "mine")("alpha beta")["input_ids"][1:] == ids
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(RunError, match="has no tokenizer .*run its command again"):
        run_tokenizer(run)


def test_an_exported_folder_does_not_say_where_things_lay(tmp_path: Path) -> None:
    run = bpe_run(tmp_path)
    evaluated = json.loads((run / "evaluate.json").read_text())
    evaluated["command"] = f"python experiments/run.py corpus={tmp_path}/words.txt tracking.uri=x data.cache=~/here"
    evaluated["data"]["sources"] = [{"name": f"{tmp_path}/set"}]
    write_json(run / "evaluate.json", evaluated)
    export.export(run, tmp_path / "mine")
    for path in (tmp_path / "mine").glob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "python experiments/run.py corpus=words.txt data.cache=here\n" in card


def test_a_run_without_its_parts_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(run: Path, folder: Path, *words: str) -> None:
        assert cli.main(["export", str(run), str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and all(word in error for word in words), error

    run = bpe_run(tmp_path)
    fails(tmp_path / "nowhere", tmp_path / "out", "is neither a run's folder", "cpdlm speed-up")
    fails(run, run, "holds something else", "give a new or empty folder")
    fails(run, tmp_path, "holds something else")
    fails(run, tmp_path / "words.txt", "is a file")
    (run / "model.safetensors").unlink()
    fails(run, tmp_path / "out", "no finished model")
    make_run(tmp_path / "small", {}, 17)
    fails(tmp_path / "small", tmp_path / "out", "the tokenizer bytes has 257 tokens, the weights 17")
    make_run(tmp_path / "listed", {"decode.draft_vocabulary": 20})
    fails(tmp_path / "listed", tmp_path / "out", "that its draft_vocabulary.json does not hold")
    assert not (tmp_path / "out").exists()
