"""A run's folder: who may write to it, its saved config, its finished weights.

RUN/config.yaml         the resolved config
RUN/last.ckpt           what a killed run resumes from, without what is frozen (Lightning; loads with weights_only);
                        with train.sharded a link to a folder of torch.distributed.checkpoint
RUN/model.safetensors   finished weights, without those of a frozen trunk
RUN/train.json          the training part of the record; present once training is complete
RUN/sessions.json       hashes of text and frozen model, and each start of the run (`cpdlm.training.run`)
RUN/tokenizer/          the tokenizer, whole (`cpdlm.data.tokenizer.store_tokenizer`)
RUN/draft_vocabulary.json   the tokens that the run drafts from, where these are not all
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from yaml import YAMLError

from cpdlm import files
from cpdlm.config import INCIDENTAL, Config, ConfigError, as_yaml, flatten, from_dict
from cpdlm.data.target import WEIGHTS, Target
from cpdlm.data.tokenizer import DESCRIBED, Tokenizer, store_tokenizer
from cpdlm.files import LockHeld, errors_named, locked, replaced, replaced_folder, write_bytes, write_json
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.pretrained import load_pretrained
from cpdlm.training.received import Refused, shard_names

TOKENIZER = "tokenizer"
CONFIG, CHECKPOINT, TRAINED = "config.yaml", "last.ckpt", "train.json"
DRAFT_VOCABULARY = "draft_vocabulary.json"

# What may differ when a run resumes: the later stages look after their own settings.
_FREE = (*INCIDENTAL, "decode.", "evaluate.")


class RunError(RuntimeError):
    """A run folder that cannot be used; the message says what is there and what to type."""


def read_json(path: Path, advice: str = "; delete it, and the same command makes it again") -> dict[str, Any] | None:
    """None where there is no such file. RunError for a damaged one, with what to do about it."""
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}){advice}") from error


def run_folder(config: Config) -> Path:
    """OUTPUT/NAME, where everything of a run lies."""
    return Path(config.output) / config.run_name


def is_finished(folder: Path) -> bool:
    """Whether the run's training is complete and its weights are there."""
    return (folder / TRAINED).is_file() and (folder / WEIGHTS).is_file()


def has_tokenizer(folder: Path) -> bool:
    """Whether the run's folder holds its tokenizer."""
    return (folder / TOKENIZER / DESCRIBED).is_file()


