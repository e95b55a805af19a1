"""The settings of a run: dataclasses, one per stage, in the order in which the data flows."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from cpdlm.config.sizes import SIZES


class ConfigError(ValueError):
    """The user's mistake: names the setting, the value, and what to type instead. Entry points exit 2 on it."""


MOST = 2**31 - 1  # of a count, where nothing else is said


def knob(default: Any, help: str, *, least: int | None = None, most: int = MOST, within: str = "") -> Any:
    """A dataclass field with a line of meaning for `--help`.

    least, most: of an int. within: of a float, a key of WITHIN.
    """
    return field(default=default, metadata={"help": help, "least": least, "most": most, "within": within})


WITHIN: dict[str, Callable[[float], bool]] = {
    "[0, 1]": lambda value: 0 <= value <= 1,
    "[0, 1)": lambda value: 0 <= value < 1,
    "(0, 1]": lambda value: 0 < value <= 1,
    "(0, 64]": lambda value: 0 < value <= 64,
    "(0, inf)": lambda value: 0 < value < math.inf,
    # What float32 can still multiply by itself.
    "[0, 1e6]": lambda value: 0 <= value <= 1e6,
    "(0, 1e6]": lambda value: 0 < value <= 1e6,
    "[1e-6, 1e6]": lambda value: 1e-6 <= value <= 1e6,
}


FAMILIES = ("llama", "gpt2", "pretrained")

CHOICES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "balance": ("switch", "kl", "bias", "none"),
    "joint": ("cp", "hmm"),
    "link": ("none", "first", "all", "blind"),
    "parallel": ("auto", "ddp", "fsdp"),
    "data.text": ("corpus", "greedy", "sampled"),
    "data.prompts": ("windows", "functions", "conversations", "starts"),
    "model.head": ("shared", "separate"),
    "model.dtype": ("float32", "bfloat16"),
    "loss.objective": ("joint", "eq14", "eq14-marginal", "acceptance", "log-acceptance", "blend"),
    "decode.draft": (
        *("chain", "block", "tree", "branched", "window", "path"),
        *("lookup", "lookup+chain", "lookup+block", "lookup+tree", "lookup+branched"),
    ),
    "train.precision": ("32-true", "bf16-mixed", "64-true"),
}


@dataclass
class DataConfig:
    tokenizer: str = knob(
        "bytes",
        "bytes | bpe:SIZE (trained on the corpus) | hf:NAME (a Hugging Face tokenizer) | model (that of a pretrained "
        "trunk)",
    )
    context: int = knob(256, "tokens in one training row", least=2)
    batch_rows: int = knob(4, "rows in one optimiser step, over all processes", least=1)
    column: str = knob("", "corpus=hf:NAME: column of text (default: text, content, story, document, the only one)")
    skip_broken: bool = knob(False, "corpus=FILE.jsonl: leave out lines that are no conversation, and say how many")
    max_bytes: int = knob(
        0,
        "bytes of text to take from the corpus, documents in hash order (0 = all; of hf:NAME 200 MB)",
        least=0,
        most=2**63 - 1,
    )
    release: int = knob(
        0, "which documents are held out (of a held-out package: which rows and prompts)", least=0, most=8
    )
    cache: str = knob(".cache/cpdlm", "folder of downloaded packages and token arrays")
    bundle: str = knob("", "folder made by `./dev bundle`: take the tokens from it and download nothing")
    workers: int = knob(0, "data-loader worker processes", least=0, most=1024)
    text: str = knob(
        "corpus",
        "what heads on a frozen model train on: corpus | greedy, sampled: data.states tokens that the model itself "
        "writes after prompts of the corpus (written once and kept)",
    )
    prompts: str = knob(
        "windows",
        "what data.text=greedy or sampled goes on from: windows of the train split | functions: signature and "
        "docstring of Python functions | conversations: up to an answer | starts: a document's first tokens; "
        "but for windows, only what the model writes is trained on",
    )
    states: int = knob(
        0,
        "tokens of training text whose hidden states under a frozen trunk are computed once and kept (0: none are; "
        "the trunk runs in every step); training then sees these tokens only",
        least=0,
        most=2**63 - 1,
    )
    states_gib: float = knob(8.0, "most GiB of disk that kept hidden states may take", within="(0, inf)")


