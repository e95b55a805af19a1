"""Hidden state -> gate and factors of the joint.

`FactorHeads` owns the gate and one map per (position, component); rank 1 is the independent-heads baseline and takes
the same path. With `shared` heads a factor is a map of the hidden state followed by the unembedding that all of them
share; with `separate` heads each has an unembedding of its own, as in the paper's from-scratch models.

Letters: P positions (any flattened batch), C of them in a chunk, N factors, n <= N of them, R rank, V vocabulary, D
width, K inner width of a low-rank or MLP map, or of the link, M rows of logits, X = D + N K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpdlm.config import Config
from cpdlm.model.draft_input import Link
from cpdlm.model.joint import Joint, log_normalise
from cpdlm.model.losses.draft import Objective, Windows, chunked_sum
from cpdlm.model.losses.joint_nll import Gate, joint_nll
from cpdlm.model.maps import Maps, no_map, part

STAY = 6.0  # log-odds with which an HMM starts to keep its component


@dataclass(frozen=True)
class HeadsConfig:
    """Shape of what turns hidden states into the joint distribution. The default is a next-token model without heads.

    rank: R components.  horizon: tokens of a window, x_{t+1} included.  first_is_tied: x_{t+1} has the next-token head,
    and the mixture covers x_{t+2..t+horizon} only.
    joint: `cp`, or `hmm`, whose component may change between two positions.
    link: which factors see a token of the window. `first`: gate and later factors see x_{t+1} (`Anchor`). `all`: each
    factor sees the token before it as well (`Link`). `blind`: the control of `first`, which sees h_t twice.
    draft_width: hidden width of the map that sees x_{t+1}, as a multiple of the trunk's.  draft_normed: its
    two inputs have equal size.  link_width: inner width of the link.
    separate: an unembedding for each (position, component).  component_rank: components are offsets of that rank from
    one map per position (0: each has a map of its own).  map_rank: rank of each map (0: full).  map_hidden: hidden
    width of each map as a two-layer perceptron (0: a linear map).  noise: size of the maps' random start.
    bias_buffer: the gate has a buffer that balances it in place of a bias.
    """

    rank: int = 1
    horizon: int = 1
    first_is_tied: bool = True
    joint: str = "cp"
    link: str = "none"
    draft_width: float = 4.0
    draft_normed: bool = True
    link_width: int = 256
    separate: bool = False
    component_rank: int = 0
    map_rank: int = 0
    map_hidden: int = 0
    noise: float = 0.2
    bias_buffer: bool = False

    def __post_init__(self) -> None:
        assert self.first_is_tied or self.link == "none", "a token-conditioned draft has a next-token head of its own"

    @staticmethod
    def of(config: Config) -> HeadsConfig:
        """The shape that a run's settings ask for."""
        model = config.model
        return HeadsConfig(
            rank=config.rank,
            horizon=config.horizon,
            first_is_tied=config.first_is_tied,
            joint=config.joint,
            link=config.link,
            draft_width=model.draft_width,
            draft_normed=model.draft_normed,
            link_width=model.link_width,
            separate=model.head == "separate",
            component_rank=model.component_rank,
            map_rank=model.map_rank,
            map_hidden=model.map_hidden,
            noise=model.noise,
            bias_buffer=config.balance == "bias",
        )

    @staticmethod
    def upgraded(saved: dict[str, Any], width: int) -> dict[str, Any]:
        """A saved shape of before `link` in today's names. width: the trunk's."""
        if "anchored" not in saved:
            return saved
        old = {key: saved[key] for key in ("anchored", "blind", "anchor_width", "anchor_normed") if key in saved}
        return {key: value for key, value in saved.items() if key not in old} | {
            "link": "none" if not old["anchored"] else "blind" if old.get("blind") else "first",
            "draft_width": old.get("anchor_width", 0) / width or 0.5,
            "draft_normed": old.get("anchor_normed", False),
        }

    @property
    def factors(self) -> int:
        """Positions that the mixture covers."""
        return self.horizon - 1 if self.first_is_tied else self.horizon


