"""The life of one cell: train, evaluate, decode, record. Both entry points call these and nothing else.

OUTPUT/NAME/train.json      training summary    (with model.safetensors, config.yaml, sessions.json)
OUTPUT/NAME/evaluate.json   held-out likelihoods
OUTPUT/NAME/decode.json     decoding, measured beside the other cells of its group
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cpdlm.bench import latency
from cpdlm.bench.acceptance import tokens_per_forward
from cpdlm.config import Config, ConfigError, DecodeConfig, EvaluateConfig, but_rank, upgrade
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.corpus import Corpus, load_corpus
from cpdlm.data.draft_vocabulary import DraftVocabulary, frequent_tokens
from cpdlm.decoding import Sampling
from cpdlm.files import write_json
from cpdlm.model.language_model import LanguageModel, build_language_model
from cpdlm.processes import is_first_process
from cpdlm.training import checkpoints
from cpdlm.training.fit import fit
from cpdlm.training.self_text import written_text
from cpdlm.training.states import kept_states
from experiments import tracking
from experiments.measure import likelihood
from experiments.provenance import provenance
from experiments.records import build, load, summary_table, write
from experiments.report import render

EVALUATED, MEASURED, SESSIONS = "evaluate.json", "decode.json", "sessions.json"


def run_folder(config: Config) -> Path:
    return Path(config.output) / config.run_name


def is_trained(config: Config) -> bool:
    """True where the cell is trained and evaluated as its config says; raises RunError where another run has its name."""
    folder = run_folder(config)
    if not all((folder / name).is_file() for name in (EVALUATED, checkpoints.WEIGHTS, checkpoints.TRAINED)):
        return False
    checkpoints.check_same_run(folder, config)
    found = _read(folder / EVALUATED)
    same = _same(found.get("settings"), config.evaluate) and found.get("weights") == _weights_hash(config)
    # Older versions evaluated over the whole vocabulary what was trained on a shortlist: that is done again.
    return same and found["likelihood"].get("shortlist", {"tokens": 0})["tokens"] == config.loss.draft_vocabulary


def trained_by(config: Config) -> str:
    """The commit that trained and evaluated the cell; "" where none has."""
    return str(_read(run_folder(config) / EVALUATED)["origin"]["commit"]) if is_trained(config) else ""


def is_measured(configs: list[Config], reference: Config | None = None) -> bool:
    """True where each cell was measured as its config says, beside (at least) all the others and the reference."""
    names = {config.run_name for config in configs}
    for config in configs:
        path = run_folder(config) / MEASURED
        if not path.is_file():
            return False
        found = _read(path)
        if not _same(found.get("settings"), config.decode) or found.get("weights") != _weights_hash(config):
            return False
        if not names <= set(found["group"]):
            return False
        if reference is not None and found.get("reference") != [reference.run_name, _weights_hash(reference)]:
            return False
    return True


def run(config: Config, command: str, stage: str) -> int:
    """What `experiments/run.py` does; returns the exit code."""
    if stage in ("train", "all") and not is_trained(config) and not train(config, command):
        return 0
    if not is_first_process():  # of a distributed run: all that follows is done once
        return 0
    if stage in ("decode", "all"):
        if config.horizon > 1 and not is_measured([config]):
            measure([config])
        path = write_record(config, command, run_folder(config), claim="single", profile="single")
        tracking.log_record(config, path)
        print(summary_table(load(path)))
        print(f"record: {path}")
    return 0


def train(config: Config, command: str) -> bool:
    """Train to the end (resuming), then evaluate on the test split. False in a helper process."""
    folder = run_folder(config)
    if is_first_process():
        checkpoints.open_run(folder, config)
    trunk = _frozen_trunk(config)
    began = time.monotonic()
    corpus = load_corpus(config)
    data_seconds = time.monotonic() - began
    if config.is_pretrained and trunk is not None and trunk.vocab_size < corpus.vocab_size:
        raise checkpoints.RunError(
            f"data.tokenizer={config.data.tokenizer} has {corpus.vocab_size} tokens, model={config.model.trunk} embeds "
            f"{trunk.vocab_size}: the tokenizer is another model's; type data.tokenizer=model, or give a folder with both"
        )
    if trunk is not None and not config.is_pretrained and trunk.vocab_size != corpus.vocab_size:
        raise checkpoints.RunError(
            f"model.trunk={config.model.trunk} has a vocabulary of {trunk.vocab_size}, data.tokenizer="
            f"{config.data.tokenizer} on corpus={config.corpus} one of {corpus.vocab_size}; use the trunk's own data settings"
        )
    trunk_sha256 = checkpoints.trunk_hash(config) if trunk is not None else ""
    origin = _origin(folder, str(corpus.describe()["sha256"]), trunk_sha256)
    torch.manual_seed(config.seed)
    model = build_language_model(config, corpus.vocab_size, trunk)
    text, written = _training_text(config, corpus, trunk)
    data = TokenDataModule(config, text)
    listed = (
        _shortlist("loss.draft_vocabulary", config.loss.draft_vocabulary, text)
        if config.loss.draft_vocabulary
        else None
    )
    if listed is not None:
        model.use_draft_vocabulary(torch.from_numpy(listed.ids))
        print(
            f"loss.draft_vocabulary={config.loss.draft_vocabulary}: {listed.coverage:.2%} of the training text is on it",
            flush=True,
        )
    with tracking.cell_run(config, command, folder) as tracker:
        done = (folder / checkpoints.TRAINED).is_file() and (folder / checkpoints.WEIGHTS).is_file()
        # Adapters change the states of the draft at every step: the trunk runs, on the same tokens.
        if not done and config.data.states and not config.model.adapter_layers:
            identity = {
                "text": written.get("sha256", corpus.describe()["sha256"]),
                "trunk": checkpoints.trunk_hash(config),
            }
            data.states = kept_states(
                model, data.training_rows(), Path(config.data.cache), identity, config.data.states_gib, _device(), print
            )
        if not done:
            fit(config, model, data, folder, tracker.logger, _watch(config, data))
        if not is_first_process():
            return False
        # The stored weights, whole and in their stored precision: what is evaluated is what is decoded with.
        model = checkpoints.load_model(folder)
        if listed is not None:
            model.use_draft_vocabulary(torch.from_numpy(listed.ids))
        began = time.monotonic()
        device = _device()
        texts_V = [corpus.tokenizer.decode([token]) for token in range(corpus.vocab_size)]
        held_out = likelihood.evaluate(
            model, data.test_batches(), corpus.token_bytes(), corpus.source_names, device, texts_V
        )
        write_json(
            folder / EVALUATED,
            {
                "settings": asdict(config.evaluate),
                "weights": _weights_hash(config),
                "likelihood": held_out,
                "parameters": model.parameter_counts(),
                "data": corpus.describe() | _trunk_hash(config) | ({"written": written} if written else {}),
                "command": command,
                "seconds": {
                    "data": data_seconds,
                    "train": _read(folder / checkpoints.TRAINED)["seconds"],  # over all sessions of a resumed run
                    "evaluate": time.monotonic() - began,
                },
                "origin": origin,
            },
        )
    return True


def measure(configs: list[Config], reference: Config | None = None) -> None:
    """Decode with every cell of a group side by side, greedily and by sampling; leave each its decode.json.

    reference: the next-token model of equal training, decoded plainly beside them.
    """
    began, first = time.monotonic(), configs[0]
    assert all((c.decode, c.data, c.corpus) == (first.decode, first.data, first.corpus) for c in configs), (
        "cells are compared on the same prompts"
    )
    corpus = load_corpus(first)
    for config in configs:
        evaluated = _read(run_folder(config) / EVALUATED)
        _check_same_text(run_folder(config), evaluated["data"]["sha256"], corpus.describe()["sha256"])
    prompts_PT = TokenDataModule(first, corpus).prompts().to(_device())
    models, trunks = {}, dict[tuple[str, str], LanguageModel | None]()
    for config in configs:
        key = (config.model.trunk, config.model.dtype)
        if key not in trunks:
            trunks[key] = checkpoints.load_trunk(config)
        models[config.run_name] = checkpoints.load_model(run_folder(config), trunks[key]).to(_device())
    trunk = checkpoints.load_model(run_folder(reference)).to(_device()) if reference is not None else None
    decode = first.decode
    rank_one = _rank_one(configs)
    shortlist = None
    if decode.draft_vocabulary:
        text, _ = _training_text(first, corpus, trunks[first.model.trunk, first.model.dtype])
        shortlist = _shortlist("decode.draft_vocabulary", decode.draft_vocabulary, text)
        for model in models.values():
            model.use_draft_vocabulary(torch.from_numpy(shortlist.ids))
    modes = {}
    for mode, sampling in {
        "greedy": Sampling(temperature=0),
        "sampling": Sampling(decode.temperature, decode.top_k, decode.top_p),
    }.items():
        with tqdm(total=decode.warmups + decode.repeats, desc=f"decoding, {mode}", unit="repeat") as bar:

            def say(line: str, bar: tqdm = bar) -> None:
                bar.set_postfix_str(line, refresh=False)
                bar.update(int(line.startswith(("repeat", "warm-up"))))

            modes[mode] = latency.measure(
                models,
                prompts_PT,
                decode.new_tokens,
                sampling,
                rank_one=rank_one,
                draft=decode.draft,
                nodes=decode.nodes,
                reference=trunk,
                repeats=decode.repeats,
                warmups=decode.warmups,
                seed=first.seed,
                progress=say,
            )
    seconds = (time.monotonic() - began) / len(configs)
    for config in configs:
        name = config.run_name
        content = {
            "settings": asdict(config.decode),
            "weights": _weights_hash(config),
            "group": list(models),
            "rank_one": rank_one.get(name),
            "reference": [reference.run_name, _weights_hash(reference)] if reference is not None else None,
            "shortlist": shortlist.ids.tolist() if shortlist is not None else None,
            "shortlist_coverage": shortlist.coverage if shortlist is not None else None,
            "modes": {mode: cells[name] for mode, cells in modes.items()},
            "seconds": seconds,
            "origin": provenance(),
        }
        write_json(run_folder(config) / MEASURED, content)


def write_record(config: Config, command: str, folder: Path, *, claim: str, profile: str) -> Path:
    """Assemble the record of a trained cell and write it to folder/NAME.json; `decoding` is null where it was not measured."""
    own = run_folder(config)
    evaluated = _read(own / EVALUATED)
    measured = _read(own / MEASURED) if config.horizon > 1 and is_measured([config]) else None
    kept = ("group", "rank_one", "reference", "shortlist_coverage", "modes")
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
        # Older versions kept less; what was not kept is left out, which the report can tell from null.
        decoding={key: measured[key] for key in kept if key in measured} if measured else None,
        origin=evaluated["origin"],
    )
    # Decoding is timed alone, later: it says its own commit and threads.
    if measured:
        record["decoding"]["origin"] = measured["origin"]
    return write(record, folder)


def sweep(title: str, output: str, command: str, experiment: str) -> str:
    """The MLflow run id of this sweep's parent ("" without MLflow)."""
    return tracking.start_sweep(title, Path(output), command, experiment=experiment).run_id


