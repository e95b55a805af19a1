"""What `speed_up` will do, and what that takes: picked by what this machine was measured to do, and said first."""

import hashlib
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cpdlm.config import Config, ConfigError, parse
from cpdlm.data.conversations import read_conversations
from cpdlm.data.pretrained_files import checkpoint_folder, free_memory
from cpdlm.data.sources import locate
from cpdlm.data.tokenizer import HubTokenizer
from cpdlm.decoding.prepared import product_times
from cpdlm.files import default_cache
from cpdlm.hf.export import check_folder
from cpdlm.model.pretrained import longest_text, multiplies_bfloat16, width
from cpdlm.speed_up.pace import Pace, measure_pace
from cpdlm.training import checkpoints, run

# Heads of rank 1, of which each sees the token before it, trained on every position: no higher rank was faster yet.
SETTINGS = ("preset=retrofit,many", "rank=1", "link=all", "data.states=0", "train.decode_prompts=0")
LISTED = 8192  # tokens of a draft vocabulary, where one pays
PASSES = 3  # over text that the model wrote, which takes longer to write than to train on
# What a draft is accepted with once all before it were, at x_{t+2} and later: about what heads reach in an hour.
FIRST, LATER = 0.45, 0.4
SHORTEST, LONGEST = 3, 8  # tokens of a window; a link needs two drafts
SHARE = 0.9  # of the minutes that is planned for
GIB = 2**30


@dataclass(frozen=True)
class Request:
    """The options of `cpdlm speed-up`, by their names there."""

    model: str
    output: Path
    corpus: str = ""
    chat: Path | None = None
    minutes: float = 30.0
    skip_broken: bool = False
    settings: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """What was asked for, as settings: all but what is picked."""
        words = [*SETTINGS, f"data.cache={default_cache()}", f"model={self.model}"]
        words += [f"corpus={self.corpus}"] if self.corpus else []
        if self.chat is not None:
            words += [f"corpus={self.chat}", f"data.skip_broken={self.skip_broken}"]
        return words

    @property
    def names_text(self) -> bool:
        named = any(word.startswith(("corpus=", "data.text=")) for word in self.settings)
        return bool(named or self.corpus or self.chat)

    def check(self) -> None:
        """ConfigError for options that do not fit together or that nothing can be done with, RunError for a folder that
        holds something else."""
        check_folder(self.output)
        if not 0 < self.minutes < math.inf:
            raise ConfigError(f"--minutes {self.minutes:g} is no time to train in; give at least 1, or leave it out")
        if any(word.startswith("name=") for word in self.settings):
            raise ConfigError("name= is how a killed speed-up is found again, made from the request; leave it out")
        if self.corpus and self.chat is not None:
            raise ConfigError("--corpus and --chat are two texts to train on; give one of them")
        if self.chat is None:
            return
        if not self.chat.is_file():
            raise ConfigError(f"--chat {self.chat}: there is no such file; give conversations as JSON lines")
        if self.chat.suffix != ".jsonl":
            raise ConfigError(f"--chat {self.chat} must be JSON lines; call it {self.chat.stem}.jsonl")
        read_conversations(self.chat, self.chat.read_bytes(), str(self.chat), self.skip_broken)


@dataclass(frozen=True)
class Plan:
    """config: of the training. lines: what is told of it."""

    config: Config
    lines: list[str]


def make_plan(request: Request, say: run.Say = print) -> Plan:
    """The settings that pay on this machine, from forwards of the model itself; seconds for one of 100M parameters.

    A run that was begun by the same request keeps its settings. Raises ConfigError and RunError on bad input, and where
    memory or disk do not suffice.
    """
    request.check()
    first = parse([*request.words, *request.settings])
    if not first.corpus.startswith("hf:"):  # which is asked over the network
        locate(first)
    source = checkpoint_folder(request.model, first.data.cache)
    words = [*request.words, *_fitting(request, source), _name(request)]
    base = parse([*words, *request.settings])
    home = checkpoints.run_folder(base)
    if base.name == parse([_name(request)]).name and (home / checkpoints.CONFIG).is_file():
        return Plan(checkpoints.read_config(home), [f"{home} goes on as it was planned"])
    say(f"measuring what {request.model} takes on this machine")
    device = run.training_device()
    dtype, why = _precision(request, base, source, device)
    words.append(f"model.dtype={dtype}")
    base = parse([*words, *request.settings])
    target = run.frozen_model(base)
    assert target is not None
    if base.data.tokenizer == "model":
        run.check_vocabulary(base, HubTokenizer("model", source), target)
    pace = measure_pace(base, target, device, base.data.text != "corpus")
    if not any(word.startswith("horizon=") for word in request.settings):
        words.append(f"horizon={best_horizon(pace)}")
        base = parse([*words, *request.settings])
    config = parse([*words, *_picked(base, pace, 60 * SHARE * request.minutes), *request.settings])
    return Plan(config, _lines(request, config, pace, why))


