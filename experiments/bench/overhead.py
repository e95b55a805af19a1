"""What multi-token training costs beside next-token training of the same trunk (C8), and what each saving costs.

    python experiments/bench/overhead.py time    # step time and peak memory against the plan's FLOPs and bytes
    python experiments/bench/overhead.py gain    # what drafts of each recipe are worth to one target; not timed

Recipes: rank 8, horizon 4, the whole loss; the window at a share of the positions; a next-token head shared by all
components (tied); maps of low rank; on a frozen trunk, also a draft vocabulary.

Timed steps are `fit`'s own, on random tokens, each in a fresh process, the recipes by turns: the median over the
repeats with the least and the greatest, an overhead against the next-token step of the same turn. The plan
(`cpdlm/training/plan.py`) says what its FLOPs would allow.

The gain is that of heads on one frozen trunk, so that every recipe drafts for the same target: tokens per forward
expected from the test positions (1 + the products of the chances that a draft is accepted), less 1; the mean over seeds
of the heads with the least and the greatest. (From scratch, each recipe's target is its own, and a young one accepts
anything.) Chosen: of the recipes that keep 95 % of the whole loss's gain on average, the one of fewest FLOPs; whether
every seed chooses it stands beside.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import experiments

experiments.check_python()

import numpy as np
import torch

from cpdlm.config import Config, resolve
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.stored import Corpus, TokenSplit
from cpdlm.data.tokenizer import BytesTokenizer
from cpdlm.model.build import build_language_model
from cpdlm.training.fit import fit, peak_memory_bytes
from cpdlm.training.plan import make_plan
from experiments import cell as suite_cell
from experiments.bench import fresh, record

SHARE = 0.95  # of the gain, that a recipe has to keep
NEXT_TOKEN, WHOLE = "next token", "whole"
_HEADS: dict[str, Any] = {"rank": 8, "horizon": 4}
_TIED = _HEADS | {"model.tie_first": True}
_FROZEN = _HEADS | {"model.trunk": "next token"}
RECIPES: dict[str, dict[str, Any]] = {
    NEXT_TOKEN: {"rank": 1, "horizon": 1, "balance": "none"},
    WHOLE: _HEADS,
    "1/4": _HEADS | {"loss.joint_fraction": 1 / 4},
    "1/16": _HEADS | {"loss.joint_fraction": 1 / 16},
    "tied": _TIED,
    "tied, 1/4": _TIED | {"loss.joint_fraction": 1 / 4},
    "tied, 1/16": _TIED | {"loss.joint_fraction": 1 / 16},
    "tied, 1/4, low rank": _TIED | {"loss.joint_fraction": 1 / 4, "model.map_rank": 16},
    "frozen, 1/4": _FROZEN | {"loss.joint_fraction": 1 / 4},
    # a quarter of the vocabulary
    "frozen, 1/4, draft vocabulary": _FROZEN | {"loss.joint_fraction": 1 / 4, "loss.draft_vocabulary": 0},
}
SCRATCH = [recipe for recipe, settings in RECIPES.items() if recipe != NEXT_TOKEN and "model.trunk" not in settings]


QUICK = "--sizes micro --recipes whole --vocab 512 --steps 2 --repeats 1"


def configure(recipe: str, vocab: int, **settings: Any) -> Config:
    overrides = RECIPES[recipe] | settings
    if "loss.draft_vocabulary" in overrides:
        overrides |= {"loss.draft_vocabulary": vocab // 4}
    return resolve(overrides | {"tracking.mlflow": False})


# --- time --------------------------------------------------------------------------------------------------------


def timed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells, each against the next-token step of the same turn."""
    contenders = [(size, recipe) for size in options.sizes for recipe in options.recipes]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {each: [] for each in contenders}
    for size, recipe in fresh.by_turns(contenders, options.repeats):
        words = ["--sizes", size, "--recipes", recipe, "--vocab", str(options.vocab), "--steps", str(options.steps)]
        found = json.loads(fresh.run(f"{size}, {recipe}", [__file__, "time", "--one", *words]))
        runs[size, recipe].append(found)
        peak, planned = (found[key] / 2**20 for key in ("peak_bytes", "planned_bytes"))
        record.say(f"{size:<6} {recipe:<24} {found['step_ms']:9.0f} ms {peak:7.0f} MiB, planned {planned:7.0f}")
    cells = []
    for (size, recipe), each in runs.items():
        steps = [run["step_ms"] for run in each]
        cell = each[0] | {
            "size": size,
            "recipe": recipe,
            "step_ms": fresh.spread(steps, "median"),
            "peak_bytes": max(run["peak_bytes"] for run in each),
            "repeats": steps,
        }
        base = runs.get((size, NEXT_TOKEN))
        if base:
            beside = [run["step_ms"] for run in base]
            over = [step / other - 1 for step, other in zip(steps, beside, strict=True)]
            cell["overhead"] = fresh.spread(over, "median")
            cell["bound"] = sum(cell["flops"].values()) / sum(base[0]["flops"].values()) - 1
        cells.append(cell)
    return cells


