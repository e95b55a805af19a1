"""Reported likelihoods against plain sums, and the identity behind them: the chain-rule terms sum to the joint."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from cpdlm.config import parse
from cpdlm.model.build import build_language_model
from experiments import likelihood

V = 11


def _batch(rows: int, length: int, horizon: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens_BT": torch.randint(0, V, (rows, length), generator=generator),
        "position_ids_BT": torch.arange(length).expand(rows, length),
        "future_BTN": torch.randint(0, V, (rows, length, horizon), generator=generator),
        "successors_BT": torch.randint(0, horizon + 1, (rows, length), generator=generator),
        "source_B": torch.arange(rows) % 2,
    }


@pytest.mark.parametrize("words", ["rank=3", "rank=3 link=first", "rank=2 model.tie_first=true", "rank=1 horizon=1"])
def test_reported_numbers_are_simple_averages(words: str) -> None:
    config = parse([*words.split(), "size=micro", *([] if "horizon" in words else ["horizon=3"])])
    torch.manual_seed(0)
    model = build_language_model(config, V).double().eval()
    batch = _batch(4, 16, config.horizon)
    bytes_V = np.arange(V)
    report = likelihood.evaluate(model, [batch], bytes_V, ["a", "b"])
    joint, terms, bits, count = 0.0, np.zeros(config.horizon), 0.0, 0
    total_bytes = 0
    with torch.no_grad():
        hidden_BTD = model.hidden(batch["tokens_BT"])
        for row in range(4):
            for t in range(16):
                have = int(batch["successors_BT"][row, t])
                future_N = batch["future_BTN"][row, t]
                h_D = hidden_BTD[row, t]
                if have:
                    bits -= float(model.target_log_probs(h_D)[future_N[0]])
                    total_bytes += int(bytes_V[future_N[0]])
                if have < config.horizon:
                    continue
                count += 1
                first = float(model.next_token_log_probs(h_D)[future_N[0]])
                if config.horizon == 1:
                    chain = [first]
                elif model.first_is_tied:
                    joint_distribution = model.joint(h_D, future_N[0])
                    running = [float(joint_distribution.log_prob(future_N[1 : 1 + k])) for k in range(config.horizon)]
                    chain = [first, *np.diff(running)]
                else:
                    distribution = model.joint(h_D)
                    running = [float(distribution.log_prob(future_N[:k])) for k in range(config.horizon + 1)]
                    chain = list(np.diff(running))
                    assert chain[0] == pytest.approx(first)
                terms -= np.asarray(chain)
                joint -= sum(chain)
    assert report["positions"] == count
    assert report["joint_nll"]["mean"] == pytest.approx(joint / count)
    assert [term["mean"] for term in report["position_nll"]] == pytest.approx(list(terms / count))
    assert sum(term["mean"] for term in report["position_nll"]) == pytest.approx(report["joint_nll"]["mean"])
    assert report["first_token_nll"]["mean"] == pytest.approx(terms[0] / count)
    assert report["bits_per_byte"] == pytest.approx(bits / math.log(2) / total_bytes)
    assert sum(report["per_row"]["positions"]) == count
    assert sum(report["per_row"]["joint_nll"]) == pytest.approx(joint, abs=0.01)
    assert set(report["per_source"]) == {"a", "b"}
    assert sum(report["weights"]["mean"]) == pytest.approx(1)


@pytest.mark.parametrize("words", ["", "model.tie_first=true", "link=first"])
def test_on_a_draft_vocabulary_all_is_of_the_restricted_distribution(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By enumeration of all windows of listed tokens: likelihoods over covered windows, shares at every position."""
    monkeypatch.setattr(likelihood, "STRIDE", 1)
    torch.manual_seed(0)
    trunk = build_language_model(parse(["size=micro", "rank=1", "horizon=1"]), V)
    config = parse(["size=micro", "rank=3", "horizon=3", "model.trunk=frozen", *words.split()])
    model = build_language_model(config, V, trunk).double().eval()
    unlisted, listed = copy.deepcopy(model), [0, 2, 3, 5, 6, 7, 8, 10]
    model.use_draft_vocabulary(torch.tensor(listed))
    batch = _batch(4, 24, 3)
    report = likelihood.evaluate(model, [batch], np.arange(V), ["a", "b"])
    skip = 1 if model.first_is_tied else 0
    nll, kept, whole = list[float](), list[list[float]](), 0
    hidden_BTD = model.hidden(batch["tokens_BT"]).detach()
    for row, t in itertools.product(range(4), range(24)):
        if batch["successors_BT"][row, t] < 3:
            continue
        whole += 1
        future, h_D = batch["future_BTN"][row, t].tolist(), hidden_BTD[row, t]
        with torch.no_grad():
            distribution = unlisted.joint(h_D, batch["future_BTN"][row, t, 0])
        factors = distribution.log_factors_NRV.exp()[..., listed]
        factors = factors / factors.sum(dim=-1, keepdim=True)
        equation = "r,rx,ry,rz->xyz" if not skip else "r,rx,ry->xy"
        table = torch.einsum(equation, distribution.weights_R, *factors)  # of every window of listed tokens
        assert table.sum().item() == pytest.approx(1)
        indices = [listed.index(token) if token in listed else None for token in future[skip:]]
        if None not in indices:
            first = float(model.next_token_log_probs(h_D)[future[0]]) if skip else 0.0
            nll.append(-first - math.log(float(table[tuple(indices)])))
        if t + 2 < 24:
            shares = []
            for k in range(len(indices)):
                given = table
                for place in indices[:k]:  # a token off the list tells nothing
                    given = given.sum(dim=0) if place is None else given[place]
                q_V = given.flatten(1).sum(dim=1) if given.dim() > 1 else given
                p_V = model.target_log_probs(hidden_BTD[row, t + skip + k]).exp()[listed]
                shares.append(float(torch.minimum(p_V, q_V / q_V.sum()).sum()))
            kept.append(shares)
    assert 5 < len(nll) < whole and report["positions"] == len(nll)
    assert report["shortlist"] == {"tokens": 8, "windows": pytest.approx(len(nll) / whole)}
    assert report["joint_nll"]["mean"] == pytest.approx(np.mean(nll))
    assert sum(term["mean"] for term in report["position_nll"]) == pytest.approx(np.mean(nll))
    assert [each["mean"] for each in report["kept_by_depth"]] == pytest.approx(list(np.mean(kept, axis=0)), rel=1e-5)
    model.use_draft_vocabulary(torch.tensor([9]))
    with pytest.raises(ValueError, match=r"the draft vocabulary of 1 tokens covers none of the \d+ test windows"):
        likelihood.evaluate(model, [_only(batch, 1)], np.arange(V), ["a", "b"])
    model.use_draft_vocabulary(None)
    assert "shortlist" not in likelihood.evaluate(model, [batch], np.arange(V), ["a", "b"])


def _only(batch: dict[str, torch.Tensor], token: int) -> dict[str, torch.Tensor]:
    return batch | {"future_BTN": torch.full_like(batch["future_BTN"], token)}


def test_standard_error_is_that_of_independent_rows() -> None:
    generator = np.random.default_rng(0)
    means = []
    for _ in range(300):
        sums, counts = generator.normal(5, 1, 40) * 10, [10] * 40
        means.append(likelihood._ratio(list(sums), counts))
    spread = np.std([m["mean"] for m in means])
    assert np.mean([m["sem"] for m in means]) == pytest.approx(spread, rel=0.15)


def test_no_position_with_all_successors_is_an_error() -> None:
    config = parse(["size=micro", "rank=2", "horizon=3"])
    batch = _batch(1, 4, 3)
    batch["successors_BT"].clamp_(max=1)
    with pytest.raises(ValueError, match="all 3 successors"):
        likelihood.evaluate(build_language_model(config, V), [batch], np.ones(V), ["a"])
