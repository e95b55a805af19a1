"""The model as `transformers` knows models: saved and loaded as a folder, behind AutoModelForCausalLM and `generate`.

    python -m cpdlm.hf.hub RUN DIR        RUN/: a finished run -> DIR/: config, weights, tokenizer, model card
    python -m cpdlm.hf.hub NAME DIR       the same of a model for which heads come with this package (smollm2)

Importing this module registers the classes, so that no remote code is ever run. A folder is self-contained: a frozen
trunk is saved with the heads that were trained on it.

Why `generate` is overridden, and how. Stock `generate` merges configurations, expands and checks its inputs and builds
logits processors and stopping criteria; all of that should stay the library's. Its loops, though, are private methods
(`_sample`), renamed and re-parametrised between releases. The documented way in is `custom_generate=FUNCTION`, which
is called where a loop would be, with everything prepared. So `generate` here refuses what speculation cannot do, hands
itself to the stock one as that function, and carries the two arguments which the library does not pass on to such
functions (the streamer, the tokenizer of stop strings). The stock loop stays within reach, one token per pass:
`transformers.GenerationMixin.generate(model, ...)`.

Letters: B rows, T tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub import ModelCardData
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    ClassifierFreeGuidanceLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.logging import disable_progress_bar

from cpdlm.config import Config, ConfigError
from cpdlm.data.corpus import load_corpus
from cpdlm.data.pretrained_files import described
from cpdlm.data.tokenizer import END, BytesTokenizer, HubTokenizer, SavedTokenizer, Tokenizer
from cpdlm.decoding import Captures, Sampling, decode_batch
from cpdlm.files import WriteError, write_bytes
from cpdlm.hf import released
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.trunk import Trunk
from cpdlm.training.checkpoints import (
    CONFIG,
    RunError,
    load_model,
    read_config,
    run_draft_vocabulary,
    trunk_eos,
    trunk_source,
)

STOCK = "transformers.GenerationMixin.generate(model, ...)"

# They keep something between calls or run the model themselves, so that a rejected draft would leave its trace.
_STATEFUL = (
    ClassifierFreeGuidanceLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
# What `Sampling` does by itself, in this order.
_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
# They read nothing but a row's text and scores, and need not see the whole batch for one row.
_ROW_BLIND = (
    *_WARPERS,
    ExponentialDecayLengthPenalty,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TypicalLogitsWarper,
)


class CpdlmConfig(PreTrainedConfig):
    """Shape of a `LanguageModel`. text_config: the trunk's own configuration, a dict with its model_type or an object.

    max_position_embeddings: the context, in tokens. draft_ids: the tokens that drafts are made of (None: all). The other
    fields are the arguments of `LanguageModel`.
    """

    model_type = "cpdlm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vocab_size: int = 257
    max_position_embeddings: int = 256
    rank: int = 1
    horizon: int = 1
    first_is_tied: bool = True
    anchored: bool = False
    blind: bool = False
    frozen_target: bool = False
    separate: bool = False
    map_rank: int = 0
    map_hidden: int = 0
    anchor_width: int = 0
    anchor_normed: bool = False
    bias_buffer: bool = False
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    wide_heads: bool = False  # float32 on a trunk of bfloat16 or float16
    draft_ids: list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = AutoConfig.for_model("llama", vocab_size=self.vocab_size)
        elif isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, model: LanguageModel) -> CpdlmConfig:
        """The configuration from which a model of this shape is built."""
        heads, anchor = model.heads, model.anchor
        inner, is_mlp = (heads.inner, heads.is_mlp) if heads is not None else (0, False)
        return cls(
            text_config=model.trunk.body.config.to_dict(),
            vocab_size=model.vocab_size,
            max_position_embeddings=model.context,
            rank=model.rank,
            horizon=model.horizon,
            first_is_tied=model.first_is_tied,
            anchored=anchor is not None,
            blind=model.blind,
            frozen_target=model.frozen_target,
            separate=heads is not None and heads.separate,
            map_rank=0 if is_mlp else inner,
            map_hidden=inner if is_mlp else 0,
            anchor_width=anchor.into.out_features if anchor is not None else 0,
            anchor_normed=anchor is not None and anchor.normed,
            bias_buffer=heads is not None and heads.balance_bias_R is not None,
            logit_scale=model.logit_scale,
            logit_softcap=model.logit_softcap,
            wide_heads=heads is not None
            and heads.gate.weight.dtype == torch.float32
            and model.trunk.embedding.dtype.itemsize < torch.float32.itemsize,
            draft_ids=model.draft_ids.tolist() if model.draft_ids is not None else None,
            tie_word_embeddings=model.embeddings_are_tied,
        )

    def build(self) -> LanguageModel:
        """A model of this shape with fresh weights, drafting from the whole vocabulary."""
        return LanguageModel(
            Trunk(AutoModel.from_config(self.text_config)),
            self.vocab_size,
            rank=self.rank,
            horizon=self.horizon,
            first_is_tied=self.first_is_tied,
            anchored=self.anchored,
            blind=self.blind,
            frozen_target=self.frozen_target,
            context=self.max_position_embeddings,
            tie_embeddings=self.tie_word_embeddings,
            separate=self.separate,
            map_rank=self.map_rank,
            map_hidden=self.map_hidden,
            anchor_width=self.anchor_width,
            anchor_normed=self.anchor_normed,
            bias_buffer=self.bias_buffer,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
        )


class CpdlmForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel` (`.model`) that `transformers` can save, load, and generate with.

    language_model: an existing model to wrap, not copied; by default one with fresh weights.
    """

    config_class = CpdlmConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: CpdlmConfig, language_model: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.model = language_model if language_model is not None else config.build()
        self._captures = Captures(self.model)
        if config.tie_word_embeddings:
            source = next(name for name, each in self.named_parameters() if each is self.model.trunk.embedding)
            self._tied_weights_keys = {"model.unembedding.weight": source}
        if config.wide_heads:
            self._keep_in_fp32_modules_strict = {"heads", "anchor"}
        self.post_init()

    @classmethod
    def from_language_model(
        cls, model: LanguageModel, bos_token_id: int | None = None, eos_token_id: int | Sequence[int] | None = None
    ) -> CpdlmForCausalLM:
        """Wraps a model without copying it. The ids go to its generation configuration; what pads is the first eos."""
        wrapped = cls(CpdlmConfig.of(model), model)
        first = eos_token_id if isinstance(eos_token_id, int) or eos_token_id is None else eos_token_id[0]
        wrapped.generation_config = GenerationConfig(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id if isinstance(eos_token_id, int) or eos_token_id is None else [*eos_token_id],
            pad_token_id=first,
        )
        wrapped.train(model.training)
        return wrapped

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, from safetensors alone; ValueError where weights and config do not match."""
        kwargs["use_safetensors"] = True
        loaded: Any = super().from_pretrained(*arguments, output_loading_info=True, **kwargs)
        model, info = loaded
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unexpected:
            raise ValueError(
                f"{model.name_or_path} is not whole: its weights lack {missing[:3] or 'nothing'} and have "
                f"{unexpected[:3] or 'nothing'} too many; export it again with python -m cpdlm.hf.hub"
            )
        if model.model.frozen_target:  # loading makes new parameters, which are not frozen
            model.model.trunk.requires_grad_(False)
            model.model.unembedding.requires_grad_(False)
        if model.config.draft_ids is not None:  # a list is rows of the weights, which there were none of before
            model.model.use_draft_vocabulary(torch.tensor(model.config.draft_ids))
        return (model, info) if output_loading_info else model

    def use_draft_vocabulary(self, ids: Tensor | None) -> None:
        """Draft from these tokens only, or from all (None), and save it so; see `LanguageModel.use_shortlist`."""
        self.model.use_draft_vocabulary(ids)
        self.config.draft_ids = ids.tolist() if ids is not None else None

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: a `LanguageModel` starts its own weights, its body does as its own class says."""

    def get_input_embeddings(self) -> torch.nn.Module:
        embeddings: torch.nn.Module = self.model.trunk.body.get_input_embeddings()
        return embeddings

    def scores(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) whose softmax is the target law: the unembedding's logits where the target is its softmax, so
        that processors which are not blind to a constant (repetition_penalty) do here what they do to the trunk; else log p.
        """
        if self.model.first_is_tied or self.model.frozen_target:
            return self.model.target_logits(hidden, self.model.unembedding.weight)
        return self.model.next_token_log_probs(hidden)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The target law of the next token, as every causal language model of the library gives it.

        input_ids: (B, T). attention_mask: (B, L+T), L tokens in the cache. labels: (B, T), -100 where there is none; the
        loss is the mean of -log p(next) in nats, under the target alone (cpdlm.training trains the joint law).
        Returns logits (B, T, V); see `scores`. Raises ValueError for inputs and outputs that this model has not.
        """
        names = ("inputs_embeds", "output_attentions", "output_hidden_states")
        asked = [name for name in names if kwargs.get(name) is not None and kwargs[name] is not False]
        if asked or input_ids is None:
            raise ValueError(
                f"{asked[0] if asked else 'no input_ids'}: this model maps input_ids to logits, nothing else"
            )
        if past_key_values is None and (use_cache if use_cache is not None else labels is None and not self.training):
            past_key_values = self.model.new_cache()
        hidden_BTD = self.model.hidden(input_ids, position_ids, past_key_values, attention_mask)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.scores(hidden_BTD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past_key_values)
        return output if return_dict is not False else output.to_tuple()

    def generate(  # type: ignore[override]  # the rest is by keyword
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        streamer: Any = None,
        draft: str = "chain",
        nodes: int = 8,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """`generate` of `transformers`, several tokens per pass: the law of what is written is that of the stock loop.

        inputs: (B, T) ids, padded on the left where attention_mask is 0. draft, nodes: as in `decode_batch`. Everything else
        is as in `GenerationMixin.generate`: greedy and sampling modes, any logits processors that are functions of
        (input_ids, scores), stopping criteria, streamer, num_return_sequences, and so on. Random numbers come from
        per-row generators seeded by torch's global one: torch.manual_seed makes a call reproducible (its tokens are not
        those of the stock loop with that seed; their law is). A row that a criterion stops is padded from there on.

        Returns (B, T + new) int64, padded on the right with pad_token_id (by default the first eos_token_id), or a
        GenerateDecoderOnlyOutput with `sequences` alone. Raises ValueError for beams, assistants, contrastive search,
        scores, caches and other things that this loop has not, naming what to do instead.
        """

        def asked(name: str) -> Any:
            """An option that is not yet merged into one configuration."""
            for value in (kwargs.get(name), getattr(generation_config, name, None)):
                if value is not None:
                    return value
            return getattr(self.generation_config, name, None)

        stock: Any = super()
        if kwargs.get("custom_generate") is not None:
            theirs: Tensor | GenerateDecoderOnlyOutput = stock.generate(
                inputs, generation_config, logits_processor, stopping_criteria, streamer=streamer, **kwargs
            )
            return theirs
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: this model reads token ids; pass input_ids")
        for name in ("assistant_model", "negative_prompt_ids", "past_key_values", "position_ids", "synced_gpus"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"{name} {_REASONS.get(name, _NOT_HERE)}; {STOCK} takes it")
        if asked("cache_implementation") not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={asked('cache_implementation')!r} {_NOT_HERE}; leave it out")
        if asked("token_healing"):
            raise ValueError(f"token_healing=True {_NOT_HERE}; leave it out, or call {STOCK}")
        tokenizer, stop_strings = kwargs.pop("tokenizer", None), asked("stop_strings")
        if stop_strings:
            if tokenizer is None:
                raise ValueError("stop_strings need the tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)")
            criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings)
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or []), criterion])
            kwargs["stop_strings"] = None

        def loop(
            model: CpdlmForCausalLM,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **prepared: Any,
        ) -> Tensor | GenerateDecoderOnlyOutput:
            mask_BT = prepared.get("attention_mask")  # absent where nothing is padding
            return model._speculate(
                input_ids, mask_BT, logits_processor, stopping_criteria, generation_config, streamer, draft, nodes
            )

        ours: Tensor | GenerateDecoderOnlyOutput = stock.generate(
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            streamer=streamer,
            custom_generate=loop,
            **kwargs,
        )
        return ours

    def init_continuous_batching(self, *arguments: Any, **options: Any) -> Any:
        """Refused with ValueError: its paged cache would not reach the trunk, whose tokens would then see too little."""
        raise ValueError(
            "continuous batching (generate_batch, cache_implementation='paged') is not for this model, which has a cache of its "
            "own; call generate with the prompts as one batch, padded on the left"
        )

    def _speculate(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor | None,
        processors: Any,
        criteria: Any,
        options: GenerationConfig,
        streamer: Any,
        draft: str,
        nodes: int,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """The loop itself, on what stock `generate` has prepared."""
        _check_options(options, processors)
        text_BT = input_ids_BT.to(self.device)
        rows, longest = text_BT.shape
        if longest == 0:
            raise ValueError("the prompt is empty; pass at least one token, for example the tokenizer's bos_token_id")
        whole_BT = torch.ones_like(text_BT) if mask_BT is None else mask_BT.to(self.device)
        if (whole_BT[:, -1] == 0).any():
            raise ValueError(
                "a prompt ends in padding, which would be continued; pad on the left: tokenizer.padding_side='left'"
            )
        ends = [int(token) for each in criteria if type(each) is EosTokenCriteria for token in each.eos_token_id]
        others = StoppingCriteriaList(
            each for each in criteria if type(each) not in (EosTokenCriteria, MaxLengthCriteria)
        )
        pad = int(options.pad_token_id) if options.pad_token_id is not None else ends[0] if ends else None
        if pad is None and others and rows > 1:
            raise ValueError("rows that stop at different lengths need padding: pass pad_token_id (or eos_token_id)")
        most = min(each.max_length for each in criteria if type(each) is MaxLengthCriteria) - longest

        def text_of(row: int, tokens: list[int], copies: int) -> Tensor:
            """(B, .) that row's text in every row: processors and criteria may keep something for each row."""
            text_T = torch.cat([text_BT[row], torch.tensor(tokens, dtype=torch.long, device=text_BT.device)])
            return text_T.repeat(copies, 1)

        alone = all(_row_blind(each) for each in processors)

        def processed(row: int, tokens: list[int], scores_V: Tensor) -> Tensor:
            copies, place = (1, 0) if alone else (rows, row)
            changed_BV: Tensor = processors(text_of(row, tokens, copies), scores_V.float().repeat(copies, 1))
            return changed_BV[place]

        def stop(row: int, tokens: list[int]) -> bool:
            return bool(others(text_of(row, tokens, rows), None)[row])

        sampling, exactly = _sampling(options, processors)
        stream = _Stream(streamer, rows) if streamer is not None else None
        generators = None
        if not sampling.greedy:
            seeds = torch.randint(2**63 - 1, (rows,)).tolist()
            generators = [torch.Generator(text_BT.device).manual_seed(seed) for seed in seeds]
        forwards = None
        if exactly and options.use_cache is not False:
            forwards = self._captures(rows, longest + most, sampling, draft, nodes)
        done = decode_batch(
            self.model if exactly else _WithScores(self),
            [text_T[whole_T != 0] for text_T, whole_T in zip(text_BT, whole_BT, strict=True)],
            most,
            sampling,
            generators,
            eos=ends,
            draft=draft,
            nodes=nodes,
            use_cache=options.use_cache is not False,
            target_scores=None if exactly else processed,
            stop=stop if others else None,
            on_tokens=stream.put if stream is not None else None,
            forwards=forwards,
        )
        if stream is not None:
            stream.end(pad)
        new = [each.tokens for each in done]
        width = max(len(tokens) for tokens in new)
        new_BT = torch.tensor([[*tokens, *[pad] * (width - len(tokens))] for tokens in new], dtype=torch.long)
        sequences_BT = torch.cat([input_ids_BT, new_BT.to(input_ids_BT.device)], dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences_BT) if options.return_dict_in_generate else sequences_BT  # type: ignore[arg-type]


AutoConfig.register(CpdlmConfig.model_type, CpdlmConfig, exist_ok=True)
AutoModelForCausalLM.register(CpdlmConfig, CpdlmForCausalLM, exist_ok=True)


# --- what stock generate prepares, for our loop -------------------------------------------------------------------------

_NOT_HERE = "is not for this loop, which drafts and rolls back a cache of its own"
_REASONS = {
    "assistant_model": "is not needed, this model drafts for itself (draft=...)",
    "past_key_values": "would have to hold exactly what this loop keeps; pass the whole text as input_ids",
}
# Modes that transformers itself has no more: where their code is.
_MOVED = {
    GenerationMode.CONTRASTIVE_SEARCH: "transformers-community/contrastive-search",
    GenerationMode.DOLA_GENERATION: "transformers-community/dola",
    GenerationMode.GROUP_BEAM_SEARCH: "transformers-community/group-beam-search",
    GenerationMode.CONSTRAINED_BEAM_SEARCH: "transformers-community/constrained-beam-search",
}


def _check_options(options: GenerationConfig, processors: LogitsProcessorList) -> None:
    for name in ("assistant_early_exit", "use_mtp"):
        if getattr(options, name, None):
            raise ValueError(f"{name} {_REASONS['assistant_model']}; leave it out")
    mode = options.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        refusal = (
            f"{mode.value.replace('_', ' ')} is not for this loop, which decodes greedily (do_sample=False) or samples "
            "(do_sample=True) with num_beams=1 and drafts by itself"
        )
        if mode in _MOVED:
            raise ValueError(
                f"{refusal}; sample, or use plain beams ({STOCK} with num_beams), or give the generate of the trunk's own model, "
                f"without heads, custom_generate='{_MOVED[mode]}' and trust_remote_code=True"
            )
        raise ValueError(f"{refusal}; {STOCK} has it")
    if options.return_dict_in_generate:
        for name in ("output_scores", "output_logits"):
            if getattr(options, name):
                raise ValueError(f"{name}=True: this loop returns `sequences` alone; {STOCK} returns the rest")
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(options, name):
                raise ValueError(
                    f"{name}=True: this loop returns `sequences` alone; pass those to model.model.trunk.body(sequences, {name}=True)"
                    + (" of a model loaded with attn_implementation='eager'" if name == "output_attentions" else "")
                )
    for processor in processors:
        if isinstance(processor, _STATEFUL):
            raise ValueError(
                f"{type(processor).__name__} keeps a state from call to call, which rejected drafts would spoil; "
                f"leave it out (guidance_scale, watermarking_config), or call {STOCK}"
            )


def _sampling(options: GenerationConfig, processors: LogitsProcessorList) -> tuple[Sampling, bool]:
    """How drafts are drawn, and whether that is exactly what the processors do to the target as well."""
    found = [each for each in processors if type(each) in _WARPERS]
    indices = [_WARPERS.index(type(each)) for each in found]
    exactly = (
        len(found) == len(processors)
        and indices == sorted(set(indices))
        and all(getattr(each, "filter_value", -math.inf) == -math.inf for each in found)
        and all(getattr(each, "min_tokens_to_keep", 1) == 1 for each in found)
    )
    if not options.do_sample:
        return Sampling(0.0), not processors
    values = {
        name: getattr(each, name) for each in found for name in ("temperature", "top_k", "top_p") if hasattr(each, name)
    }
    return Sampling(**values), exactly


def _row_blind(processor: Any) -> bool:
    if type(processor) is RepetitionPenaltyLogitsProcessor:  # told the padding of each row, where there is some
        return not isinstance(processor.prompt_ignore_length, Tensor)
    return type(processor) in _ROW_BLIND


class _WithScores:
    """The model with the scores that processors expect in place of log-probabilities."""

    def __init__(self, wrapped: CpdlmForCausalLM) -> None:
        model = wrapped.model
        self.horizon, self.vocab_size, self.context = model.horizon, model.vocab_size, model.context
        self.training, self.draft_ids = model.training, model.draft_ids
        self.attention_window = model.attention_window
        self.new_cache, self.hidden, self.draft_joint = model.new_cache, model.hidden, model.draft_joint
        self.target_log_probs = wrapped.scores


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
        for place in range(self.sent, until):
            self.streamer.put(torch.tensor([text[place] if place < len(text) else pad for text in self.texts]))
        self.sent = max(self.sent, until)


# --- from a run to a folder ---------------------------------------------------------------------------------------------


def export(run: Path, folder: Path) -> CpdlmForCausalLM:
    """Write a finished run as a folder that `from_pretrained` reads and `push_to_hub` uploads as it is; returns the model.

    run: its folder, or the name of a model with released heads. What is written: config.json, generation_config.json,
    model.safetensors, the tokenizer's files and README.md, the model card. A run that drafts from a shortlist takes it along.
    Raises RunError for a run that is not finished, whose tokenizer is gone or whose shortlist is not known, and for a folder
    that holds something else; ConfigError for a named model that cannot be had.
    """
    _check_folder(folder)
    tokenizer: Tokenizer
    if released.is_name(run):
        config = released.settings(str(run))
        model, tokenizer = released.load(str(run))
    else:
        config = read_config(run)
        if config.model.adapter_layers:
            raise RunError(
                f"{run} drafts with adapters in the trunk (model.adapter_layers), which an exported folder cannot hold"
            )
        model, tokenizer = load_model(run), run_tokenizer(run)
        model.use_draft_vocabulary(run_draft_vocabulary(run))
    check_vocabulary(run, model, tokenizer)
    wrapped = CpdlmForCausalLM.from_language_model(model, tokenizer.bos, end_tokens(config, tokenizer))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wrapped.save_pretrained(folder)
    except OSError as error:
        raise WriteError(f"cannot write {folder}: {error.strerror or error}; give another folder") from error
    _save_tokenizer(tokenizer, folder, model.context)
    write_bytes(folder / "README.md", card(run, config, model, folder.name).encode())
    return wrapped


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise RunError(f"{folder} is a file; give a new or empty folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    theirs = _read_json(folder / "config.json")
    if (folder / CONFIG).exists() or theirs is None or theirs.get("model_type") != CpdlmConfig.model_type:
        raise RunError(f"{folder} holds something else than an exported model; give a new or empty folder")


def run_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer of a run; raises RunError where the token cache that holds it is gone."""
    config = read_config(run)
    if config.data.tokenizer == BytesTokenizer.name:
        return BytesTokenizer()
    if config.data.bundle:
        try:
            return load_corpus(config, progress=False).tokenizer
        except ConfigError as error:
            raise RunError(f"{run} has no tokenizer here: {error}") from error
    evaluated = _read_json(run / "evaluate.json")
    if evaluated is None:
        raise RunError(f"{run} was not evaluated, so its tokenizer is not known; run its command again to finish it")
    tokens = Path(config.data.cache) / "tokens"
    for path in sorted(tokens.glob("*/meta.json")):
        meta = _read_json(path)
        if meta is not None and meta.get("sha256") == evaluated["data"]["sha256"]:
            saved = meta["tokenizer"]
            token_bytes = np.load(path.parent / "token_bytes.npy")
            return SavedTokenizer(
                saved["name"], saved["vocab_size"], saved["bos"], saved["eos"], path.parent, token_bytes
            )
    raise RunError(
        f"the tokenizer of {run} ({config.data.tokenizer}) lay in {tokens}, where no folder has the tokens of this run any "
        "more; run its command again, which makes them anew"
    )


def end_tokens(config: Config, tokenizer: Tokenizer) -> int | list[int]:
    """Ids that end a text: where `generate` stops on the pretrained trunk that a run accelerates, else the tokenizer's eos."""
    eos = trunk_eos(config)
    return tokenizer.eos if eos is None else eos


def check_vocabulary(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raise RunError where ids of the one are not ids of the other."""
    # Pretrained models have more embeddings than tokens: padding of the table.
    padded = model.frozen_target and _kind(tokenizer) in ("hf", "model")
    if tokenizer.vocab_size > model.vocab_size or (tokenizer.vocab_size < model.vocab_size and not padded):
        raise RunError(
            f"{folder}: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the weights {model.vocab_size}; "
            "they do not belong together"
        )


def _kind(tokenizer: Tokenizer) -> str:
    return tokenizer.name.partition(":")[0]


def _save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """The files that AutoTokenizer reads. Bytes and our BPE are written as the byte-level BPEs that they are (bytes: one
    without merges), with <|endoftext|> before every text, as the model has seen documents."""
    kind = _kind(tokenizer)
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(Path(place))
        if kind in ("hf", "model"):
            shutil.copytree(Path(place) / HubTokenizer.FOLDER, folder, dirs_exist_ok=True)
            return
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        if kind == "bpe":
            model = Model.from_file(str(Path(place) / "bpe.json"))
        else:
            model = Model(models.BPE(vocab={mark: byte for byte, mark in bytes_to_unicode().items()}, merges=[]))
            model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            model.decoder = decoders.ByteLevel()
        model.add_special_tokens([END])
        if model.token_to_id(END) != tokenizer.eos:
            raise RunError(f"the tokenizer {tokenizer.name} has {END} as an ordinary token and cannot be exported")
        model.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokenizer.eos)])
        PreTrainedTokenizerFast(
            tokenizer_object=model,
            bos_token=END,
            eos_token=END,
            pad_token=END,
            padding_side="left",
            model_max_length=context,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(str(folder))


def card(run: Path, config: Config, model: LanguageModel, name: str) -> str:
    """The model card, from what the run measured; what it did not measure is said to be missing, what the trunk's source does
    not say of it is left out."""
    evaluated, decoded = _read_json(run / "evaluate.json"), _read_json(run / "decode.json")
    data = (evaluated or {}).get("data", {})
    target = (
        "the frozen trunk's own next-token law, which the heads accelerate"
        if model.frozen_target
        else "the model's own next-token law"
    )
    million = sum(each.numel() for each in model.parameters()) / 1e6
    known: dict[str, Any] = described(config.model.trunk, trunk_source(config)) if config.is_pretrained else {}
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cpdlm", "multi-token-prediction", "speculative-decoding"],
        **known,
    )
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        f"# {name}",
        "",
        f"A {model.trunk.body.config.model_type} language model that predicts a joint law of its next {model.horizon} tokens, a mixture of rank "
        f"{model.rank} ([arXiv 2410.17765](https://arxiv.org/abs/2410.17765)), drafts from it and verifies its own draft: "
        "`generate` writes several tokens per pass, with the law of plain decoding.",
        "",
        "| | |",
        "|---|---|",
        f"| rank, horizon, anchor | {model.rank}, {model.horizon}, {config.anchor} |",
        f"| what decoding preserves | {target} |",
        f"| parameters | {million:.1f} M |",
        f"| context | {model.context} tokens |",
        f"| tokenizer | {config.data.tokenizer}, {model.vocab_size} tokens |",
        f"| data | {_data(config, data)} |",
        f"| training | {config.optim.steps} steps of {config.data.batch_rows} x {config.data.context} tokens, seed {config.seed} |",
    ]
    if model.draft_ids is not None:
        covered = f", {decoded['shortlist_coverage']:.1%}" if decoded is not None else ""
        lines.append(
            f"| drafts | from the {len(model.draft_ids):,} most frequent tokens{covered} of the training text; what is written may "
            "be any token |"
        )
    bits = (evaluated or {}).get("likelihood", {}).get("bits_per_byte")
    if bits is not None:
        lines.append(f"| test | {bits:.3f} bits per byte |")
    lines += ["", "## Use", "", "With the package `cpdlm` installed (`pip install .` in its repository):", ""]
    lines += ["```python", *_USE.format(name=name).splitlines(), "```", "", "## Measured", ""]
    if run.is_dir():
        command = (evaluated or {}).get("command", "# the run was not evaluated: its command is not known")
        command = " ".join(word for word in command.split(" ") if not word.startswith("tracking."))
        made_by = [command, f"python -m cpdlm.hf.hub {config.output}/{config.run_name} {name}"]
        lines += _measured(decoded)
    else:
        made_by = [f"python -m cpdlm.hf.hub {run} {name}"]
        lines += ["These heads come with `cpdlm`, whose README says how fast they were."]
    lines += ["", "## Made by", "", "```bash", *made_by, "```", ""]
    return "\n".join(lines)


_USE = """\
import cpdlm.hf.hub  # registers the classes; no remote code
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
text = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**text, max_new_tokens=48)[0], skip_special_tokens=True))"""


def _data(config: Config, data: dict[str, Any]) -> str:
    sources = ", ".join(
        f"{each['name']} {each.get('version', '')} ({each.get('licence', 'licence unknown')}"
        f"{', held out for testing' if each.get('held_out') else ''})"
        for each in data.get("sources") or []
        if isinstance(each, dict) and "name" in each
    )
    train = data.get("splits", {}).get("train")
    size = f", {train['tokens']:,} training tokens" if train else ""
    return f"{config.corpus}{': ' + sources if sources else ''}{size}"


def _measured(decoded: dict[str, Any] | None) -> list[str]:
    if decoded is None:
        return ["Its speed was not measured."]
    hardware = decoded["origin"]["hardware"]
    rows = [
        f"| {name} | {mode['tokens_per_pass']['mean']:.2f} | {mode['speedup']['median']:.2f} "
        f"[{mode['speedup']['low']:.2f}, {mode['speedup']['high']:.2f}] |"
        for name, mode in decoded["modes"].items()
    ]
    first = next(iter(decoded["modes"].values()))
    return [
        "| | tokens per pass | speed-up over plain decoding |",
        "|---|---|---|",
        *rows,
        "",
        f"{first['prompts']} prompts, {first['new_tokens']} new tokens each, batch 1; {hardware['processor']}, "
        f"{hardware['cores']} cores, accelerator: {hardware['accelerator']}.",
    ]


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file; raises RunError on a damaged one."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error})") from error
    return content if isinstance(content, dict) else None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cpdlm.hf.hub", description="Export a finished run as a folder for transformers and the hub."
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a finished run, or a model with released heads: smollm2"
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write, new or empty")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        export(options.run, options.folder)
    except (ConfigError, RunError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in sorted(options.folder.iterdir()):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
