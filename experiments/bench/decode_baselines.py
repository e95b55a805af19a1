"""Our heads against other ways to decode the same target: speed, tokens per forward, memory and what training took."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from cpdlm.baselines.hydra import Sequential
from cpdlm.baselines.hydra_training import load_hydra, train_hydra
from cpdlm.bench.acceptance import acceptance
from cpdlm.bench.contenders import as_hugging_face, hugging_face, theirs
from cpdlm.bench.intervals import of_ratio
from cpdlm.bench.memory import working_memory
from cpdlm.config import Config
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.corpus import load_corpus
from cpdlm.decoding.lookup import LookupSettings
from cpdlm.model.build import parameter_counts
from cpdlm.training import checkpoints
from experiments.bench import record
from experiments.bench.decode_drafters import ends
from experiments.bench.decode_heads import (
    SAMPLINGS,
    Bench,
    Heads,
    Racer,
    load_heads,
    load_target,
    speed_entry,
    speed_ratio,
    sums,
    training_seconds,
)
from experiments.bench.record import say
from experiments.report.benchmarks import read_file

LOOKUP_LONGEST = 3  # tokens of an n-gram that prompt lookup looks for
ASSISTANT_TOKENS = 3  # drafts of the assistant per forward

Racers = Callable[[str], list[Racer]]  # by mode
Method = tuple[dict[str, Any], Racers]  # what the record says of it, and what runs


def baselines(bench: Bench) -> list[dict[str, Any]]:
    """Every method in every mode on the test prompts."""
    methods = _methods(bench)
    for mode in SAMPLINGS:
        say(f"baselines, {bench.config.corpus}, {mode}")
        racers = {entry["name"]: racers_of(mode) for entry, racers_of in methods}
        raced = bench.race(racers, "test", bench.options.baseline_draws)
        for entry, _ in methods:
            mine = raced[entry["name"]]
            tokens_SP, forwards_SP, _ = sums(mine)
            counts: dict[str, Any] = {"tokens": int(tokens_SP.sum()), "passes": int(forwards_SP.sum())}
            counts |= {"tokens_per_pass": of_ratio(tokens_SP, forwards_SP)}
            if all(mine.decoded):
                counts = acceptance(mine.decoded, entry["horizon"])
            over = {"speedup_over_generate": speed_ratio(mine, raced["generate"])}
            memory = _memory(racers[entry["name"]][0], bench)
            entry["modes"][mode] = counts | speed_entry(mine, raced["AR"]) | over | memory
    return [entry for entry, _ in methods]


def chosen_drafters(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Name of the first seed's run -> mode -> drafter, of the record decode_strategies. SystemExit without it."""
    found = read_file(options.output / "decode_strategies.json")
    if isinstance(found, str):
        raise SystemExit(f"{found}; the chosen drafters are in it: leave out --only baselines")
    return {
        cell["names"][0]: {mode: entry["chosen"] for mode, entry in cell["modes"].items()} for cell in found["cells"]
    }


def _memory(racer: Racer, bench: Bench) -> dict[str, int]:
    (model, run), prompt_T = racer, bench.prompts["test"][0]
    found = working_memory(partial(run, prompt_T, bench.seed), model.trunk.body, prompt_T.device)
    return {
        "working_memory_bytes": found.whole,
        "later_memory_bytes": found.later,
        "between_memory_bytes": found.between,
    }


def _methods(bench: Bench) -> list[Method]:
    options, trunk, chosen = bench.options, bench.trunk, chosen_drafters(bench.options)
    methods = [
        (_entry(bench, "AR", "AR", 1, _same("none")), lambda mode: bench.autoregressive(SAMPLINGS[mode])),
        (_entry(bench, "generate", "generate", 1, _same("none")), _generate(bench)),
    ]
    for width in options.lookup_horizons:
        lookup = LookupSettings(least=1, longest=LOOKUP_LONGEST, most=width - 1)

        def racers(mode: str, lookup: LookupSettings = lookup) -> list[Racer]:
            return [(trunk, bench.decoder(trunk, SAMPLINGS[mode], "lookup", lookup=lookup))]

        methods.append((_entry(bench, f"prompt lookup, n={width}", "lookup", width, _same("lookup")), racers))
    for folder in options.assistant:
        if checkpoints.read_config(folder).corpus == bench.config.corpus:
            methods.append(_assistant(bench, folder))
    if options.hydra:
        methods.append(_hydra(bench, options.hydra))
    for heads in ends(bench.heads):
        picked = chosen[heads.names[0]]
        methods.append(_ours(bench, heads, _same("chain")))
        if picked != _same("chain"):
            methods.append(_ours(bench, heads, picked, ", chosen"))
    return methods