@dataclass
class ModelConfig:
    family: str = knob(
        "llama",
        "trunk: llama | gpt2, of the size above | pretrained: that of model.trunk (model=NAME says both)",
    )
    trunk: str = knob(
        "",
        "the frozen target; only the heads train: folder of a finished run | with model.family=pretrained, a Hugging "
        "Face folder or name, a GGUF file, or smollm2",
    )
    dtype: str = knob("float32", "precision of a pretrained trunk: float32 | bfloat16")
    head: str = knob(
        "shared", "shared: a map per (component, position), one unembedding | separate: an unembedding each"
    )
    map_rank: int = knob(0, "rank of each map of head=shared (0 = full width x width)", least=0)
    map_hidden: int = knob(0, "hidden width of each map as a two-layer perceptron (0 = a linear map)", least=0)
    tie_first: bool = knob(
        False, "every component shares the next-token head, so that the draft's q_1 is the target's p_1"
    )
    tie_embeddings: bool = knob(True, "the unembedding is the input embedding")
    noise: float = knob(
        0.2, "size of the maps' random start relative to identity; tells equal components apart", within="[0, 1e6]"
    )
    component_rank: int = knob(
        0, "components are offsets of that rank from one map per position (0 = each has a map of its own)", least=0
    )
    draft_width: float = knob(
        4.0,
        "hidden width of the map through which a draft sees x_{t+1} (link=first or all), as a multiple of the trunk's",
        within="(0, 64]",
    )
    draft_normed: bool = knob(True, "that map sees h_t and the token's embedding at equal size")
    link_width: int = knob(256, "inner width of link=all", least=1)


@dataclass
class LossConfig:
    objective: str = knob(
        "joint",
        "what drafts on a frozen trunk train for: joint (the NLL) | eq14 (KL + CE) | eq14-marginal | acceptance | "
        "log-acceptance | blend",
    )
    alpha: float = knob(
        0.9, "eq. 14: weight of the divergence from the target, against the text's own tokens", within="[0, 1]"
    )
    gamma: float = knob(
        1.0, "discount of each further token of the window (objectives other than joint at 1)", within="(0, 1]"
    )
    draft_vocabulary: int = knob(
        0, "the draft loss covers the N tokens that the training text uses most (0 = all)", least=0
    )
    target_top: int = knob(
        0,
        "objectives other than joint see the target as this many tokens, the text's own and the likeliest, and the "
        "rest as one (0 = all)",
        least=0,
    )
    normaliser_tokens: int = knob(
        0,
        "with target_top: about how many of the other tokens the draft's normaliser is estimated from (0 = all, exact)",
        least=0,
    )
    joint_fraction: float = knob(
        1.0, "share of positions that train x_{t+2..t+n}; x_{t+1} always trains on all", within="(0, 1]"
    )
    chunk_mib: int = knob(32, "MiB of logits alive at once in the joint loss", least=1)
    balance_weight: float = knob(0.01, "weight of the balance loss (balance=switch or kl)", within="[0, 1e6]")
    balance_rate: float = knob(0.001, "step of the gate's bias buffer (balance=bias)", within="[0, 1e6]")


@dataclass
class OptimConfig:
    steps: int = knob(500, "optimiser steps", least=1)
    lr: float = knob(2e-3, "peak learning rate", within="(0, 1e6]")
    warmup: int = knob(50, "steps of linear warm-up", least=0)
    floor: float = knob(0.1, "final learning rate, as a share of the peak (cosine decay)", within="[0, 1]")
    weight_decay: float = knob(0.1, "AdamW weight decay, on matrices only", within="[0, 1e6]")
    beta1: float = knob(0.9, "AdamW beta 1", within="[0, 1)")
    beta2: float = knob(0.95, "AdamW beta 2", within="[0, 1)")
    clip: float = knob(1.0, "largest gradient norm (0 = no clipping)", within="[0, 1e6]")


