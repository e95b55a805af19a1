"""The decoding loop: plain, greedy and sampled generation are this one loop, with drafting on or off.

One pass of the trunk runs over a window: the token already fixed, x_{t+1}, and K <= N-1 drafts of x_{t+2}.. made from
the hidden state before it. It yields the target at every position of the window; the acceptance test keeps a prefix of
the drafts and draws the token after it, which becomes the next fixed token. The first window is the prompt, with no
drafts. Plain decoding is K = 0 throughout.

Every pass emits the drafts that it keeps and the token after them, 1 to N tokens; the pass over the prompt emits one.
So the tokens are the sum over passes, plain decoding has exactly one token per pass, and depth k means x_{t+k}.

Letters: B batch (1 here), T position, S = K+1 positions of a window, K drafts, N horizon, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cpdlm.decoding import chain
from cpdlm.decoding.acceptance import verify, verify_greedy
from cpdlm.decoding.filtering import Sampling, filtered
from cpdlm.model.joint import Joint

PLAIN = Sampling()


class DraftingModel(Protocol):
    """What the loop needs of a model; `cpdlm.model.language_model.LanguageModel` has it."""

    horizon: int
    vocab_size: int
    context: int

    def new_cache(self) -> Any: ...

    def hidden(self, tokens_BT: Tensor, position_ids_BT: Tensor | None = None, cache: Any = None) -> Tensor: ...

    def target_log_probs(self, hidden: Tensor) -> Tensor: ...

    def draft_joint(self, hidden_BD: Tensor, fixed_B: Tensor) -> Joint: ...


@dataclass(frozen=True)
class Decoded:
    """What was written, and what each pass of the trunk did for it.

    tokens: the new ids. emitted: tokens of each pass (the first is the pass over the prompt); they sum to len(tokens).
    reached, accepted: per depth 2..N, how many drafts were tested there (that is, all before them were kept) and how
    many of those were kept. Drafts behind an end-of-sequence token count as neither.
    """

    tokens: list[int]
    emitted: list[int]
    reached: list[int]
    accepted: list[int]

    @property
    def passes(self) -> int:
        return len(self.emitted)


class Rule(Protocol):
    """How drafts are made and which of them are kept; `laws` is whatever `draft` hands to `verify`."""

    def draft(self, joint: Joint, count: int) -> tuple[Tensor, Any]: ...

    def verify(self, target_BSV: Tensor, tokens_BK: Tensor, laws: Any) -> tuple[Tensor, Tensor]: ...


class GreedyRule:
    """Temperature 0: drafts and target by argmax."""

    def draft(self, joint: Joint, count: int) -> tuple[Tensor, None]:
        return chain.greedy_chain(joint, count), None

    def verify(self, target_BSV: Tensor, tokens_BK: Tensor, laws: None) -> tuple[Tensor, Tensor]:
        return verify_greedy(target_BSV, tokens_BK)


class SampledRule:
    """Drafts from the filtered conditionals, kept so that the filtered target's law is unchanged."""

    def __init__(self, sampling: Sampling, generator: torch.Generator, device: torch.device) -> None:
        self.sampling, self.generator, self.device = sampling, generator, device

    def draft(self, joint: Joint, count: int) -> tuple[Tensor, Tensor]:
        return chain.sampled_chain(joint, count, self.sampling, self.uniforms(count + 1))

    def verify(self, target_BSV: Tensor, tokens_BK: Tensor, laws: Tensor) -> tuple[Tensor, Tensor]:
        return verify(filtered(target_BSV, self.sampling), laws, tokens_BK, self.uniforms(target_BSV.shape[1]))

    def uniforms(self, count: int) -> Tensor:
        drawn = torch.rand(1, count, dtype=torch.float64, generator=self.generator, device=self.generator.device)
        return drawn.to(self.device)


