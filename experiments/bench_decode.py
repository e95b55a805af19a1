"""Ways to draft, measured side by side: strategies for every rank and law, filters, and the baselines; two records.

    python experiments/bench_decode.py --runs runs/cpu-full --train-hydra runs/hydra        # once, a minute
    python experiments/bench_decode.py --runs runs/cpu-full --hydra runs/hydra --assistant runs/ASSISTANT

All methods share one frozen trunk, hence one target, the prompts, the loop and the protocol of `cpdlm.evaluation.latency`.
A strategy is chosen on prompts of the validation split and reported on those of the test split.

decode_strategies.json   cells x strategies, greedy and sampling; agreement with the target per depth; temperatures and top-p
decode_baselines.json    plain decoding, generate, prompt lookup, assisted generation, sequential heads, ours
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from cpdlm.config import Config
from cpdlm.data.corpus import load_corpus
from cpdlm.data.datamodule import TokenDataModule
from cpdlm.decoding import Decoded, Sampling, decode, decode_batch
from cpdlm.decoding.lookup import decode_with_lookup
from cpdlm.decoding.sequential import Sequential
from cpdlm.evaluation import latency
from cpdlm.evaluation.agreement import agreement
from cpdlm.evaluation.drafting import RESAMPLES, acceptance, bootstrap_ratio
from cpdlm.files import check_writable, write_json
from cpdlm.model.hydra import HydraModel
from cpdlm.model.language_model import LanguageModel
from cpdlm.report import results
from cpdlm.training import storage
from cpdlm.training.hydra import load_hydra, train_hydra

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = {"greedy": ("chain", "tree", "window", "path"), "sampling": ("chain", "block", "tree", "window", "path")}
SAMPLINGS = {"greedy": Sampling(0.0), "sampling": Sampling()}
TEMPERATURES, TOP_P = (0.5, 0.8, 1.0, 1.2), (0.8, 0.95, 1.0)  # temperature 0 has no top-p
PLAIN = ("none", "")
Contender = Callable[[Tensor, int], Decoded | list[int]]
Timings = dict[tuple[str, str], latency.Timing]


@dataclass(frozen=True)
class Cell:
    """A finished run of heads."""

    config: Config
    model: LanguageModel
    seconds: float  # of training

    @property
    def name(self) -> str:
        return self.config.run_name

    @property
    def law(self) -> str:
        if self.config.anchor != "none":
            return "anchored" if self.config.anchor == "token" else self.config.anchor
        return "tied" if self.config.model.tie_first else "untied"

    @property
    def label(self) -> dict[str, Any]:
        return {"name": self.name, "rank": self.config.rank, "law": self.law, "horizon": self.config.horizon}


@dataclass(frozen=True)
class Bench:
    """What everything is measured with: cells on one trunk, prompts, settings."""

    cells: list[Cell]
    trunk: LanguageModel
    prompts: dict[str, Tensor]  # split -> (P, T) ids
    options: argparse.Namespace
    say: Callable[[str], None]

    @property
    def new_tokens(self) -> int:
        return int(self.options.new_tokens)

    def ours(self, model: LanguageModel, sampling: Sampling, strategy: str) -> Contender:
        def run(prompt_T: Tensor, seed: int) -> Decoded:
            generator = torch.Generator(prompt_T.device).manual_seed(seed)
            return decode(
                model, prompt_T, self.new_tokens, sampling, generator, draft=strategy, nodes=self.options.nodes
            )

        return run

    def race(self, contenders: dict[tuple[str, str], Contender], split: str, repeats: int) -> Timings:
        """Side by side, `latency`'s protocol. Keys: (method, name of the cell whose trunk runs, or "" for the bare trunk)."""
        models = {"": self.trunk} | {cell.name: cell.model for cell in self.cells}
        return latency.interleaved(
            contenders, models, self.prompts[split], repeats, self.options.warmups, self.options.seed, self.say
        )


# --- strategies ------------------------------------------------------------------------------------------------------


