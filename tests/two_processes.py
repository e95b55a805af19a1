"""What one of two processes does in tests/test_distributed.py: trains a list of cases and writes down what it saw.

python -m tests.two_processes CASES.json        (LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from cpdlm.config import resolve
from cpdlm.model.language_model import build_language_model
from cpdlm.training.fit import fit
from cpdlm.training.module import MultiTokenModule
from tests.ragged import VOCAB, RaggedData

BASE: dict[str, Any] = {
    "size": "micro", "rank": 2, "horizon": 3, "data.context": 16, "decode.prompt_tokens": 4, "decode.new_tokens": 4,
    "data.batch_rows": 4, "optim.steps": 3, "optim.warmup": 1, "optim.lr": 1e-2, "train.log_every": 1,
    "train.validate_every": 2, "train.checkpoint_every": 1000, "loss.balance_weight": 1.0, "loss.balance_rate": 0.1,
}  # fmt: skip


class Killed(Exception):
    """The end of a run that is to be resumed."""


def train(folder: Path, overrides: dict[str, Any], optimizer: str = "adamw", die_at: int = -1) -> None:
    """One run in `folder`; with die_at, it dies before that step. Writes facts_RANK.json beside the weights."""
    config = resolve(BASE | overrides)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = build_language_model(config, VOCAB)
    data, facts = RaggedData(config), {}
    original = {name: getattr(MultiTokenModule, name) for name in ("configure_optimizers", "training_step")}

    def sgd(self: MultiTokenModule) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def watched_step(self: MultiTokenModule, batch: Any, batch_index: int) -> Any:
        if self.global_step == die_at:
            raise Killed
        if not facts:
            parameters = list(self.model.parameters())
            own = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
            facts.update(
                world=self.trainer.world_size, rank=self.global_rank, sharded=hasattr(parameters[0], "to_local"),
                own=sum(p.numel() for p in own), whole=sum(p.numel() for p in parameters), seen=[],
            )  # fmt: skip
        facts["seen"].append(batch["tokens_BT"].tolist())
        return original["training_step"](self, batch, batch_index)

    try:
        MultiTokenModule.training_step = watched_step  # type: ignore[method-assign]
        if optimizer == "sgd":
            MultiTokenModule.configure_optimizers = sgd  # type: ignore[assignment]
        fit(config, model, data, folder)
    except Killed:
        return
    finally:
        for name, function in original.items():
            setattr(MultiTokenModule, name, function)
    (folder / f"facts_{facts['rank']}.json").write_text(json.dumps(facts))


def main(path: str) -> None:
    torch.set_num_threads(1)
    for case in json.loads(Path(path).read_text()):
        train(Path(case["folder"]), case["overrides"], case["optimizer"], case["die_at"])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert "LOCAL_RANK" in os.environ
    main(sys.argv[1])
