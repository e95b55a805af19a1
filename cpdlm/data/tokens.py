"""Documents -> token arrays, a piece at a time; a killed run goes on behind its finished pieces.

PIECES/SPLIT-NUMBER.npz     tokens of some documents, end to end, and the length of each; of conversations also which
                            tokens are trained on; there once it is whole

No process is started: the threads of the `tokenizers` library are as fast as processes of ours
(results/benchmarks/processes.json).
"""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpdlm.data.conversations import messages
from cpdlm.data.stored import TRAINED
from cpdlm.data.tokenizer import Tokenizer
from cpdlm.files import replaced

PIECE_BYTES = 4 * 2**20  # of text


@dataclass(frozen=True)
class Piece:
    path: Path
    documents: list[int]
    size: int  # bytes of text


def plan(texts: Sequence[bytes], splits: dict[str, list[int]], folder: Path) -> dict[str, list[Piece]]:
    """The pieces of each split: documents in order, about PIECE_BYTES each. Depends on nothing but the text."""
    made: dict[str, list[Piece]] = {}
    for name, indices in splits.items():
        made[name] = []
        first, size = 0, 0
        for last, index in enumerate(indices, start=1):
            size += len(texts[index])
            if size >= PIECE_BYTES or last == len(indices):
                path = folder / f"{name}-{len(made[name]):06d}.npz"
                made[name].append(Piece(path, indices[first:last], size))
                first, size = last, 0
    return made


def tokenise(
    texts: Sequence[bytes], pieces: list[Piece], tokenizer: Tokenizer, bar: Any, conversations: bool = False
) -> None:
    """Write the pieces that are not there yet. bar: a Bar over bytes of text."""
    todo = [piece for piece in pieces if not zipfile.is_zipfile(piece.path)]
    if len(todo) < len(pieces):
        bar.set_postfix_str(f"{len(pieces) - len(todo)} of {len(pieces)} pieces were there", refresh=False)
        bar.update(sum(piece.size for piece in pieces) - sum(piece.size for piece in todo))
    for piece in todo:
        write_piece(tokenizer, piece.path, [texts[index] for index in piece.documents], conversations)
        bar.update(piece.size)


def write_piece(tokenizer: Tokenizer, path: Path, texts: list[bytes], conversations: bool = False) -> None:
    """[bos] x_1 .. x_m [eos] of each document, or a conversation as its template has it.

    The file appears when it is whole and on the disk.
    """
    arrays = _conversations(tokenizer, texts) if conversations else _documents(tokenizer, texts)
    with replaced(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _documents(tokenizer: Tokenizer, texts: list[bytes]) -> dict[str, Any]:
    dtype = token_dtype(tokenizer)
    bos, eos = np.array([tokenizer.bos], dtype), np.array([tokenizer.eos], dtype)
    parts: list[NDArray[Any]] = []
    lengths = []
    for ids in tokenizer.encode(texts):
        parts += [bos, ids.astype(dtype), eos]
        lengths.append(len(ids) + 2)
    return {"tokens": np.concatenate(parts), "lengths": np.array(lengths, np.int64)}


def _conversations(tokenizer: Tokenizer, texts: list[bytes]) -> dict[str, Any]:
    made = [tokenizer.conversation(messages(text)) for text in texts]
    return {
        "tokens": np.array([token for ids, _ in made for token in ids], token_dtype(tokenizer)),
        "lengths": np.array([len(ids) for ids, _ in made], np.int64),
        TRAINED: np.array([each for _, answered in made for each in answered], np.bool_),
    }


def join(pieces: list[Piece], path: Path, dtype: Any) -> NDArray[np.int64]:
    """Write the array of that file's name of all pieces, in order, as one .npy file; returns the documents' offsets
    (documents + 1,)."""
    lengths = np.concatenate([np.zeros(1, np.int64), *(arrays["lengths"] for arrays in _load(pieces))])
    offsets: NDArray[np.int64] = np.cumsum(lengths)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": (int(offsets[-1]),),
    }
    with open(path, "wb") as file:  # not a memory map: on a full disk that is a bus error
        np.lib.format.write_array_header_1_0(file, header)
        for arrays in _load(pieces):
            file.write(arrays[path.stem].tobytes())
    return offsets


def token_dtype(tokenizer: Tokenizer) -> Any:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def _load(pieces: list[Piece]) -> Iterator[Any]:
    for piece in pieces:
        with np.load(piece.path) as arrays:
            yield arrays
