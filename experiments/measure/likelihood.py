"""Held-out likelihoods: the joint, its chain-rule terms, the first token, and bits per byte.

The joint and its terms are averaged over positions with all n successors; bits per byte is of the target law (what
decoding writes) over every token with a predecessor in its document.

A model that drafts from a shortlist is measured as it drafts: its joint is the law restricted to the list, averaged over
the windows that the list covers (a window with another token has no draft probability, and no finite likelihood), and
what the target puts on other tokens counts as lost in the kept shares, at every position.

Letters: B batch, T position, P positions picked, N horizon, K factors of the mixture, R rank, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpdlm.config import ConfigError
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.losses.draft import overlap
from experiments.measure.components import Components

CHUNK_BYTES = 64 * 2**20
STRIDE = 8  # positions between those whose draft laws are held against the target


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[dict[str, Tensor]],
    token_bytes_V: np.ndarray,
    source_names: list[str],
    device: torch.device | str = "cpu",
    token_texts_V: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The record's `likelihood` entry, in nats (and bits per byte).

    batches: as the data module's, one row per sequence, with `source_B` (index into source_names). token_bytes_V: how
    many bytes of text each token stands for (0 for special tokens). token_texts_V: the text of each token ("" for special
    ones); with it, a mixture's entry has `components`, too. With a shortlist `positions`, the joint, its terms, the weights
    and the components are of the windows that it covers, and `shortlist` says how many it does.
    """
    model = model.to(device).eval()
    bytes_V = torch.as_tensor(token_bytes_V, dtype=torch.float64)
    rows: list[dict[str, Any]] = []
    weights_R = torch.zeros(model.rank, dtype=torch.float64)
    entropy, whole = 0.0, 0
    kept_PN: list[Tensor] = []
    components = Components(model, token_texts_V) if token_texts_V and model.rank > 1 else None
    for batch in batches:
        hidden_BTD = model.hidden(batch["tokens_BT"].to(device), batch["position_ids_BT"].to(device))
        for index in range(len(hidden_BTD)):
            successors_T, future_TN = batch["successors_BT"][index], batch["future_BTN"][index]
            hidden_TD = hidden_BTD[index]
            exists_T = successors_T > 0
            token_P = future_TN[exists_T][:, 0]
            target_P = _gathered(model.target_log_probs(hidden_TD[exists_T.to(device)]), token_P.to(device))
            whole_T = successors_T >= model.horizon
            covered_T = whole_T & _covered(model, future_TN.to(device)).cpu()
            whole += int(whole_T.sum())
            terms_PN, log_weights_PR, log_posterior_PR = position_terms(
                model, hidden_TD[covered_T.to(device)], future_TN[covered_T].to(device)
            )
            weights_PR = log_weights_PR.double().exp().cpu()
            weights_R += weights_PR.sum(dim=0)
            entropy += float(-(weights_PR * log_weights_PR.double().cpu()).sum())
            rows.append(
                {
                    "source": int(batch["source_B"][index]) if "source_B" in batch else 0,
                    "terms": -terms_PN.double().sum(dim=0).cpu().numpy(),
                    "positions": int(covered_T.sum()),
                    "target": -float(target_P.double().sum()),
                    "bytes": float(bytes_V[token_P].sum()),
                }
            )
            if components is not None:
                components.add(log_posterior_PR, future_TN, covered_T, source_names[rows[-1]["source"]])
            kept_PN.append(kept_shares(model, hidden_TD, future_TN.to(device), whole_T.to(device)))
    positions = sum(row["positions"] for row in rows)
    if not whole:
        raise ConfigError(
            f"no test position has all {model.horizon} successors, the documents are too short; lower horizon={model.horizon}"
        )
    if not positions:
        raise ConfigError(
            f"the shortlist of {len(model.draft_ids) if model.draft_ids is not None else 0} tokens covers none of the {whole:,} "
            "test windows; raise loss.draft_vocabulary"
        )
    mean_R = (weights_R / positions).clamp_min(1e-12)
    joint = [row["terms"].sum() for row in rows]
    by_source: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["positions"]:
            by_source.setdefault(source_names[row["source"]], []).append(row)
    return (
        {
            "split": "test",
            "rows": len(rows),
            "positions": positions,
            "joint_nll": _ratio(joint, [row["positions"] for row in rows]),
            "position_nll": [
                _ratio([row["terms"][k] for row in rows], [row["positions"] for row in rows])
                for k in range(model.horizon)
            ],
            "first_token_nll": _ratio([row["terms"][0] for row in rows], [row["positions"] for row in rows]),
            "bits_per_byte": _bits_per_byte(rows),
            "kept_by_depth": _by_depth(torch.cat(kept_PN), model),
            "per_source": {name: _of_source(mine) for name, mine in by_source.items()},
            # Row by row, so that two models can be compared on the same rows.
            "per_row": {
                "positions": [row["positions"] for row in rows],
                "joint_nll": [round(float(value), 3) for value in joint],
                "first_token_nll": [round(float(row["terms"][0]), 3) for row in rows],
                "position_nll": [[round(float(row["terms"][k]), 3) for row in rows] for k in range(model.horizon)],
                "target_nll": [round(row["target"], 3) for row in rows],
                "bytes": [row["bytes"] for row in rows],
            },
            "weights": {
                "entropy_mean": entropy / positions,
                "effective": float(torch.exp(-(mean_R * mean_R.log()).sum())),
                "dead": int((mean_R < 0.1 / model.rank).sum()),
                "mean": [float(value) for value in mean_R],
            },
        }
        | ({"components": components.summary()} if components is not None else {})
        | (
            {"shortlist": {"tokens": len(model.draft_ids), "windows": positions / whole}}
            if model.draft_ids is not None
            else {}
        )
    )


