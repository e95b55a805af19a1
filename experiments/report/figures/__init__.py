"""The figures, as functions of the records. PDF and PNG, the same bytes for the same records and matplotlib.

One module per theme, one palette (`style`). A figure whose cells are missing is left out with a line that says so and
names the command that makes them. Each has a caption file beside it. A claim names the figure that decides it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.families import Family
from experiments.report import decoding, scaling, tasks
from experiments.report.benchmarks import made_of, read_benchmark
from experiments.report.figures import benchmarks, cost, ranks, speed, training
from experiments.report.figures.style import STYLE, Plot, save
from experiments.report.table import described

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In the order of the report.
FIGURES: dict[str, Plot] = {
    "pretrained": Plot("Heads on a pretrained model, and what rank adds", "C6", speed.pretrained, decoded=True),
    "main": Plot("What a rank gains on one frozen target", "C3", ranks.gain, decoded=True),
    "nll": Plot("Joint likelihood, and its terms", "C1", ranks.nll),
    "first_token": Plot("The first token alone", "C2", ranks.first_token),
    "over_rank1": Plot("Speed over rank 1, in every setting", "C4", speed.over_rank_one, decoded=True),
    "balance": Plot("The balance loss", "C5", training.balance, decoded=True),
    "by_size": Plot("Tokens per forward and speed-up by model size", "C7", speed.by_size, decoded=True),
    "training_cost": Plot("What a rank costs in training", "C8", training.cost, of_time=True),
    "equal_time": Plot("Equal training time", "C3", training.equal_time, decoded=True),
    "forward_cost": Plot("What a target forward costs, by model size", "C7", cost.forward, decoded=True),
}
# name -> (title, its record, how it is drawn, its caption)
OF_BENCHMARKS: dict[str, tuple[Any, ...]] = {
    "decoding": (
        "Ways to draft, side by side",
        "decode_baselines",
        benchmarks.ways_to_draft,
        lambda record: f"{decoding.FIGURE} {decoding.described(record)}",
    ),
    "tasks": ("Ways to decode, by task", "tasks_smollm2", tasks.figure, tasks.described),
    "overhead_sizes": (
        "Training overhead",
        "training_overhead",
        benchmarks.training_overhead,
        lambda record: f"{scaling.FIGURE} {scaling.conditions(record)}",
    ),
}


@dataclass(frozen=True)
class Shown:
    """A figure of the report: picture and caption; or None, and what is missing and how to make it."""

    name: str
    title: str
    caption: str
    picture: Path | None


def command(claim: str) -> str:
    """What makes the records of a claim."""
    return f"python experiments/sweep.py claim={claim}"


def draw_all(families: list[Family], folder: Path) -> tuple[list[Path], list[Shown]]:
    """Draw every figure of the cells into `folder`: (files, every figure, drawn or not)."""
    timed, untimed = ([family for family in families if family.is_timing is those] for those in (True, False))

    def draw(plot: Plot) -> tuple[Figure, str] | str:
        drawn = plot.draw(timed or families if plot.of_time else untimed)
        if isinstance(drawn, str):
            return f"{drawn}; `{command(plot.claim)}` makes them"
        return drawn.figure, f"{drawn.caption} {described(drawn.records, plot.decoded)}"

    made = [_drawn(name, plot.title, partial(draw, plot), folder) for name, plot in FIGURES.items()]
    return sorted(file for files, _ in made for file in files), [each for _, each in made]


def draw_benchmarks(results: Path, folder: Path) -> tuple[list[Path], list[Shown]]:
    """The same of the benchmarks' records."""

    def draw(name: str, plot: Callable[..., Figure], caption: Callable[..., str]) -> tuple[Figure, str] | str:
        record = read_benchmark(results, name)
        return record if isinstance(record, str) else made_of(name, lambda: (plot(record), caption(record)))

    made = [_drawn(name, title, partial(draw, *given), folder) for name, (title, *given) in OF_BENCHMARKS.items()]
    return [file for files, _ in made for file in files], [each for _, each in made]


def draw_front(results: Path, families: list[Family], folder: Path) -> tuple[list[Path], Shown]:
    """The README's figure."""
    records = [record for name in tasks.HELD if not isinstance(record := read_benchmark(results, name), str)]
    draw = partial(made_of, "readme", lambda: speed.front(families, records))
    return _drawn("readme", "What the README shows", draw, folder)


def _drawn(
    name: str, title: str, draw: Callable[[], tuple[Figure, str] | str], folder: Path
) -> tuple[list[Path], Shown]:
    """Write the figure and caption that `draw` returns; where it returns why there is none, remove the files."""
    try:
        import matplotlib
    except ImportError:
        return [], Shown(name, title, "matplotlib is not installed (pip install matplotlib)", None)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        drawn = draw()
        if isinstance(drawn, str):
            for suffix in ("pdf", "png", "md"):
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
            return [], Shown(name, title, drawn, None)
        return save(*drawn, folder, name), Shown(name, title, drawn[1], folder / f"{name}.png")
