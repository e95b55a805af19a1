"""Timers that synchronise at both ends, counts by a hook, and how the time of a decoding splits.

Letters: B rows, T positions, S tokens of a window, P prompts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from cpdlm.decoding import CapturedForwards, Sampling
from cpdlm.decoding.captured import record
from cpdlm.decoding.proposals import nothing
from cpdlm.model.language_model import LanguageModel
from cpdlm.processes import PauseWatch

PARTS = ("prefill", "draft", "trunk", "verify", "other")
TRIES = 5  # of a timed call, where pauses fall into it


Result = TypeVar("Result")


class StoodStill(RuntimeError):
    """The process was stopped again and again while it was timed: nothing can be measured here."""


def undisturbed(
    call: Callable[[], Result], watch: PauseWatch, say: Callable[[str], None] = lambda line: None
) -> Result:
    """The result of a timed call in which this process did not stand still; one in which it did is made again.

    Raises StoodStill after TRIES of them.
    """
    for _ in range(TRIES):
        before = watch.total()
        result = call()
        paused = watch.total() - before
        if not paused:
            return result
        say(f"measured again: the process stood still for {paused:.1f} s")
    raise StoodStill(f"{TRIES} times in a row this process stood still while it was timed; measure on a quiet machine")


@dataclass
class Counter:
    count: int = 0


def count_forwards(model: LanguageModel) -> AbstractContextManager[Counter]:
    """Counts by a forward hook on the trunk's body, independently of the decoding loop."""
    return count_calls(model.trunk.body)


@contextmanager
def count_calls(module: nn.Module) -> Iterator[Counter]:
    counter = Counter()

    def count(*call: Any) -> None:
        counter.count += 1

    hook = module.register_forward_hook(count)
    try:
        yield counter
    finally:
        hook.remove()


class Timer:
    """Seconds per part; `decode` calls it at the end of each stretch of work. Synchronises on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, part: str) -> None:
        now = self.now()
        self.seconds[part] += now - self.last
        self.last = now


@torch.inference_mode()
def forward_milliseconds(model: LanguageModel, prompts_PT: Tensor, new_tokens: int) -> tuple[float, float]:
    """Median ms of a target forward (trunk through the cache, and output layer) of 1 and of `horizon` tokens.

    Behind a text of half the new tokens, in five turns of six consecutive calls, as decoding makes them, each after two
    that do not count. The cache's rollback is not timed. On CUDA both are recorded graphs, as they are in decoding.
    """
    device, horizon = prompts_PT.device, model.horizon
    row_T = prompts_PT.flatten()
    length = min(prompts_PT.shape[1] + new_tokens // 2, model.context - horizon)
    text_T = row_T.repeat(-(-(length + horizon) // len(row_T)))[: length + horizon]
    calls = target_calls(model, text_T[None, :length], text_T[None, length:], (1, horizon))
    timer = Timer(device)
    taken: dict[int, list[float]] = {1: [], horizon: []}
    for _ in range(5):
        for count, seconds in taken.items():
            for call in range(6 + 2):
                start = timer.now()
                rollback = calls[count]()
                if call > 1:
                    seconds.append(timer.now() - start)
                rollback()
    one, window = (float(np.median(taken[count])) * 1e3 for count in (1, horizon))
    return one, window


@torch.inference_mode()
def target_calls(
    model: LanguageModel, text_BT: Tensor, window_BS: Tensor, sizes: Sequence[int]
) -> dict[int, Callable[[], Callable[[], None]]]:
    """Per size: a target forward behind `text_BT` of so many tokens of window_BS; a call returns what undoes it."""
    if text_BT.device.type == "cuda":
        slots = text_BT.shape[1] + window_BS.shape[1]
        forwards = CapturedForwards(model, len(text_BT), Sampling(0.0), draft="none", slots=slots)
        forwards.first(list(text_BT))

        def replayed(size: int) -> Callable[[], Callable[[], None]]:
            part_BS = window_BS[:, :size].contiguous()

            def target() -> None:
                model.target_log_probs(forwards.run(part_BS, nothing(part_BS)))

            replay = record(target, text_BT.device)

            def call() -> Callable[[], None]:
                replay()
                return lambda: None  # a window counts only once it is committed

            return call

        return {size: replayed(size) for size in sizes}
    cache = model.new_cache()
    model.hidden(text_BT, cache=cache)

    def run(size: int) -> Callable[[], None]:
        model.target_log_probs(model.hidden(window_BS[:, :size], cache=cache))
        return lambda: cache.crop(-size)

    return {size: partial(run, size) for size in sizes}