def log(
    configs_and_records: list[tuple[Config, Path]],
    title: str,
    output: Path,
    command: str,
    experiment: str,
    text: str,
    figures: list[Path],
) -> None:
    """Add finished records to their MLflow runs; to the sweep's, what the report says (`text`) and the figures."""
    for config, path in configs_and_records:
        tracking.log_record(config, path)
    parent = tracking.start_sweep(title, output, command, experiment=experiment)
    parent.text(f"{text.strip()}\n", "claims.txt")
    parent.tags(
        {
            "mlflow.note.content": f"`{command}`. The verdicts are under *Artifacts*, in `claims.txt`; the figures beside it."
        }
    )
    for figure in figures:
        parent.artifact(figure, "figures")
    parent.end()


def report(root: Path, output: Path, publish: bool) -> tuple[str, list[Path]]:
    """Redraw tables and figures from the records under `root`: (claims table and where things are, the figures)."""
    figures = Path("paper_figures") if publish else output / "figures"
    rendered = render(root, figures, Path("README.md") if publish else None)
    notes = "".join(f"note: {line}\n" for line in rendered.notes)
    text = (
        f"\n{rendered.text}\n{notes}\nfigures and tables: {figures}\nrecords: {root}\n"
        f"dashboard: ./dev ui {output}   (MLflow on http://127.0.0.1:5000)"
    )
    return text, [path for path in rendered.files if path.suffix in (".png", ".html")]


