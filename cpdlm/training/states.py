"""Hidden states of a frozen trunk, computed once and kept on disk: all heads trained on it later skip its forwards.

FOLDER/plan.json           what they are states of
FOLDER/NNNNN.safetensors   of a block of BATCH_ROWS rows (the last may have fewer):
       hidden_BTD            in the trunk's precision: training from it equals training from the trunk
       log_normaliser_BT     float32, log sum_v exp(logit)

Blocks that are not there or were cut off are computed.

Letters: B rows, T position, D width.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cpdlm.config import ConfigError
from cpdlm.data.batches import Rows
from cpdlm.files import LOCK_SECONDS, errors_named, locked, remove_partial, write_json
from cpdlm.model.language_model import LanguageModel
from cpdlm.progress import Bar
from cpdlm.training.checkpoints import write_tensors

PLAN, FORMAT = "plan.json", 2
BATCH_ROWS = 8
HIDDEN, NORMALISER = "hidden_BTD", "log_normaliser_BT"


class StoredStates:
    """Reads rows of a folder: {"hidden_BTD", "log_normaliser_BT"}."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows, self.blocks = folder, rows, -(-rows // BATCH_ROWS)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {HIDDEN: [], NORMALISER: []}
        for row in rows:
            with safe_open(self.path(row // BATCH_ROWS), framework="pt") as file:
                for name, parts in found.items():
                    parts.append(file.get_slice(name)[row % BATCH_ROWS])
        return {name: torch.stack(parts) for name, parts in found.items()}

    def path(self, block: int) -> Path:
        return self.folder / f"{block:05d}.safetensors"

    def missing(self) -> list[int]:
        """Blocks that are not there, or not whole."""
        return [block for block in range(self.blocks) if not self._is_whole(block)]

    def rows_of(self, block: int) -> list[int]:
        return list(range(block * BATCH_ROWS, min((block + 1) * BATCH_ROWS, self.rows)))

    def _is_whole(self, block: int) -> bool:
        try:
            with safe_open(self.path(block), framework="pt") as file:
                return set(file.keys()) == {HIDDEN, NORMALISER}
        except (SafetensorError, OSError):
            return False


def kept_states(
    model: LanguageModel,
    rows: Rows,
    cache: Path,
    identity: dict[str, Any],
    limit_gib: float,
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
    seconds: float = LOCK_SECONDS,
) -> StoredStates:
    """The states of `rows`, from the folder under `cache` of that identity; computed or finished where they are not.

    identity: what the states depend on besides the rows, the hashes of trunk and text. Raises ConfigError where they
    would take more than limit_gib GiB, WriteError where the disk is full or another process computes them for longer
    than `seconds`; what is done stays.
    """
    dtype, width = model.trunk.embedding.dtype, model.trunk.width
    plan = identity | {
        "rows": rows.count,
        "context": rows.context,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "format": FORMAT,
    }
    need = rows.count * rows.context * (width * dtype.itemsize + 4)
    label = f"hidden states of {rows.count * rows.context:,} tokens ({need / 2**30:.2f} GiB)"
    if need > limit_gib * 2**30:
        most = int(limit_gib * 2**30 / (width * dtype.itemsize + 4))
        raise ConfigError(
            f"{label} are more than data.states_gib={limit_gib:g}; keep fewer (data.states={most}), or raise the limit"
        )
    with kept_folder(cache / "states", plan, seconds) as folder:
        states = StoredStates(folder, rows.count)
        if missing := states.missing():
            again = (
                "" if len(missing) == states.blocks else f", {len(missing)} of {states.blocks} blocks to be computed"
            )
            say(f"{label}: {folder}{again}")
            write_json(folder / PLAN, plan)
            _compute(model, rows, states, missing, device)
    return states


def folder_of(parent: Path, plan: dict[str, Any]) -> Path:
    return parent / hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def kept_folder(parent: Path, plan: dict[str, Any], seconds: float) -> Iterator[Path]:
    """Hold the folder of what is made by `plan`, which names it; waits `seconds` for another process that makes it."""
    folder = folder_of(parent, plan)
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", seconds):
            remove_partial(folder)
            yield folder


def _compute(model: LanguageModel, rows: Rows, states: StoredStates, wanted: list[int], device: torch.device) -> None:
    model = model.to(device)
    total = sum(len(states.rows_of(block)) for block in wanted)
    with Bar(total=total, desc="hidden states", unit="row") as bar:
        for block in wanted:
            some = states.rows_of(block)
            batch = rows[some]
            with torch.inference_mode():
                hidden_BTD = model.hidden(batch["tokens_BT"].to(device), batch["position_ids_BT"].to(device))
                normaliser_BT = model.log_normaliser(hidden_BTD)
            write_tensors(states.path(block), {HIDDEN: hidden_BTD.cpu(), NORMALISER: normaliser_BT.cpu().float()})
            bar.update(len(some))
