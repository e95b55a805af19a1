"""How much of the tokens per forward becomes time: speed-up per token, its limit, the floor of a forward; one record.

    python experiments/bench/speed.py [--quick] [--size 56m --vocab 8192 --ranks 1 2 4 8 --horizons 4 8 ...]

Speed does not depend on what the weights have learnt, acceptance does. So the weights are random and the acceptance is
forced: drafts are made and verified as ever, then as many are accepted as a fixed pattern says (0, 1, .. n-1 in turn).
The speed-up measured is that of this pattern and of nothing else; what carries over to trained heads is

    speed-up / tokens per forward         its limit t(1) / t(n)           floor of a forward = t(n) + draft

with t(k) the target's time for k tokens behind a cached text, output layer included, and the draft's time alone.
Contenders of a group (one dtype, mode and batch: autoregressive decoding, `generate` on the same weights, all cells)
take turns in one process. Single calls are timed right after the decoding that they explain, and ratios are taken
within a repeat. Speed-ups count the prompt's forward; forwards against the floor do not.

On a GPU forwards are captured (`cpdlm.decoding.captured`), and so are the calls that they are held against.

The keys of a record are those of the records on disk: a "pass" is a target forward, "plain" autoregressive decoding,
"conversion" the speed-up per token per forward, "shortlist" the draft vocabulary.

Letters: B batch, T position.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import experiments

experiments.check_python()

import numpy as np
import torch
from torch import Tensor

from cpdlm.bench.contenders import hugging_face
from cpdlm.bench.intervals import of_median as interval
from cpdlm.config import SIZES, resolve
from cpdlm.decoding import Sampling
from cpdlm.model.build import build_language_model, parameter_counts
from cpdlm.model.language_model import LanguageModel
from experiments.bench import record
from experiments.bench.speed_calls import Run, SingleCalls, Subject, timed_generate
from experiments.report.benchmarks import upgrade
from experiments.report.speed import speed_table

# rank -> least share of the limit, at horizon 4, batch 1, a trunk of 50M parameters or more, greedy and temperature 1
TARGETS = {1: 0.92, 8: 0.80}
LEAST_TRUNK = 50_000_000
GENERATE_TARGET, FLOOR_TARGET = 0.95, 1.05
MODES = {"greedy": Sampling(temperature=0), "sampling": Sampling()}
SETTINGS = (
    *("size", "vocab", "map_rank", "shortlist", "prompt_tokens", "new_tokens"),
    *("batch_tokens", "repeats", "warmups", "calls"),
)
QUICK = (
    "--size micro --vocab 64 --ranks 1 2 --horizons 3 --map-rank 4 --draft-vocabulary 16 --new-tokens 12 --batches 2 "
    "--batch-ranks 2 --batch-tokens 6 --repeats 2 --warmups 1 --calls 2"
)


@dataclass(frozen=True)
class Cell:
    """shortlist: tokens of the draft vocabulary (0: the whole vocabulary)."""

    rank: int
    horizon: int
    shortlist: int


@dataclass(frozen=True)
class Group:
    """What is compared side by side."""

    dtype: str
    mode: str
    batch: int
    cells: tuple[Cell, ...]
    new_tokens: int


def groups(options: argparse.Namespace) -> list[Group]:
    """Every rank and horizon at batch 1; of the larger batches --batch-ranks at the first horizon and dtype."""
    sizes, first = tuple(dict.fromkeys((0, options.shortlist))), options.horizons[0]
    all_cells = tuple(Cell(r, n, size) for n in options.horizons for r in options.ranks for size in sizes)
    few = tuple(Cell(r, first, sizes[-1]) for r in options.batch_ranks)
    made = [Group(dtype, mode, 1, all_cells, options.new_tokens) for dtype in options.dtypes for mode in MODES]
    for batch in options.batches:
        made += [Group(options.dtypes[0], mode, batch, few, options.batch_tokens) for mode in MODES]
    return made


def models(
    options: argparse.Namespace, device: torch.device, dtype: str
) -> tuple[LanguageModel, dict[Cell, LanguageModel]]:
    """(trunk, cells) of one dtype: random heads on one frozen random trunk, which is the target of all."""
    context = options.prompt_tokens + max(options.new_tokens, options.batch_tokens) + max(options.horizons)
    base: dict[str, Any] = {
        "size": options.size,
        "data.context": context,
        "decode.prompt_tokens": options.prompt_tokens,
        "decode.new_tokens": context - options.prompt_tokens,
    }
    torch.manual_seed(0)
    trunk = build_language_model(resolve(base | {"rank": 1, "horizon": 1}), options.vocab)
    trunk = trunk.to(device, getattr(torch, dtype)).eval()
    cells = {}
    wanted = (cell for group in groups(options) for cell in group.cells)
    for cell in dict.fromkeys(wanted):
        settings = {"rank": cell.rank, "horizon": cell.horizon, "model.map_rank": options.map_rank}
        model = build_language_model(resolve(base | settings | {"model.trunk": "random"}), options.vocab, trunk)
        assert model.heads is not None
        torch.nn.init.normal_(model.heads.gate.weight, std=0.2)
        model = model.to(device, getattr(torch, dtype)).eval()
        if cell.shortlist:
            model.use_draft_vocabulary(torch.randperm(options.vocab, device=device)[: cell.shortlist])
        cells[cell] = model
    return trunk, cells


def measure(
    group: Group, trunk: LanguageModel, cells: dict[Cell, LanguageModel], options: argparse.Namespace, captures: bool
) -> dict[str, Any]:
    """One group's part of the record; times in ms."""
    sampling, new_tokens, batch = MODES[group.mode], group.new_tokens, group.batch
    horizons = {cell.horizon for cell in cells}
    length = options.prompt_tokens + new_tokens // 2 + max(horizons)
    text_BT = _random_tokens(options, (batch, length), trunk)
    prompts_BT = text_BT[:, : options.prompt_tokens]
    slots = (length + new_tokens) * captures
    subjects: dict[str | Cell, Subject] = {"plain": Subject(trunk, prompts_BT, sampling, drafts=False, slots=slots)}
    for cell, model in cells.items():
        subjects[cell] = Subject(model, prompts_BT, sampling, drafts=True, slots=slots)
    contenders: dict[str | Cell, Callable[[int], Run]] = {key: subject.timed for key, subject in subjects.items()}
    generate = hugging_face(trunk)
    if batch == 1 and generate is not None:
        contenders["generate"] = partial(timed_generate, generate, prompts_BT[0], sampling)
    runs, calls = _by_turns(contenders, subjects, SingleCalls(trunk, text_BT, horizons, sampling), new_tokens, options)
    base, ones = runs["plain"], [one for one, _ in calls["plain"]]
    rates: dict[str, Any] = {key: rate_entry(runs[key], batch) for key in ("plain", "generate") if key in runs}
    if "generate" in runs:
        rates["plain_over_generate"] = interval(speed_ratio(base, runs["generate"]))
    entries = [asdict(cell) | cell_entry(base, runs[cell], ones, calls[cell], batch) for cell in cells]
    what = {"dtype": group.dtype, "mode": group.mode, "batch": batch, "new_tokens": new_tokens}
    return what | {"captured": captures, **rates, "cells": entries}


