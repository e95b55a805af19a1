"""The overhead benchmark: every recipe is a config that plans, a timed step is `fit`'s, and the lever lies where it should."""

from __future__ import annotations

import pytest

from cpdlm.training.plan import make_plan
from experiments import bench_overhead
from experiments.bench_overhead import PLAIN, RECIPES, WHOLE, configure

VOCAB = 64


def test_every_recipe_costs_less_than_the_whole_and_more_than_none() -> None:
    settings = {"size": "micro", "data.tokenizer": "bytes"}
    cost = {recipe: make_plan(configure(recipe, 257, **settings)).flops_per_token for recipe in RECIPES}
    for recipe in RECIPES.keys() - {PLAIN, WHOLE}:
        assert cost[recipe] < cost[WHOLE], recipe
        assert cost[recipe] > cost[PLAIN] or "frozen" in recipe, recipe
    assert cost["tied, 1/16"] < cost["tied, 1/4"] < cost["tied"]
    assert cost["frozen, 1/4, shortlist"] < cost["frozen, 1/4"]


@pytest.mark.parametrize("recipe", ["tied, 1/16", "frozen, 1/4, shortlist"])
def test_a_timed_cell(recipe: str) -> None:
    found = bench_overhead.time_one("micro", recipe, VOCAB * 8, 2)
    assert found["step_ms"] > 0 and found["tokens"] == 512
    assert found["planned_bytes"] == sum(found["planned"].values()) > 0
    assert set(found["flops"]) == {"trunk", "next token", "window"}


def test_timed_cells_are_set_against_the_next_token_step(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = '{"step_ms": %d, "peak_bytes": 1, "planned_bytes": 1, "flops": {"trunk": %d}}'

    class Done:
        returncode, stderr = 0, ""

        def __init__(self, words: list[str]) -> None:
            self.stdout = answer % ((300, 4) if WHOLE in words else (100, 1))

    monkeypatch.setattr(bench_overhead.subprocess, "run", lambda words, **options: Done(words))
    record = bench_overhead.timed(bench_overhead.parse(["time", "--sizes", "micro", "--recipes", PLAIN, WHOLE]))
    assert [(cell["overhead"], cell["bound"]) for cell in record["cells"]] == [(0, 0), (2, 3)]
