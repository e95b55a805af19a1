"""What the speed benchmark times: decoding with forced acceptance, and the single calls that explain it.

Letters: B batch, T position, N horizon, S window, D width, V vocabulary.
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
from cpdlm.bench.timers import Timer
from cpdlm.decoding import CapturedForwards, Decoded, Options, Sampling, captured, decode_batch
from cpdlm.decoding.drafters import Acceptance, Drafter, Maker, Noise, Uniforms, make_drafter
from cpdlm.decoding.proposals import Proposal, nothing
from cpdlm.model.joint import Joint
from cpdlm.model.language_model import LanguageModel


class Forced:
    """A drafter that does all of another's work and then accepts 0, 1, .. N-1 drafts in turn, rows out of step."""

    def __init__(self, drafter: Drafter, horizon: int) -> None:
        self.drafter, self.horizon = drafter, horizon
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
class ForcedChain:
    """The drafter "chain" with forced acceptance, as `decode_batch` takes a drafter."""

    horizon: int

    def __call__(self, sampling: Sampling, uniforms: Noise | None) -> Forced:
        return Forced(make_drafter("chain", sampling, uniforms), self.horizon)


@dataclass(frozen=True)
class Subject:
    """What decodes. draft: "none" or what makes the drafter; forwards: captured ones, where they are replayed."""

    model: LanguageModel
    draft: str | Maker
    forwards: CapturedForwards | None = None

    @classmethod
    def of(cls, model: LanguageModel, drafts: bool) -> Subject:
        return cls(model, ForcedChain(model.horizon) if drafts else "none")

    @property
    def drafts(self) -> bool:
        return self.draft != "none"

    def captured(self, rows: int, sampling: Sampling, slots: int) -> Subject:
        forwards = CapturedForwards(self.model, rows, sampling, draft=self.draft, slots=slots)
        return replace(self, forwards=forwards)

    def decode(
        self, prompts_BT: Tensor, sampling: Sampling, new_tokens: int, timer: Callable[[str], None]
    ) -> list[Decoded]:
        generators, options = generators_of(prompts_BT), Options(forwards=self.forwards, timer=timer)
        prompts = list(prompts_BT)
        return decode_batch(self.model, prompts, new_tokens, sampling, generators, draft=self.draft, options=options)


def generators_of(rows_BT: Tensor) -> list[torch.Generator]:
    return [torch.Generator(rows_BT.device).manual_seed(row) for row in range(len(rows_BT))]


# --- decoding ----------------------------------------------------------------------------------------------------


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


def timed_decoding(subject: Subject, prompts_BT: Tensor, sampling: Sampling, new_tokens: int) -> Run:
    """One timed call of `decode_batch`."""
    clock = Timer(prompts_BT.device)
    began = clock.now()
    prefill: list[float] = []

    def timer(part: str) -> None:
        if part == "prefill":
            prefill.append(clock.now() - began)

    written = subject.decode(prompts_BT, sampling, new_tokens, timer)
    seconds = clock.now() - began
    tokens, forwards = ([len(one.tokens) for one in written], [one.forwards for one in written])
    return Run(seconds, prefill[0], float(np.mean(tokens)), float(np.mean(forwards)))


def timed_generate(generate: Generate, prompt_T: Tensor, sampling: Sampling, new_tokens: int) -> Run:
    clock = Timer(prompt_T.device)
    began = clock.now()
    written = generate(prompt_T, new_tokens, sampling, 0)
    return Run(clock.now() - began, 0.0, len(written), len(written))


def milliseconds_by_part(
    subject: Subject, prompts_BT: Tensor, sampling: Sampling, new_tokens: int
) -> dict[str, float] | None:
    """Of one decoding. Synchronises at every part, so that the sum may exceed an untimed run.

    None where forwards are replayed: their parts cannot be told apart from outside.
    """
    if subject.forwards is not None:
        return None
    clock = Timer(prompts_BT.device)
    subject.decode(prompts_BT, sampling, new_tokens, clock)
    return {part: seconds * 1e3 for part, seconds in clock.seconds.items()}


# --- single calls ------------------------------------------------------------------------------------------------


class SingleCalls:
    """Target forwards and drafts alone, behind a text of average length, in the order in which decoding makes them.

    The order matters: a call is slower after others have had the processor's caches. So t(1) is taken of calls in a
    row, as autoregressive decoding makes them, t(N) and the draft by turns. Captured calls are timed REPLAYS times in
    a row, as decoding replays them.
    """

    REPLAYS = 10

    def __init__(self, trunk: LanguageModel, text_BT: Tensor, longest: int, sampling: Sampling) -> None:
        """longest: tokens of the largest window, the last ones of text_BT."""
        self.trunk, self.sampling = trunk, sampling
        self.text_BT, self.window_BS = text_BT[:, :-longest], text_BT[:, -longest:]
        self.clock = Timer(text_BT.device)
        self.cache = trunk.new_cache()
        with torch.inference_mode():
            self.hidden_BD = trunk.hidden(self.text_BT, cache=self.cache)[:, -1]
        self.uniforms = None if sampling.greedy else Uniforms(generators_of(text_BT), text_BT.device)
        self.graphs: dict[CapturedForwards, tuple[Callable[[], None], Callable[[], None]]] = {}

    @torch.inference_mode()
    def seconds(self, subject: Subject, calls: int) -> tuple[float, float]:
        """(t(N), draft), medians over `calls`; of autoregressive decoding (t(1), 0)."""
        if subject.forwards is not None:
            return self._captured(subject, subject.forwards, calls)
        horizon = subject.model.horizon if subject.drafts else 1
        target: list[float] = []
        draft: list[float] = []
        for _ in range(calls + 1):  # the first does not count
            draft.append(self._timed(partial(self._draft, subject.model)) if subject.drafts else 0.0)
            target.append(self._timed(partial(self._target, horizon)))
            self.cache.crop(-horizon)
        return float(np.median(target[1:])), float(np.median(draft[1:]))

    def _captured(self, subject: Subject, forwards: CapturedForwards, calls: int) -> tuple[float, float]:
        forwards.uniforms = self.uniforms
        forwards.first(list(self.text_BT))
        if forwards not in self.graphs:
            window_BS = self.window_BS[:, : subject.model.horizon if subject.drafts else 1].contiguous()

            def target() -> None:
                subject.model.target_log_probs(forwards.run(window_BS, nothing(window_BS)))

            def draft() -> None:
                forwards.propose()

            self.graphs[forwards] = captured.record(target, forwards.device), captured.record(draft, forwards.device)
        target_graph, draft_graph = self.graphs[forwards]
        window = [self._timed(target_graph, self.REPLAYS) for _ in range(calls)]
        drafts = [self._timed(draft_graph, self.REPLAYS) if subject.drafts else 0.0 for _ in range(calls)]
        return float(np.median(window)), float(np.median(drafts))

    def _timed(self, call: Callable[[], Any], times: int = 1) -> float:
        began = self.clock.now()
        for _ in range(times):
            call()
        return (self.clock.now() - began) / times

    def _target(self, size: int) -> Tensor:
        return self.trunk.target_log_probs(self.trunk.hidden(self.window_BS[:, :size], cache=self.cache))

    def _draft(self, model: LanguageModel) -> Proposal:
        drafter = make_drafter("chain", self.sampling, self.uniforms)
        proposal = drafter.draft(model.draft_joint(self.hidden_BD, self.window_BS[:, 0]), model.horizon - 1)
        return proposal if model.draft_ids is None else proposal.on_vocabulary(model.draft_ids, model.vocab_size)
