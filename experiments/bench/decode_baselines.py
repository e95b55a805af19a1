"""Our heads against other ways to decode the same target: speed, tokens per forward, memory and what training took."""

import argparse
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpdlm.baselines.hydra import Sequential
from cpdlm.baselines.hydra_training import load_hydra, train_hydra
from cpdlm.bench.acceptance import acceptance
from cpdlm.bench.contenders import as_hugging_face, hugging_face, theirs
from cpdlm.bench.intervals import interval, speedup
from cpdlm.bench.memory import working_memory
from cpdlm.config import Config
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.corpus import load_corpus
from cpdlm.decoding import Decoded, Options, Sampling, decode
from cpdlm.decoding.lookup import LookupSettings
from cpdlm.model.build import parameter_counts
from cpdlm.training import checkpoints
from experiments.bench import record
from experiments.bench.decode_drafters import ends
from experiments.bench.decode_heads import Heads, load_heads
from experiments.bench.decode_race import (
    AUTOREGRESSIVE,
    SAMPLINGS,
    Bench,
    Contender,
    Racer,
    load_target,
    rate_entry,
    speed_entry,
)
from experiments.bench.record import say


@dataclass(frozen=True)
class Method:
    """One line of the comparison. racers, drafter: per mode.

    kind: plain, generate, lookup, assistant, hydra or heads. training_seconds: of one seed. label: more of the line.
    """

    name: str
    kind: str
    horizon: int
    racers: dict[str, list[Racer]]
    drafter: dict[str, str]
    parameters: int = 0
    training_seconds: float = 0.0
    label: dict[str, Any] = field(default_factory=dict)


