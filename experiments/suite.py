"""The experiments, as data: the cells that answer each claim, and the profiles. Commands, tests and docs read this one list.

A cell is a set of overrides for `experiments/run.py` and the folder of its record; cells on a common target name the
cell that trains their trunk. The claims are a star, not a product: one base cell (heads of rank 4, horizon 4, on one frozen
code trunk) and arms along one or two dials from it. Every cell of a comparison has the same steps, rows and data order;
only the dial under study differs. What a claim asks and how it is judged is in `experiments/claims/verdicts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from cpdlm.config import Config, but_rank, expand, flatten, resolve
from experiments.claims import verdicts

RANKS = (1, 2, 4, 8)
SEEDS = (0, 1, 2)
SEED = r"-s\d+$"  # the end of a run's name
# Hidden units of rank-1 perceptron maps with the parameters, and with the FLOPs, of rank 8 (size small, bytes, n=4).
SMALL_CONTROLS = (1024, 1924)


@dataclass(frozen=True)
class Cell:
    """One run. folder: where its record lies under results/. trunk: the cell whose frozen trunk it uses. reference: the
    next-token model of equal training, beside which it is timed. alone: its training is timed, so nothing runs beside it."""

    folder: str
    overrides: dict[str, Any] = field(default_factory=dict)
    trunk: Cell | None = None
    reference: Cell | None = None
    alone: bool = False

    @cached_property
    def name(self) -> str:
        """Of the run and of its record."""
        return self.config("runs").run_name

    @cached_property
    def setting(self) -> str:
        """The cell without its seed."""
        values = {key: value for key, value in flatten(self.config("runs")).items() if key not in ("seed", "name")}
        return f"{self.folder} {re.sub(SEED, '', self.name)} {values}"

    @cached_property
    def but_rank(self) -> str:
        """What it is apart from its rank."""
        return str(but_rank(self.config("runs")))

    def varied(self, word: str, **overrides: Any) -> Cell:
        """This cell with other overrides ("." written as "__"), and a word for them in its name."""
        settings = {key.replace("__", "."): value for key, value in overrides.items()}
        plain = replace(self, overrides=self.overrides | settings)
        return replace(plain, overrides=plain.overrides | {"name": re.sub(SEED, rf"-{word}\g<0>", plain.name)})

    def config(self, output: str) -> Config:
        """The resolved config of this cell, with all its files under `output`."""
        return _resolved(tuple(self.settings(output).items()))

    def settings(self, output: str) -> dict[str, Any]:
        """What is typed after `python experiments/run.py`."""
        settings = dict(self.overrides) | {"output": output}
        if self.trunk is not None:
            settings["model.trunk"] = str(Path(output) / self.trunk.name)
        return settings

    def words(self, output: str) -> list[str]:
        return [f"{key}={_word(value)}" for key, value in self.settings(output).items()]


@lru_cache(maxsize=4096)
def _resolved(settings: tuple[tuple[str, Any], ...]) -> Config:
    return resolve(expand(dict(settings)))


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Group:
    """Cells whose decoders are timed side by side in one process, and their reference."""

    cells: list[Cell]
    reference: Cell | None


def trunk(corpus: str, preset: str, seed: int = 0) -> Cell:
    """A plain next-token model: the common target, and the equal-training reference of the from-scratch cells."""
    return Cell("trunks", {"preset": preset, "corpus": corpus} | ({"seed": seed} if seed else {}))


def heads(
    target: Cell,
    rank: int,
    preset: str,
    *,
    horizon: int = 4,
    anchor: str = "none",
    tied: bool = False,
    hidden: int = 0,
    seed: int = 0,
) -> Cell:
    """Heads on a frozen trunk: every rank has the same target law. hidden: width of perceptron maps (0: linear maps)."""
    folder = "beyond" if anchor != "none" or tied or hidden else "C3" if horizon == 4 else "horizon"
    dials = _dials(target.overrides["corpus"], rank, preset, horizon, anchor, tied, seed)
    dials |= {key: target.overrides[key] for key in ("size", "data.tokenizer") if key in target.overrides}
    return Cell(folder, dials | ({"model.map_hidden": hidden} if hidden else {}), target)


def scratch(corpus: str, rank: int, preset: str = "none", *, anchor: str = "none", seed: int = 0) -> Cell:
    """Trunk and heads trained together: the target is the model's own, another one for every rank."""
    folder = "C1" if anchor == "none" else "beyond"
    reference = trunk(corpus, "trunk" if preset == "none" else f"{preset},trunk", seed)
    return Cell(folder, _dials(corpus, rank, preset, 4, anchor, False, seed), reference=reference)


