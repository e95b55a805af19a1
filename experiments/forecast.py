"""The table of `sweep.py --dry-run`: every cell, its state, and what it will cost by a model fitted to the records."""

import math
import os

from experiments import cell as one
from experiments import cost
from experiments.machine import memory_text, time_text
from experiments.records import load_all
from experiments.scheduler import ROOT
from experiments.suite import Cell
from experiments.sweep_plan import Plan


def forecast(plan: Plan, scale: str, jobs: int = 0) -> str:
    """scale: cpu or gpu, whose records the cost model is fitted to. jobs: cells trained at once (0: as sweep does)."""
    roots = {path for path in (plan.results, ROOT / "results") if path.is_dir()}
    records = {record["name"]: record for root in roots for record in load_all(root)[0]}
    model = cost.CostModel.of(records.values(), scale)
    costs = cost.estimates(model, plan.needed)
    lines = [f"{'cell':<56} {'state':<22} {'train':>7} {'decode':>7} {'memory':>9}"]
    to_train: list[Cell] = []
    for cell in {cell.name: cell for cell in (*plan.needed, *plan.cells)}.values():
        if cell.name not in costs:
            lines.append(f"{cell.name:<56} {'finished':<22}")
            continue
        trained = one.is_trained(cell.config(str(plan.out)))
        to_train += [] if trained else [cell]
        each, finished = costs[cell.name], cell.name in plan.finished
        state = ("finished" if trained else "for its weights") if finished else "trained" if trained else "to run"
        seconds = f"{time_text(0 if trained else each.train):>7} {time_text(each.decode):>7}"
        lines.append(f"{cell.name:<56} {state:<22} {seconds} {memory_text(each.memory):>9}")
    jobs = jobs or (1 if scale == "gpu" else min(8, len(os.sched_getaffinity(0))))
    unknown = sum(math.isnan(costs[cell.name].train) for cell in plan.pending)
    left = time_text(cost.wall_seconds(to_train, costs, jobs, plan.pending))
    settings = len({cell.setting for cell in plan.cells})
    return "\n".join(
        [
            *lines,
            "",
            f"{len(plan.cells)} cells, {settings} without counting seeds: {len(plan.finished)} finished, "
            f"{len(plan.pending)} to finish, {len(to_train)} to train; about {left} with {jobs} at once"
            + (f" and {unknown} cells on a model of which there are no records" if unknown else ""),
            model.text(),
        ]
    )
