"""The arms of the star: cells that differ from one base cell along one or two dials.

The base cell has heads of rank 4 and horizon 4 on one frozen code trunk. Every cell of a comparison has the same steps,
rows and data order; only the dial under study differs. First the arms for two cores, then those for one GPU.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from experiments.suite import RANKS, SEEDS, Cell, controls, heads, scratch, trunk

# Steps that rank 1 takes in the wall-clock time of rank 8's 400 (heads) and 500 (from scratch), by measured step times;
# the latter has a tenth to spare. The verdict checks the times of the records.
HEADS_TIME_OF_RANK_8, SCRATCH_TIME_OF_RANK_8 = 1140, 1350
JOINTS_TIME_OF_RANK_8 = 800  # of 400
BALANCES: dict[str, dict[str, Any]] = {
    "switch0.001": {"loss.balance_weight": 0.001},
    "switch0.1": {"loss.balance_weight": 0.1},
    "kl": {"balance": "kl"},
    "bias": {"balance": "bias"},
    "unbalanced": {"balance": "none"},
}
# Ten times the steps, at the rate that validation text prefers (results/LOG.md).
LONG: dict[str, Any] = {
    "optim.steps": 5000,
    "optim.warmup": 200,
    "optim.lr": 4e-3,
    "train.precision": "bf16-mixed",
    "data.release": 2,
}
LONG_TIME_OF_RANK_8 = 12_000  # of 5000
FRESH: dict[str, Any] = {"data.release": 1, "decode.prompts": 32, "decode.repeats": 1, "decode.warmups": 1}
# On a GPU a token of a small model takes as long as on a core: decoding would take most of the time otherwise.
GPU_DECODING = {"decode.prompts": 8, "decode.repeats": 3, "decode.warmups": 1}
TIMING = {"optim.steps": 40, "optim.warmup": 10, "train.validate_every": 40, "evaluate.rows": 8}


def _code() -> Cell:
    return trunk("code", "cpu-trunk,trunk")


def _base(rank: int, seed: int, **dials: Any) -> Cell:
    """Heads on the code trunk. dials: of `heads`."""
    return heads(_code(), rank, "cpu-heads", seed=seed, **dials)


# --- from scratch ----------------------------------------------------------------------------------------------------


def ranks_from_scratch() -> list[Cell]:
    """Rank, from scratch, beside the next-token model of equal training. The target is the model's own."""
    return [
        cell for seed in SEEDS for cell in (trunk("code", "trunk", seed), *(scratch(rank, seed=seed) for rank in RANKS))
    ]


def scratch_for_equal_time() -> list[Cell]:
    """Rank 1 from scratch, for the training time of rank 8."""
    rank_one = [replace(scratch(1, seed=seed), reference=None) for seed in SEEDS]
    return [cell.varied("time8", {"optim.steps": SCRATCH_TIME_OF_RANK_8}) for cell in rank_one]


def longer_from_scratch() -> list[Cell]:
    """Rank, from scratch, trained ten times as long, beside the next-token model of equal training; rank 1 also for
    the training time of rank 8."""
    cells = []
    for seed in SEEDS:
        next_token = trunk("code", "trunk", seed).varied("long", FRESH | LONG)
        models = [replace(scratch(rank, seed=seed), reference=next_token) for rank in RANKS]
        longer = FRESH | LONG | {"optim.steps": LONG_TIME_OF_RANK_8}
        cells += [next_token, *(model.varied("long", FRESH | LONG) for model in models)]
        cells.append(replace(models[0], reference=None).varied("long-time8", longer))
    return cells


def timings() -> list[Cell]:
    """Cost of a training step from scratch and of a draft: few steps, each cell alone on all cores."""
    brief = {"size": "small"} | TIMING | {"decode.prompts": 8, "decode.new_tokens": 48}
    return _timed("none", "trunk", brief, RANKS)


def _timed(preset: str, reference: str, brief: dict[str, Any], ranks: Iterable[int]) -> list[Cell]:
    cells = []
    for seed in SEEDS:
        next_token = trunk("code", reference, seed).varied("timing", brief, folder="C8", alone=True)
        timed = (replace(scratch(rank, preset, seed=seed), reference=next_token) for rank in ranks)
        cells += [next_token, *(cell.varied("timing", brief, folder="C8", alone=True) for cell in timed)]
    return cells


# --- heads on a frozen trunk -----------------------------------------------------------------------------------------


def ranks() -> list[Cell]:
    """Rank, on one frozen trunk: the base cell among them."""
    return [_base(rank, seed) for seed in SEEDS for rank in RANKS]


def corpora() -> list[Cell]:
    """Rank, on text instead of code."""
    text = trunk("text", "cpu-trunk,trunk")
    return [heads(text, rank, "cpu-heads", seed=seed) for seed in SEEDS for rank in RANKS]


def horizons() -> list[Cell]:
    """Horizon by rank; horizon 4 is `ranks`."""
    return [_base(rank, seed, horizon=horizon) for horizon in (2, 8) for seed in SEEDS for rank in RANKS]