def baselines(bench: Bench, chosen: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """Every method in every mode on the test prompts. chosen: name of the first seed's run -> mode -> drafter."""
    methods, seed = _methods(bench, chosen), bench.seed
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
        say(f"baselines, {bench.config.corpus}, {mode}")
        raced = bench.race(
            {method.name: method.racers[mode] for method in methods}, "test", bench.options.baseline_draws
        )
        base, generate = (raced[name].written for name in (AUTOREGRESSIVE, "generate"))
        for entry, method in zip(entries, methods, strict=True):
            mine = raced[method.name]
            one: dict[str, Any] = {
                "tokens": int(mine.written.tokens_HDP.sum()),
                "passes": int(mine.written.forwards_HDP.sum()),
            }
            if all(mine.decoded):
                one |= acceptance(mine.decoded, method.horizon)
            one |= rate_entry(mine.written) | speed_entry(mine.written, base)
            one["speedup_over_generate"] = interval(speedup, mine.written, generate)
            entry["modes"][mode] = one | _memory(method.racers[mode][0], bench.prompts["test"][0], seed)
    return entries


def _memory(racer: Racer, prompt_T: Tensor, seed: int) -> dict[str, int]:
    found = working_memory(partial(racer.run, prompt_T, seed), racer.model.trunk.body, prompt_T.device)
    return {
        "working_memory_bytes": found.whole,
        "later_memory_bytes": found.later,
        "between_memory_bytes": found.between,
    }


def _methods(bench: Bench, chosen: dict[str, dict[str, str]]) -> list[Method]:
    options = bench.options
    autoregressive = {mode: bench.autoregressive(sampling) for mode, sampling in SAMPLINGS.items()}
    methods = [
        Method(AUTOREGRESSIVE, AUTOREGRESSIVE, 1, autoregressive, _same("none")),
        Method("generate", "generate", 1, _generate(bench), _same("none")),
    ]
    for width in options.lookup_horizons:
        racers = {mode: [Racer(bench.trunk, _lookup(bench, width, one))] for mode, one in SAMPLINGS.items()}
        methods.append(Method(f"prompt lookup, n={width}", "lookup", width, racers, _same("lookup")))
    for folder in options.assistant:
        if checkpoints.read_config(folder).corpus == bench.config.corpus:
            methods.append(_assistant(bench, folder))
    if options.hydra:
        methods.append(_hydra(bench, options.hydra))
    for heads in ends(bench.heads):
        picked = chosen[heads.config.run_name]
        methods.append(_ours(bench, heads, _same("chain")))
        if picked != _same("chain"):
            methods.append(_ours(bench, heads, picked, ", chosen"))
    return methods


def _same(drafter: str) -> dict[str, str]:
    return dict.fromkeys(SAMPLINGS, drafter)


def _ours(bench: Bench, heads: Heads, drafter: dict[str, str], suffix: str = "") -> Method:
    counts = parameter_counts(heads.runs[0].model)
    return Method(
        f"rank {heads.rank}, {heads.variant}{suffix}",
        "heads",
        heads.horizon,
        {mode: bench.speculative(heads, SAMPLINGS[mode], drafter[mode]) for mode in SAMPLINGS},
        drafter,
        counts["heads"] + counts["gate"] + counts["anchor"],
        sum(run.seconds for run in heads.runs) / len(heads.runs),
        {"rank": heads.rank, "law": heads.variant, "seeds": heads.seeds},
    )


def _generate(bench: Bench, **more: Any) -> dict[str, list[Racer]]:
    """Hugging Face's generate on the target, per mode. more: arguments of its generate."""
    generate = hugging_face(bench.trunk, **more)
    assert generate is not None, "the trunk is a next-token model"
    return {mode: [Racer(bench.trunk, theirs(generate, bench.new_tokens, one))] for mode, one in SAMPLINGS.items()}


def _lookup(bench: Bench, horizon: int, sampling: Sampling) -> Contender:
    lookup = LookupSettings(least=1, longest=bench.options.lookup_longest, most=horizon - 1)

    def run(prompt_T: Tensor, seed: int) -> Decoded:
        generator = torch.Generator(prompt_T.device).manual_seed(seed)
        return decode(
            bench.trunk, prompt_T, bench.new_tokens, sampling, generator, draft="lookup", options=Options(lookup=lookup)
        )

    return run


def _assistant(bench: Bench, folder: Path) -> Method:
    """transformers' assisted generation."""
    model, trunk, tokens = checkpoints.load_model(folder), bench.trunk, bench.options.assistant_tokens
    if model.vocab_size != trunk.vocab_size or model.horizon != 1:
        raise SystemExit(
            f"{folder} has a vocabulary of {model.vocab_size} and horizon={model.horizon}; an assistant is a "
            f"next-token model (preset=trunk) with the target's vocabulary of {trunk.vocab_size}"
        )
    assistant = as_hugging_face(model.to(bench.prompts["test"].device))
    assistant.generation_config.num_assistant_tokens = tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    return Method(
        f"assisted, {checkpoints.read_config(folder).size} draft model",
        "assistant",
        tokens + 1,
        _generate(bench, assistant_model=assistant),
        _same("assistant"),
        sum(each.numel() for each in model.parameters()),
        json.loads((folder / checkpoints.TRAINED).read_bytes())["seconds"],
    )


def _hydra(bench: Bench, folder: Path) -> Method:
    """Sequential heads of every seed of ours."""
    loaded = [load_hydra(_hydra_folder(folder, run.config), bench.trunk) for run in bench.heads[0].runs]
    racers = {
        mode: [Racer(bench.trunk, bench.decoder(model, sampling, Sequential)) for model, _ in loaded]
        for mode, sampling in SAMPLINGS.items()
    }
    horizon, seconds = loaded[0][0].horizon, sum(summary["seconds"] for _, summary in loaded) / len(loaded)
    name, parameters = f"sequential heads, n={horizon}", loaded[0][1]["parameters"]
    return Method(name, "hydra", horizon, racers, _same("sequential"), parameters, seconds)


def _hydra_folder(folder: Path, config: Config) -> Path:
    return folder / f"{Path(config.model.trunk).name}-n{config.horizon}-s{config.seed}"


def train_sequential_heads(options: argparse.Namespace) -> None:
    """Of every corpus and seed, into the folder --train-hydra."""
    device = record.device(options)
    for heads in load_heads(options.runs, options.cells, options.seeds, options.corpora):
        for run in heads[0].runs:
            config, folder = run.config, _hydra_folder(options.train_hydra, run.config)

            def progress(step: int, nll: float, config: Config = config, folder: Path = folder) -> None:
                if step % 50 == 0:
                    say(f"{folder.name}: step {step}/{config.optim.steps}: {nll:.3f} nats")

            data = TokenDataModule(config, load_corpus(config))
            train_hydra(load_target(config, device), config, data, folder, progress=progress)
            say(f"sequential heads: {folder}")
