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
from typing import Any

import torch
from torch import Tensor

from cpdlm.decoding.drafters import Maker, Proposal, Uniforms, make_drafter
from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.forwards import CapturedForwards
from cpdlm.decoding.step import DraftingModel, Forwards, GrowingForwards

PLAIN = Sampling()


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
    def forwards(self) -> int:
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
    forwards: CapturedForwards | None = None,
) -> list[Decoded]:
    """Writes max_new_tokens tokens after each prompt, or fewer if eos comes first (eos is kept), with the target's law.

    prompts: (T,) ids each, on the model's device, of any lengths. generators: one per row, from which every random number
    of that row comes; greedy needs none. eos: one id or several. draft: a name of `strategies.STRATEGIES` ("none" is plain
    decoding), or what makes a strategy for a model whose draft law is no `Joint`. nodes: size of a tree, width of a beam. use_cache=False recomputes the whole sequence in every pass: same tokens, slower.

    target_scores(row, tokens so far, scores_V) -> scores_V changes the target (for logits processors: repetition penalties
    and the like) and then takes the place of `sampling`'s own filters there; drafts still follow `sampling`. stop(row,
    tokens so far) ends a row after the last of those tokens. on_tokens(row, tokens) receives what each pass fixed. clock(part) is called at
    the end of each stretch of work: "prefill", "draft", "trunk", "verify" (target law and acceptance test) or "other". passes: made once for this model, sampling
    and draft, they make every pass with the same tensors (`captured`), which is what a GPU wants; without target_scores.

    Raises ValueError, before any work, on no prompt, an empty one, ids outside the vocabulary, max_new_tokens below 1,
    prompt and new tokens beyond the model's context, sampling without a generator per row, a model in training mode; and,
    when it happens, on a target of NaN or -inf alone, naming the position.
    """
    _check(model, prompts, max_new_tokens, sampling, generators)
    prompts = [prompt_T.long() for prompt_T in prompts]
    device, timer = prompts[0].device, clock or _no_clock
    ends = frozenset([eos] if isinstance(eos, int) else eos or [])
    depths = model.horizon - 1
    deepest = 0 if draft == "none" else depths
    written = [Decoded(reached=[0] * depths, accepted=[0] * depths) for _ in prompts]
    rows = list(range(len(prompts)))  # rows of the passes
    done = set[int]()  # those of them that are written to their end
    uniforms = Uniforms(generators, device) if generators and not sampling.greedy else None
    if forwards is not None:
        _check_forwards(forwards, model, len(prompts), sampling, draft, nodes, target_scores is not None, use_cache)
        longest = max(len(prompt_T) for prompt_T in prompts)
        if longest + max_new_tokens > forwards.slots:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the {forwards.slots} slots of the captured "
                f"passes; make them with slots={longest + max_new_tokens} or more"
            )
        forwards.uniforms = uniforms
        made: Forwards = forwards
    else:
        drafter = make_drafter(draft, sampling, uniforms, nodes, processed=target_scores is not None)

        def process(target_BSV: Tensor, proposal: Proposal) -> Tensor:
            assert target_scores is not None
            return _processed(target_scores, target_BSV, proposal, rows, written, ends)

        made = GrowingForwards(
            model,
            drafter,
            uniforms,
            len(prompts),
            device,
            use_cache,
            process if target_scores is not None else None,
            timer,
        )
    timer("other")
    outcome, first = made.first(prompts), True
    while True:
        # Passes that do not wait for the host are one ahead of it; the last one is then in vain.
        ahead = made.next([], [], deepest) if made.runs_ahead else None
        host = outcome.read()
        timer("prefill" if first else "verify")
        first = False
        kept, going = [], []
        for index, (row, (keep, *proposed, following)) in enumerate(zip(rows, host, strict=True)):
            kept.append(keep)
            if row in done:
                continue
            if following >= model.vocab_size:
                raise ValueError(_broken(prompts[row], len(written[row].tokens) + keep, row, len(prompts)))
            new = _emit(
                written[row],
                [*proposed[:keep], following],
                min(keep + 1, len(proposed)),
                max_new_tokens,
                ends,
                None if stop is None else partial(stop, row),
            )
            if on_tokens is not None:
                on_tokens(row, new.tokens)
            if new.last:
                done.add(row)
            else:
                going.append(index)
        if not going:
            timer("other")
            return written
        if ahead is not None:
            outcome = ahead
            continue
        rows = [rows[index] for index in going]
        depth = min(deepest, max(max_new_tokens - len(written[row].tokens) for row in rows) - 1)
        outcome = made.next(kept, going, depth)


@dataclass(frozen=True)
class _New:
    tokens: list[int]
    last: bool


def _emit(
    done: Decoded,
    new: list[int],
    tested: int,
    most: int,
    ends: frozenset[int],
    stop: Callable[[list[int]], bool] | None,
) -> _New:
    """Append one pass's tokens to what a row has written, up to where it ends."""
    proposed, kept, last = tested, len(new) - 1, False
    for index in range(min(len(new), most - len(done.tokens))):
        done.tokens.append(new[index])
        last = new[index] in ends or len(done.tokens) == most or (stop is not None and stop(done.tokens))
        if last:
            new = new[: index + 1]
            break
    done.emitted.append(len(new))
    # A draft behind the end was neither reached nor accepted.
    for depth in range(min(proposed, len(new))):
        done.reached[depth] += 1
        done.accepted[depth] += depth < kept
    return _New(new, last)


def _processed(
    target_scores: Callable[[int, list[int], Tensor], Tensor],
    target_BSV: Tensor,
    proposal: Proposal,
    rows: list[int],
    written: list[Decoded],
    ends: frozenset[int],
) -> Tensor:
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


def _no_clock(part: str) -> None:
    return None


def _broken(prompt_T: Tensor, written: int, row: int, rows: int) -> str:
    which = f" of row {row}" if rows > 1 else ""
    return (
        f"the target law of token {len(prompt_T) + written}{which} (the prompt is 0..{len(prompt_T) - 1}) is NaN or -inf alone; "
        "check the weights (a diverged run?) or use a wider precision"
    )


def _check_forwards(
    forwards: CapturedForwards,
    model: DraftingModel,
    rows: int,
    sampling: Sampling,
    draft: str | Maker,
    nodes: int,
    processed: bool,
    use_cache: bool,
) -> None:
    if processed or not use_cache:
        raise ValueError("captured passes have neither target_scores nor use_cache=False; call without `passes`")
    asked = (model, rows, sampling, draft, nodes if draft in ("tree", "window", "path") else forwards.nodes)
    made = (forwards.model, forwards.rows, forwards.sampling, forwards.draft, forwards.nodes)
    for what, ours, theirs in zip(("model", "rows", "sampling", "draft", "nodes"), made, asked, strict=True):
        if ours is not theirs and (what == "model" or ours != theirs):
            shown = "" if what == "model" else f" {ours!r}, not {theirs!r}"
            raise ValueError(f"the passes were captured for another {what}{shown}; make CapturedPasses for this one")


def _check(
    model: DraftingModel,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator] | None,
) -> None:
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