def _name(request: Request) -> str:
    """The same for the same request, so that a killed one goes on."""
    asked = "\n".join([*request.words, *request.settings, f"{request.minutes:g}"])
    model = re.sub(r"[^a-z0-9]+", "-", Path(request.model).name.lower()).strip("-")
    return f"name={model}-fast-{hashlib.sha256(asked.encode()).hexdigest()[:6]}"


def _precision(request: Request, base: Config, source: str, device: torch.device) -> tuple[str, str]:
    """That of the model, and why: as given, else in which this machine decodes faster."""
    if any(word.startswith("model.dtype=") for word in request.settings):
        return base.model.dtype, "as given"
    if device.type == "cuda":
        return "bfloat16", "on a GPU"
    taken = product_times(width(source, request.model))
    fast, slow = sorted(taken, key=lambda name: taken[name])
    return fast, f"products take {taken[fast]:.1f} ms, in {slow} {taken[slow]:.1f}"


def _fitting(request: Request, source: str) -> list[str]:
    """Settings that follow from the machine's instructions and the model's small files: lengths, draft vocabulary, text
    of its own."""
    context = min(256, longest_text(source, request.model) or 256)
    words = [f"train.precision={'bf16-mixed' if multiplies_bfloat16() else '32-true'}", f"data.context={context}"]
    words += [f"decode.prompt_tokens={min(64, context // 2)}", f"decode.new_tokens={min(48, context // 4)}"]
    tokenizer = HubTokenizer("model", source)
    listed = LISTED if tokenizer.vocab_size > LISTED else 0
    words += [f"loss.draft_vocabulary={listed}", f"decode.draft_vocabulary={listed}"]
    if request.names_text:
        return words
    prompts = ("chat", "conversations") if tokenizer.has_template else ("wiki", "starts")
    own = ["data.text=sampled", f"data.states={context}"]  # as many as there is time for, in `_picked`
    return [*words, *own, f"corpus={prompts[0]}", f"data.prompts={prompts[1]}"]


def _picked(base: Config, pace: Pace, seconds: float) -> list[str]:
    """Settings that follow from the pace: draft vocabulary, steps, and tokens that the model writes."""
    data, words = base.data, []
    if pace.draft_all - pace.draft < 0.03 * pace.forward[1]:
        words += ["loss.draft_vocabulary=0", "decode.draft_vocabulary=0"]
    positions = data.batch_rows * data.context
    heads = _heads_seconds(base, pace)
    if data.text == "corpus":
        steps = seconds / ((pace.states + heads) * positions)
    else:
        kept = data.states_gib * GIB / _state_bytes(base, pace)
        tokens = min(kept, seconds / (pace.writing + pace.states + PASSES * heads))
        rows = max(2 * data.batch_rows, int(tokens / data.context))
        words.append(f"data.states={rows * data.context}")
        steps = (seconds - rows * data.context * (pace.writing + pace.states)) / (heads * positions)
    number = max(10, round(steps))
    often = max(1, min(200, round(60 / (positions * (pace.states + heads)))))  # a kill costs a minute
    measuring = _measuring(base, pace)
    prompts = max(4, min(base.decode.prompts, round(base.decode.prompts * seconds / 2 / measuring)))
    words.append(f"decode.prompts={prompts}")
    return [*words, f"optim.steps={number}", f"optim.warmup={min(50, number // 10)}", f"train.checkpoint_every={often}"]


