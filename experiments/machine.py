"""What one cell will take on this machine, said before it starts, and refused where the memory is not there."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from cpdlm.config import Config, ConfigError
from cpdlm.training.plan import make_plan
from experiments.cost import CostModel
from experiments.records import Record, RecordError, load

ROOT = Path(__file__).resolve().parents[1]
PROCESS_BYTES = 700 * 2**20  # of Python and its libraries, beside what a plan counts


def estimate(config: Config, memory: float) -> str:
    """What a cell will take, as a line. memory: as `check_memory` says."""
    scale = "gpu" if torch.cuda.is_available() else "cpu"
    model = CostModel.of(_alike(config), scale)
    each = model.estimate(config)
    memory = each.memory if math.isnan(memory) else memory
    return (
        f"estimate: {time_text(each.train)} to train, {time_text(each.decode)} to decode, "
        f"{memory_text(memory)} of memory ({model.text()})"
    )


def _alike(config: Config) -> Iterator[Record]:
    """The committed records of the same size of trunk: reading them all takes longer than a small cell."""
    size = replace(config, name="").run_name.split(f"-{config.target}-r")[0].split("-")[-1]
    for path in sorted((ROOT / "results").rglob(f"*-{size}-*.json")):
        with contextlib.suppress(RecordError):
            yield load(path)


def check_memory(config: Config) -> float:
    """Bytes of one process of the cell while it trains, nan where they are not known.

    ConfigError where all processes of this machine together need more than it has. A pretrained model is weighed as it
    is loaded.
    """
    if config.is_pretrained:
        return math.nan
    on_gpu = torch.cuda.is_available()
    try:
        memory = float(make_plan(config, compiled=on_gpu).peak_bytes)
    except (ConfigError, RuntimeError, OSError):  # a vocabulary that is known once the text is read
        return math.nan
    if on_gpu:
        there = float(torch.cuda.mem_get_info()[1])
    else:
        memory += PROCESS_BYTES
        there = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / config.devices
    if memory > there:
        raise ConfigError(
            f"{config.run_name} needs {memory / 2**30:.1f} GiB of memory per process, and this machine has "
            f"{there / 2**30:.1f} GiB; lower data.batch_rows={config.data.batch_rows}, data.context="
            f"{config.data.context} or rank={config.rank}, or raise train.accumulate={config.train.accumulate}"
        )
    return memory


def memory_text(memory: float) -> str:
    return "?" if math.isnan(memory) else f"{memory / 2**20:.0f} MiB"


def time_text(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
