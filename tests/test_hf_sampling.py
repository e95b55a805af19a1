"""What `generate` samples has the distribution that its options say.

The judge is the oracle's enumeration: SAMPLES rows, chi-square at `oracle.FALSE_ALARM` = 1e-4 for the fixed seed, power
of at least .99 against each fault; and the library's own loop where one token is left.
"""

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cpdlm.hf import CpdlmForCausalLM
from tests import oracle
from tests.hf_models import OWN, batch, stock, wrap, wrapped
from tests.test_loop import real

SAMPLES = 1500
PROMPT = (2, 0)


@cache
def small() -> CpdlmForCausalLM:
    return wrap(real(*OWN, horizon=3, vocabulary=3))


@cache
def scores(history: oracle.History) -> tuple[float, ...]:
    return tuple(small()(torch.tensor([history])).logits[0, -1].detach().tolist())


def distribution(
    penalty: float = 1.0, length: int = 4, eos: int | None = None, **keep: Any
) -> dict[oracle.History, float]:
    """repetition_penalty by its definition (negative scores of what has been said are multiplied), then the filters."""

    def target(history: oracle.History) -> oracle.Law:
        changed = [each * penalty if token in history else each for token, each in enumerate(scores(history))]
        return oracle.filter_law(oracle.normalise([2.718281828459045**each for each in changed]), **keep)

    assert all(each < 0 for each in scores(PROMPT)), "eq. 11 gives log-probabilities"
    return oracle.autoregressive_law(target, PROMPT, length, eos)


SAMPLED = {
    "plain": ({"top_k": 0}, {}, {"temperature": 1.6}),
    "temperature": ({"top_k": 0, "temperature": 0.6}, {"temperature": 0.6}, {}),
    "top-k and top-p": ({"top_k": 2, "top_p": 0.9}, {"top_k": 2, "top_p": 0.9}, {}),
    "eos": ({"top_k": 0, "eos_token_id": 1}, {"eos": 1}, {"eos": 1, "temperature": 1.6}),
    "penalty": ({"top_k": 0, "repetition_penalty": 1.6}, {"penalty": 1.6}, {}),
    "penalty and filters": (
        {"temperature": 0.8, "top_k": 2, "repetition_penalty": 1.6, "eos_token_id": 1},
        {"temperature": 0.8, "top_k": 2, "penalty": 1.6, "eos": 1},
        {"temperature": 0.8, "top_k": 2, "eos": 1},
    ),
}


@pytest.mark.parametrize(
    ("name", "draft"), [*((name, "chain") for name in SAMPLED), ("plain", "block"), ("penalty and filters", "block")]
)
def test_samples_have_the_distribution_that_the_options_say(
    name: str, draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power of .99 against the law without the option (plain: with a temperature that nobody asked for)."""
    monkeypatch.setattr("cpdlm.hf.generate.batch_limit", lambda *_: 0)  # so many rows would leave out all drafts
    chosen, right, wrong = SAMPLED[name]
    truth = distribution(**right)
    assert oracle.power(distribution(**wrong), truth, SAMPLES) >= 0.99
    torch.manual_seed(3)
    drawn = small().generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, 2),
        do_sample=True,
        max_new_tokens=4,
        num_return_sequences=SAMPLES,
        draft=draft,
        **({"pad_token_id": 0} | chosen),
    )
    assert drawn.shape[0] == SAMPLES and (drawn[:, :2] == torch.tensor(PROMPT)).all()
    assert oracle.p_value(texts_of(drawn, chosen.get("eos_token_id")), truth) > oracle.FALSE_ALARM


def texts_of(drawn: Tensor, eos: int | None) -> Counter[oracle.History]:
    counts: Counter[oracle.History] = Counter()
    for row in drawn[:, 2:].tolist():
        end = row.index(eos) + 1 if eos in row else len(row)
        assert set(row[end:]) <= {0}, "padding follows the end"
        counts[tuple(row[:end])] += 1
    return counts


NARROW: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 1e-6},
    "temperature": {"temperature": 1e-5},
    "min_p": {"min_p": 0.999},
    "typical_p": {"typical_p": 1e-6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.999},
    "renormalize_logits": {"top_k": 1, "renormalize_logits": True},
    "penalty": {"top_k": 1, "repetition_penalty": 1.6},
}


@pytest.mark.parametrize(
    ("layout", "name"), [*(("own", name) for name in NARROW), ("common", "top_k"), ("common", "penalty")]
)
def test_a_distribution_of_one_token_is_sampled_as_the_library_samples_it(layout: str, name: str) -> None:
    """Every filter, so narrow that nothing is left to chance: the texts are equal."""
    chosen = {"do_sample": True, "top_k": 0, "max_new_tokens": 16, "pad_token_id": 0} | NARROW[name]
    assert wrapped(layout).generate(**batch(2), **chosen).tolist() == stock(layout, **batch(2), **chosen).tolist()


def test_the_global_seed_decides() -> None:
    model = wrapped("common")  # made before any seed is set

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        chosen: dict[str, Any] = {"do_sample": True, "max_new_tokens": 20, "pad_token_id": 0}
        return [*model.generate(**batch(2), **chosen).tolist(), *model.generate(**batch(2), **chosen).tolist()]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1)[:2] != drawn(1)[2:], "a second call goes on where the first has ended"