@dataclass
class TrainConfig:
    precision: str = knob("32-true", "Lightning precision: 32-true | bf16-mixed | 64-true")
    accumulate: int = knob(1, "micro-batches per optimiser step; data.batch_rows is split among them", least=1)
    log_every: int = knob(20, "steps between logged metrics", least=1)
    validate_every: int = knob(200, "steps between validations", least=1)
    validation_rows: int = knob(32, "rows of the validation split per validation", least=1)
    decode_prompts: int = knob(0, "prompts of the validation split decoded at each validation (0 = none)", least=0)
    checkpoint_every: int = knob(200, "steps between checkpoints a killed run resumes from", least=1)
    sharded: bool = knob(False, "parallel=fsdp: a checkpoint is a folder to which every process writes its own part")
    recompute: bool = knob(False, "compute each trunk block again in the backward pass: less memory, a third more time")
    timeout: int = knob(1800, "seconds that processes wait for one another before they give up", least=1)


@dataclass
class EvaluateConfig:
    rows: int = knob(200, "rows of the test split for the likelihoods", least=1)
    batch_rows: int = knob(8, "rows per evaluation batch", least=1)


@dataclass
class DecodeConfig:
    prompts: int = knob(16, "prompts, drawn by hash from the test split", least=1)
    prompt_tokens: int = knob(64, "tokens of each prompt", least=1)
    new_tokens: int = knob(64, "tokens to write after each prompt", least=1)
    temperature: float = knob(1.0, "of the sampling runs (greedy is always measured too)", within="[1e-6, 1e6]")
    top_k: int = knob(0, "keep the k likeliest tokens (0 = all)", least=0)
    top_p: float = knob(1.0, "keep the smallest set of tokens with this much probability", within="(0, 1]")
    repeats: int = knob(5, "interleaved timed repeats", least=1)
    warmups: int = knob(3, "untimed repeats before them", least=0)
    active: int = knob(
        0, "components that a draft evaluates, the heaviest of the gate at each position (0 = all)", least=0
    )
    draft: str = knob(
        "chain",
        "how drafts are made: chain | block | tree | branched | window | path | lookup (copied from the text) | "
        "lookup+chain | lookup+block | lookup+tree | lookup+branched (copied where the text repeats itself, else the "
        "heads')",
    )
    nodes: int = knob(8, "drafts of a tree, or width of the beam of window and path", least=1)
    draft_vocabulary: int = knob(
        0, "draft from the N tokens that the training text uses most (0 = all); the target keeps all", least=0
    )


@dataclass
class TrackingConfig:
    mlflow: bool = knob(True, "log to MLflow where it is installed")
    uri: str = knob("", "MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///OUTPUT/mlflow.db)")
    experiment: str = knob("cpdlm", "MLflow experiment")
    parent: str = knob("", "MLflow run id of the sweep this cell belongs to")