def controls(target: Cell, preset: str, *, hidden: tuple[int, int], seed: int = 0) -> list[Cell]:
    """Rank 1 with as many parameters, or with as many FLOPs per draft, as what it is held against.

    The anchor: the same map, blind to the token. Rank 8: perceptron maps with hidden[0] units (its parameters) or
    hidden[1] units (its FLOPs); anchored rank 8: anchored, hidden[0]. A test holds the numbers to it.
    """
    return [
        heads(target, 1, preset, anchor="blind", seed=seed),
        *(heads(target, 1, preset, hidden=width, seed=seed) for width in hidden),
        heads(target, 1, preset, anchor="token", hidden=hidden[0], seed=seed),
    ]


def _dials(corpus: str, rank: int, preset: str, horizon: int, anchor: str, tied: bool, seed: int) -> dict[str, Any]:
    """Only what differs from the defaults is typed."""
    overrides: dict[str, Any] = {} if preset == "none" else {"preset": preset}
    overrides |= {"corpus": corpus, "rank": rank, "horizon": horizon, "anchor": anchor, "seed": seed}
    return overrides | ({"model.tie_first": True} if tied else {})


# --- two cores -------------------------------------------------------------------------------------------------------


def smoke() -> list[Cell]:
    code = trunk("code", "smoke,trunk")
    return [
        code,
        *(heads(code, rank, "smoke") for rank in (1, 4)),
        heads(code, 4, "smoke", anchor="token"),
        *(scratch("code", rank, "smoke") for rank in (1, 4)),
    ]


def cpu() -> list[Cell]:
    code, text = trunk("code", "cpu-trunk,trunk"), trunk("text", "cpu-trunk,trunk")
    return [
        code,
        text,
        *(heads(code, rank, "cpu-heads") for rank in RANKS),
        *(heads(code, rank, "cpu-heads", anchor="token") for rank in RANKS),
        *controls(code, "cpu-heads", hidden=SMALL_CONTROLS)[:2],
        trunk("code", "trunk"),
        *(scratch("code", rank) for rank in RANKS),
        *(heads(text, rank, "cpu-heads") for rank in (1, 8)),
        *(heads(code, 4, "cpu-heads", horizon=horizon) for horizon in (2, 8)),
    ]


# --- the star on two cores: an arm per dial ---------------------------------------------------------------------------

# Steps that rank 1 takes in the wall-clock of rank 8's 400 (heads) and 500 (from scratch), by the step times of the first
# records, the latter with a tenth to spare: equal wall-clock beside equal steps. The verdict checks the times of its records.
HEADS_TIME_OF_RANK_8, SCRATCH_TIME_OF_RANK_8 = 1140, 1350
BALANCES: dict[str, dict[str, Any]] = {
    "switch0.001": {"loss.balance_weight": 0.001},
    "switch0.1": {"loss.balance_weight": 0.1},
    "kl": {"balance": "kl"},
    "bias": {"balance": "bias"},
    "unbalanced": {"balance": "none"},
}


def _code() -> Cell:
    return trunk("code", "cpu-trunk,trunk")


def ranks_from_scratch() -> list[Cell]:
    """Rank, from scratch: the target is the model's own. Beside them the next-token model of equal training."""
    return [
        c for seed in SEEDS for c in (trunk("code", "trunk", seed), *(scratch("code", r, seed=seed) for r in RANKS))
    ]


def scratch_for_equal_time() -> list[Cell]:
    steps = SCRATCH_TIME_OF_RANK_8
    rank_one = [replace(scratch("code", 1, seed=seed), reference=None) for seed in SEEDS]
    return [cell.varied("time8", optim__steps=steps) for cell in rank_one]


