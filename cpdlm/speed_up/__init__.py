"""One call from a model to a faster one: plan it, train heads, measure them beside autoregressive decoding, export it.

Killed at any point, the same call goes on where it was. A stage that is done is not done again.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpdlm.config import without_credentials
from cpdlm.hf.export import export
from cpdlm.speed_up.measured import lines, measure_drafts
from cpdlm.speed_up.plan import Plan, Request, make_plan
from cpdlm.training import checkpoints, run

__all__ = ["Plan", "Request", "SpeedUp", "make_plan", "speed_up"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class SpeedUp:
    """found: the content of the run's decode.json. folder: the exported one. run: that of the training."""

    model: str
    run: Path
    folder: Path
    found: dict[str, Any]

    @property
    def use(self) -> str:
        return f"load it with cpdlm.load({str(self.folder)!r}), or cpdlm generate --model {self.folder} --show"

    def lines(self, width: int = 120) -> list[str]:
        """A table of what was measured, and one sentence on it."""
        return lines(self.model, self.found, width)


def speed_up(request: Request, say: Say = print) -> SpeedUp:
    """Train heads on a frozen model, measure them, and write `request.output` for transformers.

    say: takes lines for the user. Raises ConfigError for options that do not fit, RunError for folders that cannot be
    used, and what `training.run.train` raises.
    """
    plan = make_plan(request, say)
    for line in plan.lines:
        say(line)
    home = run.train(plan.config, say=say)
    words = ["cpdlm", "speed-up", request.model, *_options(request), *request.settings, "--output", str(request.output)]
    found = measure_drafts(checkpoints.read_config(home), without_credentials(shlex.join(words)), say)
    export(home, request.output)
    return SpeedUp(request.model, home, request.output, found)


def _options(request: Request) -> list[str]:
    words = ["--minutes", f"{request.minutes:g}"]
    words += ["--corpus", request.corpus] if request.corpus else []
    words += ["--chat", str(request.chat)] if request.chat is not None else []
    return words + (["--skip-broken"] if request.skip_broken else [])
