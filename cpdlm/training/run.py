"""The life of a training run: frozen model, text, model, stored states, fit, finished weights.

    from cpdlm.config import parse
    from cpdlm.training.run import train

    folder = train(parse(["preset=retrofit", "model=smollm2", "rank=4", "output=runs"]))

RUN/sessions.json holds the hashes of the text and of the frozen model that the run began with, and what callers noted
of each start. The other files of a run's folder are those of `cpdlm.training.checkpoints`.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger

from cpdlm.config import Config, ConfigError
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.corpus import load_corpus
from cpdlm.data.draft_vocabulary import DraftVocabulary, frequent_tokens
from cpdlm.data.stored import Corpus
from cpdlm.data.target import Target
from cpdlm.data.tokenizer import HubTokenizer, stored_tokenizer
from cpdlm.files import write_json
from cpdlm.model.build import build_language_model
from cpdlm.model.heads import FactorHeads, HeadsConfig
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.pretrained import free_bytes
from cpdlm.model.trunk import Trunk, build_body
from cpdlm.processes import is_first_process, is_launched
from cpdlm.training import checkpoints
from cpdlm.training.checkpoints import CONFIG, RunError
from cpdlm.training.fit import fit
from cpdlm.training.self_text import Writing, written_text
from cpdlm.training.states import kept_states

INPUTS = "sessions.json"
MANY_PASSES = 4  # over the same rows, from which on a run says so

Watch = Callable[[LanguageModel], dict[str, float]]
Say = Callable[[str], None]


def train(config: Config, *, logger: Logger | None = None, watch: Watch | None = None, say: Say = print) -> Path:
    """Train what `config` describes; return `checkpoints.run_folder(config)`, which then holds the finished weights.

    A killed run continues from its last checkpoint, bit for bit; a finished one is returned as it is. One process
    trains into a folder at a time. Load the result with `checkpoints.load_model(folder)`.

    logger: of Lightning, for the curve. watch: what else to measure at each validation, by name. say: takes a line for
    the user. With devices or nodes above 1 every process that torchrun or srun started calls this.

    Raises ConfigError for settings that do not fit the data or the frozen model, or that need a launcher; RunError for
    a folder that another process writes to or that holds another run; NonFiniteLoss; Interrupted (a checkpoint is
    left); WriteError where the disk is full (the last checkpoint is kept).
    """
    if config.nodes * config.devices > 1 and not is_launched():
        raise ConfigError(
            f"nodes={config.nodes} devices={config.devices} needs a launcher: "
            f"torchrun --nproc-per-node={config.devices} SCRIPT"
        )
    folder = checkpoints.run_folder(config)
    with checkpoints.exclusive(folder) if is_first_process() else contextlib.nullcontext():
        checkpoints.check_same_run(folder, config)
        if not checkpoints.is_finished(folder) or not checkpoints.has_tokenizer(folder):
            prepare(config, say).fit(logger, watch, say)
    return folder


@dataclass(frozen=True)
class Run:
    """A run whose settings, text and frozen model fit together: what trains, and what it trains on.

    data: batches of the training text. corpus: text, tokenizer and held-out splits. written: where the training text
    came from if the frozen model wrote it, else {}. draft_vocabulary: the tokens that heads train on, None for all.
    sessions: what callers of `prepare` noted of each start of this run.
    """

    config: Config
    folder: Path
    corpus: Corpus
    data: TokenDataModule
    model: LanguageModel
    written: dict[str, Any]
    draft_vocabulary: DraftVocabulary | None
    sessions: list[dict[str, Any]]
    data_seconds: float

    def fit(self, logger: Logger | None = None, watch: Watch | None = None, say: Say = print) -> None:
        """Train to the end unless it is trained already. The errors are those of `train`."""
        if checkpoints.is_finished(self.folder):
            return
        config = self.config
        if config.data.states:
            identity = {
                "text": self.written.get("sha256", self.corpus.describe()["sha256"]),
                "trunk": Target.of(config).sha256,
            }
            cache, limit = Path(config.data.cache), config.data.states_gib
            rows, wait = self.data.training_rows(), config.train.timeout
            self.data.states = kept_states(self.model, rows, cache, identity, limit, training_device(), say, wait)
        size = config.decode.draft_vocabulary
        listed = draft_vocabulary(size, self.data.corpus) if size else None
        if listed is not None and is_first_process():
            checkpoints.save_draft_vocabulary(self.folder, config, torch.from_numpy(listed.ids))
        fit(config, self.model, self.data, self.folder, logger, watch)


def prepare(config: Config, say: Say = print, session: Mapping[str, Any] | None = None) -> Run:
    """Everything of a run up to its first step. The caller holds the folder (`checkpoints.exclusive`), as `train` does.

    session: what to note of this start, such as the commit and the machine. Raises ConfigError and RunError as `train`.
    """
    folder = checkpoints.run_folder(config)
    checkpoints.check_same_run(folder, config)
    trunk = frozen_model(config)
    if config.data.tokenizer == "model" and not config.data.bundle:
        check_vocabulary(config, HubTokenizer("model", Target.of(config).source), trunk)  # before the text is read
    began = time.monotonic()
    corpus = load_corpus(config)
    data_seconds = time.monotonic() - began
    # All that later stages need is checked before the folder is a run of these settings.
    check_vocabulary(config, corpus, trunk)
    _check_memory(config, corpus.vocab_size, trunk)
    if config.horizon > 1:
        TokenDataModule(config, corpus).prompts()
    if is_first_process():
        checkpoints.open_run(folder, config)
        checkpoints.save_tokenizer(folder, corpus.tokenizer)
    trunk_sha256 = Target.of(config).sha256
    sessions = _note_inputs(folder, str(corpus.describe()["sha256"]), trunk_sha256, session)
    torch.manual_seed(config.seed)
    model = build_language_model(config, corpus.vocab_size, trunk)
    text, written = training_text(config, corpus, trunk, say)
    if written:
        _note_written(folder, written["sha256"])
    listed = None
    if config.loss.draft_vocabulary:
        listed = draft_vocabulary(config.loss.draft_vocabulary, text)
        model.use_draft_vocabulary(torch.from_numpy(listed.ids))
        say(f"loss.draft_vocabulary={len(listed.ids)} tokens cover {listed.coverage:.2%} of the training text")
    data = TokenDataModule(config, text)
    rows = data.training_rows().count
    if (passes := config.optim.steps * config.data.batch_rows / rows) >= MANY_PASSES:
        say(f"training goes {passes:.0f} times over {rows:,} rows of {config.data.context} tokens")
    return Run(config, folder, corpus, data, model, written, listed, sessions, data_seconds)


def frozen_model(config: Config) -> LanguageModel | None:
    """The model that `model.trunk` names, None without one. RunError where its settings do not fit, before any work."""
    target = Target.of(config)
    if target.kind != "run":
        return checkpoints.load_target(config)
    folder = Path(target.name)
    if not (folder / CONFIG).is_file():
        raise RunError(
            f"model.trunk={folder} is not a run folder: it has no {CONFIG}; "
            f"a pretrained model is given as model={folder}"
        )
    theirs = checkpoints.read_config(folder)
    if theirs.horizon != 1:
        raise RunError(
            f"model.trunk={folder} was trained with horizon={theirs.horizon}; a trunk is a next-token model: make one "
            f"with preset=trunk (or preset=cpu-trunk,trunk)"
        )
    for key, mine, trunk in (
        ("size", config.size, theirs.size),
        ("model.family", config.model.family, theirs.model.family),
        ("data.tokenizer", config.data.tokenizer, theirs.data.tokenizer),
    ):
        if mine != trunk:
            raise RunError(f"model.trunk={folder} has {key}={trunk}, this run {key}={mine}; write {key}={trunk}")
    if theirs.corpus == config.corpus and theirs.data.release != config.data.release:
        raise RunError(
            f"model.trunk={folder} was trained with data.release={theirs.data.release}, and has read test text of "
            f"data.release={config.data.release}; write data.release={theirs.data.release}"
        )
    if theirs.data.context < config.data.context:
        raise RunError(
            f"model.trunk={folder} has data.context={theirs.data.context}; lower data.context={config.data.context}"
        )
    return checkpoints.load_model(folder)


def training_text(
    config: Config, corpus: Corpus, trunk: LanguageModel | None, say: Say = print
) -> tuple[Corpus, dict[str, Any]]:
    """(the corpus with the text that is trained on, where that text came from): its own, or the frozen model's.

    The setting is `data.text`; the second entry is {} where the text is the corpus itself.
    """
    if trunk is None or config.data.text == "corpus":
        return corpus, {}
    identity = {"corpus": corpus.describe()["sha256"], "trunk": Target.of(config).sha256}
    data = config.data
    writing = Writing(data.text, data.states, data.context, corpus.tokenizer, data.prompts)
    cache, wait = Path(data.cache), config.train.timeout
    split, written = written_text(trunk, corpus.train, writing, cache, identity, training_device(), say, wait)
    return replace(corpus, train=split), written


def draft_vocabulary(size: int, text: Corpus) -> DraftVocabulary:
    """The `size` most frequent tokens of what is trained on; all of a vocabulary that has fewer."""
    tokens, trained = text.train.tokens, text.train.trained
    return frequent_tokens(tokens if trained is None else tokens[trained], text.vocab_size, min(size, text.vocab_size))


def training_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_same_text(folder: Path, then: str, now: str) -> None:
    """RunError where the corpus is no longer the one that the run began with."""
    if then != now:
        raise RunError(
            f"{folder} was trained on other text: the corpus has changed since (sha256 {then[:12]} then, "
            f"{now[:12]} now); restore it, give this run name=OTHER, or delete the folder"
        )


def check_vocabulary(config: Config, corpus: Corpus | HubTokenizer, trunk: LanguageModel | None) -> None:
    """RunError where the frozen model and the tokenizer do not belong together."""
    if trunk is None:
        return
    target, own = Target.of(config), config.data.tokenizer == "model"
    if target.kind == "pretrained" and trunk.vocab_size < corpus.vocab_size:
        raise RunError(
            f"data.tokenizer={config.data.tokenizer} has {corpus.vocab_size} tokens, model={target.name} embeds "
            f"{trunk.vocab_size}: the tokenizer is another model's; "
            + (
                "put its own into its folder, or name it: data.tokenizer=hf:NAME"
                if own
                else "type data.tokenizer=model"
            )
        )
    if target.kind == "run" and isinstance(corpus, Corpus):
        stored = stored_tokenizer(Path(target.name) / checkpoints.TOKENIZER)
        theirs = stored.token_bytes() if stored is not None else np.zeros(trunk.vocab_size)  # of an old run: its size
        ours = corpus.tokenizer.token_bytes() if stored is not None else np.zeros(corpus.vocab_size)
        if not np.array_equal(theirs, ours):
            raise RunError(
                f"model.trunk={target.name} has another vocabulary ({trunk.vocab_size} tokens) than data.tokenizer="
                f"{config.data.tokenizer} on corpus={config.corpus} ({corpus.vocab_size} tokens); use the trunk's own "
                "data settings"
            )


def _check_memory(config: Config, vocab_size: int, trunk: LanguageModel | None) -> None:
    """ConfigError where the heads do not fit into memory, with their gradients and AdamW's two moments."""
    shape, parameters = HeadsConfig.of(config), math.inf
    if not shape.factors:
        return
    with torch.device("meta"), contextlib.suppress(RuntimeError, TypeError):  # of sizes beyond 64 bits
        body = trunk.trunk if trunk is not None else Trunk(build_body(config, vocab_size))
        parameters = sum(each.numel() for each in FactorHeads(body.width, vocab_size, shape).parameters())
    share = config.nodes * config.devices if config.parallel == "fsdp" else 1
    need, free = 16 * parameters / share, free_bytes(config.run_name)
    if need > free:
        raise ConfigError(
            f"rank={config.rank} horizon={config.horizon}: heads of {parameters / 1e9:.2f}B parameters take "
            f"{need / 2**30:.1f} GiB to train, and {free / 2**30:.1f} GiB are free; lower the rank, or give them "
            "model.map_rank"
        )