def _by_turns(
    contenders: dict[str | Cell, Callable[[int], Run]],
    subjects: dict[str | Cell, Subject],
    single: SingleCalls,
    new_tokens: int,
    options: argparse.Namespace,
) -> tuple[dict[str | Cell, list[Run]], dict[str | Cell, list[tuple[float, float]]]]:
    """Per contender its runs, per subject its single calls, of each repeat."""
    for _ in range(options.warmups):
        for contender in contenders.values():
            contender(max(new_tokens // 4, 2))
    runs: dict[str | Cell, list[Run]] = {key: [] for key in contenders}
    calls: dict[str | Cell, list[tuple[float, float]]] = {key: [] for key in subjects}
    order = list(contenders)
    for repeat in range(options.repeats):
        turn = repeat % len(order)
        for key in order[turn:] + order[:turn]:
            runs[key].append(contenders[key](new_tokens))
            if key in subjects:
                calls[key].append(single.seconds(subjects[key], options.calls))
    return runs, calls


def _random_tokens(options: argparse.Namespace, shape: tuple[int, ...], model: LanguageModel) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(options.vocab, shape, generator=random).to(model.unembedding.weight.device)


@torch.inference_mode()
def compiled_generate(options: argparse.Namespace, device: torch.device, dtype: str) -> dict[str, Any]:
    """Captured autoregressive decoding against `generate` with its static cache, for which it compiles the model.

    Greedy, batch 1. Measured after everything else: what it compiles keeps graphs and addresses of its own. "failure"
    where it does not run here.
    """
    trunk, _ = models(options, device, dtype)
    sampling, new_tokens = MODES["greedy"], options.new_tokens
    prompt_T = _random_tokens(options, (options.prompt_tokens,), trunk)
    ours = Subject(trunk, prompt_T[None], sampling, drafts=False, slots=options.prompt_tokens + new_tokens)
    generate = hugging_face(trunk, static=True)
    assert generate is not None, "the trunk is a next-token model"
    runs: dict[str, list[Run]] = {"plain": [], "generate": []}
    try:
        for _ in range(options.warmups + options.repeats):
            runs["plain"].append(ours.timed(new_tokens))
            runs["generate"].append(timed_generate(generate, prompt_T, sampling, new_tokens))
    except Exception as error:
        return {"dtype": dtype, "failure": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    runs = {key: each[options.warmups :] for key, each in runs.items()}
    return {
        "dtype": dtype,
        "token_ms": {key: rate_entry(each, 1)["token_ms"] for key, each in runs.items()},
        "plain_over_generate": interval(speed_ratio(runs["plain"], runs["generate"])),
    }


# --- what is recorded ---------------------------------------------------------------------------------------------


def rate_entry(runs: Sequence[Run], batch: int) -> dict[str, Any]:
    """Latency per token of a row, throughput over all rows."""
    return {
        "token_ms": interval([run.token_seconds * 1e3 for run in runs]),
        "tokens_per_second": interval([batch / run.token_seconds for run in runs]),
    }


def speed_ratio(ours: Sequence[Run], others: Sequence[Run]) -> list[float]:
    """Of each repeat: how many times as fast ours is."""
    return [other.token_seconds / our.token_seconds for our, other in zip(ours, others, strict=True)]


def cell_entry(
    autoregressive: Sequence[Run],
    ours: Sequence[Run],
    ones: Sequence[float],
    windows: Sequence[tuple[float, float]],
    batch: int,
) -> dict[str, Any]:
    """Of each repeat: both runs, t(1) in seconds, and (t(N), draft)."""
    speedups = speed_ratio(ours, autoregressive)
    per_forward = [run.tokens / run.forwards for run in ours]
    shares = [speedup / each for speedup, each in zip(speedups, per_forward, strict=True)]
    limits = [one / window for one, (window, _) in zip(ones, windows, strict=True)]
    floors = [window + draft for window, draft in windows]
    return {
        "tokens_per_pass": float(np.mean(per_forward)),
        "speedup": interval(speedups),
        "conversion": interval(shares),
        "limit": interval(limits),
        "share_of_limit": interval([share / limit for share, limit in zip(shares, limits, strict=True)]),
        "t1_ms": interval([one * 1e3 for one in ones]),
        "tn_ms": interval([window * 1e3 for window, _ in windows]),
        "draft_ms": interval([draft * 1e3 for _, draft in windows]),
        "floor_ms": interval([floor * 1e3 for floor in floors]),
        "pass_ms": interval([run.forward_seconds * 1e3 for run in ours]),
        "pass_over_floor": interval([run.forward_seconds / floor for run, floor in zip(ours, floors, strict=True)]),
        **rate_entry(ours, batch),
    }


def targets(measured: list[dict[str, Any]], trunk_parameters: int) -> list[dict[str, Any]]:
    """Every target: {"what", "cell", "measured", "target", "holds"}; of batches above 1 the floor's."""
    found = []

    def add(what: str, cell: str, value: float, target: float, holds: bool) -> None:
        found.append({"what": what, "cell": cell, "measured": value, "target": target, "holds": holds})

    for group in measured:
        alone = group["batch"] == 1
        where = f"{group['dtype']} {group['mode']}" + ("" if alone else f" batch {group['batch']}")
        if "plain_over_generate" in group:
            ratio = group["plain_over_generate"]["median"]
            add("AR over generate, at least", where, ratio, GENERATE_TARGET, ratio >= GENERATE_TARGET)
        for cell in group["cells"]:
            name = f"{where} r{cell['rank']} n{cell['horizon']} draft vocabulary {cell['shortlist'] or 'none'}"
            least = TARGETS.get(cell["rank"])
            if alone and least is not None and cell["horizon"] == 4 and trunk_parameters >= LEAST_TRUNK:
                share = cell["share_of_limit"]["median"]
                add("speed-up per token per forward over its limit, at least", name, share, least, share >= least)
            over = cell["pass_over_floor"]["median"]
            add("forward over floor, at most", name, over, FLOOR_TARGET, over <= FLOOR_TARGET)
    return found


def records(options: argparse.Namespace, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The record as it grows: after every group, so that a run that is cut off leaves what it measured.

    `seconds`: since the start.
    """
    device = record.device(options)
    captures, began = device.type == "cuda", time.monotonic()
    settings = record.chosen(options, SETTINGS)
    settings |= {"device": device.type, "kept": "0, 1, .. n-1 drafts in turn"}
    what = "decoding speed, forced acceptance, common target, head=shared"
    found = record.begin(what, "speed", arguments, settings) | {"groups": []}
    for dtype in options.dtypes:
        trunk, cells = models(options, device, dtype)
        trunk_parameters = settings["trunk_parameters"] = parameter_counts(trunk)["trunk"]
        for group in groups(options):
            if group.dtype == dtype:
                record.say(f"{dtype}, {group.mode}, batch {group.batch}")
                mine = {cell: cells[cell] for cell in group.cells}
                found["groups"].append(measure(group, trunk, mine, options, captures))
                found["targets"] = targets(found["groups"], trunk_parameters)
                found["seconds"] = time.monotonic() - began
                yield found
    for dtype in options.dtypes if captures else ():
        found.setdefault("compiled_generate", []).append(compiled_generate(options, device, dtype))
        yield found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = record.parser(__doc__)
    parser.set_defaults(threads=2)
    add = parser.add_argument
    add("--size", choices=tuple(SIZES), default="56m", help="of the model")
    add("--vocab", type=int, default=8192, help="its tokens")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="of the heads")
    add("--horizons", type=int, nargs="+", default=[4, 8], help="of the heads")
    add("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"], help="of the weights")
    add("--map-rank", type=int, default=64, help="rank of the heads' maps (0: full)")
    sizes = "tokens of the draft vocabulary (0: no cells with one)"
    add("--draft-vocabulary", "--shortlist", dest="shortlist", type=int, default=2048, help=sizes)
    add("--prompt-tokens", type=int, default=8, help="tokens of a prompt")
    add("--new-tokens", type=int, default=64, help="tokens to write")
    add("--batches", type=int, nargs="*", default=[4, 16], help="batches besides 1")
    add("--batch-ranks", type=int, nargs="+", default=[1, 8], help="ranks that are timed in batches")
    add("--batch-tokens", type=int, default=32, help="new tokens of the larger batches")
    add("--repeats", type=int, default=5, help="timed texts of each contender")
    add("--warmups", type=int, default=3, help="untimed texts of each contender")
    add("--calls", type=int, default=8, help="single calls per repeat and cell, for t(1), t(n) and the draft")
    add("--name", default="", help="of the record (default: decode_speed, on a GPU decode_speed_gpu)")
    return record.parse(parser, arguments, QUICK)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    name = options.name or ("decode_speed" if record.device(options).type == "cpu" else "decode_speed_gpu")
    for found in records(options, arguments):
        record.write(options, name, found)
    print(speed_table({"name": name} | upgrade(found)).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
