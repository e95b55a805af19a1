"""Acceptance statistics from what the decoder returned: counts first, means and intervals from the counts.

The tokens are recounted from the ids. Autoregressive decoding has exactly one token per forward, the prompt's forward
included. The pending token is never counted as a draft. Depth k means x_{t+k}.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpdlm.bench.intervals import of_ratio
from cpdlm.decoding import Decoded, Sampling, decode_batch
from cpdlm.model.language_model import LanguageModel


def acceptance(decoded: Sequence[Sequence[Decoded]], horizon: int) -> dict[str, Any]:
    """The acceptance part of a record's mode. decoded: per prompt, its repeats.

    Intervals are over prompts, each with all of its repeats: texts of one prompt are not independent.
    """
    runs = [run for prompt in decoded for run in prompt]
    tokens = [sum(len(run.tokens) for run in prompt) for prompt in decoded]
    forwards = [sum(run.forwards for run in prompt) for prompt in decoded]
    depths = max(horizon - 1, *(len(run.reached) for run in runs))  # copies from the text may be deeper
    histogram = [0] * (depths + 1)
    for run in runs:
        assert sum(run.emitted) == len(run.tokens), (
            f"forwards emitted {sum(run.emitted)} tokens, the text has {len(run.tokens)}"
        )
        for count in run.emitted:
            histogram[count - 1] += 1
    return {
        "tokens": sum(tokens),
        "passes": sum(forwards),
        "tokens_per_pass": of_ratio(tokens, forwards),
        "emitted_histogram": histogram,
        "acceptance_by_depth": [
            {
                "depth": depth,
                "reached": sum(run.reached[depth - 2] for run in runs),
                "accepted": sum(run.accepted[depth - 2] for run in runs),
            }
            for depth in range(2, depths + 2)
        ],
        "per_prompt": {"tokens": tokens, "passes": forwards},
        "drafts_per_prompt": {
            key: [[sum(getattr(run, key)[k] for run in prompt) for prompt in decoded] for k in range(depths)]
            for key in ("reached", "accepted")
        },
    }


def tokens_per_forward(model: LanguageModel, prompts_PT: Tensor, new_tokens: int) -> dict[str, float]:
    """{"greedy_tokens_per_pass", "sampling_tokens_per_pass"} on a few prompts, as one batch."""
    found = {}
    for name, sampling in {"greedy": Sampling(0.0), "sampling": Sampling()}.items():
        generators = [torch.Generator().manual_seed(index) for index in range(len(prompts_PT))]
        written = decode_batch(model, list(prompts_PT), new_tokens, sampling, generators)
        found[f"{name}_tokens_per_pass"] = sum(len(run.tokens) for run in written) / sum(
            run.forwards for run in written
        )
    return found
