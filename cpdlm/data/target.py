"""What is frozen, resolved once: the model whose next-token distribution decoding preserves while heads train on it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cpdlm.config import Config
from cpdlm.data.pretrained_files import checkpoint_folder, content_hash, described, generation_of

WEIGHTS = "model.safetensors"  # a run's finished weights


@dataclass(frozen=True)
class Target:
    """The target of a run, by name; nothing is read before it is asked for. `checkpoints.load_target` loads it.

    kind: "self" where nothing is frozen and the model's own first marginal is the target; "run" for a finished run of
    this program; "pretrained" for any other model. name: what the user calls it, empty for "self".
    dtype: precision of a pretrained one. cache, bundle: the folders in which its files are looked for.
    """

    kind: Literal["self", "run", "pretrained"]
    name: str
    dtype: str
    cache: str
    bundle: str

    @staticmethod
    def of(config: Config) -> Target:
        return Target(
            kind=config.frozen,
            name=config.model.trunk,
            dtype=config.model.dtype,
            cache=config.data.cache,
            bundle=config.data.bundle,
        )

    @property
    def source(self) -> str:
        """A run's folder, a Hugging Face folder, or a hub name. ConfigError where a pretrained model cannot be had."""
        return checkpoint_folder(self.name, self.cache, self.bundle) if self.kind == "pretrained" else self.name

    @property
    def sha256(self) -> str:
        """What stands for its weights; empty for "self". ConfigError as `source`, OSError for a run without weights."""
        if self.kind == "pretrained":
            return content_hash(self.source)
        return hashlib.sha256((Path(self.name) / WEIGHTS).read_bytes()).hexdigest() if self.kind == "run" else ""

    @property
    def eos(self) -> int | list[int] | None:
        """The ids at which `generate` stops on a pretrained model; None for others, and where nothing stops it."""
        eos: int | list[int] | None = self.generation.eos_token_id if self.kind == "pretrained" else None
        return eos

    @property
    def generation(self) -> Any:
        """The `GenerationConfig` of a pretrained model; None for others."""
        return generation_of(self.source) if self.kind == "pretrained" else None

    @property
    def card(self) -> dict[str, Any]:
        """base_model and license as a model card has them; what is not known is left out."""
        return described(self.name, self.source) if self.kind == "pretrained" else {}
