"""What each (position, component) makes of the hidden state before the unembedding: pure functions of flat parameters.

Parameters are stored with (position, component) first and flat, since FSDP2 shards their first dimension and the loss
takes them in parts, a position at a time.

Letters: P positions of text, n positions of the window, R rank, M = n R rows, D width, K inner width, X = D + N K.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Maps:
    """Rows z = h + W h of each (position, component), ready for the unembedding.

    names: of the parameters, in the order in which they are given, of
      full   (n R D, D)               W of each
      down, up   (n R K, D), (n R, K, D)   W = up^T down of each, with SiLU between where is_mlp
      base   (n D, D)                 a part of W that the components of a position share
      link   (n, K, D)                maps the inner half of the link, which stands behind h, into the row
    scale: what the unembedding's input is multiplied by.
    """

    names: tuple[str, ...]
    is_mlp: bool = False
    scale: float = 1.0

    def __call__(self, inputs_PX: Tensor, first: int, *parameters: Tensor) -> Tensor:
        """Rows (P M, D) of the positions whose parameters these are; `first` is the first of them."""
        given = dict(zip(self.names, parameters, strict=True))
        width = parameters[0].shape[-1]
        hidden_PD, inner_PX = inputs_PX[:, :width], inputs_PX[:, width:]
        rows_PMD = hidden_PD.unsqueeze(1) + self._moved(hidden_PD, given)
        shared_PnD = None
        if "base" in given:
            base = given["base"]
            shared_PnD = F.linear(hidden_PD, base).view(len(hidden_PD), len(base) // width, width)
        if "link" in given:
            positions, inner = given["link"].shape[:2]
            inner_PNK = inner_PX.reshape(len(hidden_PD), inner_PX.shape[1] // inner, inner)
            inner_PnK = inner_PNK[:, first : first + positions]
            gain_PnD = torch.bmm(inner_PnK.transpose(0, 1), given["link"]).transpose(0, 1)
            shared_PnD = gain_PnD if shared_PnD is None else shared_PnD + gain_PnD
        if shared_PnD is not None:
            rows_PMD = rows_PMD + shared_PnD.repeat_interleave(rows_PMD.shape[1] // shared_PnD.shape[1], dim=1)
        rows = rows_PMD.reshape(-1, width)
        return rows if self.scale == 1 else rows * self.scale

    def _moved(self, hidden_PD: Tensor, given: dict[str, Tensor]) -> Tensor:
        """W h (P, M, D) of each, but for what they share."""
        if "full" in given:
            full, width = given["full"], hidden_PD.shape[-1]
            return F.linear(hidden_PD, full).view(len(hidden_PD), len(full) // width, width)
        narrow_PMK = F.linear(hidden_PD, given["down"]).view(len(hidden_PD), *given["up"].shape[:2])
        if self.is_mlp:
            narrow_PMK = F.silu(narrow_PMK)
        return torch.bmm(narrow_PMK.transpose(0, 1), given["up"]).transpose(0, 1)

    def of_components(self, parameters: Sequence[Tensor], rank: int, chosen_k: Tensor) -> list[Tensor]:
        """The parameters of these components (k,) alone."""
        width, found = parameters[0].shape[-1], []
        inner = dict(zip(self.names, parameters, strict=True)).get("up", parameters[0]).shape[1]
        each = {"full": width, "down": inner, "up": 1}  # rows of one (position, component)
        for name, part in zip(self.names, parameters, strict=True):
            if name in each:
                tail = part.shape[1:]
                part = part.view(-1, rank, each[name], *tail).index_select(1, chosen_k).reshape(-1, *tail)
            found.append(part)
        return found


def no_map(hidden_PD: Tensor, first: int = 0) -> Tensor:
    """Rows that go to the unembedding as they are: separate unembeddings, or a single next-token head."""
    return hidden_PD


def part(parameter: Tensor, start: int, stop: int, positions: int) -> Tensor:
    """Rows of the positions start..stop-1 of the window, of `positions` in all.

    All of them are the parameter itself: a slice's gradient would be a second parameter.
    """
    each = len(parameter) // positions
    return parameter if (start, stop) == (0, positions) else parameter[start * each : stop * each]
