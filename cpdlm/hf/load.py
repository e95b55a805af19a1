"""A model with its tokenizer, from a run's folder, an exported folder, or the name of a model with released heads."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from cpdlm.config import Config, ConfigError
from cpdlm.data.corpus import load_corpus
from cpdlm.data.pretrained_files import NAMED, generation_of
from cpdlm.data.target import Target
from cpdlm.data.tokenizer import BytesTokenizer, HubTokenizer, SavedTokenizer, Tokenizer, stored_tokenizer
from cpdlm.hf import released
from cpdlm.hf.model import CpdlmConfig, CpdlmForCausalLM
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.pretrained import longest_text, multiplies_bfloat16
from cpdlm.training.checkpoints import (
    CONFIG,
    TOKENIZER,
    RunError,
    check_has_weights,
    load_model,
    read_config,
    run_draft_vocabulary,
    text_hash,
)


@dataclass(frozen=True)
class Loaded:
    """eos: the ids that end a text. config: the settings of the training; None for an exported folder. drafting: draft
    and nodes that are best for this model, as far as is known."""

    model: LanguageModel
    tokenizer: Tokenizer
    eos: int | list[int]
    config: Config | None = None
    drafting: tuple[str, int] = ("chain", 8)


@dataclass(frozen=True)
class Opened:
    """What the small files of a model say; `load` reads the weights. context: the most tokens of a text."""

    source: Path
    tokenizer: Tokenizer
    eos: int | list[int]
    context: int
    config: Config | None
    weights: Callable[[], LanguageModel]
    drafting: tuple[str, int] = ("chain", 8)

    def load(self) -> Loaded:
        """Raises as `open_source`."""
        loaded = Loaded(self.weights(), self.tokenizer, self.eos, self.config, self.drafting)
        _check_vocabulary(self.source, loaded)
        return loaded


def load(source: Path, draft_vocabulary: bool = True, widen: bool = False) -> Loaded:
    """`open_source`, and its weights."""
    return open_source(source, draft_vocabulary, widen).load()


def open_source(source: Path, draft_vocabulary: bool = True, widen: bool = False) -> Opened:
    """source: a run's folder, an exported folder, or the name of a model with released heads.

    draft_vocabulary: whether the model drafts from its own, where it has one. widen: load a named model in float32
    where this processor only emulates bfloat16. Raises RunError or ConfigError where something is missing or does not
    fit.
    """
    if released.is_name(source):
        dtype = "float32" if widen and not multiplies_bfloat16() else ""
        config = released.settings(str(source))
        tokenizer = HubTokenizer("model", Target.of(config).source)
        return _of_run(source, config, tokenizer, lambda: released.load(str(source), draft_vocabulary, dtype))
    if (source / CONFIG).is_file():
        config = read_config(source)
        check_has_weights(source)
        return _of_run(source, config, run_tokenizer(source), lambda: _finished(source, draft_vocabulary))
    if (source / "config.json").is_file():
        return _exported(source, draft_vocabulary)
    if (source / "adapter_config.json").is_file():
        raise RunError(
            f"{source} is an adapter of another model, not a model; give that model, or put the adapter on it in "
            "Python: peft.PeftModel.from_pretrained(MODEL, ADAPTER)"
        )
    if source.suffix == ".gguf" and source.is_file():
        raise RunError(f"{source} is a model without heads; make a folder that has them: cpdlm speed-up {source}")
    absent = "" if source.exists() else "there is no such folder; for heads on a model of that name: cpdlm speed-up "
    raise RunError(
        f"{source} is neither a run's folder (no {CONFIG}) nor an exported model (no config.json) nor one of "
        f"{', '.join(NAMED)}{f'; {absent}{source}' if absent else ''}"
    )


def _of_run(source: Path, config: Config, tokenizer: Tokenizer, weights: Callable[[], LanguageModel]) -> Opened:
    """eos: where `generate` stops on the pretrained trunk that a run accelerates, else the tokenizer's."""
    target, context = Target.of(config), config.data.context
    if target.kind == "pretrained":
        context = longest_text(target.source, target.name) or context
    eos, drafting = target.eos, (config.decode.draft, config.decode.nodes)
    return Opened(source, tokenizer, tokenizer.eos if eos is None else eos, context, config, weights, drafting)


def _finished(run: Path, draft_vocabulary: bool) -> LanguageModel:
    model = load_model(run)
    if draft_vocabulary:
        model.use_draft_vocabulary(run_draft_vocabulary(run))
    return model


def _exported(folder: Path, draft_vocabulary: bool) -> Opened:
    try:
        shape, _ = CpdlmConfig.get_config_dict(folder)
        eos = generation_of(str(folder)).eos_token_id
    except OSError as error:
        raise RunError(f"{folder / 'config.json'} is damaged ({_first_line(error)}); export it again") from error
    if not (folder / "tokenizer_config.json").is_file():
        raise RunError(f"{folder} has no tokenizer (tokenizer_config.json); export it again with cpdlm export")

    def weights() -> LanguageModel:
        try:
            wrapped = CpdlmForCausalLM.from_pretrained(folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise RunError(f"{folder} cannot be loaded ({reason}); export it again") from error
        if not draft_vocabulary:
            wrapped.model.use_draft_vocabulary(None)
        model: LanguageModel = wrapped.model
        return model

    tokenizer = HubTokenizer(f"hf:{folder}", folder)
    context = shape.get("max_position_embeddings", CpdlmConfig.max_position_embeddings)
    drafting = (shape.get("draft", CpdlmConfig.draft), shape.get("nodes", CpdlmConfig.nodes))
    return Opened(folder, tokenizer, tokenizer.eos if eos is None else eos, context, None, weights, drafting)


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
            return load_corpus(config).tokenizer
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
