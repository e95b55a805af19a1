"""The decoding loop: plain, greedy and sampled generation, one row or many, are this one loop with other strategies.

One pass of the trunk runs over a window: the token already fixed, x_{t+1}, and drafts of what follows, made from the
hidden state before it. It yields the target behind every token of the window; the strategy keeps some of the drafts and
draws the token after them, which becomes the next fixed token. The first window is the prompt, with no drafts. Plain
decoding has no drafts throughout.

Every pass emits the drafts that it keeps and the token after them, 1 to N tokens; the pass over the prompt emits one.
So the tokens are the sum over passes, plain decoding has exactly one token per pass, and depth k means x_{t+k}.

Rows of a batch share the passes and nothing else: each has its own generator, stops by itself and then leaves.

Letters: B rows still written, T position, S = K+1 positions of a window, K drafts, J longest path through them,
N horizon, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.strategies import Maker, Proposal, Uniforms, make_strategy, nothing
from cpdlm.decoding.text import Text

PLAIN = Sampling()


class DraftingModel(Protocol):
    """What the loop needs of a model; `cpdlm.model.language_model.LanguageModel` has it. draft_ids (optional): (V',) the tokens
    that drafts are made of, where the joint covers a shortlist."""

    horizon: int
    vocab_size: int
    context: int

    def new_cache(self) -> Any: ...

    def hidden(
        self, tokens_BT: Tensor, position_ids_BT: Tensor | None = None, cache: Any = None, mask: Tensor | None = None
    ) -> Tensor: ...

    def target_log_probs(self, hidden: Tensor) -> Tensor: ...

    def draft_joint(self, hidden_BD: Tensor, fixed_B: Tensor) -> Any:
        """The `Joint` of what follows the fixed token, or what the strategy given as `draft` takes in its place."""
        ...


@dataclass(frozen=True)
class Decoded:
    """What was written, and what each pass of the trunk did for it.

    tokens: the new ids. emitted: tokens of each pass (the first is the pass over the prompt); they sum to len(tokens).
    reached, accepted: per depth 2..N, how many drafts were tested there (that is, all before them were kept) and how
    many of those were kept. Drafts behind an end-of-sequence token count as neither.
    """

    tokens: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def passes(self) -> int:
        return len(self.emitted)


def decode(
    model: DraftingModel,
    prompt_T: Tensor,
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    generator: torch.Generator | None = None,
    *,
    on_tokens: Callable[[list[int]], None] | None = None,
    **options: Any,
) -> Decoded:
    """`decode_batch` of one row. on_tokens receives the tokens of each pass as they are fixed."""
    say = None if on_tokens is None else lambda row, tokens: on_tokens(tokens)
    generators = None if generator is None else [generator]
    return decode_batch(model, [prompt_T], max_new_tokens, sampling, generators, on_tokens=say, **options)[0]


@torch.inference_mode()
def decode_batch(
    model: DraftingModel,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling = PLAIN,
    generators: Sequence[torch.Generator] | None = None,
    *,
    eos: int | Sequence[int] | None = None,
    draft: str | Maker = "chain",
    nodes: int = 8,
    use_cache: bool = True,
    target_scores: Callable[[int, list[int], Tensor], Tensor] | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    clock: Callable[[str], None] | None = None,
) -> list[Decoded]:
    """Writes max_new_tokens tokens after each prompt, or fewer if eos comes first (eos is kept), with the target's law.

    prompts: (T,) ids each, on the model's device, of any lengths. generators: one per row, from which every random number
    of that row comes; greedy needs none. eos: one id or several. draft: a name of `strategies.STRATEGIES` ("none" is plain
    decoding), or what makes a strategy for a model whose draft law is no `Joint`. nodes: size of a tree, width of a beam. use_cache=False recomputes the whole sequence in every pass: same tokens, slower.

    target_scores(row, tokens so far, scores_V) -> scores_V changes the target (for logits processors: repetition penalties
    and the like) and then takes the place of `sampling`'s own filters there; drafts still follow `sampling`. stop(row,
    tokens so far) ends a row after the last of those tokens. on_tokens(row, tokens) receives what each pass fixed. clock(part) is called at
    the end of each stretch of work: "prefill", "draft", "trunk", "verify" (target law and acceptance test) or "other".

    Raises ValueError, before any work, on no prompt, an empty one, ids outside the vocabulary, max_new_tokens below 1,
    prompt and new tokens beyond the model's context, sampling without a generator per row, a model in training mode; and,
    when it happens, on a target of NaN or -inf alone, naming the position.
    """
    _check(model, prompts, max_new_tokens, sampling, generators)
    prompts = [prompt_T.long() for prompt_T in prompts]
    device, lap = prompts[0].device, clock or _no_clock
    ends = frozenset([eos] if isinstance(eos, int) else eos or [])
    uniforms = Uniforms(generators, device) if generators and not sampling.greedy else None
    strategy = make_strategy(draft, sampling, uniforms, nodes, processed=target_scores is not None)
    draft_ids: Tensor | None = getattr(model, "draft_ids", None)
    deepest = model.horizon - 1 if draft != "none" else 0
    depths = model.horizon - 1
    written = [Decoded(reached=[0] * depths, accepted=[0] * depths) for _ in prompts]
    rows = list(range(len(prompts)))  # those still written
    text = Text(model, len(prompts), device, use_cache)
    window_BS = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)
    proposal, first = nothing(window_BS), True
    lap("other")
    hidden_BSD = text.prefill(prompts)
    while True:
        target_BSV = model.target_log_probs(hidden_BSD)
        if target_scores is not None:
            target_BSV = _processed(target_scores, target_BSV, proposal, rows, written, ends)
        verdict = strategy.verify(target_BSV, proposal)
        # The one host synchronisation of a pass.
        host = torch.cat([verdict.kept_B[:, None], verdict.tokens_BJ, verdict.next_B[:, None]], dim=1).tolist()
        lap("prefill" if first else "verify")
        kept, going = [], []
        for place, (row, (keep, *proposed, following)) in enumerate(zip(rows, host, strict=True)):
            if following >= model.vocab_size:
                raise ValueError(_broken(prompts[row], len(written[row].tokens) + keep, row, len(prompts)))
            kept.append(keep)
            new = _emit(
                written[row], [*proposed[:keep], following], min(keep + 1, len(proposed)), max_new_tokens, ends,
                None if stop is None else partial(stop, row),
            )  # fmt: skip
            if on_tokens is not None:
                on_tokens(row, new.tokens)
            if not new.last:
                going.append(place)
        if not going:
            lap("other")
            return written
        if not first:
            text.keep(window_BS.shape[1], kept, verdict.path_BJ)
        first = False
        if len(rows) == 1 and verdict.path_BJ is None:
            hidden_BD = hidden_BSD[:, kept[0]]
        else:
            at_B = verdict.kept_B if verdict.path_BJ is None else _last(verdict.path_BJ, verdict.kept_B)
            hidden_BD = hidden_BSD[torch.arange(len(rows), device=device), at_B]
        next_B = verdict.next_B
        if len(going) < len(rows):
            text.select(going)
            rows = [rows[place] for place in going]
            hidden_BD, next_B = hidden_BD[going], next_B[going]
            if uniforms is not None:
                uniforms.select(going)
        depth = min(deepest, max(max_new_tokens - len(written[row].tokens) for row in rows) - 1)
        lap("other")
        window_BS = next_B[:, None]
        proposal = nothing(window_BS)
        if depth > 0:
            proposal = strategy.draft(model.draft_joint(hidden_BD, next_B), depth)
            if draft_ids is not None:
                proposal = proposal.on_vocabulary(draft_ids, model.vocab_size)
            window_BS = torch.cat([window_BS, proposal.tokens_BK], dim=1)
            lap("draft")
        hidden_BSD = text.run(window_BS, proposal.depth_BS, proposal.seen_BSS)
        lap("trunk")


@dataclass(frozen=True)
class _New:
    tokens: list[int]
    last: bool


def _emit(
    done: Decoded, new: list[int], tested: int, most: int, ends: frozenset[int], stop: Callable[[list[int]], bool] | None
) -> _New:  # fmt: skip
    """Append one pass's tokens to what a row has written, up to where it ends."""
    proposed, kept, last = tested, len(new) - 1, False
    for place in range(min(len(new), most - len(done.tokens))):
        done.tokens.append(new[place])
        last = new[place] in ends or len(done.tokens) == most or (stop is not None and stop(done.tokens))
        if last:
            new = new[: place + 1]
            break
    done.emitted.append(len(new))
    # A draft behind the end was neither reached nor accepted.
    for depth in range(min(proposed, len(new))):
        done.reached[depth] += 1
        done.accepted[depth] += depth < kept
    return _New(new, last)


