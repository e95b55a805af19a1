"""A draft length that pays: how many drafts a target forward verifies, from what they cost here and how often they are
right.

A draft pays while the tokens that it is expected to yield exceed the tokens that its time would yield otherwise:

    sum over rows of P(the draft and all before it are accepted)  >=  rate (t(B (m+1)) - t(B m)),

where t(n) is the time of a target forward of n tokens and rate the tokens per millisecond written lately. The first
draft that does not pay ends the window; t is taken as the largest convex curve below what was measured, so that no
later one would pay either.

Whether draft k is verified must not depend on x_k where x_k is drawn, or the text would be distributed otherwise: with
p = (.7, .3), q = (.5, .5) and x = 0 alone verified, 0 is written with probability .85. What is asked here is known
before the draw: how sure the joint is at k given x_1..x_{k-1}, the match of a copy, and how often such drafts were
accepted in earlier forwards.

Letters: B rows, K drafts, S = K+1 positions of a window, M nodes of a tree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch

from cpdlm.decoding.drafters import Uniforms, make_drafter
from cpdlm.decoding.filtering import Sampling, is_whole
from cpdlm.decoding.model import DraftingModel
from cpdlm.decoding.proposals import Proposal, nothing, tree

Points = Mapping[int, float]
GREEDY, CPU = Sampling(0.0), torch.device("cpu")
BINS = 4  # of the joint's confidence
FORGET = 0.98  # of what was counted, per forward
TRUST = 4.0  # how many tests a guess is worth before anything was counted
LATE = 0.9  # what is kept per forward of the tokens and milliseconds that the rate is made of
HOPE = 0.5  # tokens of a row that the heads' drafts are thought to bring beyond what their verification costs
LEARN, RETRY = 0.2, 0.004  # how fast it is learnt what they bring, and hoped again while they are not asked
MATCHED = 0.75  # the guess for a copied draft
FULL = 16  # tokens of a forward from which on a processor takes as much longer for more tokens as they bring


@dataclass(frozen=True)
class Costs:
    """Milliseconds on this machine. forward: of a target forward, by its number of tokens. draft: of the heads' drafts,
    by the number of rows; of other numbers by straight lines. Raises ValueError on fewer than two forwards, on numbers
    below 1 and on times that are not above 0."""

    forward: Points
    draft: Points

    def __post_init__(self) -> None:
        for name, points, fewest in (("forward", self.forward, 2), ("draft", self.draft, 1)):
            right = all(is_whole(n) and isinstance(ms, Real) and 0 < ms < math.inf for n, ms in points.items())
            if len(points) < fewest or not right:
                raise ValueError(
                    f"costs: {name}={dict(points)} must give milliseconds above 0 for at least {fewest} numbers "
                    "from 1; type for example forward={1: 20.0, 8: 26.0}, draft={1: 2.0}"
                )

    @classmethod
    @torch.inference_mode()
    def measure(
        cls,
        model: DraftingModel,
        sampling: Sampling = GREEDY,
        device: torch.device = CPU,
        sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
        rows: Sequence[int] = (1, 4, 16),
    ) -> Costs:
        """The fastest of four runs each, behind 64 tokens of text; seconds for a model of 100M parameters."""
        before = max(1, min(64, model.context - max(sizes)))
        text_1T, cache = torch.zeros(1, before, dtype=torch.long, device=device), model.new_cache()
        hidden_1D = model.hidden(text_1T, cache=cache)[:, -1]
        score = model.target_scores if sampling.greedy else model.target_log_probs

        def forward(size: int) -> None:
            score(model.hidden(text_1T[:, :1].expand(1, size), cache=cache))
            cache.crop(-size)

        def draft(batch: int) -> None:
            noise = None if sampling.greedy else Uniforms([torch.Generator(device)] * batch, device)
            joint = model.draft_joint(hidden_1D.expand(batch, -1), text_1T[0, :1].expand(batch))
            make_drafter("chain", sampling, noise).draft(joint, model.horizon - 1)

        def fastest(call: Callable[[int], None], size: int) -> float:
            return 1000 * min(seconds_of(lambda: call(size), device) for _ in range(4))

        drafts = {each: fastest(draft, each) for each in rows} if model.horizon > 1 else {1: 1e-3}
        return cls({size: fastest(forward, size) for size in sizes}, drafts)


def batch_limit(rows: int, device: torch.device) -> int:
    """Tokens of a forward, 0 for no limit, at which a batch stops drafting where nothing was measured: `FULL` on a
    processor. A text then depends on its seed and batch, not on a clock."""
    return FULL if rows > 1 and device.type == "cpu" else 0


def seconds_of(call: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def convex(points: Points) -> list[tuple[int, float]]:
    """The corners of the largest convex curve below the points."""
    hull: list[tuple[int, float]] = []
    for n, y in sorted(points.items()):
        while len(hull) > 1 and _at([hull[-2], (n, y)], hull[-1][0]) <= hull[-1][1]:
            hull.pop()
        hull.append((n, y))
    return hull


def _at(corners: Sequence[tuple[int, float]], n: float) -> float:
    """By straight lines; the first and the last one go on."""
    if len(corners) == 1:
        return corners[0][1]
    index = next((i for i in range(1, len(corners) - 1) if n <= corners[i][0]), len(corners) - 1)
    (n0, y0), (n1, y1) = corners[index - 1 : index + 1]
    return y0 + (y1 - y0) * (n - n0) / (n1 - n0)


Kind = tuple[int, int]  # of the heads' drafts (depth, bin of the confidence), of copied ones (0, length of the match)


class Rates:
    """How often drafts of each kind were accepted once all before them were; guesses at first, and again in the end.

    drawn: whether the heads' drafts are drawn; the joint's confidence then says less of their acceptance.
    """

    def __init__(self, drawn: bool) -> None:
        self.drawn = drawn
        self.counts: dict[Kind, tuple[float, float]] = {}  # tested and accepted

    def __getitem__(self, kind: Kind) -> float:
        tested, accepted = self.counts.get(kind, (0.0, 0.0))
        return (accepted + TRUST * self._guess(kind)) / (tested + TRUST)

    def _guess(self, kind: Kind) -> float:
        depth, index = kind
        if depth == 0:
            return MATCHED
        sure = (index + 0.5) / BINS
        return 0.4 + 0.5 * sure if self.drawn else sure

    def count(self, kind: Kind, accepted: bool) -> None:
        before = self.counts.get(kind, (0.0, 0.0))
        self.counts[kind] = before[0] + 1, before[1] + accepted

    def forget(self) -> None:
        self.counts = {kind: (FORGET * tested, FORGET * right) for kind, (tested, right) in self.counts.items()}


@dataclass(frozen=True)
class _Window:
    """Drafts, per row: tokens, the window position before each, kinds, and the chances that each draft and all before
    it are accepted."""

    tokens: list[list[int]]
    parents: list[list[int]]
    kinds: list[list[Kind]]
    chances: list[list[float]]

    @classmethod
    def of(cls, proposal: Proposal, matched: Sequence[Sequence[int]], rates: Rates) -> _Window:
        rows, drafts = proposal.tokens_BK.shape
        parents = [[*range(drafts)]] * rows if proposal.parents_BK is None else proposal.parents_BK.tolist()
        sure = [[0.5] * drafts] * rows
        if proposal.confidence is not None:
            sure = proposal.confidence().nan_to_num(nan=0.0).tolist()
        tokens, kinds, chances = proposal.tokens_BK.tolist(), [], []
        for row in range(rows):
            depths, chance, kind = [0], [1.0], []
            for k, parent in enumerate(parents[row]):
                depths.append(depths[parent] + 1)
                index = min(int(BINS * sure[row][k]), BINS - 1) if not matched[row][k] else matched[row][k]
                kind.append((0 if matched[row][k] else depths[-1], index))
                chance.append(chance[parent] * rates[kind[-1]] if tokens[row][k] >= 0 else 0.0)
            kinds.append(kind)
            chances.append(chance[1:])
        return cls(tokens, parents, kinds, chances)

    def count(self, row: int, verified: Sequence[int], emitted: Sequence[int], rates: Rates) -> None:
        """A draft behind an accepted one was tested: against the token that was emitted there."""
        tokens, parents, at = self.tokens[row], self.parents[row], 0
        for token in emitted:
            tested = [k for k in verified if parents[k] == at and tokens[k] >= 0]
            for k in tested:
                rates.count(self.kinds[row][k], tokens[k] == token)
            at = next((k + 1 for k in tested if tokens[k] == token), -1)


class DraftLength:
    """Chooses how many drafts are verified, forward by forward, for the rows of one decoding."""

    def __init__(self, costs: Costs, rows: int, drawn: bool) -> None:
        self.forward, self.heads, self.rates = convex(costs.forward), sorted(costs.draft.items()), Rates(drawn)
        self.tokens, self.milliseconds = float(rows), _at(self.forward, rows)  # autoregressive to begin with
        self.surplus = HOPE
        # Of the forward under way: its drafts, those of each row that are verified, and its cost.
        none: list[list[Any]] = [[]] * rows
        self.window, self.verified, self.spent = _Window(none, none, none, none), none, self.milliseconds

    @property
    def rate(self) -> float:
        """Tokens per millisecond."""
        return self.tokens / self.milliseconds

    def heads_pay(self, rows: int) -> bool:
        """Whether to ask the heads for drafts, from what they brought when they were asked last."""
        pays = self.surplus * rows >= self.rate * _at(self.heads, rows)
        if not pays:
            self.surplus += RETRY * (HOPE - self.surplus)
        return pays

    def paying(self, proposal: Proposal, matched: Sequence[Sequence[int]], asked: bool) -> Proposal:
        """The drafts that pay, as many for every row. matched: per draft the length of the match that it is copied
        from, 0 for the heads'. asked: whether the heads were."""
        rows, drafts = proposal.tokens_BK.shape
        window = self.window = _Window.of(proposal, matched, self.rates)
        best = [sorted(range(drafts), key=each.__getitem__, reverse=True) for each in window.chances]
        size, brought, spent = 0, 0.0, _at(self.forward, rows)
        while size < drafts:
            gain = sum(chances[order[size]] for chances, order in zip(window.chances, best, strict=True))
            longer = _at(self.forward, rows * (size + 2))
            surplus = gain - self.rate * (longer - spent)
            if gain == 0 or surplus < 0:
                break
            size, brought, spent = size + 1, brought + surplus, longer
        if asked and not any(map(any, matched)):
            self.surplus += LEARN * (brought / rows - self.surplus)
        spent += _at(self.heads, rows) if asked else 0.0
        self.spent, self.verified = spent, [sorted(order[:size]) for order in best]
        return proposal if size == drafts else shortened(proposal, self.verified)

    def tell(self, emitted: Sequence[Sequence[int]]) -> None:
        """Per row, what the forward wrote: accepted drafts and the token after them."""
        self.rates.forget()
        for row, tokens in enumerate(emitted):
            self.window.count(row, self.verified[row], tokens, self.rates)
        self.tokens = LATE * self.tokens + sum(map(len, emitted))
        self.milliseconds = LATE * self.milliseconds + self.spent


def shortened(proposal: Proposal, chosen: Sequence[Sequence[int]]) -> Proposal:
    """The drafts of these columns of each row, in order, as many in every row; those of a chain are its first."""
    size = len(chosen[0])
    if size == 0:
        return nothing(proposal.tokens_BK)
    if proposal.parents_BK is None or proposal.depth_BS is None:
        probs = proposal.distributions
        return replace(
            proposal, tokens_BK=proposal.tokens_BK[:, :size], distributions=None if probs is None else probs[:, :size]
        )
    index_BM = torch.tensor(chosen, device=proposal.tokens_BK.device)
    order_BM = torch.arange(1, size + 1, device=index_BM.device).expand_as(index_BM)
    new_BS = torch.zeros_like(proposal.depth_BS).scatter(1, index_BM + 1, order_BM)
    parents_BM = new_BS.gather(1, proposal.parents_BK.gather(1, index_BM))
    kept = tree(proposal.tokens_BK.gather(1, index_BM), parents_BM, proposal.deepest)
    return replace(kept, distributions=proposal.distributions)
