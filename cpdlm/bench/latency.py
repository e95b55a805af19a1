"""The speed protocol: decoders that are compared run side by side, in one process, on the same prompts.

Every repeat runs, prompt after prompt, plain decoding, each cell's speculative decoding and Hugging Face's generate on
the same weights, and the order of the contenders rotates from repeat to repeat, so that a slow minute of the machine
falls on all alike. Ratios are taken within a repeat; reported are their median and a
bootstrap interval over prompts and repeats.
Tokens are counted from the ids, passes by a hook on the trunk. All run for the same number of tokens (no end-of-sequence
stop), with the same seed per (prompt, repeat). The time split comes from a separate repeat over a few prompts, with
synchronising timers.

Letters: P prompts, K repeats, S resamples, T position, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from cpdlm.bench.acceptance import RESAMPLES, acceptance
from cpdlm.decoding import CapturedForwards, Captures, Decoded, Options, Sampling, decode
from cpdlm.decoding.captured import record
from cpdlm.decoding.drafters import nothing
from cpdlm.model.language_model import LanguageModel

REFERENCE = "(next-token model)"  # no run is called so
PARTS = ("prefill", "draft", "trunk", "verify", "other")
SPLIT_PROMPTS = 4  # of which the time split is taken: shares of a decoding do not need them all
Generate = Callable[[Tensor, int, Sampling, int], list[int]]


class PassCounter:
    """Passes of a trunk since the hook was set."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.count += 1


@contextmanager
def count_forwards(model: LanguageModel) -> Iterator[PassCounter]:
    """Counts passes by a forward hook on the trunk's body: a count that the decoding loop has no hand in."""
    counter = PassCounter()
    hook = model.trunk.body.register_forward_hook(counter)
    try:
        yield counter
    finally:
        hook.remove()


class Clock:
    """Seconds per part; `decode` calls it at the end of each stretch of work. Synchronises on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, part: str) -> None:
        now = self.now()
        self.seconds[part] += now - self.last
        self.last = now


def hugging_face(model: LanguageModel, static: bool = False) -> Generate | None:
    """Hugging Face's generate on the model's own trunk and unembedding (shared, not copied).

    static: with its cache of fixed size, for which it compiles the model on CUDA. None where the target is not softmax(U h), so that no Hugging Face model has this law (own target, untied). The
    result is (prompt_T, new tokens, sampling, seed) -> ids; the global generator, which generate uses, is restored.
    """
    if not (model.first_is_tied or model.frozen_target):
        return None
    shell = as_hugging_face(model)

    def generate(prompt_T: Tensor, new_tokens: int, sampling: Sampling, seed: int) -> list[int]:
        choice: dict[str, Any] = {"do_sample": False}
        if not sampling.greedy:
            choice = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
            }
        if static:
            choice["cache_implementation"] = "static"
        settings = GenerationConfig(
            max_new_tokens=new_tokens, min_new_tokens=None, eos_token_id=None, pad_token_id=0, use_cache=True, **choice
        )
        shell.generation_config = settings
        devices = [prompt_T.device] if prompt_T.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            text_1T = shell.generate(
                prompt_T[None], attention_mask=torch.ones_like(prompt_T[None]), generation_config=settings
            )
        ids: list[int] = text_1T[0, len(prompt_T) :].tolist()
        return ids

    return generate


def as_hugging_face(model: LanguageModel) -> Any:
    """A Hugging Face causal language model of a model's trunk and unembedding (shared, not copied), in evaluation mode."""
    with torch.device("meta"):  # the shell's own weights are never made
        shell = AutoModelForCausalLM.from_config(model.trunk.body.config)
    setattr(shell, shell.base_model_prefix, model.trunk.body)
    shell.get_output_embeddings().weight = model.unembedding.weight
    return shell.eval()