def _watch(config: Config, data: TokenDataModule) -> Callable[[LanguageModel], dict[str, float]] | None:
    if not config.train.decode_prompts:
        return None
    prompts_PT = data.prompts("validation")[: config.train.decode_prompts].to(_device())
    return lambda model: tokens_per_forward(model, prompts_PT, config.decode.new_tokens)


def _frozen_trunk(config: Config) -> LanguageModel | None:
    """The model whose trunk a config names; raises RunError where the two do not fit, before any work."""
    if not config.model.trunk or config.is_pretrained:
        return checkpoints.load_trunk(config)
    folder = Path(config.model.trunk)
    if not (folder / checkpoints.CONFIG).is_file():
        raise checkpoints.RunError(
            f"model.trunk={folder} is not a run folder: it has no {checkpoints.CONFIG}; a pretrained model is given as model={folder}"
        )
    theirs = checkpoints.read_config(folder)
    if theirs.horizon != 1:
        raise checkpoints.RunError(
            f"model.trunk={folder} was trained with horizon={theirs.horizon}; a trunk is a plain next-token model: make one "
            f"with preset=trunk (or preset=cpu-trunk,trunk)"
        )
    for key, mine, trunk in (
        ("size", config.size, theirs.size),
        ("model.family", config.model.family, theirs.model.family),
        ("data.tokenizer", config.data.tokenizer, theirs.data.tokenizer),
    ):
        if mine != trunk:
            raise checkpoints.RunError(
                f"model.trunk={folder} has {key}={trunk}, this run {key}={mine}; write {key}={trunk}"
            )
    if theirs.data.context < config.data.context:
        raise checkpoints.RunError(
            f"model.trunk={folder} has data.context={theirs.data.context}; lower data.context={config.data.context}"
        )
    return checkpoints.load_model(folder)


