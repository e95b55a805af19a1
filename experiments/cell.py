"""The life of one cell: train, evaluate, decode, record. Both entry points call these and nothing else.

    python -m experiments.cell GROUP.json      times the decoders of a group side by side, as a sweep does per group

OUTPUT/NAME/train.json      training summary    (with model.safetensors, config.yaml, sessions.json)
OUTPUT/NAME/evaluate.json   held-out likelihoods
OUTPUT/NAME/decode.json     decoding, measured beside the other cells of its group
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from cpdlm.bench import compare
from cpdlm.bench.acceptance import tokens_per_forward
from cpdlm.config import Config, ConfigError, DecodeConfig, EvaluateConfig, but_rank, parse, upgrade
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.corpus import load_corpus
from cpdlm.data.target import Target
from cpdlm.decoding import Sampling
from cpdlm.files import WriteError, write_json
from cpdlm.model.build import parameter_counts
from cpdlm.model.language_model import LanguageModel
from cpdlm.processes import is_first_process
from cpdlm.progress import Bar
from cpdlm.training import checkpoints
from cpdlm.training import run as training
from cpdlm.training.checkpoints import run_folder
from cpdlm.training.module import NonFiniteLoss, lower
from experiments import likelihood, machine, tracking
from experiments.compare import table
from experiments.provenance import provenance
from experiments.records import build, load, write
from experiments.schema import NUMBER, Maybe, check_kind, non_finite

EVALUATED, MEASURED = "evaluate.json", "decode.json"
# What is read of the files of the stages, and its kind; the record's schema judges the rest.
_PARTS: dict[str, dict[str, Any]] = {
    checkpoints.TRAINED: {"seconds": NUMBER},
    EVALUATED: {"likelihood": {}, "parameters": {}, "seconds": {}, "data": {"sha256": str}, "origin": {"commit": str}},
    MEASURED: {"group": [str], "modes": {}, "seconds": NUMBER, "origin": {}, "rank_one": Maybe(str)},
}


def is_trained(config: Config) -> bool:
    """True where the cell is trained and evaluated as its config says; RunError where another run has its name."""
    folder = run_folder(config)
    if not all((folder / name).is_file() for name in (EVALUATED, checkpoints.WEIGHTS, checkpoints.TRAINED)):
        return False
    checkpoints.check_same_run(folder, config)
    if not checkpoints.has_tokenizer(folder):  # is written again
        return False
    found = _read(folder / EVALUATED)
    same = _same(found.get("settings"), config.evaluate) and found.get("weights") == _weights_hash(config)
    same = same and not non_finite(found["likelihood"])  # else it has diverged, and says so when it is evaluated
    # Older versions evaluated over the whole vocabulary what was trained on a shortlist: that is done again.
    return same and found["likelihood"].get("shortlist", {"tokens": 0})["tokens"] == config.loss.draft_vocabulary


def is_measured(config: Config, beside: Iterable[str] = (), reference: Config | None = None) -> bool:
    """True where the cell was measured as its config says, beside (at least) these runs and the reference."""
    path = run_folder(config) / MEASURED
    if not path.is_file() or not checkpoints.has_draft_vocabulary(path.parent, config.decode.draft_vocabulary):
        return False
    found = _read(path)
    same = _same(found.get("settings"), config.decode) and found.get("weights") == _weights_hash(config)
    timed = reference is None or found.get("reference") == [reference.run_name, _weights_hash(reference)]
    return same and timed and set(beside) <= set(found["group"])


def run(config: Config, command: str, stage: str) -> int:
    """What `experiments/run.py` does; returns the exit code."""
    disable_progress_bar()  # those of transformers: ours say what goes on
    trained = is_trained(config)
    if stage in ("train", "all") and not trained:
        memory = machine.check_memory(config)
        if stage == "all" and is_first_process():
            print(machine.estimate(config, memory), flush=True)
        if not train(config, command):
            return 0
    if not is_first_process():  # of a distributed run: all that follows is done once
        return 0
    measured = config.horizon == 1 or is_measured(config)
    if trained and (measured or stage == "train"):
        print(f"already complete: {run_folder(config)}; nothing is run again")
    if stage in ("decode", "all"):
        if not measured:
            measure([config])
        path = write_record(config, command, run_folder(config), claim="single", profile="single")
        tracking.log_record(config, path)
        print(table([load(path)]))
        print(f"record: {path}")
    return 0


def train(config: Config, command: str) -> bool:
    """Train to the end (resuming), then evaluate on the test split. False in a helper process."""
    prepared = training.prepare(config, session=provenance())
    with tracking.cell_run(config, command, prepared.folder) as tracker:
        prepared.fit(tracker.logger, _watch(config, prepared.data))
        if not is_first_process():
            return False
        _evaluate(prepared, command)
    return True


def _evaluate(prepared: training.Run, command: str) -> None:
    """Evaluate the stored weights, whole and in their stored precision, as decoding reads them; leave evaluate.json.

    NonFiniteLoss where their likelihood on the test split is no number.
    """
    config, corpus, began = prepared.config, prepared.corpus, time.monotonic()
    model = checkpoints.load_model(prepared.folder)
    if prepared.draft_vocabulary is not None:
        model.use_draft_vocabulary(torch.from_numpy(prepared.draft_vocabulary.ids))
    held_out = likelihood.evaluate(
        model,
        prepared.data.test_batches(),
        corpus.token_bytes(),
        corpus.source_names,
        training.training_device(),
    )
    if field := non_finite(held_out):
        raise NonFiniteLoss(
            f"{prepared.folder}: {field} on the test split is not finite: the run has diverged. {lower(config)}: "
            "delete the folder and train again"
        )
    data = corpus.describe() | _trunk_hash(config) | ({"written": prepared.written} if prepared.written else {})
    write_json(
        prepared.folder / EVALUATED,
        {
            "settings": asdict(config.evaluate),
            "weights": _weights_hash(config),
            "likelihood": held_out,
            "parameters": parameter_counts(model),
            "data": data,
            "command": command,
            "seconds": {
                "data": prepared.data_seconds,
                # Over all sessions of a resumed run.
                "train": _read(prepared.folder / checkpoints.TRAINED)["seconds"],
                "evaluate": time.monotonic() - began,
            },
            "origin": _origin(prepared.sessions),
        },
    )


def measure(configs: list[Config], reference: Config | None = None) -> None:
    """Decode with every cell of a group side by side, greedily and by sampling; leave each its decode.json.

    reference: the next-token model of equal training, decoded autoregressively beside them.
    """
    began, first, device = time.monotonic(), configs[0], training.training_device()
    assert all((c.decode, c.data, c.corpus) == (first.decode, first.data, first.corpus) for c in configs), (
        "cells are compared on the same prompts"
    )
    corpus = load_corpus(first)
    for config in configs:
        evaluated = _read(run_folder(config) / EVALUATED)
        training.check_same_text(run_folder(config), evaluated["data"]["sha256"], corpus.describe()["sha256"])
    targets = {(c.model.trunk, c.model.dtype): c for c in configs}
    frozen = {key: checkpoints.load_target(config) for key, config in targets.items()}
    models = {
        c.run_name: checkpoints.load_model(run_folder(c), frozen[c.model.trunk, c.model.dtype]).to(device)
        for c in configs
    }
    listed = None
    if size := first.decode.draft_vocabulary:
        text, _ = training.training_text(first, corpus, frozen[first.model.trunk, first.model.dtype])
        listed = training.draft_vocabulary(size, text)
        for model in models.values():
            model.use_draft_vocabulary(torch.from_numpy(listed.ids))
    beside = checkpoints.load_model(run_folder(reference)).to(device) if reference is not None else None
    rank_one = _rank_one(configs)
    modes = _decoded(first, models, TokenDataModule(first, corpus).prompts().to(device), rank_one, beside)
    shared = {
        "group": list(models),
        "reference": [reference.run_name, _weights_hash(reference)] if reference is not None else None,
        "shortlist_coverage": listed.coverage if listed is not None else None,
        "seconds": (time.monotonic() - began) / len(configs),
        "origin": provenance(),
    }
    for config in configs:
        name = config.run_name
        own = {
            "settings": asdict(config.decode),
            "weights": _weights_hash(config),
            "rank_one": rank_one.get(name),
            "modes": {mode: cells[name] for mode, cells in modes.items()},
        }
        ids = torch.from_numpy(listed.ids) if listed is not None else None
        checkpoints.save_draft_vocabulary(run_folder(config), config, ids)
        write_json(run_folder(config) / MEASURED, shared | own)


def _decoded(
    config: Config,
    models: dict[str, LanguageModel],
    prompts_PT: torch.Tensor,
    rank_one: dict[str, str],
    reference: LanguageModel | None,
) -> dict[str, dict[str, Any]]:
    """What `compare.measure` says of each model, by mode."""
    decode, modes = config.decode, {}
    protocol = compare.Protocol.of(decode, config.seed)
    for mode, sampling in {
        "greedy": Sampling(temperature=0),
        "sampling": Sampling(decode.temperature, decode.top_k, decode.top_p),
    }.items():
        with Bar(total=decode.warmups + decode.repeats, desc=f"decoding, {mode}", unit="repeat") as bar:

            def say(line: str, bar: Bar = bar) -> None:
                if line.startswith("measured again"):
                    Bar.write(line, file=sys.stderr)
                bar.set_postfix_str(line, refresh=False)
                bar.update(int(line.startswith(("repeat", "warm-up"))))

            modes[mode] = compare.measure(
                models, prompts_PT, sampling, protocol, rank_one=rank_one, reference=reference, progress=say
            )
    return modes


def write_record(config: Config, command: str, folder: Path, *, claim: str, profile: str) -> Path:
    """Assemble the record of a trained cell in folder/NAME.json; `decoding` is null where it was not measured."""
    own = run_folder(config)
    evaluated = _read(own / EVALUATED)
    measured = _read(own / MEASURED) if config.horizon > 1 and is_measured(config) else None
    kept = ("group", "rank_one", "reference", "shortlist_coverage", "modes", "origin")
    record = build(
        config,
        claim=claim,
        profile=profile,
        command=command,
        data=evaluated["data"],
        seconds=evaluated["seconds"] | {"decode": measured["seconds"] if measured else 0.0},
        parameters=evaluated["parameters"],
        training=_read(own / checkpoints.TRAINED),
        likelihood=evaluated["likelihood"],
        # Decoding is timed alone, later: it says its own commit and threads.
        decoding={key: measured[key] for key in kept} if measured else None,
        origin=evaluated["origin"],
    )
    return write(record, folder)


def _watch(config: Config, data: TokenDataModule) -> Callable[[LanguageModel], dict[str, float]] | None:
    if not config.train.decode_prompts:
        return None
    prompts_PT = data.prompts("validation")[: config.train.decode_prompts].to(training.training_device())
    return lambda model: tokens_per_forward(model, prompts_PT, config.decode.new_tokens)


def _origin(sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """Provenance of a run: that of its first session. `dirty` if any was or if the code changed between them.

    `commits` lists all, where the code changed.
    """
    commits = list(dict.fromkeys(session["commit"] for session in sessions))
    dirty = any(session["dirty"] for session in sessions) or len(commits) > 1
    return sessions[0] | {"dirty": dirty} | ({"commits": commits} if len(commits) > 1 else {})


def _same(settings: dict[str, Any] | None, now: EvaluateConfig | DecodeConfig) -> bool:
    """Whether a stage ran with these settings; one that is younger than its output had its default then."""
    if settings is None:
        return False
    saved = upgrade({"decode": settings})["decode"]  # by the present names of its settings
    return asdict(type(now)()) | saved == asdict(now)


def _rank_one(configs: list[Config]) -> dict[str, str]:
    """For each cell above rank 1 the one that differs from it in rank alone and has rank 1, where there is one."""
    of_rank_one = {str(but_rank(config)): config.run_name for config in configs if config.rank == 1}
    return {
        config.run_name: of_rank_one[key]
        for config in configs
        if config.rank > 1 and (key := str(but_rank(config))) in of_rank_one
    }


def _weights_hash(config: Config) -> str:
    """sha256 of the finished weights, a frozen trunk's included: what evaluation and decoding were made with."""
    own = run_folder(config) / checkpoints.WEIGHTS
    content = own.read_bytes() if own.is_file() else b""
    target = Target.of(config)
    if target.kind == "pretrained":
        content += target.sha256.encode()
    elif target.kind == "run":
        theirs = Path(target.name) / checkpoints.WEIGHTS
        content += theirs.read_bytes() if theirs.is_file() else b""
    return hashlib.sha256(content).hexdigest()


def _trunk_hash(config: Config) -> dict[str, str]:
    return {"trunk_sha256": sha256} if (sha256 := Target.of(config).sha256) else {}


def _read(path: Path) -> dict[str, Any]:
    """A stage's output; raises RunError where it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        check_kind(content, _PARTS.get(path.name, {}), "content", path.name)
    except (OSError, ValueError, RecursionError) as error:
        raise checkpoints.RunError(
            f"{path} is damaged ({error}); delete it, and the same command makes it again"
        ) from error
    return content


def main(path: str) -> int:
    """Measure a group. Its file: {"cells": [WORDS, ...], "reference": WORDS or null}, WORDS as they are typed."""
    group = json.loads(Path(path).read_bytes())
    try:
        reference = parse(group["reference"]) if group["reference"] is not None else None
        measure([parse(words) for words in group["cells"]], reference)
    except (ConfigError, checkpoints.RunError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
