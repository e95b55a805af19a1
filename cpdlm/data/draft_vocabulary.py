"""Which tokens a draft should be made of: those that a corpus uses most, and how much of it they cover.

A draft over a part of the vocabulary costs less and loses only the tokens outside it, which the target still writes
(FR-Spec, arXiv 2502.14856). Count the tokens of the training split: those of the test split would leak what is decoded.

Letters: V vocabulary, V' draft vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class DraftVocabulary:
    """ids: (V',) int64, ascending. coverage: share of the counted tokens that it holds."""

    ids: NDArray[np.int64]
    coverage: float


def frequent_tokens(tokens: NDArray[np.integer], vocab_size: int, size: int) -> DraftVocabulary:
    """The `size` most frequent of the ids in `tokens` (any shape); of equally frequent ones the lower id goes first."""
    counts_V = np.bincount(tokens.ravel(), minlength=vocab_size)
    ids = np.sort(np.argsort(-counts_V, kind="stable")[:size]).astype(np.int64)
    return DraftVocabulary(ids, float(counts_V[ids].sum() / tokens.size))
