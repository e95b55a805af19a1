"""What the speed benchmark times: decoding with forced acceptance, and the single calls that explain it.

Letters: B batch, T position, N horizon, S window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpdlm.bench.contenders import Generate
from cpdlm.bench.timers import Timer, target_calls
from cpdlm.decoding import CapturedForwards, Decoded, Options, Sampling, captured, decode_batch
from cpdlm.decoding.drafters import Acceptance, Drafter, Maker, Noise, Uniforms, make_drafter
from cpdlm.decoding.drafting import propose
from cpdlm.decoding.proposals import Proposal
from cpdlm.model.joint import Joint
from cpdlm.model.language_model import LanguageModel


class Forced:
    """The drafter "chain": it does all of its work, then accepts 0, 1, .. N-1 drafts in turn, rows out of step."""

    def __init__(self, horizon: int, sampling: Sampling, uniforms: Noise | None) -> None:
        self.drafter: Drafter = make_drafter("chain", sampling, uniforms)
        self.horizon = horizon
        self.forwards: Tensor | None = None  # on the device: a captured forward counts itself

    def draft(self, joint: Joint, depth: int) -> Proposal:
        return self.drafter.draft(joint, depth)

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        acceptance = self.drafter.verify(target_BSV, proposal)
        drafts = proposal.tokens_BK.shape[1]
        if not drafts:
            return acceptance
        turn_B = torch.arange(len(acceptance.accepted_B), device=acceptance.accepted_B.device)
        if self.forwards is None:
            self.forwards = torch.zeros_like(turn_B[:1])
        turn_B = turn_B + self.forwards
        self.forwards.add_(1)
        return replace(acceptance, accepted_B=(turn_B % self.horizon).clamp(max=drafts))


@dataclass(frozen=True)
class Run:
    """seconds: the whole; prefill: up to the first token. tokens and forwards of one row, the mean of the batch."""

    seconds: float
    prefill: float
    tokens: float
    forwards: float

    @property
    def forward_seconds(self) -> float:
        return (self.seconds - self.prefill) / (self.forwards - 1)

    @property
    def token_seconds(self) -> float:
        return self.seconds / self.tokens


class Subject:
    """A model that continues prompts (B, T), drafting with forced acceptance or not at all (horizon 1).

    slots: tokens of the longest text, where forwards are captured; 0 where they are launched.
    """

    def __init__(
        self, model: LanguageModel, prompts_BT: Tensor, sampling: Sampling, *, drafts: bool, slots: int = 0
    ) -> None:
        self.model, self.prompts_BT, self.sampling = model, prompts_BT, sampling
        self.horizon = model.horizon if drafts else 1
        self.draft: str | Maker = partial(Forced, model.horizon) if drafts else "none"
        self.forwards: CapturedForwards | None = None
        if slots:
            self.forwards = CapturedForwards(model, len(prompts_BT), sampling, draft=self.draft, slots=slots)

    def decode(self, new_tokens: int, timer: Callable[[str], None]) -> list[Decoded]:
        return decode_batch(
            self.model,
            list(self.prompts_BT),
            new_tokens,
            self.sampling,
            generators_of(self.prompts_BT),
            draft=self.draft,
            options=Options(forwards=self.forwards, timer=timer),
        )

    def timed(self, new_tokens: int) -> Run:
        clock, prefill = Timer(self.prompts_BT.device), 0.0
        began = clock.now()

        def timer(part: str) -> None:
            nonlocal prefill
            if part == "prefill":
                prefill = clock.now() - began

        written = self.decode(new_tokens, timer)
        seconds = clock.now() - began
        tokens, forwards = ([len(one.tokens) for one in written], [one.forwards for one in written])
        return Run(seconds, prefill, float(np.mean(tokens)), float(np.mean(forwards)))


def timed_generate(generate: Generate, prompt_T: Tensor, sampling: Sampling, new_tokens: int) -> Run:
    clock = Timer(prompt_T.device)
    began = clock.now()
    written = generate(prompt_T, new_tokens, sampling, 0)
    return Run(clock.now() - began, 0.0, len(written), len(written))


def generators_of(rows_BT: Tensor) -> list[torch.Generator]:
    return [torch.Generator(rows_BT.device).manual_seed(row) for row in range(len(rows_BT))]


class SingleCalls:
    """Target forwards and drafts alone, behind a text of average length, in the order in which decoding makes them.

    The order matters: a call is slower after others have had the processor's caches. So t(1) is taken of calls in a
    row, as autoregressive decoding makes them, t(N) and the draft by turns. Captured calls are timed REPLAYS times in
    a row, as decoding replays them.
    """

    REPLAYS = 10

    @torch.inference_mode()
    def __init__(self, trunk: LanguageModel, text_BT: Tensor, horizons: set[int], sampling: Sampling) -> None:
        """horizons: of the windows, the longest of which is the end of text_BT."""
        longest = max(horizons)
        self.text_BT, window_BS = text_BT[:, :-longest], text_BT[:, -longest:]
        self.pending_B, self.sampling = window_BS[:, 0], sampling
        self.targets = target_calls(trunk, self.text_BT, window_BS, sorted({1, *horizons}))
        self.hidden_BD = trunk.hidden(self.text_BT)[:, -1]
        self.clock = Timer(text_BT.device)
        self.times = self.REPLAYS if text_BT.device.type == "cuda" else 1
        self.drafts: dict[Subject, Callable[[], Any]] = {}

    @torch.inference_mode()
    def seconds(self, subject: Subject, calls: int) -> tuple[float, float]:
        """(t(N), draft), medians over `calls`; of autoregressive decoding (t(1), 0)."""
        if subject.horizon > 1 and subject not in self.drafts:
            self.drafts[subject] = self._draft(subject)
        drafts: list[float] = []
        target: list[float] = []
        for _ in range(calls + 1):  # the first does not count
            drafts.append(self._timed(self.drafts[subject])[0] if subject.horizon > 1 else 0.0)
            seconds, undo = self._timed(self.targets[subject.horizon])
            undo()
            target.append(seconds)
        return float(np.median(target[1:])), float(np.median(drafts[1:]))

    def _draft(self, subject: Subject) -> Callable[[], Any]:
        device, forwards = self.text_BT.device, subject.forwards
        uniforms = None if self.sampling.greedy else Uniforms(generators_of(self.text_BT), device)
        if forwards is not None:
            forwards.uniforms = uniforms
            forwards.first(list(self.text_BT))

            def step() -> None:
                forwards.propose()

            return captured.record(step, device)
        drafter = make_drafter("chain", self.sampling, uniforms)
        return partial(propose, subject.model, drafter, self.hidden_BD, self.pending_B, subject.horizon - 1)

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds, and what the last of the calls gave."""
        began = self.clock.now()
        for _ in range(self.times):
            result = call()
        return (self.clock.now() - began) / self.times, result
