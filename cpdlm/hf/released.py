"""Heads that come with the package, for models that are found by name: speed without training anything first.

A file of `cpdlm/released/` holds the heads alone, in bfloat16, the tokens they draft from, the run's settings and the
sha256 of the model they were trained on. The model itself is fetched when it is used, as in training. A model may have
heads for several kinds of text: `smollm2` for code, `smollm2-chat` for answers, `smollm2-prose` for articles.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cpdlm.config import Config, from_dict, to_dict
from cpdlm.data.pretrained_files import NAMED
from cpdlm.data.target import Target
from cpdlm.files import default_cache
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from cpdlm.training.checkpoints import (
    WEIGHTS,
    RunError,
    load_model,
    load_target,
    read_config,
    run_draft_vocabulary,
    write_tensors,
)

FOLDER = Path(__file__).parents[1] / "released"
DRAFT_IDS = "shortlist"  # the tensor's name in the file
DRAFT, NODES = "lookup+branched", 5  # what won: results/benchmarks/tasks_smollm2.json


def release(run: Path, name: str) -> Path:
    """Write the heads of a finished run on model=NAME as NAME or NAME-WORD; returns the file. RunError for others."""
    config = read_config(run)
    target = Target.of(config)
    if target.kind != "pretrained" or not f"{name}-".startswith(f"{target.name}-"):
        raise RunError(f"{run} has model.trunk={target.name or 'none'}, not {name}; give a run of heads on it")
    model, draft_ids = load_model(run), run_draft_vocabulary(run)
    tensors = {key: each.to(torch.bfloat16) for key, each in load_file(run / WEIGHTS).items()}
    if draft_ids is not None:
        tensors[DRAFT_IDS] = draft_ids.to(torch.int32)
    # The folder of the run is not for others. In bfloat16 a model is read fastest; `load` widens it elsewhere.
    elsewhere = replace(config, output=Config().output, model=replace(config.model, dtype="bfloat16"))
    facts = {"config": to_dict(elsewhere), "vocab_size": model.vocab_size, "trunk_sha256": target.sha256}
    write_tensors(_path(name), tensors, {key: json.dumps(value) for key, value in facts.items()})
    return _path(name)


def is_name(source: Path) -> bool:
    """Whether this is what a model is called here, and no folder."""
    name = str(source)
    return (name in NAMED or (source.name == name and _path(name).is_file())) and not source.exists()


def settings(name: str) -> Config:
    """Of the run whose heads are released. RunError where none are, or their file is damaged."""
    return _read(name)[1]


def load(name: str, draft_vocabulary: bool = True, dtype: str = "") -> LanguageModel:
    """The named model with its released heads, in evaluation mode.

    draft_vocabulary: whether it drafts from its own. dtype: of the model (default: bfloat16). Raises
    RunError where no heads are released for it, their file is damaged, or they were trained on other weights;
    ConfigError where the model cannot be had.
    """
    facts, config, tensors = _read(name)
    config.model.dtype = dtype or config.model.dtype
    target = Target.of(config)
    if target.sha256 != facts["trunk_sha256"]:
        raise RunError(f"{_path(name)}: the heads were trained on other weights of {name} than those that are here")
    ids = tensors.pop(DRAFT_IDS, None)
    model = build_language_model(config, facts["vocab_size"], load_target(config, probed=True))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    lacking = [each for each in missing if each.startswith(("heads.", "anchor."))]
    if lacking or unexpected:
        raise RunError(f"{_path(name)} does not fit its settings: missing {lacking[:3]}, unexpected {unexpected[:3]}")
    if draft_vocabulary and ids is not None:
        model.use_draft_vocabulary(ids.long())
    return model.eval()


def _path(name: str) -> Path:
    return FOLDER / f"{name}.safetensors"


def _read(name: str) -> tuple[dict[str, Any], Config, dict[str, Tensor]]:
    """What a file of heads says of itself, its run's settings and its tensors."""
    path = _path(name)
    if not path.is_file():
        raise RunError(f"no heads for {name} come with this package; train some: cpdlm speed-up {name} --output DIR")
    try:
        with safe_open(path, framework="pt") as file:
            facts = {key: json.loads(value) for key, value in file.metadata().items()}
        config = from_dict(facts["config"])
        config.data.cache = str(default_cache())  # that of the training is not here
        config.decode.draft, config.decode.nodes = DRAFT, NODES
        return facts, config, load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}); install the package again") from error
