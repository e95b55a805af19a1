"""The speed protocol: what it counts, what it compares, the shape of its record. Times are not judged."""

import time
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from cpdlm.bench import compare
from cpdlm.bench.acceptance import acceptance
from cpdlm.bench.compare import Protocol, Timing, measure
from cpdlm.bench.contenders import Ours, hugging_face
from cpdlm.bench.intervals import of_ratio
from cpdlm.bench.timers import StoodStill
from cpdlm.config import resolve
from cpdlm.decoding import Decoded, Sampling, decode
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from tests.tiny import MICRO

PROMPTS = torch.randint(0, 17, (3, 6), generator=torch.Generator().manual_seed(0))


@cache
def trunk() -> LanguageModel:
    torch.manual_seed(0)
    return build_language_model(resolve(MICRO | {"rank": 1, "horizon": 1}), 17)


def cell(rank: int, common: bool = True, horizon: int = 3, **settings: object) -> LanguageModel:
    torch.manual_seed(rank)
    overrides = MICRO | {"rank": rank, "horizon": horizon} | settings | ({"model.trunk": "frozen"} if common else {})
    return build_language_model(resolve(overrides), 17, trunk() if common else None).eval()


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.9, 5, 0.9)])
def test_a_group_is_measured_side_by_side(sampling: Sampling) -> None:
    models = {"r1": cell(1), "r2": cell(2), "own": cell(2, common=False)}
    lines: list[str] = []
    protocol, compared = Protocol(9, repeats=2, warmups=1), {"rank_one": {"r2": "r1"}, "reference": trunk().eval()}
    modes = measure(models, PROMPTS, sampling, protocol, **compared, progress=lines.append)
    assert list(modes) == list(models) and any("repeat 2/2" in line for line in lines)
    for mode in modes.values():
        assert mode["tokens"] == 2 * 3 * 9 == sum(mode["per_prompt"]["tokens"])
        assert mode["passes"] == sum(mode["emitted_histogram"]) == sum(mode["per_prompt"]["passes"])
        assert mode["tokens"] == sum((k + 1) * count for k, count in enumerate(mode["emitted_histogram"]))
        assert mode["tokens_per_pass"]["low"] <= mode["tokens_per_pass"]["mean"] <= mode["tokens_per_pass"]["high"]
        assert mode["tokens_per_pass"]["mean"] == pytest.approx(mode["tokens"] / mode["passes"])
        assert [row["depth"] for row in mode["acceptance_by_depth"]] == [2, 3]
        assert list(mode["seconds_by_part"]) == ["prefill", "draft", "trunk", "verify", "other"]
        assert all(seconds > 0 for seconds in mode["seconds_by_part"].values())
        assert len(mode["repeat_seconds"]["plain"]) == len(mode["repeat_seconds"]["speculative"]) == 2
        assert mode["conversion"] == pytest.approx(mode["speedup"]["median"] / mode["tokens_per_pass"]["mean"])
        assert mode["conversion_limit"] == pytest.approx(mode["t1_ms"] / mode["tn_ms"])
    assert modes["r1"]["repeat_seconds"]["plain"] == modes["r2"]["repeat_seconds"]["plain"], (
        "one plain decoder per trunk"
    )
    assert modes["own"]["repeat_seconds"]["plain"] != modes["r1"]["repeat_seconds"]["plain"]
    assert modes["own"]["plain_over_generate"] is None and modes["own"]["tokens_per_second"]["generate"] is None
    assert modes["r2"]["plain_over_generate"] and modes["r1"]["tokens_per_second"]["generate"] > 0
    assert all(mode["speedup_over_trunk"]["median"] > 0 for mode in modes.values())
    assert modes["own"]["speedup_over_trunk"] != modes["own"]["speedup"], "another model's plain decoding"
    assert modes["r1"]["speedup_over_rank1"] is None and modes["r2"]["speedup_over_rank1"] is not None
    same = {"prompts": 0, "of": 3, "first_token": None} if sampling.greedy else None
    assert modes["r2"]["other_than_generate"] == same and modes["own"]["other_than_generate"] is None


def test_speed_over_rank_1_is_over_the_cell_of_the_same_variant() -> None:
    """Two laws in one group: each rank 2 is held against its own rank 1, and a cell without one against none."""
    models = {"u1": cell(1), "u2": cell(2), "t1": cell(1, **{"model.tie_first": True})}
    models |= {"t2": cell(2, **{"model.tie_first": True}), "a2": cell(2, link="first")}
    modes = measure(
        models, PROMPTS, Sampling(0.0), Protocol(9, repeats=3, warmups=0), rank_one={"u2": "u1", "t2": "t1"}
    )
    for name, base in {"u2": "u1", "t2": "t1"}.items():
        mine, theirs = (np.array(modes[each]["repeat_seconds"]["speculative"]) for each in (name, base))
        assert modes[name]["speedup_over_rank1"]["median"] == pytest.approx(np.median(theirs / mine))
    assert all(modes[name]["speedup_over_rank1"] is None for name in ("u1", "t1", "a2"))