def _origin(folder: Path, data_sha256: str, trunk_sha256: str) -> dict[str, Any]:
    """Provenance of the run, which may have had several sessions: that of the first, `dirty` if any was or if the code
    changed between them (`commits` then lists all). Raises RunError where the corpus or the trunk is no longer the one that
    it began with: a checkpoint holds neither.
    """
    path = folder / SESSIONS
    found = _read(path) if path.is_file() else {"sessions": []}
    sessions = found["sessions"]
    _check_same_text(folder, found.get("data_sha256", data_sha256), data_sha256)
    if (then := found.get("trunk_sha256", trunk_sha256)) != trunk_sha256:
        raise checkpoints.RunError(
            f"{folder} was trained on other weights: its trunk has changed since (sha256 {then[:12]} then, {trunk_sha256[:12]} "
            "now); restore it, give this run name=OTHER, or delete the folder"
        )
    if not (folder / checkpoints.TRAINED).is_file() or not sessions:
        sessions.append(provenance())
        if is_first_process():
            write_json(path, {"sessions": sessions, "data_sha256": data_sha256, "trunk_sha256": trunk_sha256})
    commits = list(dict.fromkeys(session["commit"] for session in sessions))
    first: dict[str, Any] = sessions[0]
    dirty = any(session["dirty"] for session in sessions) or len(commits) > 1
    return first | {"dirty": dirty} | ({"commits": commits} if len(commits) > 1 else {})


def _same(settings: dict[str, Any] | None, now: EvaluateConfig | DecodeConfig) -> bool:
    """Whether a stage ran with these settings; one that is younger than its output had its default then."""
    if settings is None:
        return False
    saved = upgrade({"decode": settings})["decode"]  # by the present names of its settings
    return asdict(type(now)()) | saved == asdict(now)


def _training_text(config: Config, corpus: Corpus, trunk: LanguageModel | None) -> tuple[Corpus, dict[str, Any]]:
    """(the corpus with the text that is trained on, where that came from): its own, or the frozen model's (`data.text`)."""
    if trunk is None or config.data.text == "corpus":
        return corpus, {}
    identity = {"corpus": corpus.describe()["sha256"], "trunk": checkpoints.trunk_hash(config)}
    split, written = written_text(
        trunk,
        corpus.train,
        config.data.text,
        config.data.states,
        config.data.context,
        corpus.tokenizer.eos,
        Path(config.data.cache),
        identity,
        _device(),
        print,
    )
    return replace(corpus, train=split), written


def _shortlist(setting: str, size: int, text: Corpus) -> DraftVocabulary:
    """text: what is trained on."""
    if size > text.vocab_size:
        raise ConfigError(f"{setting}={size}: the vocabulary has {text.vocab_size} tokens; give fewer, or 0")
    return frequent_tokens(text.train.tokens, text.vocab_size, size)


def _rank_one(configs: list[Config]) -> dict[str, str]:
    """Of each cell above rank 1, the one that differs from it in being of rank 1 and in nothing else, where there is one."""
    of_rank_one = {str(but_rank(config)): config.run_name for config in configs if config.rank == 1}
    return {
        config.run_name: of_rank_one[key]
        for config in configs
        if config.rank > 1 and (key := str(but_rank(config))) in of_rank_one
    }


def _check_same_text(folder: Path, then: str, now: str) -> None:
    if then != now:
        raise checkpoints.RunError(
            f"{folder} was trained on other text: the corpus has changed since (sha256 {then[:12]} then, {now[:12]} now); "
            "restore it, give this run name=OTHER, or delete the folder"
        )


def _weights_hash(config: Config) -> str:
    """sha256 of the finished weights, a frozen trunk's included: what evaluation and decoding were made with."""
    own = run_folder(config) / checkpoints.WEIGHTS
    content = own.read_bytes() if own.is_file() else b""
    if config.is_pretrained:
        content += checkpoints.trunk_hash(config).encode()
    elif config.model.trunk:
        theirs = Path(config.model.trunk) / checkpoints.WEIGHTS
        content += theirs.read_bytes() if theirs.is_file() else b""
    return hashlib.sha256(content).hexdigest()


def _trunk_hash(config: Config) -> dict[str, str]:
    return {"trunk_sha256": checkpoints.trunk_hash(config)} if config.model.trunk else {}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _read(path: Path) -> dict[str, Any]:
    """A stage's output; raises RunError where it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise checkpoints.RunError(
            f"{path} is damaged ({error}); delete it, and the same command makes it again"
        ) from error
    return content
