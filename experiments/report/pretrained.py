"""The table of heads on a pretrained model: what training took and what it buys."""

import statistics

from cpdlm.config import LossConfig
from experiments.claims.c6_heads import positions
from experiments.families import Family
from experiments.report.cells import NOTES, Place, by_mode, places
from experiments.report.table import Columns, Table, described, tabulated

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
    records = [record for family in families for record in family.records()]
    return tabulated("pretrained", f"{caption} {NOTES} {described(records)}", columns, places(families))


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