def strategies(bench: Bench) -> dict[str, Any]:
    """cells: per cell and mode, each strategy on both splits and the one chosen; suggested: per mode, over all cells."""
    found: dict[str, dict[str, Any]] = {
        cell.name: cell.label | {"modes": {mode: {} for mode in STRATEGIES}} for cell in bench.cells
    }
    gains: dict[str, dict[str, list[float]]] = {}
    for mode, names in STRATEGIES.items():
        sampling = SAMPLINGS[mode]
        contenders = {PLAIN: bench.ours(bench.trunk, sampling, "none")} | {
            (strategy, cell.name): bench.ours(cell.model, sampling, strategy)
            for cell in bench.cells
            for strategy in _distinct(names, cell)
        }
        for split, repeats in (("validation", bench.options.validation_repeats), ("test", bench.options.repeats)):
            bench.say(f"strategies, {mode}, {split}")
            timings = bench.race(contenders, split, repeats)
            for cell in bench.cells:
                modes = found[cell.name]["modes"][mode]
                for strategy in _distinct(names, cell):
                    modes.setdefault(strategy, {})[split] = _measured(
                        timings[strategy, cell.name], timings["chain", cell.name], timings[PLAIN], cell, bench
                    )
        for cell in bench.cells:
            modes = found[cell.name]["modes"][mode]
            speeds = {strategy: modes[strategy]["validation"]["speedup"]["median"] for strategy in modes}
            modes["chosen"] = max(speeds, key=lambda strategy: speeds[strategy])
            for strategy, speed in speeds.items():
                gains.setdefault(mode, {}).setdefault(strategy, []).append(math.log(speed / speeds["chain"]))
    suggested = {mode: max(gain, key=lambda strategy: sum(gain[strategy])) for mode, gain in gains.items()}
    return {"cells": list(found.values()), "suggested": suggested}


def _distinct(names: Sequence[str], cell: Cell) -> list[str]:
    """Without those that draft what the chain drafts: of independent positions the likeliest window is the argmaxes."""
    return [name for name in names if cell.config.rank > 1 or name not in ("window", "path")]


def _measured(
    timing: latency.Timing, chain: latency.Timing, plain: latency.Timing, cell: Cell, bench: Bench
) -> dict[str, Any]:
    seed = bench.options.seed
    statistics = acceptance(timing.decoded, cell.config.horizon, seed)
    base = acceptance(chain.decoded, cell.config.horizon, seed)
    return statistics | _speed(timing, plain, statistics, seed) | {
        "tokens_per_pass_over_chain": paired_difference(statistics["per_prompt"], base["per_prompt"], seed),
        "speed_over_chain": latency.rate_ratio(timing, chain, seed),
    }  # fmt: skip


def _speed(timing: latency.Timing, plain: latency.Timing, statistics: dict[str, Any], seed: int) -> dict[str, Any]:
    """conversion_interval: of passes per second over plain decoding's, prompts resampled, repeats summed."""
    speedup = latency.rate_ratio(timing, plain, seed)
    seconds, base = (np.sum(each.seconds, axis=0) for each in (timing, plain))
    passes, tokens = np.asarray(statistics["per_prompt"]["passes"], dtype=float), np.sum(plain.tokens, axis=0)
    picks = np.random.default_rng(seed).integers(0, len(passes), (RESAMPLES, len(passes)))
    one, other = (
        passes[picks].sum(axis=1) / seconds[picks].sum(axis=1),
        tokens[picks].sum(axis=1) / base[picks].sum(axis=1),
    )
    return {
        "tokens_per_second": float(np.median(timing.rates())),
        "speedup": speedup,
        "conversion": speedup["median"] / statistics["tokens_per_pass"]["mean"],
        "conversion_interval": np.percentile(one / other, [2.5, 97.5]).tolist(),
    }


def paired_difference(one: dict[str, list[int]], other: dict[str, list[int]], seed: int) -> dict[str, float]:
    """{"mean", "low", "high"} of tokens per pass, one minus other: 95 % percentile interval, prompts resampled together."""
    picks = np.random.default_rng(seed).integers(0, len(one["tokens"]), (RESAMPLES, len(one["tokens"])))
    means, draws = [], []
    for each in (one, other):
        tokens, passes = (np.asarray(each[key], dtype=float) for key in ("tokens", "passes"))
        means.append(tokens.sum() / passes.sum())
        draws.append(tokens[picks].sum(axis=1) / passes[picks].sum(axis=1))
    low, high = np.percentile(draws[0] - draws[1], [2.5, 97.5])
    return {"mean": float(means[0] - means[1]), "low": float(low), "high": float(high)}


