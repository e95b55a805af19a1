"""How much of the tokens per pass becomes time: conversion, its limit and the floor of every cell, one record.

    python experiments/bench/speed.py [--quick] [--size 56m --vocab 8192 --ranks 1 2 4 8 --horizons 4 8 ...]

Speed does not depend on what the weights have learnt, acceptance does. So the weights are random and the acceptance is
forced: drafts are made and verified as ever, then as many are kept as a fixed pattern says (0, 1, .. n-1 in turn). The
speed-up measured is that of this pattern and of nothing else; what carries over to trained heads is

    conversion = speed-up / tokens per pass           limit of it = t(1) / t(n)           floor of a pass = t(n) + draft

with t(k) the target's time for k tokens behind a cached text, output layer included, and the draft's time measured alone.
Contenders of a group (one dtype, mode and batch: plain decoding, `generate` on the same weights, all cells) take turns in
one process, single calls are timed right after the decoding that they explain, and ratios are taken within a repeat.
Speed-ups count the prompt's pass; passes against the floor do not.

On a GPU passes are captured (`cpdlm.decoding.captured`) and so are the calls that they are held against, timed REPLAYS in a row, as
decoding replays them; the ranks of --batch-ranks at the first horizon and the last dtype are measured with launched kernels,
too (`captured: false`).

Letters: B batch, T position, N horizon, S window, D width.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np
import torch
from torch import Tensor

from cpdlm.bench.contenders import Generate, hugging_face
from cpdlm.bench.intervals import of_median as interval
from cpdlm.bench.timers import Timer
from cpdlm.config import SIZES, resolve
from cpdlm.decoding import CapturedForwards, Decoded, Options, Sampling, captured, decode_batch, loop
from cpdlm.decoding.drafters import Acceptance, Drafter, Uniforms, make_drafter
from cpdlm.decoding.proposals import Proposal, nothing
from cpdlm.files import write_json
from cpdlm.model.joint import Joint
from cpdlm.model.language_model import LanguageModel, build_language_model
from experiments.provenance import provenance

# rank -> least share of the limit, at horizon 4, batch 1, a trunk of 50M parameters or more, greedy and temperature 1
TARGETS = {1: 0.92, 8: 0.80}
LEAST_TRUNK = 50_000_000
PLAIN_TARGET, FLOOR_TARGET = 0.95, 1.05
MODES = {"greedy": Sampling(temperature=0), "sampling": Sampling()}
QUICK = "--size micro --vocab 64 --ranks 1 2 --horizons 3 --map-rank 4 --shortlist 16 --new-tokens 12 --batches 2 --batch-ranks 2 --batch-tokens 6 --repeats 2 --warmups 1 --calls 2"


@dataclass(frozen=True)
class Cell:
    """shortlist: tokens that drafts are made of (0: the whole vocabulary)."""

    rank: int
    horizon: int
    shortlist: int


class Forced:
    """A strategy that does all of another's work and then keeps 0, 1, .. N-1 drafts in turn, rows out of step."""

    def __init__(self, drafter: Drafter, horizon: int) -> None:
        self.drafter, self.horizon = drafter, horizon
        self.passes: Tensor | None = None  # on the device: a captured pass counts itself

    def draft(self, joint: Joint, depth: int) -> Proposal:
        return self.drafter.draft(joint, depth)

    def verify(self, target_BSV: Tensor, proposal: Proposal) -> Acceptance:
        acceptance = self.drafter.verify(target_BSV, proposal)
        drafts = proposal.tokens_BK.shape[1]
        if not drafts:
            return acceptance
        turn_B = torch.arange(len(acceptance.accepted_B), device=acceptance.accepted_B.device)
        if self.passes is None:
            self.passes = torch.zeros_like(turn_B[:1])
        turn_B = turn_B + self.passes
        self.passes.add_(1)
        return replace(acceptance, accepted_B=(turn_B % self.horizon).clamp(max=drafts))


@contextmanager
def forced(horizon: int) -> Iterator[None]:
    """Decoding in this block keeps what the pattern says."""

    def make(*arguments: Any, **options: Any) -> Forced:
        return Forced(make_drafter(*arguments, **options), horizon)

    with mock.patch.object(loop, "make_drafter", make), mock.patch.object(captured, "make_drafter", make):
        yield


# --- one decoding, one call ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """seconds: the whole; prefill: up to the first token. tokens and passes of one row, the mean of the batch."""

    seconds: float
    prefill: float
    tokens: float
    passes: float

    @property
    def forward_seconds(self) -> float:
        return (self.seconds - self.prefill) / (self.passes - 1)

    @property
    def token_seconds(self) -> float:
        return self.seconds / self.tokens