def ranks() -> list[Cell]:
    """Rank, on one frozen trunk: the base cell among them."""
    return [heads(_code(), rank, "cpu-heads", seed=seed) for seed in SEEDS for rank in RANKS]


def corpora() -> list[Cell]:
    text = trunk("text", "cpu-trunk,trunk")
    return [heads(text, rank, "cpu-heads", seed=seed) for seed in SEEDS for rank in RANKS]


def horizons() -> list[Cell]:
    """Horizon by rank; horizon 4 is `ranks`."""
    return [heads(_code(), r, "cpu-heads", horizon=n, seed=seed) for n in (2, 8) for seed in SEEDS for r in RANKS]


def anchors() -> list[Cell]:
    """The anchor by rank, and rank-1 controls of equal parameters."""
    return [
        cell
        for seed in SEEDS
        for cell in (
            *(heads(_code(), rank, "cpu-heads", anchor="token", seed=seed) for rank in (1, 4, 8)),
            *controls(_code(), "cpu-heads", hidden=SMALL_CONTROLS, seed=seed)[:2],
            heads(_code(), 1, "cpu-heads", anchor="token", hidden=SMALL_CONTROLS[0], seed=seed),
        )
    ]


def heads_for_equal_time() -> list[Cell]:
    steps = HEADS_TIME_OF_RANK_8
    return [heads(_code(), 1, "cpu-heads", seed=seed).varied("time8", optim__steps=steps) for seed in SEEDS]


def unembeddings() -> list[Cell]:
    """An unembedding for every component and position, as in the paper's from-scratch models, instead of a shared one."""
    return [heads(_code(), 4, "cpu-heads", seed=seed).varied("separate", model__head="separate") for seed in SEEDS]


def balances() -> list[Cell]:
    """What keeps the components in use, at rank 8; the Switch loss at 0.01 is `ranks`."""
    return [
        _moved(heads(_code(), 8, "cpu-heads", seed=seed), "C5", word, overrides)
        for seed in SEEDS
        for word, overrides in BALANCES.items()
    ]


def sizes() -> list[Cell]:
    """Trunks of 0.1M to 25M parameters by rank; size small is `ranks`."""
    trunks = [_sized(size) for size in ("micro", "tiny", "base")]
    return [_in("C7", heads(target, r, "cpu-heads", seed=s)) for target in trunks for s in SEEDS for r in (1, 4)]


def lengths() -> list[Cell]:
    """A quarter of and four times the training of the heads, by rank; they also decode as they train."""
    return [
        _moved(
            heads(_code(), rank, "cpu-heads", seed=seed),
            "C7",
            f"steps{steps}",
            {"optim.steps": steps, "train.decode_prompts": 4},
        )
        for steps in (100, 1600)
        for seed in SEEDS
        for rank in (1, 4)
    ]


def vocabularies() -> list[Cell]:
    """Byte-pair tokens instead of bytes, by rank; levels are compared in bits per byte."""
    target = replace(_code(), overrides=_code().overrides | {"data.tokenizer": "bpe:1024"}).varied("bpe1024")
    return [
        _moved(heads(target, rank, "cpu-heads", seed=seed), "C7", "bpe1024", {}) for seed in SEEDS for rank in (1, 4)
    ]


def timings() -> list[Cell]:
    """Cost of a training step from scratch and of a draft: few steps, each cell alone on all cores."""
    brief = {
        "size": "small",
        "optim.steps": 40,
        "optim.warmup": 10,
        "train.validate_every": 40,
        "evaluate.rows": 8,
        "decode.prompts": 8,
        "decode.new_tokens": 48,
    }
    return _timed("none", "trunk", brief, RANKS)


def _timed(preset: str, reference: str, brief: dict[str, Any], ranks: Iterable[int]) -> list[Cell]:
    cells = []
    for seed in SEEDS:
        plain = _moved(trunk("code", reference, seed), "C8", "timing", brief, alone=True)
        timed = (replace(scratch("code", rank, preset, seed=seed), reference=plain) for rank in ranks)
        cells += [plain, *(_moved(cell, "C8", "timing", brief, alone=True) for cell in timed)]
    return cells