def agreements(bench: Bench) -> list[dict[str, Any]]:
    """Per cell and mode: `agreement` on the target's own continuations of the test prompts."""
    prompts_PT = bench.prompts["test"]
    found: list[dict[str, Any]] = [cell.label | {"modes": {}} for cell in bench.cells]
    for mode, sampling in SAMPLINGS.items():
        written = _batch(bench.trunk, prompts_PT, sampling, "none", bench)
        texts_PT = torch.cat(
            [prompts_PT, torch.tensor([one.tokens for one in written], device=prompts_PT.device)], dim=1
        )
        for entry, cell in zip(found, bench.cells, strict=True):
            bench.say(f"agreement, {mode}, {cell.name}")
            entry["modes"][mode] = agreement(cell.model, texts_PT, prompts_PT.shape[1], bench.options.nodes)
    return found


def filters(bench: Bench, suggested: dict[str, str]) -> list[dict[str, Any]]:
    """Acceptance under each temperature and top-p on the test prompts: chain and the suggested strategy, lowest and highest
    rank of each law. Not timed."""
    settings = [Sampling(0.0), *(Sampling(temperature, 0, p) for temperature in TEMPERATURES for p in TOP_P)]
    rows = []
    for cell in _ends(bench.cells):
        bench.say(f"filters, {cell.name}")
        for sampling in settings:
            for strategy in dict.fromkeys(("chain", suggested["greedy" if sampling.greedy else "sampling"])):
                decoded = [[one] for one in _batch(cell.model, bench.prompts["test"], sampling, strategy, bench)]
                rows.append(
                    cell.label
                    | {"temperature": sampling.temperature, "top_p": sampling.top_p, "strategy": strategy}
                    | acceptance(decoded, cell.config.horizon, bench.options.seed)
                )
    return rows


def _batch(model: LanguageModel, prompts_PT: Tensor, sampling: Sampling, strategy: str, bench: Bench) -> list[Decoded]:
    generators = [
        torch.Generator(prompts_PT.device).manual_seed(latency.run_seed(bench.options.seed, index, 0))
        for index in range(len(prompts_PT))
    ]
    return decode_batch(
        model, list(prompts_PT), bench.new_tokens, sampling, generators, draft=strategy, nodes=bench.options.nodes
    )


def _ends(cells: Sequence[Cell]) -> list[Cell]:
    """Untied and anchored: the lowest and the highest rank."""
    ends: list[Cell] = []
    for law in ("untied", "anchored"):
        ranked = sorted((cell for cell in cells if cell.law == law), key=lambda cell: cell.config.rank)
        ends += [ranked[0], ranked[-1]][: len(ranked)]
    return ends


# --- baselines -------------------------------------------------------------------------------------------------------


@dataclass
class Method:
    """One line of the comparison. run, strategy: per mode. passes: by seed of the text, of a method that does not tell them."""

    name: str
    kind: str  # plain | generate | lookup | assistant | hydra | heads
    horizon: int
    run: dict[str, Contender]
    strategy: dict[str, str]
    subject: str = ""
    parameters: int = 0
    training_seconds: float = 0.0
    label: dict[str, Any] = field(default_factory=dict)
    passes: dict[int, int] = field(default_factory=dict)


