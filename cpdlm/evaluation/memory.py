"""Memory that a piece of work takes: what is alive at its worst moment beyond what was alive before it.

Weights that are loaded already do not count; caches, scores and everything in between do. On the CPU this is PyTorch's
allocator, told by the profiler, on CUDA its statistics: bytes of tensors, not of the process (no fragmentation, no Python).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def working_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes alive at once during `work()`, less those alive at its beginning."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    kineto: Any = profiler.profiler
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in kineto.kineto_results.events() if event.name() == "[memory]"
    )
    alive = most = 0
    for _, size in changes:
        alive += size
        most = max(most, alive)
    return most
