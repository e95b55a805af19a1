"""What multi-token training costs beside next-token training of the same trunk (C8), and what each way to save costs in return.

    python experiments/bench_overhead.py time     # step time and peak memory against the plan's FLOPs and bytes, three sizes
    python experiments/bench_overhead.py gain     # what drafts of each recipe are worth to one target; not timed

Recipes: rank 8, horizon 4, the whole loss; the window at a share of the positions; a next-token head shared by all components
(tied); maps of low rank; on a frozen trunk, also a shortlist. Timed steps are `fit`'s own, on random tokens, each cell in a
fresh process; the plan (`cpdlm/training/plan.py`) says what its FLOPs would allow. The gain is that of heads on one frozen trunk, so
that every recipe drafts for the same target: tokens per pass expected from the test positions (1 + the products of the chances that
a draft is kept), less 1. (From scratch, each recipe's target is its own, and a young one accepts anything.) Chosen: of the recipes
that keep 95 % of the whole loss's gain, the one of fewest FLOPs.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cpdlm.config import Config, resolve  # noqa: E402
from cpdlm.files import write_json  # noqa: E402

if TYPE_CHECKING:
    from cpdlm.data.corpus import Corpus, TokenSplit

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
    | {"loss.joint_fraction": 1 / 4, "loss.shortlist": 0},  # a quarter of the vocabulary
}

SCRATCH = [recipe for recipe, settings in RECIPES.items() if recipe != PLAIN and "model.trunk" not in settings]


def configure(recipe: str, vocab: int, **settings: Any) -> Config:
    overrides = RECIPES[recipe] | settings
    if "loss.shortlist" in overrides:
        overrides |= {"loss.shortlist": vocab // 4}
    return resolve(overrides | {"tracking.mlflow": False})


# --- time -------------------------------------------------------------------------------------------------------------


def timed(options: argparse.Namespace) -> dict[str, Any]:
    cells = []
    for size in options.sizes:
        for recipe in options.recipes:
            words = ["--sizes", size, "--recipes", recipe, "--vocab", str(options.vocab), "--steps", str(options.steps)]
            done = subprocess.run(
                [sys.executable, __file__, "time", "--one", *words], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{size}, {recipe}: exit code {done.returncode}\n{done.stderr[-2000:]}")
            cells.append({"size": size, "recipe": recipe, **json.loads(done.stdout.splitlines()[-1])})
            told = cells[-1]
            print(
                f"{size:<6} {recipe:<24} {told['step_ms']:9.0f} ms {told['peak_bytes'] / 2**20:7.0f} MiB, planned "
                f"{told['planned_bytes'] / 2**20:7.0f}",
                file=sys.stderr,
                flush=True,
            )
    for cell in cells:
        plain = next((each for each in cells if (each["size"], each["recipe"]) == (cell["size"], PLAIN)), None)
        if plain is not None:
            cell["overhead"] = cell["step_ms"] / plain["step_ms"] - 1
            cell["bound"] = sum(cell["flops"].values()) / sum(plain["flops"].values()) - 1
    return {"benchmark": "training overhead", "cells": cells}


def time_one(size: str, recipe: str, vocab: int, steps: int) -> dict[str, Any]:
    """Median step of `fit`, peak memory above what the process had before the model, and the plan of both."""
    import torch

    from cpdlm.data.datamodule import TokenDataModule
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
    if config.loss.shortlist:
        model.use_shortlist(torch.arange(config.loss.shortlist))
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

    from cpdlm.data.corpus import Corpus, TokenSplit
    from cpdlm.data.tokenizer import BytesTokenizer

    def split(rows: int) -> TokenSplit:
        tokens = np.random.default_rng(0).integers(0, vocab, rows * config.data.context + 1).astype(np.uint16)
        offsets = np.array([0, len(tokens)])
        return TokenSplit(tokens, offsets, np.zeros(1, dtype=np.int64), np.array([len(tokens)]), ["random"])

    return Corpus(split(64), split(64), split(64), BytesTokenizer(), {})


# --- gain -------------------------------------------------------------------------------------------------------------


def gained(options: argparse.Namespace) -> dict[str, Any]:
    """Each recipe's heads trained and evaluated as a cell is; a run that is there already is not trained again."""
    from cpdlm.training.plan import make_plan
    from experiments import cell

    cells = []
    for recipe in (PLAIN, *(each for each in options.recipes if each in SCRATCH)):
        settings = {
            "size": options.sizes[0], "corpus": options.corpus, "data.tokenizer": "bytes", "data.max_bytes": options.max_bytes,
            "data.context": 128, "data.batch_rows": 8, "optim.steps": options.steps, "train.validate_every": options.steps,
            "evaluate.rows": 64, "decode.prompt_tokens": 32, "output": str(options.runs), "data.cache": str(options.cache),
            "name": recipe.replace(", ", "-").replace("/", "of").replace(" ", "-"),
        }  # fmt: skip
        scratch = configure(recipe, options.vocab, **settings)
        trunk = {} if recipe == PLAIN else {"model.trunk": str(options.runs / "next-token")}
        config = configure(recipe, options.vocab, **settings, **trunk)
        if not cell.is_trained(config):
            cell.train(config, "")
        if recipe == PLAIN:
            continue
        likelihood = json.loads((cell.run_folder(config) / cell.EVALUATED).read_bytes())["likelihood"]
        kept = [depth["mean"] for depth in likelihood["kept_by_depth"] if depth["depth"] > 1]
        found = {
            "recipe": recipe,
            "flops": make_plan(scratch).flops,
            "joint_nll": likelihood["joint_nll"],
            "tokens_per_pass": 1 + sum(math.prod(kept[:depth]) for depth in range(1, len(kept) + 1)),
        }
        cells.append(found)
        print(json.dumps(found), file=sys.stderr, flush=True)
    return {"benchmark": "training recipes", "cells": cells} | choose(cells)


def choose(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What is chosen; to each cell, the share "kept" of the whole loss's gain. flops: of the recipe trained from scratch."""
    whole = next((cell for cell in cells if cell["recipe"] == WHOLE), None)
    if whole is None:
        return {}
    for cell in cells:
        cell["kept"] = (cell["tokens_per_pass"] - 1) / (whole["tokens_per_pass"] - 1)
    enough = [cell for cell in cells if cell["kept"] >= KEPT]
    return {"chosen": min(enough, key=lambda cell: sum(cell["flops"].values()))["recipe"], "kept_target": KEPT}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("time", "gain"))
    parser.add_argument("--sizes", nargs="+", default=None, help="trunks (default: tiny small base; gain: tiny)")
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=tuple(RECIPES), metavar="RECIPE")
    parser.add_argument("--vocab", type=int, default=None, help="tokens (default: 8192); gain: bytes")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps (default: 5; gain: 300)")
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
    from cpdlm.report import results

    record = (timed if options.stage == "time" else gained)(options) | {
        "command": shlex.join(["python", "experiments/bench_overhead.py", *arguments]),
        **results.provenance(),
        "settings": {
            "vocab": options.vocab,
            "steps": options.steps,
            "rank": 8,
            "horizon": 4,
        },
    }
    path = options.output / f"training_{'overhead' if options.stage == 'time' else 'recipes'}.json"
    write_json(path, record)
    if "chosen" in record:
        print(f"chosen: {record['chosen']}")
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