def _covered(model: LanguageModel, future_TN: Tensor) -> Tensor:
    """(T,) bool: whether drafts can be made of all tokens that the mixture covers; a tied x_{t+1} is not one of them."""
    return (model.indices(future_TN[:, 1 if model.first_is_tied else 0 :]) >= 0).all(dim=-1)


@torch.no_grad()
def position_terms(model: LanguageModel, hidden_PD: Tensor, future_PN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chain-rule log-probabilities (P, N), which sum to the joint's, the gate's log-weights (P, R), and the log-posterior
    (P, R) over components once the window is known. With a shortlist of the law restricted to it: it has the tokens."""
    if model.heads is None:
        certain_PR = torch.zeros(len(hidden_PD), 1, device=hidden_PD.device)
        first_P = _gathered(model.next_token_log_probs(hidden_PD), future_PN[:, 0])
        return first_P.unsqueeze(-1), certain_PR, certain_PR
    terms, gates, posteriors = [], [], []
    chunk = max(1, CHUNK_BYTES // (4 * model.horizon * model.rank * model.vocab_size))
    for start in range(0, max(1, len(hidden_PD)), chunk):
        part_PD, future_CN = hidden_PD[start : start + chunk], future_PN[start : start + chunk]
        joint = model.draft_vocabulary_joint(part_PD, future_CN[:, 0])
        indices_CK = model.indices(future_CN[:, model.horizon - joint.horizon :])
        gates.append(joint.log_weights_R)
        posteriors.append(joint.posterior(indices_CK))
        if model.first_is_tied:
            first_C1 = _gathered(model.next_token_log_probs(part_PD), future_CN[:, 0]).unsqueeze(-1)
            terms.append(torch.cat([first_C1, joint.chain(indices_CK)], dim=-1))
        else:
            terms.append(joint.chain(indices_CK))
    return torch.cat(terms), torch.cat(gates), torch.cat(posteriors)


@torch.no_grad()
def kept_shares(model: LanguageModel, hidden_TD: Tensor, future_TN: Tensor, whole_T: Tensor) -> Tensor:
    """(P, K) alpha = sum_v min(p, q) at every `STRIDE`-th whole position of a row, per draft: the chance that a draft drawn
    there is kept if all before it are the text's own. 1 - alpha is the total variation of target and draft law.

    With a shortlist q is the law on the list, and p there is not renormalised: what it has elsewhere is lost. A token before
    that is not on the list tells nothing of the component.
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
        joint = model.draft_vocabulary_joint(hidden_TD[t_C], future_CN[:, 0])
        indices_CN = model.indices(future_CN[:, first:])
        states_CN = t_C.unsqueeze(-1) + torch.arange(first, model.horizon, device=t_C.device)
        target_CNV = model.target_log_probs(hidden_TD[states_CN]).exp()
        if model.draft_ids is not None:
            target_CNV = target_CNV[..., model.draft_ids]
        shares.append(overlap(joint.conditionals(indices_CN), target_CNV).float())
    return torch.cat(shares)


def _by_depth(kept_PK: Tensor, model: LanguageModel) -> list[dict[str, float]]:
    """Depth 1 is x_{t+1}. The error is over positions."""
    first = 2 if model.first_is_tied else 1
    return [
        {"depth": first + k, "mean": float(each_P.mean()), "sem": float(each_P.std() / max(1, len(each_P)) ** 0.5)}
        for k, each_P in enumerate(kept_PK.double().cpu().T)
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
