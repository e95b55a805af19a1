"""Hidden state -> gate and factors of the joint.

`FactorHeads` owns the gate and one map per (position, component); rank 1 is the independent-heads baseline and takes
the same path. With `shared` heads a factor is a linear map of the hidden state followed by the unembedding that all
of them share; with `separate` heads each has an unembedding of its own, as in the paper's from-scratch models.

Letters: P positions (any flattened batch), C of them in a chunk, N factors, R rank, V vocabulary, D width, K inner
width of a low-rank or MLP map, M rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpdlm.config import Config
from cpdlm.model.joint import Joint, log_normalise
from cpdlm.model.losses.draft import Objective, Windows, chunked_sum
from cpdlm.model.losses.joint_nll import Features, joint_nll


@dataclass(frozen=True)
class HeadsConfig:
    """Shape of what turns hidden states into the joint distribution. The default is a next-token model without heads.

    rank: R components.  horizon: tokens of a window, x_{t+1} included.  first_is_tied: x_{t+1} has the next-token head,
    and the mixture covers x_{t+2..t+horizon} only.
    anchored: gate and later factors also see x_{t+1} (`Anchor`).  blind: its control, which sees h_t twice.
    anchor_width: hidden width of that map (0: half the trunk's).  anchor_normed: its two inputs have equal size.
    separate: an unembedding for each (position, component).  map_rank: rank of each map (0: full).  map_hidden: hidden
    width of each map as a two-layer perceptron (0: a linear map).  noise: size of the maps' random start.
    bias_buffer: the gate has a buffer that balances it in place of a bias.
    adapter_layers, adapter_rank: how many last layers of the trunk the draft has once more, with LoRA of that rank.
    """

    rank: int = 1
    horizon: int = 1
    first_is_tied: bool = True
    anchored: bool = False
    blind: bool = False
    anchor_width: int = 0
    anchor_normed: bool = False
    separate: bool = False
    map_rank: int = 0
    map_hidden: int = 0
    noise: float = 0.2
    bias_buffer: bool = False
    adapter_layers: int = 0
    adapter_rank: int = 8

    def __post_init__(self) -> None:
        assert self.first_is_tied or not self.anchored, "a token-conditioned draft has a next-token head of its own"

    @staticmethod
    def of(config: Config) -> HeadsConfig:
        """The shape that a run's settings ask for."""
        model = config.model
        return HeadsConfig(
            rank=config.rank,
            horizon=config.horizon,
            first_is_tied=config.first_is_tied,
            anchored=config.anchor != "none",
            blind=config.anchor == "blind",
            anchor_width=model.anchor_width,
            anchor_normed=model.anchor_normed,
            separate=model.head == "separate",
            map_rank=model.map_rank,
            map_hidden=model.map_hidden,
            noise=model.noise,
            bias_buffer=config.balance == "bias",
            adapter_layers=model.adapter_layers,
            adapter_rank=model.adapter_rank,
        )

    @property
    def factors(self) -> int:
        """Positions that the mixture covers."""
        return self.horizon - 1 if self.first_is_tied else self.horizon


class FactorHeads(nn.Module):
    """The gate and the factors of a rank-R mixture over N positions.

    The maps are residual, z = h + W h, with W small and random: components start near the trunk's own prediction and
    apart from each other (equal components would stay equal but for the gate). `noise` is the size of W h relative to
    h.
    logit_scale: of the model whose unembedding they share; it multiplies what goes there.
    W is full, of rank `map_rank`, or a two-layer perceptron with `map_hidden` units (SiLU between).
    """

    balance_bias_R: Tensor | None

    def __init__(
        self,
        width: int,
        vocab_size: int,
        shape: HeadsConfig,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        rank, factors, noise = shape.rank, shape.factors, shape.noise
        self.rank, self.factors, self.width, self.logit_scale = rank, factors, width, logit_scale
        self.inner, self.is_mlp = shape.map_rank or shape.map_hidden, shape.map_hidden > 0
        self.gate = nn.Linear(width, rank, bias=not shape.bias_buffer)
        nn.init.normal_(self.gate.weight, std=0.02)
        if self.gate.bias is not None:
            nn.init.zeros_(self.gate.bias)
        # balance=bias moves this buffer instead of adding a loss; it is part of the joint and of the checkpoint.
        self.register_buffer("balance_bias_R", torch.zeros(rank) if shape.bias_buffer else None)
        rows = factors * rank
        self.maps = nn.ParameterDict()
        if shape.separate:
            self.maps["unembeddings"] = nn.Parameter(torch.randn(rows * vocab_size, width) * 0.02)
        elif self.inner:
            self.maps["down"] = nn.Parameter(torch.randn(rows * self.inner, width) * width**-0.5)
            self.maps["up"] = nn.Parameter(torch.randn(rows, self.inner, width) * noise * self.inner**-0.5)
        else:
            self.maps["full"] = nn.Parameter(torch.randn(rows * width, width) * noise * width**-0.5)

    @property
    def separate(self) -> bool:
        return "unembeddings" in self.maps

    def log_weights(self, hidden_PD: Tensor) -> Tensor:
        """Normalised gate (..., R)."""
        scores_PR = self.gate(hidden_PD)
        if self.balance_bias_R is not None:
            scores_PR = scores_PR + self.balance_bias_R
        return log_normalise(scores_PR)

    def joint(self, hidden_PD: Tensor, unembedding_VD: Tensor) -> Joint:
        """The joint at each position, over all factors. No factor is normalised before something asks for it."""
        return self._joint(hidden_PD, unembedding_VD, 0, self.factors)

    def first(self, hidden_PD: Tensor, unembedding_VD: Tensor) -> Joint:
        """`joint(...).marginal(1)`, without the work of the other factors: what eq. 11 needs."""
        return self._joint(hidden_PD, unembedding_VD, 0, 1)

    def given_first(self, hidden_BD: Tensor, unembedding_VD: Tensor, first_B: Tensor) -> Joint:
        """`joint(...).condition(first_B)`. With one component the first factor tells nothing and is left out.

        first_B: rows of unembedding_VD, -1 for a token that is not among them.
        """
        if self.rank == 1:
            return self._joint(hidden_BD, unembedding_VD, 1, self.factors)
        return self.joint(hidden_BD, unembedding_VD).condition(first_B)

    def _joint(self, hidden: Tensor, unembedding_VD: Tensor, start: int, stop: int) -> Joint:
        logits = self._logits(hidden, unembedding_VD, start, stop)
        return Joint(self.log_weights(hidden), logits, normalised=False)

    def nll(
        self,
        hidden_PD: Tensor,
        future_PN: Tensor,
        weight_P: Tensor,
        unembedding_VD: Tensor,
        factors: int,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bounded-memory loss of the marginal over the first `factors` factors. A token of -1 has factors of 1.

        Returns sum_p weight_p nll_p, nll_P (detached, nats) and log_weights_PR.
        """
        log_weights_PR = self.log_weights(hidden_PD)
        table = self._unembeddings(unembedding_VD, 0, factors)
        total, nll_P = joint_nll(
            hidden_PD,
            log_weights_PR,
            future_PN[:, :factors],
            weight_P,
            table,
            self._features(),
            tuple(self._map_parameters(0, factors)),
            chunk_bytes,
        )
        return total, nll_P, log_weights_PR

    def draft_loss(
        self,
        hidden_PD: Tensor,
        windows: Windows,
        weight_P: Tensor,
        table_VD: Tensor,
        objective: Objective,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`nll` for any objective, with linear, low-rank or perceptron maps; table_VD carries no gradient.

        Returns sum_p weight_p loss_p, loss_P (detached) and log_weights_PR. The logits of a chunk take at most
        chunk_bytes; autograd holds about four times that beside them.
        """
        assert not self.separate and not table_VD.requires_grad, (
            "objectives of the draft are for maps to a frozen table"
        )
        log_weights_PR, features = self.log_weights(hidden_PD), self._features()
        vocab_size, parameters = table_VD.shape[0], self._map_parameters(0, self.factors)
        chunk = max(1, chunk_bytes // (4 * self.factors * self.rank * vocab_size))

        def loss(hidden_CD: Tensor, log_weights_CR: Tensor, *rest: Tensor) -> Tensor:
            window, maps = Windows(*rest[: len(rest) - len(parameters)]), rest[len(rest) - len(parameters) :]
            rows_MD = features(hidden_CD, *maps)
            logits_MV = F.linear(rows_MD.to(table_VD.dtype), table_VD)
            logits_CNRV = logits_MV.view(len(hidden_CD), self.factors, self.rank, vocab_size)
            return objective(log_weights_CR, logits_CNRV, window, table_VD)

        total, loss_P = chunked_sum(loss, (hidden_PD, log_weights_PR, *windows), parameters, weight_P, chunk)
        return total, loss_P, log_weights_PR

    def _logits(self, hidden: Tensor, unembedding_VD: Tensor, start: int, stop: int) -> Tensor:
        """(..., stop-start, R, V) of the factors start..stop-1."""
        flat_PD = hidden.reshape(-1, self.width)
        rows_MD = self._features()(flat_PD, *self._map_parameters(start, stop))
        table_VD = self._unembeddings(unembedding_VD, start, stop).reshape(-1, self.width)
        logits = F.linear(rows_MD.to(table_VD.dtype), table_VD)
        return logits.view(*hidden.shape[:-1], stop - start, self.rank, unembedding_VD.shape[0])

    def _unembeddings(self, unembedding_VD: Tensor, start: int, stop: int) -> Tensor:
        """(V, D) shared, or (stop-start, R, V, D). Parameters are stored flat: FSDP2 shards their first dimension."""
        if not self.separate:
            return unembedding_VD
        vocab_size = unembedding_VD.shape[0]
        rows = self.rank * vocab_size
        table = _part(self.maps["unembeddings"], start * rows, stop * rows)
        return table.view(stop - start, self.rank, vocab_size, self.width)

    def _map_parameters(self, start: int, stop: int) -> list[Tensor]:
        first, last = start * self.rank, stop * self.rank
        if self.separate:
            return []
        if self.inner:
            down = _part(self.maps["down"], first * self.inner, last * self.inner)
            return [down, _part(self.maps["up"], first, last)]
        return [_part(self.maps["full"], first * self.width, last * self.width)]

    def _features(self) -> Features:
        if self.separate:
            return no_map
        maps = partial(_narrow_maps, is_mlp=self.is_mlp) if self.inner else _full_maps
        return maps if self.logit_scale == 1 else partial(_scaled, maps=maps, scale=self.logit_scale)


def _part(parameter: Tensor, first: int, last: int) -> Tensor:
    """Rows first..last-1. All of them are the parameter itself: a slice's gradient would be a second parameter."""
    return parameter if (first, last) == (0, len(parameter)) else parameter[first:last]


def no_map(hidden_PD: Tensor) -> Tensor:
    """Rows that go to the unembedding as they are: separate unembeddings, or a single next-token head."""
    return hidden_PD


def _full_maps(hidden_PD: Tensor, full: Tensor) -> Tensor:
    """(P, D) and (N*R*D, D) -> rows (P*N*R, D)."""
    width = hidden_PD.shape[-1]
    moved_PMD = F.linear(hidden_PD, full).view(hidden_PD.shape[0], full.shape[0] // width, width)
    return (hidden_PD.unsqueeze(1) + moved_PMD).reshape(-1, width)


def _narrow_maps(hidden_PD: Tensor, down: Tensor, up_MKD: Tensor, *, is_mlp: bool) -> Tensor:
    """(P, D), (N*R*K, D) and (N*R, K, D) -> rows (P*N*R, D)."""
    width = hidden_PD.shape[-1]
    narrow_PMK = F.linear(hidden_PD, down).view(hidden_PD.shape[0], *up_MKD.shape[:2])
    if is_mlp:
        narrow_PMK = F.silu(narrow_PMK)
    moved_PMD = torch.bmm(narrow_PMK.transpose(0, 1), up_MKD).transpose(0, 1)
    return (hidden_PD.unsqueeze(1) + moved_PMD).reshape(-1, width)


def _scaled(hidden_PD: Tensor, *parameters: Tensor, maps: Features, scale: float) -> Tensor:
    return maps(hidden_PD, *parameters) * scale


class Anchor(nn.Module):
    """g = h + A(h, E[x_{t+1}]): the token-conditioned draft, whose gate and later factors see the pending token.

    Its control has the same parameters and costs the same, but sees A(h, h) (`anchor=blind`).

    One small map shared by them all; its output starts at zero, so that training starts from the joint without it.
    normed: its two inputs are brought to root mean square 1 each. Where embeddings are much smaller than hidden states,
    as in many pretrained models, the token is hardly seen otherwise.
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
