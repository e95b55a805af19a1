"""What one of several processes does in tests/test_distributed.py: trains a list of cases and writes down what it saw.

python -m tests.two_processes CASES.json        (the environment says, as a launcher would, which process this is)

A case may have a fault: what goes wrong, before which step, in which process (or in all). What a process says of it is
left in fault_RANK.json, and the next case follows; a killed process says nothing.
"""

import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cpdlm.config import resolve
from cpdlm.files import WriteError
from cpdlm.model.build import build_language_model
from cpdlm.processes import leave
from cpdlm.training.checkpoints import load_target
from cpdlm.training.fit import fit
from cpdlm.training.module import MultiTokenModule, NonFiniteLoss
from cpdlm.training.stopping import ProcessLost
from tests.ragged import SETTINGS, VOCAB, RaggedData

BASE = SETTINGS | {"optim.steps": 3, "optim.warmup": 1, "train.validate_every": 2, "train.checkpoint_every": 1000}
BASE |= {"loss.balance_weight": 1.0, "loss.balance_rate": 0.1}
SMALL_FILE = 50_000  # bytes that a file may have on a "full disk"


class Killed(Exception):
    """The end of a run that is to be resumed."""


def strike(kind: str, module: MultiTokenModule) -> None:
    """Do what goes wrong."""
    if kind == "die":
        raise Killed
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "nan":
        module.model.unembedding.weight.data.fill_(math.nan)
    if kind == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def train(
    folder: Path, overrides: dict[str, Any], optimizer: str = "adamw", fault: dict[str, Any] | None = None
) -> None:
    """One run in `folder`. Writes facts_RANK.json beside the weights."""
    config = resolve(BASE | overrides)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = build_language_model(config, VOCAB, load_target(config))
    data, facts = RaggedData(config), dict[str, Any]()
    original = {name: getattr(MultiTokenModule, name) for name in ("configure_optimizers", "training_step")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def sgd(self: MultiTokenModule) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def watched_step(self: MultiTokenModule, batch: Any, batch_index: int) -> Any:
        if not facts:
            parameters = list(self.model.parameters())
            own = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
            facts.update(
                world=self.trainer.world_size,
                rank=self.global_rank,
                sharded=hasattr(parameters[0], "to_local"),
                own=sum(p.numel() for p in own),
                whole=sum(p.numel() for p in parameters),
                seen=[],
            )
        if fault and self.global_step == fault["step"] and fault.get("rank", self.global_rank) == self.global_rank:
            (folder / "struck").touch()
            strike(fault["kind"], self)
        facts["seen"].append(batch["tokens_BT"].tolist())
        return original["training_step"](self, batch, batch_index)

    try:
        MultiTokenModule.training_step = watched_step  # type: ignore[method-assign]
        if optimizer == "sgd":
            MultiTokenModule.configure_optimizers = sgd  # type: ignore[assignment]
        fit(config, model, data, folder)
    except Killed:
        return
    except (WriteError, NonFiniteLoss, ProcessLost) as error:
        said = {"error": type(error).__name__, "message": str(error), "time": time.time()}
        (folder / f"fault_{facts['rank']}.json").write_text(json.dumps(said))
        print(f"{type(error).__name__}: {error}", flush=True)
        if isinstance(error, ProcessLost) or (fault and fault.get("alone")):
            os._exit(1)  # nothing can follow
        return
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        for name, function in original.items():
            setattr(MultiTokenModule, name, function)
    (folder / f"facts_{facts['rank']}.json").write_text(json.dumps(facts))


def main(path: str) -> None:
    torch.set_num_threads(1)
    for case in json.loads(Path(path).read_text()):
        train(Path(case["folder"]), case["overrides"], case["optimizer"], case["fault"])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    leave(0)  # as `experiments/run.py` does, and for its reason


if __name__ == "__main__":
    main(sys.argv[1])
