"""The speed protocol: decoders that are compared run side by side, in one process, on the same prompts.

Every repeat runs, prompt after prompt, autoregressive decoding, each cell's speculative decoding and Hugging Face's
generate on the same weights. The order rotates from repeat to repeat, so that a slow minute of the machine falls on all
alike. Ratios are taken within a repeat; their median is reported, with an interval over prompts.
Tokens are counted from the ids, forwards by a hook on the trunk. All run for the same number of tokens (nothing stops
at an eos), with the same seed per (prompt, repeat). A call in which the process stood still (SIGSTOP, a laptop's lid)
is made again. The time split comes from a separate repeat over a few prompts,
with timers that synchronise.

Letters: P prompts, K repeats, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cpdlm.bench.acceptance import acceptance
from cpdlm.bench.contenders import Contender, Ours, forwards_of, hugging_face, theirs
from cpdlm.bench.intervals import Effect, log_ratio, named, pseudo_values
from cpdlm.bench.timers import PARTS, Timer, count_forwards, forward_milliseconds, undisturbed
from cpdlm.config import DecodeConfig
from cpdlm.decoding import Decoded, Sampling
from cpdlm.model.language_model import LanguageModel
from cpdlm.processes import PauseWatch

REFERENCE = "(next-token model)"  # no run is called so
_Call = tuple[Decoded | list[int], float, int]  # what was decoded, its seconds, forwards that the hook counted
SPLIT_PROMPTS = 4  # of which the time split is taken: shares of a decoding do not need them all


@dataclass(frozen=True)
class Protocol:
    """How a comparison runs. draft, nodes: as `decode_batch` takes them. seed: of texts."""

    new_tokens: int
    draft: str = "chain"
    nodes: int = 8
    repeats: int = 5
    warmups: int = 3
    seed: int = 0

    @classmethod
    def of(cls, settings: DecodeConfig, seed: int) -> Protocol:
        return cls(settings.new_tokens, settings.draft, settings.nodes, settings.repeats, settings.warmups, seed)


@dataclass(frozen=True)
class Timing:
    """One contender: seconds, tokens and forwards, [repeat][prompt], and, of ours, what was decoded per prompt.

    texts: the ids of the first repeat, per prompt."""

    seconds: list[list[float]]
    tokens: list[list[int]]
    decoded: list[list[Decoded]]
    texts: list[list[int]] = field(default_factory=list)
    forwards: list[list[int]] = field(default_factory=list)

    def rates(self) -> NDArray[np.float64]:
        """(K,) tokens per second of each repeat: total tokens over total time."""
        tokens, seconds = (np.asarray(each, dtype=np.float64).sum(axis=1) for each in (self.tokens, self.seconds))
        return np.asarray(tokens / seconds)

    def rate(self) -> float:
        return float(np.median(self.rates()))


def measure(
    models: Mapping[str, LanguageModel],
    prompts_PT: Tensor,
    sampling: Sampling,
    protocol: Protocol,
    *,
    rank_one: Mapping[str, str] | None = None,
    reference: LanguageModel | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The record's `modes` entry of each cell, measured side by side: {name: mode}.

    models: cells by name, in evaluation mode, all on the prompts' device; horizon 2 or more. Cells on one frozen trunk
    share one autoregressive decoder and one generate. prompts_PT: (P, T) ids. A warm-up decodes the first prompt with
    every contender. rank_one: of a cell, the one of rank 1 that differs from it in rank only; "speedup_over_rank1"
    compares with that (null without one). reference: a next-token model of equal training; "speedup_over_trunk"
    compares with its autoregressive decoding (null without one; on a frozen trunk that is "speedup" itself). Tokens
    and forwards are summed over repeats. Times in seconds, or ms where the name says so.
    """
    say = progress or (lambda line: None)
    shared, new_tokens = _shared_autoregressive(models), protocol.new_tokens
    subjects = dict(models)
    contenders: dict[tuple[str, str], Contender] = {}
    if reference is not None:
        subjects[REFERENCE] = reference
        contenders["plain", REFERENCE] = Ours(reference, new_tokens, sampling, "none")
    for name, model in models.items():
        if shared[name] == name:
            contenders["plain", name] = Ours(model, new_tokens, sampling, "none")
            generate = hugging_face(model)
            if generate is not None:
                contenders["generate", name] = theirs(generate, new_tokens, sampling)
        contenders["speculative", name] = Ours(model, new_tokens, sampling, protocol.draft, protocol.nodes)
    timings = interleaved(contenders, subjects, list(prompts_PT), protocol, say)
    modes = {}
    for name, model in models.items():
        say(f"{name}: time split")
        ours, base, generated = timings["speculative", name], timings["plain", shared[name]], ("generate", shared[name])
        modes[name] = _mode(model, prompts_PT, sampling, protocol, base, ours, timings.get(generated))
        others = {"trunk": ("plain", REFERENCE), "rank1": ("speculative", (rank_one or {}).get(name, ""))}
        for key, other in others.items():
            modes[name][f"speedup_over_{key}"] = rate_ratio(ours, timings[other]) if other in timings else None
    return modes