@torch.inference_mode()
def decode(
    model: DraftingModel,
    prompt_T: Tensor,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    generator: torch.Generator | None = None,
    *,
    eos: int | None = None,
    draft: bool = True,
    use_cache: bool = True,
    on_tokens: Callable[[list[int]], None] | None = None,
    clock: Callable[[str], None] | None = None,
) -> Decoded:
    """Writes max_new_tokens tokens after prompt_T, or fewer if eos comes first (eos is kept), with the target's law.

    prompt_T: (T,) ids on the model's device. generator: every random number comes from it; greedy needs none.
    draft=False is plain decoding. use_cache=False recomputes the whole sequence in every pass: same tokens, slower.
    on_tokens receives the tokens of each pass as they are fixed. clock(part) is called at the end of each stretch of
    work: "prefill", "draft", "trunk", "verify" (target law and acceptance test) or "other".

    Raises ValueError, before any work, on an empty prompt, ids outside the vocabulary, max_new_tokens below 1, prompt and
    new tokens beyond the model's context, sampling without a generator, a model in training mode; and, when it happens,
    on a target of NaN or -inf alone, naming the position.
    """
    _check(model, prompt_T, max_new_tokens, sampling, generator)
    prompt_T = prompt_T.long()
    device = prompt_T.device
    rule: Rule = GreedyRule() if sampling.greedy else SampledRule(sampling, generator, device)  # type: ignore[arg-type]
    lap = clock or _no_clock
    longest = model.horizon - 1 if draft else 0
    cache = model.new_cache() if use_cache else None
    window_BS = prompt_T.unsqueeze(0)
    kept_BT = window_BS  # grows only without a cache
    drafts_BK, laws = window_BS[:, :0], None
    tokens: list[int] = []
    emitted: list[int] = []
    reached, accepted = [0] * (model.horizon - 1), [0] * (model.horizon - 1)
    count = 0
    lap("other")
    while True:
        hidden_BTD = model.hidden(window_BS, cache=cache)
        hidden_BSD = hidden_BTD[:, -1 - count :]
        lap("trunk" if emitted else "prefill")
        stop_B, next_B = rule.verify(model.target_log_probs(hidden_BSD), drafts_BK, laws)
        # The one host synchronisation of a pass.
        keep, *proposed, following = torch.cat([stop_B[:, None], drafts_BK, next_B[:, None]], dim=1)[0].tolist()
        lap("verify" if emitted else "prefill")
        if following >= model.vocab_size:
            raise ValueError(
                f"the target law of token {len(prompt_T) + len(tokens) + keep} (the prompt is 0..{len(prompt_T) - 1}) is "
                "NaN or -inf alone; check the weights (a diverged run?) or use a wider precision"
            )
        new = [*proposed[:keep], following]
        tested = min(keep + 1, count)
        if eos is not None and eos in new:
            new = new[: new.index(eos) + 1]
            tested = min(tested, len(new))
        for depth in range(tested):
            reached[depth] += 1
            accepted[depth] += depth < keep
        tokens += new
        emitted.append(len(new))
        if on_tokens is not None:
            on_tokens(new)
        if len(tokens) >= max_new_tokens or (eos is not None and new[-1] == eos):
            lap("other")
            return Decoded(tokens, emitted, reached, accepted)
        rejected = count - keep
        if cache is None:
            kept_BT = torch.cat([kept_BT, drafts_BK[:, :keep], next_B[:, None]], dim=1)
        elif rejected:
            cache.crop(-rejected)  # a negative count of tokens to remove, in every transformers since 5.0
        count = min(longest, max_new_tokens - len(tokens) - 1)
        lap("other")
        window_BS = next_B[:, None] if cache is not None else kept_BT
        drafts_BK, laws = window_BS[:, :0], None
        if count > 0:
            drafts_BK, laws = rule.draft(model.draft_joint(hidden_BSD[:, keep], next_B), count)
            window_BS = torch.cat([window_BS, drafts_BK], dim=1)
            lap("draft")


def _no_clock(part: str) -> None:
    return None


def _check(
    model: DraftingModel, prompt_T: Tensor, max_new_tokens: int, sampling: Sampling, generator: torch.Generator | None
) -> None:
    if prompt_T.dim() != 1 or prompt_T.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"the prompt is a {prompt_T.dtype} tensor of shape {tuple(prompt_T.shape)}; pass one row of token ids, "
            "shape (T,), int64"
        )
    if len(prompt_T) == 0:
        raise ValueError("the prompt is empty; pass at least one token, for example the beginning-of-sequence token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} writes nothing; pass at least 1")
    if len(prompt_T) + max_new_tokens > model.context:
        room = model.context - len(prompt_T)
        advice = f"max_new_tokens of at most {room}" if room > 0 else f"a prompt of fewer than {model.context} tokens"
        raise ValueError(
            f"a prompt of {len(prompt_T)} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
            f"{model.context}; pass {advice}"
        )
    least, most = int(prompt_T.min()), int(prompt_T.max())
    if least < 0 or most >= model.vocab_size:
        raise ValueError(
            f"the prompt holds token id {least if least < 0 else most}, the vocabulary is 0..{model.vocab_size - 1}; "
            "encode the prompt with the tokenizer that the model was trained with"
        )
    if not sampling.greedy and generator is None:
        raise ValueError(
            "sampling needs a generator; pass generator=torch.Generator().manual_seed(0), or temperature 0"
        )
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode, where its law may be random; call model.eval() first")
