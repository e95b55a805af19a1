"""Training: the golden step, the schedule, resuming, stopping, and everything that can go wrong with a run's folder."""

import itertools
import json
import math
import os
import signal
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cpdlm.config import Config, OptimConfig, resolve
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from cpdlm.training import checkpoints
from cpdlm.training.checkpoints import CHECKPOINT, TRAINED, WEIGHTS
from cpdlm.training.fit import Summary, fit
from cpdlm.training.module import MultiTokenModule, NonFiniteLoss
from cpdlm.training.schedule import learning_rate_factor
from cpdlm.training.stopping import Interrupted, ProcessLost, Stop
from tests.ragged import SETTINGS, VOCAB, RaggedData

LAYOUTS: dict[str, dict[str, Any]] = {
    "own": {},
    "separate": {"model.head": "separate", "model.tie_embeddings": False},
    "tied": {"model.tie_first": True},
    "anchored": {"link": "first", "model.map_rank": 4, "model.draft_width": 0.5, "model.draft_normed": False},
    "bias": {"balance": "bias"},
    "plain": {"horizon": 1, "rank": 1, "balance": "none"},
}


def settings(**more: Any) -> Config:
    base = {"optim.steps": 6, "optim.warmup": 2, "train.validate_every": 3, "train.checkpoint_every": 2}
    return resolve(SETTINGS | base | more)


def build(config: Config, trunk: LanguageModel | None = None) -> LanguageModel:
    torch.manual_seed(config.seed)
    return build_language_model(config, VOCAB, trunk)


def train(config: Config, folder: Path) -> tuple[Summary, dict[str, Tensor]]:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.open_run(folder, config)
    trunk = checkpoints.load_model(Path(config.model.trunk)) if config.model.trunk else None
    model = build(config, trunk)
    summary = fit(config, model, RaggedData(config), folder)
    assert summary is not None
    return summary, model.state_dict()


