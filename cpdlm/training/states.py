"""Hidden states of a frozen trunk, computed once and kept on disk: all heads trained on it later skip its forwards.

FOLDER/plan.json          what they are states of
FOLDER/hidden.bin         (rows, T, D) in the trunk's precision: training from it equals training from the trunk
FOLDER/normaliser.bin     (rows, T) float32, log sum_v exp(logit)
FOLDER/checksums.bin      uint32 per block of BATCH_ROWS rows, crc32 of both: written once the block is on the disk

Blocks that are not as their checksum says, or have none, are computed again: those that a killed run had not come to,
and those that were cut off, zeroed or changed since.

Letters: B rows, T position, D width.
"""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from cpdlm.config import ConfigError
from cpdlm.data.batches import Rows
from cpdlm.files import LOCK_SECONDS, errors_named, locked, remove_partial, write_json
from cpdlm.model.language_model import LanguageModel
from cpdlm.progress import Bar

PLAN, HIDDEN, NORMALISER, CHECKSUMS = "plan.json", "hidden.bin", "normaliser.bin", "checksums.bin"
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
    with kept_folder(cache / "states", plan, seconds) as folder, contextlib.ExitStack() as opened:
        blocks = _Blocks(folder, rows.count, rows.context * width * dtype.itemsize, rows.context * 4, opened)
        if wrong := blocks.wrong():
            again = "" if len(wrong) == blocks.count else f", {len(wrong)} of {blocks.count} blocks to be computed"
            say(f"{label}: {folder}{again}")
            write_json(folder / PLAN, plan)
            _compute(model, rows, blocks, wrong, device)
    return StoredStates(folder, rows.count, rows.context, width, dtype)


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


class _Blocks:
    """The files of a folder, open, block by block of BATCH_ROWS rows (the last may have fewer)."""

    def __init__(
        self, folder: Path, rows: int, hidden_bytes: int, normaliser_bytes: int, opened: contextlib.ExitStack
    ) -> None:
        """The byte counts are those of one row. opened: closes the files."""
        self.rows, self.count = rows, -(-rows // BATCH_ROWS)
        self.row_bytes = {HIDDEN: hidden_bytes, NORMALISER: normaliser_bytes}
        self.files: dict[str, BinaryIO] = {}
        for name, size in (
            *((name, rows * each) for name, each in self.row_bytes.items()),
            (CHECKSUMS, 4 * self.count),
        ):
            (folder / name).touch()
            self.files[name] = opened.enter_context(open(folder / name, "r+b"))  # noqa: SIM115
            self.files[name].truncate(size)

    def rows_of(self, block: int) -> list[int]:
        return list(range(block * BATCH_ROWS, min((block + 1) * BATCH_ROWS, self.rows)))

    def wrong(self) -> list[int]:
        """Blocks that are missing, or not as they were written. Reads all of them."""
        noted = np.frombuffer(self._at(CHECKSUMS, 0).read(), np.uint32)
        return [
            block
            for block in range(self.count)
            if not noted[block] or self._checksum(self._read(block)) != noted[block]
        ]

    def write(self, block: int, *parts: bytes) -> None:
        """parts: its hidden states, its normalisers."""
        for (name, size), part in zip(self.row_bytes.items(), parts, strict=True):
            self._put(name, block * BATCH_ROWS * size, part)
        self._put(CHECKSUMS, 4 * block, np.uint32(self._checksum(parts)).tobytes())

    def _read(self, block: int) -> list[bytes]:
        rows = len(self.rows_of(block))
        return [self._at(name, block * BATCH_ROWS * size).read(rows * size) for name, size in self.row_bytes.items()]

    def _put(self, name: str, offset: int, content: bytes) -> None:
        file = self._at(name, offset)
        file.write(content)
        file.flush()

    def _at(self, name: str, offset: int) -> BinaryIO:
        self.files[name].seek(offset)
        return self.files[name]

    @staticmethod
    def _checksum(parts: Iterable[bytes]) -> int:
        checksum = 1  # so that a block of no bytes differs from a checksum of zero
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        return checksum


def _compute(model: LanguageModel, rows: Rows, blocks: _Blocks, wanted: list[int], device: torch.device) -> None:
    model = model.to(device)
    total = sum(len(blocks.rows_of(block)) for block in wanted)
    with Bar(total=total, desc="hidden states", unit="row") as bar:
        for block in wanted:
            some = blocks.rows_of(block)
            batch = rows[some]
            with torch.inference_mode():
                hidden_BTD = model.hidden(batch["tokens_BT"].to(device), batch["position_ids_BT"].to(device))
                normaliser_BT = model.log_normaliser(hidden_BTD)
            hidden = hidden_BTD.cpu().contiguous().view(torch.uint8).numpy().tobytes()
            blocks.write(block, hidden, normaliser_BT.cpu().float().numpy().tobytes())
            bar.update(len(some))


def _numpy(dtype: torch.dtype) -> Any:
    return {2: np.int16, 4: np.float32, 8: np.float64}[dtype.itemsize]
