"""Memory that work takes, decoding above all: what is alive at its worst moments beyond what was alive before it.

The forward over a long prompt takes more than anything after it, and is the same for every method. So hooks separate
the target's forwards, and what comes after the first is reported by itself. Weights that are loaded already do not
count; caches, scores and everything in between do. The numbers are PyTorch's allocator's, from the profiler on the
CPU, from its statistics on CUDA: bytes of tensors, not of the process (no fragmentation, no Python).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_BEGINS, _ENDS = "a forward begins", "a forward ends"


@dataclass(frozen=True)
class Memory:
    """Bytes. whole: most alive at once, less those alive before. later: the same, after the target's first forward.

    between: most alive between two forwards, or after the last, less those alive at the end of the one before."""

    whole: int
    later: int
    between: int


@dataclass
class _Stretch:
    """Work within or between forwards. began, most: bytes alive at its beginning, and most alive in it."""

    is_forward: bool
    began: int
    most: int


def working_memory(work: Callable[[], Any], target: nn.Module, device: torch.device) -> Memory:
    """What `work()` takes, whose forwards are calls of `target`. Raises ValueError where it makes none."""
    stretches = _stretches(work, target, device)
    after = stretches[2:]  # after the first forward
    if not after:
        raise ValueError("the work makes no forward of the target; give the module whose calls are its forwards")
    return Memory(
        max(each.most for each in stretches),
        max(each.most for each in after),
        max(each.most - each.began for each in after if not each.is_forward),
    )


def most_alive(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes: most alive at once in `work()`, less those alive before it."""
    (whole,) = _stretches(work, nn.Identity(), device)
    return whole.most


def _stretches(work: Callable[[], Any], target: nn.Module, device: torch.device) -> list[_Stretch]:
    return _on_cuda(work, target, device) if device.type == "cuda" else _on_cpu(work, target)


def _on_cpu(work: Callable[[], Any], target: nn.Module) -> list[_Stretch]:
    def mark(name: str) -> None:
        with torch.profiler.record_function(name):
            pass

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says that it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        _with_hooks(work, target, mark)
    kineto: Any = profiler.profiler
    events = [
        (event.start_ns(), event.nbytes(), event.name())
        for event in kineto.kineto_results.events()
        if event.name() in ("[memory]", _BEGINS, _ENDS)
    ]
    stretches, alive = [_Stretch(False, 0, 0)], 0
    for _, size, name in sorted(events):
        if name == "[memory]":
            alive += size
            stretches[-1].most = max(stretches[-1].most, alive)
        else:
            stretches.append(_Stretch(name == _BEGINS, alive, alive))
    return stretches


def _on_cuda(work: Callable[[], Any], target: nn.Module, device: torch.device) -> list[_Stretch]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    stretches = [_Stretch(False, 0, 0)]
    torch.cuda.reset_peak_memory_stats(device)

    def close() -> None:
        stretches[-1].most = torch.cuda.max_memory_allocated(device) - before

    def mark(name: str) -> None:
        close()
        alive = torch.cuda.memory_allocated(device) - before
        stretches.append(_Stretch(name == _BEGINS, alive, alive))
        torch.cuda.reset_peak_memory_stats(device)

    _with_hooks(work, target, mark)
    close()
    return stretches


def _with_hooks(work: Callable[[], Any], target: nn.Module, mark: Callable[[str], None]) -> None:
    hooks = [
        target.register_forward_pre_hook(lambda *call: mark(_BEGINS)),
        target.register_forward_hook(lambda *call: mark(_ENDS)),
    ]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
