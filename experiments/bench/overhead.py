"""What multi-token training costs beside next-token training of the same trunk (C8), and what each way to save costs in return.

    python experiments/bench/overhead.py time     # step time and peak memory against the plan's FLOPs and bytes, three sizes
    python experiments/bench/overhead.py gain     # what drafts of each recipe are worth to one target; not timed

Recipes: rank 8, horizon 4, the whole loss; the window at a share of the positions; a next-token head shared by all components
(tied); maps of low rank; on a frozen trunk, also a shortlist. Timed steps are `fit`'s own, on random tokens, each in a fresh
process, the recipes in turns: the median over the repeats with the least and the greatest, an overhead against the next-token step
of the same turn. The plan (`cpdlm/training/plan.py`) says what its FLOPs would allow. The gain is that of heads on one frozen trunk,
so that every recipe drafts for the same target: tokens per pass expected from the test positions (1 + the products of the chances
that a draft is kept), less 1; the mean over seeds of the heads with the least and the greatest. (From scratch, each recipe's target
is its own, and a young one accepts anything.) Chosen: of the recipes that keep 95 % of the whole loss's gain on average, the one of
fewest FLOPs; whether every seed chooses it stands beside.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from cpdlm.config import Config, resolve
from cpdlm.files import write_json

if TYPE_CHECKING:
    from cpdlm.data.stored import Corpus, TokenSplit

KEPT = 0.95
PLAIN, WHOLE = "next token", "whole"
_HEADS: dict[str, Any] = {"rank": 8, "horizon": 4}
_TIED = _HEADS | {"model.tie_first": True}
_FROZEN = _HEADS | {"model.trunk": "next token"}
RECIPES: dict[str, dict[str, Any]] = {
    PLAIN: {"rank": 1, "horizon": 1, "balance": "none"},
    WHOLE: _HEADS,
    "1/4": _HEADS | {"loss.joint_fraction": 1 / 4},
    "1/16": _HEADS | {"loss.joint_fraction": 1 / 16},
    "tied": _TIED,
    "tied, 1/4": _TIED | {"loss.joint_fraction": 1 / 4},
    "tied, 1/16": _TIED | {"loss.joint_fraction": 1 / 16},
    "tied, 1/4, low rank": _TIED | {"loss.joint_fraction": 1 / 4, "model.map_rank": 16},
    "frozen, 1/4": _FROZEN | {"loss.joint_fraction": 1 / 4},
    "frozen, 1/4, shortlist": _FROZEN
    | {"loss.joint_fraction": 1 / 4, "loss.draft_vocabulary": 0},  # a quarter of the vocabulary
}

SCRATCH = [recipe for recipe, settings in RECIPES.items() if recipe != PLAIN and "model.trunk" not in settings]


def configure(recipe: str, vocab: int, **settings: Any) -> Config:
    overrides = RECIPES[recipe] | settings
    if "loss.draft_vocabulary" in overrides:
        overrides |= {"loss.draft_vocabulary": vocab // 4}
    return resolve(overrides | {"tracking.mlflow": False})


# --- time -------------------------------------------------------------------------------------------------------------


def timed(options: argparse.Namespace) -> dict[str, Any]:
    contenders = list(itertools.product(options.sizes, options.recipes))
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {each: [] for each in contenders}
    for repeat in range(options.repeats):
        for size, recipe in contenders if repeat % 2 == 0 else reversed(contenders):
            words = ["--sizes", size, "--recipes", recipe, "--vocab", str(options.vocab), "--steps", str(options.steps)]
            done = subprocess.run(
                [sys.executable, __file__, "time", "--one", *words], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{size}, {recipe}: exit code {done.returncode}\n{done.stderr[-2000:]}")
            in_vocabulary = json.loads(done.stdout.splitlines()[-1])
            runs[size, recipe].append(in_vocabulary)
            print(
                f"{size:<6} {recipe:<24} {in_vocabulary['step_ms']:9.0f} ms {in_vocabulary['peak_bytes'] / 2**20:7.0f} MiB, planned "
                f"{in_vocabulary['planned_bytes'] / 2**20:7.0f}",
                file=sys.stderr,
                flush=True,
            )
    cells = []
    for (size, recipe), found in runs.items():
        steps = [run["step_ms"] for run in found]
        cell = found[0] | {
            "size": size,
            "recipe": recipe,
            "step_ms": _median(steps),
            "peak_bytes": max(run["peak_bytes"] for run in found),
            "repeats": steps,
        }
        plain = runs.get((size, PLAIN))
        if plain:
            turns = zip(steps, plain, strict=True)
            cell["overhead"] = _median([step / beside["step_ms"] - 1 for step, beside in turns])
            cell["bound"] = sum(cell["flops"].values()) / sum(plain[0]["flops"].values()) - 1
        cells.append(cell)
    return {"benchmark": "training overhead", "cells": cells}


def _median(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _mean(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}


def time_one(size: str, recipe: str, vocab: int, steps: int) -> dict[str, Any]:
    """Median step of `fit`, peak memory above what the process had before the model, and the plan of both."""
    import torch

    from cpdlm.data.batches import TokenDataModule
    from cpdlm.model.language_model import build_language_model
    from cpdlm.training.fit import fit, peak_memory_bytes
    from cpdlm.training.plan import make_plan

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
    trunk = build_language_model(configure(PLAIN, vocab, **settings), vocab) if config.model.trunk else None
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
    import numpy as np

    from cpdlm.data.stored import Corpus, TokenSplit
    from cpdlm.data.tokenizer import BytesTokenizer

    def split(rows: int) -> TokenSplit:
        tokens = np.random.default_rng(0).integers(0, vocab, rows * config.data.context + 1).astype(np.uint16)
        offsets = np.array([0, len(tokens)])
        return TokenSplit(tokens, offsets, np.zeros(1, dtype=np.int64), np.array([len(tokens)]), ["random"])

    return Corpus(split(64), split(64), split(64), BytesTokenizer(), {})


# --- gain -------------------------------------------------------------------------------------------------------------


def gained(options: argparse.Namespace) -> dict[str, Any]:
    """Each recipe's heads trained and evaluated as a cell is, for every seed; a run that is there already is not trained again."""
    from cpdlm.training.plan import make_plan
    from experiments import cell

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
        if not cell.is_trained(config):
            cell.train(config, "")
        return config

    trunk = cell.run_folder(trained(PLAIN, name="next-token"))
    cells = []
    for recipe in (each for each in options.recipes if each in SCRATCH):
        name, found = recipe.replace(", ", "-").replace("/", "of").replace(" ", "-"), []
        for seed in range(options.seeds):
            config = trained(recipe, name=f"{name}-s{seed}", seed=seed, **{"model.trunk": str(trunk)})
            likelihood = json.loads((cell.run_folder(config) / cell.EVALUATED).read_bytes())["likelihood"]
            kept = [depth["mean"] for depth in likelihood["kept_by_depth"] if depth["depth"] > 1]
            rate = 1 + sum(math.prod(kept[:depth]) for depth in range(1, len(kept) + 1))
            found.append({"tokens_per_pass": rate, "joint_nll": likelihood["joint_nll"]["mean"]})
        flops = make_plan(configure(recipe, options.vocab, **settings)).flops  # from scratch
        cells.append({"recipe": recipe, "flops": flops, "by_seed": found} | summed_up(found))
        print(json.dumps(cells[-1]), file=sys.stderr, flush=True)
    return {"benchmark": "training recipes", "cells": cells} | choose(cells)


