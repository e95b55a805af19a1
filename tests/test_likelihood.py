"""Reported likelihoods against plain sums, and law 16: the chain-rule terms sum to the joint."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cpdlm.config import parse
from cpdlm.evaluation import likelihood
from cpdlm.evaluation.components import CLASSES
from cpdlm.model.language_model import build_language_model

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


@pytest.mark.parametrize("words", ["rank=3", "rank=3 anchor=token", "rank=2 model.tie_first=true", "rank=1 horizon=1"])
def test_reported_numbers_are_the_plain_averages(words: str) -> None:
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
                    joint_law = model.joint(h_D, future_N[0])
                    running = [float(joint_law.log_prob(future_N[1 : 1 + k])) for k in range(config.horizon)]
                    chain = [first, *np.diff(running)]
                else:
                    law = model.joint(h_D)
                    running = [float(law.log_prob(future_N[:k])) for k in range(config.horizon + 1)]
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


def test_components_are_weighed_by_their_posterior() -> None:
    """Shares, tokens and examples against a plain loop over windows."""
    config = parse(["rank=3", "size=micro", "horizon=3"])
    torch.manual_seed(0)
    model = build_language_model(config, V).double().eval()
    batch = _batch(3, 120, config.horizon)
    batch["successors_BT"].fill_(config.horizon)
    batch["successors_BT"][2, 100:] = 0
    texts = ["", *"aB3 \n(+\ufffdbc"]
    found = likelihood.evaluate(model, [batch], np.arange(V), ["a", "b"], "cpu", texts)["components"]
    share_RC, sure, count = np.zeros((3, len(CLASSES))), 0.0, 0
    expected_class = [7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 0]
    with torch.no_grad():
        hidden_BTD = model.hidden(batch["tokens_BT"])
        for row in range(3):
            for t in range(120 if row < 2 else 100):
                law, window_N = model.joint(hidden_BTD[row, t]), batch["future_BTN"][row, t]
                posterior_R = law.posterior(window_N).exp().numpy()
                share_RC[:, expected_class[int(window_N[0])]] += posterior_R
                sure, count = sure + posterior_R.max(), count + 1
                if row == 0 and t < 5:
                    assert found["examples"][0]["component"][t] == posterior_R.argmax()
                    assert found["examples"][0]["tokens"][t] == texts[int(window_N[0])]
    assert np.array(found["class_share"]) == pytest.approx(share_RC / count, abs=1e-5)
    assert found["certainty"] == pytest.approx(sure / count)
    assert [len(example["tokens"]) for example in found["examples"]] == [120, 120, 100]
    assert [example["source"] for example in found["examples"]] == ["a", "b", "a"]
    best = found["top_tokens"][0][0]
    assert best["token"] in texts and best["lift"] > 1
    assert all(0 <= token["share"] <= 1 for tops in found["top_tokens"] for token in tops)


def test_rank_1_has_no_components_to_tell_apart() -> None:
    model = build_language_model(parse(["rank=1", "size=micro", "horizon=3"]), V)
    assert "components" not in likelihood.evaluate(
        model, [_batch(4, 16, 3)], np.ones(V), ["a", "b"], token_texts_V=["x"] * V
    )
