"""The overhead benchmark: every recipe is a config that plans, a timed step is `fit`'s, and the lever lies where it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpdlm.training.plan import make_plan
from experiments.bench import overhead
from experiments.bench.overhead import NEXT_TOKEN, RECIPES, WHOLE, configure

VOCAB = 64


def test_every_recipe_costs_less_than_the_whole_and_more_than_none() -> None:
    settings = {"size": "micro", "data.tokenizer": "bytes"}
    cost = {recipe: make_plan(configure(recipe, 257, **settings)).flops_per_token for recipe in RECIPES}
    for recipe in RECIPES.keys() - {NEXT_TOKEN, WHOLE}:
        assert cost[recipe] < cost[WHOLE], recipe
        assert cost[recipe] > cost[NEXT_TOKEN] or "frozen" in recipe, recipe
    assert cost["tied, 1/16"] < cost["tied, 1/4"] < cost["tied"]
    assert cost["frozen, 1/4, shortlist"] < cost["frozen, 1/4"]


@pytest.mark.parametrize("recipe", ["tied, 1/16", "frozen, 1/4, shortlist"])
def test_a_timed_cell(recipe: str) -> None:
    found = overhead.time_one("micro", recipe, VOCAB * 8, 2)
    assert found["step_ms"] > 0 and found["tokens"] == 512
    assert found["planned_bytes"] == sum(found["planned"].values()) > 0
    assert set(found["flops"]) == {"trunk", "next token", "window"}


def test_the_gain_is_taken_over_seeds_of_the_heads_on_one_trunk(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text("".join(f"{number} and {k * number}\n" for k in range(60)))
    indices = {"--corpus": "text", "--runs": "runs", "--cache": "cache"}
    words = [word for option, index in indices.items() for word in (option, str(tmp_path / index))]
    words += ["--sizes", "micro", "--recipes", WHOLE, "tied, 1/16", "--steps", "2"]
    record = overhead.gained(overhead.parse(["gain", *words]))
    assert {folder.name for folder in (tmp_path / "runs").iterdir() if (folder / "evaluate.json").is_file()} == {
        "next-token",
        "whole-s0",
        "whole-s1",
        "tied-1of16-s0",
        "tied-1of16-s1",
    }
    for cell in record["cells"]:
        rate, (first, second) = cell["tokens_per_pass"], (found["tokens_per_pass"] for found in cell["by_seed"])
        assert first != second and rate["mean"] == pytest.approx((first + second) / 2)
        assert (rate["low"], rate["high"]) == (min(first, second), max(first, second))
    assert record["chosen"] in (WHOLE, "tied, 1/16") and isinstance(record["decided"], bool)