@dataclass(frozen=True)
class Timing:
    """One contender: seconds and tokens, [repeat][prompt], and, of ours, what was decoded per prompt. texts: the ids of the
    first repeat, per prompt."""

    seconds: list[list[float]]
    tokens: list[list[int]]
    decoded: list[list[Decoded]]
    texts: list[list[int]] = field(default_factory=list)

    def rates(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Tokens per second of each repeat: total tokens over total time."""
        tokens, seconds = (np.asarray(each, dtype=np.float64).sum(axis=1) for each in (self.tokens, self.seconds))
        return np.asarray(tokens / seconds)


def measure(
    models: Mapping[str, LanguageModel],
    prompts_PT: Tensor,
    new_tokens: int,
    sampling: Sampling,
    *,
    rank_one: Mapping[str, str] | None = None,
    draft: str = "chain",
    nodes: int = 8,
    reference: LanguageModel | None = None,
    repeats: int = 5,
    warmups: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The record's `modes` entry of each cell, measured side by side: {name: mode}.

    models: cells by name, in evaluation mode, all on the prompts' device; horizon 2 or more. draft, nodes: as `decode_batch`
    takes them. Cells on one frozen trunk
    share one plain decoder and one generate. prompts_PT: (P, T) ids. A warm-up decodes the first prompt with every
    contender. rank_one: of a cell, the one of rank 1 that differs from it in rank only; "speedup_over_rank1" compares with
    that (null for a cell without one). reference: a next-token model of equal training; "speedup_over_trunk" compares with its plain
    decoding (null without one; on a frozen trunk that is "speedup" itself). Tokens and passes are summed over repeats. Times in seconds or ms as named.

    Raises ValueError on an empty group or a cell without drafts.
    """
    if not models:
        raise ValueError("no cell to measure; pass at least one model")
    for name, model in models.items():
        if model.horizon < 2:
            raise ValueError(
                f"cell {name} has horizon {model.horizon} and drafts nothing; measure cells of horizon 2 or more"
            )
    say = progress or (lambda line: None)
    shared = _shared_plain(models)
    subjects = dict(models)
    contenders: dict[tuple[str, str], Callable[[Tensor, int], Decoded | list[int]]] = {}
    if reference is not None:
        subjects[REFERENCE] = reference
        contenders["plain", REFERENCE] = Ours(reference, new_tokens, sampling, "none")
    for name, model in models.items():
        if shared[name] == name:
            contenders["plain", name] = Ours(model, new_tokens, sampling, "none")
            generate = hugging_face(model)
            if generate is not None:
                contenders["generate", name] = _theirs(generate, new_tokens, sampling)
        contenders["speculative", name] = Ours(model, new_tokens, sampling, draft, nodes)
    timings = interleaved(contenders, subjects, prompts_PT, repeats, warmups, seed, say)
    base = rank_one or {}
    modes = {}
    for name, model in models.items():
        say(f"{name}: time split")
        modes[name] = _mode(
            model,
            prompts_PT,
            new_tokens,
            sampling,
            repeats,
            seed,
            draft,
            nodes,
            plain=timings["plain", shared[name]],
            speculative=timings["speculative", name],
            generate=timings.get(("generate", shared[name])),
            trunk=timings.get(("plain", REFERENCE)),
            rank_one=timings["speculative", base[name]] if name in base else None,
        )
    return modes


def _mode(
    model: LanguageModel,
    prompts_PT: Tensor,
    new_tokens: int,
    sampling: Sampling,
    repeats: int,
    seed: int,
    draft: str,
    nodes: int,
    *,
    plain: Timing,
    speculative: Timing,
    generate: Timing | None,
    trunk: Timing | None,
    rank_one: Timing | None,
) -> dict[str, Any]:
    statistics = acceptance(speculative.decoded, model.horizon, seed)
    speedup = rate_ratio(speculative, plain, seed)
    one, window = forward_milliseconds(model, prompts_PT, new_tokens)
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "prompts": len(prompts_PT),
        "new_tokens": new_tokens,
        "repeats": repeats,
        **statistics,
        "tokens_per_second": {
            "plain": float(np.median(plain.rates())),
            "speculative": float(np.median(speculative.rates())),
            "generate": float(np.median(generate.rates())) if generate is not None else None,
        },
        "speedup": speedup,
        "speedup_over_rank1": rate_ratio(speculative, rank_one, seed) if rank_one is not None else None,
        "speedup_over_trunk": rate_ratio(speculative, trunk, seed) if trunk is not None else None,
        "plain_over_generate": rate_ratio(plain, generate, seed) if generate is not None else None,
        "other_than_generate": _differing(speculative, generate) if generate is not None and sampling.greedy else None,
        "conversion": speedup["median"] / statistics["tokens_per_pass"]["mean"],
        "conversion_limit": one / window,
        "t1_ms": one,
        "tn_ms": window,
        "seconds_by_part": seconds_by_part(model, prompts_PT[:SPLIT_PROMPTS], new_tokens, sampling, seed, draft, nodes),
        "repeat_seconds": {
            "plain": [sum(repeat) for repeat in plain.seconds],
            "speculative": [sum(repeat) for repeat in speculative.seconds],
        },
    }


