"""One call from a model to a faster one: plan it, train heads, measure them beside autoregressive decoding, export it.

Killed at any point, the same call goes on where it was. A stage that is done is not done again.
"""

import shlex
from typing import Any

from cpdlm.config import without_credentials
from cpdlm.hf.export import export
from cpdlm.speed_up.measured import lines, measure_drafts
from cpdlm.speed_up.plan import Plan, Request, make_plan
from cpdlm.training import checkpoints, run

__all__ = ["Plan", "Request", "lines", "make_plan", "speed_up"]


def speed_up(request: Request, say: run.Say = print) -> dict[str, Any]:
    """Train heads on a frozen model, measure them, and write `request.output` for transformers.

    say: takes lines for the user. Returns what was measured, for `lines`. Raises ConfigError for options that do not
    fit, RunError for folders that cannot be used, and what `training.run.train` raises.
    """
    plan = make_plan(request, say)
    for line in plan.lines:
        say(line)
    home = run.train(plan.config, say=say)
    words = ["cpdlm", "speed-up", request.model, *_options(request), *request.settings, "--output", str(request.output)]
    found = measure_drafts(checkpoints.read_config(home), without_credentials(shlex.join(words)), say)
    export(home, request.output)
    return found


def _options(request: Request) -> list[str]:
    words = ["--minutes", f"{request.minutes:g}"]
    words += ["--corpus", request.corpus] if request.corpus else []
    words += ["--chat", str(request.chat)] if request.chat is not None else []
    return words + (["--skip-broken"] if request.skip_broken else [])