def _note_written(folder: Path, text_sha256: str) -> None:
    """Note which text of the model's own the run trains on. RunError where that is another than when it began: written
    again on another machine, it may be."""
    found = checkpoints.read_json(folder / INPUTS) or {}
    check_same_text(folder, found.get("text_sha256", text_sha256), text_sha256)
    if is_first_process() and "text_sha256" not in found:
        write_json(folder / INPUTS, found | {"text_sha256": text_sha256})


def _note_inputs(
    folder: Path, data_sha256: str, trunk_sha256: str, session: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Note what the run trains on, and return its sessions. RunError where text or frozen model changed since it began.

    A checkpoint holds neither of them, so a resumed run would mix two without a word.
    """
    found = checkpoints.read_json(folder / INPUTS) or {}
    sessions: list[dict[str, Any]] = found.get("sessions", [])
    check_same_text(folder, found.get("data_sha256", data_sha256), data_sha256)
    if (then := found.get("trunk_sha256", trunk_sha256)) != trunk_sha256:
        raise RunError(
            f"{folder} was trained on other weights: its trunk has changed since (sha256 {then[:12]} then, "
            f"{trunk_sha256[:12]} now); restore it, give this run name=OTHER, or delete the folder"
        )
    trained = (folder / checkpoints.TRAINED).is_file()
    if session is not None and not (trained and sessions):
        sessions = [*sessions, dict(session)]
    if is_first_process() and not (trained and found.get("sessions") == sessions):
        noted = {"sessions": sessions, "data_sha256": data_sha256, "trunk_sha256": trunk_sha256}
        write_json(folder / INPUTS, found | noted)
    return sessions
