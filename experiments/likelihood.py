"""Held-out likelihoods: the joint, its chain-rule terms, the first token, and bits per byte.

The joint and its terms are averaged over positions with all n successors; bits per byte is of the target p (what
decoding writes) over every token with a predecessor in its document.

A model with a draft vocabulary is measured as it drafts. Its joint is the distribution restricted to that vocabulary,
averaged over the windows that it covers: one with another token has no draft probability, and no finite likelihood.
What the target puts on other tokens counts as lost in the accepted shares, at every position.

Letters: B batch, T position, P positions picked, N horizon, K factors of the mixture, R rank, V vocabulary, D width.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpdlm.config import ConfigError
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.losses.draft import overlap

CHUNK_BYTES = 64 * 2**20
STRIDE = 8  # positions between those whose draft q is held against the target p


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[dict[str, Tensor]],
    token_bytes_V: np.ndarray,
    source_names: list[str],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The record's `likelihood` entry, in nats (and bits per byte).

    batches: as the data module's, one row per sequence, with `source_B` (index into source_names). token_bytes_V: how
    many bytes of text each token stands for (0 for special tokens). With a draft vocabulary `positions`, the joint, its
    terms and the weights are of the windows that it covers, and `shortlist` says how many it does.
    Raises ConfigError where no window has all successors, or none is covered.
    """
    model = model.to(device).eval()
    bytes_V = torch.as_tensor(token_bytes_V, dtype=torch.float64)
    sums = _Sums(model, bytes_V)
    for batch in batches:
        hidden_BTD = model.hidden(batch["tokens_BT"].to(device), batch["position_ids_BT"].to(device))
        rows = zip(hidden_BTD, batch["future_BTN"], batch["successors_BT"], batch["source_B"], strict=True)
        for hidden_TD, future_TN, successors_T, source in rows:
            sums.add(hidden_TD, future_TN, successors_T, source_names[int(source)])
    return sums.summary()


class _Sums:
    """Of all rows. entropy: of the gate's weights, summed; whole: windows with all successors; shares: (P, K) a row."""

    def __init__(self, model: LanguageModel, bytes_V: Tensor) -> None:
        self.model, self.bytes_V = model, bytes_V
        self.rows: list[dict[str, Any]] = []
        self.weights_R = torch.zeros(model.rank, dtype=torch.float64)
        self.entropy, self.whole = 0.0, 0
        self.shares: list[Tensor] = []

    def add(self, hidden_TD: Tensor, future_TN: Tensor, successors_T: Tensor, source: str) -> None:
        """One row of a batch."""
        model, device = self.model, hidden_TD.device
        exists_T = successors_T > 0
        token_P = future_TN[exists_T][:, 0]
        target_P = _gathered(model.target_log_probs(hidden_TD[exists_T.to(device)]), token_P.to(device))
        whole_T = successors_T >= model.horizon
        covered_T = whole_T & _covered(model, future_TN.to(device)).cpu()
        terms_PN, log_weights_PR = position_terms(
            model, hidden_TD[covered_T.to(device)], future_TN[covered_T].to(device)
        )
        weights_PR = log_weights_PR.double().exp().cpu()
        self.whole += int(whole_T.sum())
        self.weights_R += weights_PR.sum(dim=0)
        self.entropy += float(-(weights_PR * log_weights_PR.double().cpu()).sum())
        self.rows.append(
            {
                "source": source,
                "terms": -terms_PN.double().sum(dim=0).cpu().numpy(),
                "positions": int(covered_T.sum()),
                "target": -float(target_P.double().sum()),
                "bytes": float(self.bytes_V[token_P].sum()),
            }
        )
        self.shares.append(accepted_shares(model, hidden_TD, future_TN.to(device), whole_T.to(device)))

    def summary(self) -> dict[str, Any]:
        """What `evaluate` returns. Raises ConfigError where there is no position."""
        model, rows = self.model, self.rows
        positions = sum(row["positions"] for row in rows)
        self._check(positions)
        counts, joint = [row["positions"] for row in rows], [row["terms"].sum() for row in rows]
        terms = [[row["terms"][k] for row in rows] for k in range(model.horizon)]
        by_source: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["positions"]:
                by_source.setdefault(row["source"], []).append(row)
        mean_R = (self.weights_R / positions).clamp_min(1e-12)
        found: dict[str, Any] = {
            "split": "test",
            "rows": len(rows),
            "positions": positions,
            "joint_nll": _ratio(joint, counts),
            "position_nll": [_ratio(each, counts) for each in terms],
            "first_token_nll": _ratio(terms[0], counts),
            "bits_per_byte": _bits_per_byte(rows),
            "kept_by_depth": _by_depth(torch.cat(self.shares), model),
            "per_source": {name: _of_source(mine) for name, mine in by_source.items()},
            # Row by row, so that two models can be compared on the same rows.
            "per_row": {
                "positions": counts,
                "joint_nll": [round(float(value), 3) for value in joint],
                "first_token_nll": [round(float(value), 3) for value in terms[0]],
                "position_nll": [[round(float(value), 3) for value in each] for each in terms],
                "target_nll": [round(row["target"], 3) for row in rows],
                "bytes": [row["bytes"] for row in rows],
            },
            "weights": {
                "entropy_mean": self.entropy / positions,
                "effective": float(torch.exp(-(mean_R * mean_R.log()).sum())),
                "dead": int((mean_R < 0.1 / model.rank).sum()),
                "mean": [float(value) for value in mean_R],
            },
        }
        if model.draft_ids is not None:
            found["shortlist"] = {"tokens": len(model.draft_ids), "windows": positions / self.whole}
        return found

    def _check(self, positions: int) -> None:
        if not self.whole:
            raise ConfigError(
                f"no test position has all {self.model.horizon} successors, the documents are too short; "
                f"lower horizon={self.model.horizon}"
            )
        if not positions:
            assert self.model.draft_ids is not None
            raise ConfigError(
                f"the draft vocabulary of {len(self.model.draft_ids)} tokens covers none of the {self.whole:,} test "
                "windows; raise loss.draft_vocabulary"
            )