def baselines(bench: Bench, chosen: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Every method in every mode on the test prompts. chosen: cell name -> mode -> strategy."""
    methods = _methods(bench, chosen)
    mib = bench.trunk.unembedding.weight.element_size() / 2**20
    entries: list[dict[str, Any]] = [
        {
            "name": method.name, "kind": method.kind, "horizon": method.horizon, "strategy": method.strategy,
            "parameters_added": method.parameters, "weights_mib": method.parameters * mib,
            "training_seconds": method.training_seconds, "modes": {},
        } | method.label
        for method in methods
    ]  # fmt: skip
    for mode in SAMPLINGS:
        bench.say(f"baselines, {mode}")
        contenders = {(method.name, method.subject): method.run[mode] for method in methods}
        for method in methods:
            method.passes.clear()
        timings = bench.race(contenders, "test", bench.options.baseline_repeats)
        by_kind = {method.kind: timings[method.name, method.subject] for method in methods}
        for entry, method in zip(entries, methods, strict=True):
            timing = timings[method.name, method.subject]
            statistics = _statistics(timing, method, bench)
            entry["modes"][mode] = statistics | _speed(timing, by_kind["plain"], statistics, bench.options.seed) | {
                "speedup_over_generate": latency.rate_ratio(timing, by_kind["generate"], bench.options.seed),
                "peak_memory_bytes": _peak_bytes(method.run[mode], bench),
            }  # fmt: skip
    return {"methods": entries, "target_parameters": sum(each.numel() for each in bench.trunk.parameters())}


def _methods(bench: Bench, chosen: dict[str, dict[str, str]]) -> list[Method]:
    trunk, options, horizon = bench.trunk, bench.options, bench.cells[0].config.horizon
    generate = latency.hugging_face(trunk)
    assert generate is not None, "the trunk is a next-token model"
    methods = [
        Method("plain", "plain", 1, _modes(lambda s: bench.ours(trunk, s, "none")), _same("none")),
        Method("generate", "generate", 1, _modes(partial(_theirs, generate, bench)), _same("none")),
    ]
    for width in options.lookup_horizons:
        methods.append(
            Method(
                f"prompt lookup, n={width}", "lookup", width, _modes(partial(_lookup, bench, width)),
                _same("lookup"),
            )
        )  # fmt: skip
    if options.assistant:
        methods.append(_assistant(bench, options.assistant))
    if options.hydra:
        model, summary = load_hydra(options.hydra, trunk)
        methods.append(
            Method(
                f"sequential heads, n={model.horizon}", "hydra", model.horizon,
                _modes(partial(_sequential, model, bench)), _same("sequential"), parameters=summary["parameters"],
                training_seconds=summary["seconds"],
            )
        )  # fmt: skip
    for cell in _ends(bench.cells):
        chain, picked = _same("chain"), chosen[cell.name]
        for strategy in [chain] if picked == chain else [chain, picked]:
            counts = cell.model.parameter_counts()
            methods.append(
                Method(
                    f"rank {cell.config.rank}, {cell.law}" + ("" if strategy is chain else ", chosen"), "heads", horizon,
                    {mode: bench.ours(cell.model, SAMPLINGS[mode], strategy[mode]) for mode in SAMPLINGS}, strategy,
                    subject=cell.name, parameters=counts["heads"] + counts["gate"] + counts["anchor"],
                    training_seconds=cell.seconds, label={"rank": cell.config.rank, "law": cell.law},
                )
            )  # fmt: skip
    return methods


def _modes(make: Callable[[Sampling], Contender]) -> dict[str, Contender]:
    return {mode: make(sampling) for mode, sampling in SAMPLINGS.items()}


def _same(strategy: str) -> dict[str, str]:
    return dict.fromkeys(SAMPLINGS, strategy)


def _theirs(generate: latency.Generate, bench: Bench, sampling: Sampling) -> Contender:
    return lambda prompt_T, seed: generate(prompt_T, bench.new_tokens, sampling, seed)


def _lookup(bench: Bench, horizon: int, sampling: Sampling) -> Contender:
    def run(prompt_T: Tensor, seed: int) -> Decoded:
        generator = torch.Generator(prompt_T.device).manual_seed(seed)
        return decode_with_lookup(
            bench.trunk, prompt_T, bench.new_tokens, sampling, generator, horizon=horizon,
            longest=bench.options.lookup_longest,
        )  # fmt: skip

    return run


def _sequential(model: HydraModel, bench: Bench, sampling: Sampling) -> Contender:
    def run(prompt_T: Tensor, seed: int) -> Decoded:
        generator = torch.Generator(prompt_T.device).manual_seed(seed)
        return decode(model, prompt_T, bench.new_tokens, sampling, generator, draft=Sequential)

    return run


def _assistant(bench: Bench, folder: Path) -> Method:
    """transformers' assisted generation; its passes are counted by a hook, as those of all others."""
    model, trunk = storage.load_model(folder).to(bench.prompts["test"].device), bench.trunk
    if model.vocab_size != trunk.vocab_size or model.horizon != 1:
        raise SystemExit(
            f"{folder} has a vocabulary of {model.vocab_size} and horizon={model.horizon}; an assistant is a next-token model "
            f"(preset=trunk) with the target's vocabulary of {trunk.vocab_size}"
        )
    target, assistant = latency.as_hugging_face(trunk), latency.as_hugging_face(model)
    assistant.generation_config.num_assistant_tokens = bench.options.assistant_tokens
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    passes: dict[int, int] = {}

    def make(sampling: Sampling) -> Contender:
        choice: dict[str, Any] = {"do_sample": False}
        if not sampling.greedy:
            choice = asdict(sampling) | {"do_sample": True}
        settings = GenerationConfig(max_new_tokens=bench.new_tokens, pad_token_id=0, use_cache=True, **choice)

        def run(prompt_T: Tensor, seed: int) -> list[int]:
            devices = [prompt_T.device] if prompt_T.device.type == "cuda" else []
            with latency.count_passes(trunk) as counter, torch.random.fork_rng(devices), torch.inference_mode():
                torch.manual_seed(seed)
                text_1T = target.generate(
                    prompt_T[None], attention_mask=torch.ones_like(prompt_T[None]), generation_config=settings,
                    assistant_model=assistant,
                )  # fmt: skip
            passes[seed] = counter.count
            ids: list[int] = text_1T[0, len(prompt_T) :].tolist()
            return ids

        return run

    summary = json.loads((folder / storage.TRAINED).read_bytes())
    return Method(
        f"assisted, {storage.read_config(folder).size} draft model", "assistant",
        bench.options.assistant_tokens + 1, _modes(make), _same("assistant"),
        parameters=sum(each.numel() for each in model.parameters()), training_seconds=summary["seconds"], passes=passes,
    )  # fmt: skip


def _statistics(timing: latency.Timing, method: Method, bench: Bench) -> dict[str, Any]:
    """`acceptance`, or as much of it as the ids and the counted passes tell."""
    if timing.decoded[0]:
        return acceptance(timing.decoded, method.horizon, bench.options.seed)
    tokens = np.sum(timing.tokens, axis=0).tolist()
    passes = tokens
    if method.passes:
        repeats = range(len(timing.tokens))
        passes = [
            sum(method.passes[latency.run_seed(bench.options.seed, index, repeat)] for repeat in repeats)
            for index in range(len(tokens))
        ]
    return {
        "tokens": sum(tokens), "passes": sum(passes), "per_prompt": {"tokens": tokens, "passes": passes},
        "tokens_per_pass": bootstrap_ratio(tokens, passes, bench.options.seed),
    }  # fmt: skip


def _peak_bytes(contender: Contender, bench: Bench) -> int | None:
    """Peak GPU memory of one text, weights of everything loaded included; None on a CPU."""
    prompt_T = bench.prompts["test"][0]
    if prompt_T.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(prompt_T.device)
    contender(prompt_T, bench.options.seed)
    return torch.cuda.max_memory_allocated(prompt_T.device)


# --- what is measured ------------------------------------------------------------------------------------------------


def load_cells(folder: Path, names: Sequence[str], seed: int) -> list[Cell]:
    """The named runs; by default all heads of this seed on the trunk and horizon that most of them share, controls
    (blind, mlp) left out. Sorted by law and rank. Raises SystemExit where they do not go together."""
    folders = [folder / name for name in names] or sorted(path.parent for path in folder.glob(f"*/{storage.CONFIG}"))
    configs = {path: storage.read_config(path) for path in folders if names or (path / storage.WEIGHTS).is_file()}
    heads = {
        path: config
        for path, config in configs.items()
        if names or (config.model.trunk and config.seed == seed and config.anchor != "blind" and not config.model.map_hidden)
    }  # fmt: skip
    groups: dict[tuple[str, int], list[Path]] = {}
    for path, config in heads.items():
        groups.setdefault((config.model.trunk, config.horizon), []).append(path)
    if not groups or (names and len(groups) > 1) or "" in {trunk for trunk, _ in groups}:
        raise SystemExit(
            f"{folder} has no heads of seed {seed} on a frozen trunk; train some with model.trunk=RUN"
            if not groups
            else f"--cells: {', '.join(names)} are not heads of one horizon on one frozen trunk"
        )
    cells = [
        Cell(heads[path], storage.load_model(path), _training_seconds(path))
        for path in max(groups.values(), key=lambda paths: len(paths))
    ]
    return sorted(cells, key=lambda cell: (cell.law != "untied", cell.law, cell.config.rank))


def _training_seconds(folder: Path) -> float:
    return float(json.loads((folder / storage.TRAINED).read_bytes())["seconds"])


def load_bench(options: argparse.Namespace, say: Callable[[str], None]) -> Bench:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cells = load_cells(options.runs, options.cells, options.seed)
    config = cells[0].config
    wanted = {key: getattr(options, key) for key in ("prompts", "prompt_tokens", "new_tokens")}
    config = replace(config, decode=replace(config.decode, **wanted))
    data = TokenDataModule(config, load_corpus(config))
    for cell in cells:
        cell.model.to(device)
    trunk = _target(config, device)
    return Bench(
        cells, trunk, {split: data.prompts(split).to(device) for split in ("validation", "test")}, options, say
    )


def head(bench: Bench, benchmark: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What every record begins with."""
    config, options = bench.cells[0].config, bench.options
    keys = (
        "prompts", "prompt_tokens", "new_tokens", "nodes", "validation_repeats", "repeats", "baseline_repeats", "warmups",
        "seed", "assistant_tokens", "lookup_longest",
    )  # fmt: skip
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", "experiments/bench_decode.py", *arguments]),
        **results.provenance(),
        "settings": {key: getattr(options, key) for key in keys},
        "target": {
            "trunk": Path(config.model.trunk).name, "corpus": config.corpus, "size": config.size,
            "horizon": config.horizon, "parameters": sum(each.numel() for each in bench.trunk.parameters()),
        },
    }  # fmt: skip


def _target(config: Config, device: torch.device) -> LanguageModel:
    target = storage.load_trunk(config)
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
    bench = load_bench(options, say)
    path = options.output / "decode_strategies.json"
    if options.only != "baselines":
        record = head(bench, "decoding strategies", arguments)
        record |= strategies(bench)
        record |= {"agreement": agreements(bench), "filters": filters(bench, record["suggested"])}
        write_json(path, record)
        print(f"suggested: {record['suggested']}\nrecord: {path}")
    if options.only != "strategies":
        if not path.is_file():
            raise SystemExit(f"there is no {path} to take the chosen strategies from; leave out --only baselines")
        chosen = {
            cell["name"]: {mode: entry["chosen"] for mode, entry in cell["modes"].items()}
            for cell in json.loads(path.read_bytes())["cells"]
        }
        record = head(bench, "decoding baselines", arguments) | baselines(bench, chosen)
        path = options.output / "decode_baselines.json"
        write_json(path, record)
        print(f"record: {path}")
    return 0


def _train_hydra(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    config = load_cells(options.runs, options.cells, options.seed)[0].config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = _target(config, device)

    def progress(step: int, nll: float) -> None:
        if step % 50 == 0:
            say(f"step {step}/{config.optim.steps}: {nll:.3f} nats")

    train_hydra(base, config, TokenDataModule(config, load_corpus(config)), options.train_hydra, progress=progress)
    print(f"sequential heads: {options.train_hydra}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of finished runs")
    add("--cells", nargs="*", default=[], help="names of runs (default: all heads of --seed on one trunk)")
    add("--seed", type=int, default=0)
    add("--train-hydra", type=Path, help="train sequential heads on the cells' trunk into this folder, and stop")
    add("--hydra", type=Path, help="folder that --train-hydra wrote")
    add("--assistant", type=Path, help="finished next-token run that drafts for transformers' assisted generation")
    add("--assistant-tokens", type=int, default=3, help="drafts of the assistant per pass")
    add("--lookup-horizons", type=int, nargs="*", default=[4, 8], help="windows of prompt lookup, fixed token included")
    add("--lookup-longest", type=int, default=3, help="longest n-gram that prompt lookup looks for")
    add("--prompts", type=int, default=16)
    add("--prompt-tokens", type=int, default=64)
    add("--new-tokens", type=int, default=64)
    add("--nodes", type=int, default=8, help="drafts of a tree, width of a beam")
    add("--repeats", type=int, default=2, help="timed repeats of the strategies on the test prompts")
    add("--validation-repeats", type=int, default=1, help="and on the validation prompts")
    add("--baseline-repeats", type=int, default=3, help="timed repeats of the baselines on the test prompts")
    add("--warmups", type=int, default=1)
    add(
        "--only",
        choices=("strategies", "baselines"),
        help="make one record (baselines takes the choice from the other)",
    )
    add("--output", type=Path, default=ROOT / "results" / "benchmarks")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