def _processed(
    target_scores: Callable[[int, list[int], Tensor], Tensor], target_BSV: Tensor, proposal: Proposal, rows: list[int],
    written: list[Decoded], ends: frozenset[int],
) -> Tensor:  # fmt: skip
    """The caller's scores at every token of the window, each given the tokens before it.

    Behind a draft that these scores rule out, or that ends the row, nothing is read; the caller is not asked about texts
    that cannot come about.
    """
    drafts = proposal.tokens_BK.tolist()
    parents = proposal.parents_BK.tolist() if proposal.parents_BK is not None else None
    changed = []
    for b, row in enumerate(rows):
        texts: list[list[int] | None] = [written[row].tokens]
        scores = [target_scores(row, written[row].tokens, target_BSV[b, 0])]
        for k, token in enumerate(drafts[b]):
            parent = k if parents is None else parents[b][k]
            before = texts[parent]
            possible = before is not None and token not in ends and float(scores[parent][token]) > -math.inf
            text = [*before, token] if before is not None and possible else None
            target_V = target_BSV[b, k + 1]
            scores.append(target_scores(row, text, target_V) if text is not None else target_V.to(scores[0].dtype))
            texts.append(text)
        changed.append(torch.stack(scores))
    return torch.stack(changed)


def _last(path_BJ: Tensor, kept_B: Tensor) -> Tensor:
    """Window position of the last kept token: the fixed one (0) where no draft was kept."""
    if path_BJ.shape[1] == 0:
        return torch.zeros_like(kept_B)
    last_B = path_BJ.gather(1, (kept_B - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(kept_B > 0, last_B, 0)


def _no_clock(part: str) -> None:
    return None


def _broken(prompt_T: Tensor, written: int, row: int, rows: int) -> str:
    which = f" of row {row}" if rows > 1 else ""
    return (
        f"the target law of token {len(prompt_T) + written}{which} (the prompt is 0..{len(prompt_T) - 1}) is NaN or -inf alone; "
        "check the weights (a diverged run?) or use a wider precision"
    )


def _check(
    model: DraftingModel, prompts: Sequence[Tensor], max_new_tokens: int, sampling: Sampling,
    generators: Sequence[torch.Generator] | None,
) -> None:  # fmt: skip
    if not prompts:
        raise ValueError("there is no prompt; pass at least one row of token ids")
    for prompt_T in prompts:
        _check_prompt(model, prompt_T, max_new_tokens)
    if not sampling.greedy and not generators:
        raise ValueError(
            "sampling needs a generator; pass generator=torch.Generator().manual_seed(0), or temperature 0"
        )
    if generators and len(generators) != len(prompts):
        raise ValueError(f"{len(generators)} generators for {len(prompts)} prompts; pass one for each row")
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode, where its law may be random; call model.eval() first")


def _check_prompt(model: DraftingModel, prompt_T: Tensor, max_new_tokens: int) -> None:
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
