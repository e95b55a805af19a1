"""How fast this machine is with a model: its forwards by length, heads in training, the model as a writer. Measured in
seconds, before anything is trained, so that a plan can say what it will take.

Letters: B rows, T positions.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cpdlm.config import Config
from cpdlm.data.batches import Rows, Share, TrainingRows
from cpdlm.data.stored import TokenSplit
from cpdlm.decoding import Costs, Sampling, decode_batch, prepare
from cpdlm.decoding.length import seconds_of
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from cpdlm.training.fit import peak_memory_bytes
from cpdlm.training.module import MultiTokenModule

SIZES = (1, 2, 4, 8, 16)  # tokens of the forwards that are timed
WRITTEN_ROWS, WRITTEN_TOKENS = 64, 16


@dataclass(frozen=True)
class Pace:
    """horizon: of the heads that were timed. forward: ms of a target forward by its number of tokens. draft, draft_all:
    ms of the heads' drafts, from the commonest tokens and from the whole vocabulary. states, heads, writing: seconds
    per token for the target's states, for a position in training, and for a token that the model writes (0 where it
    writes none). width, parameters: of the model. head_parameters: of the heads. peak: bytes of memory so far."""

    horizon: int
    forward: dict[int, float]
    draft: float
    draft_all: float
    states: float
    heads: float
    writing: float
    width: int
    parameters: int
    head_parameters: int
    peak: int


def measure_pace(config: Config, target: LanguageModel, device: torch.device, writes: bool) -> Pace:
    """Of heads of these settings on `target`, which is prepared for decoding by it and must not be trained after."""
    model = build_language_model(config, target.vocab_size, target).to(device)
    listed = config.loss.draft_vocabulary
    if listed:
        model.use_draft_vocabulary(torch.arange(listed))
    states, heads = _training(config, model, device)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    everything = sum(each.numel() for each in model.parameters())  # before weights are laid out anew
    prepare(model)
    costs = Costs.measure(model, device=device, sizes=SIZES, rows=(1,))
    if listed:
        model.use_draft_vocabulary(None)
    whole = Costs.measure(model, device=device, sizes=SIZES[:2], rows=(1,)).draft[1] if listed else costs.draft[1]
    return Pace(
        horizon=config.horizon,
        forward=dict(costs.forward),
        draft=costs.draft[1],
        draft_all=whole,
        states=states,
        heads=heads,
        writing=_writing(config, model, device) if writes else 0.0,
        width=model.trunk.width,
        parameters=everything - trained,
        head_parameters=trained,
        peak=peak_memory_bytes(),
    )


def _training(config: Config, model: LanguageModel, device: torch.device) -> tuple[float, float]:
    """Seconds per token of the target's states, and of a training step on them."""
    data, random = config.data, np.random.default_rng(0)
    tokens = random.integers(model.vocab_size, size=data.batch_rows * data.context + config.horizon + 1)
    numbers = np.zeros(1, np.int64)
    split = TokenSplit(tokens, np.array([0, len(tokens)]), numbers, numbers, ["random"])
    rows = [*range(data.batch_rows)]
    found = TrainingRows(Rows(split, data.context, config.horizon), 0, config.loss.joint_fraction)[Share(0, rows, rows)]
    batch = {name: tensor.to(device) for name, tensor in found.items()}

    def states() -> None:
        with torch.no_grad():
            hidden_BTD = model.hidden(batch["tokens_BT"], batch["position_ids_BT"])
            batch.update(hidden_BTD=hidden_BTD, log_normaliser_BT=model.log_normaliser(hidden_BTD))

    module = MultiTokenModule(config, model)
    optimiser = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.0)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16-mixed"):
            loss = module.training_step(batch, 0)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        module.uses, module.seen = [], {}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, on a step without its trainer
        taken = _fastest(states, device), _fastest(step, device)
    positions = data.batch_rows * data.context
    return taken[0] / positions, taken[1] / positions


def _writing(config: Config, model: LanguageModel, device: torch.device) -> float:
    prompt_T = torch.zeros(min(16, config.data.context // 2), dtype=torch.long, device=device)
    generators = [torch.Generator(device).manual_seed(row) for row in range(WRITTEN_ROWS)]

    def write() -> None:
        decode_batch(model, [prompt_T] * WRITTEN_ROWS, WRITTEN_TOKENS, Sampling(), generators, draft="none")

    return seconds_of(write, device) / (WRITTEN_ROWS * WRITTEN_TOKENS)


def _fastest(work: Callable[[], None], device: torch.device) -> float:
    return min(seconds_of(work, device) for _ in range(2))
