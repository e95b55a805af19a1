"""Presets: named sets of settings for one cell; `preset=a,b` applies a, then b.

A profile, in experiments/profiles.py, is a list of cells.
"""

from typing import Any

Overrides = dict[str, Any]

_GPU: Overrides = {
    "data.tokenizer": "bpe:8192",
    "data.context": 512,
    "data.batch_rows": 64,
    "train.precision": "bf16-mixed",
    "loss.chunk_mib": 512,
    "optim.lr": 1e-3,
}
_GPU_HEADS: Overrides = {"optim.steps": 500, "optim.warmup": 50, "loss.joint_fraction": 0.25}
# A quarter of the positions trains the window, untied: the cheapest recipe that keeps 95 % of the drafts
# (results/benchmarks/training_recipes.json).
_LARGE: Overrides = {"train.precision": "bf16-mixed", "loss.joint_fraction": 0.25, "loss.chunk_mib": 512}
_FINEWEB: Overrides = {"corpus": "hf:HuggingFaceFW/fineweb-edu", "data.context": 2048, "rank": 8, "parallel": "fsdp"}

PRESETS: dict[str, Overrides] = {
    "none": {},
    # A next-token model: what heads are trained on, and the reference of equal training.
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
    "gpu-trunk": _GPU | {"size": "56m", "optim.steps": 1500, "optim.warmup": 150, "evaluate.rows": 400},
    "gpu-heads": _GPU | _GPU_HEADS | {"size": "56m"},
    "gpu-scratch": _GPU | _GPU_HEADS | {"size": "base"},
    # Heads on a pretrained model (model=NAME): 96k positions of text, tied to its own next-token head.
    "retrofit": {
        "data.tokenizer": "model",
        "data.states": 200_000,
        "data.batch_rows": 8,
        "model.tie_first": True,
        "loss.objective": "eq14",
        "loss.joint_fraction": 0.03125,
        "loss.draft_vocabulary": 8192,
        "decode.draft_vocabulary": 8192,
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
    # After retrofit, for millions of positions: every position of a row trains, against few tokens of the target. With
    # data.states=0 each state is used once.
    "many": {
        "data.batch_rows": 4,
        "loss.objective": "eq14",
        "loss.joint_fraction": 1.0,
        "loss.target_top": 32,
        "loss.normaliser_tokens": 512,
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
    # The paper's other sizes as far as they are known: heads on PyCodeGPT-110M and on Llama-8B. And a trunk of today's
    # kind: 1B parameters from scratch on 21G tokens. `experiments/plan.py` says what each would take.
    "pycodegpt": _LARGE
    | {
        "model.family": "pretrained",
        "model.trunk": "Daoguang/PyCodeGPT",
        "model.dtype": "bfloat16",
        "data.tokenizer": "model",
        "data.context": 1024,
        "data.batch_rows": 64,
        "optim.steps": 5000,
        "optim.lr": 1e-3,
        "optim.warmup": 200,
    },
    "llama8b": _LARGE
    | _FINEWEB
    | {
        "model.family": "pretrained",
        "model.trunk": "meta-llama/Llama-3.1-8B",
        "model.dtype": "bfloat16",
        "data.tokenizer": "model",
        "data.batch_rows": 64,
        "optim.steps": 10_000,
        "optim.lr": 5e-4,
        "optim.warmup": 500,
        "train.accumulate": 2,
    },
    "fineweb1b": _LARGE
    | _FINEWEB
    | {
        "size": "1b",
        "data.tokenizer": "bpe:32768",
        "data.batch_rows": 512,
        "optim.steps": 20_000,
        "optim.lr": 3e-4,
        "optim.warmup": 1000,
        "train.accumulate": 8,
    },
}
