"""What each component of the mixture specialises in: which windows of the test text it is responsible for.

Responsible means its posterior weight once the whole window is known, w_a prod_s p_a^(s)(x_s) over the sum of all.

Letters: T position, P positions picked, N horizon, R rank, V vocabulary, C class of token, K top tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpdlm.model.language_model import LanguageModel

CLASSES = ("lower case", "upper case", "digit", "space", "line break", "bracket, quote", "other sign", "special")


def token_class(text: str) -> int:
    """Index into CLASSES, by the first character."""
    first = text[:1]
    tests = (
        first.islower(),
        first.isupper(),
        first.isdigit(),
        first in (" ", "\t"),
        first in ("\n", "\r"),
        bool(first) and first in "()[]{}<>\"'`",
        bool(first) and first != "\ufffd",
    )
    return next((index for index, fits in enumerate(tests) if fits), len(CLASSES) - 1)


class Components:
    """Gathers the posterior weight of each component, by the first token of the window that it explains.

    That token is x_{t+1}, or x_{t+2} where x_{t+1} has a head of its own.
    """

    EXAMPLES, LENGTH, TOP = 3, 160, 5

    def __init__(self, model: LanguageModel, token_texts_V: Sequence[str]) -> None:
        self.texts = list(token_texts_V)
        self.first = 1 if model.first_is_tied else 0
        self.mass_RV = torch.zeros(model.rank, len(self.texts), dtype=torch.float64)
        self.sure = 0.0
        self.examples: list[dict[str, Any]] = []

    def add(self, log_posterior_PR: Tensor, future_TN: Tensor, whole_T: Tensor, source: str) -> None:
        """One row. log_posterior_PR: of its whole positions."""
        posterior_PR = log_posterior_PR.double().exp().cpu()
        if not len(posterior_PR):
            return
        token_P = future_TN[whole_T][:, self.first].cpu()
        self.mass_RV.index_add_(1, token_P, posterior_PR.T.contiguous())
        share_P, component_P = posterior_PR.max(dim=-1)
        self.sure += float(share_P.sum())
        t_P = whole_T.nonzero().squeeze(-1)
        unbroken = int((t_P == t_P[0] + torch.arange(len(t_P))).sum())
        if len(self.examples) < self.EXAMPLES and unbroken >= self.LENGTH // 2:
            shown = slice(0, min(unbroken, self.LENGTH))
            self.examples.append(
                {
                    "source": source,
                    "tokens": [self.texts[int(token)] for token in token_P[shown]],
                    "component": component_P[shown].tolist(),
                    "share": [round(float(share), 3) for share in share_P[shown]],
                }
            )

    def summary(self) -> dict[str, Any]:
        """The record's `components` entry.

        class_share[a][c]: share of all windows that component a explains and that begin with class c; sums to 1.
        certainty: mean largest posterior weight. top_tokens: first tokens by what they add to KL(p(v|a) || p(v)), with
        the share of a's windows that begin so and that over everyone's (lift). examples: stretches of test text, with
        the likeliest component (counted from 0) of the window that begins at each token, and its posterior weight.
        """
        joint_RV = self.mass_RV / self.mass_RV.sum()
        class_V = torch.tensor([token_class(text) for text in self.texts])
        share_RC = torch.zeros(len(joint_RV), len(CLASSES), dtype=torch.float64).index_add_(1, class_V, joint_RV)
        within_RV = joint_RV / joint_RV.sum(dim=1, keepdim=True).clamp_min(1e-12)
        lift_RV = within_RV / joint_RV.sum(dim=0).clamp_min(1e-12)
        top_RK = (within_RV * lift_RV.clamp_min(1e-12).log()).topk(min(self.TOP, len(self.texts)), dim=1).indices
        return {
            "classes": list(CLASSES),
            "class_share": [[round(float(share), 6) for share in row] for row in share_RC],
            "certainty": self.sure / float(self.mass_RV.sum()),
            "top_tokens": [
                [
                    {"token": self.texts[v], "share": float(within_RV[a, v]), "lift": float(lift_RV[a, v])}
                    for v in top_RK[a].tolist()
                ]
                for a in range(len(joint_RV))
            ],
            "examples": self.examples,
        }
