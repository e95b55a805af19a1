"""What stock `generate` of `transformers` takes and our loop does not: refused, or left to the stock loop."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

STOCK = "transformers.GenerationMixin.generate(model, ...)"

# They keep something between calls or run the model themselves, so that a rejected draft would leave its trace.
_STATEFUL = (
    logits_process.ClassifierFreeGuidanceLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
_ROW_WISE = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
_NOT_HERE = "is not for this loop, which drafts and rolls back a cache of its own"
_CACHE = "would have to hold exactly what this loop keeps; pass the whole text as input_ids"
_REASONS = {
    "assistant_model": "is not needed, this model drafts for itself (draft=...)",
    "cache": _CACHE,
    "past_key_values": _CACHE,
}


def left_to_stock(processors: Iterable[Any], criteria: Iterable[Any], allowed: Any = None) -> bool:
    """Whether some are neither the library's own nor say that they are functions of each row's text; with a warning.

    allowed: the function given as prefix_allowed_tokens_fn, which a processor of the library's calls.
    """
    foreign = [each for each in processors if type(each).__module__ != logits_process.__name__]
    constrained = (each for each in processors if type(each) is logits_process.PrefixConstrainedLogitsProcessor)
    foreign += [each._prefix_allowed_tokens_fn for each in constrained]
    foreign += [each for each in criteria if type(each) not in _ROW_WISE]
    foreign += [] if allowed is None else [allowed]
    unknown = [each for each in foreign if getattr(each, "stateless", False) is not True]
    if unknown:
        warnings.warn(
            f"{getattr(unknown[0], '__name__', type(unknown[0]).__name__)} may keep something between calls: one token "
            "per forward is written, without drafts; give it the attribute stateless = True where each row's answer is "
            "a function of that row's (input_ids, scores)",
            stacklevel=3,
        )
    return bool(unknown)


class AnyAllowed(LogitsProcessor):
    """For the stock loop, which writes token 0 where the processors before this one leave none: ValueError instead.

    Rows that are done stay in that loop, and their processors may forbid what they like.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool((scores > -math.inf).any()):
            raise ValueError(
                f"the logits processors forbid every token at {input_ids.shape[1]}; loosen them, or end the text there "
                "with a stopping criterion"
            )
        return scores


def check_weights(model: Any) -> None:
    """Raise ValueError where drafts cannot read unembedding and heads: they take the weights, and call no modules."""
    parts = [part for part in (model.model.unembedding, model.model.heads, model.model.anchor) if part is not None]
    if any(each.is_meta for part in parts for each in part.parameters()):
        raise ValueError(
            "unembedding or heads are offloaded (device_map), where drafts cannot read their weights; offload layers "
            "of the trunk alone (model.trunk.body)"
        )
    if any(callable(getattr(each, "weight", None)) for part in parts for each in part.modules()):
        raise ValueError(
            "unembedding or heads are quantised in place (quantize_dynamic), and drafts read their weights; quantise "
            "model.model.trunk alone"
        )


def check_arguments(model: Any, given: dict[str, Any], asked: Callable[[str], Any]) -> None:
    """Raise ValueError for an argument that stock `generate` would take and our loop could not follow."""
    # peft puts its own in place where prompts are learnt, and the model's back afterwards.
    if getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model) is not model:
        raise ValueError(
            "prompt or prefix tuning (peft) puts learnt states before the text, which this loop does not see; "
            "give LoRA or another adapter of the weights"
        )
    if given.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds: this model reads token ids; pass input_ids")
    for name in ("assistant_model", "negative_prompt_ids", "cache", "past_key_values", "position_ids", "synced_gpus"):
        if given.get(name) is not None and given[name] is not False:
            raise ValueError(f"{name} {_REASONS.get(name, _NOT_HERE)}; {STOCK} takes it")
    if asked("cache_implementation") not in (None, "dynamic"):
        raise ValueError(f"cache_implementation={asked('cache_implementation')!r} {_NOT_HERE}; leave it out")
    if asked("token_healing"):
        raise ValueError(f"token_healing=True {_NOT_HERE}; leave it out, or call {STOCK}")


def check_options(options: GenerationConfig, processors: LogitsProcessorList) -> None:
    """Raise ValueError for a mode, an output or a processor that our loop does not have."""
    for name in ("assistant_early_exit", "use_mtp"):
        if getattr(options, name, None):
            raise ValueError(f"{name} {_REASONS['assistant_model']}; leave it out")
    mode = options.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{mode.value.replace('_', ' ')} is not for this loop, which decodes greedily (do_sample=False) or samples "
            f"(do_sample=True) with num_beams=1 and drafts by itself; {STOCK} has it, or says where it is"
        )
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if options.return_dict_in_generate and getattr(options, name):
            raise ValueError(
                f"{name}=True: this loop returns `sequences` alone; {STOCK} returns scores and logits, "
                "model.model.trunk.body(sequences, ...) attentions and hidden states (before model.prepare())"
            )
    for processor in processors:
        if isinstance(processor, _STATEFUL):
            raise ValueError(
                f"{type(processor).__name__} keeps a state from call to call, which rejected drafts would spoil; "
                f"leave it out (guidance_scale, watermarking_config), or call {STOCK}"
            )
