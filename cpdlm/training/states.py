"""Hidden states of a frozen trunk, computed once and kept on disk: all heads trained on it later skip its forwards.

FOLDER/plan.json          what they are states of, and how many rows are done
FOLDER/hidden.bin         (rows, T, D) in the trunk's precision: training from it equals training from the trunk
FOLDER/normaliser.bin     (rows, T) float32, log sum_v exp(logit)

A killed run goes on behind the last row that was noted as done.

Letters: B rows, T position, D width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cpdlm.config import ConfigError
from cpdlm.data.batches import Rows
from cpdlm.files import LOCK_SECONDS, errors_named, locked, remove_partial, write_json
from cpdlm.model.language_model import LanguageModel

PLAN, HIDDEN, NORMALISER = "plan.json", "hidden.bin", "normaliser.bin"
BATCH_ROWS = 8


class StoredStates:
    """Reads rows of a finished folder: {"hidden_BTD", "log_normaliser_BT"}."""

    def __init__(self, folder: Path, rows: int, context: int, width: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.hidden = np.memmap(folder / HIDDEN, _numpy(dtype), "r", shape=(rows, context, width))
        self.normaliser = np.memmap(folder / NORMALISER, np.float32, "r", shape=(rows, context))

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        hidden_BTD = torch.from_numpy(np.asarray(self.hidden[rows])).view(self.dtype)
        return {"hidden_BTD": hidden_BTD, "log_normaliser_BT": torch.from_numpy(np.asarray(self.normaliser[rows]))}


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
    }
    need = rows.count * rows.context * (width * dtype.itemsize + 4)
    label = f"hidden states of {rows.count * rows.context:,} tokens ({need / 2**30:.2f} GiB)"
    if need > limit_gib * 2**30:
        most = int(limit_gib * 2**30 / (width * dtype.itemsize + 4))
        raise ConfigError(
            f"{label} are more than data.states_gib={limit_gib:g}; keep fewer (data.states={most}), or raise the limit"
        )
    with kept_folder(cache / "states", plan, seconds) as folder:
        if _done(folder) < rows.count:
            say(f"{label}: {folder}")
            _complete(model, rows, folder, plan, device)
    return StoredStates(folder, rows.count, rows.context, width, dtype)


@contextlib.contextmanager
def kept_folder(parent: Path, plan: dict[str, Any], seconds: float) -> Iterator[Path]:
    """Hold the folder of what is made by `plan`, which names it; waits `seconds` for another process that makes it."""
    folder = parent / hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", seconds):
            remove_partial(folder)
            yield folder


def _complete(model: LanguageModel, rows: Rows, folder: Path, plan: dict[str, Any], device: torch.device) -> None:
    done = _done(folder)
    model = model.to(device)
    with (
        open(folder / HIDDEN, "r+b" if done else "wb") as hidden_file,
        open(folder / NORMALISER, "r+b" if done else "wb") as normaliser_file,
        tqdm(total=rows.count, initial=done, desc="hidden states", unit="row") as bar,
    ):
        width, itemsize = model.trunk.width, model.trunk.embedding.dtype.itemsize
        hidden_file.seek(done * rows.context * width * itemsize)
        normaliser_file.seek(done * rows.context * 4)
        while done < rows.count:
            some = list(range(done, min(done + BATCH_ROWS, rows.count)))
            batch = rows[some]
            with torch.inference_mode():
                hidden_BTD = model.hidden(batch["tokens_BT"].to(device), batch["position_ids_BT"].to(device))
                normaliser_BT = model.log_normaliser(hidden_BTD)
            hidden_file.write(hidden_BTD.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            normaliser_file.write(normaliser_BT.cpu().numpy().tobytes())
            hidden_file.flush()
            normaliser_file.flush()
            done = some[-1] + 1
            write_json(folder / PLAN, plan | {"done": done})
            bar.update(len(some))


def _done(folder: Path) -> int:
    """Rows that are whole on the disk; 0 where the note of them cannot be read."""
    try:
        return int(json.loads((folder / PLAN).read_bytes())["done"])
    except (OSError, ValueError, KeyError):
        return 0


def _numpy(dtype: torch.dtype) -> Any:
    return {2: np.int16, 4: np.float32, 8: np.float64}[dtype.itemsize]
