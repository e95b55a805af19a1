"""One call from a model to a faster one: train heads on it, measure it beside autoregressive decoding, export it.

Killed at any point, the same call goes on where it was. A stage that is done is not done again.
"""

import hashlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cpdlm.bench.compare import Protocol, measure
from cpdlm.bench.hardware import hardware
from cpdlm.config import Config, parse, without_credentials
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.corpus import load_corpus
from cpdlm.data.target import Target
from cpdlm.decoding import Sampling
from cpdlm.files import default_cache, write_json
from cpdlm.hf.export import check_folder, export
from cpdlm.hf.load import read_json
from cpdlm.progress import Bar
from cpdlm.training import checkpoints, run

# Heads of rank 1, of which each sees the token before it, trained on every position: no higher rank was faster yet.
SETTINGS = ("preset=retrofit,many", "rank=1", "link=all")
MEASURED = "decode.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class SpeedUp:
    """modes: of the record, by name ("greedy", "sampling"). folder: the exported one. run: that of the training."""

    model: str
    run: Path
    folder: Path
    modes: dict[str, dict[str, Any]]

    @property
    def use(self) -> str:
        return (
            f"load it with AutoModelForCausalLM after `import cpdlm.hf`, or cpdlm generate --model {self.folder} --show"
        )

    def lines(self) -> list[str]:
        """A table of what was measured, and one sentence on it."""
        rows = [f"{'':<10}{'AR tokens/s':>14}{'with heads':>14}{'tokens/forward':>16}   speed-up (95 % interval)"]
        for name, mode in self.modes.items():
            rate, faster = mode["tokens_per_second"], mode["speedup"]
            rows.append(
                f"{name:<10}{rate['plain']:>14.1f}{rate['speculative']:>14.1f}{mode['tokens_per_pass']['mean']:>16.2f}"
                f"   {faster['median']:.2f} ({faster['low']:.2f} to {faster['high']:.2f})"
            )
        said = " and ".join(f"{_verdict(mode['speedup'])} ({name})" for name, mode in self.modes.items())
        return [*rows, "", f"With these heads {self.model} is {said}; the distribution of its output is unchanged."]


def _verdict(speedup: dict[str, float]) -> str:
    if speedup["low"] > 1:
        return f"{speedup['median']:.2f} times as fast"
    return "slower" if speedup["high"] < 1 else "not surely faster"


def speed_up(model: str, folder: Path, settings: Sequence[str] = (), say: Say = print) -> SpeedUp:
    """Train heads on a frozen model, measure both ways of decoding, and write `folder` for transformers.

    model: a Hugging Face folder or name, a GGUF file or smollm2. settings: KEY=VALUE words on top of `SETTINGS`. say:
    takes lines for the user. Raises ConfigError for settings that do not fit, RunError for folders that cannot be
    used, and what `training.run.train` raises.
    """
    words = [*SETTINGS, f"data.cache={default_cache()}", f"model={model}", *settings]
    config = parse(words)
    check_folder(folder)
    home = run.train(config, say=say)
    command = shlex.join(["cpdlm", "speed-up", model, *settings, "--output", str(folder)])
    modes = _measured(config, without_credentials(command), say)
    export(home, folder)
    return SpeedUp(model, home, folder, modes)


def _measured(config: Config, command: str, say: Say) -> dict[str, dict[str, Any]]:
    """Both modes; of an earlier call if settings and weights are the same."""
    home = checkpoints.run_folder(config)
    weights = hashlib.sha256((home / checkpoints.WEIGHTS).read_bytes() + Target.of(config).sha256.encode()).hexdigest()
    found = read_json(home / MEASURED)
    if found is not None and found["settings"] == asdict(config.decode) and found.get("measured_weights") == weights:
        modes: dict[str, dict[str, Any]] = found["modes"]
        return modes
    began, device = time.monotonic(), run.training_device()
    corpus, target = load_corpus(config), run.frozen_model(config)
    model = checkpoints.load_model(home, target).to(device)
    listed = None
    if config.decode.draft_vocabulary:
        text, _ = run.training_text(config, corpus, target, say)
        listed = run.draft_vocabulary(config.decode.draft_vocabulary, text)
        model.use_draft_vocabulary(torch.from_numpy(listed.ids))
    prompts_PT = TokenDataModule(config, corpus).prompts().to(device)
    decode, modes = config.decode, {}
    samplings = {"greedy": Sampling(0.0), "sampling": Sampling(decode.temperature, decode.top_k, decode.top_p)}
    for name, sampling in samplings.items():
        with Bar(total=decode.warmups + decode.repeats, desc=f"decoding, {name}", file=sys.stderr) as bar:

            def progress(line: str, bar: Bar = bar) -> None:
                bar.update(int(line.startswith(("repeat", "warm-up"))))

            protocol = Protocol.of(decode, config.seed)
            modes[name] = measure({"heads": model}, prompts_PT, sampling, protocol, progress=progress)["heads"]
    content = {
        "command": command,
        "data": corpus.describe(),
        "settings": asdict(decode),
        "measured_weights": weights,
        "shortlist": listed.ids.tolist() if listed is not None else None,
        "shortlist_coverage": listed.coverage if listed is not None else None,
        "modes": modes,
        "seconds": time.monotonic() - began,
        "origin": {"hardware": hardware()},
    }
    write_json(home / MEASURED, content)
    checkpoints.save_draft_vocabulary(home, config, torch.from_numpy(listed.ids) if listed is not None else None)
    return modes
