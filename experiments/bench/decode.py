"""Ways to draft, measured side by side: strategies for every rank and law, filters, and the baselines; three records.

    python experiments/bench/decode.py --runs runs/cpu-full --train-hydra runs/hydra       # once, a minute a corpus and seed
    python experiments/bench/decode.py --runs runs/cpu-full --only acceptance              # not timed
    python experiments/bench/decode.py --runs runs/cpu-full --hydra runs/hydra --assistant runs/ASSISTANT ...

All methods of a corpus share one frozen trunk, hence one target, the prompts, the loop and the protocol of
`cpdlm.bench.compare`. Heads of several seeds are one contender: every seed's heads write every draw of every prompt, and
intervals are over seeds, draws and prompts. A strategy is chosen on prompts of the validation split and reported on those
of the test split.

decode_acceptance.json   tokens per pass of every strategy, over chain and rank 1, agreement with the target per depth, temperatures and top-p; not timed
decode_strategies.json   speed of every strategy, greedy and sampling
decode_baselines.json    plain decoding, generate, prompt lookup, assisted generation, sequential heads, ours; memory
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor
from transformers import GenerationConfig

from cpdlm.baselines.hydra import HydraModel, Sequential
from cpdlm.baselines.hydra_training import load_hydra, train_hydra
from cpdlm.bench import compare, contenders
from cpdlm.bench.acceptance import acceptance
from cpdlm.bench.intervals import (
    Written,
    by_seed,
    interval,
    more_per_forward,
    speedup,
    speedup_per_token_per_forward,
    tokens_per_forward,
    tokens_per_second,
)
from cpdlm.bench.memory import working_memory
from cpdlm.bench.timers import count_forwards
from cpdlm.config import Config
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.corpus import load_corpus
from cpdlm.decoding import Decoded, Options, Sampling, decode, decode_batch
from cpdlm.decoding.lookup import decode_with_lookup
from cpdlm.files import check_writable, write_json
from cpdlm.model.language_model import LanguageModel
from cpdlm.training import checkpoints
from experiments.measure.agreement import agreement
from experiments.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
DRAFTERS = {"greedy": ("chain", "tree", "window", "path"), "sampling": ("chain", "block", "tree", "window", "path")}
SAMPLINGS = {"greedy": Sampling(0.0), "sampling": Sampling()}
TEMPERATURES, TOP_P = (0.5, 0.8, 1.0, 1.2), (0.8, 0.95, 1.0)  # temperature 0 has no top-p
LAWS = ("untied", "anchored", "tied")
PLAIN = "plain"
Contender = Callable[[Tensor, int], Decoded | list[int]]


@dataclass(frozen=True)
class Run:
    """Finished heads of one seed."""

    config: Config
    model: LanguageModel
    seconds: float  # of training

    @property
    def name(self) -> str:
        return self.config.run_name

    @property
    def distribution(self) -> str:
        if self.config.anchor != "none":
            return "anchored" if self.config.anchor == "token" else self.config.anchor
        return "tied" if self.config.model.tie_first else "untied"


@dataclass(frozen=True)
class Heads:
    """The same heads trained from each seed."""

    runs: list[Run]

    @property
    def rank(self) -> int:
        return self.runs[0].config.rank

    @property
    def distribution(self) -> str:
        return self.runs[0].distribution

    @property
    def horizon(self) -> int:
        return self.runs[0].config.horizon

    @property
    def label(self) -> dict[str, Any]:
        config = self.runs[0].config
        return {
            "corpus": config.corpus,
            "law": self.distribution,
            "rank": self.rank,
            "horizon": self.horizon,
            "names": [run.name for run in self.runs],
            "seeds": [run.config.seed for run in self.runs],
        }


@dataclass(frozen=True)
class Racer:
    """What runs, and the model whose trunk makes its passes."""

    model: LanguageModel
    run: Contender


Racers = list[Racer]  # of one method: one per seed of its heads


@dataclass(frozen=True)
class Bench:
    """What everything of one corpus is measured with: heads on one trunk, prompts, settings."""

    heads: list[Heads]
    trunk: LanguageModel
    prompts: dict[str, Tensor]  # split -> (P, T) ids
    options: argparse.Namespace
    say: Callable[[str], None]

    @property
    def config(self) -> Config:
        return self.heads[0].runs[0].config

    @property
    def new_tokens(self) -> int:
        return int(self.options.new_tokens)

    @property
    def seed(self) -> int:
        """Of draws and resamples."""
        return int(self.options.seeds[0])

    def ours(self, model: LanguageModel, sampling: Sampling, drafter: str) -> Contender:
        def run(prompt_T: Tensor, seed: int) -> Decoded:
            generator = torch.Generator(prompt_T.device).manual_seed(seed)
            options = Options(nodes=self.options.nodes)
            return decode(model, prompt_T, self.new_tokens, sampling, generator, draft=drafter, options=options)

        return run

    def plain(self, sampling: Sampling) -> Racers:
        return [Racer(self.trunk, self.ours(self.trunk, sampling, "none"))]

    def speculative(self, heads: Heads, sampling: Sampling, drafter: str) -> Racers:
        return [Racer(run.model, self.ours(run.model, sampling, drafter)) for run in heads.runs]

    def race(self, racers: dict[str, Racers], split: str, draws: int) -> dict[str, Raced]:
        """Side by side, `compare`'s protocol; one result per key, over its seeds."""
        each = {(key, f"{key} {place}"): racer for key, those in racers.items() for place, racer in enumerate(those)}
        timings = compare.interleaved(
            {key: racer.run for key, racer in each.items()},
            {name: racer.model for (_, name), racer in each.items()},
            self.prompts[split][: self.options.timed_prompts],
            compare.Protocol(self.new_tokens, repeats=draws, warmups=self.options.warmups, seed=self.seed),
            self.say,
        )
        return {key: Raced([timings[found] for found in each if found[0] == key]) for key in racers}


