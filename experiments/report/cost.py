"""Tables of what training cost, and of the next-token models."""

from experiments.families import Family, trunk_records
from experiments.report.cells import PLACE, Place, places
from experiments.report.table import Column, Columns, Table, average, dash, described, tabulated


def cost_table(families: list[Family]) -> Table:
    """What training each cell cost, against what the machine can do."""
    columns = PLACE | {
        "step (ms)": _over_seeds("step_ms_median", digits=1),
        "tokens/s": _over_seeds("tokens_per_second"),
        "peak memory (GiB)": _over_seeds("peak_memory_bytes", scale=2**-30, digits=2),
        "MFLOPs per token": _counted("flops_per_token", scale=1e-6),
        "GFLOP/s done": _counted("flops_per_token", "tokens_per_second", scale=1e-9),
        "GFLOP/s of a matrix product": _counted("matmul_flops_per_second", scale=1e-9),
        "achieved (%)": _counted("matmul_fraction", scale=100),
    }
    records = [record for family in families for record in family.records()]
    caption = (
        "Training cost, means over seeds (± their standard deviation). Step: median; memory: of the process (of the "
        "GPU, where there is one). FLOPs: matrix products and attention, forward and backward, counted on the first "
        "step, 2 per multiply-add; achieved: those done per second over the rate of a large square matrix product on "
        f"the same device, threads and precision. -: not counted. {described(records, decoded=False)}"
    )
    return tabulated("cost", caption, columns, places(families))


def _over_seeds(key: str, scale: float = 1, digits: int = 0) -> Column:
    return lambda at: average([record["training"][key] * scale for record in at.cells.values()], digits)


def _counted(key: str, by: str = "", scale: float = 1) -> Column:
    """Of the records that counted their FLOPs."""

    def cell(at: Place) -> str:
        training = [record["training"] for record in at.cells.values()]
        counted = [each for each in training if each["flops_per_token"] and each["matmul_flops_per_second"]]
        return average([each[key] * (each[by] if by else 1) * scale for each in counted], 1)

    return cell


_TRUNK: Columns = {
    "trunk": lambda record: str(record["name"]),
    "corpus": lambda record: str(record.config["corpus"]),
    "size": lambda record: str(record.config["size"]),
    "parameters": lambda record: f"{record['parameters']['total']:,}",
    "steps": lambda record: str(record.config["optim"]["steps"]),
    "first-token NLL (nats)": lambda record: f"{record['likelihood']['first_token_nll']['mean']:.4f}",
    "standard error (nats)": lambda record: f"{record['likelihood']['first_token_nll']['sem']:.4f}",
    "bits per byte": lambda record: dash(record["likelihood"]["bits_per_byte"], 4),
    "record": lambda record: record.path,
}


def trunks_table(families: list[Family]) -> Table:
    """Next-token models: the frozen targets, and the references of equal training."""
    caption = (
        "Next-token models: frozen targets of the heads, and references trained for as long as the from-scratch cells."
    )
    return tabulated("trunks", caption, _TRUNK, trunk_records(families))
