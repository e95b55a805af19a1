"""What each forward drafts: copies from the text, the heads' drafts, or both, and how many of them are verified.

A row whose text repeats itself takes what followed before: as its chain in place of the heads' drafts, or as one more
branch of their tree. Copies are deterministic drafts: as a chain beside drawn ones, their draft q is 1 on their tokens.

Letters: B rows, K drafts, M nodes of a tree, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cpdlm.decoding.drafters import BRANCHES, LOOKUP, Branched, Drafter, RejectionSampling
from cpdlm.decoding.length import Costs, DraftLength, shortened
from cpdlm.decoding.lookup import NOTHING, Copy, Lookup, LookupSettings
from cpdlm.decoding.model import DraftingModel
from cpdlm.decoding.proposals import Proposal, nothing, tree

UNLIMITED = 2**31  # more drafts than any window has


def propose(model: DraftingModel, drafter: Drafter, hidden_BD: Tensor, pending_B: Tensor, depth: int) -> Proposal:
    """At most `depth` drafts of the heads behind the pending token, as ids of the whole vocabulary."""
    if depth == 0:
        return nothing(pending_B)
    proposal = drafter.draft(model.draft_joint(hidden_BD, pending_B), depth)
    return proposal if model.draft_ids is None else proposal.on_vocabulary(model.draft_ids, model.vocab_size)


@dataclass
class Drafting:
    """heads: how deep their drafts are, 0 for none. grows: they are a tree. lookups: one per row, or none. length: None
    verifies all drafts, as far as a forward then has most_tokens tokens at most (0: however many)."""

    model: DraftingModel
    drafter: Drafter
    heads: int
    grows: bool
    lookups: list[Lookup] = field(default_factory=list)
    length: DraftLength | None = None
    most_tokens: int = 0

    @classmethod
    def of(
        cls,
        model: DraftingModel,
        drafter: Drafter,
        draft: str,
        prompts: Sequence[Tensor],
        settings: LookupSettings,
        costs: Costs | None,
        most_tokens: int,
    ) -> Drafting:
        """draft: the drafter's name. costs, most_tokens: of `loop.Options`."""
        lookups = [Lookup(prompt_T.tolist(), settings) for prompt_T in prompts] if draft.startswith(LOOKUP) else []
        length = None
        if costs is not None and isinstance(drafter, Branched):  # branches depend on the token that was drawn
            raise ValueError(f"costs= cannot choose among the drafts of draft={draft!r}; pass draft='lookup+block'")
        if costs is not None and draft != "none":
            length = DraftLength(costs, len(prompts), drawn=isinstance(drafter, RejectionSampling))
        heads = 0 if draft in ("none", LOOKUP) else model.horizon - 1
        most_tokens = most_tokens if costs is None else 0
        return cls(model, drafter, heads, draft.endswith(BRANCHES), lookups, length, most_tokens)

    def propose(self, hidden_BD: Tensor, pending_B: Tensor, room: int) -> Proposal:
        """Drafts of at most `room` tokens behind the pending one, which the lookups know."""
        rows = len(pending_B)
        most = max(0, self.most_tokens // rows - 1) if self.most_tokens else UNLIMITED
        room = min(room, most)
        copies = [lookup.draft(room) for lookup in self.lookups] or [NOTHING] * rows
        asked = self.heads > 0 and room > 0 and (self.grows or not all(copy.tokens for copy in copies))
        if asked and self.length is not None:
            asked = self.length.heads_pay(rows)
        depth = min(self.heads, room) if asked else 0
        proposal = propose(self.model, self.drafter, hidden_BD, pending_B, depth)
        matched = [[0] * proposal.tokens_BK.shape[1]] * rows
        if any(copy.tokens for copy in copies):
            if self.grows:
                proposal, matched = grafted(proposal, copies)
            else:
                drawn = self.model.vocab_size if isinstance(self.drafter, RejectionSampling) else 0
                proposal, matched = copied(proposal, copies, drawn)
        if self.length is not None:
            return self.length.paying(proposal, matched, asked)
        return proposal if proposal.tokens_BK.shape[1] <= most else shortened(proposal, [[*range(most)]] * rows)

    def tell(self, emitted: Sequence[Sequence[int]]) -> None:
        """What each row of the forward wrote."""
        for lookup, tokens in zip(self.lookups, emitted, strict=bool(self.lookups)):
            lookup.extend(tokens)
        if self.length is not None:
            self.length.tell(emitted)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.lookups = [self.lookups[row] for row in rows] if self.lookups else []


Matched = list[list[int]]  # per draft, the length of the match that it is copied from; 0 for the heads'


def copied(proposal: Proposal, copies: Sequence[Copy], vocab_size: int) -> tuple[Proposal, Matched]:
    """Rows that have a copy take it in place of their chain. vocab_size: 0 where no draft q is needed."""
    rows, drafts = proposal.tokens_BK.shape
    width = max(drafts, *(len(copy.tokens) for copy in copies))
    tokens_BK = torch.nn.functional.pad(proposal.tokens_BK, (0, width - drafts), value=-1)
    found = [row for row in range(rows) if copies[row].tokens]
    for row in found:
        tokens = [*copies[row].tokens, *[-1] * (width - len(copies[row].tokens))]
        tokens_BK[row] = torch.tensor(tokens, device=tokens_BK.device)
    probs_BKV = None
    if vocab_size:
        like = proposal.distributions if proposal.distributions is not None else tokens_BK.new_zeros(0).float()
        probs_BKV = like.new_zeros(rows, width, vocab_size)
        probs_BKV.scatter_(2, tokens_BK.clamp(min=0).unsqueeze(-1), 1.0)
        for row in set(range(rows)).difference(found) if drafts else ():
            probs_BKV[row, :drafts] = proposal.distributions[row]
        if len(found) < rows:
            probs_BKV = probs_BKV.masked_fill((tokens_BK < 0).unsqueeze(-1), math.nan)
    matched = [[copy.matched] * width for copy in copies]
    sure = _wider(proposal.confidence, width - drafts)
    return replace(proposal, tokens_BK=tokens_BK, distributions=probs_BKV, confidence=sure), matched


def grafted(proposal: Proposal, copies: Sequence[Copy]) -> tuple[Proposal, Matched]:
    """The heads' tree, with a branch for each row's copy; drafts that both have are one node."""
    drafts, device = proposal.tokens_BK.shape[1], proposal.tokens_BK.device
    tokens = proposal.tokens_BK.tolist()
    parents = [[] for _ in copies] if proposal.parents_BK is None else proposal.parents_BK.tolist()
    matched = [[0] * drafts for _ in copies]
    for row, copy in enumerate(copies):
        at = 0
        for token in copy.tokens:
            nodes = zip(parents[row], tokens[row], strict=True)
            node = next((k for k, each in enumerate(nodes) if each == (at, token)), len(tokens[row]))
            if node == len(tokens[row]):
                tokens[row].append(token)
                parents[row].append(at)
                matched[row].append(0)
            matched[row][node], at = copy.matched, node + 1
    width = max(map(len, tokens))
    for filler, lists in ((-1, tokens), (0, parents), (0, matched)):
        for each in lists:
            each.extend([filler] * (width - len(each)))
    deepest = max(proposal.deepest, *(len(copy.tokens) for copy in copies))
    grown = tree(torch.tensor(tokens, device=device), torch.tensor(parents, device=device), deepest)
    sure = _wider(proposal.confidence, width - drafts)
    return replace(grown, distributions=proposal.distributions, confidence=sure), matched


def _wider(confidence: Callable[[], Tensor] | None, columns: int) -> Callable[[], Tensor] | None:
    return None if confidence is None else lambda: torch.nn.functional.pad(confidence(), (0, columns))
