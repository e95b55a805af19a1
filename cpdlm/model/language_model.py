"""The whole model: trunk, next-token distribution, and the joint from which drafts are made.

Two layouts share every line but the range of positions that the mixture covers:

- untied (the paper): one rank-R mixture over x_{t+1..t+N}; the next-token distribution is eq. 11, its first marginal.
- tied (`model.tie_first`, `link=first`, `all`, `horizon=1`): p(x_{t+1} | h_t) is one softmax, and the mixture covers
  x_{t+2..t+N}. It sees h_t or, token-conditioned (`link`), g_t = h_t + A(h_t, E[x_{t+1}]), and with `link=all` each
  factor sees the token before it as well.

The target p is what decoding must not change: the model's own next-token distribution or, on a frozen trunk, the
trunk's softmax, whatever the heads say. Drafts may cover less than the vocabulary (`use_draft_vocabulary`); the target
never does.

Letters: B batch, T position, P = positions picked from B x T, C of them in a chunk, N horizon, R rank, V vocabulary,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cpdlm.model.draft_input import Anchor
from cpdlm.model.heads import Before, FactorHeads, HeadsConfig, Multiplier
from cpdlm.model.joint import Joint, log_normalise
from cpdlm.model.losses.draft import Objective, Windows
from cpdlm.model.losses.joint_nll import Gate, joint_nll
from cpdlm.model.losses.teacher import WholeTeacher
from cpdlm.model.maps import no_map
from cpdlm.model.output import Output
from cpdlm.model.trunk import Mask, Trunk, new_cache


@dataclass(frozen=True)
class Terms:
    """What `LanguageModel.forward` yields: weighted sums with gradients, and detached per-position values in nats."""

    loss: Tensor  # scalar: sum of weight * nll over both terms below
    first_nll_P: Tensor  # -log p(x_{t+1}) at the positions with first_weight != 0
    rest_nll_P: Tensor  # untied: -log p(x_{t+1..}); tied: -log p(x_{t+2..} | x_{t+1}); where rest_weight != 0
    log_weights_PR: Tensor  # gate at the same positions as rest_nll_P, with gradient (for the balance loss)

    def joint_nll(self, first_is_tied: bool) -> Tensor:
        """-log p(x_{t+1..t+N}) per position, where both weights picked the same positions."""
        if not first_is_tied:
            return self.rest_nll_P
        return self.first_nll_P + self.rest_nll_P if len(self.rest_nll_P) else self.first_nll_P


@dataclass(frozen=True)
class States:
    """What the frozen trunk says of a batch; log_normaliser_BT as `LanguageModel.log_normaliser` gives it."""

    hidden_BTD: Tensor
    log_normaliser_BT: Tensor


class LanguageModel(nn.Module):
    draft_ids: Tensor | None
    _draft_table_VD: Tensor | None
    _draft_index_V: Tensor | None

    def __init__(
        self,
        trunk: Trunk,
        vocab_size: int,
        shape: HeadsConfig,
        *,
        context: int,
        frozen_target: bool = False,
        tie_embeddings: bool = True,
        output: Output | None = None,
        chunk_bytes: int = 32 * 2**20,
    ) -> None:
        """context: the most tokens of a text. output: how logits are made (default: U h). chunk_bytes: bound on the
        logits that a loss holds at once. frozen_target: the trunk's own softmax is the target, and only heads train.
        """
        super().__init__()
        self.trunk, self.shape, self.output = trunk, shape, output or Output()
        self.rank, self.horizon, self.vocab_size, self.context = shape.rank, shape.horizon, vocab_size, context
        self.first_is_tied, self.frozen_target, self.chunk_bytes = shape.first_is_tied, frozen_target, chunk_bytes
        self.weights = "plain"  # how decoding holds them: see `decoding.prepared`
        width = trunk.width
        self.unembedding = nn.Linear(width, vocab_size, bias=False)
        # Separate heads without a next-token head use no shared unembedding: then it is the embedding, not dead weight.
        if tie_embeddings or (shape.separate and not shape.first_is_tied and not frozen_target):
            self.unembedding.weight = trunk.embedding
        else:
            nn.init.normal_(self.unembedding.weight, std=0.02)
        self.heads = FactorHeads(width, vocab_size, shape, self.output.scale) if shape.factors else None
        self.anchor: Anchor | None = None
        if shape.link != "none":
            self.anchor = Anchor(width, round(shape.draft_width * width), shape.draft_normed)
        # Components that a draft evaluates, the heaviest of the gate at each position (0: all). Their renormalised
        # mixture is a joint of that rank, from which drafts are drawn and against which they are accepted.
        self.active = 0
        # `use_draft_vocabulary`: ids (V',), their rows of the unembedding, and where on the list an id is.
        for buffer in ("draft_ids", "_draft_table_VD", "_draft_index_V"):
            self.register_buffer(buffer, None, persistent=False)
        self.draft_product: Multiplier | None = None  # multiplies by `_draft_table_VD`, in a model that is prepared
        if frozen_target:
            self.trunk.requires_grad_(False)
            self.unembedding.requires_grad_(False)

    @property
    def embedded(self) -> int:
        """Ids that a prompt may hold: a table of inputs may be longer than that of outputs."""
        return self.trunk.embedding.shape[0]

    @property
    def attention_window(self) -> int | None:
        return self.trunk.attention_window

    @property
    def masks_windows(self) -> bool:
        return self.trunk.masks_windows

    def train(self, mode: bool = True) -> LanguageModel:
        """A frozen trunk stays as it is in evaluation: pretrained ones may have dropout, and the target must not."""
        super().train(mode)
        if self.frozen_target:
            self.trunk.eval()
        return self

    def new_cache(self) -> Cache:
        return new_cache()

    def hidden(
        self, tokens_BT: Tensor, position_ids_BT: Tensor | None = None, cache: Any = None, mask: Mask | None = None
    ) -> Tensor:
        """Hidden states (B, T, D); see `Trunk.forward`."""
        hidden_BTD: Tensor = self.trunk(tokens_BT, position_ids_BT, cache, mask)
        return hidden_BTD

    def next_token_log_probs(self, hidden: Tensor) -> Tensor:
        """The model's own log p(x_{t+1}) (..., V): eq. 11, or the tied head's softmax."""
        if self.first_is_tied:
            return self._trunk_log_probs(hidden)
        assert self.heads is not None
        return self.heads.joint(self._for_heads(hidden), self.unembedding.weight, stop=1).first()

    def target_log_probs(self, hidden: Tensor) -> Tensor:
        """log p (..., V) of x_{t+1}, which decoding preserves: the frozen trunk's, or the model's own."""
        return self._trunk_log_probs(hidden) if self.frozen_target else self.next_token_log_probs(hidden)

    def joint(self, hidden: Tensor, pending: Tensor | None = None, active: int = 0) -> Joint:
        """The mixture at each position (...): untied over N tokens; tied over x_{t+2..t+N} given x_{t+1} = pending.

        With a draft vocabulary each factor is restricted to it: token v is draft_ids[v]. active: components that are
        evaluated, the heaviest of the gate (0: all).
        """
        assert self.heads is not None, "horizon 1 has no mixture"
        before, ids = None, self.draft_ids
        if self.heads.link is not None:
            assert pending is not None, "linked factors need the pending token"
            as_ids = (lambda tokens: tokens) if ids is None else (lambda tokens: ids[tokens.clamp(min=0)])
            before = Before(self._embedded(pending), lambda tokens: self._embedded(as_ids(tokens)))
        return self.heads.joint(self._seen(hidden, pending), self.draft_product or self._draft_table, before, active)

    def indices(self, tokens: Tensor) -> Tensor:
        """Where in the draft vocabulary each id is, -1 for one that is not; without one the ids themselves."""
        return tokens if self._draft_index_V is None else self._draft_index_V[tokens]

    def draft_joint(self, hidden_BD: Tensor, pending_B: Tensor) -> Joint:
        """The joint of x_{t+2..t+N} given the pending token x_{t+1}, over the draft vocabulary: what drafts come from.

        Where x_{t+1} is not in the draft vocabulary, the components keep their prior weights.
        """
        assert self.heads is not None, "horizon 1 has no mixture"
        if self.first_is_tied:
            return self.joint(hidden_BD, pending_B, self.active)
        seen_BD = self._seen(hidden_BD, pending_B)
        table = self.draft_product or self._draft_table
        return self.heads.given_first(seen_BD, table, self.indices(pending_B), self.active)

    @property
    def _draft_table(self) -> Tensor:
        """(V, D) unembeddings of the tokens that drafts are made of."""
        return self.unembedding.weight if self._draft_table_VD is None else self._draft_table_VD

    def use_draft_vocabulary(self, ids: Tensor | Sequence[int] | None) -> None:
        """Draft from these tokens only, (V',) distinct ids (None: from all); the target keeps the whole vocabulary.

        The draft's unembedding then costs V'/V of the whole. Its rows are copied: call this again after the weights
        change. Raises ValueError where the model has no rows to choose from or `ids` is no list of tokens.
        """
        self.draft_product = None
        if ids is None:
            self.draft_ids = self._draft_table_VD = self._draft_index_V = None
            return
        if self.heads is None:
            raise ValueError("horizon 1 drafts nothing; a draft vocabulary needs horizon 2 or more")
        if self.heads.separate:
            raise ValueError(
                "separate heads (model.head=separate) have no unembedding in common to restrict; "
                "use model.head=shared, or no draft vocabulary"
            )
        try:
            ids = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"a draft vocabulary is a list of token ids, or a tensor; got {type(ids)}") from error
        whole = ids.dim() == 1 and len(ids) > 0 and ids.dtype in (torch.int64, torch.int32)
        if not whole or int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size or len(ids.unique()) < len(ids):
            raise ValueError(
                f"a draft vocabulary is a row of distinct token ids of 0..{self.vocab_size - 1}; got {ids.dtype} "
                f"{tuple(ids.shape)}: {ids}"
            )
        weight = self.unembedding.weight
        self.draft_ids = ids.to(weight.device, torch.int64)
        self._draft_table_VD = weight.detach()[self.draft_ids]
        index_V = torch.full((self.vocab_size,), -1, device=weight.device)
        index_V[self.draft_ids] = torch.arange(len(ids), device=weight.device)
        self._draft_index_V = index_V

    def _trunk_log_probs(self, hidden: Tensor) -> Tensor:
        return log_normalise(self.target_logits(hidden))

    def _seen(self, hidden: Tensor, pending: Tensor | None) -> Tensor:
        """What gate and factors see. No token beyond x_{t+1} enters."""
        hidden = self._for_heads(hidden)
        if self.anchor is None:
            return hidden
        assert pending is not None, "a token-conditioned draft needs the pending token"
        anchored: Tensor = self.anchor(hidden, hidden if self.shape.link == "blind" else self._embedded(pending))
        return anchored

    def _embedded(self, tokens: Tensor) -> Tensor:
        """(..., D) as the heads see them."""
        assert self.heads is not None
        return self.trunk.embed(tokens).to(self.heads.gate.weight.dtype)

    def _for_heads(self, hidden: Tensor) -> Tensor:
        """In the heads' own precision: a frozen trunk may have a narrower one."""
        return hidden if self.heads is None else hidden.to(self.heads.gate.weight.dtype)

    # --- training and evaluation --------------------------------------------------------------------------------

    def forward(
        self,
        tokens_BT: Tensor,
        position_ids_BT: Tensor,
        future_BTN: Tensor,
        successors_BT: Tensor,
        first_weight_BT: Tensor,
        rest_weight_BT: Tensor,
        states: States | None = None,
        objective: Objective | None = None,
    ) -> Terms:
        """Weighted negative log-likelihoods; positions of weight 0 cost nothing.

        future_BTN: successors (0 where absent); successors_BT: how many exist. The rest term covers, untied, the
        joint's marginal over the successors that exist; tied, that of x_{t+2..} given x_{t+1}. With a draft vocabulary
        it covers the tokens of that alone. states: of the frozen trunk, if known. objective: replaces the rest term.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_target):
            hidden_BTD = self.hidden(tokens_BT, position_ids_BT) if states is None else states.hidden_BTD
        first_loss, first_nll_P = self._first_nll(hidden_BTD, future_BTN, first_weight_BT)
        picked_BT = rest_weight_BT != 0
        hidden_PD, future_PN = hidden_BTD[picked_BT], future_BTN[picked_BT]
        count_P, weight_P = successors_BT[picked_BT], rest_weight_BT[picked_BT]
        exists_PN = torch.arange(self.horizon, device=count_P.device) < count_P.unsqueeze(-1)
        if self.heads is None:
            return Terms(first_loss, first_nll_P, hidden_PD.new_zeros(0), hidden_PD.new_zeros(0, 1))
        seen_PD = self._seen(hidden_PD, future_PN[:, 0])
        before_PND = self._embedded(future_PN[:, :-1].clamp(min=0)) if self.heads.link is not None else None
        if self.first_is_tied:
            future_PN, exists_PN = future_PN[:, 1:], exists_PN[:, 1:]
        future_PN, table_VD = self.indices(future_PN), self._draft_table
        if objective is None:
            present_PN = future_PN.masked_fill(~exists_PN, -1)
            rest_loss, rest_P, log_weights_PR = self.heads.nll(
                seen_PD, present_PN, weight_P, table_VD, self.heads.factors, self.chunk_bytes, before_PND
            )
        else:
            windows = self._windows(hidden_BTD, states, picked_BT, future_PN, exists_PN)
            rest_loss, rest_P, log_weights_PR = self.heads.draft_loss(
                seen_PD, windows, weight_P, table_VD, objective, self.chunk_bytes, before_PND
            )
        return Terms(first_loss + rest_loss, first_nll_P, rest_P, log_weights_PR)

    def _windows(
        self, hidden_BTD: Tensor, states: States | None, picked_BT: Tensor, future_PN: Tensor, exists_PN: Tensor
    ) -> Windows:
        """The target of x_{t+k} is read from h_{t+k-1}; behind the end of a row it is not known."""
        row_P, t_P = picked_BT.nonzero(as_tuple=True)
        t_PN = t_P.unsqueeze(-1) + torch.arange(self.horizon, device=t_P.device)[self.horizon - future_PN.shape[1] :]
        known_PN, index_PN = t_PN < (length := hidden_BTD.shape[1]), row_P[:, None] * length + t_PN
        read_U, state_PN = index_PN.where(known_PN, 0).unique(return_inverse=True)
        read_UD = hidden_BTD.detach().flatten(0, 1)[read_U]
        norm_U = self.log_normaliser(read_UD) if states is None else states.log_normaliser_BT.flatten()[read_U]
        return Windows(future_PN, exists_PN & known_PN, state_PN, WholeTeacher(read_UD, norm_U, self.target_logits))

    @torch.no_grad()
    def log_normaliser(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T) log sum_v exp(logit) of the target over the vocabulary, float32, a row's chunk at a time."""
        flat_PD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        chunk = max(1, self.chunk_bytes // (4 * self.vocab_size))
        parts = [self.target_logits(part_CD).float().logsumexp(dim=-1) for part_CD in flat_PD.split(chunk)]
        return torch.cat(parts).view(hidden_BTD.shape[:-1])

    def target_logits(self, hidden: Tensor, table_VD: Tensor | None = None) -> Tensor:
        """(..., V) logits of the next-token softmax: of all tokens, or with the draft's unembeddings table_VD of those
        that drafts are made of. Drafts are scaled alike, and neither capped nor biased."""
        if table_VD is None:
            return self.output(hidden, self.unembedding)
        bias_V, ids = self.unembedding.bias, self.draft_ids
        return self.output(hidden, table_VD, bias_V if bias_V is None or ids is None else bias_V[ids])

    def target_scores(self, hidden: Tensor) -> Tensor:
        """(..., V), whose softmax is the target p: its logits where it is a softmax, else log p.

        In float32, logits that are an ulp apart may have equal log-probabilities.
        """
        if self.first_is_tied or self.frozen_target:
            return self.target_logits(hidden)
        if type(self.unembedding) is not nn.Linear and not getattr(self.unembedding, "disable_adapters", False):
            raise ValueError(
                f"the unembedding is a {type(self.unembedding).__name__}, whose adapter the heads do not see; merge "
                "it first (merge_and_unload of peft)"
            )
        assert self.heads is not None
        if any(each.is_meta for each in self.heads.parameters()):
            raise ValueError("the heads are offloaded (device_map), where they cannot be read; load them onto a device")
        return self.next_token_log_probs(hidden)

    def _first_nll(self, hidden_BTD: Tensor, future_BTN: Tensor, weight_BT: Tensor) -> tuple[Tensor, Tensor]:
        picked_BT = weight_BT != 0
        hidden_PD, token_P1, weight_P = hidden_BTD[picked_BT], future_BTN[picked_BT][:, :1], weight_BT[picked_BT]
        if self.first_is_tied and self.frozen_target:
            nll_P = self._frozen_nll(hidden_PD, token_P1)
            return (weight_P.to(nll_P.dtype) * nll_P).sum(), nll_P
        table_VD, chunk_bytes = self.unembedding.weight, self.chunk_bytes
        if self.first_is_tied:
            certain = Gate(hidden_PD.new_zeros(len(hidden_PD), 1))
            return joint_nll(hidden_PD, certain, token_P1, weight_P, table_VD, no_map, chunk_bytes=chunk_bytes)
        assert self.heads is not None
        return self.heads.nll(self._for_heads(hidden_PD), token_P1, weight_P, table_VD, 1, chunk_bytes)[:2]

    @torch.no_grad()
    def _frozen_nll(self, hidden_PD: Tensor, token_P1: Tensor) -> Tensor:
        chunk = max(1, self.chunk_bytes // (4 * self.vocab_size))
        parts = zip(hidden_PD.split(chunk), token_P1.split(chunk), strict=True)
        found = [-self._trunk_log_probs(part_CD).gather(-1, token_C1).squeeze(-1) for part_CD, token_C1 in parts]
        return torch.cat([hidden_PD.new_zeros(0, dtype=torch.float32), *found])

    @property
    def embeddings_are_tied(self) -> bool:
        return self.unembedding.weight is self.trunk.embedding
