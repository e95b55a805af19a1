"""Trains sequential heads (a baseline) on a frozen trunk, with the data order, steps and optimiser of a cell of ours.

FOLDER/hydra.safetensors   the heads
FOLDER/hydra.json          what they are and what they cost
"""

import json
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from cpdlm.baselines.hydra import HydraHeads, HydraModel
from cpdlm.config import Config, ConfigError
from cpdlm.data.batches import TokenDataModule
from cpdlm.files import replaced, write_json
from cpdlm.model.language_model import LanguageModel
from cpdlm.training.checkpoints import RunError
from cpdlm.training.schedule import learning_rate_factor

WEIGHTS, SUMMARY = "hydra.safetensors", "hydra.json"


def train_hydra(
    base: LanguageModel,
    config: Config,
    data: TokenDataModule,
    folder: Path,
    progress: Callable[[int, float], None],
) -> None:
    """Train for config.optim.steps and write the folder. The heads' hidden layers are as wide as the trunk.

    Freezes `base`. The loss is the mean of -log q(x_{t+2..t+N} | x_{t+1}) over the positions that train our heads'
    later factors. progress: takes the step and its loss (nats).
    """
    if config.train.accumulate > 1 or config.data.text != "corpus":
        raise ConfigError("sequential heads train with train.accumulate=1 and data.text=corpus alone")
    torch.manual_seed(config.seed)
    base.requires_grad_(False)
    optim, device = config.optim, base.unembedding.weight.device
    model = HydraModel(base, HydraHeads(base.trunk.width, config.horizon).to(device))
    weights = list(model.heads.parameters())
    groups = [
        {"params": [each for each in weights if each.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [each for each in weights if each.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2))
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, optim))
    began = time.monotonic()
    for step, batch in enumerate(islice(data.train_dataloader(), optim.steps), start=1):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.no_grad():
            hidden_BTD = base.hidden(batch["tokens_BT"], batch["position_ids_BT"])
        picked_BT = batch["picked_BT"] & (batch["successors_BT"] > 0)
        nll_P = model.nll(hidden_BTD[picked_BT], batch["future_BTN"][picked_BT], batch["successors_BT"][picked_BT])
        loss = nll_P.mean()
        optimizer.zero_grad()
        loss.backward()
        if optim.clip:
            torch.nn.utils.clip_grad_norm_(weights, optim.clip)
        optimizer.step()
        schedule.step()
        progress(step, loss.item())
    seconds = time.monotonic() - began
    with replaced(folder / WEIGHTS) as path:
        save_file(model.heads.state_dict(), path)
    parameters = sum(each.numel() for each in weights)
    write_json(folder / SUMMARY, {"horizon": config.horizon, "seconds": seconds, "parameters": parameters})


def load_hydra(folder: Path, base: LanguageModel) -> tuple[HydraModel, dict[str, Any]]:
    """The model and its summary; raises RunError for a folder without them or of another trunk."""
    try:
        summary = json.loads((folder / SUMMARY).read_bytes())
        heads = HydraHeads(base.trunk.width, summary["horizon"])
        heads.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{folder} holds no sequential heads for this trunk ({error}); make them with --train-hydra {folder}"
        ) from error
    return HydraModel(base, heads.to(base.unembedding.weight.device).eval()), summary
