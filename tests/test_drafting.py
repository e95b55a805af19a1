"""Lookup beside the heads, and a draft length that pays: what is written keeps the target's distribution.

The draft length is judged by enumeration: over all drafts of a window, what the rule verifies and the acceptance test
emits must be distributed as the target, to 1e-12. A rule that looks at the drawn token is planted, and noticed.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cpdlm.decoding import CapturedForwards, Costs, LookupSettings, Options, Sampling, decode, decode_batch, drafters
from cpdlm.decoding.drafters import make_drafter
from cpdlm.decoding.drafting import copied, grafted
from cpdlm.decoding.length import DraftLength, convex
from cpdlm.decoding.lookup import NOTHING, Copy
from cpdlm.decoding.proposals import Proposal, grow
from cpdlm.model.language_model import LanguageModel
from tests import oracle
from tests.test_block_and_tree import joint as made_joint
from tests.test_drafters import RAGGED, real, toy
from tests.toy import truth

LENGTH, PROMPT, SAMPLES = 4, (2, 0), 500
COPIES = LookupSettings(least=1, most=3)  # in texts of six tokens
STEEP = Costs({1: 1.0, 2: 1.4, 3: 1.9, 4: 2.6}, {1: 0.01})  # where a draft must be likely to pay


# --- copies ---------------------------------------------------------------------------------------------------------


def test_rows_without_a_copy_keep_their_drafts() -> None:
    probs_BKV = torch.rand(3, 2, 5).softmax(dim=-1)
    heads = Proposal(torch.tensor([[1, 2], [3, 4], [0, 1]]), probs_BKV)
    mixed, matched = copied(heads, [NOTHING, Copy([4, 4, 0], 5), NOTHING], vocab_size=5)
    assert mixed.tokens_BK.tolist() == [[1, 2, -1], [4, 4, 0], [0, 1, -1]]
    assert matched == [[0] * 3, [5] * 3, [0] * 3]
    assert mixed.distributions[1].tolist() == torch.eye(5)[[4, 4, 0]].tolist()
    for row in (0, 2):
        assert torch.equal(mixed.distributions[row, :2], probs_BKV[row]) and mixed.distributions[row, 2].isnan().all()


def test_a_graft_is_one_branch_of_the_tree_and_shares_what_both_have() -> None:
    heads = grow(made_joint(rank=2, vocab=6), 3, 4)
    first = int(heads.tokens_BK[0, 0])
    stranger = next(v for v in range(6) if v not in heads.tokens_BK[1].tolist())
    copies = [Copy([first, 5, 5, 5], 3), Copy([stranger] * 4, 4)]
    grown, matched = grafted(heads, copies)
    assert grown.deepest == 4 and grown.parents_BK is not None and grown.seen_BSS is not None
    for row, copy in enumerate(copies):
        at, nodes = 0, list(zip(grown.parents_BK[row].tolist(), grown.tokens_BK[row].tolist(), strict=True))
        assert nodes[:4] == list(zip(heads.parents_BK[row].tolist(), heads.tokens_BK[row].tolist(), strict=True))
        real_nodes = [node for node in nodes if node[1] >= 0]
        assert len(set(real_nodes)) == len(real_nodes), "a draft is there once"
        for depth, token in enumerate(copy.tokens):
            parent, at = at, nodes.index((at, token)) + 1
            assert grown.depth_BS[row, at] == depth + 1 and matched[row][at - 1] == copy.matched
            assert torch.equal(grown.seen_BSS[row, at].nonzero()[:-1], grown.seen_BSS[row, parent].nonzero())
    assert matched[0][0] == 3 and grown.tokens_BK.shape[1] == 8 and (grown.tokens_BK[0] >= 0).sum() < 8


@pytest.mark.parametrize("draft", ["lookup+chain", "lookup+tree"])
def test_copies_are_accepted_in_windows_beyond_the_horizon(draft: str) -> None:
    """Text that repeats itself, in a batch with rows that do not, and both kinds of drafts in one forward."""
    model, looped = real("llama"), torch.tensor([5, 6, 7, 8] * 4)
    alone = decode(model, looped, 40, Sampling(0.0), draft="none").tokens
    text = torch.cat([looped, torch.tensor(alone), looped])  # behind it, all of it follows once more, and more likely
    prompts = [text[: 50 - 3 * row] for row in range(2)] + [RAGGED[2]]
    right = [decode(model, prompt, 14, Sampling(0.0), draft="none").tokens for prompt in prompts]
    done = decode_batch(model, prompts, 14, Sampling(0.0), draft=draft)
    assert [each.tokens for each in done] == right
    assert all(len(each.reached) == 8 for each in done)


def test_captured_forwards_do_not_read_the_text() -> None:
    with pytest.raises(ValueError, match="do not read the text that draft='lookup.chain' copies from"):
        CapturedForwards(real("llama"), 1, Sampling(0.0), slots=32, draft="lookup+chain")


# --- the length, by enumeration -------------------------------------------------------------------------------------

V, K = 3, 3


def emitted(size: int, draft: tuple[int, ...], p: dict[tuple[int, ...], list[float]], q: list[list[float]]) -> Any:
    """(what a forward emits, its probability) for these drafts, of which `size` are verified: rejection sampling."""
    mass = 1.0
    for k in range(size):
        before, token = draft[:k], draft[k]
        accept = min(1.0, p[before][token] / q[k][token])
        rest = [max(0.0, a - b) for a, b in zip(p[before], q[k], strict=True)]
        for other, left in enumerate(rest):
            if accept < 1:
                yield (*before, other), mass * (1 - accept) * left / sum(rest)
        mass *= accept
    for token, chance in enumerate(p[draft[:size]]):
        yield (*draft[:size], token), mass * chance


def error_of(made: Callable[[Tensor, Tensor], Proposal], seed: int) -> tuple[float, set[int]]:
    """How far the next K+1 tokens are from their distribution where the rule chooses a window's length, and the lengths
    that it chose. made: proposes given drafts."""
    joint, generator = made_joint(2, 3, 3, 1, seed), torch.Generator().manual_seed(seed + 100)
    p = {
        before: torch.randn(V, generator=generator, dtype=torch.float64).softmax(-1).tolist()
        for size in range(K + 1)
        for before in itertools.product(range(V), repeat=size)
    }
    law: dict[tuple[int, ...], float] = Counter()
    sizes = set()
    for draft in itertools.product(range(V), repeat=K):
        probs_BKV = joint.conditionals(torch.tensor([draft]))
        drawn = made(torch.tensor([draft]), probs_BKV)
        kept = DraftLength(STEEP, rows=1, drawn=True).paying(drawn, [[0] * K], asked=True).tokens_BK.shape[1]
        sizes.add(kept)
        mass = float(joint.log_prob(torch.tensor([draft])).exp())
        for text, chance in emitted(kept, draft, p, probs_BKV[0].tolist()):
            for rest in itertools.product(range(V), repeat=K + 1 - len(text)):
                whole, after = (*text, *rest), mass * chance
                for k in range(len(text), K + 1):
                    after *= p[whole[:k]][whole[k]]
                law[whole] += after
    right = {
        whole: math.prod(p[whole[:k]][whole[k]] for k in range(K + 1))
        for whole in itertools.product(range(V), repeat=K + 1)
    }
    return max(abs(law[whole] - right[whole]) for whole in right), sizes


def drawn_chain(tokens_BK: Tensor, probs_BKV: Tensor) -> Proposal:
    """What the drafter of sampled chains proposes where these tokens are drawn."""
    drafter = make_drafter("chain", Sampling(), lambda count: torch.zeros(len(tokens_BK), count, dtype=torch.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafters, "sampled_chain", lambda *given: (tokens_BK, probs_BKV))
        return drafter.draft(None, K)


def looking_back(tokens_BK: Tensor, probs_BKV: Tensor) -> Proposal:
    """The fault: how sure the joint was of the token that was drawn."""
    right = drawn_chain(tokens_BK, probs_BKV)
    return replace(right, confidence=lambda: probs_BKV.gather(-1, tokens_BK.unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("seed", range(3))
def test_a_length_that_is_decided_before_the_draw_is_exact(seed: int) -> None:
    error, sizes = error_of(drawn_chain, seed)
    assert error < 1e-12 and len(sizes) > 1, "the length must depend on the drafts before"


def test_a_length_that_is_decided_after_the_draw_is_noticed() -> None:
    assert max(error_of(looking_back, seed)[0] for seed in range(3)) > 1e-3


def test_costs_are_measured_or_given() -> None:
    for sampling in (Sampling(0.0), Sampling()):
        found = Costs.measure(real("llama"), sampling, sizes=(1, 4), rows=(1, 2))
        assert set(found.forward) == {1, 4} and set(found.draft) == {1, 2}
    assert convex({1: 2.0, 2: 5.0, 4: 4.0, 8: 4.0}) == [(1, 2.0), (8, 4.0)]
    for wrong in ({1: 2.0}, {0: 1.0, 2: 1.0}, {1: 0.0, 2: 1.0}, {"1": 1.0, 2: 1.0}, {1: math.inf, 2: 1.0}):
        with pytest.raises(ValueError, match="costs: forward=.* must give milliseconds above 0 for at least 2 numbers"):
            Costs(wrong, {1: 1.0})


# --- the whole decoder ----------------------------------------------------------------------------------------------


def alone(draft: str) -> tuple[float, set[int]]:
    """The p-value of rows one after another, and how many drafts were verified in some forward."""
    model, generator = toy("common", 4), torch.Generator().manual_seed(0)
    sizes: set[int] = set()
    original = DraftLength.paying

    def watched(self: DraftLength, *given: Any) -> Proposal:
        found = original(self, *given)
        if given[0].tokens_BK.shape[1] > 1:
            sizes.add(found.tokens_BK.shape[1])
        return found

    options = Options(lookup=COPIES, costs=STEEP, nodes=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftLength, "paying", watched)
        done = (
            decode(model, torch.tensor(PROMPT), LENGTH, Sampling(), generator, draft=draft, options=options)
            for _ in range(SAMPLES)
        )
        counts = Counter(tuple(each.tokens) for each in done)
    return oracle.p_value(counts, truth(model, Sampling(), PROMPT, LENGTH)), sizes


@pytest.mark.parametrize("draft", ["lookup+block", "lookup+tree"])
def test_lengths_that_pay_write_as_the_target(draft: str) -> None:
    p_value, sizes = alone(draft)
    assert p_value > oracle.FALSE_ALARM and len(sizes) > 1


@pytest.mark.parametrize("draft", ["chain", "lookup+block", "lookup+tree", "lookup+branched"])
def test_a_batch_that_leaves_out_drafts_writes_as_the_target(draft: str) -> None:
    """Three rows of different lengths: the fewer are left, the more drafts each has."""
    model, sampling = toy("common", 4), Sampling()
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    prompts, counts = [torch.tensor(PROMPT), torch.tensor([1]), torch.tensor(PROMPT)], Counter()
    options = Options(lookup=COPIES, nodes=5, most_tokens=7)
    for _ in range(SAMPLES):
        done = decode_batch(model, prompts, LENGTH, sampling, generators, draft=draft, options=options)
        counts.update(tuple(done[row].tokens) for row in (0, 2))
        assert max(len(each.emitted) for each in done) > 1
    assert oracle.p_value(counts, truth(model, sampling, PROMPT, LENGTH)) > oracle.FALSE_ALARM


@pytest.mark.parametrize("draft", ["chain", "tree", "lookup+tree"])
def test_a_batch_has_as_many_drafts_as_fit(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, most in ((1, 16), (2, 16), (4, 16), (5, 14), (16, 16), (17, 16)):
        sizes = windows(Options(most_tokens=most, nodes=8), monkeypatch, draft, rows)
        assert all(size == 1 or size * alive <= most for size, alive in sizes), (rows, sizes)
        assert max(size for size, _ in sizes) > 1 or rows > most // 2


def test_costs_do_not_choose_among_branches() -> None:
    options = Options(costs=STEEP)
    with pytest.raises(ValueError, match="costs= cannot choose among the drafts of draft='branched'"):
        decode(toy("common"), torch.tensor(PROMPT), 2, Sampling(), torch.Generator(), draft="branched", options=options)


def windows(
    options: Options, monkeypatch: pytest.MonkeyPatch, draft: str = "chain", rows: int = 16
) -> list[tuple[int, int]]:
    """(tokens of a window, rows) of each forward, of rows whose drafts are seldom right."""
    model, sizes, original = real("llama"), [], LanguageModel.hidden

    def watched(self: LanguageModel, tokens_BT: Tensor, *rest: Any, **more: Any) -> Tensor:
        sizes.append((tokens_BT.shape[1], len(tokens_BT)))
        return original(self, tokens_BT, *rest, **more)

    prompts = [torch.tensor([row, 3]) for row in range(rows)]
    monkeypatch.setattr(LanguageModel, "hidden", watched)
    done = decode_batch(model, prompts, 60, Sampling(0.0), draft=draft, options=options)
    monkeypatch.setattr(LanguageModel, "hidden", original)
    assert [each.tokens for each in done] == plain(rows)
    return sizes[1:]


@cache
def plain(rows: int) -> list[list[int]]:
    """What the rows of `windows` say."""
    prompts = [torch.tensor([row, 3]) for row in range(rows)]
    return [each.tokens for each in decode_batch(real("llama"), prompts, 60, Sampling(0.0), draft="none")]


def test_a_large_batch_stops_drafting_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sixteen tokens fill the machine, drafts cost what they take; where tokens are free, all are verified."""
    full = windows(Options(costs=Costs({1: 20.0, 16: 22.0, 64: 85.0}, {1: 2.0, 16: 8.0})), monkeypatch)
    assert len(full) <= 59 and sum(size > 1 for size, _ in full[20:]) < 8
    free = windows(Options(costs=Costs({1: 20.0, 64: 20.0}, {1: 0.1})), monkeypatch)
    assert free == windows(Options(), monkeypatch) and max(free)[0] == 4
