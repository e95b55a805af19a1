"""Made-up records for the report's tests: the shape of real ones, values from simple laws, no measurement."""

import copy
import math
from typing import Any

import numpy as np

from cpdlm.config import Config, resolve
from experiments.records import MODES, build

ORIGIN = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "started": "2026-01-01T00:00:00+00:00",
    "hardware": {
        "machine": "Linux x86_64",
        "processor": "Made-up CPU",
        "cores": 2,
        "threads": 2,
        "memory_gib": 8.0,
        "accelerator": "none",
    },
    "versions": {"python": "3.11.9", "torch": "2.13.0"},
}


def made(
    rank: int = 1,
    seed: int = 0,
    *,
    claim: str = "C1",
    slope: float = 0.05,
    first: float = 0.0,
    pace: float = 0.06,
    speed: float = 1.0,
    noise: float = 0.002,
    gain: float = 0.0,
    origin: dict[str, Any] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """A record. slope: nats that the joint NLL falls per doubling of the rank; first: nats that the first-token NLL
    rises; pace: tokens per forward gained per doubling; speed: factor on the speed-up; noise: between seeds; gain: nats
    off the joint NLL.
    overrides: settings, with "." written as "__"."""
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    origin = copy.deepcopy(origin or ORIGIN)
    config = resolve({"rank": rank, "seed": seed, "model.draft_width": 0.5} | settings)
    octave, bonus = math.log2(rank), 0.25 if config.link == "first" else 0.1 if config.model.tie_first else 0.0
    rows = np.random.default_rng(7)  # the same rows for every cell
    own = np.random.default_rng([seed, rank, config.link == "first", config.corpus == "text"])
    wobble = noise * own.standard_normal()
    positions = rows.integers(180, 250, 60)

    def centred(values: Any) -> Any:
        return values - np.average(values, weights=positions)

    difficulty = centred(rows.normal(0, 0.15, 60))
    first_nll = 1.35 + (0.2 if config.corpus == "text" else 0) + first * octave + wobble
    terms = [first_nll] + [
        1.35 + 0.45 * k**0.7 - bonus * 0.5 - slope * octave * k / 6 + wobble for k in range(1, config.horizon)
    ]
    terms[-1] -= gain
    joint = sum(terms)
    likelihood = {
        "split": "test",
        "rows": 60,
        "positions": int(positions.sum()),
        "joint_nll": {"mean": joint, "sem": 0.05},
        "position_nll": [{"mean": term, "sem": 0.004 * (k + 1)} for k, term in enumerate(terms)],
        "first_token_nll": {"mean": first_nll, "sem": 0.02},
        "bits_per_byte": first_nll / math.log(2),
        "kept_by_depth": [],
        "per_source": {
            "package": {"joint_nll": joint, "bits_per_byte": first_nll / math.log(2), "positions": int(positions.sum())}
        },
        "per_row": {
            "positions": positions.tolist(),
            "joint_nll": (
                (joint + config.horizon * difficulty + centred(own.normal(0, noise, 60))) * positions
            ).tolist(),
            "first_token_nll": ((first_nll + difficulty + centred(own.normal(0, noise, 60))) * positions).tolist(),
            "position_nll": [((term + difficulty) * positions).tolist() for term in terms],
            "target_nll": ((first_nll + difficulty) * positions).tolist(),
            "bytes": positions.tolist(),
        },
        "weights": {
            "entropy_mean": 0.8 * math.log(rank),
            "effective": 0.9 * rank,
            "dead": 0,
            "mean": [1 / rank] * rank,
        },
    }
    decoding = None
    if config.horizon > 1:
        modes = {mode: _mode(config, mode, octave, pace, speed, bonus, rows, own) for mode in MODES}
        decoding = {"group": ["all at once"], "rank_one": None, "origin": origin, "modes": modes}
    heads, trunk = 128 * 128 * config.horizon * rank, 100_000 if config.size == "micro" else 800_000
    return build(
        config,
        claim=claim,
        profile="test",
        command=f"python experiments/run.py rank={rank} seed={seed}",
        data={
            "corpus": config.corpus,
            "sha256": "ab" * 32,
            "tokenizer": "bytes",
            "vocab_size": 257,
            "splits": {
                "train": {"documents": 10, "bytes": 1000, "tokens": 1010},
                "test": {"documents": 5, "bytes": 500, "tokens": 505},
            },
        },
        seconds={"data": 1.0, "train": 60.0, "evaluate": 5.0, "decode": 20.0},
        parameters={
            "trunk": trunk,
            "unembedding": 0,
            "heads": heads,
            "gate": 129 * rank,
            "anchor": 20_000 * (config.link == "first"),
            "total": trunk + heads + 129 * rank + 20_000 * (config.link == "first"),
            "trained": heads,
        },
        training=_training(config, octave, wobble),
        likelihood=likelihood,
        decoding=decoding,
        origin=origin,
    )


def _training(config: Config, octave: float, wobble: float) -> dict[str, Any]:
    """FLOPs rise by a quarter per doubling of the rank, step time by a half."""
    rank, step_ms = config.rank, 110.0 * 1.5**octave * (1 + 10 * wobble)
    steps = (100, 200, 400)
    seconds, flops = config.optim.steps * step_ms / 1000, 1e7 * 1.25**octave
    curve = [
        {
            "step": step,
            "train/nll": 9 - step / 100,
            "validation/joint_nll": 9.5 - step / 100 - 0.1 * octave + wobble,
            "validation/greedy_tokens_per_pass": 1.5 + step / 1000,
            "validation/sampling_tokens_per_pass": 1.4 + step / 1000 + 0.1 * octave,
        }
        | (
            {"train/effective_components": 0.9 * rank} | {f"train/weight_{a}": 1 / rank for a in range(1, rank + 1)}
            if rank > 1
            else {}
        )
        for step in steps
    ]
    rate = 819_200 / seconds
    return {
        "steps": config.optim.steps,
        "tokens": 819_200,
        "seconds": seconds,
        "tokens_per_second": rate,
        "step_ms_median": step_ms,
        "peak_memory_bytes": 600_000_000,
        "resumed": 0,
        "curve": curve,
        "clock": [step * step_ms / 1000 for step in steps],
        "flops_per_token": flops,
        "matmul_flops_per_second": 5e11,
        "matmul_fraction": flops * rate / 5e11,
    }


def _mode(
    config: Config, mode: str, octave: float, pace: float, speed: float, bonus: float, rows: Any, own: Any
) -> dict[str, Any]:
    greedy = mode == "greedy"
    rate = min(
        config.horizon,
        1.7 + 0.08 * config.horizon + pace * octave * (0.4 if greedy else 1) + bonus + 0.01 * own.standard_normal(),
    )
    forwards = np.round(480 / rate * np.exp(rows.normal(0, 0.08, 16)))
    tokens, limit = np.full(16, 480.0), 0.85
    gain = speed * rate * limit * 0.9 * (1 - 0.02 * octave)
    plain, share = 100.0, {"prefill": 0.03, "draft": 0.12 + 0.05 * octave, "trunk": 0.5, "verify": 0.15, "other": 0.08}
    reached, depths = int(forwards.sum()), []
    by_prompt: dict[str, list[list[int]]] = {"reached": [], "accepted": []}
    for depth in range(2, config.horizon + 1):
        accepted = int(reached * (0.62 - 0.05 * depth + 0.03 * octave * (depth > 2) + bonus / 2))
        depths.append({"depth": depth, "reached": reached, "accepted": accepted})
        for name, count in (("reached", reached), ("accepted", accepted)):
            by_prompt[name].append([count // 16 + (index < count % 16) for index in range(16)])
        reached = accepted
    return {
        "temperature": 0.0 if greedy else 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "prompts": 16,
        "new_tokens": 96,
        "repeats": 5,
        "tokens": int(tokens.sum()),
        "passes": int(forwards.sum()),
        "tokens_per_pass": {"mean": rate, "low": rate - 0.05, "high": rate + 0.05},
        "emitted_histogram": [int(forwards.sum()), *[0] * (config.horizon - 1)],
        "acceptance_by_depth": depths,
        "per_prompt": {"tokens": tokens.tolist(), "passes": forwards.tolist()},
        "drafts_per_prompt": by_prompt,
        "tokens_per_second": {
            "plain": plain,
            "speculative": plain * gain,
            "generate": 95.0 if config.model.trunk else None,
        },
        "speedup": {"median": gain, "low": gain * 0.98, "high": gain * 1.02},
        "speedup_over_rank1": None
        if config.rank == 1 and not bonus
        else {
            "median": speed * (1 + 0.02 * octave + bonus / 2),
            "low": speed * (1 + 0.02 * octave + bonus / 2) * 0.99,
            "high": speed * (1 + 0.02 * octave + bonus / 2) * 1.01,
        },
        "speedup_over_trunk": None
        if config.model.trunk
        else {"median": gain * 0.9, "low": gain * 0.88, "high": gain * 0.92},
        "plain_over_generate": {"median": 1.05, "low": 1.0, "high": 1.1} if config.model.trunk else None,
        "other_than_generate": None,
        "conversion": gain / rate,
        "conversion_limit": limit,
        "t1_ms": 8.5,
        "tn_ms": 10.0,
        "seconds_by_part": {part: 10 * value for part, value in share.items()},
        "repeat_seconds": {"plain": [15.0] * 5, "speculative": [15.0 / gain] * 5},
    }


def suite(seeds: int = 3, ranks: tuple[int, ...] = (1, 2, 4, 8), **distributions: Any) -> list[dict[str, Any]]:
    """Records shaped like a full sweep: from scratch, heads on a common trunk on two corpora, beyond, trunks."""
    common = {"model__trunk": "runs/code-small-own-r1-n1-none-s0", "size": "small", "claim": "C3"} | distributions
    text = common | {"model__trunk": "runs/text-small-own-r1-n1-none-s0", "corpus": "text"}
    made_of = [
        made(1, horizon=1, preset="trunk", claim="trunks"),
        made(1, horizon=1, size="small", claim="trunks"),
        made(1, horizon=1, size="small", corpus="text", claim="trunks"),
    ]
    for seed in range(seeds):
        for rank in ranks:
            made_of += [
                made(rank, seed, **distributions),
                made(rank, seed, **common),
                made(rank, seed, **text),
                made(rank, seed, **common | {"link": "first", "claim": "beyond"}),
            ]
    made_of += [made(rank, 0, **common | {"model__tie_first": True, "claim": "beyond"}) for rank in ranks]
    made_of += [made(4, 0, horizon=horizon, **common | {"claim": "horizon"}) for horizon in (2, 8)]
    return made_of


def wider(seeds: int = 2) -> list[dict[str, Any]]:
    """What figures show beside `suite`: another trunk size, ways of balancing the components, a pretrained model."""
    pretrained = {"model__trunk": "smollm2", "model__family": "pretrained", "data__tokenizer": "model", "claim": "C6"}
    return [made(r, corpus=corpus, link="first", **pretrained) for r in (1, 4) for corpus in ("code", "text")] + [
        record
        for seed in range(seeds)
        for record in (
            *(made(rank, seed, size="micro", claim="C7") for rank in (1, 4)),
            *(
                made(4, seed, balance=way, name=f"{way}-s{seed}", claim="C5", slope=0.06)
                for way in ("none", "kl", "bias")
            ),
        )
    ]
