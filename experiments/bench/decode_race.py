"""How the benchmark of decoding measures: contenders of one corpus side by side, over seeds, draws and prompts.

Letters: P prompts, T positions.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpdlm.bench import compare
from cpdlm.bench.contenders import Contender
from cpdlm.bench.intervals import (
    Written,
    by_seed,
    interval,
    speedup,
    speedup_per_token_per_forward,
    tokens_per_forward,
    tokens_per_second,
)
from cpdlm.config import Config
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.corpus import load_corpus
from cpdlm.decoding import Decoded, DraftingModel, Options, Sampling, decode, decode_batch
from cpdlm.decoding.drafters import Maker
from cpdlm.model.language_model import LanguageModel
from cpdlm.training import checkpoints
from experiments.bench import record
from experiments.bench.decode_heads import Heads, load_heads
from experiments.bench.record import say

SAMPLINGS = {"greedy": Sampling(0.0), "sampling": Sampling()}
AUTOREGRESSIVE = "AR"


@dataclass(frozen=True)
class Racer:
    """What runs, and the model whose trunk makes its forwards."""

    model: LanguageModel
    run: Contender


@dataclass(frozen=True)
class Raced:
    """Timings of one method, one per seed of its heads."""

    timings: list[compare.Timing]

    @cached_property
    def written(self) -> Written:
        return Written.of(*([getattr(t, key) for t in self.timings] for key in ("tokens", "forwards", "seconds")))

    @property
    def decoded(self) -> list[list[Decoded]]:
        """Per prompt, every seed's draws; empty ones of a method that tells no acceptance."""
        return pooled([timing.decoded for timing in self.timings])


@dataclass(frozen=True)
class Bench:
    """What everything of one corpus is measured with: heads on one trunk, prompts by split (P, T), options."""

    heads: list[Heads]
    trunk: LanguageModel
    prompts: dict[str, Tensor]
    options: argparse.Namespace

    @property
    def config(self) -> Config:
        return self.heads[0].config

    @property
    def new_tokens(self) -> int:
        return int(self.options.new_tokens)

    @property
    def seed(self) -> int:
        """Of draws."""
        return int(self.options.seeds[0])

    def decoder(self, model: DraftingModel, sampling: Sampling, draft: str | Maker) -> Contender:
        """Our decoding, with launched forwards for all alike."""

        def run(prompt_T: Tensor, seed: int) -> Decoded:
            generator = torch.Generator(prompt_T.device).manual_seed(seed)
            options = Options(nodes=self.options.nodes)
            return decode(model, prompt_T, self.new_tokens, sampling, generator, draft=draft, options=options)

        return run

    def autoregressive(self, sampling: Sampling) -> list[Racer]:
        return [Racer(self.trunk, self.decoder(self.trunk, sampling, "none"))]

    def speculative(self, heads: Heads, sampling: Sampling, draft: str) -> list[Racer]:
        return [Racer(run.model, self.decoder(run.model, sampling, draft)) for run in heads.runs]

    def race(self, racers: Mapping[str, Sequence[Racer]], split: str, draws: int) -> dict[str, Raced]:
        """Side by side, by the protocol of `compare`. racers: by method, one per seed of its heads."""
        each = {(key, f"{key} {seed}"): racer for key, those in racers.items() for seed, racer in enumerate(those)}
        timings = compare.interleaved(
            {key: racer.run for key, racer in each.items()},
            {name: racer.model for (_, name), racer in each.items()},
            list(self.prompts[split][: self.options.timed_prompts]),
            compare.Protocol(self.new_tokens, repeats=draws, warmups=self.options.warmups, seed=self.seed),
            say,
        )
        return {key: Raced([timings[found] for found in each if found[0] == key]) for key in racers}

    def batch(self, model: LanguageModel, sampling: Sampling, draft: str, draws: int) -> list[list[Decoded]]:
        """Per test prompt, its draws; all prompts at once, not timed."""
        prompts_PT, found = self.prompts["test"], []
        for draw in range(draws):
            generators = [
                torch.Generator(prompts_PT.device).manual_seed(compare.run_seed(self.seed, index, draw))
                for index in range(len(prompts_PT))
            ]
            options, prompts = Options(nodes=self.options.nodes), list(prompts_PT)
            found.append(
                decode_batch(model, prompts, self.new_tokens, sampling, generators, draft=draft, options=options)
            )
        return [list(prompt) for prompt in zip(*found, strict=True)]


def pooled(by_seed: Sequence[Sequence[Sequence[Decoded]]]) -> list[list[Decoded]]:
    """Per prompt, the draws of all seeds, from [seed][prompt][draw]."""
    return [[one for draws in prompt for one in draws] for prompt in zip(*by_seed, strict=True)]


def rate_entry(written: Written) -> dict[str, Any]:
    return {
        "tokens_per_pass": interval(tokens_per_forward, written),
        "by_seed": by_seed(tokens_per_forward, written),
    }


def speed_entry(written: Written, autoregressive: Written) -> dict[str, Any]:
    return {
        "tokens_per_second": interval(tokens_per_second, written)["mean"],
        "speedup": interval(speedup, written, autoregressive),
        "conversion": interval(speedup_per_token_per_forward, written, autoregressive),
    }


def load_benches(options: argparse.Namespace) -> list[Bench]:
    """One per corpus."""
    device = record.device(options)
    found = load_heads(options.runs, options.cells, options.seeds, options.corpora)
    return [_load(heads, options, device) for heads in found]


def _load(heads: list[Heads], options: argparse.Namespace, device: torch.device) -> Bench:
    config = heads[0].config
    wanted = record.chosen(options, ("prompts", "prompt_tokens", "new_tokens"))
    config = replace(config, decode=replace(config.decode, **wanted))
    data = TokenDataModule(config, load_corpus(config))
    for each in heads:
        for run in each.runs:
            run.model.to(device)
    prompts = {split: data.prompts(split).to(device) for split in ("validation", "test")}
    return Bench(heads, load_target(config, device), prompts, options)


def load_target(config: Config, device: torch.device) -> LanguageModel:
    target = checkpoints.load_target(config)
    assert target is not None, "these heads stand on a frozen trunk"
    return target.to(device)


def target_entry(bench: Bench) -> dict[str, Any]:
    """What the record says of a corpus's target."""
    config, trunk = bench.config, Path(bench.config.model.trunk)
    return {
        "trunk": trunk.name,
        "corpus": config.corpus,
        "size": config.size,
        "horizon": config.horizon,
        "parameters": sum(each.numel() for each in bench.trunk.parameters()),
        "steps": checkpoints.read_config(trunk).optim.steps,
        "head_steps": config.optim.steps,
    }