@dataclass(frozen=True)
class Raced:
    """Timings of one method, one per seed of its heads."""

    timings: list[compare.Timing]

    def written(self, forwards: dict[int, int] | None = None, seed: int = 0) -> Written:
        """passes: by seed of the text, of a method whose results do not tell them; empty where each token is one pass."""
        tokens = [timing.tokens for timing in self.timings]
        if forwards is None:
            counted = [_by_draw([[one.forwards for one in each] for each in timing.decoded]) for timing in self.timings]
        else:
            draws, prompts = len(tokens[0]), len(tokens[0][0])
            counted = (
                tokens
                if not forwards
                else [
                    [
                        [forwards[compare.run_seed(seed, place, draw)] for place in range(prompts)]
                        for draw in range(draws)
                    ]
                ]
            )
        return Written.of(tokens, counted, [timing.seconds for timing in self.timings])

    @property
    def decoded(self) -> list[list[Decoded]]:
        """Per prompt, every seed's draws."""
        return [
            [one for each in prompt for one in each] for prompt in zip(*(t.decoded for t in self.timings), strict=True)
        ]


def _by_draw(by_prompt: list[list[int]]) -> list[list[int]]:
    return [list(draw) for draw in zip(*by_prompt, strict=True)]


def _rate(written: Written, seed: int) -> dict[str, Any]:
    return {
        "tokens_per_pass": interval(tokens_per_forward, written, seed=seed),
        "by_seed": by_seed(tokens_per_forward, written),
    }


def _speed(written: Written, plain: Written, seed: int) -> dict[str, Any]:
    return {
        "tokens_per_second": interval(tokens_per_second, written, seed=seed)["mean"],
        "speedup": interval(speedup, written, plain, seed=seed),
        "conversion": interval(speedup_per_token_per_forward, written, plain, seed=seed),
    }


# --- strategies ------------------------------------------------------------------------------------------------------


