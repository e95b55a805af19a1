"""Every drafter, alone and in ragged batches: the target's distribution, and under greedy the target's own text.

Goodness-of-fit tests decode `SAMPLES` rows of each prompt in one batch (each with a generator of its own) and hold the
sequences to the exact autoregressive distribution, chi-square at `oracle.FALSE_ALARM`. That they would notice is shown
by faults planted in block acceptance, the tree's mask and positions, and dead slots.
"""

import itertools
from collections import Counter
from dataclasses import replace
from functools import cache as memoised
from typing import Any

import pytest
import torch
from torch import Tensor

from cpdlm.decoding import Options, Sampling, accept, cache, decode, decode_batch, drafters, proposals
from cpdlm.decoding.drafters import DRAFTERS, LOOKUP
from cpdlm.decoding.filtering import draw
from cpdlm.decoding.lookup import LookupSettings
from cpdlm.model.joint import Joint
from cpdlm.model.language_model import LanguageModel
from tests import oracle
from tests.test_loop import real as tiny_model
from tests.toy import FILTERS, ToyModel, truth

SAMPLES, LENGTH = 2000, 4
PROMPTS = ((1,), (2, 0))  # of two lengths, alternating through the batch
DRAFTS = [name for name in DRAFTERS if name != "none"]
COPIES = LookupSettings(least=1, most=3)  # in texts of six tokens


@memoised
def toy(layout: str, horizon: int = 3) -> ToyModel:
    return ToyModel(layout, horizon=horizon, context=6)


def counted(model: Any, sampling: Sampling, seed: int = 0, **options: Any) -> list[Counter[oracle.History]]:
    """Sequences of each prompt, from one ragged batch."""
    prompts = [torch.tensor(PROMPTS[row % 2]) for row in range(2 * SAMPLES)]
    options["options"] = replace(options.get("options", Options()), lookup=COPIES)
    generators = [torch.Generator().manual_seed(seed * 10**6 + row) for row in range(2 * SAMPLES)]
    done = decode_batch(model, prompts, LENGTH, sampling, generators, **options)
    return [Counter(tuple(each.tokens) for each in done[index::2]) for index in (0, 1)]


def p_values(model: Any, sampling: Sampling, **options: Any) -> list[float]:
    eos = options.get("eos")
    counts = counted(model, sampling, **options)
    rights = [truth(model, sampling, prompt, LENGTH, eos) for prompt in PROMPTS]
    return [oracle.p_value(count, right) for count, right in zip(counts, rights, strict=True)]


# --- distribution --------------------------------------------------------------------------------------------------


PATHS = [
    ("common", "all", {}),
    ("untied", "all", {"eos": 1}),
    ("anchored", "unfiltered", {"options": Options(use_cache=False)}),
    ("tied", "unfiltered", {"options": Options(nodes=2)}),
    ("common", "unfiltered", {}),
]


@pytest.mark.parametrize(("layout", "setting", "options"), PATHS)
@pytest.mark.parametrize("draft", list(DRAFTERS))
def test_every_drafter_writes_as_the_target(draft: str, layout: str, setting: str, options: dict[str, Any]) -> None:
    assert min(p_values(toy(layout), FILTERS[setting], draft=draft, **options)) > oracle.FALSE_ALARM / 2


class SmallDrafts(ToyModel):
    """Drafts from two of the three tokens; the target is as it was."""

    def __init__(self) -> None:
        super().__init__("anchored", context=6)
        self.draft_ids = torch.tensor([2, 0])

    def draft_joint(self, hidden_BD: Tensor, pending_B: Tensor) -> Joint:
        distribution = super().draft_joint(hidden_BD, pending_B)
        return Joint(distribution.log_weights_R, distribution.log_factors_NRV[..., self.draft_ids].log_softmax(dim=-1))


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_draft_vocabulary_leaves_the_target_alone(draft: str) -> None:
    options = Options(nodes=4, lookup=COPIES)
    assert min(p_values(SmallDrafts(), Sampling(), draft=draft, options=options)) > oracle.FALSE_ALARM / 2
    prompt = torch.tensor(PROMPTS[0])
    texts = [
        decode(SmallDrafts(), prompt, 4, Sampling(0.0), draft=name, options=options).tokens for name in (draft, "none")
    ]
    assert texts[0] == texts[1]


