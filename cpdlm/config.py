"""Every knob on one page.

A run is described by one `Config`: a few root dials that name the experiment and one group per stage, in the order
in which the data flows. Precedence, weakest first: defaults < preset < command line. This module imports no torch,
so that `--help` and every configuration error come before any slow import.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """The user's mistake: names the setting, the value, and what to type instead. Entry points exit 2 on it."""


def knob(default: Any, help: str) -> Any:
    """A dataclass field with a line of meaning for `--help`."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Size:
    """Shape of a trunk. `parameters` of the published layouts are asserted by a test."""

    layers: int
    width: int
    attention_heads: int
    feed_forward: int
    key_value_heads: int = 0  # 0: as many as attention heads


# `56m` has 56.3M parameters with an 8192-token vocabulary and tied embeddings (Llama family); the paper gives the
# parameter count of its TinyStories model, not its layout, so this layout is ours.
SIZES: dict[str, Size] = {
    "micro": Size(layers=2, width=64, attention_heads=2, feed_forward=176),
    "tiny": Size(layers=4, width=128, attention_heads=4, feed_forward=344),
    "small": Size(layers=4, width=256, attention_heads=4, feed_forward=688),
    "base": Size(layers=8, width=512, attention_heads=8, feed_forward=1376),
    "56m": Size(layers=12, width=576, attention_heads=9, feed_forward=1720),
    "1b": Size(layers=16, width=2048, attention_heads=32, feed_forward=8192, key_value_heads=8),
}

FAMILIES = ("llama", "gpt2", "pretrained")

CHOICES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "balance": ("switch", "kl", "bias", "none"),
    "anchor": ("none", "token", "blind"),
    "parallel": ("auto", "ddp", "fsdp"),
    "data.text": ("corpus", "greedy", "sampled"),
    "model.head": ("shared", "separate"),
    "model.dtype": ("float32", "bfloat16"),
    "loss.objective": ("joint", "eq14", "eq14-marginal", "acceptance", "log-acceptance", "blend"),
    "decode.draft": ("chain", "block", "tree", "window", "path"),
    "train.precision": ("32-true", "bf16-mixed", "bf16-true", "64-true"),
}


@dataclass
class DataConfig:
    tokenizer: str = knob(
        "bytes",
        "bytes | bpe:SIZE (trained on the corpus) | hf:NAME (a Hugging Face tokenizer) | model (a pretrained trunk's own)",
    )
    context: int = knob(256, "tokens in one training row")
    batch_rows: int = knob(4, "rows in one optimiser step, over all processes")
    max_bytes: int = knob(0, "bytes of text to take from the corpus, documents in hash order (0 = all)")
    cache: str = knob(".cache/cpdlm", "folder of downloaded packages and token arrays")
    bundle: str = knob("", "folder made by `./dev bundle`: take the tokens from it and download nothing")
    workers: int = knob(0, "data-loader worker processes")
    text: str = knob(
        "corpus",
        "what heads on a frozen model train on: corpus | greedy, sampled: data.states tokens that the model itself writes behind "
        "prompts of the corpus (written once and kept)",
    )
    processes: int = knob(0, "processes that read and tokenise a large corpus (0 = one per core)")
    states: int = knob(
        0,
        "tokens of training text whose hidden states under a frozen trunk are computed once and kept (0: none are; "
        "the trunk runs in every step); training then sees these tokens only",
    )
    states_gib: float = knob(8.0, "most GiB of disk that kept hidden states may take")


@dataclass
class ModelConfig:
    family: str = knob(
        "llama",
        "trunk: llama | gpt2, of the size above | a Hugging Face config.json, whose shape it then has | pretrained: that of "
        "model.trunk (model=NAME says both)",
    )
    trunk: str = knob(
        "",
        "what is frozen and is the target; only the heads train: folder of a finished run | with model.family=pretrained, a "
        "Hugging Face folder or name, a GGUF file, or smollm2",
    )
    dtype: str = knob("float32", "precision of a pretrained trunk: float32 | bfloat16")
    head: str = knob(
        "shared", "shared: a map per (component, position), one unembedding | separate: an unembedding each"
    )
    map_rank: int = knob(0, "rank of each map of head=shared (0 = full width x width)")
    map_hidden: int = knob(0, "hidden width of each map as a two-layer perceptron (0 = a linear map)")
    tie_first: bool = knob(
        False, "every component shares the next-token head, so that the draft's q_1 is the target's p_1"
    )
    tie_embeddings: bool = knob(True, "the unembedding is the input embedding")
    noise: float = knob(0.2, "size of the maps' random start relative to identity; tells equal components apart")
    anchor_width: int = knob(0, "hidden width of the anchor map (0 = width / 2)")
    adapter_layers: int = knob(
        0, "last layers of a frozen trunk that the draft has once more, with low-rank adapters (0 = none; needs peft)"
    )
    adapter_rank: int = knob(8, "rank of those adapters")
    anchor_normed: bool = knob(False, "the anchor sees h_t and the token's embedding at equal size")


@dataclass
class LossConfig:
    objective: str = knob(
        "joint",
        "what drafts on a frozen trunk train for: joint (the NLL) | eq14 | eq14-marginal | acceptance | log-acceptance | blend",
    )
    alpha: float = knob(0.9, "eq. 14: weight of the divergence from the target, against the text's own tokens")
    gamma: float = knob(1.0, "discount of each further token of the window (objectives other than joint at 1)")
    shortlist: int = knob(0, "the draft loss covers the N tokens that the training text uses most (0 = all)")
    joint_fraction: float = knob(1.0, "share of positions that train x_{t+2..t+n}; x_{t+1} always trains on all")
    chunk_mib: int = knob(32, "MiB of logits alive at once in the joint loss")
    balance_weight: float = knob(0.01, "weight of the balance loss (balance=switch or kl)")
    balance_rate: float = knob(0.001, "step of the gate's bias buffer (balance=bias)")


@dataclass
class OptimConfig:
    steps: int = knob(500, "optimiser steps")
    lr: float = knob(2e-3, "peak learning rate")
    warmup: int = knob(50, "steps of linear warm-up")
    floor: float = knob(0.1, "final learning rate, as a share of the peak (cosine decay)")
    weight_decay: float = knob(0.1, "AdamW weight decay, on matrices only")
    beta1: float = knob(0.9, "AdamW beta 1")
    beta2: float = knob(0.95, "AdamW beta 2")
    clip: float = knob(1.0, "largest gradient norm (0 = no clipping)")


@dataclass
class TrainConfig:
    precision: str = knob("32-true", "Lightning precision: 32-true | bf16-mixed | bf16-true | 64-true")
    accumulate: int = knob(1, "micro-batches per optimiser step; data.batch_rows is split among them")
    log_every: int = knob(20, "steps between logged metrics")
    validate_every: int = knob(200, "steps between validations")
    validation_rows: int = knob(32, "rows of the validation split per validation")
    decode_prompts: int = knob(0, "prompts of the validation split decoded at each validation (0 = none)")
    checkpoint_every: int = knob(200, "steps between checkpoints a killed run resumes from")
    sharded: bool = knob(False, "parallel=fsdp: a checkpoint is a folder to which every process writes its own part")
    recompute: bool = knob(False, "compute each trunk block again in the backward pass: less memory, a third more time")
    timeout: int = knob(1800, "seconds that processes wait for one another before they give up")


@dataclass
class EvaluateConfig:
    rows: int = knob(200, "rows of the test split for the likelihoods")
    batch_rows: int = knob(8, "rows per evaluation batch")


@dataclass
class DecodeConfig:
    prompts: int = knob(16, "prompts, drawn by hash from the test split")
    prompt_tokens: int = knob(64, "tokens of each prompt")
    new_tokens: int = knob(64, "tokens to write after each prompt")
    temperature: float = knob(1.0, "temperature of the sampling runs (greedy is always measured too)")
    top_k: int = knob(0, "keep the k likeliest tokens (0 = all)")
    top_p: float = knob(1.0, "keep the smallest set of tokens with this much probability")
    repeats: int = knob(5, "interleaved timed repeats")
    warmups: int = knob(3, "untimed repeats before them")
    draft: str = knob("chain", "how drafts are made: chain | block | tree | window | path")
    nodes: int = knob(8, "drafts of a tree, or width of the beam of window and path")
    shortlist: int = knob(0, "draft from the N tokens that the training text uses most (0 = all); the target keeps all")


@dataclass
class TrackingConfig:
    mlflow: bool = knob(True, "log to MLflow where it is installed")
    uri: str = knob("", "MLflow store (default: MLFLOW_TRACKING_URI, else sqlite:///OUTPUT/mlflow.db)")
    experiment: str = knob("cpdlm", "MLflow experiment")
    parent: str = knob("", "MLflow run id of the sweep this cell belongs to")


@dataclass
class Config:
    preset: str = knob("none", "named sets of overrides, applied in order before the command line: a or a,b")
    rank: int = knob(4, "components of the mixture (1 = independent heads)")
    horizon: int = knob(4, "tokens per window: the fixed one and horizon-1 drafts")
    size: str = knob("tiny", "trunk: " + " | ".join(SIZES))
    corpus: str = knob("code", "code | text | hf:NAME | a text file | a folder")
    seed: int = knob(0, "seed of weights, data order and decoding")
    balance: str = knob("switch", "keeps components in use: switch | kl | bias | none")
    anchor: str = knob(
        "none",
        "none: the paper's law | token: gate and factors 2..n also see x_{t+1} | blind: its control, sees h_t twice",
    )
    parallel: str = knob("auto", "auto | ddp | fsdp")
    devices: int = knob(1, "processes (GPUs, or CPU processes with gloo) on each machine")
    nodes: int = knob(1, "machines; more than one needs torchrun or srun on each")
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
        return self.model.tie_first or self.anchor != "none" or self.horizon == 1

    @property
    def target(self) -> str:
        """`common`: a frozen trunk's own next-token law; `own`: the model's eq. 11."""
        return "common" if self.model.trunk else "own"

    @property
    def is_pretrained(self) -> bool:
        """True where the frozen trunk is a model of others, not a run of ours."""
        return self.model.family == "pretrained"

    @property
    def run_name(self) -> str:
        if self.name:
            return self.name
        corpus = "".join(c if c.isalnum() else "-" for c in self.corpus).strip("-")
        tie = "-tied" if self.model.tie_first and self.anchor == "none" else ""
        hidden = f"-mlp{self.model.map_hidden}" if self.model.map_hidden else ""
        size = self.size if self.model.family in FAMILIES else Path(self.model.family).stem
        if self.is_pretrained:
            size = re.sub(r"[^a-z0-9]+", "-", Path(self.model.trunk).name.removesuffix(".gguf").lower()).strip("-")
        low = f"-low{self.model.map_rank}" if self.model.map_rank else ""
        aim = f"-{self.loss.objective}" if self.loss.objective != "joint" else ""
        if self.loss.alpha != LossConfig.alpha:
            aim += f"-a{self.loss.alpha:g}"
        if self.loss.gamma != LossConfig.gamma:
            aim += f"-g{self.loss.gamma:g}"
        anchor = self.anchor + (f"{self.model.anchor_width}" if self.model.anchor_width else "")
        text = f"-{self.data.text}" if self.data.text != "corpus" else ""
        adapters = f"-lora{self.model.adapter_layers}" if self.model.adapter_layers else ""
        distribution = f"{anchor}{tie}{hidden}{low}{adapters}{aim}{text}"
        return f"{corpus}-{size}-{self.target}-r{self.rank}-n{self.horizon}-{distribution}-s{self.seed}"


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
    "data.processes",
    "data.states_gib",
    "train.log_every",
    "train.validate_every",
    "train.checkpoint_every",
    "train.decode_prompts",
    "train.sharded",
    "train.recompute",
    "train.timeout",
)

# A preset is a set of overrides for one cell; `preset=a,b` applies a, then b. (A profile, in experiments/profiles.py, is a
# list of cells.)
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # A plain next-token model: what heads are trained on, and the reference of equal training.
    "trunk": {"horizon": 1, "rank": 1, "balance": "none"},
    # Seconds on two cores: shows that everything runs, measures nothing worth quoting.
    "smoke": {
        "size": "micro",
        "data.max_bytes": 1_000_000,
        "data.context": 128,
        "optim.steps": 60,
        "optim.warmup": 10,
        "train.validate_every": 30,
        "train.validation_rows": 8,
        "evaluate.rows": 32,
        "decode.prompts": 4,
        "decode.new_tokens": 32,
        "decode.prompt_tokens": 32,
        "decode.repeats": 3,
        "decode.warmups": 1,
    },
    # Minutes on two cores: bytes, a 3.2M-parameter trunk, then heads on it. (From scratch, the defaults serve.)
    "cpu-trunk": {"size": "small", "optim.steps": 2000, "optim.warmup": 100, "optim.lr": 1e-3},
    "cpu-heads": {
        "size": "small",
        "optim.steps": 400,
        "optim.warmup": 40,
        "optim.lr": 2e-3,
        "loss.joint_fraction": 0.5,
    },
    # Minutes on one GPU: the 56.3M-parameter layout on an 8192-token vocabulary.
    "gpu-trunk": {
        "size": "56m",
        "data.tokenizer": "bpe:8192",
        "data.context": 512,
        "data.batch_rows": 64,
        "train.precision": "bf16-mixed",
        "loss.chunk_mib": 512,
        "optim.steps": 1500,
        "optim.warmup": 150,
        "optim.lr": 1e-3,
        "evaluate.rows": 400,
    },
    "gpu-heads": {
        "size": "56m",
        "data.tokenizer": "bpe:8192",
        "data.context": 512,
        "data.batch_rows": 64,
        "train.precision": "bf16-mixed",
        "loss.chunk_mib": 512,
        "optim.steps": 500,
        "optim.warmup": 50,
        "optim.lr": 1e-3,
        "loss.joint_fraction": 0.25,
    },
    "gpu-scratch": {
        "size": "base",
        "data.tokenizer": "bpe:8192",
        "data.context": 512,
        "data.batch_rows": 64,
        "train.precision": "bf16-mixed",
        "loss.chunk_mib": 512,
        "optim.steps": 500,
        "optim.warmup": 50,
        "optim.lr": 1e-3,
        "loss.joint_fraction": 0.25,
    },
    # Heads for a model that exists already (model=NAME): 96k positions of text, tied to its own next-token head.
    "retrofit": {
        "data.tokenizer": "model",
        "data.states": 200_000,
        "data.batch_rows": 8,
        "model.tie_first": True,
        "model.anchor_normed": True,
        "loss.objective": "eq14",
        "loss.joint_fraction": 0.03125,
        "loss.shortlist": 8192,
        "decode.shortlist": 8192,
        "optim.steps": 1500,
        "optim.warmup": 50,
        "optim.lr": 1e-3,
        "train.validate_every": 500,
        "train.validation_rows": 4,
        "train.decode_prompts": 4,
        "evaluate.rows": 8,
        "evaluate.batch_rows": 2,
        "decode.prompts": 8,
        "decode.new_tokens": 48,
        "decode.repeats": 3,
        "decode.warmups": 1,
    },
    # The paper's own setting as far as it is known: from scratch, 56.3M parameters, TinyStories, separate heads.
    "paper": {
        "size": "56m",
        "corpus": "hf:roneneldan/TinyStories",
        "data.tokenizer": "bpe:8192",
        "data.context": 1024,
        "data.batch_rows": 64,
        "model.head": "separate",
        "optim.steps": 20_000,
        "optim.lr": 6e-4,
        "optim.warmup": 500,
        "train.precision": "bf16-mixed",
    },
    # The other sizes of the paper, as far as they are known, and a trunk of today's kind; `experiments/plan.py` says what
    # each would take. Heads on PyCodeGPT-110M and on Llama-8B, and 1B parameters from scratch on 21G tokens. A quarter of the positions
    # trains the window, untied: the cheapest way that keeps 95 % of the drafts (results/benchmarks/training_recipes.json).
    "pycodegpt": {
        "model.family": "pretrained",
        "model.trunk": "Daoguang/PyCodeGPT",
        "model.dtype": "bfloat16",
        "data.tokenizer": "model",
        "data.context": 1024,
        "data.batch_rows": 64,
        "optim.steps": 5000,
        "optim.lr": 1e-3,
        "optim.warmup": 200,
        "train.precision": "bf16-mixed",
        "loss.joint_fraction": 0.25,
        "loss.chunk_mib": 512,
    },
    "llama8b": {
        "corpus": "hf:HuggingFaceFW/fineweb-edu",
        "model.family": "pretrained",
        "model.trunk": "meta-llama/Llama-3.1-8B",
        "model.dtype": "bfloat16",
        "data.tokenizer": "model",
        "data.context": 2048,
        "data.batch_rows": 64,
        "rank": 8,
        "optim.steps": 10_000,
        "optim.lr": 5e-4,
        "optim.warmup": 500,
        "train.precision": "bf16-mixed",
        "train.accumulate": 2,
        "parallel": "fsdp",
        "loss.joint_fraction": 0.25,
        "loss.chunk_mib": 512,
    },
    "fineweb1b": {
        "size": "1b",
        "corpus": "hf:HuggingFaceFW/fineweb-edu",
        "data.tokenizer": "bpe:32768",
        "data.context": 2048,
        "data.batch_rows": 512,
        "rank": 8,
        "optim.steps": 20_000,
        "optim.lr": 3e-4,
        "optim.warmup": 1000,
        "train.precision": "bf16-mixed",
        "train.accumulate": 8,
        "parallel": "fsdp",
        "loss.joint_fraction": 0.25,
        "loss.chunk_mib": 512,
    },
}


def leaves(group: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> dataclass field, for every setting."""
    found: dict[str, Any] = {}
    template = group() if isinstance(group, type) else group
    for entry in fields(template):
        value = getattr(template, entry.name)
        if is_dataclass(value):
            found |= leaves(value, f"{prefix}{entry.name}.")
        else:
            found[prefix + entry.name] = entry
    return found


