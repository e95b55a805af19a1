"""From hidden states to the logits of the next token.

Letters: V vocabulary, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Output:
    """Logits softcap * tanh(scale * (U h + b) / softcap), as pretrained models have them; a softcap of 0 is none."""

    scale: float = 1.0
    softcap: float = 0.0

    def __call__(self, hidden: Tensor, table: Tensor | nn.Module, bias_V: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., V). table: unembeddings (V, D) with their bias_V, or a module, which is called: it may have
        an adapter."""
        logits: Tensor = table(hidden) if isinstance(table, nn.Module) else F.linear(hidden, table, bias_V)
        if self.scale != 1:
            logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