def test_ids_of_the_draft_vocabulary_taken_for_those_of_the_whole_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities that stay on the draft vocabulary while tokens are mapped: ratios of the wrong tokens."""
    monkeypatch.setattr(
        proposals.Proposal,
        "on_vocabulary",
        lambda self, ids, size: proposals.Proposal(
            ids[self.tokens_BK], torch.nn.functional.pad(self.distributions, (0, size - self.distributions.shape[-1]))
        ),
    )
    assert min(p_values(SmallDrafts(), Sampling())) < oracle.FALSE_ALARM


# --- faults that must be noticed --------------------------------------------------------------------------------


def test_dead_slots_that_are_seen_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: cache.Text, *arguments: Any, original: Any = cache.Text.commit) -> None:
        original(self, *arguments)
        self.live_BL = torch.ones_like(self.live_BL)

    monkeypatch.setattr(cache.Text, "commit", keep)
    assert max(p_values(toy("common"), Sampling())) < oracle.FALSE_ALARM


def test_a_cache_that_does_not_follow_the_path_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.Text, "_move", lambda *_: None)
    assert min(p_values(toy("common"), Sampling(), draft="tree")) < oracle.FALSE_ALARM


def test_a_tree_whose_branches_see_each_other_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    grow = proposals.grow

    def careless(*arguments: Any) -> proposals.Proposal:
        grown = grow(*arguments)
        size = grown.seen_BSS.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool).tril().expand_as(grown.seen_BSS)
        return replace(grown, seen_BSS=causal)

    monkeypatch.setattr(drafters, "grow", careless)
    assert min(p_values(toy("common"), Sampling(), draft="tree")) < oracle.FALSE_ALARM


def test_branches_that_go_on_with_the_numbers_of_the_test_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch is entered where a draft was rejected: the number that rejected it is not uniform any more."""
    call, last = drafters.Uniforms.__call__, {}

    def reused(self: drafters.Uniforms, count: int) -> Tensor:
        if count <= 4:  # drafts and tests of a chain of three
            last["numbers"] = call(self, count)
        return last["numbers"].repeat(1, count)[:, :count]

    monkeypatch.setattr(drafters.Uniforms, "__call__", reused)
    assert min(p_values(toy("common", 4), Sampling(), draft="branched")) < oracle.FALSE_ALARM


