"""The counting model against its definition, one context after another."""

from collections import Counter

import numpy as np

from experiments.bench.byte_counts import Counts, keys


def test_probabilities_are_those_of_witten_and_bell() -> None:
    rng, base, order = np.random.default_rng(0), 5, 3
    tokens, text = (rng.integers(base, size=size).astype(np.uint16) for size in (300, 40))

    def expected(context: tuple[int, ...], token: int) -> float:
        """Of the token behind this context, from the definition."""
        shorter = expected(context[1:], token) if context else 1 / base
        size = len(context)
        windows = (tuple(tokens[at : at + size + 1].tolist()) for at in range(len(tokens) - size))
        seen = Counter(window[-1] for window in windows if window[:-1] == context)
        total = sum(seen.values())
        return (seen[token] + len(seen) * shorter) / (total + len(seen)) if total else shorter

    context_P, token_P = keys(text[:-1], order, base), text[order:].astype(np.int64)
    found_P = np.full(len(token_P), 1 / base)
    for length in range(order + 1):
        found_P = Counts(tokens, length, base).refine(found_P, context_P % base**length, token_P)
    wanted = [expected(tuple(text[at : at + order].tolist()), int(text[at + order])) for at in range(len(token_P))]
    np.testing.assert_allclose(found_P, wanted, rtol=1e-12)
    every = np.zeros(base)
    for token in range(base):
        found = np.full(1, 1 / base)
        for length in range(order + 1):
            found = Counts(tokens, length, base).refine(found, context_P[:1] % base**length, np.array([token]))
        every[token] = found[0]
    assert abs(every.sum() - 1) < 1e-12
