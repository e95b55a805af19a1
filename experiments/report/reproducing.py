"""What `docs/reproducing.md` shows of the records: others' numbers beside ours, the cells that carry the answers, and
the compute spent."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.claims import Verdict
from experiments.claims.verdict import NOT_RUN
from experiments.families import Cells, Family, trained_longer
from experiments.records import MODES, Record, counted
from experiments.report.benchmarks import read_benchmark
from experiments.stats import over_seeds
from experiments.verify import TOLERANCE

RANKS = (1, 2, 4)
# MTPC's public code on a frozen 2048-wide trunk (n = 4, .9 KL + .1 CE): of RANKS, the accepted of the window's 4 tokens
# and the sum of their cross-entropies.
ACCEPTED, ENTROPY = "1.34 / 1.29 / 1.32", "20.32 / 19.58 / 18.89"
# MTPC's second version: Llama-3.2-3B on bytes, n = 8, r = 32: accepted per forward, and tokens per second.
OTHERS = {
    "greedy": "independent 2.70, 109; CP 3.45, 121; HMM 3.94, 134; tree 3.72, 131",
    "sampling": "independent 1.71, 59; CP 2.04, 66; HMM 2.31, 66; tree 2.27, 71",
}
_SMALLER = "theirs has 3B parameters, a GPU and 32 components; ours 3.2M parameters, two cores and 8"


def reruns_table(families: Sequence[Family]) -> str:
    """Markdown: what the paper says, what re-runs found, what is here, and why they differ."""
    smollm2 = [f for f in families if f.is_pretrained and (f.size, f.horizon) == ("smollm2", 4)]
    smollm2 = [f for f in smollm2 if f.settings["corpus"] == "code"]
    small = [f for f in families if f.label == "code, small, n=8, shared frozen target"]
    why = "the paper's setting is not known; the re-run drafts the first token as well, ours takes it from the model"
    rows = [
        (
            "frozen model, n=4: accepted of 4, r = 1 / 2 / 4",
            "about two (PyCodeGPT)",
            ACCEPTED,
            _by_rank(smollm2, "tokens_per_pass"),
            why,
        ),
        (
            "the same: NLL of the four tokens (nats)",
            "not known",
            ENTROPY,
            _by_rank(smollm2, "joint_nll"),
            "other text and size, 10B tokens there, 150k positions here; one or two components do the work",
        ),
        *(
            (f"bytes, n=8, {mode}: accepted, tokens/s", "not known", OTHERS[mode], _small(small, mode), _SMALLER)
            for mode in MODES
        ),
    ]
    return _table(("what", "the paper", "re-runs (MTPC)", "ours", "why they differ"), rows)


def _by_rank(families: Sequence[Family], quantity: str) -> str:
    """Of every kind of draft that has all of RANKS, in the first family that has one."""
    for family in families:
        found = []
        for variant in family.variants():
            cells = [family.cells.get((variant, rank), {}) for rank in RANKS]
            means = [mean.mean for each in cells if (mean := over_seeds(each, quantity)) is not None]
            if len(means) == len(RANKS):
                found.append(f"{' / '.join(f'{mean:.2f}' for mean in means)} ({variant})")
        if found:
            return "; ".join(found)
    return "-"


def _small(families: Sequence[Family], mode: str) -> str:
    found = []
    for rank, cells in (item for family in families for item in family.by_rank().items() if item[0] in (1, 8)):
        rate, modes = over_seeds(cells, "tokens_per_pass", mode), [record.mode(mode) for record in cells.values()]
        if rate is not None and (speeds := [each["tokens_per_second"]["speculative"] for each in modes if each]):
            found.append(f"rank {rank} {rate.mean:.2f}, {fmean(speeds):,.0f}")
    return "; ".join(found) or "-"


def training_table(results: Path, families: Sequence[Family], verdicts: Sequence[Verdict]) -> str:
    """Markdown: how far the models that decide C1 are trained, beside counted contexts and a model without heads."""
    deciding = next((v for v in verdicts if v.claim.id == "C1" and v.word != NOT_RUN and v.records), None)
    if deciding is None:
        return ""
    family = next(f for f in families if {record.path for record in f.records()} >= set(deciding.records))
    record = read_benchmark(results, "byte_counts")
    entries = [] if isinstance(record, str) else record["entries"]
    rows: list[tuple[str, ...]] = []
    for read in sorted({entry["tokens"] for entry in entries}):
        best = min((entry for entry in entries if entry["tokens"] == read), key=lambda entry: entry["nll"])
        name = f"counts behind up to {best['order']} bytes, the best length here"
        rows.append((name, f"{read / 1e6:.1f}M", f"{best['nll']:.2f}", "-"))
    without = {record.seed: record for record in family.reference}
    named = {"no heads: the next byte alone": without} if without else {}
    named |= {f"rank {rank}": cells for rank, cells in family.by_rank().items()}
    rows += [_trained(name, cells) for name, cells in named.items()]
    rows += [_trained("rank 1, longer", cells) for cells in trained_longer(family, families)]
    return _table(("model", "bytes read", "next byte (nats)", f"next {family.horizon} bytes (nats)"), rows)


def _trained(name: str, cells: Cells) -> tuple[str, ...]:
    read = next(iter(cells.values()))["training"]["tokens"]
    found = [over_seeds(cells, quantity) for quantity in ("first_token_nll", "joint_nll")]
    first, joint = (f"{mean.mean:.2f}" if mean is not None else "-" for mean in found)
    without = next(iter(cells.values())).horizon == 1
    return f"{name}, {counted(len(cells), 'seed')}", f"{read / 1e6:.1f}M", first, "-" if without else joint


def carried_table(records: Iterable[Record], verdicts: Sequence[Verdict]) -> str:
    """Markdown: for each claim the cell of the highest rank in its deciding setting, one command away."""
    by_path, rows = {record.path: record for record in records}, []
    for claim in dict.fromkeys(verdict.claim for verdict in verdicts):
        deciding = next((v for v in verdicts if v.claim == claim and v.word != NOT_RUN and v.records), None)
        if deciding is not None:
            record = max((by_path[path] for path in deciding.records), key=lambda each: (each.rank, -each.seed))
            rows.append((claim.name, f"`./dev verify results/{record.path}`", *_expected(record)))
    return _table(("claim", "command", "joint NLL (nats)", "tokens per forward, sampling"), rows)


def _expected(record: Record) -> tuple[str, str]:
    mode = record.mode("sampling")
    rate = f"{mode['tokens_per_pass']['low']:.2f} to {mode['tokens_per_pass']['high']:.2f}" if mode else "-"
    return f"{record['likelihood']['joint_nll']['mean']:.3f} ±{TOLERANCE:g}", rate


def compute_table(records: Iterable[Record], verdicts: Sequence[Verdict]) -> str:
    """Markdown: core-hours and GPU-minutes of the cells that each claim rests on; one that several share counts for
    each of them, and once in all."""
    by_path = {record.path: record for record in records}
    cited: dict[str, set[str]] = {}
    for verdict in verdicts:
        cited.setdefault(verdict.claim.name, set()).update(verdict.records)
    rows = [(name, *_spent([by_path[path] for path in sorted(paths)])) for name, paths in cited.items()]
    return _table(("claim", "cells", "core-hours", "GPU-minutes"), [*rows, ("all records", *_spent(by_path.values()))])


def _spent(records: Iterable[Record]) -> tuple[str, str, str]:
    those = list(records)
    cores = sum(_seconds(each, lambda machine: machine["cores"] * (machine["accelerator"] == "none")) for each in those)
    gpus = sum(_seconds(each, lambda machine: float(machine["accelerator"] != "none")) for each in those)
    return str(len(those)), f"{cores / 3600:.1f}", f"{gpus / 60:.0f}"


def _seconds(record: Record, weight: Callable[[dict[str, Any]], float]) -> float:
    """Of all stages; decoding ran alone, perhaps on another machine."""
    seconds, origin = record["seconds"], record["decoding"]["origin"] if record["decoding"] else record.content
    trained = (seconds["data"] + seconds["train"] + seconds["evaluate"]) * weight(record["hardware"])
    return float(trained + seconds["decode"] * weight(origin["hardware"]))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
