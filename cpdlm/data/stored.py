"""A corpus as token arrays, and the folder that holds it.

FOLDER/meta.json                format, request, sizes, sha256 of every file
       token_bytes.npy          bytes of text behind each id
       SPLIT/tokens.npy         uint16 or uint32; document = [bos] x_1 .. x_m [eos]
       SPLIT/offsets.npy        documents + 1 token offsets
       SPLIT/source_ids.npy     source of each document
       SPLIT/byte_lengths.npy   bytes of each document
       SPLIT/trained.npy        bool per token, of conversations: whether it is an answer's
       bpe.json or hf/          the tokenizer, for those that have files
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpdlm.data.tokenizer import SavedTokenizer, Tokenizer
from cpdlm.files import file_sha256

FORMAT = 2  # raise when the layout, the way documents are split, or a conversation's ids change
SPLITS = ("train", "validation", "test")
ARRAYS = ("tokens", "offsets", "source_ids", "byte_lengths")
TRAINED = "trained"  # an array that only some corpora have


@dataclass(frozen=True)
class TokenSplit:
    """One split: its documents' tokens end to end. offsets: (documents + 1,). source_ids index source_names.

    trained: which tokens are trained on, None for all.
    """

    tokens: NDArray[np.integer]
    offsets: NDArray[np.int64]
    source_ids: NDArray[np.integer]
    byte_lengths: NDArray[np.int64]
    source_names: list[str]
    trained: NDArray[np.bool_] | None = None

    @property
    def arrays(self) -> dict[str, Any]:
        """What a folder or a bundle holds of it, by name."""
        kept = {name: getattr(self, name) for name in (*ARRAYS, TRAINED)}
        return {name: array for name, array in kept.items() if array is not None}

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def bytes(self) -> int:
        """Bytes of text, special tokens not counted."""
        return int(self.byte_lengths.sum())


@dataclass(frozen=True)
class Corpus:
    """Three splits and the tokenizer that made them."""

    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit
    tokenizer: Tokenizer
    meta: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def source_names(self) -> list[str]:
        return self.train.source_names

    def split(self, name: str) -> TokenSplit:
        """train, validation or test."""
        split: TokenSplit = getattr(self, name)
        return split

    def token_bytes(self) -> NDArray[np.int64]:
        """(V,) bytes of text behind each id; 0 for special tokens."""
        return self.tokenizer.token_bytes()

    def describe(self) -> dict[str, Any]:
        """The record's `data` entry. sha256: over the sha256 of every array, so of exactly these tokens."""
        return {
            "corpus": self.meta["request"]["corpus"],
            "sha256": self.meta["sha256"],
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.vocab_size,
            "splits": {
                name: {"documents": split.documents, "bytes": split.bytes, "tokens": len(split.tokens)}
                for name, split in ((name, self.split(name)) for name in SPLITS)
            },
            "max_bytes": self.meta["request"]["max_bytes"],
            "sources": self.meta["provenance"],
            "notes": self.meta["notes"],
        }


class TornCache(ValueError):
    """A folder of tokens that is not what its meta.json says; the message says in which way."""


def read_tokens(folder: Path) -> Corpus:
    """The corpus in a folder of tokens; raises TornCache where a file is missing, cut, changed or of another format."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != FORMAT:
            raise TornCache(f"{folder} has format {meta['format']}, not {FORMAT}")
        for name, entry in meta["files"].items():
            path = folder / name
            if file_sha256(path) != entry["sha256"]:
                raise TornCache(f"{path} is not the file that was written (its sha256 differs)")
        names = [name.removesuffix(".npy") for name in meta["files"] if name.endswith(".npy")]
        return assemble(meta, {name.replace("/", "."): _array(folder / f"{name}.npy") for name in names}, folder)
    except TornCache:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TornCache(f"{folder} is torn or foreign ({type(error).__name__}: {error})") from error


def assemble(meta: dict[str, Any], arrays: Mapping[str, NDArray[Any]], folder: Path) -> Corpus:
    """The corpus of a meta.json and its arrays; TornCache where these do not fit.

    arrays: token_bytes and SPLIT.ARRAY. folder: has the tokenizer's files.
    """
    tokenizer = SavedTokenizer(**meta["tokenizer"], folder=folder, token_bytes=arrays["token_bytes"])
    made = {}
    for name in SPLITS:
        mine = {key: arrays[f"{name}.{key}"] for key in (*ARRAYS, TRAINED) if f"{name}.{key}" in arrays}
        made[name] = split = TokenSplit(**mine, source_names=list(meta["source_names"]))
        marked = len(split.tokens) if split.trained is None else len(split.trained)
        if not split.offsets[-1] == len(split.tokens) == marked or len(split.source_ids) != split.documents:
            raise TornCache(f"{folder}: the arrays of {name} do not belong together")
    return Corpus(**made, tokenizer=tokenizer, meta=meta)


def _array(path: Path) -> NDArray[Any]:
    """Memory-mapped where it is long."""
    array: NDArray[Any] = np.load(path, mmap_mode="r" if path.name == "tokens.npy" else None)
    return array
