"""Which rows a process sees: the same for every world size, for loader workers and after a resume."""

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from cpdlm.config import Config, resolve
from cpdlm.data.batches import Rows, TokenDataModule, TrainingOrder, training_rows
from cpdlm.data.stored import Corpus, TokenSplit
from cpdlm.data.tokenizer import BytesTokenizer
from tests.tiny import MICRO


def make_split(documents: int, seed: int, longest: int = 90) -> TokenSplit:
    """Tokens count up through the stream (below 256), so that a row tells where it is from."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, longest, size=documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = (np.arange(offsets[-1]) % 251).astype(np.uint16)
    tokens[offsets[1:] - 1] = 256
    ids = np.sort(draw.integers(0, 2, size=documents)).astype(np.int32)
    return TokenSplit(tokens, offsets, ids, lengths - 2, ["a", "b"])


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(make_split(100, 0), make_split(40, 1), make_split(40, 2), BytesTokenizer(), {})


def config(**changes: object) -> Config:
    settings = MICRO | {"data.context": 16, "data.batch_rows": 8, "horizon": 4, "train.validation_rows": 21}
    return resolve({**settings, **{key.replace("__", "."): value for key, value in changes.items()}})


def steps(order: TrainingOrder, count: int) -> list[list[int]]:
    """Rows of this process in each of `count` optimiser steps."""
    batches = iter(order)
    shares = [list(itertools.islice(batches, order.accumulate)) for _ in range(count)]
    for number, step in enumerate(shares, start=order.start_step):
        assert all(share.step == number for share in step)
        assert all(share.step_rows == list(itertools.chain(*(other.rows for other in step))) for share in step)
    return [step[0].step_rows for step in shares]


def world_steps(world: int, count: int, start: int = 0, accumulate: int = 1, rows: int = 50) -> list[list[list[int]]]:
    settings = {"seed": 3, "batch_rows": 12, "accumulate": accumulate, "world": world, "start_step": start}
    return [steps(TrainingOrder(rows, rank=rank, **settings), count) for rank in range(world)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)])
def test_the_rows_of_a_step_do_not_depend_on_the_processes(world: int, accumulate: int) -> None:
    wanted = [training_rows(50, 3, 12 * step, 12) for step in range(10)]
    ranks = world_steps(world, 10, accumulate=accumulate)
    for step in range(10):
        shares = [ranks[rank][step] for rank in range(world)]
        assert {len(share) for share in shares} == {12 // world}, "disjoint and equal shares"
        assert sorted(itertools.chain(*shares)) == sorted(wanted[step])


def test_micro_batches_match_across_world_sizes() -> None:
    """Each micro-batch too is the same set: the balance loss, which is not linear, is taken over each."""
    one, two = (
        [iter(TrainingOrder(50, seed=3, batch_rows=12, accumulate=2, rank=rank, world=world)) for rank in range(world)]
        for world in (1, 2)
    )
    for _ in range(20):
        assert sorted(next(one[0]).rows) == sorted([*next(two[0]).rows, *next(two[1]).rows])


def test_resume_on_another_number_of_processes() -> None:
    whole = world_steps(1, 12)[0]
    parts = [*zip(*world_steps(2, 4), strict=True), *zip(*world_steps(1, 4, start=4), strict=True)]
    parts += zip(*world_steps(2, 4, start=8), strict=True)
    assert [sorted(itertools.chain(*shares)) for shares in parts] == [sorted(rows) for rows in whole]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_picked_positions_and_counts_belong_to_the_step(corpus: Corpus, accumulate: int) -> None:
    """Two processes, or two micro-batches, train on the very positions that one would, and know how many there are."""

    def positions(world: int, accumulate: int) -> tuple[set[tuple[int, ...]], int, int]:
        chosen = config(train__accumulate=accumulate, loss__joint_fraction=0.4)
        found, exist, picked = set(), 0, 0
        for rank in range(world):
            data = TokenDataModule(chosen, corpus)
            data.trainer = Place(rank, world, 7)  # type: ignore[assignment]
            for number, batch in enumerate(take(data.train_dataloader(), accumulate)):
                here_BT = batch["picked_BT"] & (batch["successors_BT"] > 0)
                found |= {tuple(row) for row in batch["future_BTN"][here_BT].tolist()}
                exist += int(batch["step_counts"][0]) * (number == 0)
                picked += int(batch["step_counts"][1]) * (number == 0)
        return found, exist, picked

    one = positions(1, 1)
    assert positions(2, accumulate) == one and positions(1, accumulate) == one
    assert 0.3 * one[1] < one[2] < 0.5 * one[1]


def test_every_epoch_is_another_permutation() -> None:
    stream = training_rows(50, 3, 0, 150)
    epochs = [stream[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != training_rows(50, 4, 0, 50)
    assert training_rows(50, 3, 45, 20) == stream[45:65], "a batch may lie across two epochs"
    assert training_rows(5, 3, 2, 23) == training_rows(5, 3, 0, 25)[2:], "and a corpus may be smaller than a batch"


def take(loader: Any, count: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(iter(loader), count))


def test_batches_do_not_depend_on_loader_workers(corpus: Corpus) -> None:
    plain = take(TokenDataModule(config(), corpus).train_dataloader(), 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = take(TokenDataModule(config(data__workers=2), corpus).train_dataloader(), 6)
    resumed = TokenDataModule(config(), corpus)
    resumed.trainer = Place(0, 1, 2)  # type: ignore[assignment]
    later = take(resumed.train_dataloader(), 4)
    for one, two in zip(plain, loaded, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    for one, two in zip(plain[2:], later, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.validated = 0

    def training_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        self.seen.append(batch["tokens_BT"][:, 0].tolist())
        return self.weight.sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> None:
        self.validated += len(batch["tokens_BT"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_resumes_with_the_next_rows(corpus: Corpus, tmp_path: Path, accumulate: int) -> None:
    chosen = config(train__accumulate=accumulate)

    def train(steps: int, checkpoint: Path | None = None) -> tuple[Recorder, L.Trainer]:
        trainer = L.Trainer(
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
            max_steps=steps,
            accumulate_grad_batches=accumulate,
            accelerator="cpu",
            use_distributed_sampler=False,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            val_check_interval=3 * accumulate,
        )
        module = Recorder()
        trainer.fit(module, TokenDataModule(chosen, corpus), ckpt_path=checkpoint, weights_only=True)
        return module, trainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, _ = train(9)
        first, trainer = train(4)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        second, _ = train(9, tmp_path / "last.ckpt")
    assert len(whole.seen) == 9 * accumulate
    assert first.seen + second.seen == whole.seen
    assert whole.validated == 3 * 21


class Place:
    """As much of a trainer as the data module asks for."""

    def __init__(self, rank: int, world: int, step: int = 0) -> None:
        self.global_rank, self.world_size, self.global_step = rank, world, step


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_shares_are_disjoint_and_ragged(corpus: Corpus, world: int) -> None:
    chosen = config(data__batch_rows=6)

    def share(rank: int, world: int) -> list[list[list[int]]]:
        data = TokenDataModule(chosen, corpus)
        data.trainer = Place(rank, world)  # type: ignore[assignment]
        return [batch["tokens_BT"].tolist() for batch in data.val_dataloader()]

    (whole,) = (share(0, 1),)
    shares = [share(rank, world) for rank in range(world)]
    assert len({len(batches) for batches in shares}) == 1, "as many batches everywhere, or collectives would hang"
    assert all(batch for batches in shares for batch in batches)
    rows = [row for batches in shares for batch in batches for row in batch]
    assert len(rows) == 21 and sorted(rows) == sorted(itertools.chain(*whole))


def test_test_rows_are_spread_evenly(corpus: Corpus) -> None:
    data = TokenDataModule(config(evaluate__rows=10, evaluate__batch_rows=4), corpus)
    batches = list(data.test_batches())
    assert [len(batch["tokens_BT"]) for batch in batches] == [4, 4, 2]
    count = Rows(corpus.test, 16, 4).count
    starts = [row[0] for batch in batches for row in batch["tokens_BT"].tolist()]
    assert starts == [int(corpus.test.tokens[16 * (i * count // 10)]) for i in range(10)]
    assert {int(s) for batch in batches for s in batch["source_B"]} == {0, 1}
    everything = TokenDataModule(config(evaluate__rows=10**6), corpus).test_batches()
    assert sum(len(batch["tokens_BT"]) for batch in everything) == count


@pytest.mark.parametrize("wanted", [5, 30, 120])
def test_prompts_are_disjoint_within_documents_and_fixed(wanted: int) -> None:
    # Every token of the stream is its own position, so that a prompt tells where it is from.
    split = make_split(40, 2)
    unique = replace(split, tokens=np.arange(len(split.tokens), dtype=np.uint32))
    corpus = Corpus(make_split(5, 1), unique, unique, BytesTokenizer(), {})
    prompts = TokenDataModule(config(decode__prompts=wanted), corpus).prompts()
    assert prompts.shape == (wanted, 8) and prompts.dtype == torch.int64
    flat = prompts.flatten().tolist()
    assert len(set(flat)) == len(flat), "no position is in two prompts"
    documents = np.searchsorted(split.offsets, prompts.numpy(), side="right") - 1
    assert (documents == documents[:, :1]).all() and not np.isin(prompts.numpy(), split.offsets[1:] - 1).any()
    if wanted <= 30:
        assert len(set(documents[:, 0].tolist())) == wanted, "one from each document first"
    other_seed = TokenDataModule(config(decode__prompts=wanted, seed=7), corpus)
    assert torch.equal(other_seed.prompts(), prompts) and torch.equal(other_seed.prompts("validation"), prompts)


def test_every_release_has_test_rows_and_prompts_of_its_own() -> None:
    split = make_split(40, 2)
    unique = replace(split, tokens=np.arange(len(split.tokens), dtype=np.uint32))
    corpus = Corpus(make_split(5, 1), unique, unique, BytesTokenizer(), {})
    seen: set[tuple[str, int]] = set()
    for release in range(9):
        data = TokenDataModule(config(decode__prompts=4, evaluate__rows=4, data__release=release), corpus)
        rows = torch.cat([batch["tokens_BT"] for batch in data.test_batches()])
        prompts = data.prompts()
        assert rows.shape[0] == prompts.shape[0] == 4
        places = {("row", int(row[0])) for row in rows} | {("prompt", int(prompt[0])) for prompt in prompts}
        assert len(places) == 8 and not places & seen, release
        seen |= places


def test_training_sees_only_the_rows_whose_states_are_kept(corpus: Corpus) -> None:
    some = TokenDataModule(config(**{"data.states": 5 * 16 + 7, "model.trunk": "x"}), corpus).training_rows()
    every = TokenDataModule(config(), corpus).training_rows()
    indices = some.indices(list(range(5))).tolist()
    assert some.count == 5 and len(set(indices)) == 5 and max(indices) > 5
    for name, tensor in some[[1, 4]].items():
        assert torch.equal(tensor, every[[indices[1], indices[4]]][name]), name
