"""Folders of runs as training leaves them, without the training: random weights, made-up measurements."""

import json
from pathlib import Path
from typing import Any

import torch

from cpdlm.config import Config, resolve
from cpdlm.data.corpus import load_corpus
from cpdlm.files import write_json
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from cpdlm.training import checkpoints
from tests.tiny import MICRO


def make_run(folder: Path, overrides: dict[str, Any], vocabulary: int = 257, measured: bool = True) -> LanguageModel:
    """A run's folder with random weights, as training would have left it."""
    config = resolve(MICRO | {"rank": 2, "output": str(folder.parent), "name": folder.name} | overrides)
    trunk = checkpoints.load_model(Path(config.model.trunk)) if config.model.trunk else None
    torch.manual_seed(1)
    model = build_language_model(config, vocabulary, trunk).eval()
    folder.mkdir(parents=True)
    checkpoints.open_run(folder, config)
    checkpoints.save_model(folder, model, dict(model.state_dict()), vocabulary)
    if measured:
        write_measurements(folder, config)
    return model


def write_measurements(folder: Path, config: Config) -> None:
    sources = [{"name": "sympy", "version": "1.14.0", "licence": "BSD-3-Clause"}]
    data = {"corpus": config.corpus, "sha256": "0", "splits": {"train": {"tokens": 12345}}, "sources": sources}
    evaluated = {"command": "python experiments/run.py rank=2", "data": data, "likelihood": {"bits_per_byte": 2.345}}
    write_json(folder / "evaluate.json", evaluated)
    speed = {"median": 1.23, "low": 1.1, "high": 1.31}
    mode = {"tokens_per_pass": {"mean": 1.77}, "speedup": speed, "prompts": 4, "new_tokens": 8}
    hardware = {"processor": "A Processor", "cores": 2, "accelerator": "none"}
    write_json(folder / "decode.json", {"modes": {"greedy": mode}, "origin": {"hardware": hardware}})


LISTED = [5, *range(40, 58), 256]


def listed_run(folder: Path) -> Path:
    make_run(folder, {"decode.draft_vocabulary": len(LISTED), "model.tie_embeddings": False})
    checkpoints.save_draft_vocabulary(folder, checkpoints.read_config(folder), torch.tensor(LISTED))
    measured = json.loads((folder / "decode.json").read_text())
    write_json(folder / "decode.json", measured | {"shortlist_coverage": 0.913})
    return folder


def write_corpus(path: Path) -> None:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(words), (40_000,), generator=generator).tolist()
    lines = [" ".join(words[each] for each in picks[start : start + 40]) for start in range(0, len(picks), 40)]
    path.write_text("\n\n".join(lines))


def bpe_run(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "words.txt")
    overrides = {"corpus": str(tmp_path / "words.txt"), "data.tokenizer": "bpe:290"}
    overrides |= {"data.cache": str(tmp_path / "cache")}
    config = resolve(MICRO | overrides)
    corpus = load_corpus(config)
    make_run(tmp_path / "run", overrides, corpus.vocab_size, measured=False)
    checkpoints.save_tokenizer(tmp_path / "run", corpus.tokenizer)
    write_measurements(tmp_path / "run", config)
    return tmp_path / "run"