def decoding(
    model: LanguageModel,
    prompts_BT: Tensor,
    sampling: Sampling,
    draft: str,
    passes: CapturedForwards | None,
    new_tokens: int,
) -> Run:
    """One timed call of `decode_batch`, with forced acceptance where it drafts."""
    clock = Timer(prompts_BT.device)
    began = clock.now()
    prefill: list[float] = []

    def timer(part: str) -> None:
        if part == "prefill":
            prefill.append(clock.now() - began)

    written = _decode(model, prompts_BT, sampling, draft, new_tokens, timer, passes)
    seconds = clock.now() - began
    tokens, passed = (
        float(np.mean(each)) for each in ([len(w.tokens) for w in written], [w.forwards for w in written])
    )
    return Run(seconds, prefill[0], tokens, passed)


def split(
    model: LanguageModel, prompts_BT: Tensor, sampling: Sampling, draft: str, new_tokens: int
) -> dict[str, float]:
    """Seconds of one decoding by part. Synchronises at every part, so that the sum may exceed an untimed run."""
    clock = Timer(prompts_BT.device)
    _decode(model, prompts_BT, sampling, draft, new_tokens, clock, None)
    return clock.seconds


def _decode(
    model: LanguageModel,
    prompts_BT: Tensor,
    sampling: Sampling,
    draft: str,
    new_tokens: int,
    timer: Callable[[str], None],
    passes: CapturedForwards | None,
) -> list[Decoded]:
    generators = [torch.Generator(prompts_BT.device).manual_seed(row) for row in range(len(prompts_BT))]
    with forced(model.horizon):
        return decode_batch(
            model,
            list(prompts_BT),
            new_tokens,
            sampling,
            generators,
            draft=draft,
            options=Options(forwards=passes, timer=timer),
        )


class Parts:
    """Single calls behind a text of average length, in the order in which decoding makes them.

    The order matters: a call is slower after others have had the processor's caches. So t(1) is taken of calls in a row, as
    plain decoding makes them, t(N) and the draft by turns.
    """

    def __init__(self, trunk: LanguageModel, text_BT: Tensor, longest: int, sampling: Sampling) -> None:
        self.trunk, self.sampling, self.window_BS = trunk, sampling, text_BT[:, -longest:]
        self.cache = trunk.new_cache()
        with torch.inference_mode():
            self.hidden_BD = trunk.hidden(text_BT[:, :-longest], cache=self.cache)[:, -1]
        self.clock = Timer(text_BT.device)
        generators = [torch.Generator(text_BT.device).manual_seed(row) for row in range(len(text_BT))]
        self.uniforms = None if sampling.greedy else Uniforms(generators, text_BT.device)

    @torch.inference_mode()
    def seconds(self, model: LanguageModel, calls: int) -> tuple[float, float]:
        """(t(N), draft), medians over `calls` passes after one untimed; of the trunk itself (t(1), 0)."""
        target: list[float] = []
        draft: list[float] = []
        for _ in range(calls + 1):
            draft.append(0.0 if model is self.trunk else self._timed(partial(self._draft, model)))
            target.append(self._timed(partial(self._target, model.horizon)))
            self.cache.crop(-model.horizon)
        return float(np.median(target[1:])), float(np.median(draft[1:]))

    def _timed(self, call: Callable[[], Any]) -> float:
        began = self.clock.now()
        call()
        return self.clock.now() - began

    def _target(self, size: int) -> Tensor:
        return self.trunk.target_log_probs(self.trunk.hidden(self.window_BS[:, :size], cache=self.cache))

    def _draft(self, model: LanguageModel) -> Proposal:
        drafter = make_drafter("chain", self.sampling, self.uniforms)
        proposal = drafter.draft(model.draft_joint(self.hidden_BD, self.window_BS[:, 0]), model.horizon - 1)
        return proposal if model.draft_ids is None else proposal.on_vocabulary(model.draft_ids, model.vocab_size)


