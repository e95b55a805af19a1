"""Learning rate as a function of the step."""

import math

from cpdlm.config import OptimConfig


def learning_rate_factor(step: int, optim: OptimConfig) -> float:
    """Share of the peak learning rate at optimiser step `step` (from 0): linear warm-up, then cosine to `floor`."""
    if step < optim.warmup:
        return (step + 1) / (optim.warmup + 1)
    done = min(1.0, (step - optim.warmup) / max(1, optim.steps - optim.warmup))
    return optim.floor + (1 - optim.floor) * 0.5 * (1 + math.cos(math.pi * done))