class Killed(BaseException):
    """What a kill looks like from inside: nothing gets a chance to clean up after it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = MultiTokenModule.training_step

    def dying(self: MultiTokenModule, batch: Any, batch_index: int) -> Tensor:
        if self.global_step == step:
            raise Killed
        return original(self, batch, batch_index)

    monkeypatch.setattr(MultiTokenModule, "training_step", dying)


# --- the golden step --------------------------------------------------------------------------------------------

# layout -> loss of three steps, in nats. To make them anew: .venv/bin/python -m tests.test_training
GOLDEN: dict[str, list[float]] = {
    "own": [6.923791293807587, 6.734904817443033, 7.4401613733196195],
    "separate": [6.567847264908715, 6.701187211822115, 7.412788026830482],
    "tied": [6.935357310827354, 6.740150428373372, 7.376250213994107],
    "anchored": [10.386735944751887, 9.015659128399163, 9.365864952100987],
    "bias": [6.904301676523578, 6.906971980272301, 7.531290026757422],
    "plain": [3.2080942347693515, 2.8229307095432667, 2.866937934941812],
}


def golden_losses(layout: str) -> list[float]:
    """train/nll of three AdamW steps from weights written by formula, so that no random generator has a say."""
    config = settings(**LAYOUTS[layout], **{"optim.steps": 3, "optim.lr": 1e-3, "train.precision": "64-true"})
    model = build(config).double()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + number).view_as(parameter)
            parameter.copy_(1 + 0.1 * wave if parameter.ndim == 1 else 0.2 * wave)
    module = MultiTokenModule(config, model)
    optimizers = module.configure_optimizers()
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    data = RaggedData(config)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0)  # type: ignore[assignment]
    losses = []
    for batch_index, batch in zip(range(3), data.train_dataloader(), strict=False):
        loss = module.training_step(batch, batch_index)
        optimizers["optimizer"].zero_grad()
        loss.backward()
        module.on_before_optimizer_step(optimizers["optimizer"])
        optimizers["optimizer"].step()
        optimizers["lr_scheduler"]["scheduler"].step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_golden_training_steps(layout: str) -> None:
    assert golden_losses(layout) == pytest.approx(GOLDEN[layout], rel=1e-6), (
        f"Training {layout!r} computes something else than it did: a bug, unless the distribution, the loss, the "
        "optimiser or the schedule was meant to change. Then run `python -m tests.test_training`, paste what it prints "
        "over GOLDEN, and say in the commit why the numbers moved."
    )


# --- schedule ---------------------------------------------------------------------------------------------------


def test_schedule_warms_up_peaks_and_ends_at_the_floor() -> None:
    optim = OptimConfig(steps=100, warmup=10, floor=0.1)
    factors = [learning_rate_factor(step, optim) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11) and all(a < b for a, b in itertools.pairwise(factors[:11]))
    assert factors[10] == 1 and factors[55] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert learning_rate_factor(10**6, optim) == pytest.approx(0.1)
    for steps, warmup in ((1, 0), (1, 1), (5, 5), (5, 50), (5, 0)):
        edge = OptimConfig(steps=steps, warmup=warmup)
        assert all(0 < learning_rate_factor(step, edge) <= 1 for step in range(steps + 1))


def test_weight_decay_is_on_matrices_only() -> None:
    module = MultiTokenModule(settings(link="first"), build(settings(link="first")))
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert {p.ndim >= 2 for p in groups[0]["params"]} == {True} and groups[0]["weight_decay"] == 0.1
    assert {p.ndim for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0
    assert sum(len(group["params"]) for group in groups) == len(list(module.model.parameters()))


# --- a run ------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_what_it_promises(tmp_path: Path) -> None:
    config = settings(**{"optim.steps": 12, "train.validate_every": 4})
    summary, state = train(config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", WEIGHTS, TRAINED}
    assert json.loads((tmp_path / "run" / TRAINED).read_text()) == asdict(summary)
    assert (summary.steps, summary.resumed, summary.tokens) == (12, 0, 12 * 4 * 16)
    assert [note["step"] for note in summary.curve] == list(range(1, 13))
    first, last = summary.curve[0], summary.curve[-1]
    assert last["train/nll"] < first["train/nll"] + 1
    assert summary.curve[11]["validation/joint_nll"] < summary.curve[3]["validation/joint_nll"]
    for key in ("train/balance", "train/weight_entropy", "train/effective_components", "train/dead_components"):
        assert math.isfinite(last[key])
    assert all(("validation/joint_nll" in note) == (note["step"] % 4 == 0) for note in summary.curve)
    assert last["validation/joint_nll"] > last["validation/first_token_nll"] > 0
    assert summary.tokens_per_second > 0 and summary.step_ms_median > 0 and summary.peak_memory_bytes > 0
    assert len(summary.clock) == len(summary.curve) and summary.clock == sorted(summary.clock)
    assert summary.clock[-1] == pytest.approx(summary.seconds, abs=1e-3)
    assert sum(last[f"train/weight_{index}"] for index in range(1, config.rank + 1)) == pytest.approx(1, abs=1e-5)
    # Forward and backward of every weight that is a matrix, once each at the least.
    matrices = sum(value.numel() for name, value in state.items() if value.ndim == 2 and "embed" not in name)
    assert summary.flops_per_token is not None and summary.flops_per_token > 6 * matrices
    assert summary.matmul_fraction is not None and 0 < summary.matmul_fraction < 1.5
    for name, value in checkpoints.load_model(tmp_path / "run").state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"train.accumulate": 2, "loss.joint_fraction": 0.5, "link": "first"},
        {"balance": "bias", "train.validate_every": 2},  # validates and saves at the same steps
        {"train.validate_every": 4, "train.accumulate": 2, "data.batch_rows": 2},
    ],
    ids=["plain", "accumulated subset", "bias", "accumulated, both at step 4"],
)
def test_a_killed_run_resumes_bit_for_bit(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(**more)
    whole, whole_state = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5)
        train(config, tmp_path / "killed")
    content = torch.load(tmp_path / "killed" / CHECKPOINT, weights_only=True)
    assert content["global_step"] == 4 and not (tmp_path / "killed" / WEIGHTS).exists()
    torch.manual_seed(99)  # nothing of the first process is left
    resumed, state = train(config, tmp_path / "killed")
    assert resumed.resumed == 1 and resumed.steps == 6 and resumed.tokens == whole.tokens
    assert resumed.curve == whole.curve and len(resumed.clock) == len(resumed.curve)
    assert resumed.flops_per_token == whole.flops_per_token
    for name, value in whole_state.items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_heads_on_a_frozen_trunk_resume_and_come_back_without_a_copy_of_it(
    tie_embeddings: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = settings(**LAYOUTS["plain"], **{"model.tie_embeddings": tie_embeddings, "optim.steps": 2})
    train(plain, tmp_path / "trunk")
    config = settings(**{"model.trunk": str(tmp_path / "trunk"), "link": "first", "balance": "bias"})
    whole, whole_state = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5)
        train(config, tmp_path / "killed")
    content = torch.load(tmp_path / "killed" / CHECKPOINT, weights_only=True)
    model = build(config, checkpoints.load_model(tmp_path / "trunk"))
    trained = {f"model.{name}" for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert content["state_dict"].keys() == trained | {"model.heads.balance_bias_R"}
    torch.manual_seed(99)
    resumed, state = train(config, tmp_path / "killed")
    assert resumed.resumed == 1 and resumed.curve == whole.curve
    again, trunk = checkpoints.load_model(tmp_path / "whole"), checkpoints.load_model(tmp_path / "trunk")
    for key, value in whole_state.items():
        assert torch.equal(value, state[key]) and torch.equal(value, again.state_dict()[key]), key
    for key, value in trunk.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), f"training the heads moved {key} of the frozen trunk"
    assert again.frozen_target and again.embeddings_are_tied == tie_embeddings
    size = (tmp_path / "whole" / WEIGHTS).stat().st_size
    assert size < 4 * sum(p.numel() for p in again.parameters() if p.requires_grad) + 4096, "the trunk is stored, too"


@pytest.mark.parametrize("layout", ["untied", "tied"])
def test_accumulated_micro_batches_train_as_the_whole_batch(layout: str, tmp_path: Path) -> None:
    """Ragged rows: a mean of the micro-batches' means would differ. Float64, so that nothing hides in rounding."""
    states, losses = [], []
    for accumulate in (1, 4):
        more = {"train.accumulate": accumulate, "model.tie_first": layout == "tied", "train.precision": "64-true"}
        config = settings(balance="none", **more, **{"optim.steps": 3})
        summary, state = train(config, tmp_path / str(accumulate))
        states.append(state)
        losses.append([entry["train/nll"] for entry in summary.curve])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # not the last micro-batch's alone
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_activations_change_nothing_but_the_forwards(family: str, tmp_path: Path) -> None:
    states, forwards = [], []
    for recompute in (False, True):
        more = {"train.recompute": recompute, "optim.steps": 2, "train.validate_every": 9}
        config = settings(**{"model.family": family}, **more)
        model = build(config)
        count = [0]
        mlp = dict(model.trunk.layers()[0].named_modules())["mlp"]
        mlp.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        (tmp_path / str(recompute)).mkdir()
        fit(config, model, RaggedData(config), tmp_path / str(recompute))
        states.append(model.state_dict())
        forwards.append(count[0])
    assert forwards == [2, 4], "each block runs once more, in the backward pass"
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_nan_loss_stops_with_step_and_batch_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MultiTokenModule._terms

    def poisoned(self: MultiTokenModule, *arguments: Any) -> Any:
        if self.global_step == 3:
            self.model.unembedding.weight.data.fill_(math.nan)
        return original(self, *arguments)

    monkeypatch.setattr(MultiTokenModule, "_terms", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step 3, batch 3; .*lower optim\.lr \(now 0\.01\)"):
        train(settings(), tmp_path)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["global_step"] == 2
    assert not (tmp_path / WEIGHTS).exists()


# --- Ctrl-C and SIGTERM ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, before = MultiTokenModule.training_step, signal.getsignal(number)

    def told_to_stop(self: MultiTokenModule, batch: Any, batch_index: int) -> Tensor:
        if self.global_step == 2:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(MultiTokenModule, "training_step", told_to_stop)
        checkpoint = tmp_path / CHECKPOINT
        with pytest.raises(Interrupted, match=rf"stopped at step 3 of 6; {checkpoint} is saved. The same command cont"):
            train(settings(**{"train.checkpoint_every": 100}), tmp_path)
    assert "stopping after this step" in capsys.readouterr().err and signal.getsignal(number) is before
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3 and not (tmp_path / WEIGHTS).exists()
    assert train(settings(**{"train.checkpoint_every": 100}), tmp_path)[0].resumed == 1


def test_a_second_signal_stops_at_once() -> None:
    stop, before = Stop(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("late", ["while it saves", "once it has stopped"])
def test_a_signal_that_another_process_got_first_is_not_a_second_one(late: str) -> None:
    """A launcher's SIGTERM reaches processes one after the other: here the last of them, which stops already."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the process would have ended without a word"))
    try:
        with Stop() as stop:
            stop.is_due = True
            if late == "while it saves":
                os.kill(os.getpid(), signal.SIGTERM)
        if late == "once it has stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(pytest.fail.Exception):  # the caller's own handling is back
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_loss_of_another_process_is_not_cut_short_by_the_launchers_signal() -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the process would have ended without a word"))
    try:
        with pytest.raises(ProcessLost), Stop():
            raise ProcessLost
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in LAYOUTS:
        print(f'    "{each}": {golden_losses(each)},')
