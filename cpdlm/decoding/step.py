"""One pass of decoding: draft behind the fixed token, run the trunk over the window, verify.

The loop (`speculative.decode_batch`) keeps the books of what was written; what happens between two of its entries is a pass.
`GrowingPasses` makes them with a cache that grows and rows that leave when they are done; `captured.CapturedPasses` makes
the same ones with tensors of fixed shapes, so that a GPU can replay a pass as one recorded graph.

Letters: B rows, S = K+1 positions of a window, K drafts, J longest path through them, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cpdlm.decoding.cache import Text
from cpdlm.decoding.drafters import Acceptance, Drafter, Proposal, Uniforms, nothing


class DraftingModel(Protocol):
    """What decoding needs of a model; `cpdlm.model.language_model.LanguageModel` has it. draft_ids (optional): (V',) the tokens
    that drafts are made of, where the joint covers a shortlist."""

    horizon: int
    vocab_size: int
    context: int

    def new_cache(self) -> Any: ...

    def hidden(
        self, tokens_BT: Tensor, position_ids_BT: Tensor | None = None, cache: Any = None, mask: Tensor | None = None
    ) -> Tensor: ...

    def target_log_probs(self, hidden: Tensor) -> Tensor: ...

    def draft_joint(self, hidden_BD: Tensor, pending_B: Tensor) -> Any:
        """The `Joint` of what follows the fixed token, or what the strategy given as `draft` takes in its place."""
        ...


class Outcome(Protocol):
    """What a pass yields."""

    def read(self) -> list[list[int]]:
        """Per row: how many drafts were kept, the drafts (those behind the kept ones are not to be read), the token after
        the kept ones (V: the target was no law). The one host synchronisation of a pass."""
        ...


class Forwards(Protocol):
    """runs_ahead: the next pass does not wait for the host, and rows that are done stay (their outcomes are not to be read)."""

    runs_ahead: bool

    def first(self, prompts: Sequence[Tensor]) -> Outcome:
        """The pass over the prompts, (T,) ids each; it has no drafts."""
        ...

    def next(self, kept: Sequence[int], going: Sequence[int], depth: int) -> Outcome:
        """kept: drafts that each row of the last pass keeps. going: the rows that go on. depth: the most drafts of use."""
        ...


def packed(acceptance: Acceptance, out_BX: Tensor | None = None) -> Tensor:
    """(B, J+2): kept, tokens, next; into `out_BX` where it is given."""
    return torch.cat(
        [acceptance.accepted_B[:, None], acceptance.tokens_BJ, acceptance.next_B[:, None]], dim=1, out=out_BX
    )


def last_accepted(acceptance: Acceptance) -> Tensor:
    """(B,) window position of the last kept token: the fixed one (0) where no draft was kept."""
    if acceptance.path_BJ is None:
        return acceptance.accepted_B
    if acceptance.path_BJ.shape[1] == 0:
        return torch.zeros_like(acceptance.accepted_B)
    last_B = acceptance.path_BJ.gather(1, (acceptance.accepted_B - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(acceptance.accepted_B > 0, last_B, 0)


def propose(model: DraftingModel, drafter: Drafter, hidden_BD: Tensor, pending_B: Tensor, depth: int) -> Proposal:
    """Drafts behind the fixed token, as ids of the whole vocabulary."""
    proposal = drafter.draft(model.draft_joint(hidden_BD, pending_B), depth)
    draft_ids: Tensor | None = getattr(model, "draft_ids", None)
    return proposal if draft_ids is None else proposal.on_vocabulary(draft_ids, model.vocab_size)


class GrowingForwards:
    """Passes through a cache that grows; shapes follow the texts.

    process: what changes the target's scores (B, S, V) given the proposal, or None. lap is called at the end of each stretch
    of work, as `decode_batch`'s clock is.
    """

    runs_ahead = False

    def __init__(
        self,
        model: DraftingModel,
        drafter: Drafter,
        uniforms: Uniforms | None,
        rows: int,
        device: torch.device,
        use_cache: bool,
        process: Callable[[Tensor, Proposal], Tensor] | None,
        timer: Callable[[str], None],
    ) -> None:
        self.model, self.drafter, self.uniforms, self.process, self.timer = model, drafter, uniforms, process, timer
        self.text = Text(model, rows, device, use_cache)
        self.prompted = False

    def first(self, prompts: Sequence[Tensor]) -> Outcome:
        self.hidden_BSD = self.text.prefill(prompts)
        self.window_BS = torch.zeros(len(prompts), 1, dtype=torch.long, device=self.hidden_BSD.device)
        return self._verify(nothing(self.window_BS))

    def next(self, kept: Sequence[int], going: Sequence[int], depth: int) -> Outcome:
        acceptance, rows = self.acceptance, len(kept)
        if self.prompted:
            self.text.keep(self.window_BS.shape[1], kept, acceptance.path_BJ)
        self.prompted = True
        if rows == 1 and acceptance.path_BJ is None:
            hidden_BD = self.hidden_BSD[:, kept[0]]
        else:
            hidden_BD = self.hidden_BSD[torch.arange(rows, device=self.hidden_BSD.device), last_accepted(acceptance)]
        next_B = acceptance.next_B
        if len(going) < rows:
            self.text.select(going)
            hidden_BD, next_B = hidden_BD[going], next_B[going]
            if self.uniforms is not None:
                self.uniforms.select(going)
        self.timer("other")
        self.window_BS = next_B[:, None]
        proposal = nothing(self.window_BS)
        if depth > 0:
            proposal = propose(self.model, self.drafter, hidden_BD, next_B, depth)
            self.window_BS = torch.cat([self.window_BS, proposal.tokens_BK], dim=1)
            self.timer("draft")
        self.hidden_BSD = self.text.run(self.window_BS, proposal.depth_BS, proposal.seen_BSS)
        self.timer("trunk")
        return self._verify(proposal)

    def _verify(self, proposal: Proposal) -> Outcome:
        target_BSV = self.model.target_log_probs(self.hidden_BSD)
        if self.process is not None:
            target_BSV = self.process(target_BSV, proposal)
        self.acceptance = self.drafter.verify(target_BSV, proposal)
        return _Made(packed(self.acceptance))


class _Made:
    def __init__(self, packed_BX: Tensor) -> None:
        self.packed_BX = packed_BX

    def read(self) -> list[list[int]]:
        rows: list[list[int]] = self.packed_BX.tolist()
        return rows