@dataclass
class Config:
    preset: str = knob("none", "named sets of overrides, applied in order before the command line: a or a,b")
    rank: int = knob(4, "components of the mixture (1 = independent heads)", least=1)
    horizon: int = knob(4, "tokens per window: the pending token and horizon-1 drafts", least=1)
    size: str = knob("tiny", "trunk: " + " | ".join(SIZES))
    corpus: str = knob(
        "code", "code | text | wiki | chat | hf:NAME | a text file | FILE.jsonl: conversations | a folder"
    )
    seed: int = knob(0, "seed of weights, data order and decoding", least=0, most=2**32 - 1)
    balance: str = knob("switch", "keeps components in use: switch | kl | bias | none")
    joint: str = knob(
        "cp", "cp: the paper's mixture | hmm: its component may change between tokens, with transitions seen by h_t"
    )
    link: str = knob(
        "none",
        "none: the paper's distribution | first: token-conditioned draft, gate and factors 2..n also see x_{t+1} | "
        "all: and each of them the token before it, a mixture of Markov chains | blind: control of first, h_t twice",
    )
    parallel: str = knob("auto", "auto | ddp | fsdp")
    devices: int = knob(1, "processes (GPUs, or CPU processes with gloo) on each machine", least=1)
    nodes: int = knob(1, "machines; more than one needs torchrun or srun on each", least=1)
    name: str = knob("", "name of the run (default: made from the dials)")
    output: str = knob("runs", "folder that receives the run, its record and the MLflow store")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def first_is_tied(self) -> bool:
        """True where x_{t+1} has one next-token head and the mixture covers x_{t+2..t+n} only."""
        return self.model.tie_first or self.link != "none" or self.horizon == 1

    @property
    def frozen(self) -> Literal["self", "run", "pretrained"]:
        """What is frozen: nothing (a self target), a run of this program, or a pretrained model."""
        if self.model.family == "pretrained":
            return "pretrained"
        return "run" if self.model.trunk else "self"

    @property
    def target(self) -> str:
        """`common`: a shared frozen target, the trunk's next-token distribution; `own`: a self target, eq. 11."""
        return "own" if self.frozen == "self" else "common"

    @property
    def is_pretrained(self) -> bool:
        """True where the frozen trunk is a pretrained model, not a run of this project."""
        return self.frozen == "pretrained"

    @property
    def run_name(self) -> str:
        """`name`, or one made from the settings that tell runs apart."""
        if self.name:
            return self.name
        corpus = self.corpus
        if Path(corpus).is_absolute():  # the rest of it says where, and is not for others
            corpus = f"{Path(corpus).name}-{hashlib.sha256(corpus.encode()).hexdigest()[:4]}"
        corpus = "".join(c if c.isalnum() else "-" for c in corpus).strip("-")
        tie = "-tied" if self.model.tie_first and self.link == "none" else ""
        hidden = f"-mlp{self.model.map_hidden}" if self.model.map_hidden else ""
        size = self.size
        if self.is_pretrained:
            size = re.sub(r"[^a-z0-9]+", "-", Path(self.model.trunk).name.removesuffix(".gguf").lower()).strip("-")
        low = f"-low{self.model.map_rank}" if self.model.map_rank else ""
        objective = f"-{self.loss.objective}" if self.loss.objective != "joint" else ""
        if self.loss.objective.startswith("eq14") and self.loss.alpha != LossConfig.alpha:
            objective += f"-a{self.loss.alpha:g}"
        if self.loss.gamma != LossConfig.gamma:
            objective += f"-g{self.loss.gamma:g}"
        if self.loss.target_top:
            objective += f"-top{self.loss.target_top}"
        offsets = f"-off{self.model.component_rank}" if self.model.component_rank else ""
        joint = f"-{self.joint}" if self.joint != "cp" else ""
        link = {"first": "token", "all": "link"}.get(self.link, self.link)
        if self.link != "none" and self.model.draft_width != 0.5:
            link += f"-w{self.model.draft_width:g}"
        text = f"-{self.data.text}" if self.data.text != "corpus" else ""
        if self.data.prompts != "windows":
            text += f"-{self.data.prompts}"
        draft = f"{link}{joint}{tie}{hidden}{low}{offsets}{objective}{text}"
        return f"{corpus}-{size}-{self.target}-r{self.rank}-n{self.horizon}-{draft}-s{self.seed}"


# Settings that say where, when or how a run is watched, not what it computes (prefixes of dotted names).
INCIDENTAL = (
    "tracking.",
    "output",
    "name",
    "preset",
    "parallel",
    "devices",
    "nodes",
    "data.cache",
    "data.bundle",
    "data.workers",
    "data.states_gib",
    "train.log_every",
    "train.validate_every",
    "train.checkpoint_every",
    "train.decode_prompts",
    "train.sharded",
    "train.recompute",
    "train.timeout",
)


@functools.cache
def leaves() -> dict[str, Any]:
    """Dotted name -> dataclass field, for every setting."""
    return _leaves(Config(), "")


def _leaves(group: Any, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in fields(group):
        value = getattr(group, entry.name)
        found |= _leaves(value, f"{prefix}{entry.name}.") if is_dataclass(value) else {prefix + entry.name: entry}
    return found


def flatten(config: Config) -> dict[str, Any]:
    """Dotted name -> value, in the order of the page."""
    return {key: attrgetter(key)(config) for key in leaves()}


def but_rank(config: Config) -> dict[str, Any]:
    """Every setting but the rank and the name of the run: cells that agree in them differ in rank only."""
    return {key: value for key, value in flatten(config).items() if key not in ("rank", "name")}


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted name."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
