"""The most frequent tokens of a corpus, against a plain count."""

from collections import Counter

import numpy as np
import pytest

from cpdlm.data.draft_vocabulary import frequent_tokens


@pytest.mark.parametrize("size", [1, 3, 7, 12])
def test_the_most_frequent_tokens_and_what_they_cover(size: int) -> None:
    tokens = np.random.default_rng(0).zipf(1.5, 500).clip(max=9).astype(np.uint16).reshape(5, 100)
    found = frequent_tokens(tokens, 12, size)
    counts = Counter(tokens.ravel().tolist())
    expected = sorted(sorted(range(12), key=lambda token: (-counts[token], token))[:size])
    assert found.ids.dtype == np.int64 and found.ids.tolist() == expected
    assert found.coverage == sum(counts[token] for token in expected) / 500
    assert size < 12 or found.coverage == 1
