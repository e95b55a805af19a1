"""What a terminal shows of a run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from cpdlm.progress import Bar


class ProgressBar(Callback):
    """One line: step, loss, tokens per second, time left."""

    def __init__(self, steps: int, label: str) -> None:
        self.steps, self.label = steps, label
        self.bar: Bar | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.bar = Bar(
                total=self.steps,
                initial=trainer.global_step,
                desc=self.label,
                unit="step",
                mininterval=1.0,
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is None:
            return
        state = self.bar.format_dict  # its rate is None until a line was shown
        rate = state["rate"] or (state["n"] - state["initial"]) / max(state["elapsed"], 1e-9)
        tokens = batch["tokens_BT"].numel() * trainer.world_size * trainer.accumulate_grad_batches
        loss = trainer.callback_metrics.get("train/nll", trainer.callback_metrics.get("train/objective"))
        self.bar.set_postfix_str(
            f"loss {float(loss) if loss is not None else 0:.3f}, {rate * tokens:,.0f} tokens/s", refresh=False
        )
        self.bar.update(trainer.global_step - self.bar.n)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
