"""A tabular model for law tests: every law is a row of a table, looked up by the whole history of tokens.

The hidden state of a position is the code of its history, so that a token lost, doubled or left in the cache leads to
another row. Float64. Layouts: "common" (a target of its own), "untied" (the target is eq. 11 of the joint), "tied" (the
draft sees the history alone) and "anchored" (the draft sees the fixed token as well).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpdlm.model.joint import Joint


class ToyCache:
    """Histories as codes, one per processed token."""

    def __init__(self) -> None:
        self.codes: list[int] = []

    def crop(self, negative: int) -> None:
        assert negative < 0
        del self.codes[negative:]


class ToyModel:
    def __init__(
        self, layout: str = "common", rank: int = 3, horizon: int = 3, vocab_size: int = 3, context: int = 5,
        seed: int = 9, sharpness: float = 1.5, target_sharpness: float = 0.7,
    ) -> None:  # fmt: skip
        # The defaults (a flat target, sharper drafts, this seed) were picked for the power of the law tests.
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

    def hidden(self, tokens_BT: Tensor, position_ids_BT: Tensor | None = None, cache: ToyCache | None = None) -> Tensor:
        self.calls += 1
        codes = cache.codes if cache is not None else []
        new = tokens_BT[0].tolist()
        for token in new:
            codes.append(self.extend(codes[-1] if codes else 0, token))
        return torch.tensor(codes[-len(new) :], dtype=torch.float64)[None, :, None]

    def target_log_probs(self, hidden: Tensor) -> Tensor:
        code = hidden[..., 0].long()
        return self.first(code) if self.layout == "untied" else self.own[code]

    def first(self, code: Tensor) -> Tensor:
        return torch.logsumexp(self.weights[code].unsqueeze(-1) + self.factors[code][..., 0, :, :], dim=-2)

    def draft_joint(self, hidden_BD: Tensor, fixed_B: Tensor) -> Joint:
        code = hidden_BD[:, 0].long()
        if self.layout == "anchored":
            code = self.extend(code, fixed_B)
        joint = Joint(self.weights[code], self.factors[code])
        return joint.condition(fixed_B) if self.layout == "untied" else joint

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

    def oracle_draft(self, history: tuple[int, ...], fixed: int) -> tuple[list[float], list[list[list[float]]]]:
        code = self.code_of((*history, fixed) if self.layout == "anchored" else history)
        weights, factors = self.weights[code].exp().tolist(), self.factors[code].exp().tolist()
        if self.layout != "untied":
            return weights, factors
        posterior = [w * factors[0][a][fixed] for a, w in enumerate(weights)]
        return [w / sum(posterior) for w in posterior], factors[1:]