def _covered(model: LanguageModel, future_TN: Tensor) -> Tensor:
    """(T,) bool: whether drafts can be made of all tokens of the mixture, of which a tied x_{t+1} is none."""
    return (model.indices(future_TN[:, 1 if model.first_is_tied else 0 :]) >= 0).all(dim=-1)


@torch.no_grad()
def position_terms(model: LanguageModel, hidden_PD: Tensor, future_PN: Tensor) -> tuple[Tensor, Tensor]:
    """Chain-rule log-probabilities (P, N), which sum to the joint's, and the gate's log-weights (P, R).

    With a draft vocabulary, which has to have the tokens, both are of the distribution restricted to it.
    """
    if model.heads is None:
        first_P = _gathered(model.next_token_log_probs(hidden_PD), future_PN[:, 0])
        return first_P.unsqueeze(-1), torch.zeros(len(hidden_PD), 1, device=hidden_PD.device)
    terms, gates = [], []
    chunk = max(1, CHUNK_BYTES // (4 * model.horizon * model.rank * model.vocab_size))
    for start in range(0, max(1, len(hidden_PD)), chunk):
        part_PD, future_CN = hidden_PD[start : start + chunk], future_PN[start : start + chunk]
        joint = model.joint(part_PD, future_CN[:, 0])
        indices_CK = model.indices(future_CN[:, model.horizon - joint.horizon :])
        gates.append(joint.log_weights_R)
        if model.first_is_tied:
            first_C1 = _gathered(model.next_token_log_probs(part_PD), future_CN[:, 0]).unsqueeze(-1)
            terms.append(torch.cat([first_C1, joint.chain(indices_CK)], dim=-1))
        else:
            terms.append(joint.chain(indices_CK))
    return torch.cat(terms), torch.cat(gates)


@torch.no_grad()
def accepted_shares(model: LanguageModel, hidden_TD: Tensor, future_TN: Tensor, whole_T: Tensor) -> Tensor:
    """(P, K) alpha = sum_v min(p, q) at every `STRIDE`-th whole position of a row, per draft.

    The chance that a draft drawn there is accepted if all before it are the text's own; 1 - alpha is the total
    variation of p and q. With a draft vocabulary q is the distribution on it, and p is not renormalised: what it
    has elsewhere is lost. A token before that is not in the vocabulary tells nothing of the component.
    """
    if model.heads is None:
        return hidden_TD.new_zeros(0, 0)
    first = 1 if model.first_is_tied else 0
    t_P = whole_T.nonzero().squeeze(-1)[::STRIDE]
    t_P = t_P[t_P + model.horizon - 1 < len(hidden_TD)]
    chunk = max(1, CHUNK_BYTES // (4 * model.horizon * model.rank * model.vocab_size))
    shares = [hidden_TD.new_zeros(0, model.heads.factors, dtype=torch.float32)]
    for t_C in t_P.split(chunk):
        future_CN = future_TN[t_C]
        joint = model.joint(hidden_TD[t_C], future_CN[:, 0])
        indices_CN = model.indices(future_CN[:, first:])
        states_CN = t_C.unsqueeze(-1) + torch.arange(first, model.horizon, device=t_C.device)
        target_CNV = model.target_log_probs(hidden_TD[states_CN]).exp()
        if model.draft_ids is not None:
            target_CNV = target_CNV[..., model.draft_ids]
        shares.append(overlap(joint.conditionals(indices_CN), target_CNV).float())
    return torch.cat(shares)


def _by_depth(shares_PK: Tensor, model: LanguageModel) -> list[dict[str, float]]:
    """Depth 1 is x_{t+1}. The error is over positions."""
    first = 2 if model.first_is_tied else 1
    return [
        {"depth": first + k, "mean": float(each_P.mean()), "sem": float(each_P.std() / max(1, len(each_P)) ** 0.5)}
        for k, each_P in enumerate(shares_PK.double().cpu().T)
        if len(each_P) > 1
    ]


def _gathered(log_probs_PV: Tensor, token_P: Tensor) -> Tensor:
    return log_probs_PV.gather(-1, token_P.unsqueeze(-1)).squeeze(-1)


def _ratio(sums: list[float], counts: list[int]) -> dict[str, float]:
    """Total over count, with the standard error of that ratio over rows (rows are what is independent)."""
    total, count = float(np.sum(sums)), float(np.sum(counts))
    mean = total / count
    deviations = np.asarray(sums) - mean * np.asarray(counts)
    rows = len(sums)
    sem = math.sqrt(rows / max(1, rows - 1) * float((deviations**2).sum())) / count
    return {"mean": mean, "sem": sem}


def _of_source(rows: list[dict[str, Any]]) -> dict[str, Any]:
    counts = [row["positions"] for row in rows]
    return {
        "joint_nll": _ratio([row["terms"].sum() for row in rows], counts)["mean"],
        "bits_per_byte": _bits_per_byte(rows),
        "positions": sum(counts),
    }


def _bits_per_byte(rows: list[dict[str, Any]]) -> float | None:
    total = sum(row["bytes"] for row in rows)
    return sum(row["target"] for row in rows) / math.log(2) / total if total else None
