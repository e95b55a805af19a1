"""The model as `transformers` knows models: its configuration and its class, saved to and loaded from a folder.

A folder is self-contained: a frozen trunk is saved with the heads that were trained on it. Nothing here runs code that
comes with a folder.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from cpdlm.config import ConfigError
from cpdlm.decoding import Captures, Prepared, prepare
from cpdlm.hf.generate import SpeculativeGenerationMixin
from cpdlm.model.heads import HeadsConfig
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.output import Output
from cpdlm.model.trunk import CACHE, Trunk

# What a folder has for tools that import nothing of ours: code that they run once they are told to trust it.
SHIM = "cpdlm_installed"
AUTO_MAP = {"AutoConfig": f"{SHIM}.CpdlmConfig", "AutoModelForCausalLM": f"{SHIM}.CpdlmForCausalLM"}
_SHIM = '''"""All of the code that this folder brings: it takes the classes from the installed package cpdlm."""

from cpdlm.hf import CpdlmConfig, CpdlmForCausalLM

__all__ = ["CpdlmConfig", "CpdlmForCausalLM"]
'''


class CpdlmConfig(PreTrainedConfig):
    """Shape of a `LanguageModel`. text_config: the trunk's own configuration, a dict with its model_type or an object.

    max_position_embeddings: the context, in tokens. draft_ids: the tokens that drafts are made of (None: all). draft,
    nodes: what `generate` drafts with unless it is told. The shape of the heads stands beside these, under the names of
    `HeadsConfig`.
    """

    model_type = "cpdlm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vocab_size: int = 257
    max_position_embeddings: int = 256
    frozen_target: bool = False
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    output_bias: bool = False
    wide_heads: bool = False  # float32 on a trunk of bfloat16 or float16
    draft_ids: list[int] | None = None
    active: int = 0
    draft: str = "chain"
    nodes: int = 8
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = AutoConfig.for_model("llama", vocab_size=self.vocab_size)
        elif isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        width = self.text_config.get_text_config().hidden_size
        super().__post_init__(**asdict(HeadsConfig()) | HeadsConfig.upgraded(kwargs, width))

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As of the library; ConfigError for another model's folder, which would become one of fresh weights."""
        name = pretrained_model_name_or_path
        found = super().get_config_dict(name, **kwargs)
        if (kind := found[0].get("model_type")) != cls.model_type:
            raise ConfigError(
                f"{name} holds {f'a {kind} model' if kind else 'a model'} without heads; make a folder that has them: "
                f"cpdlm speed-up {name}"
            )
        return found

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing, as that of `CpdlmForCausalLM`."""

    def save_pretrained(self, *arguments: Any, **kwargs: Any) -> None:
        """As of the library, with a class of its own as the architecture: `transformers serve` loads no other."""
        self.architectures, self.auto_map = [AutoModelForCausalLM.__name__], AUTO_MAP
        super().save_pretrained(*arguments, **kwargs)

    @property
    def shape(self) -> HeadsConfig:
        return HeadsConfig(**{field.name: getattr(self, field.name) for field in fields(HeadsConfig)})

    @classmethod
    def of(cls, model: LanguageModel) -> CpdlmConfig:
        """The configuration from which a model of this shape is built."""
        return cls(
            text_config=model.trunk.body.config.to_dict() | {"_name_or_path": ""},  # where it lay is not for others
            vocab_size=model.vocab_size,
            max_position_embeddings=model.context,
            frozen_target=model.frozen_target,
            logit_scale=model.output.scale,
            logit_softcap=model.output.softcap,
            output_bias=model.unembedding.bias is not None,
            wide_heads=model.heads is not None
            and model.heads.gate.weight.dtype == torch.float32
            and model.trunk.embedding.dtype.itemsize < torch.float32.itemsize,
            draft_ids=model.draft_ids.tolist() if model.draft_ids is not None else None,
            active=model.active,
            tie_word_embeddings=model.embeddings_are_tied,
            **asdict(model.shape),
        )

    def build(self) -> LanguageModel:
        """A model of this shape with fresh weights, drafting from the whole vocabulary."""
        model = LanguageModel(
            Trunk(AutoModel.from_config(self.text_config, trust_remote_code=False)),
            self.vocab_size,
            self.shape,
            context=self.max_position_embeddings,
            frozen_target=self.frozen_target,
            tie_embeddings=self.tie_word_embeddings,
            output=Output(self.logit_scale, self.logit_softcap),
        )
        if self.output_bias:
            model.unembedding.bias = nn.Parameter(torch.zeros(self.vocab_size), requires_grad=False)
        model.active = self.active
        return model


class CpdlmForCausalLM(PreTrainedModel, SpeculativeGenerationMixin):
    """A `LanguageModel` (`.model`) that `transformers` can save, load, and generate with.

    language_model: an existing model to wrap, not copied; by default one with fresh weights.
    """

    config_class = CpdlmConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: CpdlmConfig, language_model: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.model = language_model if language_model is not None else config.build()
        self.captures = Captures(self.model)
        if config.tie_word_embeddings:
            source = next(name for name, each in self.named_parameters() if each is self.model.trunk.embedding)
            self._tied_weights_keys = {"model.unembedding.weight": source}
        if config.wide_heads:
            self._keep_in_fp32_modules_strict = {"heads", "anchor"}
        self.post_init()

    @classmethod
    def from_language_model(
        cls,
        model: LanguageModel,
        bos_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        defaults: GenerationConfig | None = None,
    ) -> CpdlmForCausalLM:
        """Wraps a model without copying it. What pads is by default the first eos.

        defaults: what `generate` does without options, that of the model which the heads are on; its ids go before
        those given here. Its kind of cache is left out, since the loop has one of its own.
        """
        wrapped = cls(CpdlmConfig.of(model), model)
        options = GenerationConfig() if defaults is None else copy.deepcopy(defaults)
        options.cache_implementation = options.cache_config = None
        if options.eos_token_id is None and eos_token_id is not None:
            options.eos_token_id = eos_token_id if isinstance(eos_token_id, int) else [*eos_token_id]
        if defaults is None:
            options.bos_token_id = bos_token_id
        ends = options.eos_token_id
        if options.pad_token_id is None and ends is not None:
            options.pad_token_id = ends if isinstance(ends, int) else ends[0]
        wrapped.generation_config = options
        wrapped.train(model.training)
        return wrapped

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, from safetensors alone. ValueError where weights and config differ."""
        kwargs["use_safetensors"] = True
        loaded: Any = super().from_pretrained(*arguments, output_loading_info=True, **kwargs)
        model, info = loaded
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unexpected:
            raise ValueError(
                f"{model.name_or_path} is not whole: its weights lack {missing[:3] or 'nothing'} and have "
                f"{unexpected[:3] or 'nothing'} too many; export it again with cpdlm export"
            )
        if model.model.frozen_target:  # loading makes new parameters, which are not frozen
            model.model.trunk.requires_grad_(False)
            model.model.unembedding.requires_grad_(False)
        if model.config.draft_ids is not None:  # a list is rows of the weights, which there were none of before
            model.model.use_draft_vocabulary(torch.tensor(model.config.draft_ids))
        return (model, info) if output_loading_info else model

    def prepare(self, weights: str = "auto") -> Prepared:
        """Make it decode faster on this processor, in place; see `cpdlm.decoding.prepared`."""
        return prepare(self.model, weights)

    def save_pretrained(self, *arguments: Any, **kwargs: Any) -> None:
        """As of the library; ValueError for a prepared model, whose plain weights are gone."""
        if self.model.weights != "plain":
            raise ValueError(
                f"this model is prepared for decoding (weights={self.model.weights}), its plain weights are gone; load "
                "it again and save that"
            )
        super().save_pretrained(*arguments, **kwargs)
        folder = Path(kwargs["save_directory"] if "save_directory" in kwargs else arguments[0])
        (folder / f"{SHIM}.py").write_text(_SHIM)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: saving would copy a module of this package into the folder, which has a file that imports it."""

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: a `LanguageModel` starts its own weights, its body does as its own class says."""

    def get_input_embeddings(self) -> torch.nn.Module:
        embeddings: torch.nn.Module = self.model.trunk.body.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Refused with ValueError: target, heads and draft vocabulary are made for the tokens that there are."""
        raise ValueError(
            f"this model's heads are made for its {self.model.vocab_size} tokens; change the base model's embeddings "
            "(resize_token_embeddings) and make heads for that: cpdlm speed-up FOLDER"
        )

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *more: Any, **options: Any) -> Any:
        """The embeddings as they are; ValueError, with nothing changed, for another number of tokens than theirs."""
        embeddings = self.get_input_embeddings()
        if new_num_tokens not in (None, self.model.embedded) or options.get("pad_to_multiple_of"):
            self.set_input_embeddings(embeddings)
        return embeddings

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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The target p of the next token, as every causal language model of the library gives it.

        input_ids: (B, T). attention_mask: (B, L+T), L tokens in the cache. cache: also under its older name
        past_key_values. labels: (B, T), -100 where there is none; the loss is the mean of -log p(next) in nats, under
        the target alone (cpdlm.training trains the heads). Returns logits (B, T, V). Raises ValueError
        for inputs and outputs that this model does not have, whatever their names.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one thing; pass one of them")
        cache = past_key_values if cache is None else cache
        asked = [name for name, value in kwargs.items() if not _means_nothing(name, value)]
        if asked or input_ids is None:
            raise ValueError(
                f"{asked[0] if asked else 'no input_ids'}: this model maps input_ids to logits, nothing else"
            )
        if cache is None and (use_cache if use_cache is not None else labels is None and not self.training):
            cache = self.model.new_cache()
        hidden_BTD = self.model.hidden(input_ids, position_ids, cache, attention_mask)
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Processors that are not blind to a constant (repetition_penalty) do to these what they do to the trunk's.
        logits_BTV = self.model.target_scores(hidden_BTD[:, positions])
        loss = None
        if labels is not None:
            if self.training and torch.is_grad_enabled() and not logits_BTV.requires_grad:
                raise ValueError(
                    "this loss is the frozen target's and trains nothing; heads train with cpdlm speed-up, or with "
                    "cpdlm.training.run.train. For the loss alone: model.eval()"
                )
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        held: dict[str, Any] = {CACHE: cache}
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **held)
        return output if return_dict is not False else output.to_tuple()


def _means_nothing(name: str, value: Any) -> bool:
    """Whether an argument that `forward` does not name changes nothing but the loss."""
    if name in ("inputs_embeds", "output_attentions", "output_hidden_states"):  # the library passes them unset
        return value is None or value is False
    return name in ("num_items_in_batch", "tokenizer")  # Trainer's, and what token healing leaves behind


AutoConfig.register(CpdlmConfig.model_type, CpdlmConfig, exist_ok=True)
AutoModelForCausalLM.register(CpdlmConfig, CpdlmForCausalLM, exist_ok=True)
