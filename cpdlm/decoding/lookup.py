"""Prompt lookup, a baseline without parameters: text repeats itself, so what followed these tokens may follow again.

The last few tokens are looked up in the text so far, the longest n-gram first, its latest occurrence; the draft is what
followed there. All of the draft distribution q is on that token: the acceptance test then accepts it with the
probability that the target itself would have chosen it, and decoding stays lossless.

Letters: B batch (1), K drafts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.loop import Decoded, Options, decode
from cpdlm.decoding.model import DraftingModel, ModelProxy
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


class LookupModel(ModelProxy):
    """A model whose drafts come from the text instead of its heads; serves one row."""

    draft_ids = None

    def __init__(self, base: DraftingModel, lookup: Lookup, horizon: int) -> None:
        super().__init__(base)
        self.lookup, self.horizon = lookup, horizon

    def draft_joint(self, hidden_BD: Tensor, pending_B: Tensor) -> Joint:
        """All on one window. The pending token is the last of the lookup's text."""
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
) -> Decoded:
    """`decode`, with drafts from the text so far. horizon: tokens of a window, the pending one included. longest:
    n-gram."""
    lookup = Lookup(prompt_T.tolist(), longest)
    options = Options(on_tokens=lambda row, tokens: lookup.extend(tokens))
    return decode(LookupModel(model, lookup, horizon), prompt_T, max_new_tokens, sampling, generator, options=options)
