"""From a run to a folder that stands alone: weights, tokenizer, draft vocabulary, card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    TextStreamer,
)

from cpdlm import cli
from cpdlm.config import Config, resolve
from cpdlm.data.corpus import load_corpus
from cpdlm.decoding.cache import Text
from cpdlm.files import write_json
from cpdlm.hf import CpdlmForCausalLM, export
from cpdlm.hf.load import run_tokenizer
from cpdlm.model.language_model import LanguageModel, build_language_model
from cpdlm.training import checkpoints
from cpdlm.training.checkpoints import RunError
from tests.test_hf_model import same_weights


def make_run(folder: Path, overrides: dict[str, Any], vocabulary: int = 257, measured: bool = True) -> LanguageModel:
    """A run's folder with random weights, as training would have left it."""
    base = {"size": "micro", "rank": 2, "data.context": 64, "decode.prompt_tokens": 8, "decode.new_tokens": 8}
    config = resolve(base | {"output": str(folder.parent), "name": folder.name} | overrides)
    trunk = checkpoints.load_model(Path(config.model.trunk)) if config.model.trunk else None
    torch.manual_seed(1)
    model = build_language_model(config, vocabulary, trunk).eval()
    folder.mkdir(parents=True)
    checkpoints.open_run(folder, config)
    checkpoints.save_model(folder, model, dict(model.state_dict()), vocabulary)
    if measured:
        write_measurements(folder, config)
    return model


def write_measurements(folder: Path, config: Config, sha256: str = "0") -> None:
    data = {
        "corpus": config.corpus,
        "sha256": sha256,
        "splits": {"train": {"tokens": 12345}},
        "sources": [{"name": "sympy", "version": "1.14.0", "licence": "BSD-3-Clause"}],
    }
    likelihood = {"bits_per_byte": 2.345}
    write_json(
        folder / "evaluate.json",
        {"command": "python experiments/run.py rank=2", "data": data, "likelihood": likelihood},
    )
    mode = {
        "tokens_per_pass": {"mean": 1.77},
        "speedup": {"median": 1.23, "low": 1.1, "high": 1.31},
        "prompts": 4,
        "new_tokens": 8,
    }
    hardware = {"processor": "A Processor", "cores": 2, "accelerator": "none"}
    write_json(folder / "decode.json", {"modes": {"greedy": mode}, "origin": {"hardware": hardware}})


def test_a_run_becomes_a_folder_that_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trunk, run, folder = tmp_path / "trunk", tmp_path / "heads", tmp_path / "exported"
    make_run(trunk, {"rank": 1, "horizon": 1, "balance": "none"})
    model = make_run(run, {"model.trunk": str(trunk)})
    assert cli.main(["export", str(run), str(folder)]) == 0
    said = capsys.readouterr().out.split()
    assert (
        {Path(line).name for line in said}
        == {path.name for path in folder.iterdir()}
        >= {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "README.md",
        }
    )
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
    for word in (
        "rank, horizon, anchor | 2, 4, none",
        "1.77",
        "1.23 [1.10, 1.31]",
        "sympy 1.14.0 (BSD-3-Clause)",
        "12,345",
        "2.345 bits",
        "python experiments/run.py rank=2",
        "A Processor",
        "frozen trunk's own next-token distribution",
    ):
        assert word in card, word
    assert cli.main(["export", str(run), str(folder)]) == 2, "the trunk is gone"
    assert "trunk" in capsys.readouterr().err


LISTED = [5, *range(40, 58), 256]


def listed_run(folder: Path) -> Path:
    make_run(folder, {"decode.draft_vocabulary": len(LISTED), "model.tie_embeddings": False})
    measured = json.loads((folder / "decode.json").read_text())
    write_json(folder / "decode.json", measured | {"shortlist": LISTED, "shortlist_coverage": 0.913})
    return folder