def _differing(ours: Timing, theirs: Timing) -> dict[str, Any]:
    """How many prompts' greedy text is not generate's, and the first token where one is not (null for none).

    In exact arithmetic none: passes of several tokens round otherwise than passes of one, which turns near-ties.
    """
    first = [
        next((place for place, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), None)
        for mine, other in zip(ours.texts, theirs.texts, strict=True)
    ]
    indices = [place for place in first if place is not None]
    return {"prompts": len(indices), "of": len(first), "first_token": min(indices, default=None)}


def seconds_by_part(
    model: LanguageModel,
    prompts_PT: Tensor,
    new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    draft: str = "chain",
    nodes: int = 8,
) -> dict[str, float]:
    """Seconds of one repeat over all prompts, by part. Timers synchronise, so that the sum may exceed an untimed run.

    trunk: hidden states. verify: the target's law (output layer; eq. 11 where that is the target) and the acceptance test. On
    CUDA these are the parts of passes launched kernel by kernel, not of captured ones.
    """
    total = dict.fromkeys(PARTS, 0.0)
    for index, prompt_T in enumerate(prompts_PT):
        clock = Clock(prompt_T.device)
        generator = _generator(prompt_T, seed, index, 0)
        options = Options(nodes=nodes, timer=clock)
        decode(model, prompt_T, new_tokens, sampling, generator, draft=draft, options=options)
        for part, seconds in clock.seconds.items():
            total[part] += seconds
    return total


