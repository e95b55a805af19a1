"""From a finished run, or a model with released heads, to a folder that `from_pretrained` reads."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from transformers.utils.logging import disable_progress_bar

from cpdlm.config import Config, ConfigError
from cpdlm.data.corpus import load_corpus
from cpdlm.data.tokenizer import END, BytesTokenizer, HubTokenizer, SavedTokenizer, Tokenizer
from cpdlm.files import WriteError, write_bytes
from cpdlm.hf import released
from cpdlm.hf.card import card, read_json
from cpdlm.hf.model import CpdlmConfig, CpdlmForCausalLM
from cpdlm.model.language_model import LanguageModel
from cpdlm.training.checkpoints import (
    CONFIG,
    RunError,
    load_model,
    read_config,
    run_draft_vocabulary,
    trunk_eos,
)


def export(run: Path, folder: Path) -> CpdlmForCausalLM:
    """Write a finished run as a folder that `from_pretrained` reads and `push_to_hub` uploads as it is; returns the model.

    run: its folder, or the name of a model with released heads. What is written: config.json, generation_config.json,
    model.safetensors, the tokenizer's files and README.md, the model card. A run that drafts from a shortlist takes it along.
    Raises RunError for a run that is not finished, whose tokenizer is gone or whose shortlist is not known, and for a folder
    that holds something else; ConfigError for a named model that cannot be had.
    """
    _check_folder(folder)
    tokenizer: Tokenizer
    if released.is_name(run):
        config = released.settings(str(run))
        model, tokenizer = released.load(str(run))
    else:
        config = read_config(run)
        if config.model.adapter_layers:
            raise RunError(
                f"{run} drafts with adapters in the trunk (model.adapter_layers), which an exported folder cannot hold"
            )
        model, tokenizer = load_model(run), run_tokenizer(run)
        model.use_draft_vocabulary(run_draft_vocabulary(run))
    check_vocabulary(run, model, tokenizer)
    wrapped = CpdlmForCausalLM.from_language_model(model, tokenizer.bos, end_tokens(config, tokenizer))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wrapped.save_pretrained(folder)
    except OSError as error:
        raise WriteError(f"cannot write {folder}: {error.strerror or error}; give another folder") from error
    _save_tokenizer(tokenizer, folder, model.context)
    write_bytes(folder / "README.md", card(run, config, model, folder.name).encode())
    return wrapped


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise RunError(f"{folder} is a file; give a new or empty folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    theirs = read_json(folder / "config.json")
    if (folder / CONFIG).exists() or theirs is None or theirs.get("model_type") != CpdlmConfig.model_type:
        raise RunError(f"{folder} holds something else than an exported model; give a new or empty folder")


def run_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer of a run; raises RunError where the token cache that holds it is gone."""
    config = read_config(run)
    if config.data.tokenizer == BytesTokenizer.name:
        return BytesTokenizer()
    if config.data.bundle:
        try:
            return load_corpus(config, progress=False).tokenizer
        except ConfigError as error:
            raise RunError(f"{run} has no tokenizer here: {error}") from error
    evaluated = read_json(run / "evaluate.json")
    if evaluated is None:
        raise RunError(f"{run} was not evaluated, so its tokenizer is not known; run its command again to finish it")
    tokens = Path(config.data.cache) / "tokens"
    for path in sorted(tokens.glob("*/meta.json")):
        meta = read_json(path)
        if meta is not None and meta.get("sha256") == evaluated["data"]["sha256"]:
            saved = meta["tokenizer"]
            token_bytes = np.load(path.parent / "token_bytes.npy")
            return SavedTokenizer(
                saved["name"], saved["vocab_size"], saved["bos"], saved["eos"], path.parent, token_bytes
            )
    raise RunError(
        f"the tokenizer of {run} ({config.data.tokenizer}) lay in {tokens}, where no folder has the tokens of this run any "
        "more; run its command again, which makes them anew"
    )


def end_tokens(config: Config, tokenizer: Tokenizer) -> int | list[int]:
    """Ids that end a text: where `generate` stops on the pretrained trunk that a run accelerates, else the tokenizer's eos."""
    eos = trunk_eos(config)
    return tokenizer.eos if eos is None else eos


def check_vocabulary(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raise RunError where ids of the one are not ids of the other."""
    # Pretrained models have more embeddings than tokens: padding of the table.
    padded = model.frozen_target and _kind(tokenizer) in ("hf", "model")
    if tokenizer.vocab_size > model.vocab_size or (tokenizer.vocab_size < model.vocab_size and not padded):
        raise RunError(
            f"{folder}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the weights {model.vocab_size}; "
            "they do not belong together"
        )


def _kind(tokenizer: Tokenizer) -> str:
    return tokenizer.name.partition(":")[0]


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """The files that AutoTokenizer reads. Bytes and our BPE are written as the byte-level BPEs that they are (bytes: one
    without merges), with <|endoftext|> before every text, as the model has seen documents."""
    kind = _kind(tokenizer)
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(Path(place))
        if kind in ("hf", "model"):
            shutil.copytree(Path(place) / HubTokenizer.FOLDER, folder, dirs_exist_ok=True)
            return
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        if kind == "bpe":
            model = Model.from_file(str(Path(place) / "bpe.json"))
        else:
            model = Model(models.BPE(vocab={mark: byte for byte, mark in bytes_to_unicode().items()}, merges=[]))
            model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            model.decoder = decoders.ByteLevel()
        model.add_special_tokens([END])
        if model.token_to_id(END) != tokenizer.eos:
            raise RunError(f"the tokenizer {tokenizer.name} has {END} as an ordinary token and cannot be exported")
        model.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokenizer.eos)])
        PreTrainedTokenizerFast(
            tokenizer_object=model,
            bos_token=END,
            eos_token=END,
            pad_token=END,
            padding_side="left",
            model_max_length=context,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(str(folder))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cpdlm.hf.export", description="Export a finished run as a folder for transformers and the hub."
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a finished run, or a model with released heads: smollm2"
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write, new or empty")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        export(options.run, options.folder)
    except (ConfigError, RunError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in sorted(options.folder.iterdir()):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