def test_greedy_texts_that_differ_are_counted() -> None:
    ours = Timing([], [], [], [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    theirs = Timing([], [], [], [[1, 2, 3], [4, 0, 0], [7, 8, 0]])
    assert compare._differing(ours, theirs) == {"prompts": 2, "of": 3, "first_token": 1}


def test_the_ratio_of_times_is_taken_within_a_repeat() -> None:
    slow_minute = [1.0, 10.0, 1.0]
    plain = Timing([[2 * s, 2 * s] for s in slow_minute], [[10, 10]] * 3, [])
    fast = Timing([[s, s] for s in slow_minute], [[10, 10]] * 3, [])
    assert compare.rate_ratio(fast, plain) == pytest.approx({"median": 2.0, "low": 2.0, "high": 2.0, "sem": 0.0})


def test_a_call_in_which_the_process_stood_still_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stood = [0.0]
    monkeypatch.setattr("cpdlm.processes.PauseWatch.total", lambda self: stood[0])
    calls = []

    def stopped_once(prompt_T: torch.Tensor, seed: int) -> list[int]:
        calls.append(seed)
        if len(calls) == 4:
            stood[0] += 30.0
            time.sleep(0.3)
        return [1, 2]

    said: list[str] = []
    contenders = {("plain", "a"): stopped_once}
    protocol = Protocol(2, repeats=2, warmups=0)
    timing = compare.interleaved(contenders, {"a": trunk()}, list(PROMPTS), protocol, said.append)["plain", "a"]
    assert calls[3] == calls[4] and len(calls) == 7 and len(timing.texts) == 3
    assert [len(repeat) for repeat in timing.seconds] == [3, 3] and np.max(timing.seconds) < 0.2
    assert "measured again: the process stood still for 30.0 s" in said
    always = iter(range(100))
    monkeypatch.setattr("cpdlm.processes.PauseWatch.total", lambda self: float(next(always)))
    with pytest.raises(StoodStill, match="5 times in a row"):
        compare.interleaved(contenders, {"a": trunk()}, list(PROMPTS), protocol, said.append)


def test_the_interval_of_a_speed_up_covers_prompts() -> None:
    """Every second prompt is three times as fast: more prompts say more, more repeats of them do not."""

    def found(prompts: int, repeats: int) -> dict[str, float]:
        plain = Timing([[3.0, 3.0] * (prompts // 2)] * repeats, [[10, 10] * (prompts // 2)] * repeats, [])
        fast = Timing([[1.0, 3.0] * (prompts // 2)] * repeats, [[10, 10] * (prompts // 2)] * repeats, [])
        return compare.rate_ratio(fast, plain)

    few, many = found(8, 2), found(32, 2)
    assert few["median"] == pytest.approx(1.5) and few == pytest.approx(found(8, 5))
    assert few["low"] < many["low"] < 1.5 < many["high"] < few["high"]
    assert many["sem"] == pytest.approx(few["sem"] / 2, rel=0.15)


def test_greedy_repeats_and_sampled_seeds() -> None:
    """The same (prompt, repeat) has the same text in every contender's run; other repeats have others."""
    model = cell(2)
    run = Ours(model, 9, Sampling(), "chain")
    assert run(PROMPTS[0], 3) == run(PROMPTS[0], 3) != run(PROMPTS[0], 4)
    seeds = {compare.run_seed(s, p, r) for s in range(3) for p in range(50) for r in range(9)}
    assert len(seeds) == 3 * 50 * 9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate_runs_on_the_same_weights(family: str) -> None:
    torch.manual_seed(0)
    overrides = MICRO | {"model.family": family, "rank": 1, "horizon": 1, "model.tie_embeddings": False}
    model = build_language_model(resolve(overrides), 17).double().eval()
    generate = hugging_face(model)
    assert generate is not None
    before = torch.random.get_rng_state()
    greedy = generate(PROMPTS[0], 20, Sampling(0.0), 0)
    assert greedy == decode(model, PROMPTS[0], 20, Sampling(0.0)).tokens
    assert len(generate(PROMPTS[0], 20, Sampling(), 1)) == 20 and torch.equal(before, torch.random.get_rng_state())
    assert generate(PROMPTS[0], 20, Sampling(), 1) != generate(PROMPTS[0], 20, Sampling(), 2)
    with torch.no_grad():
        model.unembedding.weight.mul_(-1)
    assert generate(PROMPTS[0], 20, Sampling(0.0), 0) != greedy, "the weights are shared, not copied"


def test_acceptance_counts() -> None:
    runs = [
        [Decoded([1, 2, 3, 4], [1, 3], [1, 1], [1, 1]), Decoded([1, 2, 3], [1, 1, 1], [2, 0], [0, 0])],
        [Decoded([5], [1], [0, 0], [0, 0])],
    ]
    counted = acceptance(runs, 3)
    assert (counted["tokens"], counted["passes"]) == (8, 6)
    assert counted["emitted_histogram"] == [5, 0, 1]
    assert counted["acceptance_by_depth"] == [
        {"depth": 2, "reached": 3, "accepted": 1},
        {"depth": 3, "reached": 1, "accepted": 1},
    ]
    assert counted["per_prompt"] == {"tokens": [7, 1], "passes": [5, 1]}
    assert counted["drafts_per_prompt"] == {"reached": [[3, 0], [1, 0]], "accepted": [[1, 0], [1, 0]]}
    with pytest.raises(AssertionError, match="forwards emitted 4 tokens, the text has 3"):
        acceptance([[replace(runs[0][0], tokens=[1, 2, 3])]], 3)


def test_the_interval_of_a_ratio_covers_the_truth() -> None:
    """95 % intervals over 40 prompts cover the true ratio in at least 88 of 100 trials (binomial tail below 1e-3)."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        forwards = rng.integers(20, 40, 40)
        interval = of_ratio(rng.poisson(2.0 * forwards), forwards)
        covered += interval["low"] <= 2.0 <= interval["high"]
    assert covered >= 88
