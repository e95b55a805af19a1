"""A run's folder: who may write to it, its saved config, its finished weights.

RUN/config.yaml         the resolved config
RUN/last.ckpt           what a killed run resumes from (Lightning; loads with weights_only)
RUN/model.safetensors   finished weights, without those of a frozen trunk
RUN/train.json          the training part of the record; present once training is complete
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from yaml import YAMLError

from cpdlm.config import INCIDENTAL, Config, ConfigError, as_yaml, flatten, from_dict
from cpdlm.data.checkpoints import checkpoint_folder, content_hash
from cpdlm.files import replaced, write_bytes
from cpdlm.model.language_model import LanguageModel, build_language_model
from cpdlm.model.pretrained import load_pretrained

CONFIG, CHECKPOINT, WEIGHTS, TRAINED = "config.yaml", "last.ckpt", "model.safetensors", "train.json"

# What may differ when a run resumes: the later stages look after their own settings.
_FREE = (*INCIDENTAL, "decode.", "evaluate.")


class RunError(RuntimeError):
    """A run folder that cannot be used; the message says what is there and what to type."""


@contextlib.contextmanager
def exclusive(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the folder while a run writes to it; raises RunError when another process still does after `patience` seconds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")  # noqa: SIM115 - closed below, after the lock is given back
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; give another folder with output=DIR") from error
    until = time.monotonic() + patience
    with handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= until:
                    raise RunError(
                        f"another run is writing to {folder}; wait for it, or give this one name=OTHER (a sweep: out=OTHER)"
                    ) from error
                time.sleep(0.1)
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
        assert isinstance(plain, dict)
        return from_dict(plain)  # type: ignore[arg-type]
    except (ConfigError, AssertionError, OSError, ValueError, YAMLError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def save_model(folder: Path, model: LanguageModel, state: dict[str, Tensor], vocab_size: int) -> None:
    """Write finished weights. state: the model's full state dict, gathered if it was sharded."""
    kept = {
        name: tensor.contiguous()
        for name, tensor in state.items()
        if not (model.common_target and name.startswith(("trunk.", "unembedding.")))
        and not (name == "unembedding.weight" and model.embeddings_are_tied)
    }
    with replaced(folder / WEIGHTS) as path:
        try:
            save_file(kept, path, metadata={"vocab_size": str(vocab_size)})
        except SafetensorError as error:  # how it says that the disk is full
            raise OSError(str(error)) from error


def load_trunk(config: Config) -> LanguageModel | None:
    """The model that model.trunk names, in evaluation mode: a finished run's or a pretrained one; None without a name.

    Raises RunError for a run folder that cannot be used, ConfigError for a pretrained model that cannot.
    """
    if not config.model.trunk:
        return None
    if not config.is_pretrained:
        return load_model(Path(config.model.trunk))
    source = checkpoint_folder(config.model.trunk, config.data.cache)
    return load_pretrained(source, getattr(torch, config.model.dtype), config.data.context, config.model.trunk)


def trunk_hash(config: Config) -> str:
    """sha256 that stands for the weights of model.trunk."""
    if config.is_pretrained:
        return content_hash(checkpoint_folder(config.model.trunk, config.data.cache))
    return hashlib.sha256((Path(config.model.trunk) / WEIGHTS).read_bytes()).hexdigest()


def load_model(folder: Path, trunk: LanguageModel | None = None) -> LanguageModel:
    """The finished model of a run folder, in evaluation mode; raises RunError for a truncated or foreign one.

    trunk: what `load_trunk` gave for its config, where that is loaded already; it is shared, not copied.
    """
    config, path = read_config(folder), folder / WEIGHTS
    if not path.is_file():
        raise RunError(f"{folder} has no finished model ({WEIGHTS}); run its command again to finish it")
    try:
        with safe_open(path, framework="pt") as file:
            vocab_size = int((file.metadata() or {}).get("vocab_size", "0"))
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path} is truncated or not a safetensors file ({error}); delete it and run again") from error
    trunk = trunk or load_trunk(config)
    if trunk is not None and trunk.vocab_size != vocab_size:
        raise RunError(f"{path} has vocabulary {vocab_size}, its trunk {config.model.trunk} has {trunk.vocab_size}")
    model = build_language_model(config, vocab_size, trunk)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise RunError(f"{path} does not fit its config: {str(error).splitlines()[1].strip()}") from error
    absent = [
        name
        for name in missing
        if not (model.common_target and name.startswith(("trunk.", "unembedding.")))
        and not (name == "unembedding.weight" and model.embeddings_are_tied)
    ]
    if absent or unexpected:
        raise RunError(
            f"{path} does not fit its config: missing {absent[:3] or 'nothing'}, unexpected {unexpected[:3] or 'nothing'}"
        )
    return model.eval()


def check_checkpoint(path: Path) -> None:
    """Raise RunError for a checkpoint that is truncated or is not ours."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        foreign = not isinstance(content, dict) or "Journal" not in content.get("callbacks", {})
    except Exception as error:
        raise RunError(
            f"{path} is truncated or not a checkpoint ({type(error).__name__}); delete it to start again"
        ) from error
    if foreign:
        raise RunError(f"{path} is not a checkpoint of this program; delete it to start again")
