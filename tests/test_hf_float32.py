"""Greedy text of `generate` in float32, with heads that have learnt: it differs from the library's at near-ties."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cpdlm.bench.timers import count_forwards
from cpdlm.config import resolve
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from tests.hf_models import plain, wrap
from tests.made_runs import write_corpus
from tests.tiny import MICRO


def trained(text_T: Tensor, steps: int = 150) -> LanguageModel:
    """A trunk and heads that have learnt this text: drafts are often right, and near-ties are real ones."""
    base = MICRO | {"data.context": 128}
    torch.manual_seed(0)
    trunk = build_language_model(resolve(base | {"rank": 1, "horizon": 1}), 257)
    heads = build_language_model(resolve(base | {"rank": 4, "link": "first", "model.trunk": "frozen"}), 257, trunk)
    rows_RT = text_T[: len(text_T) // 64 * 64].view(-1, 64)
    learning = [each for each in heads.parameters() if each.requires_grad]
    for model, parameters in ((trunk, list(trunk.requires_grad_(True).parameters())), (heads, learning)):
        trunk.requires_grad_(model is trunk)
        optimizer = torch.optim.Adam(parameters, lr=4e-3)
        for _ in range(steps):
            rows_BT = rows_RT[torch.randint(0, len(rows_RT), (16,))]
            hidden_BTD = model.hidden(rows_BT)
            if model is trunk:
                loss = -model.target_log_probs(hidden_BTD[:, :-1]).gather(-1, rows_BT[:, 1:, None]).mean()
            else:
                windows_PN = rows_BT.unfold(1, model.horizon, 1)[:, 1:].reshape(-1, model.horizon)
                hidden_PD = hidden_BTD[:, : -model.horizon].flatten(0, 1)
                loss = -model.draft_joint(hidden_PD, windows_PN[:, 0]).log_prob(windows_PN[:, 1:]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return heads.eval()


@pytest.mark.slow
def test_greedy_in_float32_on_a_hundred_prompts(tmp_path: Path) -> None:
    """100 prompts x 64 tokens, many of them accepted drafts: at most one text differs from the library's.

    Where it does, the target's two best, in float64, are within 1e-4 of each other.
    """
    write_corpus(tmp_path / "words.txt")
    text_T = torch.tensor([*(tmp_path / "words.txt").read_bytes()])
    model = trained(text_T[:200_000])
    exact, generator, differing, forwards = copy.deepcopy(model).double(), torch.Generator().manual_seed(2), 0, 0
    for start in range(0, 100, 4):  # more rows at once would draft less
        lengths = [4 + (7 * (start + row)) % 29 for row in range(4)]
        places = torch.randint(200_000, len(text_T) - 64, (4,), generator=generator)
        ids = torch.stack([text_T[place : place + max(lengths)] for place in places])
        mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
        chosen = {"max_new_tokens": 64, "pad_token_id": 0, "attention_mask": mask}
        other = plain(model).generate(ids, **chosen)
        with count_forwards(model) as counted:
            one = wrap(model).generate(ids, **chosen)
        forwards += counted.count
        assert one.shape == other.shape == (4, max(lengths) + 64)
        for row in range(4):
            unequal = (one[row] != other[row]).nonzero()
            if len(unequal):
                differing += 1
                prefix = one[row, max(lengths) - lengths[row] : int(unequal[0])]
                best = exact.target_log_probs(exact.hidden(prefix[None]))[0, -1].topk(2).values
                assert float(best[0] - best[1]) < 1e-4, f"prompt {start + row} differs at token {int(unequal[0])}"
    assert differing <= 1
    assert forwards < 25 * 45, "even the slowest row of a batch keeps many drafts"