def _mode(
    model: LanguageModel,
    prompts_PT: Tensor,
    sampling: Sampling,
    protocol: Protocol,
    base: Timing,
    ours: Timing,
    generate: Timing | None,
) -> dict[str, Any]:
    """base: of autoregressive decoding."""
    statistics = acceptance(ours.decoded, model.horizon)
    speedup = rate_ratio(ours, base)
    one, window = forward_milliseconds(model, prompts_PT, protocol.new_tokens)
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "prompts": len(prompts_PT),
        "new_tokens": protocol.new_tokens,
        "repeats": protocol.repeats,
        **statistics,
        "tokens_per_second": {
            "plain": base.rate(),
            "speculative": ours.rate(),
            "generate": generate.rate() if generate is not None else None,
        },
        "speedup": speedup,
        "plain_over_generate": rate_ratio(base, generate) if generate is not None else None,
        "other_than_generate": _differing(ours, generate) if generate is not None and sampling.greedy else None,
        "conversion": speedup["median"] / statistics["tokens_per_pass"]["mean"],
        "conversion_limit": one / window,
        "t1_ms": one,
        "tn_ms": window,
        "seconds_by_part": seconds_by_part(model, prompts_PT[:SPLIT_PROMPTS], sampling, protocol),
        "repeat_seconds": {
            "plain": [sum(repeat) for repeat in base.seconds],
            "speculative": [sum(repeat) for repeat in ours.seconds],
        },
    }


def _differing(ours: Timing, other: Timing) -> dict[str, Any]:
    """How many prompts' greedy text is not generate's, and the first token where one is not (null for none).

    In exact arithmetic none: forwards of several tokens round otherwise than forwards of one, which turns near-ties.
    """
    first = [
        next((index for index, (a, b) in enumerate(zip(mine, their, strict=True)) if a != b), None)
        for mine, their in zip(ours.texts, other.texts, strict=True)
    ]
    indices = [index for index in first if index is not None]
    return {"prompts": len(indices), "of": len(first), "first_token": min(indices, default=None)}


def seconds_by_part(
    model: LanguageModel, prompts_PT: Tensor, sampling: Sampling, protocol: Protocol
) -> dict[str, float]:
    """Seconds of one repeat over all prompts, by part. Timers synchronise: the sum may exceed an untimed run.

    trunk: hidden states. verify: the target (output layer; eq. 11 where that is the target) and the acceptance test. On
    CUDA these are the parts of forwards launched kernel by kernel, not of captured ones.
    """
    contender = Ours(model, protocol.new_tokens, sampling, protocol.draft, protocol.nodes)
    total, watch = dict.fromkeys(PARTS, 0.0), PauseWatch()
    for index, prompt_T in enumerate(prompts_PT):

        def once(prompt_T: Tensor = prompt_T, seed: int = run_seed(protocol.seed, index, 0)) -> dict[str, float]:
            timer = Timer(prompt_T.device)
            contender.timed(prompt_T, seed, timer)
            return timer.seconds

        for part, seconds in undisturbed(once, watch).items():
            total[part] += seconds
    return total