def time_one(size: str, recipe: str, vocab: int, steps: int) -> dict[str, Any]:
    """Median step of `fit`, peak memory above what the process had before the model, and the plan of both."""
    settings = {
        "size": size,
        "data.tokenizer": f"bpe:{vocab}",
        "data.batch_rows": 2,
        "optim.steps": steps,
        "optim.warmup": 0,
    }
    config = configure(recipe, vocab, **settings)
    plan = make_plan(config, compiled=torch.cuda.is_available())
    data = TokenDataModule(config, random_corpus(config, vocab))
    trunk = build_language_model(configure(NEXT_TOKEN, vocab, **settings), vocab) if config.model.trunk else None
    before = 0 if torch.cuda.is_available() else peak_memory_bytes()
    weights = 0 if trunk is None else sum(p.numel() * p.element_size() for p in trunk.parameters())
    model = build_language_model(config, vocab, trunk)
    if config.loss.draft_vocabulary:
        model.use_draft_vocabulary(torch.arange(config.loss.draft_vocabulary))
    with tempfile.TemporaryDirectory() as folder:
        summary = fit(config, model, data, Path(folder))
    assert summary is not None
    return {
        "step_ms": summary.step_ms_median,
        "tokens": config.data.batch_rows * config.data.context,
        "peak_bytes": summary.peak_memory_bytes - before + weights,
        "planned_bytes": plan.peak_bytes,
        "planned": plan.memory,
        "flops": plan.flops,
        "parameters": plan.parameters,
    }


def random_corpus(config: Config, vocab: int) -> Corpus:
    """Tokens without meaning: what a step takes does not depend on it."""

    def split(rows: int) -> TokenSplit:
        tokens = np.random.default_rng(0).integers(0, vocab, rows * config.data.context + 1).astype(np.uint16)
        offsets = np.array([0, len(tokens)])
        return TokenSplit(tokens, offsets, np.zeros(1, dtype=np.int64), np.array([len(tokens)]), ["random"])

    return Corpus(split(64), split(64), split(64), BytesTokenizer(), {})


# --- gain -------------------------------------------------------------------------------------------------------------


def gained(options: argparse.Namespace) -> dict[str, Any]:
    """Each recipe's heads trained and evaluated as a cell is, for every seed: the cells, and what is chosen.

    A run that is there already is not trained again.
    """
    settings = {
        "size": options.sizes[0],
        "corpus": options.corpus,
        "data.tokenizer": "bytes",
        "data.max_bytes": options.max_bytes,
        "data.context": 128,
        "data.batch_rows": 8,
        "optim.steps": options.steps,
        "train.validate_every": options.steps,
        "evaluate.rows": 64,
        "decode.prompt_tokens": 32,
        "output": str(options.runs),
        "data.cache": str(options.cache),
    }

    def trained(recipe: str, **more: Any) -> Config:
        config = configure(recipe, options.vocab, **settings, **more)
        if not suite_cell.is_trained(config):
            suite_cell.train(config, "")
        return config

    trunk = suite_cell.run_folder(trained(NEXT_TOKEN, name="next-token"))
    cells = []
    for recipe in (each for each in options.recipes if each in SCRATCH):
        name, found = recipe.replace(", ", "-").replace("/", "of").replace(" ", "-"), []
        for seed in range(options.seeds):
            config = trained(recipe, name=f"{name}-s{seed}", seed=seed, **{"model.trunk": str(trunk)})
            likelihood = json.loads((suite_cell.run_folder(config) / suite_cell.EVALUATED).read_bytes())["likelihood"]
            accepted = [depth["mean"] for depth in likelihood["kept_by_depth"] if depth["depth"] > 1]
            rate = 1 + sum(math.prod(accepted[:depth]) for depth in range(1, len(accepted) + 1))
            found.append({"tokens_per_pass": rate, "joint_nll": likelihood["joint_nll"]["mean"]})
        flops = make_plan(configure(recipe, options.vocab, **settings)).flops  # from scratch
        over_seeds = {key: fresh.spread([one[key] for one in found], "mean") for key in found[0]}
        cells.append({"recipe": recipe, "flops": flops, "by_seed": found} | over_seeds)
        record.say(json.dumps(cells[-1]))
    return {"cells": cells} | choose(cells)


