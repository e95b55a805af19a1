"""A model with its tokenizer, from a run's folder, an exported folder, or the name of a model with released heads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from cpdlm.config import Config, ConfigError
from cpdlm.data.corpus import load_corpus
from cpdlm.data.pretrained_files import NAMED
from cpdlm.data.target import Target
from cpdlm.data.tokenizer import BytesTokenizer, HubTokenizer, SavedTokenizer, Tokenizer, stored_tokenizer
from cpdlm.hf import released
from cpdlm.hf.model import CpdlmConfig, CpdlmForCausalLM
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.pretrained import multiplies_bfloat16
from cpdlm.training.checkpoints import (
    CONFIG,
    TOKENIZER,
    RunError,
    load_model,
    read_config,
    run_draft_vocabulary,
    text_hash,
)


@dataclass(frozen=True)
class Loaded:
    """eos: the ids that end a text. config: the settings of the training; None for an exported folder."""

    model: LanguageModel
    tokenizer: Tokenizer
    eos: int | list[int]
    config: Config | None = None


def load(source: Path, draft_vocabulary: bool = True, widen: bool = False) -> Loaded:
    """source: a run's folder, an exported folder, or the name of a model with released heads.

    draft_vocabulary: whether the model drafts from its own, where it has one. widen: load a named model in float32
    where this processor only emulates bfloat16. Raises RunError or ConfigError where something is missing or does not
    fit.
    """
    tokenizer: Tokenizer
    if released.is_name(source):
        config = released.settings(str(source))
        dtype = "float32" if widen and not multiplies_bfloat16() else ""
        model, tokenizer = released.load(str(source), draft_vocabulary, dtype)
        loaded = Loaded(model, tokenizer, _ends(config, tokenizer), config)
    elif (source / CONFIG).is_file():
        config = read_config(source)
        model, tokenizer = load_model(source), run_tokenizer(source)
        if draft_vocabulary:
            model.use_draft_vocabulary(run_draft_vocabulary(source))
        loaded = Loaded(model, tokenizer, _ends(config, tokenizer), config)
    elif (source / "config.json").is_file():
        loaded = _exported(source, draft_vocabulary)
    elif source.suffix == ".gguf" and source.is_file():
        raise RunError(f"{source} is a model without heads; make a folder that has them: cpdlm speed-up {source}")
    else:
        absent = (
            "" if source.exists() else "there is no such folder; for heads on a model of that name: cpdlm speed-up "
        )
        raise RunError(
            f"{source} is neither a run's folder (no {CONFIG}) nor an exported model (no config.json) nor one of "
            f"{', '.join(NAMED)}{f'; {absent}{source}' if absent else ''}"
        )
    _check_vocabulary(source, loaded)
    return loaded


def _exported(folder: Path, draft_vocabulary: bool) -> Loaded:
    try:
        CpdlmConfig.get_config_dict(folder)
    except OSError as error:
        raise RunError(f"{folder / 'config.json'} is damaged ({_first_line(error)}); export it again") from error
    if not (folder / "tokenizer_config.json").is_file():
        raise RunError(f"{folder} has no tokenizer (tokenizer_config.json); export it again with cpdlm export")
    try:
        wrapped = CpdlmForCausalLM.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise RunError(f"{folder} cannot be loaded ({reason}); export it again") from error
    if not draft_vocabulary:
        wrapped.model.use_draft_vocabulary(None)
    tokenizer, eos = HubTokenizer(f"hf:{folder}", folder), wrapped.generation_config.eos_token_id
    return Loaded(wrapped.model, tokenizer, tokenizer.eos if eos is None else eos)


def _ends(config: Config, tokenizer: Tokenizer) -> int | list[int]:
    """Where `generate` stops on the pretrained trunk that a run accelerates, else the tokenizer's eos."""
    eos = Target.of(config).eos
    return tokenizer.eos if eos is None else eos


def run_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer of a run: in its folder, or for older runs in the cache, or made again from the corpus.

    RunError where it is damaged, or gone and not to be made again.
    """
    config = read_config(run)
    if config.data.tokenizer == BytesTokenizer.name:
        return BytesTokenizer()
    try:
        if (stored := stored_tokenizer(run / TOKENIZER)) is not None:
            return stored
    except ConfigError as error:
        raise RunError(f"{error}; delete that folder, and the tokenizer is made again") from error
    if config.data.bundle:
        try:
            return load_corpus(config, progress=False).tokenizer
        except ConfigError as error:
            raise RunError(f"{run} has no tokenizer here: {error}") from error
    if config.data.tokenizer == "model":
        return HubTokenizer("model", Target.of(config).source)
    if not (sha256 := text_hash(run)):
        raise RunError(f"{run} does not say which text it was trained on, so its tokenizer is not known; run it again")
    tokens = Path(config.data.cache) / "tokens"
    for path in sorted(tokens.glob("*/meta.json")):
        meta = read_json(path)
        if meta is not None and meta.get("sha256") == sha256:
            saved = meta["tokenizer"]
            token_bytes = np.load(path.parent / "token_bytes.npy")
            return SavedTokenizer(
                saved["name"], saved["vocab_size"], saved["bos"], saved["eos"], path.parent, token_bytes
            )
    lost = f"the tokenizer of {run} ({config.data.tokenizer}) is neither in its folder nor in {tokens}"
    try:
        again = load_corpus(config)
    except ConfigError as error:
        raise RunError(f"{lost}, and cannot be made again: {error}") from error
    if again.describe()["sha256"] != sha256:
        raise RunError(f"{lost}, and corpus={config.corpus} is another text now; give the text that it was trained on")
    return again.tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def noted(run: Path) -> dict[str, Any]:
    """What a run says of itself: its command and its data, and how good it is if it was evaluated; {} for none."""
    return read_json(run / "evaluate.json") or read_json(run / "decode.json") or {}


def is_pretrained_tokenizer(tokenizer: Tokenizer) -> bool:
    return tokenizer.name.partition(":")[0] in ("hf", "model")


def _check_vocabulary(source: Path, loaded: Loaded) -> None:
    """Raise RunError where ids of the tokenizer are not ids of the model."""
    model, tokenizer = loaded.model, loaded.tokenizer
    # Pretrained models may have more embeddings than tokens: padding of the table.
    padded = model.frozen_target and is_pretrained_tokenizer(tokenizer)
    if tokenizer.vocab_size > model.vocab_size or (tokenizer.vocab_size < model.vocab_size and not padded):
        raise RunError(
            f"{source}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the weights "
            f"{model.vocab_size}; they do not belong together"
        )


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file. RunError for a damaged one."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error})") from error
    return content if isinstance(content, dict) else None