def test_a_draft_vocabulary_goes_with_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are on it, all of it is written by the target, and it is there after loading, saving and widening."""
    windows: list[Tensor] = []
    run_window = Text.run

    def spy(self: Text, window_BS: Tensor, *rest: Any) -> Tensor:
        windows.append(window_BS[:, 1:])
        return run_window(self, window_BS, *rest)

    monkeypatch.setattr(Text, "run", spy)
    export.export(listed_run(tmp_path / "run"), tmp_path / "mine")
    assert (
        "from the 20 most frequent tokens, 91.3% of the training text" in (tmp_path / "mine" / "README.md").read_text()
    )
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
    loaded.use_draft_vocabulary(None)
    assert drafted(loaded) - set(LISTED)
    loaded.save_pretrained(tmp_path / "without")
    assert drafted(CpdlmForCausalLM.from_pretrained(tmp_path / "without")) - set(LISTED)


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


def test_streamed_text_is_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", {}, measured=False)
    model = export.export(tmp_path / "run", tmp_path / "mine")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mine")
    text = tokenizer("x = ", return_tensors="pt")
    capsys.readouterr()
    done = model.generate(**text, max_new_tokens=30, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tokenizer.decode(done[0, text["input_ids"].shape[1] :]) + "\n"
    said = tokenizer.decode(done[0, text["input_ids"].shape[1] :])
    stopped = model.generate(**text, max_new_tokens=30, stop_strings=said[3:5], tokenizer=tokenizer)
    assert text["input_ids"].shape[1] < stopped.shape[1] <= text["input_ids"].shape[1] + len(said[:5].encode()) + 2


def write_corpus(path: Path) -> None:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(words), (40_000,), generator=generator).tolist()
    lines = [" ".join(words[each] for each in picks[start : start + 40]) for start in range(0, len(picks), 40)]
    path.write_text("\n\n".join(lines))


def bpe_run(tmp_path: Path, tokenizer: str = "bpe:290") -> Path:
    write_corpus(tmp_path / "words.txt")
    overrides = {
        "corpus": str(tmp_path / "words.txt"),
        "data.tokenizer": tokenizer,
        "data.cache": str(tmp_path / "cache"),
    }
    config = resolve(overrides | {"data.context": 64, "decode.prompt_tokens": 8, "decode.new_tokens": 8})
    corpus = load_corpus(config, progress=False)
    make_run(tmp_path / "run", overrides, corpus.vocab_size, measured=False)
    write_measurements(tmp_path / "run", config, corpus.describe()["sha256"])
    return tmp_path / "run"


def test_a_bpe_goes_with_its_model(tmp_path: Path) -> None:
    run = bpe_run(tmp_path)
    export.export(run, tmp_path / "mine")
    ours, theirs = run_tokenizer(run), AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.eos
    for text in ("alpha beta", "naïve €", " kappa  iota\n"):
        ids = ours.encode([text])[0].tolist()
        assert theirs(text)["input_ids"] == [ours.bos, *ids] and theirs.decode(ids) == ours.decode(ids) == text


def test_a_run_needs_no_cache_for_its_tokenizer(tmp_path: Path) -> None:
    """Not with it in its own folder; an older run makes it again from its corpus, unless that is another now."""
    run = bpe_run(tmp_path)
    ids = run_tokenizer(run).encode(["alpha beta"])[0].tolist()
    shutil.rmtree(tmp_path / "cache")
    assert run_tokenizer(run).encode(["alpha beta"])[0].tolist() == ids
    checkpoints.save_tokenizer(run, run_tokenizer(run))
    shutil.rmtree(tmp_path / "cache")
    words = tmp_path / "words.txt"
    words.write_text(words.read_text().replace("a", "o"))
    assert run_tokenizer(run).encode(["alpha beta"])[0].tolist() == ids
    export.export(run, tmp_path / "mine")
    assert AutoTokenizer.from_pretrained(tmp_path / "mine")("alpha beta")["input_ids"][1:] == ids
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(RunError, match=r"words.txt is another text now; give the text that it was trained on"):
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


def test_a_hugging_face_tokenizer_goes_with_its_model(tmp_path: Path) -> None:
    make_run(tmp_path / "bytes", {})
    export.export(tmp_path / "bytes", tmp_path / "source")
    (tmp_path / "other").mkdir()
    run = bpe_run(tmp_path / "other", f"hf:{tmp_path / 'source'}")
    export.export(run, tmp_path / "mine")
    assert AutoTokenizer.from_pretrained(tmp_path / "mine")("a €")["input_ids"] == [256, *"a €".encode()]


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
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    (tmp_path / "words.txt").rename(tmp_path / "moved.txt")
    fails(run, tmp_path / "out", "the tokenizer of", "bpe:290", "cannot be made again: corpus=", "words.txt")
    (run / "evaluate.json").unlink()
    fails(run, tmp_path / "out", "does not say which text it was trained on")
    (run / "model.safetensors").unlink()
    fails(run, tmp_path / "out", "no finished model")
    make_run(tmp_path / "small", {}, 17)
    fails(tmp_path / "small", tmp_path / "out", "the tokenizer bytes has 257 tokens, the weights 17")
    make_run(tmp_path / "listed", {"decode.draft_vocabulary": 20})
    fails(tmp_path / "listed", tmp_path / "out", "neither its draft_vocabulary.json nor its decode.json holds")
    assert not (tmp_path / "out").exists()