def strategies(bench: Bench) -> list[dict[str, Any]]:
    """Per heads and mode, each strategy on both splits and the one chosen."""
    found: list[dict[str, Any]] = [heads.label | {"modes": {mode: {} for mode in DRAFTERS}} for heads in bench.heads]
    for mode, names in DRAFTERS.items():
        sampling = SAMPLINGS[mode]
        racers = {PLAIN: bench.plain(sampling)} | {
            f"{place} {drafter}": bench.speculative(heads, sampling, drafter)
            for place, heads in enumerate(bench.heads)
            for drafter in _distinct(names, heads)
        }
        for split, draws in (("validation", bench.options.validation_draws), ("test", bench.options.draws)):
            bench.say(f"strategies, {bench.config.corpus}, {mode}, {split}")
            raced = bench.race(racers, split, draws)
            written = {key: each.written() for key, each in raced.items()}
            for place, heads in enumerate(bench.heads):
                chain = written[f"{place} chain"]
                for drafter in _distinct(names, heads):
                    key = f"{place} {drafter}"
                    one = written[key]
                    found[place]["modes"][mode].setdefault(drafter, {})[split] = (
                        acceptance(raced[key].decoded, heads.horizon, bench.seed)
                        | _rate(one, bench.seed)
                        | _speed(one, written[PLAIN], bench.seed)
                        | {
                            "tokens_per_pass_over_chain": interval(more_per_forward, one, chain, seed=bench.seed),
                            "speed_over_chain": interval(speedup, one, chain, seed=bench.seed),
                        }
                    )
        for entry in found:
            speeds = _validation_speeds(entry, mode)
            entry["modes"][mode]["chosen"] = max(speeds, key=lambda drafter: speeds[drafter])
    return found


