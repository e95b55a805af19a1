"""The decoding loop: draft, target forward, accept, commit. Autoregressive and speculative decoding are this one loop.

A target forward runs over a window: the pending token x_{t+1}, which is decided already, and drafts of what follows it.
The drafter makes them from the hidden state before the pending token. The forward yields the target p behind every
token of the window; the drafter accepts some of its drafts and draws the token after them, the next pending token. The
first window is the prompt, without drafts. Autoregressive decoding has no drafts throughout. Drafts may also be copied
from the text so far, and as many may be verified as pay (`drafting`).

Every target forward emits the drafts that it accepts and the token after them, 1 to N tokens; the prompt's forward
emits one. So the tokens are the sum over target forwards, and depth k means x_{t+k}.

Rows of a batch share the target forwards and nothing else: each has its own generator, stops by itself and then leaves.

Letters: B rows still written, T position, S = K+1 positions of a window, K drafts, V vocabulary.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cpdlm.decoding.cache import Text, window_refusal
from cpdlm.decoding.captured import CapturedForwards
from cpdlm.decoding.drafters import BRANCHES, LOOKUP, Maker, Uniforms, make_drafter
from cpdlm.decoding.drafting import Drafting
from cpdlm.decoding.filtering import Sampling, is_whole
from cpdlm.decoding.forwards import GrowingForwards
from cpdlm.decoding.length import Costs
from cpdlm.decoding.lookup import LookupSettings
from cpdlm.decoding.model import DraftingModel
from cpdlm.decoding.proposals import Proposal


@dataclass(frozen=True)
class Decoded:
    """What was written, and what each target forward did for it.

    tokens: the new ids. emitted: tokens of each target forward, the prompt's first; they sum to len(tokens). reached:
    per depth 2..N (or as deep as copies are), how many drafts were tested there, that is, all before them were
    accepted. accepted: how many of those were accepted. Drafts behind an end-of-sequence token count as neither.
    """

    tokens: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def forwards(self) -> int:
        return len(self.emitted)


LOOKUP_SETTINGS = LookupSettings()


def _no_timer(part: str) -> None:
    return None


@dataclass(frozen=True)
class Options:
    """What few calls of `decode` need.

    nodes: drafts of a tree, or width of a beam. use_cache=False recomputes the whole text in every target forward: the
    same tokens, slower. forwards: made once for this model, number of rows, sampling and draft, `CapturedForwards` make
    every target forward with the same tensors, as a GPU wants it; they take no target_scores. lookup: how drafts are
    copied, for the names of `DRAFTERS` that begin with it. costs: of this machine; as many drafts are then verified as
    pay, instead of all. most_tokens: of a target forward over all rows, from which on drafts are left out (0: never).

    target_scores(row, tokens so far, scores_V) -> scores_V changes the target, for logits processors such as repetition
    penalties. It replaces the filters of `sampling` on the target; drafts still follow `sampling`. stop(row, tokens so
    far) ends a row after the last of those tokens. on_tokens(row, tokens) receives what each target forward emits.
    timer(part) is called at the end of each stretch of work: "prefill", "draft", "trunk", "verify" (target p,
    acceptance) or "other".
    """

    nodes: int = 8
    use_cache: bool = True
    forwards: CapturedForwards | None = None
    lookup: LookupSettings = LOOKUP_SETTINGS
    costs: Costs | None = None
    most_tokens: int = 0
    target_scores: Callable[[int, list[int], Tensor], Tensor] | None = None
    stop: Callable[[int, list[int]], bool] | None = None
    on_tokens: Callable[[int, list[int]], None] | None = None
    timer: Callable[[str], None] = _no_timer


UNFILTERED, DEFAULTS = Sampling(), Options()


def decode(
    model: DraftingModel,
    prompt_T: Tensor,
    max_new_tokens: int,
    sampling: Sampling = UNFILTERED,
    generator: torch.Generator | None = None,
    *,
    draft: str | Maker = "chain",
    eos: int | Sequence[int] | None = None,
    options: Options = DEFAULTS,
) -> Decoded:
    """`decode_batch` of one row."""
    generators = None if generator is None else [generator]
    rows = decode_batch(model, [prompt_T], max_new_tokens, sampling, generators, draft=draft, eos=eos, options=options)
    return rows[0]


@torch.inference_mode()
def decode_batch(
    model: DraftingModel,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling = UNFILTERED,
    generators: Sequence[torch.Generator] | None = None,
    *,
    draft: str | Maker = "chain",
    eos: int | Sequence[int] | None = None,
    options: Options = DEFAULTS,
) -> list[Decoded]:
    """Writes max_new_tokens tokens after each prompt, distributed as the target; fewer where eos comes first.

    prompts: (T,) ids each, on the model's device, of any lengths. generators: one per row, from which every random
    number of that row comes; greedy needs none. draft: a name in `DRAFTERS` ("none" is autoregressive), or what makes a
    drafter for a model whose draft distribution is no `Joint`. eos: one id or several; it is written, and ends its row.

    Raises ValueError, before any work, on no prompt, an empty one, ids outside the vocabulary, max_new_tokens below 1,
    prompt and new tokens beyond the model's context, sampling without a generator per row, a model in training mode;
    and, when it happens, on a target of NaN or -inf alone, naming the position.
    """
    _check(model, prompts, max_new_tokens, sampling, generators)
    name = draft if isinstance(draft, str) else "chain"
    depths = _deepest(model, name, options)
    texts = _Texts([prompt_T.long() for prompt_T in prompts], max_new_tokens, eos, depths, model, options)
    uniforms = Uniforms(generators, prompts[0].device) if generators and not sampling.greedy else None
    forwards, timer = _forwards(model, texts, sampling, uniforms, draft, options), options.timer
    timer("other")
    read, part = forwards.first(texts.prompts), "prefill"
    while True:
        # Captured forwards do not wait for the host and are one ahead of it; the last one is then in vain.
        ahead = forwards.next() if isinstance(forwards, CapturedForwards) else None
        host = read()
        timer(part)
        part = "verify"
        emitted, going = texts.commit(host)
        if not going:
            timer("other")
            return texts.written
        if isinstance(forwards, GrowingForwards):
            texts.select(going)
            forwards.commit(emitted, going)
            timer("other")
            ahead = forwards.next(texts.room - 1)
        assert ahead is not None
        read = ahead


def _forwards(
    model: DraftingModel,
    texts: _Texts,
    sampling: Sampling,
    uniforms: Uniforms | None,
    draft: str | Maker,
    options: Options,
) -> GrowingForwards | CapturedForwards:
    """The captured ones, or new ones that grow."""
    changes, captured, rows = options.target_scores is not None, options.forwards, len(texts.prompts)
    if captured is not None:
        if changes or options.costs or not options.use_cache:
            raise ValueError(
                "captured forwards have neither target_scores nor costs nor use_cache=False; leave out `forwards`"
            )
        captured.check(model, rows, sampling, draft, options.nodes, texts.longest)
        captured.uniforms = uniforms
        return captured
    drafter = make_drafter(draft, sampling, uniforms, options.nodes, processed=changes)
    name = draft if isinstance(draft, str) else "chain"
    if sampling.greedy:
        name = name.replace("branched", "chain")
    _check_window(model, rows, texts.longest, name, options)
    drafting = Drafting.of(model, drafter, name, texts.prompts, options.lookup, options.costs, options.most_tokens)
    text = Text(model, rows, texts.prompts[0].device, options.use_cache)
    return GrowingForwards(model, drafting, uniforms, text, texts.processed if changes else None, options.timer)


class _Texts:
    """The books: what each row has written, which rows are in the next target forward, and where each one ends."""

    def __init__(
        self,
        prompts: list[Tensor],
        max_new_tokens: int,
        eos: int | Sequence[int] | None,
        depths: int,
        model: DraftingModel,
        options: Options,
    ) -> None:
        self.prompts, self.most, self.vocab_size, self.options = prompts, max_new_tokens, model.vocab_size, options
        self.ends = _ends(eos)
        self.longest = max(len(prompt_T) for prompt_T in prompts) + max_new_tokens
        self.written = [Decoded(reached=[0] * depths, accepted=[0] * depths) for _ in prompts]
        self.rows = list(range(len(prompts)))
        self.done: set[int] = set()

    @property
    def room(self) -> int:
        """The most tokens that a row may still write."""
        return max(self.most - len(self.written[row].tokens) for row in self.rows)

    def select(self, going: list[int]) -> None:
        self.rows = [self.rows[index] for index in going]

    def commit(self, host: list[list[int]]) -> tuple[list[list[int]], list[int]]:
        """host: see `Read`. -> accepted drafts and next token per row, and the indices of rows that go on."""
        going = []
        for index, (row, (accepted, *drafts, following)) in enumerate(zip(self.rows, host, strict=True)):
            if row in self.done:
                continue
            if following >= self.vocab_size:
                raise ValueError(self._broken(row, drafts[:accepted]))
            present = sum(token >= 0 for token in drafts)
            tokens = self._emit(row, [*drafts[:accepted], following], min(accepted + 1, present))
            if self.options.on_tokens is not None:
                self.options.on_tokens(row, tokens)
            if row not in self.done:
                going.append(index)
        return [[*drafts[:accepted], following] for accepted, *drafts, following in host], going

    def _emit(self, row: int, tokens: list[int], tested: int) -> list[int]:
        """Append a target forward's tokens to what the row has written, up to where it ends; those that it took."""
        written, stop, accepted = self.written[row], self.options.stop, len(tokens) - 1
        for index, token in enumerate(tokens):
            written.tokens.append(token)
            full = len(written.tokens) == self.most
            if full or token in self.ends or (stop is not None and stop(row, written.tokens)):
                self.done.add(row)
                tokens = tokens[: index + 1]
                break
        written.emitted.append(len(tokens))
        # A draft behind the end was neither reached nor accepted.
        for depth in range(min(tested, len(tokens))):
            written.reached[depth] += 1
            written.accepted[depth] += depth < accepted
        return tokens

    def _broken(self, row: int, accepted: list[int]) -> str:
        which, prompt = f" of row {row}" if len(self.prompts) > 1 else "", len(self.prompts[row])
        text, change = [*self.written[row].tokens, *accepted], self.options.target_scores
        scores_V = torch.zeros(self.vocab_size, device=self.prompts[row].device)
        if change is not None and not bool((change(row, text, scores_V) > -math.inf).any()):
            return (
                f"the logits processors forbid every token at {prompt + len(text)}{which} (the prompt is "
                f"0..{prompt - 1}); loosen them, or end the text there with a stopping criterion"
            )
        return (
            f"the target distribution of token {prompt + len(text)}{which} "
            f"(the prompt is 0..{prompt - 1}) is NaN or -inf alone; check the weights (a diverged run?) or use a wider "
            "precision"
        )

    def processed(self, target_BSV: Tensor, proposal: Proposal) -> Tensor:
        """The caller's scores at every token of the window, each given the tokens before it.

        Behind a draft that these scores rule out, or that ends the row, nothing is read; the caller is not asked about
        texts that cannot come about.
        """
        target_scores = self.options.target_scores
        assert target_scores is not None
        drafts = proposal.tokens_BK.tolist()
        parents = proposal.parents_BK.tolist() if proposal.parents_BK is not None else None
        changed = []
        for b, row in enumerate(self.rows):
            texts: list[list[int] | None] = [self.written[row].tokens]
            scores = [target_scores(row, self.written[row].tokens, target_BSV[b, 0])]
            for k, token in enumerate(drafts[b]):
                parent = k if parents is None else parents[b][k]
                before = texts[parent]
                possible = token >= 0 and token not in self.ends and float(scores[parent][token]) > -math.inf
                text = [*before, token] if before is not None and possible else None
                target_V = target_BSV[b, k + 1]
                scores.append(target_V.to(scores[0].dtype) if text is None else target_scores(row, text, target_V))
                texts.append(text)
            changed.append(torch.stack(scores))
        return torch.stack(changed)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _check(
    model: DraftingModel,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator] | None,
) -> None:
    if len(prompts) == 0:
        raise ValueError("there is no prompt; pass at least one row of token ids")
    for prompt_T in prompts:
        _check_prompt(model, prompt_T, max_new_tokens)
    if not sampling.greedy and not generators:
        raise ValueError(
            "sampling needs a generator; pass generator=torch.Generator().manual_seed(0), or temperature 0"
        )
    for each in generators or ():
        if not isinstance(each, torch.Generator):
            raise ValueError(f"generator={each!r} is no generator; pass torch.Generator().manual_seed(0)")
    if generators and len(generators) != len(prompts):
        raise ValueError(f"{len(generators)} generators for {len(prompts)} prompts; pass one for each row")
    if model.training and not getattr(model, "frozen_target", False):  # a frozen one stays in evaluation
        raise ValueError("the model is in training mode, where dropout is random; call model.eval() first")