class CapturedParts:
    """`Parts` of captured passes. A graph is timed REPLAYS times in a row."""

    REPLAYS = 10

    def __init__(self, text_BT: Tensor, longest: int, sampling: Sampling) -> None:
        self.texts, self.window_BS, self.sampling = list(text_BT[:, :-longest]), text_BT[:, -longest:], sampling
        self.clock = Timer(text_BT.device)
        self.graphs: dict[CapturedForwards, tuple[Callable[[], None], Callable[[], None]]] = {}

    @torch.inference_mode()
    def seconds(self, passes: CapturedForwards, calls: int) -> tuple[float, float]:
        """(t(N), draft), medians over `calls`; of plain decoding's passes (t(1), 0)."""
        drafts = passes.draft != "none"
        generators = [torch.Generator(passes.device).manual_seed(row) for row in range(passes.rows)]
        passes.uniforms = None if self.sampling.greedy else Uniforms(generators, passes.device)
        passes.first(self.texts)
        if passes not in self.graphs:
            window_BS = self.window_BS[:, : passes.model.horizon if drafts else 1].contiguous()

            def target() -> None:
                passes.model.target_log_probs(passes.run(window_BS, nothing(window_BS)))

            def draft() -> None:
                passes.propose()

            self.graphs[passes] = captured.record(target, passes.device), captured.record(draft, passes.device)
        target_graph, draft_graph = self.graphs[passes]
        window = [self._timed(target_graph) for _ in range(calls)]
        return float(np.median(window)), float(np.median([self._timed(draft_graph) for _ in range(calls)])) * drafts

    def _timed(self, replay: Callable[[], None]) -> float:
        began = self.clock.now()
        for _ in range(self.REPLAYS):
            replay()
        return (self.clock.now() - began) / self.REPLAYS


