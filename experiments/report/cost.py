"""The table of what training cost."""

from experiments.families import Family
from experiments.report.cells import PLACE, Place, places
from experiments.report.table import Column, Table, average, described, tabulated


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