def _ends(eos: int | Sequence[int] | None) -> frozenset[int]:
    several: Any = [] if eos is None else [eos] if is_whole(eos, -1) else eos
    try:
        return frozenset(map(operator.index, several))
    except TypeError as error:
        raise ValueError(f"eos={eos!r} is no token id, nor several of them; pass whole numbers, or None") from error


def _deepest(model: DraftingModel, draft: str, options: Options) -> int:
    """How deep drafts may be."""
    return max(model.horizon - 1, options.lookup.most if draft.startswith(LOOKUP) else 0)


def _check_window(model: DraftingModel, rows: int, longest: int, draft: str, options: Options) -> None:
    branches = draft.endswith(BRANCHES)
    size = 1 + _deepest(model, draft, options)
    if branches:
        size = 1 + options.nodes + (options.lookup.most if draft.startswith(LOOKUP) else 0)
    apart = rows > 1 or branches  # slots are not positions
    window = model.attention_window if apart else None
    if window is not None and longest + size > window and not model.masks_windows:
        raise ValueError(window_refusal(window))


def _check_prompt(model: DraftingModel, prompt_T: Tensor, max_new_tokens: int) -> None:
    if not isinstance(prompt_T, Tensor):
        raise ValueError(f"the prompt is a {type(prompt_T).__name__}; pass one row of token ids: torch.tensor([1, 2])")
    if prompt_T.dim() != 1 or prompt_T.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"the prompt is a {prompt_T.dtype} tensor of shape {tuple(prompt_T.shape)}; pass one row of token ids, "
            "shape (T,), int64"
        )
    if len(prompt_T) == 0:
        raise ValueError("the prompt is empty; pass at least one token, for example the beginning-of-sequence token")
    if not is_whole(max_new_tokens):
        raise ValueError(f"max_new_tokens={max_new_tokens!r} writes nothing; pass a whole number, at least 1")
    if len(prompt_T) + max_new_tokens > model.context:
        room = model.context - len(prompt_T)
        advice = f"max_new_tokens of at most {room}" if room > 0 else f"a prompt of fewer than {model.context} tokens"
        raise ValueError(
            f"a prompt of {len(prompt_T)} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
            f"{model.context}; pass {advice}"
        )
    least, most, known = int(prompt_T.min()), int(prompt_T.max()), getattr(model, "embedded", model.vocab_size)
    if least < 0 or most >= known:
        raise ValueError(
            f"the prompt holds token id {least if least < 0 else most}, the vocabulary is 0..{known - 1}; "
            "encode the prompt with the tokenizer that the model was trained with"
        )
