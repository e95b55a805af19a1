"""The figures, as functions of the records. PDF and PNG, the same bytes for the same records and matplotlib.

One module per theme, one palette (`style`). A figure whose cells are missing is left out with a line that says so and names
the command that makes them. Each has a caption file beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.families import Family
from experiments.report.figures import components, drafts, likelihood, speed, training
from experiments.report.figures.style import STYLE, Drawn, Plot, save
from experiments.report.tables import described

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ADDING", "FIGURES", "STYLE", "Drawn", "Plot", "Shown", "command", "draw_all", "one", "save"]

ADDING = (
    "where the records that are there are of other code (the committed ones are, once the code has changed), a sweep refuses to "
    "add to them: end its command with mix=yes to add all the same, or with out=OTHER results=OTHER/results to begin afresh"
)

# In the order of the report.
FIGURES: dict[str, Plot] = {
    "main": Plot("Rank against likelihood, draft length and speed", "C4", speed.overview, decoded=True),
    "nll": Plot("Joint likelihood, and its terms", "C1", likelihood.nll),
    "first_token": Plot("The first token alone", "C2", likelihood.first_token),
    "acceptance": Plot("Drafts accepted, by depth", "C3", drafts.acceptance, decoded=True),
    "tokens_per_pass": Plot("Tokens per pass", "C3", drafts.tokens_per_forward, decoded=True),
    "speedup": Plot("Speed-up over plain decoding", "C4", speed.speedup, decoded=True),
    "time_split": Plot("Where the time goes", "C4", speed.time_split, decoded=True),
    "heat": Plot("Rank against horizon", "C3", drafts.heat, decoded=True),
    "by_size": Plot("Speed-up against model size", "C7", speed.by_size, decoded=True),
    "over_training": Plot("Draft length over training", "C7", training.decoding_over_training),
    "equal_time": Plot("Equal steps against equal wall-clock", "C3", training.equal_time),
    "training_cost": Plot("What a rank costs in training", "C8", training.overhead, of_time=True),
    "balance": Plot("The balance loss", "C5", training.balance, decoded=True),
    "usage": Plot("Components in use", "C5", components.usage),
    "gate": Plot("Weights of the components over training", "C5", components.gate),
    "specialities": Plot("What each component explains", "C5", components.specialities),
    "windows": Plot("Example windows", "C5", components.windows),
}


@dataclass(frozen=True)
class Shown:
    """A figure of the report: its picture (None where it was not drawn) and the caption, or what is missing and how to make it."""

    name: str
    title: str
    caption: str
    picture: Path | None


def command(claim: str) -> str:
    """What makes the records of a claim."""
    return f"python experiments/sweep.py claim={claim}"


def meant_for(plot: Plot, families: list[Family]) -> list[Family]:
    """The timing cells for a figure about training time, where there are any; for the others all but those."""
    timed = [family for family in families if family.is_timing]
    return (timed or families) if plot.of_time else [family for family in families if not family.is_timing]


def draw_all(families: list[Family], folder: Path) -> tuple[list[Path], list[Shown]]:
    """Draw every figure into `folder`; returns (files, every figure, drawn or not)."""
    try:
        import matplotlib
    except ImportError:
        why = "matplotlib is not installed (pip install matplotlib)"
        return [], [Shown(name, plot.title, why, None) for name, plot in FIGURES.items()]
    files: list[Path] = []
    shown: list[Shown] = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        for name, plot in FIGURES.items():
            drawn = plot.draw(meant_for(plot, families))
            if isinstance(drawn, str):
                shown.append(Shown(name, plot.title, f"{drawn}; `{command(plot.claim)}` makes them", None))
                for suffix in ("pdf", "png", "md"):
                    (folder / f"{name}.{suffix}").unlink(missing_ok=True)
                continue
            caption = f"{drawn.caption} {described(drawn.records, plot.decoded)}"
            files += save(drawn.figure, caption, folder, name)
            shown.append(Shown(name, plot.title, caption, folder / f"{name}.png"))
    return sorted(files), shown


def one(
    name: str,
    title: str,
    given: tuple[dict[str, Any], str] | str,
    plot: Callable[[dict[str, Any]], Figure],
    folder: Path,
) -> tuple[list[Path], Shown]:
    """Draw the figure of a benchmark's record. given: the record and the caption, or why there is none."""
    try:
        import matplotlib
    except ImportError:
        given = "matplotlib is not installed (pip install matplotlib)"
    if isinstance(given, str):
        for suffix in ("md", "pdf", "png"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
        return [], Shown(name, title, given, None)
    record, caption = given
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        return save(plot(record), caption, folder, name), Shown(name, title, caption, folder / f"{name}.png")
