"""ALiBi (arXiv 2108.12409), whose bias is linear in the position of what is seen, for masks of any shape.

transformers counts slots of the cache. A token's position here is its rank among all that is seen: tokens of other
documents, dead slots and other branches of a tree do not count.

Letters: B batch, S tokens of a window, T those that they may see, D width, H attention heads, W width of a head.
"""

import sys
from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

BUILDER = "build_alibi_tensor"  # of the modules of BLOOM and of Falcon


def count_what_is_seen(body: PreTrainedModel) -> None:
    """Give a body with ALiBi biases that follow masks of four dimensions; any other is left as it is.

    BLOOM and Falcon call a function of their module: it is replaced there, and does what it did for masks (B, T).
    """
    module = sys.modules[type(body).__module__]
    theirs = getattr(module, BUILDER, None)
    if theirs is not None and not hasattr(theirs, "__wrapped__"):
        setattr(module, BUILDER, wraps(theirs)(partial(_ranked, theirs)))
    for block in getattr(body, "blocks", ()) if body.config.model_type == "mpt" else ():
        block.attn.forward = MethodType(_mpt_attention, block.attn)


def _ranked(theirs: Callable[..., Tensor], mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(B * heads, S, T) of what attention adds, for a mask (B, 1, S, T) that is 0 where a token is seen."""
    if mask.dim() == 2:
        return theirs(mask, heads, dtype)
    rank_BST = ((mask.squeeze(1) == 0).cumsum(dim=-1) - 1).clamp(min=0)
    whole_1T = torch.ones(1, mask.shape[-1], dtype=torch.long, device=mask.device)
    bias_HT = theirs(whole_1T, heads, dtype).squeeze(1)
    return bias_HT[:, rank_BST].transpose(0, 1).flatten(0, 1)


def _mpt_attention(
    self: Any,
    hidden_BSD: Tensor,
    position_bias: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    cache: Any = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """MptAttention.forward, whose own takes one bias for all rows.

    position_bias: (H, 1, longest text), by the distance to its last entry. attention_mask: (B, 1, S, T), True where a
    token is not seen. cache: what transformers called past_key_values before 5.24.
    """
    assert attention_mask is not None
    qkv_BSD = self.Wqkv(hidden_BSD)
    if self.clip_qkv:
        qkv_BSD = qkv_BSD.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    parts = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in qkv_BSD.chunk(3, dim=-1))
    query_BHSW, key_BHTW, value_BHTW = parts
    cache = past_key_values if cache is None else cache
    if cache is not None:
        key_BHTW, value_BHTW = cache.update(key_BHTW, value_BHTW, self.layer_idx)
    rank_B1ST = (~attention_mask).cumsum(dim=-1)
    behind_B1ST = rank_B1ST - rank_B1ST[..., -1:]
    slope_H11 = -position_bias[:, :, -2:-1]
    bias_BHST = (slope_H11 * behind_B1ST).to(query_BHSW.dtype)
    bias_BHST = bias_BHST.masked_fill(attention_mask, torch.finfo(query_BHSW.dtype).min)
    dropout = self.attn_dropout_p if self.training else 0.0
    seen_BHSW = F.scaled_dot_product_attention(
        query_BHSW, key_BHTW, value_BHTW, attn_mask=bias_BHST, dropout_p=dropout, scale=self.softmax_scale
    )
    return self.out_proj(seen_BHSW.transpose(1, 2).flatten(2)), None
