"""What the benchmark of decoding measures of a corpus: finished heads of several seeds, on one frozen trunk.

Letters: P prompts, S seeds, T positions.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpdlm.bench import compare
from cpdlm.bench.compare import Timing
from cpdlm.bench.contenders import Contender, Ours
from cpdlm.bench.intervals import of_ratio
from cpdlm.config import Config, to_dict
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.corpus import load_corpus
from cpdlm.decoding import Decoded, DraftingModel, Options, Sampling, decode
from cpdlm.decoding.drafters import Maker
from cpdlm.model.language_model import LanguageModel
from cpdlm.training import checkpoints
from experiments.bench import record
from experiments.records import VARIANTS, variant_of

SAMPLINGS = {"greedy": Sampling(0.0), "sampling": Sampling()}
Racer = tuple[LanguageModel, Contender]  # whose trunk makes the forwards, and what runs


@dataclass(frozen=True)
class Heads:
    """The same heads trained from each seed. config: of the first seed. seconds: of training."""

    config: Config
    names: list[str]
    seeds: list[int]
    models: list[LanguageModel]
    seconds: list[float]

    @property
    def rank(self) -> int:
        return self.config.rank

    @property
    def variant(self) -> str:
        return variant_of(to_dict(self.config)).partition(",")[0]

    def by_seed(self) -> list[Config]:
        return [replace(self.config, seed=seed, name="") for seed in self.seeds]

    @property
    def label(self) -> dict[str, Any]:
        """What a row of the record says of them."""
        own = {"corpus": self.config.corpus, "law": self.variant, "rank": self.rank, "horizon": self.config.horizon}
        return own | {"names": self.names, "seeds": self.seeds}


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
    def seed(self) -> int:
        """Of draws."""
        return int(self.options.seeds[0])

    def decoder(self, model: DraftingModel, sampling: Sampling, draft: str | Maker, **more: Any) -> Contender:
        """Our decoding, with launched forwards for all alike. more: options of the loop."""
        options = Options(nodes=self.options.nodes, **more)

        def run(prompt_T: Tensor, seed: int) -> Decoded:
            generator = torch.Generator(prompt_T.device).manual_seed(seed)
            return decode(model, prompt_T, self.options.new_tokens, sampling, generator, draft=draft, options=options)

        return run

    def autoregressive(self, sampling: Sampling) -> list[Racer]:
        return [(self.trunk, self.decoder(self.trunk, sampling, "none"))]

    def speculative(self, heads: Heads, sampling: Sampling, draft: str) -> list[Racer]:
        return [(model, self.decoder(model, sampling, draft)) for model in heads.models]

    def race(self, racers: Mapping[str, Sequence[Racer]], split: str, draws: int) -> dict[str, Timing]:
        """Side by side, by the protocol of `compare`. racers: by method, one per seed of its heads.

        The seeds of a method count as more repeats of it."""
        each = {(key, f"{key} {seed}"): racer for key, those in racers.items() for seed, racer in enumerate(those)}
        timings = compare.interleaved(
            {key: run for key, (_, run) in each.items()},
            {name: model for (_, name), (model, _) in each.items()},
            list(self.prompts[split][: self.options.timed_prompts]),
            compare.Protocol(self.options.new_tokens, repeats=draws, warmups=self.options.warmups, seed=self.seed),
            record.say,
        )
        found: dict[str, Timing] = {}
        for (key, _), timing in timings.items():
            found[key] = _both(found[key], timing) if key in found else timing
        return found

    def batch(self, models: Sequence[LanguageModel], sampling: Sampling, draft: str, draws: int) -> list[list[Decoded]]:
        """Per test prompt, every model's draws; all prompts at once, not timed."""
        prompts = list(self.prompts["test"])
        texts = [
            Ours(model, self.options.new_tokens, sampling, draft, self.options.nodes).batch(
                prompts, [compare.run_seed(self.seed, index, draw) for index in range(len(prompts))]
            )
            for model in models
            for draw in range(draws)
        ]
        return [list(prompt) for prompt in zip(*texts, strict=True)]


def _both(one: Timing, other: Timing) -> Timing:
    decoded = [mine + more for mine, more in zip(one.decoded, other.decoded, strict=True)]
    return Timing(
        one.seconds + other.seconds, one.tokens + other.tokens, decoded, forwards=one.forwards + other.forwards
    )