def parse(arguments: list[str]) -> Config:
    """`key=value` words -> a checked Config; raises ConfigError."""
    given: dict[str, str] = {}
    for word in arguments:
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{word}' is not a setting; write KEY=VALUE, for example rank=8 (--help lists them)")
        given |= {"model.trunk": value, "model.family": "pretrained"} if key == "model" else {key: value}
    return resolve(expand(given))


def expand(given: dict[str, Any]) -> dict[str, Any]:
    """The overrides of the named presets, in their order, then the given ones; raises ConfigError."""
    merged: dict[str, Any] = {}
    for name in str(given.get("preset", "none")).split(","):
        _one_of("preset", name, tuple(PRESETS))
        merged |= PRESETS[name]
    return merged | given


def resolve(overrides: dict[str, Any]) -> Config:
    """Dotted overrides on the defaults -> a checked Config; raises ConfigError."""
    known = leaves()
    merged: DictConfig = OmegaConf.structured(Config)
    for key, value in overrides.items():
        if key not in known:
            _unknown(key, tuple(known))
        try:
            # The value as YAML reads it, so that 3e-4 is a number on the command line as well.
            OmegaConf.update(merged, key, _read(value, known[key].type))
            OmegaConf.select(merged, key, throw_on_missing=True)  # an interpolation that leads nowhere raises here
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"{key}={value!r}: expected {known[key].type}; the default is {_default(known[key])!r}"
            ) from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check(config)
    # Not a rule of `check`: finished runs of before it are still read.
    if config.train.decode_prompts > config.decode.prompts:
        raise ConfigError(
            f"train.decode_prompts={config.train.decode_prompts} are more than decode.prompts={config.decode.prompts}; raise that"
        )
    return config


