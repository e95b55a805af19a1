"""Prompt lookup, a baseline without parameters: the text repeats itself, so that what followed these tokens may follow again.

The last few tokens are looked up in the text so far, the longest n-gram first, its latest occurrence; the draft is what
followed there. A draft is certain, so that its law is all on one token: the acceptance test then keeps it with the
probability that the target itself would have chosen it, and decoding stays lossless.

Letters: B batch (1), K drafts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.forwards import DraftingModel
from cpdlm.decoding.loop import Decoded, decode
from cpdlm.model.joint import Joint


class Lookup:
    """Drafts for one text: where each n-gram of up to `longest` tokens was last continued."""

    def __init__(self, text: Sequence[int], longest: int = 3) -> None:
        self.longest = longest
        self.text: list[int] = []
        self.continued: dict[tuple[int, ...], int] = {}
        self.extend(text)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            index = len(self.text)
            for size in range(1, min(self.longest, index) + 1):
                self.continued[tuple(self.text[index - size :])] = index
            self.text.append(token)

    def draft(self, count: int) -> list[int]:
        """What followed the last tokens before; a copy that reaches the end of the text goes on with itself.

        Where not even the last token was seen before, it is repeated.
        """
        end = len(self.text)
        sizes = range(min(self.longest, end), 0, -1)
        found = (self.continued.get(tuple(self.text[end - size :])) for size in sizes)
        source = next((index for index in found if index is not None), end - 1)
        period = end - source
        return [self.text[source + k % period] for k in range(count)]


class LookupModel:
    """A model whose drafts come from the text instead of its heads; serves one row."""

    def __init__(self, base: DraftingModel, lookup: Lookup, horizon: int) -> None:
        self.base, self.lookup = base, lookup
        self.horizon, self.vocab_size, self.context = horizon, base.vocab_size, base.context

    @property
    def training(self) -> bool:
        return bool(getattr(self.base, "training", False))

    def new_cache(self) -> Any:
        return self.base.new_cache()

    def hidden(
        self, tokens_BT: Tensor, position_ids_BT: Tensor | None = None, cache: Any = None, mask: Tensor | None = None
    ) -> Tensor:
        return self.base.hidden(tokens_BT, position_ids_BT, cache, mask)

    def target_log_probs(self, hidden: Tensor) -> Tensor:
        return self.base.target_log_probs(hidden)

    def draft_joint(self, hidden_BD: Tensor, pending_B: Tensor) -> Joint:
        """All on one window. The fixed token is the last of the lookup's text."""
        tokens_K = torch.tensor(self.lookup.draft(self.horizon - 1), device=hidden_BD.device)
        certain_KV = torch.full((len(tokens_K), self.vocab_size), -math.inf, device=hidden_BD.device)
        certain_KV.scatter_(1, tokens_K[:, None], 0.0)
        return Joint(certain_KV.new_zeros(1, 1), certain_KV[None, :, None])


def decode_with_lookup(
    model: DraftingModel,
    prompt_T: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    *,
    horizon: int = 4,
    longest: int = 3,
    **options: Any,
) -> Decoded:
    """`decode`, with drafts from the text so far. horizon: tokens of a window, the fixed one included. longest: n-gram."""
    lookup = Lookup(prompt_T.tolist(), longest)
    looking = LookupModel(model, lookup, horizon)
    return decode(looking, prompt_T, max_new_tokens, sampling, generator, on_tokens=lookup.extend, **options)
