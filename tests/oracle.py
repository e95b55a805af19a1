"""The oracle: slow, obvious, in plain Python floats, sharing no code with the library that it judges.

Distributions, called laws here for short, are lists of probabilities; a window or a history is a tuple of token ids. A
*procedure* names a way to draft and accept: "exact", or one of the planted faults "a".."d" (see
tests/planted_faults.py). `decoder_law` is the exact law of the sequences that a decoder with that
procedure writes.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping

from scipy import stats

Law = list[float]
History = tuple[int, ...]
Target = Callable[[History], Law]
Draft = Callable[[History, int], tuple[Law, list[list[Law]]]]  # (history, pending) -> weights [R], factors [K][R][V]


# --- laws -----------------------------------------------------------------------------------------------------


def normalise(weights: Law) -> Law:
    total = sum(weights)
    return [weight / total for weight in weights]


def filter_law(distribution: Law, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Law:
    """Temperature, then the k likeliest, then the smallest set of likeliest tokens with top_p of the mass."""
    distribution = normalise([p ** (1 / temperature) for p in distribution])
    order = sorted(range(len(distribution)), key=lambda token: -distribution[token])
    if top_k:
        distribution = normalise(
            [distribution[token] if token in order[:top_k] else 0.0 for token in range(len(distribution))]
        )
    kept, mass = set(), 0.0
    for token in order:
        if mass < top_p:
            kept.add(token)
        mass += distribution[token]
    return normalise([distribution[token] if token in kept else 0.0 for token in range(len(distribution))])


def conditional(weights: Law, factors: list[list[Law]], prefix: History) -> Law:
    """Law of the token after `prefix` under the mixture: sums of products, written out."""
    vocabulary = len(factors[0][0])
    mass = [0.0] * vocabulary
    for component, weight in enumerate(weights):
        likelihood = weight
        for position, token in enumerate(prefix):
            likelihood *= factors[position][component][token]
        for token in range(vocabulary):
            mass[token] += likelihood * factors[len(prefix)][component][token]
    return normalise(mass)


def autoregressive_law(target: Target, history: History, length: int, eos: int | None = None) -> dict[History, float]:
    """Law of the next `length` tokens, or of those up to and with eos."""
    if length == 0:
        return {(): 1.0}
    distribution: dict[History, float] = {}
    for token, p in enumerate(target(history)):
        rest = {(): 1.0} if token == eos else autoregressive_law(target, (*history, token), length - 1, eos)
        for tail, q in rest.items():
            distribution[(token, *tail)] = p * q
    return distribution


# --- procedures -----------------------------------------------------------------------------------------------


def window_law(
    procedure: str,
    target: Target,
    history: History,
    weights: Law,
    factors: list[list[Law]],
    drafts: int,
    keep: Callable[[Law], Law],
) -> dict[History, float]:
    """Law of what one forward emits: accepted drafts and the token after them. target: filtered; keep: the filter."""
    emitted: dict[History, float] = defaultdict(float)

    def distributions(component: int | None, prefix: History) -> tuple[Law, Law, Law]:
        """Draft law that tokens are drawn from, that the test divides by, and that the residual subtracts."""
        scored = keep(conditional(weights, factors, prefix))
        if component is None:
            return scored, scored, scored
        own = factors[len(prefix)][component]
        return (own, own, scored) if procedure == "a" else (keep(own), scored, scored)

    def walk(component: int | None, prefix: History, mass: float) -> None:
        p = target(history + prefix)
        if len(prefix) == drafts:
            for token, probability in enumerate(p):
                emitted[(*prefix, token)] += mass * probability
            return
        drawn, tested, subtracted = distributions(component, prefix)
        rejected = 0.0
        for token, q in enumerate(drawn):
            if q == 0:
                continue
            accept = min(1.0, p[token] / tested[token]) if tested[token] else float(p[token] > 0)
            rejected += mass * q * (1 - accept)
            if accept:
                walk(component, (*prefix, token), mass * q * accept)
        if rejected <= 0:
            return
        corrected = [max(0.0, a - b) for a, b in zip(p, subtracted, strict=True)]
        if procedure == "d" or (procedure == "b" and prefix) or sum(corrected) <= 0:
            corrected = p
        for token, probability in enumerate(normalise(corrected)):
            emitted[(*prefix, token)] += rejected * probability

    if procedure in ("a", "c"):
        for component, weight in enumerate(weights):
            walk(component, (), weight)
    else:
        walk(None, (), 1.0)
    return dict(emitted)


def decoder_law(
    procedure: str,
    target: Target,
    draft: Draft,
    prompt: History,
    length: int,
    horizon: int,
    keep: Callable[[Law], Law],
    eos: int | None = None,
) -> dict[History, float]:
    """Exact law of the sequences a whole decoder writes: prompt, windows, shortened last window, eos."""
    distribution: dict[History, float] = defaultdict(float)

    def kept(history: History) -> Law:
        return keep(target(history))

    def go(written: History, mass: float) -> None:
        if len(written) >= length or (eos is not None and eos in written):
            distribution[written] += mass
            return
        before, pending = prompt + written[:-1], written[-1]
        weights, factors = draft(before, pending)
        drafts = min(horizon - 1, length - len(written) - 1)
        for emitted, p in window_law(procedure, kept, prompt + written, weights, factors, drafts, keep).items():
            new = emitted[: emitted.index(eos) + 1] if eos in emitted else emitted
            if p > 0:
                go(written + new, mass * p)

    for token, p in enumerate(kept(prompt)):
        if p > 0:
            go((token,), p)
    return dict(distribution)


# --- goodness of fit ------------------------------------------------------------------------------------------

FALSE_ALARM = 1e-4  # a lossless decoder fails one law test in ten thousand seeds; the seeds are fixed


def pooled_cells(distribution: Mapping[History, float], samples: int) -> list[list[History]]:
    """Cells of the chi-square test: sequences expected fewer than 5 times share one cell."""
    common = [[sequence] for sequence, p in sorted(distribution.items()) if p * samples >= 5]
    rare = [sequence for sequence, p in sorted(distribution.items()) if 0 < p * samples < 5]
    return [*common, rare] if rare else common


def p_value(counts: Mapping[History, int], distribution: Mapping[History, float]) -> float:
    """Chi-square p-value of observed sequences against a law; 0 if one has probability zero."""
    samples = sum(counts.values())
    if any(distribution.get(sequence, 0.0) <= 0 for sequence in counts):
        return 0.0
    cells = pooled_cells(distribution, samples)
    expected = [samples * sum(distribution[s] for s in cell) for cell in cells]
    observed = [sum(counts.get(s, 0) for s in cell) for cell in cells]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return float(stats.chi2.sf(statistic, len(cells) - 1))


def power(faulty: Mapping[History, float], distribution: Mapping[History, float], samples: int) -> float:
    """Probability that `p_value` < FALSE_ALARM for `samples` draws of the faulty law (noncentral chi-square)."""
    outside = sum(p for sequence, p in faulty.items() if distribution.get(sequence, 0.0) <= 0)
    cells = pooled_cells(distribution, samples)
    shift = 0.0
    for cell in cells:
        expected = sum(distribution[s] for s in cell)
        shift += (sum(faulty.get(s, 0.0) for s in cell) - expected) ** 2 / expected
    freedom = len(cells) - 1
    by_shift = float(stats.ncx2.sf(stats.chi2.isf(FALSE_ALARM, freedom), freedom, max(samples * shift, 1e-9)))
    return max(by_shift, 1 - (1 - outside) ** samples)


def distance(one: Mapping[History, float], other: Mapping[History, float]) -> float:
    """Total variation."""
    return sum(abs(one.get(s, 0.0) - other.get(s, 0.0)) for s in {*one, *other}) / 2


def windows(vocabulary: int, length: int) -> list[History]:
    return list(itertools.product(range(vocabulary), repeat=length))


def entropy(distribution: Law) -> float:
    return -sum(p * math.log(p) for p in distribution if p > 0)
