"""Tokens -> hidden states: any Hugging Face causal language model body, behind one small module.

Letters: B batch, T position, S of them a window behind a cache, H attention heads, D width.
"""

import copy
from dataclasses import fields
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from cpdlm.config import SIZES, Config
from cpdlm.model.alibi import count_what_is_seen
from cpdlm.model.growing_cache import GrowingCache

# What this release of transformers calls the cache, among a model's arguments and in its outputs.
CACHE = "cache" if "cache" in {each.name for each in fields(BaseModelOutputWithPast)} else "past_key_values"

# Boolean: which tokens count (B, L+T), or which token sees which (B, 1, T, L+T). Of two of the latter, the second is
# for # layers with a sliding window.
Mask = Tensor | tuple[Tensor, Tensor]


class Trunk(nn.Module):
    """A body (no language-model head) that ends in its own final normalisation.

    body: a Hugging Face model that maps input_ids (B, T) to last_hidden_state (B, T, D) and takes a `Cache`.
    """

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.body = body
        count_what_is_seen(body)

    @property
    def width(self) -> int:
        return self.embedding.shape[1]

    @property
    def embedding(self) -> nn.Parameter:
        """Input embeddings (V, D); a tensor made of several where an adapter trains some of them."""
        return cast(nn.Parameter, self.body.get_input_embeddings().weight)

    @property
    def config(self) -> Any:
        """Of the text model: a body that reads images too keeps it inside its own."""
        return self.body.config.get_text_config(decoder=True)

    @property
    def attention_window(self) -> int | None:
        """To how many slots of the cache some layer looks back at most; None where all see all."""
        if set(getattr(self.config, "layer_types", None) or [""]) == {"full_attention"}:
            return None
        names = ("sliding_window", "attention_chunk_size", "window_size")
        return min((size for name in names if (size := getattr(self.config, name, None))), default=None)

    @cached_property
    def masks_windows(self) -> bool:
        """Whether two masks, one of them with the sliding window in it, do what the body does by itself.

        Tried on six tokens and a window of three.
        """
        other = copy.copy(self.body)
        other.config = copy.deepcopy(self.body.config)
        other.config.get_text_config(decoder=True).sliding_window = 3
        tokens_BT = torch.arange(6, device=self.embedding.device).remainder(len(self.embedding)).unsqueeze(0)
        causal = torch.ones(1, 1, 6, 6, dtype=torch.bool, device=tokens_BT.device).tril()
        try:
            with torch.no_grad():
                theirs_BTD = Trunk(other)(tokens_BT)
                ours_BTD = self(tokens_BT, mask=(causal, causal.triu(-2)))
                apart = (self(tokens_BT, mask=causal) - theirs_BTD).abs().max()
        except Exception:  # whatever a body of another kind makes of two masks
            return False
        return bool(apart > 0) and bool((ours_BTD - theirs_BTD).abs().max() <= apart / 10)

    def embed(self, tokens: Tensor) -> Tensor:
        """(...,) ids -> (..., D) input embeddings."""
        embedded: Tensor = self.body.get_input_embeddings()(tokens)
        return embedded

    def forward(
        self,
        tokens_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D). With a cache, tokens_BT follow what it holds and are appended to it in place.

        mask: see `Mask`; tokens in the cache come first. Without one, positions that restart within a row separate
        documents: the attention is then block-diagonal.
        """
        if mask is None and cache is None and position_ids_BT is not None:
            mask = _documents_apart(position_ids_BT)
        given: Any = mask
        if isinstance(mask, tuple):
            given = {"full_attention": self._added(mask[0]), "sliding_attention": self._added(mask[1])}
            if "full_attention" not in (getattr(self.config, "layer_types", None) or []):
                given = given["sliding_attention"]
        elif mask is not None and mask.dim() == 4:
            given = self._added(mask)
        use: dict[str, Any] = {"use_cache": cache is not None, CACHE: cache}
        hidden_BTD: Tensor = self.body(
            input_ids=tokens_BT, position_ids=position_ids_BT, attention_mask=given, **use
        ).last_hidden_state
        return hidden_BTD

    def _added(self, mask: Tensor) -> Tensor:
        """A mask of four dimensions, as attention adds it. Not -inf: a padding row that sees nothing would be NaN."""
        dtype = self.embedding.dtype
        return mask.new_zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def layers(self) -> list[nn.Module]:
        """The transformer blocks, in order: what FSDP shards one by one."""
        blocks = next((found for name in ("layers", "h", "blocks") if (found := getattr(self.body, name, None))), None)
        assert blocks is not None, f"{type(self.body).__name__} has neither .layers nor .h nor .blocks"
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
    return GrowingCache()


def build_body(config: Config, vocab_size: int) -> PreTrainedModel:
    """A randomly initialised body of the size and family that the config names; context = data.context."""
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
