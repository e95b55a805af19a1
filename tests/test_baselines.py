"""The baselines that draft without our heads write as the target: prompt lookup and sequential heads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cpdlm.baselines.hydra import HydraHeads, HydraModel, Sequential
from cpdlm.config import resolve
from cpdlm.decoding import Options, Sampling, decode, decode_batch
from cpdlm.decoding.drafters import Uniforms
from cpdlm.decoding.lookup import Copy, Lookup, LookupSettings
from cpdlm.model.build import build_language_model
from tests import oracle
from tests.toy import FILTERS, ToyModel, truth

SAMPLES, LENGTH, PROMPT = 3000, 3, (1, 0)
SETTINGS = ("unfiltered", "all")
ANY = LookupSettings(least=1, most=3)


def test_lookup_copies_what_followed_the_longest_match_last_seen() -> None:
    text = [5, 1, 2, 7, 9, 2, 8, 1, 2]
    lookup = Lookup(text, LookupSettings(least=1, longest=3))
    assert lookup.draft(3) == Copy([7, 9, 2], matched=2)  # behind "1 2", not behind the later "2"
    assert Lookup(text, LookupSettings(least=1, longest=1)).draft(2).tokens == [8, 1]
    lookup.extend([8])
    assert lookup.draft(2) == Copy([1, 2], matched=2)
    assert Lookup([3, 4, 3, 4], LookupSettings(1, most=5)).draft(9).tokens == [3, 4, 3, 4, 3]  # with its own copy
    assert not Lookup(text, LookupSettings(least=3)).draft(2).tokens
    for nothing in ([], [1], [1, 2, 3]):
        assert not Lookup(nothing, LookupSettings(least=1)).draft(2).tokens


def test_lookup_writes_the_greedy_text_in_fewer_forwards() -> None:
    model = ToyModel("common", context=12, vocab_size=2)
    prompt = torch.tensor([0, 1, 0])
    alone = decode(model, prompt, 9, Sampling(0.0), draft="none")
    looked = decode(model, prompt, 9, Sampling(0.0), draft="lookup", options=Options(lookup=ANY))
    assert looked.tokens == alone.tokens
    assert looked.forwards < alone.forwards


@dataclass
class TableDistribution:
    """Conditionals of a toy: the rows of a table, by the history with pending token and drafts."""

    model: SequentialToy
    code_B: Tensor
    pending_B: Tensor

    def next(self, drafts_BJ: Tensor) -> Tensor:
        code_B = self.model.extend(self.code_B, self.pending_B)
        for draft_B in drafts_BJ.unbind(dim=1):
            code_B = self.model.extend(code_B, draft_B)
        return self.model.table[code_B]


class SequentialToy(ToyModel):
    def __init__(self) -> None:
        super().__init__("common", horizon=3)
        generator = torch.Generator().manual_seed(4)
        scores = torch.randn(self.codes, self.vocab_size, generator=generator, dtype=torch.float64) * 1.5
        self.table = scores.log_softmax(dim=-1)

    def draft_joint(self, hidden_BD: Tensor, pending_B: Tensor) -> Any:
        return TableDistribution(self, hidden_BD[:, 0].long(), pending_B)


@pytest.mark.parametrize("setting", SETTINGS)
def test_sequential_drafts_write_as_the_target(setting: str) -> None:
    model, sampling = SequentialToy(), FILTERS[setting]
    generators = [torch.Generator().manual_seed(row) for row in range(SAMPLES)]
    done = decode_batch(model, [torch.tensor(PROMPT)] * SAMPLES, LENGTH, sampling, generators, draft=Sequential)
    counts = Counter(tuple(each.tokens) for each in done)
    assert oracle.p_value(counts, truth(model, sampling, PROMPT, LENGTH)) > oracle.FALSE_ALARM
    greedy = [decode(model, torch.tensor(PROMPT), 3, Sampling(0.0), draft=each).tokens for each in (Sequential, "none")]
    assert greedy[0] == greedy[1]


def hydra(vocab_size: int = 5) -> HydraModel:
    torch.manual_seed(2)
    base = build_language_model(
        resolve({"size": "micro", "horizon": 1, "rank": 1, "balance": "none"}), vocab_size
    ).eval()
    heads = HydraHeads(base.trunk.width, 3)
    for weight in heads.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return HydraModel(base, heads.eval())


@torch.inference_mode()
def test_sequential_heads_draw_from_the_conditionals_that_they_report() -> None:
    model, sampling = hydra(), Sampling(temperature=0.8)
    hidden_D = model.hidden(torch.tensor([[1, 2, 0]]))[0, -1]
    distribution = model.draft_joint(hidden_D.expand(SAMPLES, -1), torch.full((SAMPLES,), 3))
    uniforms = Uniforms([torch.Generator().manual_seed(row) for row in range(SAMPLES)], hidden_D.device)
    proposal = Sequential(sampling, uniforms).draft(distribution, 2)

    def by_hand(*seen: int) -> list[float]:  # [h, E x, ..] through one head, then the unembedding
        head = len(seen) - 1
        inputs = torch.cat([hidden_D, *(model.base.trunk.embedding[token] for token in seen)])
        inner = model.heads.into[head](inputs)
        moved = model.heads.out[head](inner * torch.sigmoid(inner))
        scores = model.base.unembedding.weight.double() @ (hidden_D + moved).double()
        return oracle.filter_law(scores.softmax(dim=-1).tolist(), 0.8)

    first = by_hand(3)
    windows = {(a, b): first[a] * p for a in range(5) for b, p in enumerate(by_hand(3, a))}
    assert oracle.p_value(Counter(tuple(row) for row in proposal.tokens_BK.tolist()), windows) > oracle.FALSE_ALARM
    for row in range(20):
        a = int(proposal.tokens_BK[row, 0])
        assert proposal.distributions[row].tolist() == [
            pytest.approx(first, abs=1e-5),
            pytest.approx(by_hand(3, a), abs=1e-5),
        ]


@torch.inference_mode()
def test_the_loss_of_sequential_heads_is_their_chain_rule() -> None:
    model = hydra()
    hidden_PD, future_PN = torch.randn(4, model.base.trunk.width), torch.randint(5, (4, 3))
    first = model.log_distribution(hidden_PD, future_PN[:, :1]).gather(1, future_PN[:, 1:2])[:, 0]
    second = model.log_distribution(hidden_PD, future_PN[:, :2]).gather(1, future_PN[:, 2:])[:, 0]
    nll_P = model.nll(hidden_PD, future_PN, torch.tensor([3, 2, 1, 3]))
    expected = -torch.stack([(first + second)[0], first[1], first[1] * 0, (first + second)[3]])
    assert torch.allclose(nll_P, expected, atol=1e-6)