@torch.inference_mode()
def forward_milliseconds(
    model: LanguageModel, prompts_PT: Tensor, new_tokens: int, times: int = 30
) -> tuple[float, float]:
    """Median ms of the target (trunk through the cache, and output law) for 1 token and for `horizon` tokens.

    Behind a text of half the new tokens, in five turns of calls in a row, as decoding makes them, each after two that are not
    counted; the rollback of the cache is not timed. On CUDA both are recorded graphs, as they are in decoding.
    """
    device, horizon = prompts_PT.device, model.horizon
    row_T = prompts_PT.flatten()
    length = min(prompts_PT.shape[1] + new_tokens // 2, model.context - horizon)
    text_T = row_T.repeat(-(-(length + horizon) // len(row_T)))[: length + horizon]
    calls = target_calls(model, text_T[None, :length], text_T[None, length:], (1, horizon))
    clock = Clock(device)
    taken: dict[int, list[float]] = {1: [], horizon: []}
    for _ in range(5):
        for count, seconds in taken.items():
            for call in range(max(1, times // 5) + 2):
                start = clock.now()
                rollback = calls[count]()
                if call > 1:
                    seconds.append(clock.now() - start)
                rollback()
    one, window = (float(np.median(taken[count])) * 1e3 for count in (1, horizon))
    return one, window


@torch.inference_mode()
def target_calls(
    model: LanguageModel, text_BT: Tensor, window_BS: Tensor, sizes: Sequence[int]
) -> dict[int, Callable[[], Callable[[], None]]]:
    """Per size: the target's law behind `text_BT` for so many tokens of window_BS; each call returns what undoes it."""
    if text_BT.device.type == "cuda":
        slots = text_BT.shape[1] + window_BS.shape[1]
        forwards = CapturedForwards(model, len(text_BT), Sampling(0.0), draft="none", slots=slots)
        forwards.first(list(text_BT))

        def replayed(size: int) -> Callable[[], Callable[[], None]]:
            part_BS = window_BS[:, :size].contiguous()

            def target() -> None:
                model.target_log_probs(forwards.run(part_BS, nothing(part_BS)))

            replay = record(target, text_BT.device)

            def call() -> Callable[[], None]:
                replay()
                return lambda: None  # a window does not count unless it is said to

            return call

        return {size: replayed(size) for size in sizes}
    cache = model.new_cache()
    model.hidden(text_BT, cache=cache)

    def run(size: int) -> Callable[[], None]:
        model.target_log_probs(model.hidden(window_BS[:, :size], cache=cache))
        return lambda: cache.crop(-size)

    return {size: partial(run, size) for size in sizes}


def interleaved(
    contenders: Mapping[tuple[str, str], Callable[[Tensor, int], Decoded | list[int]]],
    models: Mapping[str, LanguageModel],
    prompts_PT: Tensor,
    repeats: int,
    warmups: int,
    seed: int,
    say: Callable[[str], None],
) -> dict[tuple[str, str], Timing]:
    """Timing of each contender, (kind, name), run prompt by prompt with the others; models[name] is whose passes are counted."""
    for warmup in range(warmups):
        say(f"warm-up {warmup + 1}/{warmups}")
        for contender in contenders.values():
            contender(prompts_PT[0], seed)
    timings = {key: Timing([], [], [[] for _ in prompts_PT]) for key in contenders}
    clock = Clock(prompts_PT.device)
    order = list(contenders)
    for repeat in range(repeats):
        say(f"repeat {repeat + 1}/{repeats}")
        for timing in timings.values():
            timing.seconds.append([])
            timing.tokens.append([])
        for index, prompt_T in enumerate(prompts_PT):
            turn = (repeat + index) % len(order)
            for key in order[turn:] + order[:turn]:
                with count_forwards(models[key[1]]) as forwards:
                    start = clock.now()
                    result = contenders[key](prompt_T, run_seed(seed, index, repeat))
                    timings[key].seconds[repeat].append(clock.now() - start)
                if isinstance(result, Decoded):
                    contender = contenders[key]
                    seen = contender.forwards(forwards.count) if isinstance(contender, Ours) else forwards.count
                    assert seen == result.forwards, f"{key}: there were {seen} passes, the loop says {result.forwards}"
                    timings[key].decoded[index].append(result)
                ids = result.tokens if isinstance(result, Decoded) else result
                timings[key].tokens[repeat].append(len(ids))
                if repeat == 0:
                    timings[key].texts.append(ids)
    return timings


def _shared_plain(models: Mapping[str, LanguageModel]) -> dict[str, str]:
    """Cell -> the cell whose plain decoder stands for it: the first with the very same target and weights."""
    shared: dict[str, str] = {}
    for name, model in models.items():
        same = (first for first in shared.values() if _same_target(models[first], model))
        shared[name] = next(same, name)
    return shared


def _same_target(one: LanguageModel, other: LanguageModel) -> bool:
    if not (one.frozen_target and other.frozen_target):
        return one is other
    weights, others = ([*model.trunk.body.state_dict().values(), model.unembedding.weight] for model in (one, other))
    return len(weights) == len(others) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(weights, others, strict=True)
    )


class Ours:
    """Our decoding as a contender, one prompt at a time; on CUDA with captured passes, made at the first prompt."""

    def __init__(self, model: LanguageModel, new_tokens: int, sampling: Sampling, draft: str, nodes: int = 8) -> None:
        self.model, self.new_tokens, self.sampling, self.draft, self.nodes = model, new_tokens, sampling, draft, nodes
        self.captures = Captures(model)
        self.captured: CapturedForwards | None = None

    def __call__(self, prompt_T: Tensor, seed: int) -> Decoded:
        longest = len(prompt_T) + self.new_tokens
        self.captured = self.captures(1, longest, self.sampling, self.draft, self.nodes)
        generator = torch.Generator(prompt_T.device).manual_seed(seed)
        return decode(
            self.model,
            prompt_T,
            self.new_tokens,
            self.sampling,
            generator,
            draft=self.draft,
            options=Options(nodes=self.nodes, forwards=self.captured),
        )

    def forwards(self, hooked: int) -> int:
        """Passes of the last call, not counted by the loop: by the hook or, where they were replayed (one in vain), on the
        device."""
        return hooked if self.captured is None else self.captured.forwards_run - 1


def _theirs(generate: Generate, new_tokens: int, sampling: Sampling) -> Callable[[Tensor, int], list[int]]:
    return lambda prompt_T, seed: generate(prompt_T, new_tokens, sampling, seed)


def run_seed(seed: int, index: int, repeat: int) -> int:
    """Of one (prompt, repeat): the same for every contender."""
    return (seed * 1_000_003 + index) * 1009 + repeat


def _generator(prompt_T: Tensor, seed: int, index: int, repeat: int) -> torch.Generator:
    return torch.Generator(prompt_T.device).manual_seed(run_seed(seed, index, repeat))


def rate_ratio(top: Timing, bottom: Timing, seed: int) -> dict[str, float]:
    """{"median", "low", "high"}: median over repeats of the tokens/s ratio, and the 95 % bootstrap interval of total tokens
    over total time, prompts and repeats resampled (the same ones for both contenders)."""
    random = np.random.default_rng(seed)
    repeats, prompts = np.shape(top.seconds)
    times_SK = random.multinomial(repeats, np.full(repeats, 1 / repeats), RESAMPLES)
    times_SP = random.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES)

    def rates_S(timing: Timing) -> np.ndarray[Any, np.dtype[np.float64]]:
        tokens_S, seconds_S = (
            np.einsum("sk,kp,sp->s", times_SK, np.asarray(each, dtype=np.float64), times_SP)
            for each in (timing.tokens, timing.seconds)
        )
        return np.asarray(tokens_S / seconds_S)

    low, high = np.percentile(rates_S(top) / rates_S(bottom), [2.5, 97.5])
    return {"median": float(np.median(top.rates() / bottom.rates())), "low": float(low), "high": float(high)}