def choose(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What is chosen, and whether every seed decides so.

    Gives each cell the share "kept" of the whole loss's gain, seed by seed. flops: of the recipe trained from scratch.
    """
    whole = next((cell for cell in cells if cell["recipe"] == WHOLE), None)
    if whole is None:
        return {}
    for cell in cells:
        pairs = zip(cell["by_seed"], whole["by_seed"], strict=True)
        shares = [(mine["tokens_per_pass"] - 1) / (most["tokens_per_pass"] - 1) for mine, most in pairs]
        cell["kept"] = fresh.spread(shares, "mean")

    def cost(cell: dict[str, Any]) -> float:
        return float(sum(cell["flops"].values()))

    chosen = min((cell for cell in cells if cell["kept"]["mean"] >= SHARE), key=cost)
    cheaper = [cell for cell in cells if cost(cell) < cost(chosen)]
    sure = chosen["kept"]["low"] >= SHARE and all(cell["kept"]["high"] < SHARE for cell in cheaper)
    return {"chosen": chosen["recipe"], "kept_target": SHARE, "decided": sure and len(whole["by_seed"]) > 1}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = record.parser(__doc__)
    add = parser.add_argument
    add("stage", choices=("time", "gain"), help="the step times and memory of recipes, or what they gain")
    add("--sizes", nargs="+", default=None, help="trunks (default: tiny small base; gain: tiny)")
    add(
        "--recipes",
        nargs="+",
        choices=tuple(RECIPES),
        default=tuple(RECIPES),
        metavar="RECIPE",
        help="which (default: all)",
    )
    add("--vocab", type=int, default=None, help="tokens (default: 8192); gain: bytes")
    add("--steps", type=int, default=None, help="optimiser steps (default: 5; gain: 300)")
    add("--repeats", type=int, default=3, help="time: fresh processes per cell, by turns (default: 3)")
    add("--seeds", type=int, default=2, help="gain: seeds of the heads, on one trunk (default: 2)")
    add("--corpus", default="code", help="that is trained on")
    add("--max-bytes", type=int, default=4_000_000, help="of the corpus")
    add("--runs", type=Path, default=Path("runs/overhead"), help="where the trained models go")
    add("--cache", type=Path, default=Path(".cache/cpdlm"), help="folder of prepared texts")
    add("--one", action="store_true", help=argparse.SUPPRESS)
    options = record.parse(parser, arguments, QUICK)
    timing = options.stage == "time"
    options.sizes = options.sizes or (["tiny", "small", "base"] if timing else ["tiny"])
    options.vocab = (options.vocab or 8192) if timing else 257
    options.steps = options.steps or (5 if timing else 300)
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    record.settle(options)
    if options.one:
        print(json.dumps(time_one(options.sizes[0], options.recipes[0], options.vocab, options.steps)))
        return 0
    timing = options.stage == "time"
    settings = record.chosen(options, ("vocab", "steps", "repeats" if timing else "seeds")) | _HEADS
    found = record.begin(f"training {'overhead' if timing else 'recipes'}", "overhead", arguments, settings)
    found |= {"cells": timed(options)} if timing else gained(options)
    record.write(options, f"training_{'overhead' if timing else 'recipes'}", found)
    if "chosen" in found:
        print(f"chosen: {found['chosen']}{'' if found['decided'] else ' on average; not every seed decides so'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
