"""From a distribution to the one that is really sampled, and from that one to tokens.

Target and drafts pass through the same two functions, `filtered` and `draw`: what the acceptance test calls a token's
draft probability is then the probability with which it was drawn.

Letters: V vocabulary; `...` any batch dimensions.
"""

import math
import operator
import sys
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-30  # logits divided by it are still float32


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether it counts something: a whole number of Python's, numpy's or torch's, of at least `least`; no bool."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        return False


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature, then top-k, then top-p, as in `transformers` (temperature 0 = greedy).

    temperature: at least 0. top_k: keep the k likeliest tokens and their ties (0 = all). top_p: keep the smallest set
    of likeliest tokens that holds this much probability, in (0, 1]. Raises ValueError on anything else.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature <= sys.float_info.max:
            raise ValueError(
                f"temperature={self.temperature!r} must be a finite number of at least 0; type 0 for greedy, 1 for the "
                "model's own distribution"
            )
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature} is too small to divide by; the least is "
                f"{LEAST_TEMPERATURE:g}, or type 0 "
                "for greedy"
            )
        if not is_whole(self.top_k, 0):
            raise ValueError(f"top_k={self.top_k!r} must be a whole number of at least 0; type 0 to keep every token")
        if not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must lie in (0, 1]; type 1 to keep every token")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def unfiltered(self) -> bool:
        """True where the model's own distribution is sampled, unchanged."""
        return self.temperature == 1 and self.top_k == 0 and self.top_p == 1


def filtered(log_probs: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (..., V) that is sampled, as probabilities in float32 or wider.

    log_probs: (..., V) log-probabilities or scores; a row of NaN, or of -inf alone, comes back as a row of NaN or
    zeros, which `draw` refuses. sampling: any but greedy (argmax needs no distribution).
    """
    assert not sampling.greedy, "greedy decoding takes the argmax; it has no distribution to filter"
    scores = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    if sampling.unfiltered:
        return scores.exp()
    if sampling.temperature != 1:
        # Shifted so that the largest is 0: a tiny temperature must not send every score to -inf.
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(int(sampling.top_k), dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1:
        ascending, order = scores.sort(dim=-1)
        remove = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        remove[..., -1] = False
        scores = scores.masked_fill(remove.scatter(-1, order, remove), -math.inf)
    return scores.softmax(dim=-1)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids (...) by inversion; **V marks a row that is no distribution** (NaN, or no positive mass).

    probs: (..., V) non-negative, not necessarily normalised. uniforms: (...) float64 in [0, 1). The cumulative sum is
    in float64: in float32 tokens rarer than 1e-7 would have the wrong probability. A token of probability 0 is never
    drawn.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    goal = uniforms.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, goal, right=True).squeeze(-1)
