"""`generate` of `transformers`, several tokens per target forward.

Stock `generate` merges configurations, expands and checks its inputs and builds logits processors and stopping
criteria. All of that stays the library's. Its loops are private methods (`_sample`), renamed between releases. The
documented way in is `custom_generate=FUNCTION`, which is called where a loop would be, with everything prepared. So
`generate` here refuses what speculation cannot do, hands its own loop to the stock method, and carries the arguments
that the library does not pass on to such functions (the streamer, the tokenizer of stop strings). The stock loop stays
within reach, one token per forward: `transformers.GenerationMixin.generate(model, ...)`.

Letters: B rows, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, logits_process
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
)

from cpdlm.decoding import Costs, ModelProxy, Options, Sampling, decode_batch
from cpdlm.decoding.length import batch_limit
from cpdlm.decoding.prepared import paying
from cpdlm.hf.refusals import AnyAllowed, check_arguments, check_options, check_weights, left_to_stock

if TYPE_CHECKING:
    from cpdlm.hf.model import CpdlmForCausalLM

# What `Sampling` does by itself, in this order.
_WARPERS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
)
# They read a row's text and scores alone, and need not see the whole batch for one row.
_ROW_BLIND = (
    *_WARPERS,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.MinPLogitsWarper,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TypicalLogitsWarper,
)


class SpeculativeGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a `CpdlmForCausalLM`: its `generate` drafts several tokens and verifies them."""

    def generate(  # type: ignore[override]  # the rest is by keyword
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        streamer: Any = None,
        draft: str | None = None,
        nodes: int | None = None,
        costs: Costs | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """`generate` of `transformers`, several tokens per forward. The output's distribution is the stock loop's.

        inputs: (B, T) ids, padded on the left where attention_mask is 0. draft, nodes, costs: as in `decode_batch`,
        the first two by default as the config says. The rest is as in `GenerationMixin.generate`: greedy search and
        sampling, logits processors, stopping criteria, streamer, num_return_sequences, and so on.

        A processor, criterion or prefix_allowed_tokens_fn that is not the library's may keep something between calls or
        answer for the whole batch, and rejected drafts would leave their trace: the stock loop then writes, one token
        per forward, and a warning says so. One with an attribute `stateless = True` is a function of (input_ids,
        scores) that treats each row by itself, and drafts go on.

        Random numbers come from one generator per row, seeded by torch's global one: torch.manual_seed makes a call
        reproducible. (The tokens differ from the stock loop's with that seed; their distribution does not.) A row that
        has stopped is padded.

        Returns (B, T + new) int64, padded on the right with pad_token_id (by default the first eos_token_id), or a
        GenerateDecoderOnlyOutput with `sequences` alone. Raises ValueError for what this loop cannot do (beams,
        assistants, contrastive search, scores, given caches), and names the alternative.
        """
        stock: Any = super()
        if kwargs.get("custom_generate") is None:

            def asked(name: str) -> Any:
                """An option before the configurations are merged."""
                for value in (kwargs.get(name), getattr(generation_config, name, None)):
                    if value is not None:
                        return value
                return getattr(self.generation_config, name, None)

            check_arguments(self, kwargs, asked)
            check_weights(self)
            allowed = kwargs.get("prefix_allowed_tokens_fn")
            if left_to_stock(logits_processor or (), stopping_criteria or (), allowed):
                logits_processor = LogitsProcessorList([*(logits_processor or ()), AnyAllowed()])
            else:
                tokenizer, stop_strings = kwargs.pop("tokenizer", None), asked("stop_strings")
                if stop_strings:
                    stopping_criteria = _with_stop_strings(stopping_criteria, stop_strings, tokenizer)
                    kwargs["stop_strings"] = None
                kwargs["custom_generate"] = partial(_loop, streamer=streamer, drafting=(draft, nodes, costs))
        done: Tensor | GenerateDecoderOnlyOutput = stock.generate(
            inputs, generation_config, logits_processor, stopping_criteria, streamer=streamer, **kwargs
        )
        return done

    def init_continuous_batching(self, *arguments: Any, **options: Any) -> Any:
        """Refused with ValueError: its paged cache would not reach the trunk, which would then see too few tokens."""
        raise ValueError(
            "continuous batching (generate_batch, cache_implementation='paged') is not for this model, which has a "
            "cache of its own; call generate with the prompts as one batch, padded on the left"
        )


@dataclass(frozen=True)
class _Call:
    """What stock `generate` has prepared for a loop."""

    text_BT: Tensor
    mask_BT: Tensor | None
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    options: GenerationConfig

    def prompts(self) -> list[Tensor]:
        """(T,) each, without padding. ValueError for one that is empty or padded on the right."""
        if self.text_BT.shape[1] == 0:
            raise ValueError("the prompt is empty; pass at least one token, for example the tokenizer's bos_token_id")
        whole_BT = torch.ones_like(self.text_BT) if self.mask_BT is None else self.mask_BT.to(self.text_BT.device)
        if (whole_BT[:, -1] == 0).any():
            raise ValueError(
                "a prompt ends in padding, which would be continued; pad on the left: tokenizer.padding_side='left'"
            )
        return [text_T[whole_T != 0] for text_T, whole_T in zip(self.text_BT, whole_BT, strict=True)]

    def ends(self) -> list[int]:
        return [int(token) for each in self.criteria if type(each) is EosTokenCriteria for token in each.eos_token_id]

    def new_tokens(self, context: int) -> int:
        """How many are asked for, or as many as there is room for: the 256 of pipeline(...) may be nobody's wish."""
        longest = min(each.max_length for each in self.criteria if type(each) is MaxLengthCriteria)
        if longest > context > self.text_BT.shape[1]:
            warnings.warn(f"the text ends at the model's context of {context} tokens", stacklevel=2)
            longest = context
        return int(longest) - self.text_BT.shape[1]

    def stop(self) -> Callable[[int, list[int]], bool] | None:
        """Whether a row ends with these tokens, by criteria other than an eos or a length; None without such."""
        others = StoppingCriteriaList(
            each for each in self.criteria if type(each) not in (EosTokenCriteria, MaxLengthCriteria)
        )
        if not others:
            return None
        return lambda row, tokens: bool(others(self._texts(row, tokens, len(self.text_BT)), None)[row])

    def target_scores(self) -> Callable[[int, list[int], Tensor], Tensor]:
        """What the processors make of one row's scores (V,)."""
        alone = all(_row_blind(each) for each in self.processors)

        def processed(row: int, tokens: list[int], scores_V: Tensor) -> Tensor:
            copies, index = (1, 0) if alone else (len(self.text_BT), row)
            texts_BT, scores_BV = self._texts(row, tokens, copies), scores_V.float().repeat(copies, 1)
            changed_BV: Tensor = self.processors(texts_BT, scores_BV)  # type: ignore[arg-type]
            return changed_BV[index]

        return processed

    def _texts(self, row: int, tokens: list[int], copies: int) -> Tensor:
        """(copies, .) that row's text in every row: processors and criteria may keep something for each row."""
        new_T = torch.tensor(tokens, dtype=torch.long, device=self.text_BT.device)
        return torch.cat([self.text_BT[row], new_T]).repeat(copies, 1)


def _loop(
    model: CpdlmForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    streamer: Any,
    drafting: tuple[str | None, int | None, Costs | None],
    **prepared: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """What stock `generate` calls in place of a loop of its own, with these names. drafting: draft, nodes, costs."""
    mask_BT = prepared.get("attention_mask")  # absent where nothing is padding
    ids_BT = input_ids if model.device.type == "meta" else input_ids.to(model.device)  # meta: offloaded
    call = _Call(ids_BT, mask_BT, logits_processor, stopping_criteria, generation_config)
    sequences_BT = _speculate(model, call, streamer, drafting).to(input_ids.device)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences_BT)  # type: ignore[arg-type]
    return sequences_BT


def _speculate(
    model: CpdlmForCausalLM, call: _Call, streamer: Any, drafting: tuple[str | None, int | None, Costs | None]
) -> Tensor:
    """(B, T + new): the loop, on what stock `generate` has prepared."""
    draft, nodes, costs = drafting
    draft, nodes = draft or paying(model.config.draft, model.model.weights), nodes or model.config.nodes
    check_options(call.options, call.processors)
    prompts, ends, most, stop = call.prompts(), call.ends(), call.new_tokens(model.model.context), call.stop()
    rows, longest = call.text_BT.shape
    device, options = call.text_BT.device, call.options
    pad = int(options.pad_token_id) if options.pad_token_id is not None else ends[0] if ends else None
    if pad is None and stop is not None and rows > 1:
        raise ValueError("rows that stop at different lengths need padding: pass pad_token_id (or eos_token_id)")
    sampling, exactly = _sampling(options, call.processors)
    stream = _Stream(streamer, rows) if streamer is not None else None
    generators = None
    if not sampling.greedy:
        seeds = torch.randint(2**63 - 1, (rows,)).tolist()
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    forwards = None
    if exactly and options.use_cache is not False and costs is None:
        forwards = model.captures(rows, longest + most, sampling, draft, nodes)
    done = decode_batch(
        model.model if exactly else _WithScores(model),
        prompts,
        most,
        sampling,
        generators,
        draft=draft,
        eos=ends,
        options=Options(
            nodes=nodes,
            use_cache=options.use_cache is not False,
            forwards=forwards,
            costs=costs,
            most_tokens=batch_limit(rows, device),
            target_scores=None if exactly else call.target_scores(),
            stop=stop,
            on_tokens=stream.put if stream is not None else None,
        ),
    )
    if stream is not None:
        stream.end(pad)
    width = max(len(each.tokens) for each in done)
    new = [[*each.tokens, *[pad] * (width - len(each.tokens))] for each in done]
    return torch.cat([call.text_BT, torch.tensor(new, dtype=torch.long, device=device)], dim=1)


def _with_stop_strings(criteria: Iterable[Any] | None, stop_strings: Any, tokenizer: Any) -> StoppingCriteriaList:
    if tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)")
    return StoppingCriteriaList([*(criteria or []), StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings)])


