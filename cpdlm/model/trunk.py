"""Tokens -> hidden states: any Hugging Face causal language model body, behind one small module.

Letters: B batch, T position, D width.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from cpdlm.config import SIZES, Config, ConfigError
from cpdlm.data.pretrained_files import brings_code

# What this release of transformers calls the cache, among a model's arguments and in its outputs.
CACHE = "cache" if "cache" in {each.name for each in fields(BaseModelOutputWithPast)} else "past_key_values"


class Trunk(nn.Module):
    """A body (no language-model head) that ends in its own final normalisation.

    body: a Hugging Face model that maps input_ids (B, T) to last_hidden_state (B, T, D) and takes a `Cache`.
    """

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.body = body

    @property
    def width(self) -> int:
        return self.embedding.shape[1]

    @property
    def embedding(self) -> nn.Parameter:
        """Input embeddings (V, D)."""
        weight = self.body.get_input_embeddings().weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def attention_window(self) -> int | None:
        """To how many slots of the cache some layer looks back at most; None where all see all."""
        names = ("sliding_window", "attention_chunk_size", "window_size")
        return min((size for name in names if (size := getattr(self.body.config, name, None))), default=None)

    def embed(self, tokens: Tensor) -> Tensor:
        """(...,) ids -> (..., D) input embeddings."""
        embedded: Tensor = self.body.get_input_embeddings()(tokens)
        return embedded

    def forward(
        self,
        tokens_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D). With a cache, tokens_BT follow what it holds and are appended to it in place.

        mask: boolean, (B, L+T) which tokens count, those in the cache first, or (B, 1, T, L+T) which token sees which.
        Without one, positions that restart within a row separate documents: the attention is then block-diagonal.
        """
        hidden_BTD: Tensor = self._run(position_ids_BT, cache, mask, input_ids=tokens_BT).last_hidden_state
        return hidden_BTD

    def with_middle(
        self,
        tokens_BT: Tensor,
        last: int,
        position_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and the states (B, T, D) that go into the last `last` layers."""
        done = self._run(position_ids_BT, cache, mask, input_ids=tokens_BT, output_hidden_states=True)
        return done.last_hidden_state, done.hidden_states[-1 - last]

    def embedded(
        self,
        embedded_BTD: Tensor,
        position_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`forward` of what stands where the embedded tokens would."""
        hidden_BTD: Tensor = self._run(position_ids_BT, cache, mask, inputs_embeds=embedded_BTD).last_hidden_state
        return hidden_BTD

    def _run(self, position_ids_BT: Tensor | None, cache: Cache | None, mask: Tensor | None, **inputs: Any) -> Any:
        if mask is None and cache is None and position_ids_BT is not None:
            mask = _documents_apart(position_ids_BT)
        if mask is not None and mask.dim() == 4:  # taken by the attention as it is, so in its own terms
            mask = mask.new_zeros(mask.shape, dtype=self.embedding.dtype).masked_fill(~mask, -math.inf)
        return self.body(
            position_ids=position_ids_BT,
            attention_mask=mask,
            use_cache=cache is not None,
            **{CACHE: cache},
            **inputs,
        )

    def layers(self) -> list[nn.Module]:
        """The transformer blocks, in order: what FSDP shards one by one."""
        blocks = getattr(self.body, "layers", None) or getattr(self.body, "h", None)
        assert blocks is not None, f"{type(self.body).__name__} has neither .layers nor .h"
        return list(blocks)

    def recompute_activations(self) -> None:
        """From now on training keeps the input of each block only, and runs the block again in the backward pass."""
        older = "gradient_checkpointing_enable"  # what transformers called it before 5.23
        getattr(self.body, "activation_checkpointing_enable", getattr(self.body, older))({"use_reentrant": False})


def _documents_apart(position_ids_BT: Tensor) -> Tensor | None:
    """(B, 1, T, T) boolean: causal, within a document; None where no row has two. Not every model makes it itself."""
    begins_BT = position_ids_BT.diff(dim=1, prepend=position_ids_BT[:, :1] - 1) != 1
    if not bool(begins_BT.any()):
        return None
    document_BT = begins_BT.cumsum(dim=1)
    return (document_BT.unsqueeze(2) == document_BT.unsqueeze(1)).tril().unsqueeze(1)


def new_cache() -> Cache:
    return DynamicCache()


def build_body(config: Config, vocab_size: int) -> PreTrainedModel:
    """A randomly initialised body of the size and family that the config names; context = data.context.

    Raises ConfigError for a config.json that is not a causal language model's, whose context is shorter than ours, or
    whose layers keep a state that cannot be rolled back behind rejected drafts.
    """
    if config.model.family.endswith(".json"):
        return _build_foreign_body(config.model.family, vocab_size, config.data.context)
    size = SIZES[config.size]
    if config.model.family == "gpt2":
        return GPT2Model(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=config.data.context,
                n_embd=size.width,
                n_layer=size.layers,
                n_head=size.attention_heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    return LlamaModel(
        LlamaConfig(
            vocab_size=vocab_size,
            max_position_embeddings=config.data.context,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.attention_heads,
            num_key_value_heads=size.key_value_heads or size.attention_heads,
            intermediate_size=size.feed_forward,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def _build_foreign_body(path: str, vocab_size: int, context: int) -> PreTrainedModel:
    try:
        shape = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        if brings_code(error):
            raise ConfigError(
                f"model.family={path} brings code of its own (auto_map), which is not executed"
            ) from error
        raise ConfigError(f"model.family={path} is not a Hugging Face config: {str(error).splitlines()[0]}") from error
    longest = getattr(shape, "max_position_embeddings", None) or context
    if longest < context:
        raise ConfigError(f"model.family={path} has a context of {longest}, data.context={context}; lower data.context")
    shape.vocab_size = vocab_size
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(shape, token, None)
    try:
        whole = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"model.family={path} is not a causal language model's config: {error}") from error
    kinds = {"full_attention", "sliding_attention", "chunked_attention", *(getattr(shape, "layer_types", None) or [])}
    if getattr(whole, "_is_stateful", False) or len(kinds) > 3:
        raise ConfigError(
            f"model.family={path} is a {shape.model_type} model, which keeps a state that cannot be rolled back behind "
            "rejected drafts; give the config of one with attention in every layer"
        )
    body: PreTrainedModel = getattr(whole, whole.base_model_prefix)
    return body
