"""What `docs/reproducing.md` shows of the records: another group's re-run beside ours, and the compute spent."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from experiments.families import Family
from experiments.records import Record
from experiments.stats import over_seeds

# Accepted of the window's 4 tokens, and the sum of their cross-entropies: MTPC's public code on a frozen 2048-wide
# trunk (n = 4, .9 KL + .1 CE).
THEIRS = {1: (1.34, 20.32), 2: (1.29, 19.58), 4: (1.32, 18.89)}


def reruns_table(families: Sequence[Family]) -> str:
    """Markdown: the re-run's numbers and those of our heads on SmolLM2 over code, by rank."""
    rows = [("MTPC's re-run", rank, *values) for rank, values in THEIRS.items()]
    for family in families:
        if not (family.is_pretrained and family.label.startswith("code, smollm2") and family.horizon == 4):
            continue
        for variant in family.variants():
            for rank in family.ranks(variant):
                cells = family.cells[variant, rank]
                rate, loss = over_seeds(cells, "tokens_per_pass", "sampling"), over_seeds(cells, "joint_nll")
                if rate is not None and loss is not None and all(r.path.startswith("C6/") for r in cells.values()):
                    rows.append((f"ours, {variant}", rank, rate.mean, loss.mean))
    lines = ["| run | rank | accepted of the window's 4 tokens | NLL of the four tokens (nats) |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {rank} | {rate:.2f} | {loss:.2f} |" for name, rank, rate, loss in rows)])


def compute_table(records: Iterable[Record]) -> str:
    """Markdown: core-hours of the committed records by folder; a cell that several claims share counts once."""
    hours, cells = defaultdict[str, float](float), defaultdict[str, int](int)
    for record in records:
        folder, seconds = record.path.split("/")[0], record["seconds"]
        origin = record["decoding"]["origin"] if record["decoding"] else record.content
        trained = (seconds["data"] + seconds["train"] + seconds["evaluate"]) * record["hardware"]["cores"]
        hours[folder] += (trained + seconds["decode"] * origin["hardware"]["cores"]) / 3600
        cells[folder] += 1
    lines = ["| records | cells | core-hours |", "|---|---|---|"]
    lines += [f"| `results/{name}` | {cells[name]} | {hours[name]:.1f} |" for name in sorted(cells)]
    return "\n".join([*lines, f"| all | {sum(cells.values())} | {sum(hours.values()):.1f} |"])
