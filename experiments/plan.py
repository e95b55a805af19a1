"""What a run would take, without running it: parameters, memory per process by part, FLOPs per token, days.

    python experiments/plan.py preset=llama8b devices=8
    python experiments/plan.py preset=paper rate=4e14 vocab=8192

Takes the settings of experiments/run.py, and

  rate=NUMBER   FLOP/s that one device reaches in training (default: 4e14, an H100 at 40 % of its bf16 peak)
  vocab=NUMBER  size of the vocabulary, where the tokenizer does not say
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parents[1])  # experiments/ would hide modules of the same name

import experiments

experiments.check_python()

from cpdlm import config as configuration
from cpdlm.files import WriteError
from experiments.command import Command, pairs

if TYPE_CHECKING:
    from cpdlm.training.plan import Plan

RATE = 4e14


def main(arguments: list[str]) -> int:
    try:
        words = Command("python experiments/plan.py", __doc__).read(arguments).settings
        own = pairs([word for word in words if word.startswith(("rate=", "vocab="))], ("rate", "vocab"))
        config = configuration.parse([word for word in words if not word.startswith(("rate=", "vocab="))])
        rate, vocab = _number("rate", own.get("rate", str(RATE))), int(_number("vocab", own.get("vocab", "0")))
        from cpdlm.training.plan import make_plan  # slow, after the checks above

        plan = make_plan(config, vocab)
    except (configuration.ConfigError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text(plan, config, rate))
    return 0


def _number(name: str, word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise configuration.ConfigError(f"{name}={word} is not a number of at least 0")
    return value


def text(plan: Plan, config: configuration.Config, rate: float) -> str:
    """The plan as a page for a terminal."""
    gib = {name: size / 2**30 for name, size in plan.memory.items()}
    lines = [f"{config.run_name}, {config.devices} x {config.parallel}, {config.train.precision}", "", "parameters"]
    lines += [f"  {name:<28}{count:>16,}" for name, count in plan.parameters.items() if count]
    lines += ["", "memory of each process (GiB)", *(f"  {name:<28}{size:>16.2f}" for name, size in gib.items() if size)]
    lines += [f"  {'together':<28}{sum(gib.values()):>16.2f}"]
    checkpointed = plan.activations_checkpointed / 2**30
    if checkpointed < gib["activations"]:
        less = sum(gib.values()) - gib["activations"] + checkpointed
        lines += [
            f"  {'activations, checkpointed':<28}{checkpointed:>16.2f}",
            f"  {'together, checkpointed':<28}{less:>16.2f}",
        ]
    lines += ["", "FLOPs per token", *(f"  {name:<28}{flops:>16.3g}" for name, flops in plan.flops.items() if flops)]
    lines += [f"  {'together':<28}{plan.flops_per_token:>16.3g}", ""]
    lines += [
        f"{plan.tokens:,} tokens at {rate:.3g} FLOP/s per device: {plan.tokens_per_second(rate):,.0f} tokens/s, "
        f"{plan.days(rate):,.2f} days on {plan.processes}"
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