def interleaved(
    contenders: Mapping[tuple[str, str], Contender],
    models: Mapping[str, LanguageModel],
    prompts: Sequence[Tensor],
    protocol: Protocol,
    say: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
) -> dict[tuple[str, str], Timing]:
    """Timing of each contender, (kind, name), run prompt by prompt with the others.

    models[name]: whose forwards are counted. prompts: (T,) ids each. Of the protocol its repeats, warm-ups and seed.
    tick: called after every text, warm-ups included.
    """
    for warmup in range(protocol.warmups):
        say(f"warm-up {warmup + 1}/{protocol.warmups}")
        for contender in contenders.values():
            contender(prompts[0], protocol.seed)
            tick()
    timings = {key: Timing([], [], [[] for _ in prompts]) for key in contenders}
    timer, watch = Timer(prompts[0].device), PauseWatch()
    order = list(contenders)
    for repeat in range(protocol.repeats):
        say(f"repeat {repeat + 1}/{protocol.repeats}")
        for timing in timings.values():
            timing.seconds.append([])
            timing.tokens.append([])
            timing.forwards.append([])
        for index, prompt_T in enumerate(prompts):
            turn, seed = (repeat + index) % len(order), run_seed(protocol.seed, index, repeat)
            for key in order[turn:] + order[:turn]:
                timing, contender = timings[key], contenders[key]

                def once(key: tuple[str, str] = key, prompt_T: Tensor = prompt_T, seed: int = seed) -> _Call:
                    with count_forwards(models[key[1]]) as forwards:
                        start = timer.now()
                        result = contenders[key](prompt_T, seed)
                        return result, timer.now() - start, forwards.count

                result, seconds, hooked = undisturbed(once, watch, say)
                timing.seconds[repeat].append(seconds)
                seen = forwards_of(contender, hooked)
                timing.forwards[repeat].append(seen)
                if isinstance(result, Decoded):
                    assert seen == result.forwards, f"{key}: {seen} forwards were made, the loop says {result.forwards}"
                    timing.decoded[index].append(result)
                ids = result.tokens if isinstance(result, Decoded) else result
                timing.tokens[repeat].append(len(ids))
                if repeat == 0:
                    timing.texts.append(ids)
                tick()
    return timings


def _shared_autoregressive(models: Mapping[str, LanguageModel]) -> dict[str, str]:
    """Cell -> the cell whose autoregressive decoder stands for it: the first on the very same frozen trunk."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(model.trunk if model.frozen_target else model), name)
        for name, model in models.items()
    }


def run_seed(seed: int, index: int, repeat: int) -> int:
    """Of one (prompt, repeat): the same for every contender."""
    return (seed * 1_000_003 + index) * 1009 + repeat


def rate_ratio(top: Timing, bottom: Timing) -> dict[str, float]:
    """{"median", "low", "high", "sem"}: the median over repeats of the tokens/s ratio, and the interval over prompts,
    each with all of its repeats, of the ratio of total rates. sem: standard error of its logarithm."""
    return _rates(float(np.median(top.rates() / bottom.rates())), top, bottom)


def rate_interval(timing: Timing) -> dict[str, float]:
    """The same of tokens/s."""
    return _rates(timing.rate(), timing)


def _rates(median: float, *timings: Timing) -> dict[str, float]:
    parts_1P = [np.sum(part, axis=0, keepdims=True, dtype=float) for t in timings for part in (t.tokens, t.seconds)]
    effect = Effect.of(*pseudo_values(log_ratio, *parts_1P))
    return named("median", median, effect, math.exp) | {
        "sem": math.sqrt(effect.within) if math.isfinite(effect.within) else 0.0
    }
