"""Rows -> batches: which rows a process sees at a step, and nothing else.

The training order is a pure function of (seed, global sample index), so it does not depend on the number of processes
or of loader workers, and a resumed run goes on with exactly the rows that come next.

Letters: B rows in a batch, T position, N horizon, P prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cpdlm.config import Config, ConfigError
from cpdlm.data import windows
from cpdlm.data.stored import Corpus, TokenSplit

# Keys that keep the draws of different purposes apart.
_TRAINING, _VALIDATION, _PROMPTS, _SLOTS, _PICKS, _STATES = 1, 2, 3, 4, 5, 6
RELEASES = 9  # each has test rows and prompts of its own, also where a package is the whole test split


class Rows(Dataset[dict[str, Tensor]]):
    """A split, indexed by a list of rows: int64 tokens_BT, position_ids_BT, future_BTN, successors_BT (see `windows`)
    and source_B, the source that most tokens of the row come from.

    most: this many rows only, chosen by hash (0: all).
    """

    def __init__(self, split: TokenSplit, context: int, horizon: int, most: int = 0) -> None:
        self.split, self.context, self.horizon = split, context, horizon
        self.count = windows.row_count(len(split.tokens), context)
        self.chosen: windows.Ints | None = None
        if 0 < most < self.count:
            self.chosen, self.count = np.sort(windows.hash_order(self.count, _STATES)[:most]), most

    def indices(self, rows: list[int]) -> windows.Ints:
        """Which rows of the split these are."""
        rows_B = np.asarray(rows, dtype=np.int64)
        return rows_B if self.chosen is None else self.chosen[rows_B]

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        rows_B = self.indices(rows)
        split = self.split
        arrays = windows.batch(split.tokens, split.offsets, rows_B, self.context, self.horizon, split.trained)
        arrays["source_B"] = windows.row_sources(self.split.offsets, self.split.source_ids, rows_B, self.context)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class Share:
    """One micro-batch of a process: its rows, and all rows of that process in the same optimiser step."""

    step: int
    rows: list[int]
    step_rows: list[int]


class KeptStates(Protocol):
    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]: ...


class TrainingRows(Dataset[dict[str, Tensor]]):
    """`Rows` for training: which positions train the later tokens, and the counts that normalise the whole step.

    picked_BT: bool, a random `fraction` of positions, a pure function of (seed, step, position in the stream).
    step_counts: int64 (positions with a successor, those of them picked), over all micro-batches of this process.
    states: what is known already of the frozen trunk at these rows; its tensors join the batch.
    """

    def __init__(self, rows: Rows, seed: int, fraction: float, states: KeptStates | None = None) -> None:
        self.rows, self.seed, self.fraction, self.states = rows, seed, fraction, states

    def __getitem__(self, share: Share) -> dict[str, Tensor]:
        exists_BT, picked_BT = self._positions(share.step_rows, share.step)
        counts = torch.tensor([exists_BT.sum(), (exists_BT & picked_BT).sum()])
        _, mine_BT = self._positions(share.rows, share.step)
        kept = self.states[share.rows] if self.states is not None else {}
        return self.rows[share.rows] | {"picked_BT": torch.from_numpy(mine_BT), "step_counts": counts} | kept

    def _positions(self, rows: list[int], step: int) -> tuple[np.ndarray, np.ndarray]:
        context, split = self.rows.context, self.rows.split
        starts_B = windows.row_starts(self.rows.indices(rows), context)
        exists_BT = windows.successor_counts(split.offsets, starts_B, context, 1, split.trained) > 0
        return exists_BT, windows.picked(starts_B, context, self.fraction, _PICKS, self.seed, step)


def training_rows(row_count: int, seed: int, first_sample: int, samples: int) -> list[int]:
    """Rows of the global samples first_sample .. first_sample + samples - 1.

    The stream is one permutation of all rows after another, each a pure function of (seed, epoch).
    """
    rows: list[int] = []
    while len(rows) < samples:
        epoch, begin = divmod(first_sample + len(rows), row_count)
        order = _permutation(row_count, seed, epoch)
        rows += order[begin : begin + samples - len(rows)].tolist()
    return rows


@lru_cache(maxsize=2)
def _permutation(row_count: int, seed: int, epoch: int) -> windows.Ints:
    return windows.hash_order(row_count, _TRAINING, seed, epoch)


class TrainingOrder(Sampler[Share]):
    """Endless micro-batches of one process: `accumulate` of them per optimiser step.

    Step s takes the global samples s * batch_rows .. (s + 1) * batch_rows - 1; micro-batch m is their m-th part, and
    process r of W takes the r-th part of it.
    """

    def __init__(
        self,
        row_count: int,
        *,
        seed: int,
        batch_rows: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
    ) -> None:
        if batch_rows % (world * accumulate):
            raise ConfigError(
                f"data.batch_rows={batch_rows} does not divide into {world} processes x train.accumulate={accumulate}; "
                f"try data.batch_rows={world * accumulate * max(1, round(batch_rows / (world * accumulate)))}"
            )
        self.row_count, self.seed, self.batch_rows, self.accumulate = row_count, seed, batch_rows, accumulate
        self.rank, self.world, self.start_step = rank, world, start_step

    def __iter__(self) -> Iterator[Share]:
        size = self.batch_rows // (self.world * self.accumulate)
        step = self.start_step
        while True:
            firsts = [step * self.batch_rows + (m * self.world + self.rank) * size for m in range(self.accumulate)]
            micros = [training_rows(self.row_count, self.seed, first, size) for first in firsts]
            for rows in micros:
                yield Share(step, rows, [row for micro in micros for row in micro])
            step += 1


def prompts(split: TokenSplit, wanted: int, length: int, release: int = 0) -> Tensor:
    """(P, T) int64 ids, P at most `wanted`: pieces of T = length tokens.

    Documents are taken in an order given by a hash, one prompt from each as long as there are documents, at an offset
    given by a hash; no two prompts share a position and none contains an end of document. Each release begins with
    other documents.
    """
    lengths = np.diff(split.offsets) - 1  # without eos
    slots = lengths // length
    wanted = min(wanted, int(slots.sum()))
    order = np.roll(windows.hash_order(len(lengths), _PROMPTS), -release * len(lengths) // RELEASES)
    starts: list[int] = []
    turn = 0
    while len(starts) < wanted:
        for document in order[slots[order] > turn][: wanted - len(starts)].tolist():
            free = int(lengths[document] - slots[document] * length)
            shift = int(windows.mix(windows.mix(document) ^ windows.mix(_SLOTS))[0] % np.uint64(free + 1))
            slot = int(windows.hash_order(int(slots[document]), _SLOTS, document)[turn])
            starts.append(int(split.offsets[document]) + shift + slot * length)
        turn += 1
    indices_PT = np.array(starts, dtype=np.int64)[:, None] + np.arange(length)
    return torch.from_numpy(split.tokens[indices_PT].astype(np.int64))


class TokenDataModule(L.LightningDataModule):
    """Batches of one config on one corpus. Rank, world size and step come from the trainer; without one: 0, 1 and 0.

    states: set it where the frozen trunk's states at `training_rows()` are known.
    """

    states: KeptStates | None = None

    def __init__(self, config: Config, corpus: Corpus) -> None:
        super().__init__()
        self.config, self.corpus = config, corpus

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless; begins with the batch of the trainer's global step, so call it after the step is restored."""
        rank, world, step = self._rank_world_step()
        data, rows = self.config.data, self.training_rows()
        order = TrainingOrder(
            rows.count,
            seed=self.config.seed,
            batch_rows=data.batch_rows,
            accumulate=self.config.train.accumulate,
            rank=rank,
            world=world,
            start_step=step,
        )
        training = TrainingRows(rows, self.config.seed, self.config.loss.joint_fraction, self.states)
        return self._loader(training, order)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """This process's share of the first `train.validation_rows` validation rows in hash order.

        Every process gets as many batches, so that collective operations meet; their sizes may differ by one.
        """
        rank, world, _ = self._rank_world_step()
        rows = self._rows("validation")
        chosen = windows.hash_order(rows.count, _VALIDATION)[: self.config.train.validation_rows]
        if len(chosen) < world:
            raise ConfigError(
                f"train.validation_rows={self.config.train.validation_rows} of {rows.count} validation rows are fewer "
                f"than the {world} processes; raise it, or lower devices or data.context"
            )
        size = self.config.data.batch_rows // self.config.train.accumulate
        batches = np.array_split(chosen, min(-(-len(chosen) // size), len(chosen) // world))
        return self._loader(rows, [np.array_split(batch, world)[rank].tolist() for batch in batches])

    def test_batches(self) -> DataLoader[dict[str, Tensor]]:
        """`evaluate.rows` rows spread evenly over the test split, in order, `evaluate.batch_rows` at a time.

        Every release takes others, as far as there are as many.
        """
        rows = self._rows("test")
        count = min(self.config.evaluate.rows, rows.count)
        shift = self.config.data.release * (rows.count // count) // RELEASES
        chosen = (np.arange(count) * rows.count // count + shift).tolist()
        size = self.config.evaluate.batch_rows
        return self._loader(rows, [chosen[start : start + size] for start in range(0, count, size)])

    def prompts(self, split: str = "test") -> Tensor:
        """(P, T) int64 ids: `decode.prompts` prompts of `decode.prompt_tokens` tokens, the same for every seed.

        ConfigError where the split has too few.
        """
        wanted, length = self.config.decode.prompts, self.config.decode.prompt_tokens
        found_PT = prompts(self.corpus.split(split), wanted, length, self.config.data.release)
        if len(found_PT) < wanted:
            raise ConfigError(
                f"decode.prompts={wanted} prompts of decode.prompt_tokens={length} tokens: the {split} split of "
                f"corpus={self.config.corpus} has room for {len(found_PT)}; lower one of them, or raise "
                "data.max_bytes if it is set"
            )
        return found_PT

    def training_rows(self) -> Rows:
        """The rows that training draws from."""
        data = self.config.data
        return Rows(self.corpus.train, data.context, self.config.horizon, data.states // data.context)

    def _rows(self, split: str) -> Rows:
        return Rows(self.corpus.split(split), self.config.data.context, self.config.horizon)

    def _loader(
        self, rows: Dataset[dict[str, Tensor]], order: Sampler[Any] | list[list[int]]
    ) -> DataLoader[dict[str, Tensor]]:
        workers = self.config.data.workers
        return DataLoader(rows, sampler=order, batch_size=None, num_workers=workers, persistent_workers=workers > 0)

    def _rank_world_step(self) -> tuple[int, int, int]:
        if self.trainer is None:
            return 0, 1, 0
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.global_step