@pytest.mark.parametrize("draft", ["block", "branched"])
@pytest.mark.parametrize("fault", ["residual of the whole target", "longest share"])
def test_wrong_block_verification_is_noticed(fault: str, draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right drafts and distributions, and one step of algorithm 2 wrong."""

    def wrong(target_BSV: Tensor, draft_BKV: Tensor, tokens_BK: Tensor, uniforms_BS: Tensor) -> tuple[Tensor, Tensor]:
        accepted_B, next_B = accept.verify_block(target_BSV, draft_BKV, tokens_BK, uniforms_BS)
        drafts = tokens_BK.shape[1]
        if drafts == 0:
            return accepted_B, next_B
        if fault == "longest share":  # every prefix is kept with its share alone
            p_BK, q_BK = (
                distribution[:, :drafts].gather(-1, tokens_BK[..., None]).squeeze(-1)
                for distribution in (target_BSV, draft_BKV)
            )
            share_BK = (p_BK / q_BK).cumprod(dim=1).clamp(max=1)
            accepted_B = ((uniforms_BS[:, :drafts] < share_BK) * torch.arange(1, drafts + 1)).amax(dim=1)
        stop_B11 = accepted_B[:, None, None]
        p_BV = target_BSV.take_along_dim(stop_B11, dim=1).squeeze(1)
        q_BV = draft_BKV.take_along_dim(stop_B11.clamp(max=drafts - 1), dim=1).squeeze(1)
        # The tokenwise residual, as after a share of one.
        rest_BV = p_BV if fault == "residual of the whole target" else accept.residual(p_BV, q_BV)
        probs_BV = torch.where((accepted_B < drafts)[:, None], rest_BV, p_BV)
        return accepted_B, draw(probs_BV, uniforms_BS[:, drafts])

    monkeypatch.setattr(drafters, "verify_block", wrong)
    assert min(p_values(toy("common", 4), Sampling(), draft=draft)) < oracle.FALSE_ALARM


def test_draws_shared_by_the_rows_of_a_batch_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has its own generator: with one draw for all, a batch is a single sample."""
    call = drafters.Uniforms.__call__
    monkeypatch.setattr(
        drafters.Uniforms, "__call__", lambda self, count: call(self, count)[:1].expand(len(self.generators), -1)
    )
    assert max(p_values(toy("common"), Sampling())) < oracle.FALSE_ALARM


# --- real models --------------------------------------------------------------------------------------------------


def real(family: str, anchor: str = "token", common: bool = True, rank: int = 3, horizon: int = 4) -> LanguageModel:
    return tiny_model(family, rank, anchor, False, common, horizon)


RAGGED = [torch.randint(0, 17, (n,), generator=torch.Generator().manual_seed(n)) for n in (1, 9, 4, 17, 2)]


@memoised
def greedy(*kind: Any) -> list[list[int]]:
    """What a real model writes behind each ragged prompt, autoregressively."""
    return [decode(real(*kind), prompt, 40, Sampling(0.0), draft="none").tokens for prompt in RAGGED]


@pytest.mark.parametrize("kind", [("llama", "token", True), ("gpt2", "none", False)])
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_batch_is_its_rows_one_by_one(draft: str, kind: tuple[str, str, bool]) -> None:
    """Greedy and sampled, greedy without a cache as well, rows that end at different times."""
    model, alone_greedily, accepted, texts = real(*kind), greedy(*kind), 0, RAGGED[:4]
    for sampling in (Sampling(0.0), Sampling(0.8, 5, 0.95)):
        cached = None
        for use_cache in (True, False) if sampling.greedy else (True,):
            options: dict[str, Any] = {
                "draft": draft,
                "options": Options(use_cache=use_cache),
                "eos": alone_greedily[1][25],
            }
            alone = [
                decode(model, prompt, 40, sampling, torch.Generator().manual_seed(row), **options)
                for row, prompt in enumerate(texts)
            ]
            cached = cached or alone
            assert alone == cached
            generators = [torch.Generator().manual_seed(row) for row in range(len(texts))]
            together = decode_batch(model, texts, 40, sampling, generators, **options)
            if sampling.greedy:
                assert [each.tokens for each in together] == [each.tokens for each in alone]
                for each, right in zip(together, alone_greedily, strict=False):
                    assert each.tokens == right[: len(each.tokens)]
            elif not draft.startswith(LOOKUP):  # in a batch a row's windows may be longer, and then it draws more
                assert all(a.tokens[:30] == b.tokens[:30] for a, b in zip(together, alone, strict=True))
            accepted += sum(sum(each.accepted) for each in together)
    assert accepted, "no draft was ever accepted"


@pytest.mark.parametrize(("horizon", "nodes"), [(6, 4), (8, 32)])
@pytest.mark.parametrize("draft", ["tree", "lookup+tree"])
def test_large_trees_in_a_batch_are_the_rows_own(draft: str, horizon: int, nodes: int) -> None:
    model, options = real("llama", horizon=horizon), Options(nodes=nodes)
    for sampling in (Sampling(0.0), Sampling(0.6, 5)):
        generators = [torch.Generator().manual_seed(row) for row in range(len(RAGGED))]
        together = decode_batch(model, RAGGED, 24, sampling, generators, draft=draft, options=options)
        for row, (prompt, mine) in enumerate(zip(RAGGED, together, strict=True)):
            other = "none" if sampling.greedy else draft
            generator = torch.Generator().manual_seed(row)
            alone = decode(model, prompt, 24, sampling, generator, draft=other, options=options)
            if sampling.greedy or draft == "tree":  # rows without a copy draw for the copies of others
                assert mine.tokens[:14] == alone.tokens[:14] and (mine.tokens == alone.tokens or not sampling.greedy)
        assert max(max(each.emitted) for each in together) > 1


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("draft", DRAFTS)
def test_closing_up_dead_slots_changes_nothing(draft: str, use_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, slots = real("gpt2"), []
    monkeypatch.setattr(cache, "WASTE", 0.0)
    monkeypatch.setattr(cache, "LEAST", 0)

    def close_up(self: cache.Text, original: Any = cache.Text._close_up) -> None:
        original(self)
        slots.append(self.slots - max(self.lengths))

    monkeypatch.setattr(cache.Text, "_close_up", close_up)
    together = decode_batch(model, RAGGED, 40, Sampling(0.0), draft=draft, options=Options(use_cache=use_cache))
    assert len(slots) > 3 and not any(slots)
    assert [each.tokens for each in together] == greedy("gpt2")


def test_rows_that_end_early_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ends, sizes = real("llama"), greedy("llama"), []
    original = LanguageModel.hidden

    def watched(self: LanguageModel, tokens_BT: Tensor, *rest: Any, **more: Any) -> Tensor:
        sizes.append(len(tokens_BT))
        return original(self, tokens_BT, *rest, **more)

    monkeypatch.setattr(LanguageModel, "hidden", watched)
    stop = {row: 3 + 7 * row for row in range(len(RAGGED))}
    options = Options(stop=lambda row, tokens: len(tokens) == stop[row])
    done = decode_batch(model, RAGGED, 40, Sampling(0.0), options=options)
    assert [each.tokens for each in done] == [ends[row][: stop[row]] for row in range(len(RAGGED))]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 5 and sizes[-1] == 1


def test_unknown_names_and_sizes_are_refused() -> None:
    model, prompt = toy("common"), torch.tensor([1])
    with pytest.raises(ValueError, match="draft='forest' is not one of none, chain, block, tree"):
        decode(model, prompt, 2, Sampling(0.0), draft="forest")
    for nodes in (0, -1, 10**9):
        with pytest.raises(ValueError, match=f"nodes={nodes} is no number of drafts; pass a whole number"):
            decode(model, prompt, 2, Sampling(0.0), draft="tree", options=Options(nodes=nodes))
    with pytest.raises(ValueError, match="1 generators for 2 prompts; pass one for each row"):
        decode_batch(model, [prompt, prompt], 2, Sampling(), [torch.Generator()])
    with pytest.raises(ValueError, match="there is no prompt"):
        decode_batch(model, [], 2, Sampling(0.0))


def test_scores_changed_by_the_caller_are_the_target() -> None:
    """Forbid the token written last: the target is the changed one, for every drafter."""

    def changed(row: int, tokens: list[int], scores_V: Tensor) -> Tensor:
        return scores_V.index_fill(0, torch.tensor(tokens[-1:], dtype=torch.long), -torch.inf)

    model, prompt = toy("anchored"), PROMPTS[0]

    def distribution(history: tuple[int, ...]) -> list[float]:
        probs = model.oracle_target(history)
        banned = history[-1] if len(history) > len(prompt) else None
        left = [0.0 if v == banned else p for v, p in enumerate(probs)]
        return [p / sum(left) for p in left]

    right = oracle.autoregressive_law(distribution, prompt, LENGTH)
    prompt_T, options = torch.tensor(prompt), Options(target_scores=changed)
    plain = decode(model, prompt_T, LENGTH, Sampling(0.0), draft="none", options=options).tokens
    assert all(a != b for a, b in itertools.pairwise(plain))
    for draft in DRAFTS:
        assert decode(model, prompt_T, LENGTH, Sampling(0.0), draft=draft, options=options).tokens == plain
        generators = [torch.Generator().manual_seed(row) for row in range(1000)]
        prompts = [prompt_T] * 1000
        done = decode_batch(model, prompts, LENGTH, Sampling(), generators, draft=draft, options=options)
        counts = Counter(tuple(each.tokens) for each in done)
        assert oracle.p_value(counts, right) > oracle.FALSE_ALARM, draft