def _sized(size: str) -> Cell:
    target = replace(_code(), overrides=_code().overrides | {"size": size})
    return target.varied("trunk")  # size tiny also has a next-token model of another training


def _in(folder: str, cell: Cell) -> Cell:
    return replace(cell, folder=folder)


def _moved(cell: Cell, folder: str, word: str, overrides: dict[str, Any], alone: bool = False) -> Cell:
    varied = replace(cell, overrides=cell.overrides | overrides).varied(word)
    return replace(varied, folder=folder, alone=alone)


# --- a model that exists already -------------------------------------------------------------------------------------

OBJECTIVES = ("joint", "eq14", "eq14-marginal", "acceptance", "log-acceptance", "blend")
CHOSEN = "eq14"  # on the validation split; results/LOG.md tells how
CONTEXT = 256  # tokens of a training row
WIDE = ((1, 1152), (4, 288))  # perceptron maps with the parameters of linear rank 4: (rank, hidden units)


@dataclass(frozen=True)
class Effort:
    """How heads on a pretrained model are trained: `positions` in all, `each` of them a step, out of `rows` rows.

    more: settings of the machine. label: ends the names of its cells, where a profile has several efforts.
    """

    positions: int
    each: int
    rows: int = 8
    label: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        steps = -(-self.positions // self.each)
        fraction = self.each / (self.rows * CONTEXT)
        return {
            "data.batch_rows": self.rows,
            "loss.joint_fraction": fraction,
            "optim.steps": steps,
            "train.validate_every": max(1, steps // 6),
        } | self.more


# On two cores decoding would take longer than training otherwise.
CPU_SCREEN = Effort(30_000, 64, more={"decode.repeats": 1})
CPU_GRID = Effort(150_000, 64, more={"train.decode_prompts": 4, "decode.repeats": 1})
CPU_LONG = Effort(600_000, 256, label="long", more=CPU_GRID.more)
_GPU = {"loss.chunk_mib": 256, "train.validation_rows": 16, "train.checkpoint_every": 1000, "evaluate.rows": 32}
GPU_SCREEN = Effort(30_000, 128, label="screen", more=_GPU | {"train.validate_every": 78, "decode.repeats": 1})
GPU_GRID = Effort(150_000, 256, more=_GPU | {"train.validate_every": 195})
GPU_LONG = Effort(
    1_500_000, 512, rows=16, label="long", more=_GPU | {"train.validate_every": 976, "data.states": 800_000}
)


def retrofitted(
    corpus: str,
    rank: int,
    effort: Effort,
    *,
    anchor: str = "none",
    objective: str = CHOSEN,
    tied: bool = True,
    hidden: int = 0,
    seed: int = 0,
    folder: str = "C6",
    **more: Any,
) -> Cell:
    """Heads on SmolLM2-135M-Instruct, tied to its own next-token head unless said otherwise. hidden: units of perceptron maps.

    more: further settings, a dot written as two underscores.
    """
    overrides = {
        "preset": "retrofit",
        "model.trunk": "smollm2",
        "model.family": "pretrained",
        "model.dtype": "bfloat16",
        "corpus": corpus,
        "data.max_bytes": 8_000_000,
        "rank": rank,
        "anchor": anchor,
        "loss.objective": objective,
        "seed": seed,
        "train.decode_prompts": 16,
        "evaluate.rows": 4,
        "decode.prompts": 16,
        "decode.repeats": 2,
    } | effort.settings()
    overrides |= {} if tied else {"model.tie_first": False}
    overrides |= {"model.map_hidden": hidden} if hidden else {}
    overrides |= {key.replace("__", "."): value for key, value in more.items()}
    cell = Cell(folder, overrides)
    if effort.label:
        cell.overrides["name"] = f"{cell.config('').run_name}-{effort.label}"
    return cell


def objectives(effort: Effort) -> list[Cell]:
    return [
        retrofitted("code", 4, effort, objective=objective, anchor=anchor, folder="C6-screen")
        for objective in OBJECTIVES
        for anchor in ("token", "none")
    ]


def retrofit_ranks(effort: Effort) -> list[Cell]:
    """Does rank pay on a frozen model? Ranks, anchors and texts; a second seed; untied; perceptrons of equal size."""
    return [
        *(
            retrofitted(corpus, rank, effort, anchor=anchor)
            for corpus in ("code", "text")
            for anchor in ("token", "none")
            for rank in RANKS
        ),
        *(retrofitted("code", rank, effort, anchor="token", seed=1) for rank in (1, 4)),
        *(retrofitted("code", rank, effort, tied=False, folder="C6-untied") for rank in (1, 4)),
        *(retrofitted("code", rank, effort, anchor="token", hidden=hidden) for rank, hidden in WIDE),
    ]


def retrofit_screen() -> list[Cell]:
    """Which objective."""
    return objectives(CPU_SCREEN)


def retrofit() -> list[Cell]:
    """The grid; whether four times the training changes what rank is worth; text that the model wrote itself."""
    longer = [retrofitted("code", rank, CPU_LONG, anchor="token", folder="C6-long") for rank in (1, 4)]
    own = retrofitted("code", 1, CPU_GRID, anchor="token", folder="C6-greedy", data__text="greedy")
    return [*retrofit_ranks(CPU_GRID), *longer, own]


def retrofit_gpu() -> list[Cell]:
    """All of it, and: constants of eq. 14, low-rank maps, wide anchors, adapters, the model's own text, longer training."""
    dials: tuple[dict[str, Any], ...] = (
        {"loss__alpha": 0.0},
        {"loss__alpha": 0.5},
        {"loss__alpha": 1.0},
        {"loss__gamma": 0.7},
    )
    parts: tuple[dict[str, Any], ...] = (
        {"model__map_rank": 64},
        {"model__anchor_width": 1024},
        {"model__adapter_layers": 4},
    )
    return [
        *(
            retrofitted(corpus, rank, GPU_LONG, anchor="token", folder="C6-long")
            for corpus in ("code", "text")
            for rank in (1, 4)
        ),
        *(
            retrofitted("code", rank, GPU_GRID, anchor="token", folder=f"C6-{text}", data__text=text)
            for text in ("greedy", "sampled")
            for rank in (1, 4)
        ),
        *retrofit_ranks(GPU_GRID),
        *(retrofitted("code", rank, GPU_GRID, anchor="token", **part) for part in parts for rank in (1, 4)),
        *objectives(GPU_SCREEN),
        *(retrofitted("code", 4, GPU_SCREEN, anchor="token", folder="C6-screen", **dial) for dial in dials),
    ]


# --- one GPU ---------------------------------------------------------------------------------------------------------


# Of the 25 minutes decoding takes half, since a token of a small model costs a GPU as much as a core.
GPU_DECODING = {"decode.prompts": 8, "decode.repeats": 3, "decode.warmups": 1}


def _gpu(cell: Cell) -> Cell:
    return replace(cell, overrides=cell.overrides | GPU_DECODING)


def gpu_ranks() -> list[Cell]:
    return [_gpu(heads(trunk("code", "gpu-trunk,trunk"), rank, "gpu-heads")) for rank in RANKS]


def gpu_from_scratch() -> list[Cell]:
    plain = _gpu(trunk("code", "gpu-scratch,trunk"))
    return [plain, *(replace(_gpu(scratch("code", rank, "gpu-scratch")), reference=plain) for rank in RANKS)]


def gpu_timings() -> list[Cell]:
    brief = {
        "size": "56m",
        "optim.steps": 40,
        "optim.warmup": 10,
        "train.validate_every": 40,
        "evaluate.rows": 8,
        "decode.prompts": 4,
        "decode.repeats": 3,
        "decode.warmups": 1,
    }
    return _timed("gpu-scratch", "gpu-scratch,trunk", brief, (8,))


def gpu() -> list[Cell]:
    return study("all", "gpu")


def paper() -> list[Cell]:
    """From scratch on TinyStories at 56.3M parameters, equal steps per rank; needs a hub and a large GPU."""
    cells = []
    for seed in SEEDS:
        plain = Cell("trunks", {"preset": "paper,trunk", "seed": seed})
        cells += [plain, *(Cell("C1", {"preset": "paper", "rank": r, "seed": seed}, reference=plain) for r in RANKS)]
    return cells


# --- the claims ------------------------------------------------------------------------------------------------------

Arm = Callable[[], list[Cell]]


@dataclass(frozen=True)
class Study:
    """The arms that answer a claim: on two cores, and at the size that needs a GPU (none: measured on the CPU alone)."""

    id: str
    cpu: tuple[Arm, ...]
    gpu: tuple[Arm, ...] = ()

    @property
    def claim(self) -> verdicts.Claim:
        """Question, statistic and rule."""
        return next(claim for claim in verdicts.CLAIMS if claim.id == self.id)


STUDIES = (
    Study("C1", (ranks_from_scratch, scratch_for_equal_time), (gpu_from_scratch,)),
    Study("C2", (ranks_from_scratch,), (gpu_from_scratch,)),
    Study("C3", (ranks, corpora, horizons, heads_for_equal_time, anchors, unembeddings), (gpu_ranks,)),
    Study("C4", (ranks, corpora, horizons), (gpu_ranks,)),
    Study("C5", (ranks, balances)),
    Study("C6", (retrofit,)),
    Study("C7", (ranks, corpora, sizes, lengths, vocabularies)),
    Study("C8", (timings,), (gpu_timings,)),
)
SCALES = ("cpu", "gpu")


def study(claim: str, scale: str = "cpu") -> list[Cell]:
    """The cells of one claim, or of `all` (C6 apart: it rests on a model of others and has a profile, retrofit). Trunks and
    references come first, since others wait for them."""
    chosen = [each for each in STUDIES if claim == each.id or (claim == "all" and each.id != "C6")]
    assert chosen, claim
    return complete(cell for each in chosen for arm in (each.cpu if scale == "cpu" else each.gpu) for cell in arm())


def complete(cells: Iterable[Cell]) -> list[Cell]:
    """Every cell once, with the trunks and references that they need before them."""
    found: dict[str, Cell] = {}
    needed: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.name, cell)
        needed |= {each.name: each for each in (cell.trunk, cell.reference) if each is not None}
    return [*needed.values(), *(cell for name, cell in found.items() if name not in needed)]


def cpu_full() -> list[Cell]:
    return study("all")


PROFILES = {
    "smoke": smoke,
    "cpu": cpu,
    "cpu-full": cpu_full,
    "retrofit-screen": retrofit_screen,
    "retrofit": retrofit,
    "gpu": gpu,
    "retrofit-gpu": retrofit_gpu,
    "paper": paper,
}


def group_key(cell: Cell, output: str) -> tuple[Any, ...]:
    """Cells that share it are timed side by side: the same prompts, horizon, seed, trunk and kind of target. Those on a
    pretrained model, which are many, by folder as well."""
    config = cell.config(output)
    return (
        config.corpus,
        config.data.tokenizer,
        config.target,
        config.model.trunk,
        config.size,
        config.horizon,
        config.seed,
        repr(config.decode),
        cell.folder if config.is_pretrained else "",
    )


def mates(cell: Cell, cells: Iterable[Cell]) -> set[str]:
    """Names of the cells that differ from this one in rank only: they must be timed beside it (itself among them)."""

    return {other.name for other in cells if other.but_rank == cell.but_rank}


def decode_groups(cells: list[Cell], output: str) -> list[Group]:
    """Cells that are timed side by side, rank 1 of the paper's law first; their reference where it is one of `cells`."""
    names = {cell.name for cell in cells}
    members: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if cell.config(output).horizon > 1:
            members.setdefault(group_key(cell, output), []).append(cell)
    groups = []
    for group in members.values():
        group.sort(key=lambda cell: (cell.config(output).first_is_tied, cell.config(output).rank))
        references = [cell.reference for cell in group if cell.reference is not None and cell.reference.name in names]
        groups.append(Group(group, references[0] if references else None))
    return groups
