"""Why drafts are accepted or not, without a decoding loop: the joint against the target at every position of its text.

At each position the drafts that a forward would make there are compared with what the target wrote. That isolates the
joint from where windows happen to begin, and answers two questions apart. Does conditioning on the drafts before (which
only a rank above 1 can do) change the argmax, and is it then right more often? How much mass do p and q share, which is
what sampling accepts?

Letters: Q positions, K drafts (depth k+2 is draft k), T position, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from cpdlm.decoding.proposals import best_window, greedy_chain
from cpdlm.model.language_model import LanguageModel


@torch.inference_mode()
def agreement(model: LanguageModel, texts_PT: Tensor, prompt_tokens: int, nodes: int) -> dict[str, Any]:
    """Shares over all positions whose window lies in the written part; lists go by depth 2..N.

    texts_PT: prompts and what the target wrote behind them. right: draft k is the target's token; kept: so are all
    before it. Of `chain` (argmaxes of the conditionals), `marginals` (of each position alone, as rank 1 does), `window`
    and `path` (beam of `nodes`). told: argmax of the conditional given the true tokens. overlap: sum_v min(p, q) given
    the true tokens. changed: where the drafts before are right, the share whose argmax conditioning changed, and of
    those how many became right and how many were right before.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for text_T in texts_PT:
        counts, positions = _counts(model, text_T, prompt_tokens, nodes)
        count += positions
        for name, sum_K in counts.items():
            sums[name] = sums.get(name, torch.zeros_like(sum_K)) + sum_K
    shares: dict[str, Any] = {"positions": count}
    for name in ("chain", "marginals", "window", "path"):
        shares[name] = {part: (sums[f"{name} {part}"] / count).tolist() for part in ("right", "kept")}
    for name in ("told", "overlap"):
        shares[name] = (sums[name] / count).tolist()
    shares["changed"] = {
        part: int(sums[f"changed {part}"].sum()) for part in ("reached", "differs", "now right", "was right")
    }
    return shares


def _counts(model: LanguageModel, text_T: Tensor, prompt_tokens: int, nodes: int) -> tuple[dict[str, Tensor], int]:
    drafts = model.horizon - 1
    hidden_TD = model.hidden(text_T[None])[0]
    indices_Q = torch.arange(prompt_tokens - 1, len(text_T) - model.horizon, device=text_T.device)
    future_QK = torch.stack([text_T[indices_Q + 2 + k] for k in range(drafts)], dim=1)
    joint = model.draft_joint(hidden_TD[indices_Q], text_T[indices_Q + 1])
    chosen = {
        "chain": greedy_chain(joint, drafts),
        "marginals": joint.marginals().argmax(dim=-1),
        "window": best_window(joint, drafts, "window", nodes),
        "path": best_window(joint, drafts, "path", nodes),
    }
    counts: dict[str, Tensor] = {}
    for name, tokens_QK in chosen.items():
        right_QK = tokens_QK == future_QK
        counts[f"{name} right"] = right_QK.double().sum(dim=0)
        counts[f"{name} kept"] = right_QK.double().cumprod(dim=1).sum(dim=0)
    probs_QKV = joint.conditionals(future_QK)
    target_QKV = torch.stack([model.target_log_probs(hidden_TD[indices_Q + 1 + k]) for k in range(drafts)], dim=1).exp()
    counts["told"] = (probs_QKV.argmax(dim=-1) == future_QK).double().sum(dim=0)
    counts["overlap"] = torch.minimum(probs_QKV, target_QKV).sum(dim=-1).double().sum(dim=0)
    before_QK = torch.nn.functional.pad((chosen["chain"] == future_QK).long().cumprod(dim=1), (1, -1), value=1).bool()
    differs_QK = before_QK & (chosen["chain"] != chosen["marginals"])
    counts["changed reached"] = before_QK[:, 1:].double().sum(dim=0)
    counts["changed differs"] = differs_QK.double().sum(dim=0)
    counts["changed now right"] = (differs_QK & (chosen["chain"] == future_QK)).double().sum(dim=0)
    counts["changed was right"] = (differs_QK & (chosen["marginals"] == future_QK)).double().sum(dim=0)
    return counts, len(indices_Q)