def _read(value: Any, kind: str) -> Any:
    if isinstance(value, str) and kind == "int" and value.replace("_", "").lstrip("+-").isdigit():
        return int(value)
    return value


def check(config: Config) -> None:
    """Cross-field rules; raises ConfigError naming the settings and their values."""
    values = flatten(config)
    for key, allowed in CHOICES.items():
        _one_of(key, values[key], allowed)
    if not config.model.family.endswith(".json"):
        _one_of("model.family", config.model.family, FAMILIES)
    elif not Path(config.model.family).is_file():
        raise ConfigError(
            f"model.family={config.model.family}: there is no such file; give a Hugging Face config.json, or one of "
            f"{', '.join(FAMILIES)}"
        )
    for key, least in {
        "rank": 1,
        "horizon": 1,
        "devices": 1,
        "nodes": 1,
        "train.timeout": 1,
        "data.processes": 0,
        "data.context": 2,
        "data.batch_rows": 1,
        "data.max_bytes": 0,
        "data.workers": 0,
        "data.states": 0,
        "model.adapter_layers": 0,
        "model.adapter_rank": 1,
        "loss.shortlist": 0,
        "train.decode_prompts": 0,
        "model.map_rank": 0,
        "model.map_hidden": 0,
        "model.anchor_width": 0,
        "loss.chunk_mib": 1,
        "optim.steps": 1,
        "optim.warmup": 0,
        "train.accumulate": 1,
        "train.log_every": 1,
        "train.validate_every": 1,
        "train.validation_rows": 1,
        "train.checkpoint_every": 1,
        "evaluate.rows": 1,
        "evaluate.batch_rows": 1,
        "decode.prompts": 1,
        "decode.prompt_tokens": 1,
        "decode.new_tokens": 1,
        "decode.top_k": 0,
        "decode.repeats": 1,
        "decode.nodes": 1,
        "decode.shortlist": 0,
        "decode.warmups": 0,
        "seed": 0,
    }.items():
        if values[key] < least:
            raise ConfigError(f"{key}={values[key]} is too small; the least is {least}")
    for key in ("model.noise", "loss.balance_weight", "loss.balance_rate", "optim.weight_decay", "optim.clip"):
        if not values[key] >= 0 or math.isinf(values[key]):
            raise ConfigError(f"{key}={values[key]} must be a number of at least 0")
    for key in ("loss.joint_fraction", "loss.gamma", "decode.top_p"):
        if not 0 < values[key] <= 1:
            raise ConfigError(f"{key}={values[key]} must lie in (0, 1]")
    for key in ("loss.alpha", "optim.floor", "optim.beta1", "optim.beta2"):
        if not 0 <= values[key] <= 1:
            raise ConfigError(f"{key}={values[key]} must lie in [0, 1]")
    if not 0 < config.optim.lr < math.inf:
        raise ConfigError(f"optim.lr={config.optim.lr} must be a positive number")
    if not 0 < config.decode.temperature < math.inf:
        raise ConfigError(
            f"decode.temperature={config.decode.temperature} must be positive (greedy is always measured)"
        )
    if config.horizon >= config.data.context:
        raise ConfigError(
            f"horizon={config.horizon} does not fit data.context={config.data.context}; lower the horizon"
        )
    if config.horizon == 1 and config.rank > 1:
        raise ConfigError(f"rank={config.rank} needs horizon of at least 2 (horizon={config.horizon} is a plain model)")
    if config.horizon == 1 and config.anchor != "none":
        raise ConfigError(f"anchor={config.anchor} needs horizon of at least 2 (horizon={config.horizon})")
    if config.model.map_rank and config.model.head == "separate":
        raise ConfigError(
            f"model.map_rank={config.model.map_rank} needs model.head=shared (model.head=separate has no maps)"
        )
    if config.model.map_hidden and (config.model.map_rank or config.model.head == "separate"):
        raise ConfigError(
            f"model.map_hidden={config.model.map_hidden} needs model.head=shared and model.map_rank=0 (here "
            f"model.head={config.model.head}, model.map_rank={config.model.map_rank}): a map is one thing"
        )
    if config.decode.shortlist and config.model.head == "separate":
        raise ConfigError(
            f"decode.shortlist={config.decode.shortlist} needs model.head=shared (model.head=separate has no unembedding in common)"
        )
    _check_frozen(config)
    if config.model.trunk and config.horizon == 1:
        raise ConfigError(
            f"model.trunk={config.model.trunk} needs horizon of at least 2 (horizon=1 has no heads to train)"
        )
    if config.train.sharded and config.parallel != "fsdp":
        raise ConfigError(
            f"train.sharded=true needs parallel=fsdp (parallel={config.parallel} has the whole model everywhere)"
        )
    if config.train.recompute and config.model.trunk:
        raise ConfigError(
            f"train.recompute=true: model.trunk={config.model.trunk} is frozen and keeps no activations; leave it out"
        )
    step_rows = config.nodes * config.devices * config.train.accumulate
    if config.data.batch_rows % step_rows:
        nodes = f"nodes={config.nodes} x " if config.nodes > 1 else ""
        raise ConfigError(
            f"data.batch_rows={config.data.batch_rows} does not divide into {nodes}devices={config.devices} x "
            f"train.accumulate={config.train.accumulate}; try data.batch_rows={step_rows * max(1, round(config.data.batch_rows / step_rows))}"
        )
    if config.decode.prompt_tokens + config.decode.new_tokens > config.data.context:
        raise ConfigError(
            f"decode.prompt_tokens={config.decode.prompt_tokens} + decode.new_tokens={config.decode.new_tokens} "
            f"exceed data.context={config.data.context}"
        )
    kind, _, size = config.data.tokenizer.partition(":")
    if not (
        config.data.tokenizer == "bytes"
        or (kind == "bpe" and size.isdigit() and int(size) >= 257)
        or (kind == "hf" and size)
        or (config.data.tokenizer == "model" and config.is_pretrained)
    ):
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r}: write bytes, bpe:SIZE with SIZE of at least 257, hf:NAME, or, with a "
            "pretrained trunk (model=NAME), model"
        )


