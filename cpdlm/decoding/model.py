"""What decoding asks of a model, and a stand-in for one that differs in a part.

Letters: B batch, T positions, D width, V vocabulary.
"""

from typing import Any, Protocol

from torch import Tensor

from cpdlm.model.trunk import Mask


class DraftingModel(Protocol):
    """`cpdlm.model.language_model.LanguageModel` is one."""

    @property
    def horizon(self) -> int:
        """Tokens of a window: the pending one and horizon - 1 drafts."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def training(self) -> bool: ...

    @property
    def attention_window(self) -> int | None:
        """How many slots of the cache some layer attends to; None where all layers attend to all."""
        ...

    @property
    def masks_windows(self) -> bool:
        """Whether `hidden` takes two masks, the second for layers with such a window; asked where there are some."""
        ...

    @property
    def draft_ids(self) -> Tensor | None:
        """(V',) the tokens that drafts are made of, where the joint covers a draft vocabulary."""
        ...

    def new_cache(self) -> Any: ...

    def hidden(
        self, tokens_BT: Tensor, position_ids_BT: Tensor | None = None, cache: Any = None, mask: Mask | None = None
    ) -> Tensor:
        """(B, T, D) behind each token."""
        ...

    def target_log_probs(self, hidden: Tensor) -> Tensor:
        """(..., V), or scores that rank and normalise alike."""
        ...

    def target_scores(self, hidden: Tensor) -> Tensor:
        """(..., V) that rank as the target does, from which greedy takes the argmax."""
        ...

    def draft_joint(self, hidden_BD: Tensor, pending_B: Tensor) -> Any:
        """The `Joint` of what follows the pending token, or what the drafter given as `draft` takes in its place."""
        ...


class ModelProxy:
    """A `DraftingModel` that is `base` but for what a subclass overrides."""

    def __init__(self, base: DraftingModel) -> None:
        self.base = base

    def __getattr__(self, name: str) -> Any:  # called for what neither the instance nor its class has
        if name.startswith("_") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)