# --- groups -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """What is compared side by side. shortlists: 0 is the whole vocabulary; each rank and horizon has all of them. captured:
    passes are replayed graphs."""

    dtype: str
    mode: str
    batch: int
    ranks: tuple[int, ...]
    horizons: tuple[int, ...]
    shortlists: tuple[int, ...]
    new_tokens: int
    captured: bool = False

    @property
    def cells(self) -> list[Cell]:
        return [Cell(r, n, size) for n in self.horizons for r in self.ranks for size in self.shortlists]


def groups(options: argparse.Namespace, captures: bool) -> list[Group]:
    """Every rank and horizon at batch 1; of the larger batches --batch-ranks at the first horizon and dtype."""
    shortlists = tuple(dict.fromkeys((0, options.shortlist)))
    made = [
        Group(dtype, mode, 1, tuple(options.ranks), tuple(options.horizons), shortlists, options.new_tokens)
        for dtype in options.dtypes
        for mode in MODES
    ]
    for batch in options.batches:
        for mode in MODES:
            cells = (tuple(options.batch_ranks), tuple(options.horizons[:1]), shortlists[-1:])
            made.append(Group(options.dtypes[0], mode, batch, *cells, options.batch_tokens))
    if not captures:
        return made
    few = (tuple(options.batch_ranks), tuple(options.horizons[:1]), (0,))
    launched = [Group(options.dtypes[-1], mode, 1, *few, options.new_tokens) for mode in MODES]
    return [*launched, *(replace(group, captured=True) for group in made)]


def models(
    options: argparse.Namespace, device: torch.device, dtype: str
) -> tuple[LanguageModel, dict[Cell, LanguageModel]]:
    """(trunk, cells) of one dtype: random heads on one frozen random trunk, which is the target of all."""
    captures = device.type == "cuda"
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
    for cell in dict.fromkeys(cell for group in groups(options, captures) for cell in group.cells):
        dials = {"rank": cell.rank, "horizon": cell.horizon, "model.map_rank": options.map_rank}
        model = build_language_model(resolve(base | dials | {"model.trunk": "random"}), options.vocab, trunk)
        assert model.heads is not None
        torch.nn.init.normal_(model.heads.gate.weight, std=0.2)
        model = model.to(device, getattr(torch, dtype)).eval()
        if cell.shortlist:
            model.use_draft_vocabulary(torch.randperm(options.vocab, device=device)[: cell.shortlist])
        cells[cell] = model
    return trunk, cells


def measure(
    group: Group, trunk: LanguageModel, cells: dict[Cell, LanguageModel], options: argparse.Namespace
) -> dict[str, Any]:
    """One group's part of the record; times in ms, latency per token of a row, throughput over all rows."""
    device = trunk.unembedding.weight.device
    sampling, new_tokens = MODES[group.mode], group.new_tokens
    length = options.prompt_tokens + new_tokens // 2 + max(group.horizons)
    random = torch.Generator().manual_seed(1)
    text_BT = torch.randint(options.vocab, (group.batch, length), generator=random).to(device)
    prompts_BT = text_BT[:, : options.prompt_tokens]
    subjects: dict[str | Cell, LanguageModel] = {"plain": trunk}
    subjects.update(cells.items())
    drafts: dict[str | Cell, str] = {key: "none" if key == "plain" else "chain" for key in subjects}
    passes: dict[str | Cell, CapturedForwards] = {}
    if group.captured:
        for key, model in subjects.items():
            with forced(model.horizon):
                passes[key] = CapturedForwards(
                    model, group.batch, sampling, draft=drafts[key], slots=text_BT.shape[1] + new_tokens
                )
    captured_parts = CapturedParts(text_BT, max(group.horizons), sampling)
    parts = Parts(trunk, text_BT, max(group.horizons), sampling)
    contenders: dict[str | Cell, Callable[[int], Run]] = {
        key: partial(decoding, model, prompts_BT, sampling, drafts[key], passes.get(key))
        for key, model in subjects.items()
    }
    generate = hugging_face(trunk)
    if group.batch == 1 and generate is not None:
        contenders["generate"] = partial(_theirs, generate, prompts_BT[0], sampling)
    for _ in range(options.warmups):
        for contender in contenders.values():
            contender(max(new_tokens // 4, 2))
    runs: dict[str | Cell, list[Run]] = {key: [] for key in contenders}
    single: dict[str | Cell, list[tuple[float, float]]] = {key: [] for key in subjects}
    order = list(contenders)
    for repeat in range(options.repeats):
        turn = repeat % len(order)
        for key in order[turn:] + order[:turn]:
            runs[key].append(contenders[key](new_tokens))
            if key in subjects:
                single[key].append(
                    captured_parts.seconds(passes[key], options.calls)
                    if group.captured
                    else parts.seconds(subjects[key], options.calls)
                )
    rates: dict[str, Any] = {
        key: {
            "token_ms": interval([run.token_seconds * 1e3 for run in runs[key]]),
            "tokens_per_second": interval([group.batch / run.token_seconds for run in runs[key]]),
        }
        for key in ("plain", "generate")
        if key in runs
    }
    if "generate" in runs:
        rates["plain_over_generate"] = interval(_ratios(runs["plain"], runs["generate"]))
    # The parts of a replayed pass cannot be told apart from outside; its floor says what they take.
    split_of = partial(_split, prompts_BT, sampling, new_tokens) if not group.captured else lambda model, draft: None
    rates["plain"]["ms_by_part"] = split_of(trunk, "none")
    return {
        "dtype": group.dtype,
        "mode": group.mode,
        "batch": group.batch,
        "new_tokens": new_tokens,
        "captured": group.captured,
        **rates,
        "cells": [
            asdict(cell)
            | _summary(runs["plain"], runs[cell], [one for one, _ in single["plain"]], single[cell], group.batch)
            | {"ms_by_part": split_of(cells[cell], "chain")}
            for cell in cells
        ],
    }


def _ratios(ours: Sequence[Run], theirs: Sequence[Run]) -> list[float]:
    return [their.token_seconds / our.token_seconds for our, their in zip(ours, theirs, strict=True)]


@torch.inference_mode()
def compiled_generate(options: argparse.Namespace, device: torch.device, dtype: str) -> dict[str, Any]:
    """Captured plain decoding against `generate` with its static cache, for which it compiles the model; greedy, batch 1.

    It is measured behind everything else: what it compiles keeps graphs and addresses of its own. "failure" where it does not
    run here.
    """
    trunk, _ = models(options, device, dtype)
    random = torch.Generator().manual_seed(1)
    prompt_T = torch.randint(options.vocab, (options.prompt_tokens,), generator=random).to(device)
    passes = CapturedForwards(trunk, 1, MODES["greedy"], draft="none", slots=options.prompt_tokens + options.new_tokens)
    generate = hugging_face(trunk, static=True)
    assert generate is not None, "the trunk is a next-token model"
    runs: dict[str, list[Run]] = {"plain": [], "generate": []}
    try:
        for repeat in range(options.warmups + options.repeats):
            plain = decoding(trunk, prompt_T[None], MODES["greedy"], "none", passes, options.new_tokens)
            theirs = _theirs(generate, prompt_T, MODES["greedy"], options.new_tokens)
            if repeat >= options.warmups:
                runs["plain"].append(plain)
                runs["generate"].append(theirs)
    except Exception as error:
        return {"dtype": dtype, "failure": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {
        "dtype": dtype,
        "token_ms": {key: interval([run.token_seconds * 1e3 for run in each]) for key, each in runs.items()},
        "plain_over_generate": interval(_ratios(runs["plain"], runs["generate"])),
    }


def _theirs(generate: Generate, prompt_T: Tensor, sampling: Sampling, tokens: int) -> Run:
    clock = Timer(prompt_T.device)
    began = clock.now()
    written = generate(prompt_T, tokens, sampling, 0)
    return Run(clock.now() - began, 0.0, len(written), len(written))


def _split(
    prompts_BT: Tensor, sampling: Sampling, new_tokens: int, model: LanguageModel, draft: str
) -> dict[str, float] | None:
    parts = split(model, prompts_BT, sampling, draft, new_tokens)
    return {part: seconds * 1e3 for part, seconds in parts.items()}


def _summary(
    plain: Sequence[Run], ours: Sequence[Run], ones: Sequence[float], windows: Sequence[tuple[float, float]], batch: int
) -> dict[str, Any]:
    """Of each repeat: our run, plain decoding's, t(1), and (t(N), draft)."""
    speedups = [p.token_seconds / o.token_seconds for p, o in zip(plain, ours, strict=True)]
    per_forward = [o.tokens / o.passes for o in ours]
    conversions = [speedup / each for speedup, each in zip(speedups, per_forward, strict=True)]
    limits = [one / window for one, (window, _) in zip(ones, windows, strict=True)]
    floors = [window + draft for window, draft in windows]
    return {
        "tokens_per_pass": float(np.mean(per_forward)),
        "speedup": interval(speedups),
        "conversion": interval(conversions),
        "limit": interval(limits),
        "share_of_limit": interval([c / most for c, most in zip(conversions, limits, strict=True)]),
        "t1_ms": interval([one * 1e3 for one in ones]),
        "tn_ms": interval([window * 1e3 for window, _ in windows]),
        "draft_ms": interval([draft * 1e3 for _, draft in windows]),
        "floor_ms": interval([floor * 1e3 for floor in floors]),
        "pass_ms": interval([o.forward_seconds * 1e3 for o in ours]),
        "pass_over_floor": interval([o.forward_seconds / floor for o, floor in zip(ours, floors, strict=True)]),
        "token_ms": interval([o.token_seconds * 1e3 for o in ours]),
        "tokens_per_second": interval([batch / o.token_seconds for o in ours]),
    }


# --- the record ---------------------------------------------------------------------------------------------------------


def records(options: argparse.Namespace, arguments: list[str]) -> Iterator[dict[str, Any]]:
    """The record as it grows: after every group, so that a run that is cut off leaves what it measured. `seconds`: since the start."""
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    began = time.monotonic()
    keys = (
        "size",
        "vocab",
        "map_rank",
        "shortlist",
        "prompt_tokens",
        "new_tokens",
        "batch_tokens",
        "repeats",
        "warmups",
        "calls",
    )
    record: dict[str, Any] = {
        "benchmark": "decoding speed, forced acceptance, common target, head=shared",
        "command": shlex.join(["python", "experiments/bench/speed.py", *arguments]),
        **provenance(),
        "settings": {key: getattr(options, key) for key in keys}
        | {"device": device.type, "kept": "0, 1, .. n-1 drafts in turn"},
        "groups": [],
    }
    for dtype in options.dtypes:
        trunk, cells = models(options, device, dtype)
        trunk_parameters = trunk.parameter_counts()["trunk"]
        record["settings"]["trunk_parameters"] = trunk_parameters
        for group in groups(options, device.type == "cuda"):
            if group.dtype == dtype:
                print(f"{dtype}, {group.mode}, batch {group.batch}", file=sys.stderr, flush=True)
                record["groups"].append(measure(group, trunk, {cell: cells[cell] for cell in group.cells}, options))
                record["targets"] = targets(record["groups"], trunk_parameters)
                record["seconds"] = time.monotonic() - began
                yield record
    if device.type == "cuda":
        for dtype in options.dtypes:
            found = compiled_generate(options, device, dtype)
            record["compiled_generate"] = [*record.get("compiled_generate", []), found]
            yield record


def targets(measured: list[dict[str, Any]], trunk_parameters: int) -> list[dict[str, Any]]:
    """Every target: {"what", "cell", "measured", "target", "holds"}; of batches above 1 the floor's. Launched kernels on a GPU
    have none."""
    found = []

    def say(what: str, cell: str, value: float, target: float, holds: bool) -> None:
        found.append({"what": what, "cell": cell, "measured": value, "target": target, "holds": holds})

    accelerated = any(group.get("captured") for group in measured)
    for group in (group for group in measured if group.get("captured", False) == accelerated):
        alone = group["batch"] == 1
        where = f"{group['dtype']} {group['mode']}" + ("" if alone else f" batch {group['batch']}")
        if "plain_over_generate" in group:
            ratio = group["plain_over_generate"]["median"]
            say("plain over generate, at least", where, ratio, PLAIN_TARGET, ratio >= PLAIN_TARGET)
        for cell in group["cells"]:
            name = f"{where} r{cell['rank']} n{cell['horizon']} shortlist {cell['shortlist'] or 'none'}"
            least = TARGETS.get(cell["rank"])
            if alone and least is not None and cell["horizon"] == 4 and trunk_parameters >= LEAST_TRUNK:
                share = cell["share_of_limit"]["median"]
                say("conversion over its limit, at least", name, share, least, share >= least)
            over = cell["pass_over_floor"]["median"]
            say("pass over floor, at most", name, over, FLOOR_TARGET, over <= FLOOR_TARGET)
    return found


COLUMNS = {
    "tok/pass": ("tokens_per_pass", 2),
    "t(1) ms": ("t1_ms", 2),
    "t(n) ms": ("tn_ms", 2),
    "draft ms": ("draft_ms", 2),
    "floor ms": ("floor_ms", 2),
    "pass ms": ("pass_ms", 2),
    "pass/floor": ("pass_over_floor", 3),
    "speed-up": ("speedup", 2),
    "conversion": ("conversion", 3),
    "limit": ("limit", 3),
    "of limit": ("share_of_limit", 3),
    "ms/token": ("token_ms", 2),
    "tokens/s": ("tokens_per_second", 1),
}


def table(record: dict[str, Any]) -> str:
    """The record for a terminal: medians."""
    lines = []
    for group in record["groups"]:
        plain = group["plain"]
        lines.append("")
        how = ", captured" if group["captured"] else ""
        text = f"{group['dtype']}, {group['mode']}, batch {group['batch']}{how}: plain {plain['token_ms']['median']:.2f} ms/token, {plain['tokens_per_second']['median']:.1f} tokens/s"
        if "generate" in group:
            text += f"; {group['plain_over_generate']['median']:.3f} times the speed of generate"
        lines += [text, " ".join(f"{title:>10}" for title in ("rank", "n", "shortlist", *COLUMNS))]
        for cell in group["cells"]:
            values = [str(cell["rank"]), str(cell["horizon"]), str(cell["shortlist"] or "-")]
            for key, digits in COLUMNS.values():
                value = cell[key]["median"] if isinstance(cell[key], dict) else cell[key]
                values.append(f"{value:.{digits}f}")
            lines.append(" ".join(f"{value:>10}" for value in values))
    for each in record.get("compiled_generate", []):
        against = (
            f"{each['plain_over_generate']['median']:.3f} times the speed of"
            if "failure" not in each
            else "not against"
        )
        lines.append(
            f"{each['dtype']}: plain, captured, {against} generate with a static cache, compiled {each.get('failure', '')}"
        )
    missed = [target for target in record["targets"] if not target["holds"]]
    lines += ["", f"{len(record['targets']) - len(missed)} of {len(record['targets'])} targets hold"]
    lines += [f"missed: {m['what']} {m['target']}: {m['measured']:.3f} ({m['cell']})" for m in missed]
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="56m")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--horizons", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--map-rank", type=int, default=64, help="rank of the heads' maps (0: full)")
    parser.add_argument("--shortlist", type=int, default=2048, help="tokens on the shortlist (0: no cells with one)")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 16], help="batches besides 1")
    parser.add_argument("--batch-ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batch-tokens", type=int, default=32, help="new tokens of the larger batches")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument(
        "--calls", type=int, default=8, help="single calls per repeat and cell, for t(1), t(n) and the draft"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU though there is a GPU")
    parser.add_argument("--quick", action="store_true", help=f"a run of seconds that measures nothing: {QUICK}")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks")
    parser.add_argument("--name", default="", help="of the record (default: decode_speed, on a GPU decode_speed_gpu)")
    options = parser.parse_args(arguments)
    return parser.parse_args([*QUICK.split(), *arguments]) if options.quick else options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    for record in records(options, arguments):
        name = "decode_speed" if record["settings"]["device"] == "cpu" else "decode_speed_gpu"
        path = options.output / f"{options.name or name}.json"
        write_json(path, record)
    print(table(record))
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
