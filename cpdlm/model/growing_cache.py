"""A cache with room for more: a forward copies its own tokens' keys and values into it, not those of the whole text.

Letters: B rows, H heads, L slots in use, S tokens of a forward, W width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # slots that are added at least


class GrowingLayer(DynamicLayer):
    """Keys and values (B, H, L, W) of one layer, the first L slots of tensors that may have more."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor | None] = {}
        self._length = 0
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        return self._in_use("keys")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._hold("keys", value)

    @property
    def values(self) -> Tensor | None:
        return self._in_use("values")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._hold("values", value)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        before, self._length = self._length, self._length + key_states.shape[2]
        return self._appended("keys", key_states, before), self._appended("values", value_states, before)

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to remove")
        self._length = max(0, self._length + tokens_to_remove)

    def _appended(self, name: str, new_BHSW: Tensor, before: int) -> Tensor:
        held = self._held.get(name)
        # What a gradient may need, or inference mode has made, is not written to.
        fixed = new_BHSW.requires_grad or (
            held is not None and held.is_inference() != torch.is_inference_mode_enabled()
        )
        if held is None or fixed or held.shape[2] < self._length:
            room = 0 if fixed else max(ROOM, self._length // 4)
            size = (new_BHSW.shape[0], new_BHSW.shape[1], self._length + room, new_BHSW.shape[3])
            wider = new_BHSW.new_empty(size)
            if held is not None:
                wider[:, :, :before] = held[:, :, :before]
            self._held[name] = held = wider
        held[:, :, before : self._length] = new_BHSW
        return held[:, :, : self._length]

    def _in_use(self, name: str) -> Tensor | None:
        held = self._held.get(name)
        return None if held is None else held[:, :, : self._length]

    def _hold(self, name: str, value: Tensor | None) -> None:
        self._held[name], self._length = value, 0 if value is None else value.shape[2]


class GrowingCache(DynamicCache):
    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer
