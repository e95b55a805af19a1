"""What experiments are made of: cells, what they need, and groups of cells that are timed side by side.

A cell is a set of overrides for `experiments/run.py` and the folder of its record. Heads on a frozen trunk name the
cell that trains it. `star.py` and `pretrained.py` lay cells out in arms, `claims/` say which arms answer a claim, and
`profiles.py` lists what a command can run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from cpdlm.config import Config, but_rank, expand, flatten, resolve

RANKS = (1, 2, 4, 8)
SEEDS = (0, 1, 2)
WIDE = 1024  # hidden units of rank-1 perceptron maps with the parameters of rank 8 (size small, bytes, n=4)
SEED = r"-s\d+$"  # the end of a run's name


@dataclass(frozen=True)
class Cell:
    """One run.

    folder: where its record lies under results/. trunk: the cell whose frozen trunk it uses. reference: the next-token
    model of equal training, which is timed beside it. alone: its training is timed, so nothing runs beside it.
    """

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

    def varied(self, word: str, overrides: dict[str, Any] | None = None, **changes: Any) -> Cell:
        """This cell with other overrides, and a word for them in its name. changes: other fields of the cell."""
        varied = replace(self, overrides=self.overrides | (overrides or {}), **changes)
        return replace(varied, overrides=varied.overrides | {"name": re.sub(SEED, rf"-{word}\g<0>", varied.name)})

    def with_needs(self, overrides: dict[str, Any]) -> Cell:
        """The cell, its trunk and its reference, each with further overrides."""
        trunk = self.trunk and self.trunk.with_needs(overrides)
        reference = self.reference and self.reference.with_needs(overrides)
        return replace(self, overrides=self.overrides | overrides, trunk=trunk, reference=reference)

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
        """`settings` as KEY=VALUE."""
        return words(self.settings(output))


Arm = Callable[[], list[Cell]]


@lru_cache(maxsize=4096)
def _resolved(settings: tuple[tuple[str, Any], ...]) -> Config:
    return resolve(expand(dict(settings)))


def words(settings: dict[str, Any]) -> list[str]:
    """Settings as they are typed: KEY=VALUE."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]


# --- kinds of cells --------------------------------------------------------------------------------------------------


def trunk(corpus: str, preset: str, seed: int = 0) -> Cell:
    """A next-token model: the shared frozen target, and the equal-training reference of the from-scratch cells."""
    return Cell("trunks", {"preset": preset, "corpus": corpus} | ({"seed": seed} if seed else {}))


def heads(
    target: Cell,
    rank: int,
    preset: str,
    *,
    horizon: int = 4,
    link: str = "none",
    hidden: int = 0,
    seed: int = 0,
) -> Cell:
    """Heads on a frozen trunk, which every rank shares. hidden: width of perceptron maps (0: linear maps)."""
    folder = "beyond" if link != "none" or hidden else "C3" if horizon == 4 else "horizon"
    dials = _dials(target.overrides["corpus"], rank, preset, horizon, link, seed)
    dials |= {key: target.overrides[key] for key in ("size", "data.tokenizer") if key in target.overrides}
    return Cell(folder, dials | ({"model.map_hidden": hidden} if hidden else {}), target)


def scratch(rank: int, preset: str = "none", seed: int = 0) -> Cell:
    """Trunk and heads trained together on code: a self target, another one for every rank."""
    reference = trunk("code", "trunk" if preset == "none" else f"{preset},trunk", seed)
    return Cell("C1", _dials("code", rank, preset, 4, "none", seed), reference=reference)


def controls(target: Cell, seed: int = 0) -> list[Cell]:
    """Rank 1 with as many parameters as what it is compared with.

    Token-conditioned drafts: the same map, blind to the token. Rank 8: perceptron maps. Token-conditioned rank 8: both.
    """
    return [
        heads(target, 1, "cpu-heads", link="blind", seed=seed),
        *(heads(target, 1, "cpu-heads", link=link, hidden=WIDE, seed=seed) for link in ("none", "first")),
    ]


# How token-conditioned drafts saw x_{t+1} when the star's cells were run.
NARROW = {"model.draft_width": 0.5, "model.draft_normed": False}


def _dials(corpus: str, rank: int, preset: str, horizon: int, link: str, seed: int) -> dict[str, Any]:
    dials: dict[str, Any] = {} if preset == "none" else {"preset": preset}
    dials |= {"corpus": corpus, "rank": rank, "horizon": horizon, "link": link, "seed": seed}
    return dials if link == "none" else dials | NARROW


# --- sets of cells ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Cells whose decoders are timed side by side in one process, and their reference."""

    cells: list[Cell]
    reference: Cell | None


def complete(cells: Iterable[Cell]) -> list[Cell]:
    """Every cell once, with the trunks and references that they need before them."""
    found: dict[str, Cell] = {}
    needed: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.name, cell)
        needed |= {each.name: each for each in (cell.trunk, cell.reference) if each is not None}
    return [*needed.values(), *(cell for name, cell in found.items() if name not in needed)]


def mates(cell: Cell, cells: Iterable[Cell]) -> set[str]:
    """Names of the cells that differ from this one in rank only, itself among them: they must be timed beside it."""
    return {other.name for other in cells if other.but_rank == cell.but_rank}


def decode_groups(cells: list[Cell], output: str) -> list[Group]:
    """Cells that are timed side by side, untied rank 1 first, with their reference where it is one of `cells`.

    A group shares prompts, horizon, seed, trunk and kind of target. Cells on a pretrained model, which are many, are
    also grouped by folder.
    """
    names = {cell.name for cell in cells}
    members: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        config = cell.config(output)
        if config.horizon > 1:
            target = (config.target, config.model.trunk, config.size, config.horizon, config.seed)
            folder = cell.folder if config.is_pretrained else ""
            key = (config.corpus, config.data.tokenizer, *target, repr(config.decode), folder)
            members.setdefault(key, []).append(cell)
    groups = []
    for group in members.values():
        group.sort(key=lambda cell: (cell.config(output).first_is_tied, cell.config(output).rank))
        references = [cell.reference for cell in group if cell.reference is not None and cell.reference.name in names]
        groups.append(Group(group, references[0] if references else None))
    return groups