def _heads_seconds(config: Config, pace: Pace) -> float:
    """Of a position in training."""
    return pace.heads * (config.horizon - 1) / (pace.horizon - 1)


def _state_bytes(config: Config, pace: Pace) -> int:
    """Of the target's state at a token, with its normaliser."""
    return pace.width * _weight_bytes(config) + 4


def _weight_bytes(config: Config) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def best_horizon(pace: Pace) -> int:
    """The window that writes most tokens a second."""

    def rate(horizon: int) -> float:
        reached = [FIRST * LATER**depth for depth in range(horizon - 1)]
        forward = np.interp(horizon, list(pace.forward), list(pace.forward.values()))
        return (1 + sum(reached)) / float(forward + pace.draft * (horizon - 1) / (pace.horizon - 1))

    return max(range(SHORTEST, LONGEST + 1), key=rate)


def _seconds(config: Config, pace: Pace) -> tuple[float, float, float]:
    """Of writing, training and measuring."""
    data = config.data
    written = data.states if data.text != "corpus" else 0
    positions = config.optim.steps * data.batch_rows * data.context
    training = positions * _heads_seconds(config, pace) + (data.states or positions) * pace.states
    return written * pace.writing, training, _measuring(config, pace)


def _measuring(config: Config, pace: Pace) -> float:
    """Three ways of decoding in two modes, after six candidates on three prompts and one more."""
    decode = config.decode
    texts = 6 * (decode.prompts * decode.repeats + decode.warmups) + 6 * 4
    return texts * decode.new_tokens * pace.forward[1] / 1000


def _lines(request: Request, config: Config, pace: Pace, why: str) -> list[str]:
    """What the plan says. why: the precision. ConfigError where memory or disk do not suffice."""
    data, weight, memory = config.data, _weight_bytes(config), free_memory(request.model)
    takes = {
        Path(data.cache): data.states * _state_bytes(config, pace),
        Path(config.output): 16 * pace.head_parameters,
        request.output: weight * (pace.parameters + pace.head_parameters),
    }
    _check_disks(takes)
    text = config.corpus if data.text == "corpus" else f"{data.states:,} tokens that it writes ({data.prompts})"
    copied = weight * pace.parameters if data.text != "corpus" else 0  # what writes is a copy that is laid out anew
    if copied > memory:
        raise ConfigError(
            f"model={request.model} writes its training text as a copy of {copied / GIB:.1f} GiB, and "
            f"{memory / GIB:.1f} GiB of memory are free; give a text with --corpus, or free some memory"
        )
    listed = config.loss.draft_vocabulary
    writing, training, measuring = (seconds / 60 for seconds in _seconds(config, pace))
    return [
        f"{request.model}: {pace.parameters / 1e6:.1f}M parameters, in {config.model.dtype} ({why})",
        f"a forward of {', '.join(map(str, pace.forward))} tokens: "
        f"{', '.join(f'{ms:.1f}' for ms in pace.forward.values())} ms; drafts: {pace.draft:.1f} ms",
        f"so {config.horizon - 1} drafts for each forward, from "
        + (f"the {listed:,} commonest tokens" if listed else "all tokens"),
        f"text: {text}",
        f"training: {config.optim.steps:,} steps of {data.batch_rows * data.context:,} positions",
        f"minutes: {f'{writing:.1f} writing, ' if writing else ''}{training:.1f} training, {measuring:.1f} measuring",
        f"memory: {(pace.peak + copied) / GIB:.1f} GiB ({memory / GIB:.1f} are free); "
        f"disk: {sum(takes.values()) / GIB:.2f} GiB",
    ]


def _check_disks(takes: dict[Path, int]) -> None:
    """ConfigError where a disk has less room than what comes on it takes."""
    wanted: dict[int, int] = {}
    for path, size in takes.items():
        place = next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())
        disk, free = place.stat().st_dev, shutil.disk_usage(place).free
        wanted[disk] = wanted.get(disk, 0) + size
        if wanted[disk] > free:
            raise ConfigError(
                f"{path}: the plan takes {wanted[disk] / GIB:.1f} GiB of that disk, {free / GIB:.1f} GiB are free; "
                "free some, or give another place (--output, data.cache=, output=)"
            )
