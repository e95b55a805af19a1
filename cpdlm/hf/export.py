"""From a finished run, or a model with released heads, to a folder that `from_pretrained` reads."""

import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from cpdlm.data.target import Target
from cpdlm.data.tokenizer import END, HubTokenizer, Tokenizer
from cpdlm.files import errors_named, partial_folder, remove_partial, write_bytes, write_json
from cpdlm.hf.card import card
from cpdlm.hf.load import is_pretrained_tokenizer, load
from cpdlm.hf.model import CpdlmConfig, CpdlmForCausalLM
from cpdlm.training.checkpoints import CONFIG, RunError, read_json

# What `from_pretrained` would read beside the files of a new export: more shards, another tokenizer's files.
READ = (
    "model*.safetensors*",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


def export(source: Path, folder: Path) -> CpdlmForCausalLM:
    """Write a folder that `from_pretrained` reads and `push_to_hub` uploads as it is; returns the model.

    source: the folder of a finished run, or the name of a model with released heads. folder: new or empty, or an
    exported one, which is replaced. It gets config.json, generation_config.json, model.safetensors, the tokenizer's
    files and README.md, the model card. Raises RunError for a run that is not finished or whose parts are gone, and
    for a folder that holds something else; ConfigError for a named model that cannot be had.
    """
    check_folder(folder)
    loaded = load(source)
    if loaded.config is None:
        raise RunError(f"{source} is an exported folder already; give the run that it was made of")
    model, tokenizer = loaded.model, loaded.tokenizer
    defaults = Target.of(loaded.config).generation
    wrapped = CpdlmForCausalLM.from_language_model(model, tokenizer.bos, loaded.eos, defaults)
    wrapped.config.draft, wrapped.config.nodes = loaded.drafting
    text = card(source, loaded.config, model, folder.name)
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        with partial_folder(folder / "model") as aside:
            try:
                wrapped.save_pretrained(aside)
            except SafetensorError as error:  # how it says that the disk is full
                raise OSError(str(error)) from error
            _save_tokenizer(tokenizer, aside, model.context)
            write_bytes(aside / "README.md", text.encode())
            _take_over(aside, folder)
    return wrapped


def _take_over(aside: Path, folder: Path) -> None:
    """Move the files of `aside` into `folder`, with the mode that the umask says, in place of an older export."""
    mode = aside.stat().st_mode & 0o666
    for old in (path for pattern in READ for path in folder.glob(pattern)):
        if not (aside / old.name).exists():
            old.unlink()
    for path in sorted(aside.rglob("*")):
        there = folder / path.relative_to(aside)
        if path.is_dir():
            there.mkdir(exist_ok=True)
            continue
        path.chmod(mode)
        path.replace(there)


def check_folder(folder: Path) -> None:
    """RunError for a folder that an export would spoil."""
    if folder.is_file():
        raise RunError(f"{folder} is a file; give a new or empty folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    theirs = read_json(folder / "config.json", "; give a new or empty folder")
    if (folder / CONFIG).exists() or theirs is None or theirs.get("model_type") != CpdlmConfig.model_type:
        raise RunError(f"{folder} holds something else than an exported model; give a new or empty folder")


def _pad_left(path: Path) -> None:
    """What a batch to be continued needs of a tokenizer, whatever the model's own does: padding, before the text."""
    settings = read_json(path) or {}
    settings["padding_side"] = "left"
    settings["pad_token"] = settings.get("pad_token") or settings.get("eos_token")
    write_json(path, settings)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """The files that AutoTokenizer reads.

    Bytes and our BPE are written as byte-level BPEs (bytes: one without merges), with <|endoftext|> before every text,
    as the model has seen documents.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(Path(scratch))
        if is_pretrained_tokenizer(tokenizer):
            shutil.copytree(Path(scratch) / HubTokenizer.FOLDER, folder, dirs_exist_ok=True)
            _pad_left(folder / "tokenizer_config.json")
            return
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        if tokenizer.name.startswith("bpe"):
            model = Model.from_file(str(Path(scratch) / "bpe.json"))
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
