"""What a draft sees beside the trunk's hidden state: the pending token, and the token before each position.

`Anchor` puts the pending token into what gate and factors see. `Link` moves each factor by the token before it, which
makes the mixture one of Markov chains (`cpdlm.model.joint`).

Letters: P positions (any batch), N factors, M tokens at one factor, D width, K inner width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Anchor(nn.Module):
    """g = h + A(h, E[x_{t+1}]): the token-conditioned draft, whose gate and later factors see the pending token.

    Its control has the same parameters and costs the same, but sees A(h, h) (`link=blind`).

    One map shared by them all, a perceptron with a hidden layer; its output starts at zero, so that training starts
    from the joint without it. normed: its two inputs are brought to root mean square 1 each. Where embeddings
    are much smaller than hidden states, as in many pretrained models, the token is hardly seen otherwise.
    """

    def __init__(self, width: int, hidden_width: int, normed: bool = False) -> None:
        super().__init__()
        self.normed = normed
        self.into = nn.Linear(2 * width, hidden_width)
        self.out = nn.Linear(hidden_width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden_PD: Tensor, embedded_PD: Tensor) -> Tensor:
        """(..., D) and the pending token's embedding (..., D) -> (..., D)."""
        seen = [hidden_PD, embedded_PD]
        if self.normed:
            seen = [F.rms_norm(each, each.shape[-1:]) for each in seen]
        anchored_PD: Tensor = hidden_PD + self.out(F.silu(self.into(torch.cat(seen, dim=-1))))
        return anchored_PD


class Link(nn.Module):
    """What a factor's row gains from the token before it: U_s silu(A g + B E[x_{s-1}] + c_s), the same for all
    components.

    The inner half, up to silu, is here; the maps U_s are with the factors' (`FactorHeads.maps`).
    """

    def __init__(self, width: int, inner: int, factors: int) -> None:
        super().__init__()
        self.seen = nn.Linear(width, inner, bias=False)
        self.token = nn.Linear(width, inner, bias=False)
        self.positions_NK = nn.Parameter(torch.zeros(factors, inner))

    def forward(self, seen_PK: Tensor, embedded_PMD: Tensor, factors: int | slice) -> Tensor:
        """(..., M, K): for M factors, each behind its token, or for one factor behind M tokens.

        seen_PK: `self.seen` of what the factors see. embedded_PMD: embeddings of the tokens before.
        """
        embedded_PMD = F.rms_norm(embedded_PMD, embedded_PMD.shape[-1:])
        return F.silu(seen_PK.unsqueeze(-2) + self.token(embedded_PMD) + self.positions_NK[factors])
