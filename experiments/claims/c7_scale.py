"""C7: the gain of the rank holds across model sizes and training lengths."""

from __future__ import annotations

from collections.abc import Sequence

from experiments import star
from experiments.claims.verdict import (
    FAILS,
    HOLDS,
    NOT_MEASURED,
    UNMEASURED,
    Claim,
    Finding,
    Number,
    Verdict,
    complete,
    is_nothing,
    too_few,
    trained,
)
from experiments.families import Cells, Family, along
from experiments.records import counted
from experiments.stats import Interval, difference, over_seeds, shared_seeds

SIZES_NEEDED, LENGTHS_NEEDED = 4, 3

CLAIM = Claim(
    id="C7",
    question="Does it hold across model sizes and training lengths?",
    expected="more tokens per pass with rank at every size and training length",
    statistic="tokens per pass when sampling, rank 4 minus rank 1, for every trunk size, training length, corpus and vocabulary; "
    "each on its own common target, paired over seeds and prompts",
    rule=f"at least {SIZES_NEEDED} sizes and {LENGTHS_NEEDED} training lengths; holds: every interval (95%, corrected for their "
    "number) above 0 and not inside +-0.02; fails: some interval below 0 or inside +-0.02",
    quantity="tokens_per_pass",
    unit="tokens per pass",
    target="common",
    figure="by_size",
    arms=(star.ranks, star.corpora, star.sizes, star.lengths, star.vocabularies),
    wanted=1,
    margin=0.02,
    top=4,
    seeds=3,
)
# What its families may differ in, with what follows from it (prefixes of settings).
_TRUNKS = ("size", "corpus", "optim.steps", "optim.warmup", "trunk", "data.sha256", "data.vocab_size", "data.tokenizer")


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per set of families that differ in trunk, training and text only."""
    ours = [family for family in trained(families) if family.target == CLAIM.target]
    both = [family for family in ours if {1, CLAIM.top} <= set(family.ranks())]
    missing = f"no records of ranks 1 and {CLAIM.top} that differ in size, training length or text"
    return complete(CLAIM, [_row(group) for group in along(both, *_TRUNKS)], missing, ours)


def _row(group: list[Family]) -> Verdict:
    cells = [(family, family.cells["untied", CLAIM.top], family.cells["untied", 1]) for family in group]
    seeds = min(len(shared_seeds(top, one)) for _, top, one in cells)
    found = _everywhere(group, seeds)
    return Verdict(
        CLAIM,
        f"n={group[0].horizon}, common targets, {counted(len(group), 'setting')}, {counted(seeds, 'seed')}",
        found.word,
        found.reason,
        found.numbers,
        [number for family, top, one in cells for number in _gains(family, top, one)],
        [record.path for _, top, one in cells for each in (one, top) for _, record in sorted(each.items())],
        seeds,
    )


def _everywhere(group: list[Family], seeds: int) -> Finding:
    level = 1 - 0.05 / len(group)
    gaps: dict[str, Interval] = {}
    for family in group:
        gap = difference(family.cells["untied", CLAIM.top], family.cells["untied", 1], CLAIM.quantity, level=level)
        if gap is not None:
            gaps[_setting(family)] = gap
    numbers = [
        Number(f"{name}, rank {CLAIM.top} - rank 1 ({100 * level:.1f}%):", gap, CLAIM.digits, CLAIM.unit, sign=True)
        for name, gap in gaps.items()
    ]
    sizes, lengths = ({family.settings[key] for family in group} for key in ("size", "optim.steps"))
    flat = [name for name, gap in gaps.items() if is_nothing(CLAIM, gap)]
    down = [name for name, gap in gaps.items() if gap.high < 0 and name not in flat]
    if len(sizes) < SIZES_NEEDED or len(lengths) < LENGTHS_NEEDED:
        there = f"{counted(len(sizes), 'trunk size')} and {counted(len(lengths), 'training length')}"
        return Finding(NOT_MEASURED, f"{there}, the rule needs {SIZES_NEEDED} and {LENGTHS_NEEDED}", numbers)
    if few := too_few(CLAIM, seeds):
        return Finding(UNMEASURED, few, numbers)
    if down or flat:
        return Finding(FAILS, f"no gain for {'; '.join(down + flat)}", numbers)
    if len(gaps) == len(group) and all(gap.low > 0 for gap in gaps.values()):
        return Finding(HOLDS, "", numbers)
    why = "undecided: some interval includes 0 and is too wide to say that there is no gain"
    return Finding(UNMEASURED, why, numbers)


def _setting(family: Family) -> str:
    s = family.settings
    words = [str(s["corpus"]), family.size, f"{s['optim.steps']} steps"]
    return " ".join(words + ([str(s["data.tokenizer"])] if s["data.tokenizer"] != "bytes" else []))


def _gains(family: Family, top: Cells, one: Cells) -> list[Number]:
    """Joint NLL and speed beside the tokens per pass; per byte as well, since vocabularies differ in what a token is."""
    found = []
    for quantity, unit in (("joint_nll", "nats"), ("joint_bits_per_byte", "bits per byte of the joint")):
        gap = difference(top, one, quantity)
        if gap is not None:
            found.append(Number(f"{_setting(family)}, rank {CLAIM.top} - rank 1:", gap, 3, unit, sign=True))
    for rank, cells in ((1, one), (CLAIM.top, top)):
        span, speed = over_seeds(cells, "bytes_per_pass"), over_seeds(cells, "speedup")
        if span is not None:
            found.append(Number(f"{_setting(family)}, rank {rank}:", span, CLAIM.digits, "bytes per pass"))
        if speed is not None:
            found.append(Number(f"{_setting(family)}, rank {rank} over plain:", speed, 2, "x"))
    return found