@dataclass(frozen=True)
class Before:
    """The tokens before the factors, where they see them (`link=all`).

    pending_PD: embedding of x_{t+1}, the token before the first factor. embed: rows of the unembedding -> embeddings.
    """

    pending_PD: Tensor
    embed: Callable[[Tensor], Tensor]


class Multiplier(Protocol):
    """Multiplies rows by unembeddings that it holds in a form of its own; no gradient passes."""

    dtype: torch.dtype
    out_features: int

    def __call__(self, rows_MD: Tensor) -> Tensor: ...


Table = Tensor | Multiplier  # unembeddings (V, D), or what multiplies by them


def times(rows_MD: Tensor, table: Table) -> Tensor:
    """(M, V), in the precision of the table."""
    rows_MD = rows_MD.to(table.dtype)
    return F.linear(rows_MD, table) if isinstance(table, Tensor) else table(rows_MD)


class FactorHeads(nn.Module):
    """The gate and the factors of a rank-R mixture over N positions.

    The maps are residual, z = h + W h, with W small and random: components start near the trunk's own prediction and
    apart from each other (equal components would stay equal but for the gate). `noise` is the size of W h relative to
    h.
    logit_scale: of the model whose unembedding they share; it multiplies what goes there.
    W is full, of rank `map_rank`, a two-layer perceptron with `map_hidden` units (SiLU between), or a full map of the
    position and an offset of rank `component_rank`.
    """

    balance_bias_R: Tensor | None

    def __init__(self, width: int, vocab_size: int, shape: HeadsConfig, logit_scale: float = 1.0) -> None:
        super().__init__()
        rank, factors, noise = shape.rank, shape.factors, shape.noise
        self.rank, self.factors, self.width, self.logit_scale = rank, factors, width, logit_scale
        self.inner = shape.component_rank or shape.map_rank or shape.map_hidden
        self.is_mlp = shape.map_hidden > 0
        self.gate = nn.Linear(width, rank, bias=not shape.bias_buffer)
        nn.init.normal_(self.gate.weight, std=0.02)
        if self.gate.bias is not None:
            nn.init.zeros_(self.gate.bias)
        # balance=bias moves this buffer instead of adding a loss; it is part of the joint and of the checkpoint.
        self.register_buffer("balance_bias_R", torch.zeros(rank) if shape.bias_buffer else None)
        self.transitions: nn.Linear | None = None
        if shape.joint == "hmm" and rank > 1 and factors > 1:
            self.transitions = nn.Linear(width, (factors - 1) * rank * rank)
            nn.init.zeros_(self.transitions.weight)
            self.transitions.bias.data = STAY * torch.eye(rank).flatten().repeat(factors - 1)
        self.link = Link(width, shape.link_width, factors) if shape.link == "all" else None
        rows = factors * rank
        self.maps = nn.ParameterDict()
        if shape.separate:
            self.maps["unembeddings"] = nn.Parameter(torch.randn(rows * vocab_size, width) * 0.02)
        else:
            if shape.component_rank:
                self.maps["base"] = nn.Parameter(torch.zeros(factors * width, width))
            if self.inner:
                self.maps["down"] = nn.Parameter(torch.randn(rows * self.inner, width) * width**-0.5)
                self.maps["up"] = nn.Parameter(torch.randn(rows, self.inner, width) * noise * self.inner**-0.5)
            else:
                self.maps["full"] = nn.Parameter(torch.randn(rows * width, width) * noise * width**-0.5)
        if self.link is not None:
            self.maps["link"] = nn.Parameter(torch.zeros(factors, shape.link_width, width))

    @property
    def separate(self) -> bool:
        return "unembeddings" in self.maps

    def log_weights(self, hidden_PD: Tensor) -> Tensor:
        """Normalised gate (..., R)."""
        scores_PR = self.gate(hidden_PD)
        if self.balance_bias_R is not None:
            scores_PR = scores_PR + self.balance_bias_R
        return log_normalise(scores_PR)

    def log_transitions(self, seen_PD: Tensor, factors: int) -> Tensor | None:
        """(..., factors-1, R, R) log T_s(b | a), or None where components stay."""
        if self.transitions is None or factors < 2:
            return None
        scores = self.transitions(seen_PD).view(*seen_PD.shape[:-1], self.factors - 1, self.rank, self.rank)
        return log_normalise(scores[..., : factors - 1, :, :])

    def inputs(self, seen_PD: Tensor, before_PND: Tensor | None) -> Tensor:
        """(..., X) what `nll` and `draft_loss` read of each position: g, and where there is a link its inner half.

        before_PND: embeddings of the tokens before the factors.
        """
        if self.link is None:
            return seen_PD
        assert before_PND is not None, "linked factors need the tokens before them"
        inner_PNK = self.link(self.link.seen(seen_PD), before_PND, slice(None))
        return torch.cat([seen_PD, inner_PNK.flatten(-2)], dim=-1)

    def given_first(self, seen_BD: Tensor, table: Table, first_B: Tensor, active: int = 0) -> Joint:
        """`joint(...).condition(first_B)`. With one component the first factor tells nothing and is left out.

        first_B: rows of the table, -1 for a token that is not among them.
        """
        if self.rank == 1:
            return self.joint(seen_BD, table, start=1)
        return self.joint(seen_BD, table, active=active).condition(first_B)

    def joint(
        self,
        seen: Tensor,
        table: Table,
        before: Before | None = None,
        active: int = 0,
        start: int = 0,
        stop: int | None = None,
    ) -> Joint:
        """The joint at each position (...), over the factors start..stop-1 (default: all). No factor is normalised
        before something asks for it.

        active: how many components are evaluated, the heaviest of the gate (0: all). Their renormalised mixture is a
        joint of that rank.
        """
        stop = stop or self.factors
        log_weights, chosen = self.log_weights(seen), None
        if 0 < active < self.rank:
            assert self.transitions is None and not self.separate, "an HMM or separate heads evaluate all components"
            log_weights, chosen = log_weights.topk(active, dim=-1)
            log_weights = log_normalise(log_weights)
        inputs, link = seen, None
        if self.link is not None:
            assert before is not None, "linked factors need the tokens before them"
            seen_PK = self.link.seen(seen)
            inner_P1K = self.link(seen_PK, before.pending_PD.unsqueeze(-2), 0)
            inner_PNK = F.pad(inner_P1K, (0, 0, 0, self.factors - 1))  # later factors gain theirs in the joint
            inputs = torch.cat([seen, inner_PNK.flatten(-2)], dim=-1)
            link = partial(self._gain, seen_PK, table, before.embed)
        scores = self._logits(inputs, table, start, stop, chosen)
        return Joint(log_weights, scores, False, self.log_transitions(seen, stop - start), link)

    def _gain(
        self, seen_PK: Tensor, table: Table, embed: Callable[[Tensor], Tensor], k: int, before_M: Tensor
    ) -> Tensor:
        assert self.link is not None
        rows_MD = self.link(seen_PK, embed(before_M).to(seen_PK.dtype), k) @ self.maps["link"][k] * self.logit_scale
        return times(rows_MD, table)

    def nll(
        self,
        seen_PD: Tensor,
        future_PN: Tensor,
        weight_P: Tensor,
        table_VD: Tensor,
        factors: int,
        chunk_bytes: int,
        before_PND: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bounded-memory loss of the marginal over the first `factors` factors. A token of -1 has factors of 1.

        before_PND: embeddings of the tokens before the factors, where they are linked. Returns sum_p weight_p nll_p,
        nll_P (detached, nats) and log_weights_PR.
        """
        log_weights_PR = self.log_weights(seen_PD)
        total, nll_P = joint_nll(
            self.inputs(seen_PD, before_PND),
            Gate(log_weights_PR, self.log_transitions(seen_PD, factors)),
            future_PN[:, :factors],
            weight_P,
            self._unembeddings(table_VD, 0, factors),
            self._features(),
            tuple(self._map_parameters(0, factors)),
            chunk_bytes,
        )
        return total, nll_P, log_weights_PR

    def draft_loss(
        self,
        seen_PD: Tensor,
        windows: Windows,
        weight_P: Tensor,
        table_VD: Tensor,
        objective: Objective,
        chunk_bytes: int,
        before_PND: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`nll` for any objective, of heads that share table_VD, which carries no gradient.

        Returns sum_p weight_p loss_p, loss_P (detached) and log_weights_PR. The logits of a chunk take at most
        chunk_bytes; beside them autograd holds about four times that, with `objective.top` as much.
        """
        assert not self.separate and not table_VD.requires_grad, (
            "objectives of the draft are for maps to a frozen table"
        )
        gate = Gate(self.log_weights(seen_PD), self.log_transitions(seen_PD, self.factors))
        teacher = windows.narrowed(table_VD, objective.top, objective.others, chunk_bytes).teacher
        inputs_PX, features = self.inputs(seen_PD, before_PND), self._features()
        parameters = self._map_parameters(0, self.factors)
        held = (windows.future_PN, windows.counts_PN, windows.state_PN)
        chunk = max(1, chunk_bytes // (4 * self.factors * self.rank * len(table_VD)))

        def loss(inputs_CX: Tensor, future_CN: Tensor, counts_CN: Tensor, state_CN: Tensor, *given: Tensor) -> Tensor:
            gate_C, maps = gate.of(given[: len(gate.tensors)]), given[len(gate.tensors) :]
            rows_MD = features(inputs_CX, 0, *maps).to(table_VD.dtype)
            scores_MV, seen = teacher.hold(rows_MD, table_VD, future_CN, state_CN)
            scores_CNRV = scores_MV.view(len(inputs_CX), self.factors, self.rank, -1)
            joint = Joint(gate_C.log_weights, scores_CNRV, False, gate_C.log_transitions)
            return objective(joint, seen, counts_CN)

        total, loss_P = chunked_sum(loss, (inputs_PX, *held, *gate.tensors), parameters, weight_P, chunk)
        return total, loss_P, gate.log_weights

    def _logits(self, inputs: Tensor, table: Table, start: int, stop: int, chosen: Tensor | None = None) -> Tensor:
        """(..., stop-start, R, V) of the factors start..stop-1. chosen: (..., k) the components that are evaluated."""
        flat_PX, rank = inputs.reshape(-1, inputs.shape[-1]), self.rank
        features, parameters = self._features(), self._map_parameters(start, stop)
        if chosen is not None:
            rank, chosen_Pk = chosen.shape[-1], chosen.reshape(-1, chosen.shape[-1])
            if alone := len(flat_PX) == 1:
                parameters = features.of_components(parameters, self.rank, chosen_Pk[0])
        rows_MD = features(flat_PX, start, *parameters)
        if chosen is not None and not alone:  # several texts choose apart: rows of all are cheap beside their logits
            rows_PNRD = rows_MD.view(len(flat_PX), stop - start, self.rank, self.width)
            rows_MD = rows_PNRD.take_along_dim(chosen_Pk[:, None, :, None], dim=2).reshape(-1, self.width)
        vocabulary = table.shape[0] if isinstance(table, Tensor) else table.out_features
        if self.separate:
            assert isinstance(table, Tensor), "separate heads multiply by tables of their own"
            table = self._unembeddings(table, start, stop).reshape(-1, self.width)
        return times(rows_MD, table).view(*inputs.shape[:-1], stop - start, rank, vocabulary)

    def _unembeddings(self, table_VD: Tensor, start: int, stop: int) -> Tensor:
        """(V, D) shared, or (stop-start, R, V, D)."""
        if not self.separate:
            return table_VD
        table = part(self.maps["unembeddings"], start, stop, self.factors)
        return table.view(stop - start, self.rank, table_VD.shape[0], self.width)

    def _map_parameters(self, start: int, stop: int) -> list[Tensor]:
        if self.separate:
            return []
        return [part(self.maps[name], start, stop, self.factors) for name in self.maps]

    def _features(self) -> Any:
        return no_map if self.separate else Maps(tuple(self.maps), self.is_mlp, self.logit_scale)
