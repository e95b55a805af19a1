"""Trains one model, so that it can be watched, interrupted, killed and resumed."""

import logging
import resource
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from cpdlm.config import Config
from cpdlm.files import errors_named, write_json
from cpdlm.model.language_model import LanguageModel
from cpdlm.processes import PauseWatch, is_srun, is_torchrun
from cpdlm.progress import Bar
from cpdlm.training import checkpoints
from cpdlm.training.checkpoints import CHECKPOINT, TRAINED, RunError
from cpdlm.training.flop_count import FlopCount, matmul_rate
from cpdlm.training.module import MultiTokenModule
from cpdlm.training.progress import ProgressBar
from cpdlm.training.stopping import Interrupted, ProcessLost, Stop


@dataclass
class Summary:
    """The record's `training` entry. Times in seconds or milliseconds as named; memory in bytes.

    curve: what was logged, by step. clock: the `seconds` in training steps at each of its entries.
    paused: seconds in which a process of the run stood still; such a step counts as long as the median of the others.
    flops_per_token: counted on the first step; None in a run of several processes, as the next two.
    matmul_flops_per_second: rate of a large product (`flop_count.matmul_rate`).
    matmul_fraction: FLOPs done per second over that rate.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    step_ms_median: float = 0.0
    peak_memory_bytes: int = 0
    resumed: int = 0
    paused: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    flops_per_token: float | None = None
    matmul_flops_per_second: float | None = None
    matmul_fraction: float | None = None


class Journal(Callback):
    """Step times, the curve and the checkpoint: kept in the checkpoint itself, so that a resumed run has all of it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.summary = Summary()
        self.stop = Stop()
        self._step_ms: list[float] = []
        self._spent: list[float] = []  # seconds of this step's micro-batches
        self._paused = 0.0  # of them, those in which this process stood still
        self._watch = PauseWatch()
        self._began = 0.0
        self._save_is_due = False
        self._flops: FlopCount | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"summary": asdict(self.summary), "step_ms": list(self._step_ms)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.summary = Summary(**state_dict["summary"])
        self.summary.resumed += 1
        self._step_ms = list(state_dict["step_ms"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before anything is restored: one checkpoint for all, in a form that this mode loads, and no remains."""
        checkpoint = self.folder / CHECKPOINT
        found = checkpoint.exists()
        if found != trainer.strategy.reduce_boolean_decision(found, all=found):
            raise RunError(
                f"{checkpoint} is there for some processes only: the machines of a run need one folder in common; "
                "give one that all of them see with output=DIR"
            )
        if trainer.is_global_zero:
            checkpoints.remove_partial(self.folder)
            if checkpoint.is_dir() and self.config.parallel != "fsdp":
                checkpoints.consolidate(self.folder)
        trainer.strategy.barrier()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop.take_sigterm()
        if trainer.world_size == 1 and self.summary.matmul_flops_per_second is None:
            self.summary.matmul_flops_per_second = matmul_rate(pl_module.device, self.config.train.precision)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size == 1 and self.summary.flops_per_token is None:
            self._flops = FlopCount().__enter__()
        self._paused -= self._watch.total()
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._spent.append(time.perf_counter() - self._began)
        self._paused += self._watch.total()
        self._stop_counting(batch["tokens_BT"].numel())
        self.summary.tokens += batch["tokens_BT"].numel() * trainer.world_size
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, settings = trainer.global_step, self.config.train
        self._time_step(trainer, step)
        self.summary.steps = step
        if step % settings.log_every == 0 or step == self.config.optim.steps:
            self._note(trainer, step, "train/")
            recent = self._step_ms[-settings.log_every :]
            pl_module.log("train_time/step_ms", statistics.median(recent) if recent else 0.0)
        stop = bool(self.stop.signal)
        if trainer.world_size > 1:  # a signal reaches processes at different steps, or one of them only
            stop = bool(trainer.strategy.reduce_boolean_decision(stop, all=False))
        self.stop.is_due = stop
        due = stop or (step % settings.checkpoint_every == 0 and step < self.config.optim.steps)
        self._save_is_due = due and step % settings.validate_every == 0  # then the checkpoint holds its validation, too
        if stop or (due and not self._save_is_due):
            self.save(trainer)
        if stop:
            trainer.should_stop = True

    def _time_step(self, trainer: L.Trainer, step: int) -> None:
        """A step in which a process stood still (SIGSTOP, a laptop's lid) says nothing of the speed: not timed."""
        seconds, paused = sum(self._spent), self._paused
        self._spent, self._paused = [], 0.0
        if trainer.world_size > 1:  # the others waited for the one that stood still
            paused = float(
                trainer.strategy.reduce(torch.tensor(paused, device=trainer.strategy.root_device), reduce_op="max")
            )
        if paused:
            self.summary.paused += paused
            seconds = statistics.median(self._step_ms) / 1000 if self._step_ms else max(seconds - paused, 0.0)
            if trainer.is_global_zero:
                Bar.write(f"step {step} is not timed: the run stood still for {paused:.1f} s in it", file=sys.stderr)
        else:
            self._step_ms.append(1000 * seconds)
        self.summary.seconds += seconds

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop_counting(0)

    def _stop_counting(self, tokens: int) -> None:
        if self._flops is None:
            return
        self._flops.__exit__(None, None, None)
        if tokens:
            self.summary.flops_per_token = self._flops.total / tokens
        self._flops = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._note(trainer, trainer.global_step, "validation/")
            if self._save_is_due:
                self._save_is_due = False
                self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Every process calls it; the first swaps the finished checkpoint in. A kill or a full disk costs nothing.

        NonFiniteLoss where the run has diverged: the checkpoint before it stays.
        """
        assert isinstance(trainer.lightning_module, MultiTokenModule)
        trainer.lightning_module.check_finite()
        partial = checkpoints.partial_checkpoint(self.folder)
        with errors_named(self.folder / CHECKPOINT):
            try:
                trainer.save_checkpoint(partial)
                if trainer.is_global_zero:
                    checkpoints.swap_in(partial, self.folder / CHECKPOINT)
            except CheckpointException as error:  # of every process, for the failure of one
                reasons = "; ".join(f"process {rank}: {wrapped[0]}" for rank, wrapped in error.failures.items())
                raise OSError(f"a part could not be written ({reasons})") from error
            finally:
                if trainer.is_global_zero:
                    checkpoints.remove_partial(self.folder)
        trainer.strategy.barrier()

    def finish(self) -> Summary:
        self.summary.step_ms_median = statistics.median(self._step_ms) if self._step_ms else 0.0
        self.summary.tokens_per_second = self.summary.tokens / max(self.summary.seconds, 1e-9)
        self.summary.peak_memory_bytes = peak_memory_bytes()
        if self.summary.flops_per_token is not None and self.summary.matmul_flops_per_second:
            done = self.summary.flops_per_token * self.summary.tokens_per_second
            self.summary.matmul_fraction = done / self.summary.matmul_flops_per_second
        return self.summary

    def _note(self, trainer: L.Trainer, step: int, prefix: str) -> None:
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(prefix)}
        if self.summary.curve and self.summary.curve[-1]["step"] == step:
            self.summary.curve[-1] |= values
        else:
            self.summary.curve.append({"step": step, **values})
            self.summary.clock.append(round(self.summary.seconds, 3))


def fit(
    config: Config,
    model: LanguageModel,
    data: L.LightningDataModule,
    folder: Path,
    logger: Logger | None = None,
    watch: Callable[[LanguageModel], dict[str, float]] | None = None,
) -> Summary | None:
    """Train to config.optim.steps, from RUN/last.ckpt where there is one; leave finished weights in `folder`.

    watch: what else to measure at each validation, by name (`MultiTokenModule`).

    Returns the summary on process 0, None on the others. Raises Interrupted (with a checkpoint left), NonFiniteLoss,
    or RunError for a checkpoint that cannot be used.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips and inventories are not ours to print
    L.seed_everything(config.seed, verbose=False)
    if config.train.precision == "64-true":
        model.double()
    if config.train.recompute:
        model.trunk.recompute_activations()
    module, journal = MultiTokenModule(config, model, watch), Journal(config, folder)
    trainer = build_trainer(config, [journal, ProgressBar(config.optim.steps, config.run_name)], logger)
    _run(trainer, module, data, journal)
    module.check_finite()
    if journal.stop.is_due and trainer.global_step < config.optim.steps:
        raise Interrupted(
            f"stopped at step {trainer.global_step} of {config.optim.steps}; {folder / CHECKPOINT} is saved. The same "
            "command continues from it"
        )
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = (
        get_model_state_dict(model, options=whole) if config.parallel == "fsdp" else model.state_dict()
    )
    if not trainer.is_global_zero:
        return None
    # Heads on a pretrained trunk are stored as it is, and evaluated as they are stored.
    narrow = getattr(torch, config.model.dtype) if config.is_pretrained else None
    checkpoints.save_model(folder, model, state, model.vocab_size, narrow)
    summary = journal.finish()
    write_json(folder / TRAINED, asdict(summary))
    checkpoints.remove_checkpoint(folder)
    return summary


def _run(trainer: L.Trainer, module: MultiTokenModule, data: L.LightningDataModule, journal: Journal) -> None:
    """Lightning's loop, from the checkpoint where there is one, with signals noted and a lost peer named."""
    config, checkpoint = journal.config, journal.folder / CHECKPOINT
    if checkpoint.exists():
        checkpoints.check_checkpoint(checkpoint, module.state_dict())
    with journal.stop, warnings.catch_warnings():
        # Lightning advises more loader workers and shorter logging intervals; rows are cut from memory-mapped arrays.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        # A frozen trunk is in evaluation mode on purpose.
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        try:
            trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint.exists() else None, weights_only=True)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            if trainer.world_size > 1 and isinstance(error, RuntimeError) and _is_lost(error):
                raise ProcessLost(
                    f"process {trainer.global_rank} of {trainer.world_size}: another one stopped (its own message says "
                    f"why), was killed, or did not answer within train.timeout={config.train.timeout} s; "
                    "the same command " + (f"continues from {checkpoint}" if checkpoint.exists() else "starts again")
                ) from error
            if checkpoint.exists() and _was_restoring(error):
                checkpoints.refuse_misfit(checkpoint, error)
            raise


def _was_restoring(error: Exception) -> bool:
    """Whether Lightning was reading its checkpoint then: whatever else fails at a start does not speak against that."""
    return any("checkpoint_connector" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def build_trainer(config: Config, callbacks: list[Callback], logger: Logger | None = None) -> L.Trainer:
    """A Trainer that leaves order, checkpoints and progress to us."""
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return L.Trainer(
        accelerator=accelerator,
        devices=config.devices,
        num_nodes=config.nodes,
        plugins=_cluster(),
        strategy=build_strategy(config),
        # Lightning's FSDP2 strategy has no word for float64; `fit` has made the weights so, and this leaves them alone.
        precision="32-true"
        if (config.parallel, config.train.precision) == ("fsdp", "64-true")
        else config.train.precision,  # type: ignore[arg-type]
        max_steps=config.optim.steps,
        accumulate_grad_batches=config.train.accumulate,
        gradient_clip_val=config.optim.clip or None,
        val_check_interval=config.train.validate_every * config.train.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=config.train.log_every,
        callbacks=callbacks,
        logger=logger or False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def build_strategy(config: Config) -> Strategy | str:
    """auto: one process, or DDP for several. fsdp: FSDP2 over all of them, also on the CPU (gloo)."""
    world, timeout = config.nodes * config.devices, timedelta(seconds=config.train.timeout)
    if config.parallel == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=world,
            tensor_parallel_size=1,
            save_distributed_checkpoint=config.train.sharded,
            timeout=timeout,
        )
    if config.parallel == "ddp" or world > 1:
        return DDPStrategy(timeout=timeout)
    return "auto"


def _cluster() -> ClusterEnvironment | None:
    """SLURM without Lightning's requeueing, whose checkpoints would come before ours; else what Lightning detects."""
    return SLURMEnvironment(auto_requeue=False) if is_srun() and not is_torchrun() else None


def _is_lost(error: RuntimeError) -> bool:
    """Whether this is how a collective says that a peer is gone or late; gloo has no type for it."""
    words = (
        "Connection closed",
        "Connection reset",
        "Connection refused",
        "Broken pipe",
        "Timed out waiting",
        "timeout",
    )
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def peak_memory_bytes() -> int:
    """Largest memory so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024
