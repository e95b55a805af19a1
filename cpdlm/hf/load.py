"""A model with its tokenizer, from a run's folder, an exported folder, or the name of a model with released heads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from cpdlm.config import Config, ConfigError
from cpdlm.config.words import first_line
from cpdlm.data.pretrained_files import NAMED, generation_of
from cpdlm.data.target import Target
from cpdlm.data.tokenizer import BytesTokenizer, HubTokenizer, Tokenizer, stored_tokenizer
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
    """What the small files of a model say. context: the most tokens of a text. load: reads the weights, and raises as
    `open_source`."""

    tokenizer: Tokenizer
    context: int
    load: Callable[[], Loaded]


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
    eos = tokenizer.eos if eos is None else eos
    return Opened(tokenizer, context, lambda: _checked(source, Loaded(weights(), tokenizer, eos, config, drafting)))


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
        raise RunError(f"{folder / 'config.json'} is damaged ({first_line(error)}); export it again") from error
    if not (folder / "tokenizer_config.json").is_file():
        raise RunError(f"{folder} has no tokenizer (tokenizer_config.json); export it again with cpdlm export")

    def weights() -> LanguageModel:
        try:
            wrapped = CpdlmForCausalLM.from_pretrained(folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise RunError(f"{folder} cannot be loaded ({reason}); export it again") from error
        if not draft_vocabulary:
            wrapped.model.use_draft_vocabulary(None)
        model: LanguageModel = wrapped.model
        return model

    tokenizer = HubTokenizer(f"hf:{folder}", folder)
    context = shape.get("max_position_embeddings", CpdlmConfig.max_position_embeddings)
    drafting = (shape.get("draft", CpdlmConfig.draft), shape.get("nodes", CpdlmConfig.nodes))
    eos = tokenizer.eos if eos is None else eos
    return Opened(tokenizer, context, lambda: _checked(folder, Loaded(weights(), tokenizer, eos, None, drafting)))


def run_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer in a run's folder; RunError where it is damaged or not there."""
    if read_config(run).data.tokenizer == BytesTokenizer.name:
        return BytesTokenizer()
    again = "run its command again, which writes it"
    try:
        stored = stored_tokenizer(run / TOKENIZER)
    except ConfigError as error:
        raise RunError(f"{error}; delete that folder, and {again}") from error
    if stored is None:
        raise RunError(f"{run} has no tokenizer (no folder {TOKENIZER}); {again}")
    return stored


def is_pretrained_tokenizer(tokenizer: Tokenizer) -> bool:
    return tokenizer.name.partition(":")[0] in ("hf", "model")


def _checked(source: Path, loaded: Loaded) -> Loaded:
    """The same; RunError where ids of the tokenizer are not ids of the model."""
    model, tokenizer = loaded.model, loaded.tokenizer
    # Pretrained models may have more embeddings than tokens: padding of the table.
    padded = model.frozen_target and is_pretrained_tokenizer(tokenizer)
    if tokenizer.vocab_size > model.vocab_size or (tokenizer.vocab_size < model.vocab_size and not padded):
        raise RunError(
            f"{source}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the weights "
            f"{model.vocab_size}; they do not belong together"
        )
    return loaded
