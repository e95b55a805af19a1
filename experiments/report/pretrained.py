"""Tables of heads on a pretrained model: what training took and what it buys, and the drafts accepted by depth."""

import statistics
from collections.abc import Iterator
from dataclasses import replace

from cpdlm.config import LossConfig
from experiments.claims.c6_heads import positions
from experiments.families import Family
from experiments.records import MODES, Record, counted
from experiments.report.cells import NOTES, Place, by_mode, places
from experiments.report.table import Column, Columns, Table, described, listed, shown, tabulated
from experiments.stats import over_seeds

_PLACE: Columns = {
    "setting": lambda at: f"{at.family.settings['corpus']}, {at.family.size}, n={at.family.horizon}",
    "objective": lambda at: _objective(at.family),
    "variant": lambda at: at.variant,
    "precision": lambda at: str(at.record.config["model"]["dtype"]),
    "rank": lambda at: str(at.rank),
    "seeds": lambda at: str(len(at.cells)),
    "steps": lambda at: f"{at.record['training']['steps']:,}",
}


def pretrained_table(families: list[Family]) -> Table:
    """Heads on a pretrained model, by objective, variant and rank: what training takes, and what it buys."""
    columns = _PLACE | {
        "positions": lambda at: f"{positions(at.record):,}",
        "trained parameters": lambda at: f"{at.record['parameters']['trained']:,}",
        "heads (MiB)": lambda at: f"{at.record.trained_bytes() / 2**20:.1f}",
        "training (min)": lambda at: f"{statistics.fmean(r['seconds']['train'] for r in at.cells.values()) / 60:.1f}",
        "memory (GiB)": lambda at: f"{at.record['training']['peak_memory_bytes'] / 2**30:.1f}",
        "components in use": lambda at: _component_use(at, "effective", ".2f"),
        "dead components": lambda at: _component_use(at, "dead", "g"),
        **by_mode("tokens per forward", "tokens_per_pass", 2),
        **by_mode("speed-up", "speedup", 2),
        **by_mode("speed over rank 1", "speedup_over_rank1", 2),
    }
    caption = (
        "Heads on a pretrained, frozen model, which is the target. Positions: those that trained the window, of all "
        "steps. Heads: bytes of all that is trained, as stored. Components in use: effective number on test text "
        "(exp of the entropy of the mean weights); dead: below a tenth of an equal share."
    )
    families = [family for family in families if family.is_pretrained]
    return tabulated("pretrained", f"{caption} {NOTES} {described(_records(families))}", columns, places(families))


def depths_table(families: list[Family]) -> Table:
    """Drafts of heads on a pretrained model, accepted by depth."""
    families = [family for family in families if family.is_pretrained]
    columns = _PLACE | {
        "depth": lambda at: str(at.depth),
        "accepted on test text": _accepted("kept"),
        **{f"accepted, {mode}": _accepted("accepted", mode) for mode in MODES},
    }
    caption = (
        "Accepted on test text: mean of sum min(p, q), the chance that a sampled draft of x_{t+depth} is accepted if "
        "all before it are the text's own; 1 minus it is the total variation of target p and draft q (depth 1 is the "
        "target itself where it is tied). Accepted: drafts accepted in decoding, of those that were reached. "
        f"{_covered(_records(families))}"
    )
    return tabulated("depths", caption.strip(), columns, _depths(families))


def _depths(families: list[Family]) -> Iterator[Place]:
    """Every depth that a share is known at."""
    known = (_accepted("kept"), _accepted("accepted"), _accepted("accepted", "greedy"))
    for at in places(families):
        found = (replace(at, depth=depth) for depth in range(1, at.record.horizon + 1))
        yield from (each for each in found if any(cell(each) != "-" for cell in known))


def _accepted(what: str, mode: str = "sampling") -> Column:
    return lambda at: shown(over_seeds(at.cells, f"{what}:{at.depth}", mode), bare=True)


def _records(families: list[Family]) -> list[Record]:
    return [record for family in families for record in family.records()]


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


def _component_use(at: Place, key: str, form: str) -> str:
    weights = [record["likelihood"]["weights"] for record in at.cells.values()]
    return f"{statistics.fmean(each[key] for each in weights):{form}}" if len(weights[0]["mean"]) > 1 else "-"


def _covered(records: list[Record]) -> str:
    """What the accepted shares of cells with a draft vocabulary are of."""
    limited = [record for record in records if record.config["loss"]["draft_vocabulary"]]
    new = [record["likelihood"]["shortlist"] for record in limited if record["likelihood"]["shortlist"]]
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
