"""Methods side by side on a task's prompts: timed by the protocol of `compare`, or counted alone, in batches.

A text ends at the model's end of text or after `new_tokens`, for all methods alike. What is measured is an entry: a
dictionary that a record can hold, with an interval for every number. `row` makes of it what --json writes.

Letters: B prompts decoded at once, T positions of a prompt.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cpdlm.bench.acceptance import acceptance
from cpdlm.bench.compare import Protocol, Timing, interleaved, rate_interval, rate_ratio, run_seed
from cpdlm.bench.contenders import FILLER, Contender, Ours, forwards_of
from cpdlm.bench.intervals import of_ratio
from cpdlm.bench.llama import UNTOLD
from cpdlm.bench.methods import AUTOREGRESSIVE, GENERATE, METHODS, Method, Setup
from cpdlm.bench.timers import count_forwards
from cpdlm.data.prompts import Task
from cpdlm.decoding import Decoded, Sampling
from cpdlm.model.language_model import LanguageModel
from cpdlm.progress import Bar

MODES = {"greedy": Sampling(0.0), "T=1": Sampling()}
Entry = dict[str, Any]
Text = Decoded | list[int]


def contenders_of(methods: Mapping[str, Method], setup: Setup, mode: str, batch: int = 1) -> dict[str, Contender]:
    """batch: where several prompts are decoded at once, only our own methods are there.

    A method that is another one under greedy is left out beside that.
    """
    sampling = MODES[mode]
    return {
        name: contender
        for name, method in methods.items()
        if not (sampling.greedy and method.greedy_twin in methods)
        and (contender := method.make(setup, sampling)) is not None
        and (batch == 1 or isinstance(contender, Ours))
    }


@dataclass(frozen=True)
class Comparison:
    """Contenders by name on the prompts of one task in one mode."""

    setup: Setup
    task: Task
    mode: str
    contenders: Mapping[str, Contender]
    progress: Bar
    batch: int = 1

    def timed(self, protocol: Protocol) -> list[Entry]:
        """An entry per contender, run by turns. One of them is autoregressive decoding, which speed-ups are over."""
        keys = {(name, self._runs(name)): contender for name, contender in self.contenders.items()}
        models, tick = {"model": self.setup.model, "plain": self.setup.plain}, self.progress.update
        found = interleaved(keys, models, self._batches(), protocol, self._say, tick)
        timings = {name: timing for (name, _), timing in found.items()}
        base, generate, alone = timings[AUTOREGRESSIVE], timings.get(GENERATE), self.batch == 1
        return [
            self._entry(name, _by_prompt(timing.tokens), _by_prompt(timing.forwards), timing.decoded)
            | {
                "tokens_per_second": rate_interval(timing),
                "speedup": rate_ratio(timing, base),
                "speedup_over_generate": rate_ratio(timing, generate) if generate is not None else None,
                "other_than_autoregressive": _differing(timing, base) if alone and self.mode == "greedy" else None,
                "seconds": timing.seconds,
            }
            for name, timing in timings.items()
        ]

    def counted(self, rows: int, seed: int) -> list[Entry]:
        """The same without times, one text for each prompt: contenders of ours decode `rows` prompts at once."""
        prompts, entries = self._prompts(), []
        for name, contender in self.contenders.items():
            texts: list[tuple[Text, int]] = []
            for begin in range(0, len(prompts), rows):
                some = prompts[begin : begin + rows]
                seeds = [run_seed(seed, begin + index, 0) for index in range(len(some))]
                texts += _written(contender, some, seeds, getattr(self.setup, self._runs(name)))
                self.progress.update(len(some))
            tokens = [len(text.tokens if isinstance(text, Decoded) else text) for text, _ in texts]
            decoded = [[text] if isinstance(text, Decoded) else [] for text, _ in texts]
            entries.append(self._entry(name, tokens, [forwards for _, forwards in texts], decoded))
        return entries

    def _runs(self, name: str) -> str:
        """Which of the setup's models makes a method's forwards."""
        return "plain" if METHODS[name].is_plain else "model"

    def _prompts(self) -> list[Tensor]:
        device = next(self.setup.model.parameters()).device
        return [torch.tensor(ids, device=device) for ids in self.task.prompts]

    def _batches(self) -> list[Tensor]:
        """(T,) ids of each prompt or, where they are decoded together, (B, T) with `FILLER` behind the shorter ones."""
        prompts, size = self._prompts(), self.batch
        if size == 1:
            return prompts
        groups = [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
        return [pad_sequence(group, batch_first=True, padding_value=FILLER) for group in groups]

    def _say(self, line: str) -> None:
        """Of what `interleaved` tells, what the progress does not show."""
        if "again" in line:
            self.progress.write(line, file=sys.stderr)

    def _entry(self, name: str, tokens: list[int], forwards: list[int], decoded: Sequence[Sequence[Decoded]]) -> Entry:
        """Without times. tokens, forwards: per prompt or batch, all repeats together; forwards 0 where unseen.

        The forwards of a batch write a token for each of its rows: there are no tokens per forward.
        """
        depths: list[dict[str, int]] = []
        if all(decoded):
            statistics = acceptance(decoded, len(decoded[0][0].reached) + 1)
            depths = [each for each in statistics["acceptance_by_depth"] if each["reached"]]
        return {
            "task": self.task.name,
            "method": name,
            "mode": self.mode,
            "prompts": len(self.task.prompts),
            "tokens": tokens,
            "forwards": forwards if all(forwards) else None,
            "tokens_per_forward": of_ratio(tokens, forwards) if all(forwards) and self.batch == 1 else None,
            "acceptance_by_depth": depths,
            "tokens_per_second": None,
            "speedup": None,
        }


def _written(
    contender: Contender, prompts: Sequence[Tensor], seeds: Sequence[int], model: LanguageModel
) -> list[tuple[Text, int]]:
    """(the text, its forwards) of each prompt."""
    if isinstance(contender, Ours):
        return [(each, each.forwards) for each in contender.batch(prompts, seeds)]
    found: list[tuple[Text, int]] = []
    for prompt_T, seed in zip(prompts, seeds, strict=True):
        with count_forwards(model) as forwards:
            text = contender(prompt_T, seed)
        found.append((text, forwards_of(contender, forwards.count)))
    return found


def row(entry: Entry) -> Entry:
    """What --json writes of an entry; null for what was not measured.

    accepted_by_depth: from x_{t+2} on, the share of drafts that were accepted where all before them were.
    """
    rate = entry["tokens_per_second"]
    return {
        **{key: entry[key] for key in ("task", "method", "mode", "prompts")},
        "tokens_per_forward": entry["tokens_per_forward"] and entry["tokens_per_forward"]["mean"],
        "accepted_by_depth": [each["accepted"] / each["reached"] for each in entry["acceptance_by_depth"]],
        "speedup": entry["speedup"],
        "tokens_per_second": rate and rate["median"],
    }


def _by_prompt(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(repeats) for repeats in zip(*counts, strict=True)]


def _differing(timing: Timing, base: Timing) -> int | None:
    """Prompts whose greedy text is another than the base's: near-ties that a forward of several tokens rounds."""
    if any(UNTOLD in text for text in timing.texts):
        return None
    return sum(mine != theirs for mine, theirs in zip(timing.texts, base.texts, strict=True))
