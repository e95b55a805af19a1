"""The LightningModule: plumbing between batches, the objective and the optimiser, and nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric

from cpdlm.config import Config
from cpdlm.model.language_model import LanguageModel, States, Terms
from cpdlm.model.losses.draft import Objective
from cpdlm.training import objective
from cpdlm.training.schedule import learning_rate_factor

Batch = dict[str, Tensor]


class NonFiniteLoss(RuntimeError):
    """The loss or a weight became NaN or infinite; the message names the step."""


def lower(config: Config) -> str:
    """What to try after a NonFiniteLoss."""
    return f"A lower optim.lr (now {config.optim.lr}) or optim.clip (now {config.optim.clip}) usually helps"


class MultiTokenModule(L.LightningModule):
    """watch: what to measure of the model, by name, at each validation.

    Its state dict, and so a checkpoint, leaves out what is frozen: that is loaded from where it came from.
    """

    def __init__(
        self, config: Config, model: LanguageModel, watch: Callable[[LanguageModel], dict[str, float]] | None = None
    ) -> None:
        super().__init__()
        self.watch = watch
        self.config = config
        self.model = model
        self.validation_joint, self.validation_first = (MeanMetric(nan_strategy="disable") for _ in range(2))
        self.uses: list[objective.ComponentUse] = []  # of the micro-batches of this optimiser step
        self.seen: dict[str, list[Tensor]] = {}  # what those micro-batches logged
        self.register_state_dict_post_hook(_without_frozen)
        # `checkpoints.check_checkpoint` looks for the names that must be there; FSDP2 asks for the frozen ones.
        self.strict_loading = all(parameter.requires_grad for parameter in model.parameters())

    def configure_model(self) -> None:
        """Shards under FSDP2 (parallel=fsdp): block by block, then the rest in one group.

        Embedding, unembedding, gate and maps sit in that last group, whose forward is the whole model's: tied weights
        are gathered together, and the joint loss, computed inside it, sees plain tensors.
        """
        mesh = self.device_mesh
        if mesh is None or self._is_sharded():
            return
        from torch.distributed.fsdp import fully_shard

        for layer in self.model.trunk.layers():
            fully_shard(layer, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"], reshard_after_forward=False)

    def _is_sharded(self) -> bool:
        return any(hasattr(parameter, "placements") for parameter in self.model.parameters())

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        loss_config = self.config.loss
        first_BT, rest_BT = objective.position_weights(
            batch["successors_BT"], batch["picked_BT"], batch["step_counts"], self.model.first_is_tied
        )
        other = self._objective()
        # Where the next-token distribution is frozen or the objective is another one, x_{t+1} has no term of its own.
        alone = self.model.frozen_target and (
            self.model.first_is_tied or other is not None or loss_config.draft_vocabulary > 0
        )
        if alone:
            first_BT = torch.zeros_like(first_BT)
        terms = self._terms(batch, first_BT, rest_BT, other)
        # The weights normalise the sum over micro-batches; Lightning takes their mean.
        loss = terms.loss * self.config.train.accumulate
        shared_loss = objective.global_sum(loss.detach()) / objective.world_size()
        self._log_mean("train/nll" if other is None else "train/objective", shared_loss)
        if self.model.heads is not None and self.config.rank > 1:
            loss = loss + self._balance(terms.log_weights_PR).to(loss.dtype)
        if not torch.isfinite(shared_loss):  # on all processes alike, so that none waits for another
            raise NonFiniteLoss(
                f"the loss is {shared_loss.item()} at step {self.global_step}, batch {batch_index}; "
                f"the checkpoint before it is kept. {lower(self.config)}"
            )
        return loss

    def _log_mean(self, name: str, value: Tensor) -> None:
        """Log the mean over the micro-batches of this optimiser step so far."""
        self.seen.setdefault(name, []).append(value.detach())
        self.log(name, torch.stack(self.seen[name]).mean())

    def _balance(self, log_weights_PR: Tensor) -> Tensor:
        """The weighted balance term of a micro-batch, 0 where there is none; logs how the components are used."""
        use = objective.component_use(log_weights_PR)
        self.uses.append(use)
        self._log_mean("train/weight_entropy", use.entropy)
        self._log_mean("train/effective_components", use.effective)
        self._log_mean("train/dead_components", use.dead.float())
        for component, weight in enumerate(use.mean_R, start=1):
            self._log_mean(f"train/weight_{component}", weight)
        if self.config.balance not in ("switch", "kl"):
            return use.entropy.new_zeros(())
        balance = objective.switch_balance(use) if self.config.balance == "switch" else objective.kl_balance(use)
        self._log_mean("train/balance", balance)
        return self.config.loss.balance_weight * balance

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.config.balance == "bias" and self.uses and self.model.heads is not None:
            bias_R = self.model.heads.balance_bias_R
            assert bias_R is not None
            with torch.no_grad():
                bias_R += objective.bias_step(self.uses, self.config.loss.balance_rate).to(bias_R.dtype)
        self.uses, self.seen = [], {}
        step = self.global_step + 1
        if step % self.config.train.log_every == 0 or step == self.config.optim.steps:
            self.log("train/lr", optimizer.param_groups[0]["lr"])
            self.log("train/gradient_norm", self._gradient_norm())

    def _gradient_norm(self) -> Tensor:
        """Of all gradients together, before they are clipped; on every process the whole."""
        found = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        return found.full_tensor() if isinstance(found, DTensor) else found

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        whole_BT = (batch["successors_BT"] >= self.config.horizon).double()  # reported losses are over whole windows
        terms = self._terms(batch, whole_BT, whole_BT)
        joint_P = terms.joint_nll(self.model.first_is_tied)
        if len(joint_P):
            self.validation_joint.update(joint_P.double())
            self.validation_first.update(terms.first_nll_P.double())

    def on_validation_epoch_end(self) -> None:
        self.log("validation/joint_nll", self.validation_joint.compute(), sync_dist=True)
        self.log("validation/first_token_nll", self.validation_first.compute(), sync_dist=True)
        self.validation_joint.reset()
        self.validation_first.reset()
        if self.watch is not None:
            was_training = [module for module in self.model.modules() if module.training]
            self.model.eval()
            for name, value in self.watch(self.model).items():
                self.log(f"validation/{name}", value, rank_zero_only=True)
            for module in was_training:
                module.training = True

    def configure_optimizers(self) -> Any:
        """AdamW, weight decay on matrices only; learning rate by step."""
        optim = self.config.optim
        optimizer = torch.optim.AdamW(self._groups(), lr=optim.lr, betas=(optim.beta1, optim.beta2))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.config.optim.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]

    def check_finite(self) -> None:
        """NonFiniteLoss, on every process, where a weight or buffer of any has a NaN or an infinity."""
        diverged = [name.removeprefix("model.") for name, tensor in self.state_dict().items() if not _is_finite(tensor)]
        if self.trainer.strategy.reduce_boolean_decision(not diverged, all=True):
            return
        named = diverged[0] if diverged else "a weight of another process"
        raise NonFiniteLoss(
            f"{named} is not finite after step {self.global_step}: "
            f"the run has diverged. No checkpoint of it is written; one from before it is kept. {lower(self.config)}"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Optimiser state goes by parameter name, so that one mode resumes another's run.

        An optimiser numbers its parameters in the order of its groups, Lightning's FSDP2 in that of the module.
        """
        names = [name for name, _ in self.named_parameters()] if self._is_sharded() else self._optimised_names()
        name_of = dict(enumerate(names))
        checkpoint["optimizer_states"] = [_renamed(state, name_of) for state in checkpoint["optimizer_states"]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "optimizer_states" not in checkpoint:  # FSDP2 has taken it already
            return
        index_of: dict[str | int, int] = {name: index for index, name in enumerate(self._optimised_names())}
        first_name = {id(parameter): name for name, parameter in self.named_parameters()}
        for name, parameter in self.named_parameters(remove_duplicate=False):  # a tied weight goes by either name
            if parameter.requires_grad:
                index_of[name] = index_of[first_name[id(parameter)]]
        checkpoint["optimizer_states"] = [_renamed(state, index_of) for state in checkpoint["optimizer_states"]]

    def _optimised_names(self) -> list[str]:
        """Parameter names in the optimiser's own order: group by group."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        groups = self.trainer.optimizers[0].param_groups if self.trainer.optimizers else self._groups()
        return [names[id(parameter)] for group in groups for parameter in group["params"]]

    def _objective(self) -> Objective | None:
        """Of the draft; None for the joint likelihood."""
        wanted = self.config.loss
        if wanted.objective == "joint" and wanted.gamma == 1:
            return None
        return Objective(wanted.objective, wanted.alpha, wanted.gamma, wanted.target_top, wanted.normaliser_tokens)

    def _terms(self, batch: Batch, first_BT: Tensor, rest_BT: Tensor, other: Objective | None = None) -> Terms:
        states = States(batch["hidden_BTD"], batch["log_normaliser_BT"]) if "hidden_BTD" in batch else None
        terms: Terms = self.model(
            batch["tokens_BT"],
            batch["position_ids_BT"],
            batch["future_BTN"],
            batch["successors_BT"],
            first_BT,
            rest_BT,
            states,
            other,
        )
        return terms


def _is_finite(tensor: Tensor) -> bool:
    """Whether no number of it, as far as this process holds it, is NaN or infinite."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not own.is_floating_point() or not own.numel():
        return True
    return bool(torch.stack(torch.aminmax(own.detach())).isfinite().all())


def _without_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, parameter in module.named_parameters(remove_duplicate=False):  # a tied weight goes by either name
        if not parameter.requires_grad:
            state_dict.pop(prefix + name, None)


def _renamed(state: dict[str, Any], new: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimiser's state dict with its parameters called by other names; those without a new name keep theirs."""
    if not state:  # FSDP2 gathers it on process 0 alone
        return state
    return {
        "state": {new.get(key, key): value for key, value in state["state"].items()},
        "param_groups": [
            group | {"params": [new.get(key, key) for key in group["params"]]} for group in state["param_groups"]
        ],
    }
