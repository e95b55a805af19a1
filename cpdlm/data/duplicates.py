"""Which documents are near-duplicates of one another, so that a split never has one on each side.

Two documents are near-duplicates when they share at least half of the distinct 8-word shingles of the smaller one;
clusters are the connected components. Shingles are hashed with a fixed 64-bit hash (the same in every process), sampled
by their hash where there are very many, and matched through an inverted index.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cpdlm.config import ConfigError
from cpdlm.data.windows import mix
from cpdlm.progress import Bar

WORDS = 8
SHARED = 0.5
SHINGLES = 16_000_000  # above this many, 1 in 2, 4, 8, ... is kept
ALL_PAIRS = 16  # documents that hold one shingle: up to this many, every pair counts
CHUNK = 4 * 2**20  # bytes hashed at a time
DOCUMENT_BITS = 24
_DOCUMENT = np.uint64(2**DOCUMENT_BITS - 1)

_BYTES = np.arange(256, dtype=np.uint64)
_IS_WORD = np.array([chr(b).isalnum() or b == ord("_") or b >= 128 for b in range(256)])
_BYTE_HASH = mix(_BYTES + np.uint64(1000))
_WORD_FACTORS = mix(np.arange(WORDS, dtype=np.uint64)) | np.uint64(1)


def clusters(texts: Sequence[bytes]) -> NDArray[np.int64]:
    """(len(texts),) the lowest index in each document's cluster of near-duplicates (its own where it is alone)."""
    if len(texts) >= 2**DOCUMENT_BITS:
        raise ConfigError(f"{len(texts):,} documents are more than {2**DOCUMENT_BITS:,}; set data.max_bytes lower")
    entries = _inverted_index(texts)
    first_P, second_P, shared_P = _shared_counts(entries)
    distinct = np.bincount((entries & _DOCUMENT).astype(np.int64), minlength=len(texts))
    near_P = shared_P >= SHARED * np.minimum(distinct[first_P], distinct[second_P])
    return _components(len(texts), first_P[near_P], second_P[near_P])


def _inverted_index(texts: Sequence[bytes]) -> NDArray[np.uint64]:
    """Sorted, distinct (shingle << 24 | document)."""
    # A chunk is up to CHUNK bytes, or one longer text, and a separator per text.
    powers, inverses = _powers(max(CHUNK, *map(len, texts), 0) + len(texts) + 2)
    total = sum(map(len, texts))
    # A shingle starts at most at every second byte, about every sixth in practice.
    keep_one_in = 1
    while total / 6 / keep_one_in > SHINGLES:
        keep_one_in *= 2
    parts: list[NDArray[np.uint64]] = []
    start = 0
    with Bar(total=total, desc="comparing documents", unit="B", unit_scale=True) as bar:
        while start < len(texts):
            stop, size = start, 0
            while stop < len(texts) and (size == 0 or size + len(texts[stop]) <= CHUNK):
                size += len(texts[stop])
                stop += 1
            hashes, documents = _shingles([texts[index] for index in range(start, stop)], powers, inverses)
            if keep_one_in > 1:
                sampled = hashes % np.uint64(keep_one_in) == 0
                hashes, documents = hashes[sampled], documents[sampled]
            parts.append(np.unique((hashes & ~_DOCUMENT) | (documents + start).astype(np.uint64)))
            bar.update(size)
            start = stop
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)


def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """P^i and P^-i modulo 2^64 for i < count."""
    base = 0x9E3779B97F4A7C15
    tables = []
    for factor in (base, pow(base, -1, 2**64)):
        steps = np.full(count, factor, dtype=np.uint64)
        steps[0] = 1
        tables.append(np.cumprod(steps, dtype=np.uint64))
    return tables[0], tables[1]


def _shingles(
    texts: Sequence[bytes], powers: NDArray[np.uint64], inverses: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of all 8-word shingles, and the document of each (counted from the first text)."""
    stream = np.frombuffer(b"\n" + b"\n".join(texts) + b"\n", dtype=np.uint8)
    is_word = _IS_WORD[stream]
    starts = np.flatnonzero(is_word[1:] & ~is_word[:-1]) + 1
    ends = np.flatnonzero(is_word[:-1] & ~is_word[1:]) + 1
    # Polynomial hash of a word: difference of prefix sums, shifted back to the word's own start.
    sums = np.zeros(len(stream) + 1, dtype=np.uint64)
    np.cumsum(_BYTE_HASH[stream] * powers[: len(stream)], out=sums[1:])
    words = mix((sums[ends] - sums[starts]) * inverses[starts])
    if len(words) < WORDS:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    count = len(words) - WORDS + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for k in range(WORDS):
        hashes += words[k : k + count] * _WORD_FACTORS[k]
    text_starts = np.cumsum([1, *(len(text) + 1 for text in texts[:-1])])
    documents = np.searchsorted(text_starts, starts, side="right") - 1
    whole = documents[:count] == documents[WORDS - 1 :]
    return mix(hashes[whole]), documents[:count][whole]


def _shared_counts(
    entries: NDArray[np.uint64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of documents and how many shingles they share.

    A shingle in more than ALL_PAIRS documents counts for neighbours (by index) and for pairs with its first document
    only, which keeps the work linear and still joins a family whose members share the same shingles.
    """
    shingle = entries >> np.uint64(DOCUMENT_BITS)
    document = (entries & _DOCUMENT).astype(np.int64)
    begins = np.flatnonzero(np.r_[True, shingle[1:] != shingle[:-1]]) if len(entries) else np.zeros(0, dtype=np.int64)
    sizes = np.diff(np.r_[begins, len(entries)])
    keys = [np.zeros(0, dtype=np.int64)]
    for size in range(2, ALL_PAIRS + 1):
        members = document[begins[sizes == size][:, None] + np.arange(size)]
        left, right = np.triu_indices(size, k=1)
        keys.append((members[:, left] << DOCUMENT_BITS | members[:, right]).ravel())
    for begin, size in zip(begins[sizes > ALL_PAIRS], sizes[sizes > ALL_PAIRS], strict=True):
        group = document[begin : begin + size]
        keys += [group[:-1] << DOCUMENT_BITS | group[1:], group[0] << DOCUMENT_BITS | group[2:]]
    pairs, counts = np.unique(np.concatenate(keys), return_counts=True)
    return pairs >> DOCUMENT_BITS, pairs & int(_DOCUMENT), counts


def _components(count: int, first_P: NDArray[np.int64], second_P: NDArray[np.int64]) -> NDArray[np.int64]:
    """The lowest member of each node's connected component."""
    edges = coo_array((np.ones(len(first_P), bool), (first_P, second_P)), shape=(count, count))
    _, labels = connected_components(edges, directed=False)
    return np.unique(labels, return_index=True)[1][labels]
