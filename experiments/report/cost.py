"""Tables of what training cost, and of the next-token models."""

from __future__ import annotations

import itertools

from experiments.families import Cells, Family, trunk_records
from experiments.report.table import Table, average, dash, described


def cost_table(families: list[Family]) -> Table:
    """What training each cell cost, against what the machine can do."""
    rows = [
        (family.label, variant, str(rank), str(len(cells)), *_cost(cells))
        for family in families
        for variant, rank in itertools.product(family.variants(), family.all_ranks())
        if (cells := family.cells.get((variant, rank)))
    ]
    header = (
        "setting",
        "variant",
        "rank",
        "seeds",
        "step (ms)",
        "tokens/s",
        "peak memory (GiB)",
        "MFLOPs per token",
        "GFLOP/s done",
        "GFLOP/s of a matrix product",
        "achieved (%)",
    )
    records = [record for family in families for record in family.records()]
    caption = (
        "Training cost, means over seeds (± their standard deviation). Step: median; memory: of the process (of the "
        "GPU, where there is one). FLOPs: matrix products and attention, forward and backward, counted on the first "
        "step, 2 per multiply-add; achieved: those done per second over the rate of a large square matrix product on "
        f"the same device, threads and precision. -: not counted. {described(records, decoded=False)}"
    )
    return Table("cost", caption, header, rows)


def _cost(cells: Cells) -> tuple[str, ...]:
    training = [record["training"] for record in cells.values()]
    counted = [each for each in training if each.get("flops_per_token") and each.get("matmul_flops_per_second")]
    return (
        average([each["step_ms_median"] for each in training], 1),
        average([each["tokens_per_second"] for each in training], 0),
        average([each["peak_memory_bytes"] / 2**30 for each in training], 2),
        average([each["flops_per_token"] / 1e6 for each in counted], 1),
        average([each["flops_per_token"] * each["tokens_per_second"] / 1e9 for each in counted], 1),
        average([each["matmul_flops_per_second"] / 1e9 for each in counted], 1),
        average([100 * each["matmul_fraction"] for each in counted], 1),
    )


def trunks_table(families: list[Family]) -> Table:
    """Next-token models: the frozen targets, and the references of equal training."""
    rows: list[tuple[str, ...]] = []
    for record in trunk_records(families):
        config, likelihood = record.config, record["likelihood"]
        first = likelihood["first_token_nll"]
        rows.append(
            (
                str(record["name"]),
                str(config["corpus"]),
                str(config["size"]),
                f"{record['parameters']['total']:,}",
                str(config["optim"]["steps"]),
                f"{first['mean']:.4f}",
                f"{first['sem']:.4f}",
                dash(likelihood["bits_per_byte"], 4),
                record.path,
            )
        )
    header = (
        "trunk",
        "corpus",
        "size",
        "parameters",
        "steps",
        "first-token NLL (nats)",
        "standard error (nats)",
        "bits per byte",
        "record",
    )
    caption = (
        "Next-token models: frozen targets of the heads, and references trained for as long as the from-scratch cells."
    )
    return Table("trunks", caption, header, rows)
