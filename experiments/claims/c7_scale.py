"""C7: the gain of the rank holds across model sizes and training lengths.

Cells: heads of ranks 1 and 4 on frozen trunks of four sizes, on code, text and another vocabulary, with a quarter of
the training and with four times as much. The README shows the range of the gains.
"""

from collections.abc import Sequence

from experiments import star
from experiments.claims.verdict import CONTRADICTED, HOLDS, NOT_RUN, Claim, Finding, Number, Verdict, cited, trained
from experiments.families import Cells, Family, along
from experiments.records import counted
from experiments.stats import difference, over_seeds, together

SIZES_NEEDED, LENGTHS_NEEDED = 4, 3

CLAIM = Claim(
    id="C7",
    question="Does rank add accepted tokens at all model sizes and training lengths?",
    expected="more tokens per target forward with rank at every size and training length",
    statistic="tokens per target forward when sampling, rank 4 minus rank 1, for every trunk size, training length, "
    "corpus and vocabulary; each on one frozen target, paired over seeds and prompts",
    rule=f"at least {SIZES_NEEDED} sizes and {LENGTHS_NEEDED} training lengths; holds: every 95% interval is above 0 "
    "and not inside ±0.02 (all must be, so that none is corrected for their number); no difference: every interval is "
    "inside ±0.02; contradicted: some interval is below 0 or inside ±0.02",
    quantity="tokens_per_pass",
    unit="tokens per forward",
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
    return CLAIM.complete([_row(group) for group in along(both, *_TRUNKS)], missing, ours)


def _row(group: list[Family]) -> Verdict:
    cells = [(family, family.cells["untied", CLAIM.top], family.cells["untied", 1]) for family in group]
    found = [difference(top, one, CLAIM.quantity) for _, top, one in cells]
    seeds = min(gap.seeds if gap is not None else 0 for gap in found)
    return _everywhere(group, seeds).of(
        CLAIM,
        f"n={group[0].horizon}, frozen targets, {counted(len(group), 'setting')}, {counted(seeds, 'seed')}",
        beside=[number for family, top, one in cells for number in _gains(family, top, one)],
        seeds=seeds,
        **cited(record for _, top, one in cells for each in (one, top) for _, record in sorted(each.items())),
    )


def _everywhere(group: list[Family], seeds: int) -> Finding:
    found = {
        _setting(family): difference(family.cells["untied", CLAIM.top], family.cells["untied", 1], CLAIM.quantity)
        for family in group
    }
    gaps = together({name: gap for name, gap in found.items() if gap is not None})
    numbers = [CLAIM.number(f"{name}, rank {CLAIM.top} - rank 1:", gap, sign=True) for name, gap in gaps.items()]
    trunks, steps = ({family.settings[key] for family in group} for key in ("size", "optim.steps"))
    flat = [name for name, gap in gaps.items() if CLAIM.is_nothing(gap)]
    down = [name for name, gap in gaps.items() if gap.high < 0 and name not in flat]
    if len(trunks) < SIZES_NEEDED or len(steps) < LENGTHS_NEEDED:
        there = f"{counted(len(trunks), 'trunk size')} and {counted(len(steps), 'training length')}"
        return Finding(NOT_RUN, f"{there}, the rule needs {SIZES_NEEDED} and {LENGTHS_NEEDED}", numbers)
    if few := CLAIM.too_few(seeds, gaps.values(), numbers):
        return few
    if flat and len(flat) == len(group):
        return CLAIM.no_difference(numbers)
    if down or flat:
        return Finding(CONTRADICTED, f"no gain for {'; '.join(down + flat)}", numbers)
    if len(gaps) < len(group):
        return Finding(NOT_RUN, f"no shared seed in {counted(len(group) - len(gaps), 'setting')}", numbers)
    undecided = [gap for gap in gaps.values() if gap.low <= 0]
    if not undecided:
        return Finding(HOLDS, "", numbers)
    why = f"{len(undecided)} of {len(gaps)} intervals include 0 and reach beyond the margin"
    return CLAIM.underpowered(undecided, why, numbers)


def _setting(family: Family) -> str:
    s = family.settings
    words = [str(s["corpus"]), family.size, f"{s['optim.steps']} steps"]
    return " ".join(words + ([str(s["data.tokenizer"])] if s["data.tokenizer"] != "bytes" else []))


def _gains(family: Family, top: Cells, one: Cells) -> list[Number]:
    """Joint NLL and speed beside the tokens per forward; per byte as well, since vocabularies differ in what a token
    is."""
    found = []
    for quantity, unit in (("joint_nll", "nats"), ("joint_bits_per_byte", "bits per byte of the joint")):
        gap = difference(top, one, quantity)
        if gap is not None:
            found.append(Number(f"{_setting(family)}, rank {CLAIM.top} - rank 1:", gap, 3, unit, sign=True))
    for rank, cells in ((1, one), (CLAIM.top, top)):
        span, speed = over_seeds(cells, "bytes_per_pass"), over_seeds(cells, "speedup")
        if span is not None:
            found.append(Number(f"{_setting(family)}, rank {rank}:", span, CLAIM.digits, "bytes per forward"))
        if speed is not None:
            found.append(Number(f"{_setting(family)}, rank {rank} over autoregressive:", speed, 2, "x"))
    return found


def shown(verdict: Verdict) -> tuple[str, str]:
    if not verdict.numbers:
        return verdict.plain, "-"
    gains = [number.interval for number in verdict.numbers]
    low, high = min(gap.mean for gap in gains), max(gap.mean for gap in gains)
    above = f"above 0 in {sum(gap.low > 0 for gap in gains)} of {len(gains)}"
    return verdict.plain, f"{low:+.2f} to {high:+.2f} at rank {CLAIM.top}; {above}"