def summed_up(by_seed: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, least and greatest over the seeds of each quantity."""
    return {key: _mean([found[key] for found in by_seed]) for key in by_seed[0]}


def choose(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What is chosen, and whether every seed decides so; to each cell, the share "kept" of the whole loss's gain, seed by seed.
    flops: of the recipe trained from scratch."""
    whole = next((cell for cell in cells if cell["recipe"] == WHOLE), None)
    if whole is None:
        return {}
    for cell in cells:
        pairs = zip(cell["by_seed"], whole["by_seed"], strict=True)
        cell["kept"] = _mean([(mine["tokens_per_pass"] - 1) / (most["tokens_per_pass"] - 1) for mine, most in pairs])

    def cost(cell: dict[str, Any]) -> float:
        return float(sum(cell["flops"].values()))

    chosen = min((cell for cell in cells if cell["kept"]["mean"] >= KEPT), key=cost)
    cheaper = [cell for cell in cells if cost(cell) < cost(chosen)]
    sure = chosen["kept"]["low"] >= KEPT and all(cell["kept"]["high"] < KEPT for cell in cheaper)
    return {"chosen": chosen["recipe"], "kept_target": KEPT, "decided": sure and len(whole["by_seed"]) > 1}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("time", "gain"))
    parser.add_argument("--sizes", nargs="+", default=None, help="trunks (default: tiny small base; gain: tiny)")
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=tuple(RECIPES), metavar="RECIPE")
    parser.add_argument("--vocab", type=int, default=None, help="tokens (default: 8192); gain: bytes")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps (default: 5; gain: 300)")
    parser.add_argument("--repeats", type=int, default=3, help="time: fresh processes per cell, in turns (default: 3)")
    parser.add_argument("--seeds", type=int, default=2, help="gain: seeds of the heads, on one trunk (default: 2)")
    parser.add_argument("--corpus", default="code")
    parser.add_argument("--max-bytes", type=int, default=4_000_000)
    parser.add_argument("--runs", type=Path, default=Path("runs/overhead"), help="where the trained models go")
    parser.add_argument("--cache", type=Path, default=Path(".cache/cpdlm"))
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    timing = options.stage == "time"
    options.sizes = options.sizes or (["tiny", "small", "base"] if timing else ["tiny"])
    options.vocab = (options.vocab or 8192) if timing else 257
    options.steps = options.steps or (5 if timing else 300)
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.one:
        print(json.dumps(time_one(options.sizes[0], options.recipes[0], options.vocab, options.steps)))
        return 0
    from experiments.provenance import provenance

    record = (timed if options.stage == "time" else gained)(options) | {
        "command": shlex.join(["python", "experiments/bench/overhead.py", *arguments]),
        **provenance(),
        "settings": {
            "vocab": options.vocab,
            "steps": options.steps,
            "rank": 8,
            "horizon": 4,
            **({"repeats": options.repeats} if options.stage == "time" else {"seeds": options.seeds}),
        },
    }
    path = options.output / f"training_{'overhead' if options.stage == 'time' else 'recipes'}.json"
    write_json(path, record)
    if "chosen" in record:
        print(f"chosen: {record['chosen']}{'' if record['decided'] else ' on average; not every seed decides so'}")
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
