"""The experiments, as data: what each profile runs. Commands, tests and the report read this one list.

A profile is a list of cells; a cell is a set of overrides for `experiments/run.py` and the folder of its record. Cells
on a common target name the cell that trains their trunk. Every cell of a comparison has the same steps, rows and data
order; only the dial under study differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpdlm.config import Config, expand, resolve

RANKS = (1, 2, 4, 8)
# Hidden units of rank-1 perceptron maps with the parameters, and with the FLOPs, of rank 8 (size small, bytes, n=4).
SMALL_CONTROLS = (1024, 1924)


@dataclass(frozen=True)
class Cell:
    """One run. folder: where its record lies under results/. trunk: the cell whose frozen trunk it uses. reference: the
    next-token model of equal training, beside which it is timed."""

    folder: str
    overrides: dict[str, Any] = field(default_factory=dict)
    trunk: Cell | None = None
    reference: Cell | None = None

    def config(self, output: str) -> Config:
        """The resolved config of this cell, with all its files under `output`."""
        return resolve(expand(self.settings(output)))

    def settings(self, output: str) -> dict[str, Any]:
        """What is typed after `python experiments/run.py`."""
        settings = dict(self.overrides) | {"output": output}
        if self.trunk is not None:
            settings["model.trunk"] = str(Path(output) / self.trunk.config(output).run_name)
        return settings

    def words(self, output: str) -> list[str]:
        return [f"{key}={_word(value)}" for key, value in self.settings(output).items()]


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


def heads(target: Cell, rank: int, preset: str, *, horizon: int = 4, anchor: str = "none", tied: bool = False,
          hidden: int = 0, seed: int = 0) -> Cell:  # fmt: skip
    """Heads on a frozen trunk: every rank has the same target law. hidden: width of perceptron maps (0: linear maps)."""
    folder = "beyond" if anchor != "none" or tied or hidden else "C3" if horizon == 4 else "horizon"
    dials = _dials(target.overrides["corpus"], rank, preset, horizon, anchor, tied, seed)
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


def _dials(
    corpus: str, rank: int, preset: str, horizon: int, anchor: str, tied: bool, seed: int
) -> dict[str, Any]:  # fmt: skip
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


def cpu_full() -> list[Cell]:
    code, text = trunk("code", "cpu-trunk,trunk"), trunk("text", "cpu-trunk,trunk")
    cells = [code, text]
    for seed in range(3):
        cells += [
            trunk("code", "trunk", seed),
            *(heads(code, rank, "cpu-heads", seed=seed) for rank in RANKS),
            *(scratch("code", rank, seed=seed) for rank in RANKS),
            *(heads(text, rank, "cpu-heads", seed=seed) for rank in RANKS),
            *(heads(code, rank, "cpu-heads", anchor="token", seed=seed) for rank in RANKS),
            *controls(code, "cpu-heads", hidden=SMALL_CONTROLS, seed=seed),
            *(scratch("code", rank, anchor="token", seed=seed) for rank in RANKS),
        ]
        if seed == 0:
            cells += [
                *(heads(code, rank, "cpu-heads", tied=True) for rank in RANKS),
                *(heads(text, rank, "cpu-heads", anchor="token") for rank in (1, 8)),
                *(heads(code, 4, "cpu-heads", horizon=horizon) for horizon in (2, 8)),
            ]
    return cells


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
            "data.batch_rows": self.rows, "loss.joint_fraction": fraction, "optim.steps": steps, "train.validate_every": steps,
        } | self.more  # fmt: skip


CPU_SCREEN, CPU_GRID = Effort(30_000, 64), Effort(150_000, 64)
_GPU = {"loss.chunk_mib": 256, "train.validation_rows": 16, "train.checkpoint_every": 1000, "evaluate.rows": 32}
GPU_SCREEN = Effort(30_000, 128, label="screen", more=_GPU | {"train.validate_every": 78, "decode.repeats": 1})
GPU_GRID = Effort(150_000, 256, more=_GPU | {"train.validate_every": 195})
GPU_LONG = Effort(
    1_500_000, 512, rows=16, label="long", more=_GPU | {"train.validate_every": 976, "data.states": 800_000}
)


def retrofitted(corpus: str, rank: int, effort: Effort, *, anchor: str = "none", objective: str = CHOSEN, tied: bool = True,
                hidden: int = 0, seed: int = 0, folder: str = "C6", **more: Any) -> Cell:  # fmt: skip
    """Heads on SmolLM2-135M-Instruct, tied to its own next-token head unless said otherwise. hidden: units of perceptron maps.

    more: further settings, a dot written as two underscores.
    """
    overrides = {
        "preset": "retrofit", "model.trunk": "smollm2", "model.family": "pretrained", "model.dtype": "bfloat16",
        "corpus": corpus, "data.max_bytes": 8_000_000, "rank": rank, "anchor": anchor, "loss.objective": objective,
        "seed": seed, "train.decode_prompts": 16, "evaluate.rows": 4, "decode.prompts": 16, "decode.repeats": 2,
    } | effort.settings()  # fmt: skip
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


def ranks(effort: Effort) -> list[Cell]:
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
    return ranks(CPU_GRID)


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
        *ranks(GPU_GRID),
        *(retrofitted("code", rank, GPU_GRID, anchor="token", **part) for part in parts for rank in (1, 4)),
        *objectives(GPU_SCREEN),
        *(retrofitted("code", 4, GPU_SCREEN, anchor="token", folder="C6-screen", **dial) for dial in dials),
    ]


# --- one GPU ---------------------------------------------------------------------------------------------------------


def gpu() -> list[Cell]:
    code = trunk("code", "gpu-trunk,trunk")
    return [
        code,
        *(heads(code, rank, "gpu-heads") for rank in RANKS),
        *(heads(code, rank, "gpu-heads", anchor="token") for rank in RANKS),
        trunk("code", "gpu-scratch,trunk"),
        *(scratch("code", rank, "gpu-scratch") for rank in RANKS),
    ]


def paper() -> list[Cell]:
    """From scratch on TinyStories at 56.3M parameters, equal steps per rank; needs a hub and a large GPU."""
    cells = []
    for seed in range(3):
        plain = Cell("trunks", {"preset": "paper,trunk", "seed": seed})
        cells += [plain, *(Cell("C1", {"preset": "paper", "rank": r, "seed": seed}, reference=plain) for r in RANKS)]
    return cells


PROFILES = {
    "smoke": smoke, "cpu": cpu, "cpu-full": cpu_full, "retrofit-screen": retrofit_screen, "retrofit": retrofit, "gpu": gpu,
    "retrofit-gpu": retrofit_gpu, "paper": paper,
}  # fmt: skip


def decode_groups(cells: list[Cell], output: str) -> list[Group]:
    """Cells of the same corpus, horizon, seed and kind of target; their reference where it is one of `cells`. Those on a
    pretrained model, which are many, by folder as well."""
    names = {cell.config(output).run_name for cell in cells}
    groups: dict[tuple[Any, ...], Group] = {}
    for cell in cells:
        config = cell.config(output)
        if config.horizon > 1:
            folder = cell.folder if config.is_pretrained else ""
            key = (config.corpus, config.target, config.model.trunk, config.size, config.horizon, config.seed, folder)
            reference = cell.reference
            if reference is not None and reference.config(output).run_name not in names:
                reference = None
            groups.setdefault(key, Group([], reference)).cells.append(cell)
    return list(groups.values())
