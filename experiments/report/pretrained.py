"""Tables of heads on a pretrained model: what training took and what it buys, and the drafts accepted by depth."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

from cpdlm.config import LossConfig
from experiments.claims.c6_heads import positions
from experiments.families import Cells, Family
from experiments.records import MODES, Record, counted
from experiments.report.cells import NOTES
from experiments.report.table import Table, described, listed, shown
from experiments.stats import over_seeds

_PLACE = ("setting", "objective", "variant", "precision", "rank", "seeds", "steps")


def pretrained_table(families: list[Family]) -> Table:
    """Heads on a pretrained model, by objective, variant and rank: what training takes, and what it buys."""
    rows = [
        (*_place(family, variant, rank, cells), *_training(cells), *_decoding(cells))
        for family, variant, rank, cells in _cells(families)
    ]
    header = (
        *_PLACE,
        "positions",
        "trained parameters",
        "heads (MiB)",
        "training (min)",
        "memory (GiB)",
        "components in use",
        "dead components",
        *(f"tokens per forward, {mode}" for mode in MODES),
        *(f"speed-up, {mode}" for mode in MODES),
        *(f"speed over rank 1, {mode}" for mode in MODES),
    )
    caption = (
        "Heads on a pretrained, frozen model, which is the target. Positions: those that trained the window, of all "
        "steps. Heads: bytes of all that is trained, as stored. Components in use: effective number on test text "
        "(exp of the entropy of the mean weights); dead: below a tenth of an equal share."
    )
    return Table("pretrained", f"{caption} {NOTES} {described(_records(families))}", header, rows)


def depths_table(families: list[Family]) -> Table:
    """Drafts of heads on a pretrained model, accepted by depth."""
    rows = [
        (*_place(family, variant, rank, cells), str(depth), *shares)
        for family, variant, rank, cells in _cells(families)
        for depth, shares in _depths(cells)
    ]
    header = (*_PLACE, "depth", "accepted on test text", *(f"accepted, {mode}" for mode in MODES))
    caption = (
        "Accepted on test text: mean of sum min(p, q), the chance that a sampled draft of x_{t+depth} is accepted if "
        "all before it are the text's own; 1 minus it is the total variation of target p and draft q (depth 1 is the "
        "target itself where it is tied). Accepted: drafts accepted in decoding, of those that were reached. "
        f"{_covered(_records(families))}"
    )
    return Table("depths", caption.strip(), header, rows)


def _cells(families: list[Family]) -> Iterator[tuple[Family, str, int, Cells]]:
    for family in families:
        for variant, rank in itertools.product(family.variants(), family.all_ranks()):
            if family.is_pretrained and (cells := family.cells.get((variant, rank))):
                yield family, variant, rank, cells


def _records(families: list[Family]) -> list[Record]:
    return [record for family in families if family.is_pretrained for record in family.records()]


def _place(family: Family, variant: str, rank: int, cells: Cells) -> tuple[str, ...]:
    record = next(iter(cells.values()))
    setting = f"{family.settings['corpus']}, {family.size}, n={family.horizon}"
    precision, steps = str(record.config["model"]["dtype"]), f"{record['training']['steps']:,}"
    return setting, _objective(family), variant, precision, str(rank), str(len(cells)), steps


def _objective(family: Family) -> str:
    """With its constants and the text where those are not the preset's."""
    settings = family.settings
    words = [str(settings["loss.objective"])]
    if words[0].startswith("eq14") and settings["loss.alpha"] != LossConfig.alpha:
        words.append(f"alpha {settings['loss.alpha']:g}")
    if settings["loss.gamma"] != LossConfig.gamma:
        words.append(f"gamma {settings['loss.gamma']:g}")
    if settings["data.text"] != "corpus":
        words.append(f"the model's own text ({settings['data.text']})")
    return ", ".join(words)


def _training(cells: Cells) -> tuple[str, ...]:
    record = next(iter(cells.values()))
    seconds = statistics.fmean(each["seconds"]["train"] for each in cells.values())
    weights = [each["likelihood"]["weights"] for each in cells.values()]
    effective, dead = (statistics.fmean(each[key] for each in weights) for key in ("effective", "dead"))
    many = len(weights[0]["mean"]) > 1
    return (
        f"{positions(record):,}",
        f"{record['parameters']['trained']:,}",
        f"{record.trained_bytes() / 2**20:.1f}",
        f"{seconds / 60:.1f}",
        f"{record['training']['peak_memory_bytes'] / 2**30:.1f}",
        f"{effective:.2f}" if many else "-",
        f"{dead:g}" if many else "-",
    )


def _decoding(cells: Cells) -> Iterator[str]:
    for quantity in ("tokens_per_pass", "speedup", "speedup_over_rank1"):
        for mode in MODES:
            yield shown(over_seeds(cells, quantity, mode), 2)


def _depths(cells: Cells) -> Iterator[tuple[int, list[str]]]:
    """Of each depth that any of the three shares is known at."""
    for depth in range(1, next(iter(cells.values())).horizon + 1):
        found = [over_seeds(cells, f"kept:{depth}"), *(over_seeds(cells, f"accepted:{depth}", mode) for mode in MODES)]
        if any(share is not None for share in found):
            yield depth, ["-" if share is None else f"{share.mean:.3f}" for share in found]


def _covered(records: list[Record]) -> str:
    """What the accepted shares of cells with a draft vocabulary are of."""
    limited = [record for record in records if record.config.get("loss", {}).get("draft_vocabulary", 0)]
    new = [record["likelihood"]["shortlist"] for record in limited if record["likelihood"].get("shortlist")]
    parts = []
    if new:
        parts.append(
            f"With a draft vocabulary ({listed({each['tokens'] for each in new})} tokens) accepted shares are those "
            "of drafts made from it, with what the target has elsewhere counted as lost; the joint NLL is that of "
            f"the same distribution, over the windows that it covers ({min(each['windows'] for each in new):.1%} of "
            "them at least)."
        )
    if len(new) < len(limited):
        parts.append(
            f"{counted(len(limited) - len(new), 'record')} of an older version: accepted shares and joint NLL of the "
            "distribution over the whole vocabulary, where training and drafts had a draft vocabulary."
        )
    return " ".join(parts)