def _same(drafter: str) -> dict[str, str]:
    return dict.fromkeys(SAMPLINGS, drafter)


def _entry(
    bench: Bench, name: str, kind: str, horizon: int, drafter: dict[str, str], parameters: int = 0, seconds: float = 0.0
) -> dict[str, Any]:
    """What the record says of a method beside its times. drafter: per mode. seconds: of training, of one seed."""
    return {
        "corpus": bench.config.corpus,
        "name": name,
        "kind": kind,
        "horizon": horizon,
        "strategy": drafter,
        "parameters_added": parameters,
        "weights_mib": parameters * bench.trunk.unembedding.weight.element_size() / 2**20,
        "training_seconds": seconds,
        "modes": {},
    }


def _ours(bench: Bench, heads: Heads, drafter: dict[str, str], suffix: str = "") -> Method:
    counts = parameter_counts(heads.models[0])
    added = counts["heads"] + counts["gate"] + counts["anchor"]
    name = f"rank {heads.rank}, {heads.variant}{suffix}"
    entry = _entry(bench, name, "heads", heads.config.horizon, drafter, added, fmean(heads.seconds))
    label = {"rank": heads.rank, "law": heads.variant, "seeds": heads.seeds}
    return entry | label, lambda mode: bench.speculative(heads, SAMPLINGS[mode], drafter[mode])


def _generate(bench: Bench, **more: Any) -> Racers:
    """Hugging Face's generate on the target. more: arguments of its generate."""
    generate = hugging_face(bench.trunk, **more)
    assert generate is not None, "the trunk is a next-token model"
    return lambda mode: [(bench.trunk, theirs(generate, bench.options.new_tokens, SAMPLINGS[mode]))]


def _assistant(bench: Bench, folder: Path) -> Method:
    """transformers' assisted generation."""
    model, trunk = checkpoints.load_model(folder), bench.trunk
    if model.vocab_size != trunk.vocab_size or model.horizon != 1:
        raise SystemExit(
            f"{folder} has a vocabulary of {model.vocab_size} and horizon={model.horizon}; an assistant is a "
            f"next-token model (preset=trunk) with the target's vocabulary of {trunk.vocab_size}"
        )
    assistant = as_hugging_face(model.to(bench.prompts["test"].device))
    assistant.generation_config.num_assistant_tokens = ASSISTANT_TOKENS
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    name, drafter = f"assisted, {checkpoints.read_config(folder).size} draft model", _same("assistant")
    parameters = sum(each.numel() for each in model.parameters())
    entry = _entry(bench, name, "assistant", ASSISTANT_TOKENS + 1, drafter, parameters, training_seconds(folder))
    return entry, _generate(bench, assistant_model=assistant)


def _hydra(bench: Bench, folder: Path) -> Method:
    """Sequential heads of every seed of ours."""
    heads = bench.heads[0]
    loaded = [load_hydra(_hydra_folder(folder, config), bench.trunk) for config in heads.by_seed()]
    (first, summary), seconds = loaded[0], fmean(each["seconds"] for _, each in loaded)
    name, drafter = f"sequential heads, n={first.horizon}", _same("sequential")
    entry = _entry(bench, name, "hydra", first.horizon, drafter, summary["parameters"], seconds)
    return entry, lambda mode: [(bench.trunk, bench.decoder(model, SAMPLINGS[mode], Sequential)) for model, _ in loaded]


def _hydra_folder(folder: Path, config: Config) -> Path:
    return folder / f"{Path(config.model.trunk).name}-n{config.horizon}-s{config.seed}"


def train_sequential_heads(options: argparse.Namespace) -> None:
    """Of every corpus and seed, into the folder --train-hydra."""
    device = record.device(options)
    for heads, *_ in load_heads(options):
        for config in heads.by_seed():
            folder = _hydra_folder(options.train_hydra, config)

            def progress(step: int, nll: float, config: Config = config, folder: Path = folder) -> None:
                if step % 50 == 0:
                    say(f"{folder.name}: step {step}/{config.optim.steps}: {nll:.3f} nats")

            data = TokenDataModule(config, load_corpus(config))
            train_hydra(load_target(config, device), config, data, folder, progress)
            say(f"sequential heads: {folder}")