@contextlib.contextmanager
def exclusive(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the folder while a run writes to it.

    RunError, naming the holder, if another process still has it after `patience` seconds; WriteError where it cannot be
    written.
    """
    with contextlib.ExitStack() as stack:
        try:
            with errors_named(folder):
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / ".lock", patience))
                files.remove_partial(folder)
        except LockHeld as error:
            raise RunError(
                f"another run is writing to {folder}: {error.holder}; wait for it, or give this one name=OTHER "
                "(a sweep: out=OTHER)"
            ) from error
        yield


def open_run(folder: Path, config: Config) -> None:
    """Save the config, after `check_same_run`."""
    check_same_run(folder, config)
    write_bytes(folder / CONFIG, as_yaml(config).encode())


def check_same_run(folder: Path, config: Config) -> None:
    """Raise RunError where the folder holds a run of other settings: nothing of it may be taken for this one."""
    if not (folder / CONFIG).exists():
        return
    theirs = flatten(read_config(folder))
    for key, value in flatten(config).items():
        if not key.startswith(_FREE) and value != theirs[key]:
            raise RunError(
                f"{folder} holds another run ({key}: {theirs[key]!r} there, {value!r} now); give this one name=OTHER "
                f"(a sweep: out=OTHER), or delete the folder"
            )


def read_config(folder: Path) -> Config:
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder: it has no {CONFIG}")
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(plain, dict):
            raise ConfigError("it is not a table of settings")
        return from_dict(plain)  # type: ignore[arg-type]
    except (ConfigError, OSError, ValueError, YAMLError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def save_model(
    folder: Path, model: LanguageModel, state: dict[str, Tensor], vocab_size: int, dtype: torch.dtype | None = None
) -> None:
    """Write finished weights. state: the model's full state dict, gathered if it was sharded.

    dtype: what numbers are rounded to (default: what they are).
    """
    kept = {
        name: tensor.to(dtype if tensor.is_floating_point() else None)
        for name, tensor in state.items()
        if _is_stored(name, model)
    }
    write_tensors(folder / WEIGHTS, kept, {"vocab_size": str(vocab_size)})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A whole file or none. WriteError where the disk is full."""
    with replaced(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # how it says that the disk is full
            raise OSError(str(error)) from error


def _is_stored(name: str, model: LanguageModel) -> bool:
    """Whether a tensor of that name is the run's own: not a frozen trunk's, nor a second name of a tied one."""
    if model.frozen_target and name.startswith(("trunk.", "unembedding.")):
        return False
    return not (name == "unembedding.weight" and model.embeddings_are_tied)


def load_target(config: Config, probed: bool = False) -> LanguageModel | None:
    """The frozen model that heads train on, in evaluation mode; None where nothing is frozen.

    probed: as of `load_pretrained`. Raises RunError for a run folder that cannot be used, ConfigError for a pretrained
    model that cannot.
    """
    target = Target.of(config)
    if target.kind == "run":
        return load_model(Path(target.name))
    if target.kind == "pretrained":
        dtype = getattr(torch, target.dtype)
        return load_pretrained(target.source, dtype, config.data.context, target.name, probed=probed)
    return None


def check_has_weights(run: Path) -> None:
    if not (run / WEIGHTS).is_file():
        raise RunError(f"{run} has no finished model ({WEIGHTS}); run its command again to finish it")


def load_model(folder: Path, trunk: LanguageModel | None = None) -> LanguageModel:
    """The finished model of a run folder, in evaluation mode; RunError for a truncated or foreign one.

    trunk: what `load_target` gave for its config, where that is loaded already; it is shared, not copied.
    """
    config, path = read_config(folder), folder / WEIGHTS
    check_has_weights(folder)
    try:
        with safe_open(path, framework="pt") as file:
            vocab_size = int((file.metadata() or {}).get("vocab_size", "0"))
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is truncated or not a safetensors file ({error}); delete it and run again") from error
    trunk = trunk or load_target(config)
    if trunk is not None and trunk.vocab_size != vocab_size:
        raise RunError(f"{path} has vocabulary {vocab_size}, its trunk {config.model.trunk} has {trunk.vocab_size}")
    model = build_language_model(config, vocab_size, trunk)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise RunError(f"{path} does not fit its config: {str(error).splitlines()[1].strip()}") from error
    absent = [name for name in missing if _is_stored(name, model)]
    if absent or unexpected:
        raise RunError(
            f"{path} does not fit its config: missing {absent[:3] or 'nothing'}, "
            f"unexpected {unexpected[:3] or 'nothing'}"
        )
    return model.eval()


# --- checkpoints ------------------------------------------------------------------------------------------------------

_META = "meta.pt"  # Lightning's: all of a sharded checkpoint but tensors


def partial_checkpoint(folder: Path) -> Path:
    """Where the next checkpoint is written, file or folder: one of two names, whichever last.ckpt does not point to."""
    path = folder / CHECKPOINT
    names = [f".{CHECKPOINT}.{letter}" for letter in "ab"]
    return folder / names[path.is_symlink() and os.readlink(path) == names[0]]


def swap_in(partial: Path, path: Path) -> None:
    """Make the finished checkpoint `partial` the one at `path`, in one step, once it is on the disk."""
    for file in [partial] if partial.is_file() else partial.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    if partial.is_dir():
        link = path.with_name(f".{path.name}.link")
        link.unlink(missing_ok=True)
        link.symlink_to(partial.name)
        partial = link
    os.replace(partial, path)


def remove_partial(folder: Path) -> None:
    """Delete what is left of checkpoints that were never finished, or are not the last any more."""
    path = folder / CHECKPOINT
    kept = os.readlink(path) if path.is_symlink() else ""
    for other in folder.glob(f".{CHECKPOINT}.*"):
        if other.is_dir() and not other.is_symlink():
            if other.name != kept:
                shutil.rmtree(other, ignore_errors=True)
        else:
            other.unlink(missing_ok=True)


def remove_checkpoint(folder: Path) -> None:
    (folder / CHECKPOINT).unlink(missing_ok=True)
    remove_partial(folder)


def consolidate(folder: Path) -> None:
    """Turn the sharded checkpoint of a run into one file, which every mode loads. Holds the whole of it in memory."""
    path = folder / CHECKPOINT
    check_checkpoint(path)
    with replaced(path) as temporary:
        try:
            dcp_to_torch_save(path, temporary)
            parts = torch.load(temporary, weights_only=True)
            content = torch.load(path / _META, weights_only=True) | {"state_dict": parts.pop("state_dict")}
            torch.save(content | {"optimizer_states": [parts[name] for name in sorted(parts)]}, temporary)
        except RuntimeError as error:  # how torch says that the disk is full
            raise OSError(str(error).splitlines()[0]) from error
    remove_partial(folder)


def check_checkpoint(path: Path, needed: Iterable[str] = ()) -> None:
    """Raise RunError for a checkpoint that is truncated, is not ours, or lacks weights of the names that are needed."""
    try:
        whole = path / _META if path.is_dir() else path
        content = torch.load(whole, map_location="cpu", weights_only=True, mmap=not path.is_dir())
        foreign = not isinstance(content, dict) or "Journal" not in content.get("callbacks", {})
        sharded = shard_names(path) if path.is_dir() else set[str]()
    except Refused as error:
        raise RunError(f"{path} is not a checkpoint of this program: {error}; delete it to start again") from error
    except Exception as error:
        raise RunError(
            f"{path} is truncated or not a checkpoint ({type(error).__name__}); delete it to start again"
        ) from error
    if foreign:
        raise RunError(f"{path} is not a checkpoint of this program; delete it to start again")
    held = sharded or content.get("state_dict") or {}
    if absent := [name for name in needed if name not in held]:
        raise RunError(f"{path} does not fit this run: it lacks {absent[:3]}; delete it to start again")


def refuse_misfit(path: Path, error: Exception) -> None:
    """RunError for a checkpoint that could not be restored; nothing where `error` says something else."""
    if not isinstance(error, RunError | ConfigError | torch.OutOfMemoryError):
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"{path} does not fit this run ({type(error).__name__}: {reason}); delete it to start again"
        ) from error


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Put it into the run's folder, where it is not there yet: the folder needs no cache to be used."""
    with errors_named(folder):
        if not has_tokenizer(folder):
            with replaced_folder(folder / TOKENIZER) as temporary:
                store_tokenizer(tokenizer, temporary)


def save_draft_vocabulary(folder: Path, config: Config, ids: Tensor | None) -> None:
    """ids: (V',) the tokens that the run drafts from, None for all.

    decode.draft_vocabulary may change after training; the measurement then saves what the run drafts from since.
    """
    open_run(folder, config)
    if ids is not None:
        write_json(folder / DRAFT_VOCABULARY, {"ids": ids.tolist(), "size": config.decode.draft_vocabulary})


def has_draft_vocabulary(run: Path, size: int) -> bool:
    """Whether the run's folder holds the tokens that it drafts from; RunError where the file is damaged."""
    return not size or (read_json(run / DRAFT_VOCABULARY) or {}).get("size") == size


def run_draft_vocabulary(run: Path) -> Tensor | None:
    """(V',) the tokens that a run drafts from; None for all. RunError where they are not known."""
    size = read_config(run).decode.draft_vocabulary
    if not size:
        return None
    if has_draft_vocabulary(run, size):
        return torch.tensor((read_json(run / DRAFT_VOCABULARY) or {})["ids"])
    raise RunError(
        f"{run} drafts from a part of the vocabulary (decode.draft_vocabulary={size}) that its {DRAFT_VOCABULARY} does "
        "not hold; run its command again, which measures it with that size"
    )
