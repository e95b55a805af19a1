"""Acceptance statistics from what the decoder returned: counts first, means and intervals from the counts.

The tokens are recounted from the ids. Plain decoding has exactly one token per pass, the pass over the prompt included;
the fixed token is never counted as a draft, depth k means x_{t+k}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpdlm.decoding import Decoded, Sampling, decode_batch
from cpdlm.model.language_model import LanguageModel

RESAMPLES = 2000


def bootstrap_ratio(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> dict[str, float]:
    """{"mean", "low", "high"} of sum(numerator) / sum(denominator), 95 % percentile interval over paired resamples."""
    top, bottom = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(top), (RESAMPLES, len(top)))
    low, high = np.percentile(top[picks].sum(axis=1) / bottom[picks].sum(axis=1), [2.5, 97.5])
    return {"mean": float(top.sum() / bottom.sum()), "low": float(low), "high": float(high)}


def acceptance(decoded: Sequence[Sequence[Decoded]], horizon: int, seed: int = 0) -> dict[str, Any]:
    """The acceptance part of a record's mode. decoded: per prompt, its repeats.

    Resampling is over prompts, each with all of its repeats: texts of one prompt are not independent.
    """
    runs = [run for prompt in decoded for run in prompt]
    tokens = [sum(len(run.tokens) for run in prompt) for prompt in decoded]
    forwards = [sum(run.forwards for run in prompt) for prompt in decoded]
    histogram = [0] * horizon
    for run in runs:
        assert sum(run.emitted) == len(run.tokens), (
            f"passes emitted {sum(run.emitted)} tokens, the text has {len(run.tokens)}"
        )
        for count in run.emitted:
            histogram[count - 1] += 1
    return {
        "tokens": sum(tokens),
        "passes": sum(forwards),
        "tokens_per_pass": bootstrap_ratio(tokens, forwards, seed),
        "emitted_histogram": histogram,
        "acceptance_by_depth": [
            {
                "depth": depth,
                "reached": sum(run.reached[depth - 2] for run in runs),
                "accepted": sum(run.accepted[depth - 2] for run in runs),
            }
            for depth in range(2, horizon + 1)
        ],
        "per_prompt": {"tokens": tokens, "passes": forwards},
        "drafts_per_prompt": {
            key: [[sum(getattr(run, key)[k] for run in prompt) for prompt in decoded] for k in range(horizon - 1)]
            for key in ("reached", "accepted")
        },
    }


def tokens_per_forward(model: LanguageModel, prompts_PT: Tensor, new_tokens: int) -> dict[str, float]:
    """{"greedy_tokens_per_pass", "sampling_tokens_per_pass"} on a few prompts, decoded as one batch: a point of a curve."""
    found = {}
    for name, sampling in {"greedy": Sampling(0.0), "sampling": Sampling()}.items():
        generators = [torch.Generator().manual_seed(index) for index in range(len(prompts_PT))]
        written = decode_batch(model, list(prompts_PT), new_tokens, sampling, generators)
        found[f"{name}_tokens_per_pass"] = sum(len(run.tokens) for run in written) / sum(
            run.forwards for run in written
        )
    return found