def _check_frozen(config: Config) -> None:
    """What only heads on a frozen trunk can have, and what a pretrained one needs."""
    if config.is_pretrained and not config.model.trunk:
        raise ConfigError(
            "model.family=pretrained needs the model: type model=NAME (a Hugging Face folder or name, a GGUF file, smollm2)"
        )
    if config.is_pretrained and config.data.tokenizer != "model" and not config.data.tokenizer.startswith("hf:"):
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} is not the tokenizer of the pretrained model {config.model.trunk}; type "
            "data.tokenizer=model (preset=retrofit does)"
        )
    if config.model.dtype != "float32" and not config.is_pretrained:
        raise ConfigError(
            f"model.dtype={config.model.dtype} is for pretrained trunks (model=NAME); train.precision is for runs of ours"
        )
    asked = {
        f"loss.objective={config.loss.objective}": config.loss.objective != "joint",
        f"loss.gamma={config.loss.gamma}": config.loss.gamma != 1,
        f"loss.shortlist={config.loss.shortlist}": config.loss.shortlist > 0,
        f"data.states={config.data.states}": config.data.states > 0,
        f"data.text={config.data.text}": config.data.text != "corpus",
        f"model.adapter_layers={config.model.adapter_layers}": config.model.adapter_layers > 0,
    }
    for setting in [words for words, used in asked.items() if used]:
        if not config.model.trunk:
            raise ConfigError(
                f"{setting} is for heads on a frozen model: give model=NAME (a pretrained one) or model.trunk=RUN"
            )
        if config.model.head == "separate" and not setting.startswith("data."):
            raise ConfigError(f"{setting} needs model.head=shared (model.head=separate has unembeddings of its own)")
    if 0 < config.data.states < config.data.context:
        raise ConfigError(
            f"data.states={config.data.states} tokens are less than one row of data.context={config.data.context}; "
            "raise it, or type 0 to keep none"
        )
    if config.data.text != "corpus" and not config.data.states:
        raise ConfigError(f"data.text={config.data.text} needs data.states: how many tokens the model shall write")
    if not 0 < config.data.states_gib < math.inf:
        raise ConfigError(f"data.states_gib={config.data.states_gib} must be a positive number")
    if config.model.adapter_layers and config.parallel == "fsdp":
        raise ConfigError(
            f"model.adapter_layers={config.model.adapter_layers} is not for parallel=fsdp; type parallel=auto"
        )
    if config.train.decode_prompts and config.parallel == "fsdp":
        raise ConfigError(
            f"train.decode_prompts={config.train.decode_prompts} needs whole weights; parallel=fsdp shards them: type 0"
        )
    if config.train.decode_prompts and config.horizon == 1:
        raise ConfigError(f"train.decode_prompts={config.train.decode_prompts}: horizon=1 drafts nothing; type 0")


