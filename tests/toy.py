"""A tabular model for goodness-of-fit tests: every distribution is a row of a table, looked up by the whole history.

The hidden state of a position is the code of its history, so that a token lost, doubled or left in the cache leads to
another row. Float64. Layouts: "common" (a target of its own), "untied" (the target is eq. 11 of the joint), "tied" (the
draft sees the history alone) and "anchored" (the draft sees the pending token as well).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpdlm.decoding import Sampling
from cpdlm.model.joint import Joint
from tests import oracle

FILTERS = {
    "unfiltered": Sampling(),
    "temperature": Sampling(temperature=0.5),
    "top-k": Sampling(top_k=2),
    "top-p": Sampling(top_p=0.8),
    "all": Sampling(temperature=1.4, top_k=2, top_p=0.9),
}


def keep(sampling: Sampling) -> Callable[[oracle.Law], oracle.Law]:
    """The oracle's filter for this sampling."""
    return lambda law: oracle.filter_law(law, sampling.temperature, sampling.top_k, sampling.top_p)


def truth(
    model: ToyModel, sampling: Sampling, prompt: oracle.History, length: int, eos: int | None = None
) -> dict[oracle.History, float]:
    """What a decoder of this model must write: the distribution of `length` tokens behind the prompt."""
    return oracle.autoregressive_law(lambda history: keep(sampling)(model.oracle_target(history)), prompt, length, eos)


class ToyCache:
    """Per slot the code of the history that ends there (keys) and its position (values), (B, 1, L, 1) both."""

    def __init__(self) -> None:
        self.layers = [self]
        self.keys = self.values = torch.zeros(1, 1, 0, 1, dtype=torch.long)

    def append(self, code_B: Tensor, position_B: Tensor) -> None:
        batch = len(code_B)
        self.keys = torch.cat([self.keys.expand(batch, -1, -1, -1), code_B.view(batch, 1, 1, 1)], dim=2)
        self.values = torch.cat([self.values.expand(batch, -1, -1, -1), position_B.view(batch, 1, 1, 1)], dim=2)

    def crop(self, negative: int) -> None:
        assert negative < 0
        self.keys, self.values = self.keys[:, :, :negative], self.values[:, :, :negative]

    def batch_select_indices(self, index_B: Tensor) -> None:
        self.keys, self.values = self.keys[index_B], self.values[index_B]


class ToyModel:
    training, draft_ids, attention_window = False, None, None

    def __init__(
        self,
        layout: str = "common",
        rank: int = 3,
        horizon: int = 3,
        vocab_size: int = 3,
        context: int = 5,
        seed: int = 9,
        sharpness: float = 1.5,
        target_sharpness: float = 0.7,
    ) -> None:
        # A flat target, sharper drafts and this seed give the tests their power.
        self.layout, self.rank, self.horizon, self.vocab_size, self.context = layout, rank, horizon, vocab_size, context
        generator = torch.Generator().manual_seed(seed)
        self.codes = (vocab_size + 1) ** context

        def table(*shape: int, scale: float = sharpness) -> Tensor:
            scores = torch.randn(self.codes, *shape, generator=generator, dtype=torch.float64) * scale
            return scores.log_softmax(dim=-1)

        factors = horizon if layout == "untied" else horizon - 1
        self.own = table(vocab_size, scale=target_sharpness)
        self.weights = table(rank)
        self.factors = table(factors, rank, vocab_size)
        self.calls = 0

    def new_cache(self) -> ToyCache:
        return ToyCache()

    def hidden(
        self,
        tokens_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        cache: ToyCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Each token extends the history of the last token that it sees; a wrong position makes it another history."""
        self.calls += 1
        cache = cache or ToyCache()
        batch, size = tokens_BT.shape
        before = cache.keys.shape[2]
        codes = []
        for t in range(size):
            slot = before + t
            seen_BL = torch.ones(batch, slot, dtype=torch.bool)
            if mask is not None:
                seen_BL = mask[:, 0, t, :slot] if mask.dim() == 4 else mask[:, :slot]
            index_BL = torch.where(seen_BL, cache.values[:, 0, :, 0].expand(batch, -1), -1)
            last_B = index_BL.max(dim=1) if slot else None
            code_B, highest_B = torch.zeros(batch, dtype=torch.long), torch.full((batch,), -1)
            if last_B is not None:
                found_B = cache.keys[:, 0, :, 0].expand(batch, -1).gather(1, last_B.indices[:, None])[:, 0]
                highest_B = last_B.values
                code_B = torch.where(highest_B >= 0, found_B, code_B)
            position_B = position_ids_BT[:, t] if position_ids_BT is not None else torch.full((batch,), slot)
            right_B = (position_B == highest_B + 1) & (seen_BL.sum(dim=1) == position_B)
            new_B = self.extend(code_B, tokens_BT[:, t])
            # Padding has position 0 and is seen by none; beyond the context anything goes.
            new_B = torch.where(right_B | (position_B >= self.context - 1), new_B, self.extend(new_B, 0))
            cache.append(new_B, position_B)
            codes.append(new_B)
        return torch.stack(codes, dim=1)[..., None].double()

    def target_log_probs(self, hidden: Tensor) -> Tensor:
        code = hidden[..., 0].long()
        return self.first(code) if self.layout == "untied" else self.own[code]

    def target_scores(self, hidden: Tensor) -> Tensor:
        return self.target_log_probs(hidden)

    def first(self, code: Tensor) -> Tensor:
        return torch.logsumexp(self.weights[code].unsqueeze(-1) + self.factors[code][..., 0, :, :], dim=-2)

    def draft_joint(self, hidden_BD: Tensor, pending_B: Tensor) -> Joint:
        code = hidden_BD[:, 0].long()
        if self.layout == "anchored":
            code = self.extend(code, pending_B)
        joint = Joint(self.weights[code], self.factors[code])
        return joint.condition(pending_B) if self.layout == "untied" else joint

    def extend(self, code, token):  # type: ignore[no-untyped-def]
        """Code of a history with one more token; works on ints and tensors alike."""
        return (code * (self.vocab_size + 1) + token + 1) % self.codes

    # --- the same tables as plain lists, for the oracle: no Joint, no torch arithmetic ----------------------------

    def code_of(self, history: tuple[int, ...]) -> int:
        code = 0
        for token in history:
            code = self.extend(code, token)
        return code

    def oracle_target(self, history: tuple[int, ...]) -> list[float]:
        code = self.code_of(history)
        if self.layout != "untied":
            return self.own[code].exp().tolist()
        weights, factors = self.weights[code].exp().tolist(), self.factors[code].exp().tolist()
        return [sum(w * factors[0][a][v] for a, w in enumerate(weights)) for v in range(self.vocab_size)]

    def oracle_draft(self, history: tuple[int, ...], pending: int) -> tuple[list[float], list[list[list[float]]]]:
        code = self.code_of((*history, pending) if self.layout == "anchored" else history)
        weights, factors = self.weights[code].exp().tolist(), self.factors[code].exp().tolist()
        if self.layout != "untied":
            return weights, factors
        posterior = [w * factors[0][a][pending] for a, w in enumerate(weights)]
        return [w / sum(posterior) for w in posterior], factors[1:]
