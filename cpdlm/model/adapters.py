"""The last layers of a frozen trunk once more, with low-rank adapters (LoRA, arXiv 2106.09685), for the draft alone.

The target reads the trunk as it is; the draft reads what the adapted copy of its last layers makes of the same states.
Every forward of decoding runs both, so that the price of the second is in every timing. A model's `hidden` then holds
the target's state and the draft's side by side, (..., 2D). Only the adapters train and are stored.

Letters: B batch, T position, D width.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cpdlm.config import ConfigError
from cpdlm.model.trunk import Mask, Trunk, new_cache

PROBE = 7  # tokens


class DraftTrunk(nn.Module):
    """States before the last `layers` layers of a trunk -> what those layers, adapted, and the final norm make of them.

    Norm and embeddings are the trunk's own. The layers are copies, frozen, with adapters of rank `rank` on every linear
    map inside. Adapters start at zero: the draft's states are then the target's. ConfigError where `peft` is not
    installed, and for a trunk whose last layers cannot be run by themselves.
    """

    def __init__(self, trunk: Trunk, layers: int, rank: int) -> None:
        super().__init__()
        kind = type(trunk.body).__name__
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ConfigError(
                f"model.adapter_layers={layers} needs the package peft ({error}); type pip install peft, or 0"
            ) from error
        name = next((name for name in ("layers", "h") if hasattr(trunk.body, name)), None)
        every = list(getattr(trunk.body, name)) if name is not None else []
        if name is None or not 0 < layers <= len(every):
            raise ConfigError(
                f"model.adapter_layers={layers}: {kind} has {len(every)} layers in a row; give fewer, or 0"
            )
        self.layers = layers
        last = nn.ModuleList(copy.deepcopy(each) for each in every[-layers:]).requires_grad_(False)
        linear = {path.rpartition(".")[2] for path, each in last.named_modules() if isinstance(each, nn.Linear)}
        if not linear:
            raise ConfigError(
                f"model.adapter_layers={layers}: the layers of {kind} have no linear maps to adapt; type 0"
            )
        for module in last.modules():
            if isinstance(index := vars(module).get("layer_idx"), int):
                vars(module)["layer_idx"] = index - len(every) + layers
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(linear)), last)
        self.trunk = Trunk(shortened(trunk.body, name, last))
        for path, parameter in self.named_parameters():
            parameter.requires_grad_(is_adapter(path))
            if is_adapter(path):
                parameter.data = parameter.data.float()

    def forward(
        self,
        middle_BTD: Tensor,
        position_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); the rest as in `Trunk.forward`."""
        hidden_BTD: Tensor = self.trunk.embedded(middle_BTD, position_ids_BT, cache, mask)
        return hidden_BTD


class TwoCaches:
    """A trunk's cache and its draft's, which grow and shrink together."""

    def __init__(self) -> None:
        self.target, self.draft = new_cache(), new_cache()

    @property
    def layers(self) -> list[Any]:
        return [*self.target.layers, *self.draft.layers]

    def get_seq_length(self) -> int:
        return int(self.target.get_seq_length())

    def crop(self, negative: int) -> None:
        self.target.crop(negative)
        self.draft.crop(negative)

    def batch_select_indices(self, index_B: Tensor) -> None:
        self.target.batch_select_indices(index_B)
        self.draft.batch_select_indices(index_B)


def is_adapter(path: str) -> bool:
    """Whether a parameter of that name is an adapter's, which trains and is stored with the heads."""
    return ".lora_" in path


@torch.no_grad()
def check_draft_trunk(trunk: Trunk, draft: DraftTrunk) -> None:
    """ConfigError unless fresh adapters leave the trunk's states as they are.

    Some models do more with embeddings than add them.
    """
    vocab_size = trunk.embedding.shape[0]
    tokens_BT = torch.arange(PROBE, device=trunk.embedding.device).remainder(vocab_size).unsqueeze(0)
    target_BTD, middle_BTD = trunk.with_middle(tokens_BT, draft.layers)
    found_BTD = draft.eval()(middle_BTD)
    near = 1e-4 if target_BTD.dtype == torch.float32 else 2e-2
    if not bool((found_BTD - target_BTD).abs().max() <= near * max(1.0, float(target_BTD.abs().max()))):
        raise ConfigError(
            f"model.adapter_layers={draft.layers}: the last layers of {type(trunk.body).__name__} cannot be run by "
            "themselves; type 0"
        )


def shortened(body: Any, name: str, layers: nn.ModuleList) -> Any:
    """The body with these layers in place of its own; everything else is shared with it."""
    short = copy.copy(body)
    # Parameters, buffers, modules and hooks are held in dictionaries, which the copy would share.
    vars(short).update({key: each.copy() for key, each in vars(body).items() if isinstance(each, dict)})
    short._modules[name] = layers
    short.config = copy.deepcopy(body.config)
    text = short.config.get_text_config(decoder=True)
    text.num_hidden_layers = len(layers)
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = kinds[-len(layers) :]
    return short
