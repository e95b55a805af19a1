"""What the benchmark of decoding measures: finished heads of several seeds, on one frozen trunk per corpus."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpdlm.config import Config
from cpdlm.model.language_model import LanguageModel
from cpdlm.training import checkpoints

VARIANTS = ("untied", "token-conditioned", "tied")  # how the heads treat the pending token


@dataclass(frozen=True)
class Run:
    """Finished heads of one seed. seconds: of training."""

    config: Config
    model: LanguageModel
    seconds: float

    @property
    def variant(self) -> str:
        if self.config.link != "none":
            return "token-conditioned" if self.config.link == "first" else self.config.link
        return "tied" if self.config.model.tie_first else "untied"


@dataclass(frozen=True)
class Heads:
    """The same heads trained from each seed."""

    runs: list[Run]

    @property
    def config(self) -> Config:
        """Of the first seed."""
        return self.runs[0].config

    @property
    def rank(self) -> int:
        return self.config.rank

    @property
    def variant(self) -> str:
        return self.runs[0].variant

    @property
    def horizon(self) -> int:
        return self.config.horizon

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.runs]

    @property
    def label(self) -> dict[str, Any]:
        """What a row of the record says of them."""
        return {
            "corpus": self.config.corpus,
            "law": self.variant,
            "rank": self.rank,
            "horizon": self.horizon,
            "names": [run.config.run_name for run in self.runs],
            "seeds": self.seeds,
        }


def load_heads(folder: Path, names: Sequence[str], seeds: Sequence[int], corpora: Sequence[str]) -> list[list[Heads]]:
    """Per corpus: the named runs, sorted by variant and rank.

    By default all heads of these seeds on the trunk and horizon that most of them share, without controls (blind, mlp).
    Raises SystemExit where they do not go together.
    """
    folders = [folder / name for name in names] or sorted(
        path.parent for path in folder.glob(f"*/{checkpoints.CONFIG}") if (path.parent / checkpoints.WEIGHTS).is_file()
    )
    configs = {path: checkpoints.read_config(path) for path in folders}
    groups: dict[str, dict[tuple[str, int], list[Path]]] = {}
    for path, config in configs.items():
        by_default = config.seed in seeds and config.link != "blind" and not config.model.map_hidden
        wanted = names or (by_default and config.model.trunk)
        if wanted and (not corpora or config.corpus in corpora):
            groups.setdefault(config.corpus, {}).setdefault((config.model.trunk, config.horizon), []).append(path)
    missing = sorted(set(corpora) - set(groups))
    if not groups or missing:
        raise SystemExit(
            f"{folder} has no heads of seed {', '.join(map(str, seeds))} on a frozen trunk"
            + (f" for corpus={missing[0]}" if missing else "")
            + "; train some with model.trunk=RUN"
        )
    if names and any(len(found) > 1 or not trunk for found in groups.values() for trunk, _ in found):
        raise SystemExit(f"--cells: {', '.join(names)} are not heads of one horizon on one frozen trunk per corpus")
    return [_by_seed(max(found.values(), key=len), configs) for _, found in sorted(groups.items())]


def _by_seed(folders: Sequence[Path], configs: dict[Path, Config]) -> list[Heads]:
    """Runs that differ by their seed alone are the same heads."""
    same: dict[str, list[Run]] = {}
    for path in sorted(folders, key=lambda path: configs[path].seed):
        seconds = float(json.loads((path / checkpoints.TRAINED).read_bytes())["seconds"])
        run = Run(configs[path], checkpoints.load_model(path), seconds)
        same.setdefault(replace(run.config, seed=0, name="").run_name, []).append(run)
    order = {variant: index for index, variant in enumerate(VARIANTS)}
    return sorted(map(Heads, same.values()), key=lambda each: (order.get(each.variant, len(order)), each.rank))
