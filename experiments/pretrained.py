"""Arms on a model that exists already: heads on frozen SmolLM2-135M-Instruct."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from experiments.suite import RANKS, SEEDS, Cell

OBJECTIVES = ("joint", "eq14", "eq14-marginal", "acceptance", "log-acceptance", "blend")
CHOSEN = "eq14"  # on the validation split; results/LOG.md tells how
CONTEXT = 256  # tokens of a training row
WIDE = ((1, 1152), (4, 288))  # perceptron maps with the parameters of linear rank 4: (rank, hidden units)
BASE = {
    "preset": "retrofit",
    "model.trunk": "smollm2",
    "model.family": "pretrained",
    "model.dtype": "bfloat16",
    "data.max_bytes": 8_000_000,
    "loss.objective": CHOSEN,
    "train.decode_prompts": 16,
    "data.release": 1,
    "evaluate.rows": 128,
    "decode.prompts": 16,
    "decode.repeats": 2,
}

OWN = {
    "preset": "retrofit,many",
    "data.max_bytes": 0,
    "data.text": "sampled",
    "data.prompts": "functions",
    "data.states": 393_216,
    "model.draft_width": 4.0,
    "model.component_rank": 32,
}


@dataclass(frozen=True)
class Effort:
    """How heads are trained: on `positions` in all, `each` of them a step, out of `rows` rows.

    more: settings of the machine. label: ends the names of its cells, where a profile has several efforts.
    """

    positions: int
    each: int
    rows: int = 8
    label: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        steps = -(-self.positions // self.each)
        return {
            "data.batch_rows": self.rows,
            "loss.joint_fraction": self.each / (self.rows * CONTEXT),
            "optim.steps": steps,
            "train.validate_every": max(1, steps // 6),
        } | self.more


# On two cores decoding would take longer than training otherwise.
CPU_SCREEN = Effort(30_000, 64, more={"decode.repeats": 1})
CPU_GRID = Effort(150_000, 64, more={"train.decode_prompts": 4, "decode.repeats": 1})
CPU_LONG = Effort(600_000, 256, label="long", more=CPU_GRID.more)
CPU_OWN = Effort(
    1_000_000,
    1024,
    rows=4,
    more={
        "train.precision": "bf16-mixed",
        "train.decode_prompts": 0,
        "decode.prompts": 48,
        "decode.new_tokens": 64,
        "decode.repeats": 1,
    },
)
_GPU = {"loss.chunk_mib": 256, "train.validation_rows": 16, "train.checkpoint_every": 1000}
GPU_SCREEN = Effort(30_000, 128, label="screen", more=_GPU | {"train.validate_every": 78, "decode.repeats": 1})
GPU_GRID = Effort(150_000, 256, more=_GPU | {"train.validate_every": 195})
_LONG = {"train.validate_every": 976, "data.states": 800_000}
GPU_LONG = Effort(1_500_000, 512, rows=16, label="long", more=_GPU | _LONG)


def heads(
    corpus: str,
    rank: int,
    effort: Effort,
    settings: dict[str, Any] | None = None,
    *,
    link: str = "first",
    seed: int = 0,
    folder: str = "C6",
) -> Cell:
    """Heads tied to the model's own next-token head. settings: what differs from that."""
    dials = {"corpus": corpus, "rank": rank, "link": link, "model.draft_width": 0.5, "seed": seed}
    cell = Cell(folder, BASE | dials | effort.settings() | (settings or {}))
    named = {"name": f"{cell.config('').run_name}-{effort.label}"} if effort.label else {}
    return Cell(folder, cell.overrides | named)


def objectives(effort: Effort) -> list[Cell]:
    """The training objective, with and without token-conditioned drafts."""
    return [
        heads("code", 4, effort, {"loss.objective": objective}, link=link, folder="C6-screen")
        for objective in OBJECTIVES
        for link in ("first", "none")
    ]


def ranks(effort: Effort) -> list[Cell]:
    """Rank by corpus and draft input; a second seed; untied heads; perceptron maps of equal size."""
    grid = (
        heads(corpus, rank, effort, link=link)
        for corpus in ("code", "text")
        for link in ("first", "none")
        for rank in RANKS
    )
    untied = {"model.tie_first": False}
    return [
        *grid,
        *(heads("code", rank, effort, seed=1) for rank in (1, 4)),
        *(heads("code", rank, effort, untied, link="none", folder="C6-untied") for rank in (1, 4)),
        *(heads("code", rank, effort, {"model.map_hidden": hidden}) for rank, hidden in WIDE),
    ]


def retrofit() -> list[Cell]:
    """The grid; rank after four times the training; text that the model wrote itself."""
    longer = [heads("code", rank, CPU_LONG, folder="C6-long") for rank in (1, 4)]
    return [*ranks(CPU_GRID), *longer, heads("code", 1, CPU_GRID, {"data.text": "greedy"}, folder="C6-greedy")]


def retrofit_gpu() -> list[Cell]:
    """Longer training, the model's own text, the grid, parts of the heads, objectives and their constants."""
    return [
        *(heads(corpus, rank, GPU_LONG, folder="C6-long") for corpus in ("code", "text") for rank in (1, 4)),
        *(cell for text in ("greedy", "sampled") for cell in _pair({"data.text": text}, f"C6-{text}")),
        *ranks(GPU_GRID),
        *_pair({"model.map_rank": 64}),
        *_pair({"model.draft_width": 2.0}),
        *objectives(GPU_SCREEN),
        *(heads("code", 4, GPU_SCREEN, {"loss.alpha": alpha}, folder="C6-screen") for alpha in (0.0, 0.5, 1.0)),
        heads("code", 4, GPU_SCREEN, {"loss.gamma": 0.7}, folder="C6-screen"),
    ]


def retrofit_own() -> list[Cell]:
    """What rank is worth in heads of the released kind, on text that the model wrote.

    Wide drafts, components as offsets from one base, every position trains the drafts.
    """
    return [
        heads("code", rank, CPU_OWN, OWN, link="all", seed=seed, folder="C6-timed") for seed in SEEDS for rank in (1, 4)
    ]


def _pair(settings: dict[str, Any], folder: str = "C6") -> Iterator[Cell]:
    return (heads("code", rank, GPU_GRID, settings, folder=folder) for rank in (1, 4))
