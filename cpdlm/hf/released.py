"""Heads that come with the package, for models that are found by name: speed without training anything first.

    python -m cpdlm.hf.released RUN NAME        a finished run of heads on model=NAME -> cpdlm/released/NAME.safetensors

The file holds the heads alone, the tokens they draft from, the run's settings and the sha256 of the model they were trained on;
the model itself is fetched when it is used, as in training.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpdlm.config import Config, ConfigError, from_dict, to_dict
from cpdlm.data.pretrained_files import NAMED
from cpdlm.data.tokenizer import HubTokenizer, Tokenizer
from cpdlm.files import WriteError, replaced
from cpdlm.model.language_model import LanguageModel, build_language_model
from cpdlm.training.checkpoints import (
    WEIGHTS,
    RunError,
    load_model,
    load_trunk,
    read_config,
    run_draft_vocabulary,
    trunk_hash,
    trunk_source,
)

FOLDER = Path(__file__).parents[1] / "released"
SHORTLIST = "shortlist"


def release(run: Path, name: str) -> Path:
    """Write the heads of a finished run on model=name; returns the file. RunError for a run that is not finished or not on it."""
    config = read_config(run)
    if not config.is_pretrained or config.model.trunk != name:
        raise RunError(f"{run} has model.trunk={config.model.trunk or 'none'}, not {name}; give a run of heads on it")
    model, shortlist = load_model(run), run_draft_vocabulary(run)
    tensors = load_file(run / WEIGHTS)
    if shortlist is not None:
        tensors[SHORTLIST] = shortlist.to(torch.int32)
    elsewhere = replace(config, output=Config().output)  # where it was trained is nobody's business
    facts = {"config": to_dict(elsewhere), "vocab_size": model.vocab_size, "trunk_sha256": trunk_hash(config)}
    with replaced(FOLDER / f"{name}.safetensors") as path:
        save_file(tensors, path, {key: json.dumps(value) for key, value in facts.items()})
    return FOLDER / f"{name}.safetensors"


def is_name(source: Path) -> bool:
    """Whether this is what a model is called here, and no folder."""
    return str(source) in NAMED and not source.exists()


def settings(name: str) -> Config:
    """Of the run whose heads are released. RunError where none are, or their file is damaged."""
    return _read(name)[1]


def load(name: str, shortlist: bool = True, dtype: str = "") -> tuple[LanguageModel, Tokenizer]:
    """The named model with its released heads, and its tokenizer. shortlist: whether it drafts from the one it has. dtype: the
    precision of the model (default: the one that its heads were trained on).

    RunError where no heads are released for it, their file is damaged, or they were trained on other weights; ConfigError
    where the model cannot be had.
    """
    path = FOLDER / f"{name}.safetensors"
    facts, config, tensors = _read(name)
    config.model.dtype = dtype or config.model.dtype
    if trunk_hash(config) != facts["trunk_sha256"]:
        raise RunError(f"{path}: the heads were trained on other weights of {name} than those that are here")
    ids = tensors.pop(SHORTLIST, None)
    model = build_language_model(config, facts["vocab_size"], load_trunk(config))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    lacking = [each for each in missing if each.startswith(("heads.", "anchor."))]
    if lacking or unexpected:
        raise RunError(f"{path} does not fit its settings: missing {lacking[:3]}, unexpected {unexpected[:3]}")
    if shortlist and ids is not None:
        model.use_draft_vocabulary(ids.long())
    return model.eval(), HubTokenizer("model", trunk_source(config))


def _read(name: str) -> tuple[dict[str, Any], Config, dict[str, Tensor]]:
    """What a file of heads says of itself, its run's settings and its tensors."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise RunError(
            f"no heads for {name} come with this package; train some: python experiments/run.py preset=retrofit model={name} rank=4 "
            "anchor=token, then give the run's folder"
        )
    try:
        with safe_open(path, framework="pt") as file:
            facts = {key: json.loads(value) for key, value in file.metadata().items()}
        tensors = load_file(path)
        config = from_dict(facts["config"])
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}); install the package again") from error
    return facts, config, tensors


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cpdlm.hf.released", description="Put a run's heads into the package."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished and measured run")
    parser.add_argument("name", metavar="NAME", choices=sorted(NAMED), help="the model: " + ", ".join(NAMED))
    options = parser.parse_args(arguments)
    try:
        path = release(options.run, options.name)
    except (ConfigError, RunError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