def anchors() -> list[Cell]:
    """Token-conditioned drafts by rank, and rank-1 controls of equal parameters."""
    return [
        cell
        for seed in SEEDS
        for cell in (
            *(_base(rank, seed, link="first") for rank in (1, 4, 8)),
            *controls(_code(), seed),
        )
    ]


def joints() -> list[Cell]:
    """What rank is worth by joint, at horizon 8: CP, HMM, and either with a link to the token before.

    Wide drafts, components as offsets from one base; beside them rank 1 for rank 8's time.
    """
    wide = {"model.draft_width": 4.0, "model.draft_normed": True, "model.component_rank": 32}
    cells = []
    for seed in SEEDS:
        for link in ("first", "all"):
            one, eight = (
                replace(_base(rank, seed, horizon=8, link=link), folder="joints").varied("wide", wide)
                for rank in (1, 8)
            )
            cells += [one, eight, eight.varied("hmm", {"joint": "hmm"})]
            cells.append(one.varied("time8", {"optim.steps": JOINTS_TIME_OF_RANK_8}))
    return cells


def heads_for_equal_time() -> list[Cell]:
    """Rank 1, for the training time of rank 8."""
    return [_base(1, seed).varied("time8", {"optim.steps": HEADS_TIME_OF_RANK_8}) for seed in SEEDS]


def seeds() -> list[Cell]:
    """Eight seeds of heads of ranks 1 and 8, on code and text; on code rank 1 for rank 8's training time, too.

    As many as show a difference of 2.5 % in speed; on another split of the text, which no choice was made on.
    """
    cells = []
    for corpus in ("code", "text"):
        target = trunk(corpus, "cpu-trunk,trunk").varied("release1", {"data.release": 1})
        for seed in range(8):
            one, eight = (
                heads(target, rank, "cpu-heads", seed=seed).varied("release1", FRESH, folder="seeds") for rank in (1, 8)
            )
            longer = one.varied("time8", {"optim.steps": HEADS_TIME_OF_RANK_8})
            cells += [one, eight] + [longer] * (corpus == "code")
    return cells


def unembeddings() -> list[Cell]:
    """An unembedding for every component and position, as in the paper's from-scratch models, not a shared one."""
    return [_base(4, seed).varied("separate", {"model.head": "separate"}) for seed in SEEDS]


def balances() -> list[Cell]:
    """What keeps the components in use, at rank 8; the Switch loss at 0.01 is `ranks`."""
    return [_base(8, seed).varied(word, each, folder="C5") for seed in SEEDS for word, each in BALANCES.items()]


def sizes() -> list[Cell]:
    """Trunks of 0.1M to 25M parameters by rank; size small is `ranks`."""
    # Named apart: size tiny also has a next-token model of another training.
    trunks = [_code().varied("trunk", {"size": size}) for size in ("micro", "tiny", "base")]
    return [
        replace(heads(target, rank, "cpu-heads", seed=seed), folder="C7")
        for target in trunks
        for seed in SEEDS
        for rank in (1, 4)
    ]


def lengths() -> list[Cell]:
    """A quarter of and four times the training of the heads, by rank; they also decode as they train."""
    return [
        _base(rank, seed).varied(f"steps{steps}", {"optim.steps": steps, "train.decode_prompts": 4}, folder="C7")
        for steps in (100, 1600)
        for seed in SEEDS
        for rank in (1, 4)
    ]


def vocabularies() -> list[Cell]:
    """Byte-pair tokens instead of bytes, by rank; levels are compared in bits per byte."""
    target = _code().varied("bpe1024", {"data.tokenizer": "bpe:1024"})
    return [
        heads(target, rank, "cpu-heads", seed=seed).varied("bpe1024", folder="C7") for seed in SEEDS for rank in (1, 4)
    ]


# --- one GPU ---------------------------------------------------------------------------------------------------------


def gpu_ranks() -> list[Cell]:
    """Rank, on one frozen trunk of the size that needs a GPU."""
    target = trunk("code", "gpu-trunk,trunk")
    return [_decoded_on_gpu(heads(target, rank, "gpu-heads")) for rank in RANKS]


def gpu_from_scratch() -> list[Cell]:
    """Rank, from scratch, beside the next-token model of equal training."""
    reference = _decoded_on_gpu(trunk("code", "gpu-scratch,trunk"))
    cells = [_decoded_on_gpu(scratch(rank, "gpu-scratch")) for rank in RANKS]
    return [reference, *(replace(cell, reference=reference) for cell in cells)]


def gpu_timings() -> list[Cell]:
    """Cost of a training step of rank 8 and of a draft."""
    return _timed(
        "gpu-scratch", "gpu-scratch,trunk", {"size": "56m"} | TIMING | GPU_DECODING | {"decode.prompts": 4}, (8,)
    )


def _decoded_on_gpu(cell: Cell) -> Cell:
    return replace(cell, overrides=cell.overrides | GPU_DECODING)
