"""A small data module for training tests: ragged documents, a stream that resumes at any step, disjoint ranks.

Micro-batch m of process r of w holds the rows of global micro-batch m at r, r + w, ...: together, whatever w is, the
same rows. Shares no code with cpdlm.data.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cpdlm.config import Config

VOCAB = 16
SETTINGS: dict[str, Any] = {  # of runs on this data
    "size": "micro",
    "rank": 2,
    "horizon": 3,
    "data.context": 16,
    "data.batch_rows": 4,
    "decode.prompt_tokens": 4,
    "decode.new_tokens": 4,
    "optim.lr": 1e-2,
    "train.log_every": 1,
}


def row(seed: int, index: int, context: int, horizon: int) -> dict[str, Any]:
    """One row of several documents of 1 to 9 tokens, each with its own end."""
    source = random.Random(f"{seed} {index}")
    tokens: list[int] = []
    positions: list[int] = []
    successors: list[int] = []
    future: list[list[int]] = []
    while len(tokens) < context:
        document = [source.randrange(VOCAB) for _ in range(source.randint(1, 9))]
        for k, token in enumerate(document):
            later = document[k + 1 : k + 1 + horizon]
            tokens.append(token)
            positions.append(k)
            successors.append(len(later))
            future.append(later + [0] * (horizon - len(later)))
    return {
        "tokens_BT": tokens[:context],
        "position_ids_BT": positions[:context],
        "future_BTN": future[:context],
        "successors_BT": successors[:context],
    }


def batch(seed: int, indices: list[int], context: int, horizon: int) -> dict[str, Tensor]:
    rows = [row(seed, index, context, horizon) for index in indices]
    return {key: torch.tensor([one[key] for one in rows]) for key in rows[0]}


class Stream(IterableDataset):
    def __init__(self, data: RaggedData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        config, trainer = self.data.config, self.data.trainer
        assert trainer is not None
        world, rank = trainer.world_size, trainer.global_rank
        size = config.data.batch_rows // config.train.accumulate
        micro = trainer.global_step * config.train.accumulate
        while True:
            mine = [micro * size + k for k in range(rank, size, world)]
            self.data.seen += mine
            step = micro // config.train.accumulate * config.train.accumulate
            whole = [
                m * size + k for m in range(step, step + config.train.accumulate) for k in range(rank, size, world)
            ]
            positions = (batch(config.seed, whole, config.data.context, config.horizon)["successors_BT"] > 0).sum()
            arrays = batch(config.seed, mine, config.data.context, config.horizon)
            every = {"picked_BT": torch.ones_like(arrays["tokens_BT"], dtype=torch.bool)}
            yield arrays | every | {"step_counts": torch.stack([positions, positions])}
            micro += 1


class RaggedData(L.LightningDataModule):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.seen: list[int] = []

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(self), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        config = self.config
        rows = [batch(config.seed + 1, [2 * k, 2 * k + 1], config.data.context, config.horizon) for k in range(2)]
        return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
