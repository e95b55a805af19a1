"""The body of a Llama-shaped model, with as few operations in a forward of few tokens as it takes.

A forward of one to sixteen tokens of a small model is hundreds of small operations around its products. Here queries,
keys and values are one product, gate and up another; a rotation is one multiplication of complex numbers; the heads
that share keys are rows of one attention; masks are made once, rotations looked up.

Letters: B rows, S tokens of a forward, L slots of the cache, D width, H heads, K heads of keys, G = H/K, W width of a
head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from cpdlm.decoding.products import Product
from cpdlm.model.trunk import CACHE

FEW = 32  # tokens of a forward whose heads become rows
ROTATIONS = ("default", "linear", "llama3", "yarn")  # the same whatever the length of the text
MAPS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
NORMS = ("input_layernorm", "post_attention_layernorm")

Make = Callable[[Tensor, Tensor | None], Product]


def fits(body: Any) -> bool:
    """Whether a body has the parts of a Llama and no others. That it also computes as one, a trial must show."""
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    rope = getattr(body.config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ROTATIONS or getattr(body.config, "hidden_act", None) not in ("silu", "swish"):
        return False
    parts = {f"{name}.weight" for name in (*MAPS, *NORMS)} | {f"{name}.bias" for name in MAPS}
    for layer in layers:
        if {name for name, _ in layer.named_parameters()} - parts:
            return False
        if any(type(_part(layer, name)) is not nn.Linear for name in MAPS):
            return False
        if any(not hasattr(_part(layer, name), "variance_epsilon") for name in NORMS):
            return False
    return hasattr(body, "norm") and hasattr(body, "rotary_emb") and hasattr(body, "embed_tokens")


def _part(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module


class Layer(nn.Module):
    def __init__(self, layer: Any, make: Make) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.width, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        queries, keys, values = attention.q_proj, attention.k_proj, attention.v_proj
        self.heads, self.key_heads = queries.out_features // self.width, keys.out_features // self.width
        self.norm, self.second_norm = layer.input_layernorm, layer.post_attention_layernorm
        paired = [_paired(each, self.width) for each in (queries, keys)]
        self.into = make(*_joined([*paired, (values.weight, values.bias)]))
        self.out = make(attention.o_proj.weight, attention.o_proj.bias)
        self.up = make(*_joined([(each.weight, each.bias) for each in (mlp.gate_proj, mlp.up_proj)]))
        self.down = make(mlp.down_proj.weight, mlp.down_proj.bias)

    def forward(self, hidden_BSD: Tensor, turns: Tensor, mask: Tensor | None, causal: bool, cache: Any) -> Tensor:
        seen_BSD = self._attended(_normed(hidden_BSD, self.norm), turns, mask, causal, cache)
        hidden_BSD = hidden_BSD + seen_BSD
        gate, up = self.up(_normed(hidden_BSD, self.second_norm)).chunk(2, dim=-1)
        return hidden_BSD + self.down(F.silu(gate) * up)

    def _attended(self, normed_BSD: Tensor, turns: Tensor, mask: Tensor | None, causal: bool, cache: Any) -> Tensor:
        batch, size, _ = normed_BSD.shape
        every = self.into(normed_BSD).view(batch, size, -1, self.width)
        turning = every[:, :, : self.heads + self.key_heads]
        turned = _turned(turning, turns)
        keys = turned[:, :, self.heads :].transpose(1, 2)
        values = every[:, :, self.heads + self.key_heads :].transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, self.index)
        queries = turned[:, :, : self.heads]
        if size > FEW or causal:
            out = F.scaled_dot_product_attention(
                queries.transpose(1, 2), keys, values, mask, is_causal=causal, scale=self.scaling, enable_gqa=True
            )
            return self.out(out.transpose(1, 2).reshape(batch, size, -1))
        grouped = queries.view(batch, size, self.key_heads, -1, self.width).permute(0, 2, 3, 1, 4)
        rows = grouped.reshape(batch, self.key_heads, -1, self.width)
        out = F.scaled_dot_product_attention(rows, keys, values, mask, scale=self.scaling)
        out = out.view(batch, self.key_heads, -1, size, self.width).permute(0, 3, 1, 2, 4)
        return self.out(out.reshape(batch, size, -1))


class FewOperations(nn.Module):
    """Takes the place of a body that `fits`, whose layers it empties one by one."""

    def __init__(self, body: Any, make: Make) -> None:
        super().__init__()
        self.config, self.embed_tokens, self.norm = body.config, body.embed_tokens, body.norm
        self.rotary = body.rotary_emb
        self.layers = nn.ModuleList()
        for index, layer in enumerate(body.layers):
            self.layers.append(Layer(layer, make))
            body.layers[index] = nn.Identity()  # the plain weights go as the others come
        self.turns_LW = _turns(self.rotary, self.embed_tokens.weight, 64)
        self.train(body.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **given: Any,
    ) -> BaseModelOutputWithPast:
        cache, hidden_BSD = given.get(CACHE), self.embed_tokens(input_ids)
        size = hidden_BSD.shape[1]
        before = cache.get_seq_length() if cache is not None else 0
        turns = self._turns(position_ids, before, size)
        mask, causal = self._mask(attention_mask, hidden_BSD, before)
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD, turns, mask, causal, cache)
        return BaseModelOutputWithPast(last_hidden_state=_normed(hidden_BSD, self.norm))

    def _turns(self, positions: Tensor | None, before: int, size: int) -> Tensor:
        longest = before + size if positions is None else int(positions.max()) + 1
        if longest > len(self.turns_LW):
            self.turns_LW = _turns(self.rotary, self.embed_tokens.weight, 2 * longest)
        turns = self.turns_LW[before : before + size][None] if positions is None else self.turns_LW[positions]
        return turns.unsqueeze(2)

    def _mask(self, given: Tensor | None, hidden_BSD: Tensor, before: int) -> tuple[Tensor | None, bool]:
        size = hidden_BSD.shape[1]
        if given is None:
            if size == 1 or before == 0:
                return None, size > 1
            seen = torch.ones(size, before + size, dtype=torch.bool).tril(before)[None, None]
        elif given.dim() == 2:
            seen = given[:, None, None, :].bool()
            if size > 1:
                seen = seen & torch.ones(size, seen.shape[-1], dtype=torch.bool).tril(seen.shape[-1] - size)
        else:
            seen = given
        if seen.dtype == torch.bool:
            low = torch.finfo(hidden_BSD.dtype).min
            seen = seen.new_zeros(seen.shape, dtype=hidden_BSD.dtype).masked_fill(~seen, low)
        if 1 < size <= FEW:
            layer: Any = self.layers[0]
            seen = seen.expand(-1, 1, size, -1).repeat(1, 1, layer.heads // layer.key_heads, 1)
        return seen, False


def _normed(x: Tensor, norm: Any) -> Tensor:
    return torch.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """x (B, S, H, W) whose pairs are neighbours, by turns (B, S, 1, W/2), complex."""
    wide = x.to(turns.real.dtype).view(*x.shape[:-1], -1, 2)
    return torch.view_as_real(torch.view_as_complex(wide) * turns).view(x.shape).to(x.dtype)


def _turns(rotary: Any, like: Tensor, length: int) -> Tensor:
    """(L, W/2) complex rotations of positions 0..length-1."""
    positions = torch.arange(length, device=like.device)[None]
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    cosines, sines = (each[0, :, : each.shape[-1] // 2] for each in rotary(like.new_zeros(0, dtype=exact), positions))
    return torch.complex(cosines, sines)


def _paired(linear: nn.Linear, width: int) -> tuple[Tensor, Tensor | None]:
    """Weights whose outputs i and i + W/2 of each head, which are rotated together, are neighbours."""

    def reordered(each: Tensor) -> Tensor:
        return each.view(-1, 2, width // 2, *each.shape[1:]).transpose(1, 2).reshape(each.shape)

    return reordered(linear.weight), None if linear.bias is None else reordered(linear.bias)


def _joined(maps: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    weights, biases = [weight for weight, _ in maps], [bias for _, bias in maps]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    return torch.cat(weights), torch.cat(
        [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in maps]
    )