def _sampling(options: GenerationConfig, processors: LogitsProcessorList) -> tuple[Sampling, bool]:
    """How drafts are drawn, and whether the processors do exactly that to the target as well."""
    if not options.do_sample:
        return Sampling(0.0), not processors
    found = [each for each in processors if type(each) in _WARPERS]
    indices = [_WARPERS.index(type(each)) for each in found]
    exactly = (
        len(found) == len(processors)
        and indices == sorted(set(indices))
        and all(getattr(each, "filter_value", -math.inf) == -math.inf for each in found)
        and all(getattr(each, "min_tokens_to_keep", 1) == 1 for each in found)
    )
    names = ("temperature", "top_k", "top_p")
    values = {name: getattr(each, name) for each in found for name in names if hasattr(each, name)}
    return Sampling(**values), exactly


def _row_blind(processor: Any) -> bool:
    if type(processor) is logits_process.RepetitionPenaltyLogitsProcessor:  # may know the padding of each row
        return not isinstance(processor.prompt_ignore_length, Tensor)
    return type(processor) in _ROW_BLIND


class _Stream:
    """Hands tokens to a streamer as stock `generate` does: one of every row at a time, pad where a row has ended."""

    def __init__(self, streamer: Any, rows: int) -> None:
        self.streamer, self.sent = streamer, 0
        self.texts: list[list[int]] = [[] for _ in range(rows)]

    def put(self, row: int, tokens: list[int]) -> None:
        self.texts[row].extend(tokens)
        self._send(min(len(text) for text in self.texts), None)

    def end(self, pad: int | None) -> None:
        self._send(max(len(text) for text in self.texts), pad)
        self.streamer.end()

    def _send(self, until: int, pad: int | None) -> None:
        for index in range(self.sent, until):
            self.streamer.put(torch.tensor([text[index] if index < len(text) else pad for text in self.texts]))
        self.sent = max(self.sent, until)


class _WithScores(ModelProxy):
    """The model with the scores that processors expect in place of log-probabilities."""

    def __init__(self, wrapped: CpdlmForCausalLM) -> None:
        super().__init__(wrapped.model)
        self.target_log_probs = wrapped.model.target_scores