def sums(timing: Timing, seeds: int = 1) -> tuple[Any, Any, Any]:
    """(S, P) tokens, forwards and seconds: of a prompt with all its draws. seeds: that are told apart."""
    parts = (timing.tokens, timing.forwards, timing.seconds)
    tokens_SP, forwards_SP, seconds_SP = (
        np.reshape(part, (seeds, -1, np.shape(part)[-1])).sum(axis=1) for part in parts
    )
    return tokens_SP, forwards_SP, seconds_SP


def speed_ratio(timing: Timing, other: Timing, seeds: int = 1, others: int = 1) -> dict[str, float]:
    """Of tokens per second, paired over prompts and, where both have several, over seeds."""
    (tokens_SP, _, seconds_SP), (base_SP, _, base_seconds_SP) = sums(timing, seeds), sums(other, others)
    return of_ratio(tokens_SP, seconds_SP, base_SP, base_seconds_SP)


def speed_entry(timing: Timing, autoregressive: Timing) -> dict[str, Any]:
    """conversion: the speed-up per token per forward."""
    tokens_SP, forwards_SP, seconds_SP = sums(timing)
    base_SP, _, base_seconds_SP = sums(autoregressive)
    return {
        "tokens_per_second": float(tokens_SP.sum() / seconds_SP.sum()),
        "speedup": speed_ratio(timing, autoregressive),
        "conversion": of_ratio(forwards_SP, seconds_SP, base_SP, base_seconds_SP),
    }


# --- what is there ---------------------------------------------------------------------------------------------------


def load_benches(options: argparse.Namespace) -> list[Bench]:
    """One per corpus."""
    device, benches = record.device(options), []
    wanted = record.chosen(options, ("prompts", "prompt_tokens", "new_tokens"))
    for heads in load_heads(options):
        config = heads[0].config
        config = replace(config, decode=replace(config.decode, **wanted))
        data = TokenDataModule(config, load_corpus(config))
        for model in (model for each in heads for model in each.models):
            model.to(device)
        prompts = {split: data.prompts(split).to(device) for split in ("validation", "test")}
        benches.append(Bench(heads, load_target(config, device), prompts, options))
    return benches


def training_seconds(run: Path) -> float:
    return float(json.loads((run / checkpoints.TRAINED).read_bytes())["seconds"])


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


def load_heads(options: argparse.Namespace) -> list[list[Heads]]:
    """Per corpus: the runs --cells, sorted by variant and rank.

    By default all heads of --seeds on the trunk and horizon that most of them share, without controls (blind, mlp).
    Raises SystemExit where they do not go together.
    """
    folder, names, corpora = options.runs, options.cells, options.corpora
    folders = [folder / name for name in names] or sorted(
        path.parent for path in folder.glob(f"*/{checkpoints.CONFIG}") if (path.parent / checkpoints.WEIGHTS).is_file()
    )
    configs = {path: checkpoints.read_config(path) for path in folders}
    groups: dict[str, dict[tuple[str, int], list[Path]]] = {}
    for path, config in configs.items():
        by_default = config.seed in options.seeds and config.link != "blind" and not config.model.map_hidden
        wanted = names or (by_default and config.model.trunk)
        if wanted and (not corpora or config.corpus in corpora):
            groups.setdefault(config.corpus, {}).setdefault((config.model.trunk, config.horizon), []).append(path)
    missing = sorted(set(corpora) - set(groups))
    if not groups or missing:
        raise SystemExit(
            f"{folder} has no heads of seed {', '.join(map(str, options.seeds))} on a frozen trunk"
            + (f" for corpus={missing[0]}" if missing else "")
            + "; train some with model.trunk=RUN"
        )
    if names and any(len(found) > 1 or not trunk for found in groups.values() for trunk, _ in found):
        raise SystemExit(f"--cells: {', '.join(names)} are not heads of one horizon on one frozen trunk per corpus")
    return [_by_seed(max(found.values(), key=len), configs) for _, found in sorted(groups.items())]


def _by_seed(folders: Sequence[Path], configs: dict[Path, Config]) -> list[Heads]:
    """Runs that differ by their seed alone are the same heads."""
    same: dict[str, list[Path]] = {}
    for path in sorted(folders, key=lambda path: configs[path].seed):
        same.setdefault(replace(configs[path], seed=0, name="").run_name, []).append(path)
    heads = [
        Heads(
            configs[paths[0]],
            [configs[path].run_name for path in paths],
            [configs[path].seed for path in paths],
            [checkpoints.load_model(path) for path in paths],
            [training_seconds(path) for path in paths],
        )
        for paths in same.values()
    ]
    order = {variant: index for index, variant in enumerate(VARIANTS)}
    return sorted(heads, key=lambda each: (order.get(each.variant, len(order)), each.rank))