def flatten(config: Config) -> dict[str, Any]:
    """Dotted name -> value, in the order of the page."""
    values: dict[str, Any] = {}
    for key in leaves():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        values[key] = value
    return values


def but_rank(config: Config) -> dict[str, Any]:
    """Every setting but the rank and the name of the run: cells that agree in them differ in rank only."""
    return {key: value for key, value in flatten(config).items() if key not in ("rank", "name")}


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted name."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionary, as saved with a run and in its record."""
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def from_dict(plain: dict[str, Any]) -> Config:
    """The Config that `to_dict` wrote; raises ConfigError on a foreign one."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(f"this configuration was written by another version: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    check(config)
    return config


def as_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def help_text(program: str) -> str:
    """The page that `--help` prints: every setting with type, default and a line of meaning."""
    lines = [
        f"usage: {program} [KEY=VALUE ...] [--print-config] [--help]",
        "model=NAME is short for model.trunk=NAME model.family=pretrained: a Hugging Face folder or name, a GGUF file, smollm2.",
        "",
        "One cell: train, evaluate, decode, write one record. Later words win; a preset is applied first.",
        "presets: " + ", ".join(PRESETS),
        "",
    ]
    for key, entry in leaves().items():
        lines.append(f"  {key + '=' + str(_default(entry)):<36} {entry.type:<6} {entry.metadata['help']}")
    return "\n".join(lines)


def _default(entry: Any) -> Any:
    return entry.default


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        guess = f"; did you mean {key}={near[0]}?" if near else ""
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(allowed)}{guess}")


def _unknown(key: str, known: tuple[str, ...]) -> NoReturn:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        near = [name for name in known if name.split(".")[-1] == key][:1]
    guess = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"unknown setting '{key}'{guess} (--help lists them all)")