def suggested(cells: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Per mode: the strategy that was fastest on the validation prompts over all heads (geometric mean, over the chain)."""
    best = {}
    for mode in DRAFTERS:
        gains: dict[str, float] = {}
        for entry in cells:
            speeds = _validation_speeds(entry, mode)
            for drafter, speed in speeds.items():
                gains[drafter] = gains.get(drafter, 0.0) + math.log(speed / speeds["chain"])
        best[mode] = max(gains, key=lambda drafter: gains[drafter])
    return best


def _validation_speeds(entry: dict[str, Any], mode: str) -> dict[str, float]:
    found = entry["modes"][mode]
    return {name: each["validation"]["speedup"]["mean"] for name, each in found.items() if name != "chosen"}


def _distinct(names: Sequence[str], heads: Heads) -> list[str]:
    """Without those that draft what the chain drafts: of independent positions the likeliest window is the argmaxes."""
    return [name for name in names if heads.rank > 1 or name not in ("window", "path")]


# --- acceptance ------------------------------------------------------------------------------------------------------


def accepted(bench: Bench) -> list[dict[str, Any]]:
    """Tokens per pass of every strategy on the test prompts, decoded in batches, and what each gains over the chain of the same
    heads and over rank 1 of the same law and seeds."""
    rows = []
    for mode, names in DRAFTERS.items():
        of_rank1: dict[tuple[str, tuple[int, ...]], dict[str, Written]] = {}
        for heads in bench.heads:
            bench.say(f"acceptance, {bench.config.corpus}, {mode}, {heads.distribution}, rank {heads.rank}")
            written: dict[str, Written] = {}
            kin = (heads.distribution, tuple(heads.label["seeds"]))
            if heads.rank == 1:
                of_rank1[kin] = written
            for drafter in _distinct(names, heads):
                counts, one = _accepted(heads, SAMPLINGS[mode], drafter, bench)
                written[drafter] = one
                row = heads.label | {"mode": mode, "strategy": drafter} | counts
                if drafter != "chain":
                    row["tokens_per_pass_over_chain"] = interval(
                        more_per_forward, one, written["chain"], seed=bench.seed
                    )
                if heads.rank > 1 and kin in of_rank1:  # its window and path are its chain
                    other = of_rank1[kin].get(drafter, of_rank1[kin]["chain"])
                    row["tokens_per_pass_over_rank1"] = interval(more_per_forward, one, other, seed=bench.seed)
                rows.append(row)
    return rows


def agreements(bench: Bench) -> list[dict[str, Any]]:
    """Per heads and mode: `agreement` on the target's own continuations of the test prompts, of all seeds together."""
    prompts_PT = bench.prompts["test"]
    found: list[dict[str, Any]] = [heads.label | {"modes": {}} for heads in bench.heads]
    for mode, sampling in SAMPLINGS.items():
        written = [one for (one,) in _batch(bench.trunk, sampling, "none", 1, bench)]
        texts_PT = torch.cat(
            [prompts_PT, torch.tensor([one.tokens for one in written], device=prompts_PT.device)], dim=1
        )
        for entry, heads in zip(found, bench.heads, strict=True):
            bench.say(f"agreement, {bench.config.corpus}, {mode}, {heads.distribution}, rank {heads.rank}")
            entry["modes"][mode] = _pooled(
                [agreement(run.model, texts_PT, prompts_PT.shape[1], bench.options.nodes) for run in heads.runs]
            )
    return found


def _pooled(found: Sequence[Any]) -> Any:
    """Counts summed, shares averaged: every seed's heads see the same positions."""
    if isinstance(found[0], dict):
        return {key: _pooled([each[key] for each in found]) for key in found[0]}
    if isinstance(found[0], list):
        return [_pooled(each) for each in zip(*found, strict=True)]
    return sum(found) if isinstance(found[0], int) else sum(found) / len(found)


def filters(bench: Bench) -> list[dict[str, Any]]:
    """Acceptance under each temperature and top-p on the test prompts: chain and tree, lowest and highest rank of each law."""
    settings = [Sampling(0.0), *(Sampling(temperature, 0, p) for temperature in TEMPERATURES for p in TOP_P)]
    rows = []
    for heads in _ends(bench.heads):
        bench.say(f"filters, {bench.config.corpus}, {heads.distribution}, rank {heads.rank}")
        for sampling in settings:
            for drafter in ("chain", "tree"):
                rows.append(
                    heads.label
                    | {"temperature": sampling.temperature, "top_p": sampling.top_p, "strategy": drafter}
                    | _accepted(heads, sampling, drafter, bench)[0]
                )
    return rows


def _accepted(heads: Heads, sampling: Sampling, drafter: str, bench: Bench) -> tuple[dict[str, Any], Written]:
    """(a row's part of the record, what was counted per text)."""
    draws = 1 if sampling.greedy else bench.options.acceptance_draws  # another greedy draw is the same text
    texts = [_batch(run.model, sampling, drafter, draws, bench) for run in heads.runs]
    tokens, forwards = (
        [_by_draw([[count(one) for one in prompt] for prompt in of_seed]) for of_seed in texts]
        for count in (lambda one: len(one.tokens), lambda one: one.forwards)
    )
    pooled = [[one for each in prompt for one in each] for prompt in zip(*texts, strict=True)]
    written = Written.of(tokens, forwards, forwards)  # no seconds: rows of a batch share them
    return acceptance(pooled, heads.horizon, bench.seed) | _rate(written, bench.seed), written


def _batch(model: LanguageModel, sampling: Sampling, drafter: str, draws: int, bench: Bench) -> list[list[Decoded]]:
    """Per test prompt, its draws."""
    prompts_PT, found = bench.prompts["test"], []
    for draw in range(draws):
        generators = [
            torch.Generator(prompts_PT.device).manual_seed(compare.run_seed(bench.seed, index, draw))
            for index in range(len(prompts_PT))
        ]
        found.append(
            decode_batch(
                model,
                list(prompts_PT),
                bench.new_tokens,
                sampling,
                generators,
                draft=drafter,
                options=Options(nodes=bench.options.nodes),
            )
        )
    return [list(prompt) for prompt in zip(*found, strict=True)]


def _ends(heads: Sequence[Heads]) -> list[Heads]:
    """Untied and anchored: the lowest and the highest rank."""
    ends: list[Heads] = []
    for distribution in ("untied", "anchored"):
        ranked = sorted((each for each in heads if each.distribution == distribution), key=lambda each: each.rank)
        ends += [ranked[0], ranked[-1]][: len(ranked)]
    return ends


# --- baselines -------------------------------------------------------------------------------------------------------


@dataclass
class Method:
    """One line of the comparison. racers, strategy: per mode. passes: by seed of the text, of a method whose results do not
    tell them. training_seconds: of one seed's."""

    name: str
    kind: str  # plain | generate | lookup | assistant | hydra | heads
    horizon: int
    racers: dict[str, Racers]
    drafter: dict[str, str]
    parameters: int = 0
    training_seconds: float = 0.0
    label: dict[str, Any] = field(default_factory=dict)
    forwards: dict[int, int] | None = None


def baselines(bench: Bench, chosen: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """Every method in every mode on the test prompts. chosen: name of the first seed's run -> mode -> strategy."""
    methods = _methods(bench, chosen)
    mib = bench.trunk.unembedding.weight.element_size() / 2**20
    entries: list[dict[str, Any]] = [
        {
            "corpus": bench.config.corpus,
            "name": method.name,
            "kind": method.kind,
            "horizon": method.horizon,
            "strategy": method.drafter,
            "parameters_added": method.parameters,
            "weights_mib": method.parameters * mib,
            "training_seconds": method.training_seconds,
            "modes": {},
        }
        | method.label
        for method in methods
    ]
    for mode in SAMPLINGS:
        bench.say(f"baselines, {bench.config.corpus}, {mode}")
        for method in methods:
            if method.forwards:
                method.forwards.clear()
        raced = bench.race(
            {method.name: method.racers[mode] for method in methods}, "test", bench.options.baseline_draws
        )
        written = {method.name: raced[method.name].written(method.forwards, bench.seed) for method in methods}
        prompt_T = bench.prompts["test"][0]
        for entry, method in zip(entries, methods, strict=True):
            one = written[method.name]
            texts = {"tokens": int(one.tokens_HDP.sum()), "passes": int(one.forwards_HDP.sum())}
            if method.forwards is None:
                texts |= acceptance(raced[method.name].decoded, method.horizon, bench.seed)
            entry["modes"][mode] = (
                texts
                | _rate(one, bench.seed)
                | _speed(one, written[PLAIN], bench.seed)
                | {
                    "speedup_over_generate": interval(speedup, one, written["generate"], seed=bench.seed),
                }
                | _memory(method.racers[mode][0], prompt_T, bench.seed)
            )
    return entries


def _memory(racer: Racer, prompt_T: Tensor, seed: int) -> dict[str, int]:
    found = working_memory(partial(racer.run, prompt_T, seed), racer.model.trunk.body, prompt_T.device)
    return {
        "working_memory_bytes": found.whole,
        "later_memory_bytes": found.later,
        "between_memory_bytes": found.between,
    }


def _methods(bench: Bench, chosen: dict[str, dict[str, str]]) -> list[Method]:
    trunk, options, horizon = bench.trunk, bench.options, bench.heads[0].horizon
    generate = contenders.hugging_face(trunk)
    assert generate is not None, "the trunk is a next-token model"
    methods = [
        Method(PLAIN, PLAIN, 1, {mode: bench.plain(sampling) for mode, sampling in SAMPLINGS.items()}, _same("none")),
        Method("generate", "generate", 1, _modes(trunk, partial(_theirs, generate, bench)), _same("none"), forwards={}),
    ]
    for width in options.lookup_horizons:
        methods.append(
            Method(
                f"prompt lookup, n={width}",
                "lookup",
                width,
                _modes(trunk, partial(_lookup, bench, width)),
                _same("lookup"),
            )
        )
    for folder in options.assistant:
        if checkpoints.read_config(folder).corpus == bench.config.corpus:
            methods.append(_assistant(bench, folder))
    if options.hydra:
        methods.append(_hydra(bench, options.hydra))
    for heads in _ends(bench.heads):
        chain, picked = _same("chain"), chosen[heads.runs[0].name]
        for drafter in [chain] if picked == chain else [chain, picked]:
            counts = heads.runs[0].model.parameter_counts()
            methods.append(
                Method(
                    f"rank {heads.rank}, {heads.distribution}" + ("" if drafter is chain else ", chosen"),
                    "heads",
                    horizon,
                    {mode: bench.speculative(heads, SAMPLINGS[mode], drafter[mode]) for mode in SAMPLINGS},
                    drafter,
                    parameters=counts["heads"] + counts["gate"] + counts["anchor"],
                    training_seconds=sum(run.seconds for run in heads.runs) / len(heads.runs),
                    label={"rank": heads.rank, "law": heads.distribution, "seeds": heads.label["seeds"]},
                )
            )
    return methods


def _modes(trunk: LanguageModel, make: Callable[[Sampling], Contender]) -> dict[str, Racers]:
    return {mode: [Racer(trunk, make(sampling))] for mode, sampling in SAMPLINGS.items()}


def _same(drafter: str) -> dict[str, str]:
    return dict.fromkeys(SAMPLINGS, drafter)


def _theirs(generate: contenders.Generate, bench: Bench, sampling: Sampling) -> Contender:
    return lambda prompt_T, seed: generate(prompt_T, bench.new_tokens, sampling, seed)


def _lookup(bench: Bench, horizon: int, sampling: Sampling) -> Contender:
    def run(prompt_T: Tensor, seed: int) -> Decoded:
        generator = torch.Generator(prompt_T.device).manual_seed(seed)
        return decode_with_lookup(
            bench.trunk,
            prompt_T,
            bench.new_tokens,
            sampling,
            generator,
            horizon=horizon,
            longest=bench.options.lookup_longest,
        )

    return run


def _hydra(bench: Bench, folder: Path) -> Method:
    """Sequential heads of every seed of ours."""
    loaded = [load_hydra(_hydra_folder(folder, run.config), bench.trunk) for run in bench.heads[0].runs]
    models = [model for model, _ in loaded]
    racers = {
        mode: [Racer(bench.trunk, _sequential(model, bench, sampling)) for model in models]
        for mode, sampling in SAMPLINGS.items()
    }
    return Method(
        f"sequential heads, n={models[0].horizon}",
        "hydra",
        models[0].horizon,
        racers,
        _same("sequential"),
        parameters=loaded[0][1]["parameters"],
        training_seconds=sum(summary["seconds"] for _, summary in loaded) / len(loaded),
    )


def _sequential(model: HydraModel, bench: Bench, sampling: Sampling) -> Contender:
    def run(prompt_T: Tensor, seed: int) -> Decoded:
        generator = torch.Generator(prompt_T.device).manual_seed(seed)
        return decode(model, prompt_T, bench.new_tokens, sampling, generator, draft=Sequential)

    return run


def _hydra_folder(folder: Path, config: Config) -> Path:
    return folder / f"{Path(config.model.trunk).name}-n{config.horizon}-s{config.seed}"


def _assistant(bench: Bench, folder: Path) -> Method:
    """transformers' assisted generation; its passes are counted by a hook, as those of all others."""
    model, trunk = checkpoints.load_model(folder).to(bench.prompts["test"].device), bench.trunk
    if model.vocab_size != trunk.vocab_size or model.horizon != 1:
        raise SystemExit(
            f"{folder} has a vocabulary of {model.vocab_size} and horizon={model.horizon}; an assistant is a next-token model "
            f"(preset=trunk) with the target's vocabulary of {trunk.vocab_size}"
        )
    target, assistant = contenders.as_hugging_face(trunk), contenders.as_hugging_face(model)
    assistant.generation_config.num_assistant_tokens = bench.options.assistant_tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    forwards: dict[int, int] = {}

    def make(sampling: Sampling) -> Contender:
        choice: dict[str, Any] = {"do_sample": False}
        if not sampling.greedy:
            choice = asdict(sampling) | {"do_sample": True}
        settings = GenerationConfig(max_new_tokens=bench.new_tokens, pad_token_id=0, use_cache=True, **choice)

        def run(prompt_T: Tensor, seed: int) -> list[int]:
            devices = [prompt_T.device] if prompt_T.device.type == "cuda" else []
            with count_forwards(trunk) as counter, torch.random.fork_rng(devices), torch.inference_mode():
                torch.manual_seed(seed)
                text_1T = target.generate(
                    prompt_T[None],
                    attention_mask=torch.ones_like(prompt_T[None]),
                    generation_config=settings,
                    assistant_model=assistant,
                )
            forwards[seed] = counter.count
            ids: list[int] = text_1T[0, len(prompt_T) :].tolist()
            return ids

        return run

    summary = json.loads((folder / checkpoints.TRAINED).read_bytes())
    return Method(
        f"assisted, {checkpoints.read_config(folder).size} draft model",
        "assistant",
        bench.options.assistant_tokens + 1,
        _modes(trunk, make),
        _same("assistant"),
        parameters=sum(each.numel() for each in model.parameters()),
        training_seconds=summary["seconds"],
        forwards=forwards,
    )


# --- what is measured ------------------------------------------------------------------------------------------------


def load_heads(folder: Path, names: Sequence[str], seeds: Sequence[int], corpora: Sequence[str]) -> list[list[Heads]]:
    """Per corpus: the named runs; by default all heads of these seeds on the trunk and horizon that most of them share,
    controls (blind, mlp) left out. Sorted by law and rank. Raises SystemExit where they do not go together."""
    folders = [folder / name for name in names] or sorted(
        path.parent for path in folder.glob(f"*/{checkpoints.CONFIG}")
    )
    configs = {
        path: checkpoints.read_config(path) for path in folders if names or (path / checkpoints.WEIGHTS).is_file()
    }
    groups: dict[str, dict[tuple[str, int], list[Path]]] = {}
    for path, config in configs.items():
        wanted = config.seed in seeds and config.anchor != "blind" and not config.model.map_hidden
        if (names or (wanted and config.model.trunk)) and (not corpora or config.corpus in corpora):
            groups.setdefault(config.corpus, {}).setdefault((config.model.trunk, config.horizon), []).append(path)
    missing = sorted(set(corpora) - set(groups))
    if not groups or missing:
        raise SystemExit(
            f"{folder} has no heads of seed {', '.join(map(str, seeds))} on a frozen trunk"
            + (f" for corpus={missing[0]}" if missing else "")
            + "; train some with model.trunk=RUN"
        )
    if names and any(len(found) > 1 or not trunk for found in groups.values() for trunk, _ in found):
        raise SystemExit(f"--cells: {', '.join(names)} are not heads of one horizon on one frozen trunk per corpus")
    return [_families(max(found.values(), key=len), configs) for _, found in sorted(groups.items())]


def _families(folders: Sequence[Path], configs: dict[Path, Config]) -> list[Heads]:
    """Runs that differ by their seed alone are the same heads."""
    families: dict[str, list[Run]] = {}
    for path in sorted(folders, key=lambda path: configs[path].seed):
        seconds = float(json.loads((path / checkpoints.TRAINED).read_bytes())["seconds"])
        run = Run(configs[path], checkpoints.load_model(path), seconds)
        families.setdefault(replace(run.config, seed=0, name="").run_name, []).append(run)
    distributions = {distribution: place for place, distribution in enumerate(LAWS)}
    return sorted(
        map(Heads, families.values()),
        key=lambda each: (distributions.get(each.distribution, len(distributions)), each.rank),
    )


def load_benches(options: argparse.Namespace, say: Callable[[str], None]) -> list[Bench]:
    """One per corpus."""
    return [
        load_bench(heads, options, say)
        for heads in load_heads(options.runs, options.cells, options.seeds, options.corpora)
    ]


def load_bench(heads: list[Heads], options: argparse.Namespace, say: Callable[[str], None]) -> Bench:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = heads[0].runs[0].config
    wanted = {key: getattr(options, key) for key in ("prompts", "prompt_tokens", "new_tokens")}
    config = replace(config, decode=replace(config.decode, **wanted))
    data = TokenDataModule(config, load_corpus(config))
    for each in heads:
        for run in each.runs:
            run.model.to(device)
    trunk = _target(config, device)
    return Bench(
        heads, trunk, {split: data.prompts(split).to(device) for split in ("validation", "test")}, options, say
    )


def head(benches: Sequence[Bench], benchmark: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What every record begins with. timed: how many of the prompts each text was timed on; 0 where none was."""
    options = benches[0].options
    keys = (
        "prompts",
        "timed_prompts",
        "prompt_tokens",
        "new_tokens",
        "nodes",
        "validation_draws",
        "draws",
        "acceptance_draws",
        "baseline_draws",
        "warmups",
        "seeds",
        "assistant_tokens",
        "lookup_longest",
    )
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", "experiments/bench/decode.py", *arguments]),
        **provenance(),
        "settings": {key: getattr(options, key) for key in keys},
        "targets": [
            {
                "trunk": Path(bench.config.model.trunk).name,
                "corpus": bench.config.corpus,
                "size": bench.config.size,
                "horizon": bench.config.horizon,
                "parameters": sum(each.numel() for each in bench.trunk.parameters()),
                "steps": checkpoints.read_config(Path(bench.config.model.trunk)).optim.steps,
                "head_steps": bench.config.optim.steps,
            }
            for bench in benches
        ],
    }


def _target(config: Config, device: torch.device) -> LanguageModel:
    target = checkpoints.load_target(config)
    assert target is not None, "these heads stand on a frozen trunk"
    return target.to(device)


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if options.train_hydra:
        _train_hydra(options, say)
        return 0
    check_writable(options.output)
    benches = load_benches(options, say)
    if options.only in (None, "acceptance"):
        record = head(benches, "decoding acceptance", arguments)
        for part, measure in {"strategies": accepted, "agreement": agreements, "filters": filters}.items():
            record[part] = [row for bench in benches for row in measure(bench)]
        _write(options.output / "decode_acceptance.json", record)
    path = options.output / "decode_strategies.json"
    if options.only in (None, "strategies"):
        record = head(benches, "decoding strategies", arguments)
        record["cells"] = [row for bench in benches for row in strategies(bench)]
        record["suggested"] = suggested(record["cells"])
        _write(path, record)
        print(f"suggested: {record['suggested']}")
    if options.only in (None, "baselines"):
        if not path.is_file():
            raise SystemExit(f"there is no {path} to take the chosen strategies from; leave out --only baselines")
        chosen = {
            cell["names"][0]: {mode: entry["chosen"] for mode, entry in cell["modes"].items()}
            for cell in json.loads(path.read_bytes())["cells"]
        }
        record = head(benches, "decoding baselines", arguments)
        record["methods"] = [row for bench in benches for row in baselines(bench, chosen)]
        _write(options.output / "decode_baselines.json", record)
    return 0


def _write(path: Path, record: dict[str, Any]) -> None:
    write_json(path, record)
    print(f"record: {path}")


def _train_hydra(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for heads in load_heads(options.runs, options.cells, options.seeds, options.corpora):
        for run in heads[0].runs:
            config, folder = run.config, _hydra_folder(options.train_hydra, run.config)

            def progress(step: int, nll: float, config: Config = config, folder: Path = folder) -> None:
                if step % 50 == 0:
                    say(f"{folder.name}: step {step}/{config.optim.steps}: {nll:.3f} nats")

            data = TokenDataModule(config, load_corpus(config))
            train_hydra(_target(config, device), config, data, folder, progress=progress)
            print(f"sequential heads: {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of finished runs")
    add("--cells", nargs="*", default=[], help="names of runs (default: all heads of --seeds on one trunk per corpus)")
    add("--corpora", nargs="*", default=[], help="corpora of the runs (default: all that are there)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="of the heads; the first is that of the draws, too")
    add("--train-hydra", type=Path, help="train sequential heads on the cells' trunks into this folder, and stop")
    add("--hydra", type=Path, help="folder that --train-hydra wrote")
    add(
        "--assistant",
        type=Path,
        nargs="*",
        default=[],
        help="finished next-token runs, one per corpus, that draft for transformers' assisted generation",
    )
    add("--assistant-tokens", type=int, default=3, help="drafts of the assistant per pass")
    add("--lookup-horizons", type=int, nargs="*", default=[4, 8], help="windows of prompt lookup, fixed token included")
    add("--lookup-longest", type=int, default=3, help="longest n-gram that prompt lookup looks for")
    add("--prompts", type=int, default=32, help="of the acceptance")
    add("--timed-prompts", type=int, default=8, help="how many of them are timed")
    add("--prompt-tokens", type=int, default=64)
    add("--new-tokens", type=int, default=64)
    add("--nodes", type=int, default=8, help="drafts of a tree, width of a beam")
    add("--acceptance-draws", type=int, default=3, help="texts per prompt and seed, of the acceptance under sampling")
    add("--draws", type=int, default=2, help="timed texts per prompt and seed of each strategy, test split")
    add("--validation-draws", type=int, default=1, help="and validation split")
    add("--baseline-draws", type=int, default=3, help="timed texts per prompt and seed of the baselines, test split")
    add("--warmups", type=int, default=1)
    add(
        "--only",
        choices=("acceptance", "strategies", "baselines"),
        help="make one record (acceptance is not timed; baselines takes the choice from strategies)",
    )
    add("--output", type=Path, default=ROOT / "results" / "benchmarks")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
