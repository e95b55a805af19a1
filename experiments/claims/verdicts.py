"""The paper's claims C1 to C8 as data: question, expected outcome, statistic and rule, fixed before the runs (results/LOG.md dates each change).

A verdict is a function of the records alone. The word is `holds`, `fails`, `not measured here` (there are no cells, or they
need a GPU), or `not measurable here` (too few seeds, or an interval that decides nothing); the last two say why. Verdicts
are about the paper's own law (untied, anchor=none) on trunks of ours; anchored and tied cells stand in a table of their
own. C6 is about heads on a pretrained model, each variant by itself. C5 and C7 compare families that differ in the balance,
or in the trunk, its training and its text; C8 reads the timing cells alone.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from experiments.families import Cells, Family, along
from experiments.records import Record, counted, training_hardware
from experiments.stats import Interval, Sample, contrast, difference, estimate, over_seeds, shared_seeds

HOLDS, FAILS, UNMEASURED, NOT_MEASURED = "holds", "fails", "not measurable here", "not measured here"
# What the families of a claim may differ in, with what follows from it (prefixes of settings).
BALANCES = ("balance", "loss.balance_")
TRUNKS = ("size", "corpus", "optim.steps", "optim.warmup", "trunk", "data.sha256", "data.vocab_size", "data.tokenizer")
# Rank 1 trained for longer counts as equal wall-clock where it had the top rank's time, and at most this factor more.
EQUAL_TIME = 1.33
SIZES_NEEDED, LENGTHS_NEEDED = 4, 3


@dataclass(frozen=True)
class Claim:
    """question: what is asked. expected: what the paper says. statistic, rule: how it is answered, in words; `test`,
    `margin` and the rest are the same for the program. target: whose cells count. top: the rank held against rank 1.
    margin: in units of the statistic; a difference that surely lies inside it counts as none. seeds: fewer decide nothing; with one, intervals are over rows
    or prompts alone, and the setting says `1 seed`. gpu: the claim is about a size that needs a GPU, too."""

    id: str
    question: str
    expected: str
    statistic: str
    rule: str
    quantity: str
    unit: str
    target: str
    test: str
    margin: float
    digits: int = 3
    top: int = 8
    seeds: int = 1
    gpu: bool = False


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="C1",
        question="Does the joint negative log-likelihood fall as the rank rises?",
        expected="joint NLL falls as the rank rises, at equal steps",
        statistic="held-out joint NLL, rank 8 minus rank 1, from scratch; paired over seeds and test rows",
        rule="holds: 95% interval below 0, not inside +-0.01 nats, and no step from one rank to the next surely up; fails: 95% "
        "interval above 0 or inside +-0.01 nats, or a step surely up",
        quantity="joint_nll",
        unit="nats",
        target="own",
        test="falls",
        margin=0.01,
        gpu=True,
    ),
    Claim(
        id="C2",
        question="Is the first-token loss independent of the rank?",
        expected="first-token NLL does not depend on the rank",
        statistic="held-out first-token NLL (eq. 11), every rank minus rank 1, from scratch; paired over seeds and test rows",
        rule="equivalence test: holds: every interval (90%, corrected for the number of ranks) inside +-0.02 nats; fails: some interval "
        "wholly outside",
        quantity="first_token_nll",
        unit="nats",
        target="own",
        test="equal",
        margin=0.02,
        gpu=True,
    ),
    Claim(
        id="C3",
        question="Does draft acceptance rise with the rank?",
        expected="more tokens per trunk pass as the rank rises",
        statistic="tokens per pass when sampling, rank 8 minus rank 1, one common target; paired over seeds and prompts",
        rule="holds: 95% interval above 0, not inside +-0.02, and no step from one rank to the next surely down; fails: 95% interval "
        "below 0 or inside +-0.02, or a step surely down",
        quantity="tokens_per_pass",
        unit="tokens per pass",
        target="common",
        test="rises",
        margin=0.02,
        gpu=True,
    ),
    Claim(
        id="C4",
        question="Is decoding faster than autoregressive decoding and than rank 1?",
        expected="faster than plain decoding and than rank 1",
        statistic="speed-up when sampling, over plain decoding and over rank 1, measured side by side on one common target",
        rule="holds: for some rank above 1 both intervals above 1 (95%, corrected for the number of ranks); fails: for every "
        "rank above 1 some interval below 1",
        quantity="speedup",
        unit="x",
        target="common",
        test="faster",
        margin=0.0,
        digits=2,
        gpu=True,
    ),
    Claim(
        id="C5",
        question="Does a balance loss help?",
        expected="balancing the components lowers the joint NLL",
        statistic="held-out joint NLL at rank 8, each balance minus none; paired over seeds and test rows",
        rule="holds: for some balance the interval (95%, corrected for their number) is below 0 and not inside "
        "+-0.01 nats; fails: each interval is above 0 or inside +-0.01 nats",
        quantity="joint_nll",
        unit="nats",
        target="any",
        test="balance",
        margin=0.01,
        seeds=3,
    ),
    Claim(
        id="C6",
        question="Does it work when only heads on a frozen, pretrained model are trained?",
        expected="heads alone make a pretrained model decode faster",
        statistic="speed-up when sampling, over plain decoding of the pretrained model, measured side by side; over rank 1 beside it",
        rule="holds: for some rank the interval over plain decoding is above 1 (95%, corrected for the number of ranks); fails: for "
        "every rank it is below 1",
        quantity="speedup",
        unit="x",
        target="pretrained",
        test="works",
        margin=0.0,
        digits=2,
    ),
    Claim(
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
        test="everywhere",
        margin=0.02,
        top=4,
        seeds=3,
    ),
    Claim(
        id="C8",
        question="Is the overhead low, in training and in sampling?",
        expected="little more time per training step and per pass",
        statistic="rank 8 over plain, when sampling: time of a training step over that of the next-token model, each alone on the "
        "machine; time of a pass with its draft over that of a plain pass, side by side",
        rule="holds: both 95% intervals below 1.25; fails: one of them above 1.25",
        quantity="overhead",
        unit="x",
        target="timing",
        test="overhead",
        margin=0.25,
        digits=2,
        seeds=3,
        gpu=True,
    ),
)


@dataclass(frozen=True)
class Number:
    """One measured number of a verdict, with its interval."""

    name: str
    interval: Interval
    digits: int
    unit: str
    sign: bool = False

    def text(self) -> str:
        return f"{self.name} {self.interval.text(self.digits, self.sign)} {self.unit}"


@dataclass(frozen=True)
class Verdict:
    """claim, setting (what its records share), word, reason. numbers decide; beside are reported next to them. expected: what the
    paper says of it, where that is not what it says of the claim."""

    claim: Claim
    setting: str
    word: str
    reason: str
    numbers: list[Number] = field(default_factory=list)
    beside: list[Number] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    seeds: int = 0
    expected: str = ""

    @property
    def verdict(self) -> str:
        return f"{self.word}: {self.reason}" if self.reason else self.word

    def measured(self) -> str:
        return "; ".join(number.text() for number in self.numbers) or "nothing"


def judge(families: list[Family]) -> list[Verdict]:
    """Verdicts in the order of CLAIMS, one per setting that can be judged (one saying so where there is none)."""
    ours = [family for family in families if not family.is_pretrained]
    trained = [family for family in ours if not family.is_timing]
    found = []
    for claim in CLAIMS:
        if claim.test == "works":
            usable = [family for family in families if family.is_pretrained and not _is_screen(family)]
            rows = [_judge_retrofit(claim, family, variant) for family in usable for variant in family.variants()]
        elif claim.test == "balance":
            rows = _judge_balance(claim, trained)
        elif claim.test == "everywhere":
            rows = _judge_everywhere(claim, [family for family in trained if family.target == "common"])
        elif claim.test == "overhead":
            rows = [_judge_overhead(claim, family) for family in ours if family.is_timing]
        else:
            usable = [family for family in trained if family.target == claim.target and len(family.ranks()) > 1]
            whole = [family for family in usable if {1, claim.top} <= set(family.ranks())]
            rows = [row for family in whole or usable for row in _judge_ranks(claim, family, trained)]
        missing = {
            "works": "no records of heads on a pretrained model",
            "balance": f"no records of rank {claim.top} with balance=none and with another",
            "everywhere": f"no records of ranks 1 and {claim.top} that differ in size, training length or text",
            "overhead": "no timing cells",
        }.get(claim.test, f"no records of two or more ranks with {claim.target} target and anchor=none")
        found += rows or [Verdict(claim, "-", NOT_MEASURED, missing)]
        about = [family for family in ours if family.is_timing] if claim.test == "overhead" else trained
        if claim.gpu and not any(_on_gpu(family) for family in about if claim.target in ("timing", family.target)):
            reason = f"no records of a GPU; python experiments/sweep.py claim={claim.id} profile=gpu"
            found.append(Verdict(claim, "one GPU", NOT_MEASURED, reason))
    return found


def _is_screen(family: Family) -> bool:
    """Cells of a short training each, by which the objective was chosen: they stand in the table of retrofits."""
    return all(record["claim"] == "C6-screen" for record in family.records())


def _on_gpu(family: Family) -> bool:
    return any(record["hardware"]["accelerator"] != "none" for record in family.records())


def _judge_ranks(claim: Claim, family: Family, families: list[Family]) -> list[Verdict]:
    rows = [_judge(claim, family, families)]
    if claim.test in ("falls", "rises"):
        rows += _judge_equal_time(claim, family, families)
    return rows


def _judge_equal_time(claim: Claim, family: Family, families: list[Family]) -> list[Verdict]:
    """The top rank against rank 1 trained for as long as the top rank took or a little longer, where there is a longer cell."""
    top = family.cells.get(("untied", claim.top), {})
    longer = [
        cells
        for other in families
        if other.settings["optim.steps"] > family.settings["optim.steps"]
        and along([family, other], "optim.steps", "optim.warmup")
        and shared_seeds(top, cells := other.cells.get(("untied", 1), {}))
    ]
    if not longer:
        return []
    row = Verdict(
        claim,
        f"{family.label}, equal wall-clock",
        UNMEASURED,
        "",
        expected=claim.expected.replace("at equal steps", "at equal wall-clock"),
    )
    longer = [
        cells for cells in longer if len({training_hardware(r) for r in _shared(cells, top) + _shared(top, cells)}) == 1
    ]
    if not longer:
        return [replace(row, reason="trained on different kinds of hardware, so that their times cannot be compared")]
    times = [(_training_seconds(cells, top) / _training_seconds(top, cells), cells) for cells in longer]
    times.sort(key=lambda each: each[0])
    equal = [each for each in times if 1 <= each[0] <= EQUAL_TIME]
    if not equal:
        found = ", ".join(f"{ratio:.2f}" for ratio, _ in times)
        reason = f"rank 1 was trained for {found} times rank {claim.top}'s time; between 1 and {EQUAL_TIME:g} counts as equal"
        return [replace(row, reason=reason)]
    ratio, rank_one = equal[0]
    seeds = len(shared_seeds(top, rank_one))
    paths = [record.path for record in _shared(rank_one, top) + _shared(top, rank_one)]
    row = replace(row, setting=f"{row.setting}, {counted(seeds, 'seed')}", records=paths, seeds=seeds)
    gap = difference(top, rank_one, claim.quantity)
    if gap is None:
        return [replace(row, reason=f"no seed with {claim.quantity} is shared")]
    name = f"rank {claim.top} - rank 1 trained for {ratio:.2f} times its time:"
    word, reason = _signed(claim, gap)
    # Rank 1 has seen more data by then, which the first token shows.
    beside = [
        Number(f"{what}:", other, 3, "nats", sign=True)
        for quantity, what in (("joint_nll", "joint"), ("first_token_nll", "first token alone"))
        if quantity != claim.quantity and (other := difference(top, rank_one, quantity)) is not None
    ]
    numbers = [Number(name, gap, claim.digits, claim.unit, sign=True)]
    return [replace(row, word=word, reason=reason, numbers=numbers, beside=beside)]


def _shared(cells: Cells, other: Cells) -> list[Record]:
    """Its records of the seeds that both have."""
    return [cells[seed] for seed in shared_seeds(cells, other)]


def _training_seconds(cells: Cells, other: Cells) -> float:
    """Mean over the shared seeds of steps times the median step: wall-clock without validation, checkpoints and pauses."""
    training = [record["training"] for record in _shared(cells, other)]
    return statistics.mean(each["steps"] * each["step_ms_median"] / 1000 for each in training)


def _signed(claim: Claim, gap: Interval) -> tuple[str, str]:
    """The word for one difference that should fall or rise."""
    wanted = -1 if claim.test == "falls" else 1
    if _is_nothing(claim, gap):
        return FAILS, f"no difference larger than {claim.margin:g} {claim.unit}"
    if _sign(gap) == wanted:
        return HOLDS, ""
    if _sign(gap) == -wanted:
        return FAILS, "the difference goes the other way"
    return UNMEASURED, "undecided: the interval includes 0 and is too wide to say that there is no difference"


def _is_nothing(claim: Claim, gap: Interval) -> bool:
    """Surely inside the margin: counts as no difference, whatever its sign."""
    return -claim.margin < gap.low and gap.high < claim.margin


def _too_few(claim: Claim, seeds: int) -> str:
    return f"{counted(seeds, 'shared seed')}, the rule needs {claim.seeds}" if seeds < claim.seeds else ""


def _judge_balance(claim: Claim, families: list[Family]) -> list[Verdict]:
    """One row per setting with a cell of the top rank without balance and one with."""
    rows = []
    for group in along((f for f in families if ("untied", claim.top) in f.cells), *BALANCES):
        without = next((family for family in group if family.settings["balance"] == "none"), None)
        if without is None:
            continue
        others = [family for family in group if family is not without]
        base = without.cells["untied", claim.top]
        level = 1 - 0.05 / len(others)
        gaps: dict[str, Interval] = {}
        shared = set(base)
        for family in others:
            gap = difference(family.cells["untied", claim.top], base, claim.quantity, level=level)
            shared &= set(shared_seeds(family.cells["untied", claim.top], base))
            if gap is not None:
                gaps[family.balance] = gap
        numbers = [
            Number(f"{name} - none ({100 * level:.1f}%):", gap, claim.digits, claim.unit, sign=True)
            for name, gap in gaps.items()
        ]
        surely_not = [gap.low > 0 or _is_nothing(claim, gap) for gap in gaps.values()]
        if few := _too_few(claim, len(shared) if gaps else 0):
            word, reason = UNMEASURED, few
        elif any(gap.high < 0 and not _is_nothing(claim, gap) for gap in gaps.values()):
            word, reason = HOLDS, ""
        elif all(surely_not):
            word, reason = FAILS, f"no balance lowers it by more than {claim.margin:g} {claim.unit}"
        else:
            word, reason = UNMEASURED, "undecided: no interval is below 0, and some reach beyond the margin"
        setting = f"{others[0].settings['corpus']}, {without.size}, n={without.horizon}, {without.target} target, rank {claim.top}"
        beside = [number for family in group for number in _component_use(family, claim.top)]
        records = [r.path for family in group for _, r in sorted(family.cells["untied", claim.top].items())]
        rows.append(
            Verdict(
                claim,
                f"{setting}, {counted(len(shared), 'seed')}",
                word,
                reason,
                numbers,
                beside,
                records,
                len(shared),
            )
        )
    return rows


def _component_use(family: Family, rank: int) -> list[Number]:
    """Effective components (exp of the entropy of the mean weights) and tokens per pass."""
    cells = family.cells["untied", rank]
    effective = estimate([Sample(mean=r["likelihood"]["weights"]["effective"]) for _, r in sorted(cells.items())])
    rate = over_seeds(cells, "tokens_per_pass")
    found = [Number(f"{family.balance}:", effective, 2, "effective components")]
    return found + ([Number(f"{family.balance}:", rate, 3, "tokens per pass")] if rate is not None else [])


def _judge_everywhere(claim: Claim, families: list[Family]) -> list[Verdict]:
    """One row per set of families that differ in trunk, training and text only."""
    rows = []
    both = [family for family in families if {1, claim.top} <= set(family.ranks())]
    for group in along(both, *TRUNKS):
        cells = [(family, family.cells["untied", claim.top], family.cells["untied", 1]) for family in group]
        level = 1 - 0.05 / len(group)
        gaps = {
            _setting(family): gap
            for family, top, one in cells
            if (gap := difference(top, one, claim.quantity, level=level)) is not None
        }
        numbers = [
            Number(f"{name}, rank {claim.top} - rank 1 ({100 * level:.1f}%):", gap, claim.digits, claim.unit, sign=True)
            for name, gap in gaps.items()
        ]
        sizes, lengths = ({family.settings[key] for family in group} for key in ("size", "optim.steps"))
        seeds = min(len(shared_seeds(top, one)) for _, top, one in cells)
        flat = [name for name, gap in gaps.items() if _is_nothing(claim, gap)]
        down = [name for name, gap in gaps.items() if gap.high < 0 and name not in flat]
        if len(sizes) < SIZES_NEEDED or len(lengths) < LENGTHS_NEEDED:
            word, reason = (
                NOT_MEASURED,
                (
                    f"{counted(len(sizes), 'trunk size')} and {counted(len(lengths), 'training length')}, the rule needs "
                    f"{SIZES_NEEDED} and {LENGTHS_NEEDED}"
                ),
            )
        elif few := _too_few(claim, seeds):
            word, reason = UNMEASURED, few
        elif down or flat:
            word, reason = FAILS, f"no gain for {'; '.join(down + flat)}"
        elif len(gaps) == len(group) and all(gap.low > 0 for gap in gaps.values()):
            word, reason = HOLDS, ""
        else:
            word, reason = (
                UNMEASURED,
                "undecided: some interval includes 0 and is too wide to say that there is no gain",
            )
        beside = [number for family, top, one in cells for number in _gains(claim, family, top, one)]
        records = [r.path for _, top, one in cells for each in (one, top) for _, r in sorted(each.items())]
        setting = f"n={group[0].horizon}, common targets, {counted(len(group), 'setting')}, {counted(seeds, 'seed')}"
        rows.append(Verdict(claim, setting, word, reason, numbers, beside, records, seeds))
    return rows


def _setting(family: Family) -> str:
    s = family.settings
    words = [str(s["corpus"]), family.size, f"{s['optim.steps']} steps"]
    return " ".join(words + ([str(s["data.tokenizer"])] if s["data.tokenizer"] != "bytes" else []))


def _gains(claim: Claim, family: Family, top: Cells, one: Cells) -> list[Number]:
    """Joint NLL and speed beside the tokens per pass; per byte as well, since vocabularies differ in what a token is."""
    found = []
    for quantity, unit in (("joint_nll", "nats"), ("joint_bits_per_byte", "bits per byte of the joint")):
        gap = difference(top, one, quantity)
        if gap is not None:
            found.append(Number(f"{_setting(family)}, rank {claim.top} - rank 1:", gap, 3, unit, sign=True))
    for rank, cells in ((1, one), (claim.top, top)):
        span, speed = over_seeds(cells, "bytes_per_pass"), over_seeds(cells, "speedup")
        if span is not None:
            found.append(Number(f"{_setting(family)}, rank {rank}:", span, claim.digits, "bytes per pass"))
        if speed is not None:
            found.append(Number(f"{_setting(family)}, rank {rank} over plain:", speed, 2, "x"))
    return found


def _judge_overhead(claim: Claim, family: Family) -> Verdict:
    """Training step of the top rank over that of a next-token model, and its pass over a plain one: with the same weights and law,
    whose one position a model of rank r has r laws for; beside it, over a next-token model's pass."""
    plain = {record.seed: record for record in family.reference}
    steps = {rank: _step_ratio(family.cells["untied", rank], plain) for rank in family.ranks()}
    forwards = {rank: _forward_ratio(family.cells["untied", rank], "speedup") for rank in family.ranks()}
    over_next = {rank: _forward_ratio(family.cells["untied", rank], "speedup_over_trunk") for rank in family.ranks()}
    step, drafting = steps.get(claim.top), forwards.get(claim.top)
    numbers = [
        Number(f"rank {claim.top}, {what}:", ratio, claim.digits, claim.unit)
        for what, ratio in (("training step over next-token", step), ("pass with draft over plain pass", drafting))
        if ratio is not None
    ]
    beside = [
        Number(f"rank {rank}, {what}:", ratio, claim.digits, claim.unit)
        for what, ratios in (("training step over next-token", steps), ("pass with draft over plain pass", forwards))
        for rank, ratio in ratios.items()
        if ratio is not None and rank != claim.top
    ]
    beside += [
        Number(f"rank {rank}, pass with draft over a next-token model's:", ratio, claim.digits, claim.unit)
        for rank, ratio in over_next.items()
        if ratio is not None
    ]
    limit, seeds = 1 + claim.margin, len(set(family.cells.get(("untied", claim.top), {})) & set(plain))
    if step is None or drafting is None:
        word, reason = NOT_MEASURED, f"no cell of rank {claim.top} beside a next-token model, timed alone and decoded"
    elif few := _too_few(claim, seeds):
        word, reason = UNMEASURED, few
    elif step.high < limit and drafting.high < limit:
        word, reason = HOLDS, ""
    elif step.low > limit or drafting.low > limit:
        which = [what for what, ratio in (("training", step), ("sampling", drafting)) if ratio.low > limit]
        word, reason = FAILS, f"{' and '.join(which)} take{'s' * (len(which) == 1)} more than {limit:g} times as long"
    else:
        word, reason = UNMEASURED, f"undecided: an interval crosses {limit:g}"
    hardware = "one GPU" if _on_gpu(family) else f"{family.records()[0]['hardware']['cores']} cores"
    return Verdict(
        claim,
        f"{family.label}, {hardware}, {counted(seeds, 'seed')}",
        word,
        reason,
        numbers,
        beside,
        [record.path for record in family.records("untied")],
        seeds,
    )


def _step_ratio(cells: Cells, plain: Cells) -> Interval | None:
    """Time of a training step over that of the next-token model of the same seed."""

    def step(record: Record) -> Sample:
        return Sample(mean=math.log(record["training"]["step_ms_median"]))

    pairs = [(step(cells[seed]), step(plain[seed])) for seed in sorted(set(cells) & set(plain))]
    return contrast(pairs).exp() if pairs else None


def _forward_ratio(cells: Cells, speedup: str) -> Interval | None:
    """Time of a speculative pass over that of a plain one: tokens per pass over `speedup`, with the speed-up's interval."""
    samples = []
    for _, record in sorted(cells.items()):
        mode = record.mode("sampling")
        if mode is not None and mode.get(speedup):
            speed = Sample.log_ratio(mode[speedup], mode["prompts"])
            samples.append(replace(speed, mean=math.log(mode["tokens_per_pass"]["mean"]) - speed.mean))
    return estimate(samples).exp() if samples else None


def _judge(claim: Claim, family: Family, families: list[Family]) -> Verdict:
    cells = {rank: family.cells["untied", rank] for rank in family.ranks()}
    tests: dict[str, Callable[[Claim, dict[int, Cells]], tuple[str, str, list[Number]]]] = {
        "falls": _trend,
        "rises": _trend,
        "equal": _equal,
        "faster": _faster,
    }
    missing = [rank for rank in (1, claim.top) if rank not in cells]
    reported = [over_seeds(cells[rank], claim.quantity) for rank in sorted(cells)]
    means = [
        Number(f"rank {rank}:", interval, claim.digits, claim.unit)
        for rank, interval in zip(sorted(cells), reported, strict=True)
        if interval is not None
    ]
    shared = [] if missing else shared_seeds(cells[1], cells[claim.top])
    if missing:
        word, numbers = NOT_MEASURED, list[Number]()
        reason = f"no cell of rank {' and '.join(map(str, missing))} (there is {', '.join(map(str, cells))})"
    else:
        word, reason, numbers = tests[claim.test](claim, cells)
        if few := _too_few(claim, len(shared)):
            word, reason = UNMEASURED, few
    return Verdict(
        claim,
        f"{family.label}, {counted(len(shared), 'seed')}",
        word,
        reason,
        numbers or means,
        _beside(claim, family, families, means if numbers else []),
        [record.path for record in family.records("untied")],
        len(shared),
    )


def _judge_retrofit(claim: Claim, family: Family, variant: str) -> Verdict:
    cells = {rank: family.cells[variant, rank] for rank in family.ranks(variant)}
    word, reason, numbers = _works(claim, cells)
    why, beside = _why(family.horizon, cells)
    for mode in ("sampling", "greedy"):
        for rank, by_seed in cells.items():
            for quantity, unit in (
                ("tokens_per_pass", "tokens per pass"),
                ("speedup", "x"),
                ("speedup_over_rank1", "x rank 1"),
            ):
                value = over_seeds(by_seed, quantity, mode)
                if value is not None:
                    beside.append(Number(f"{mode}, rank {rank}:", value, claim.digits, unit))
    counts = [len(by_seed) for by_seed in cells.values()]
    fewest, most = min(counts), max(counts)
    seeds = counted(most, "seed") if fewest == most else f"{fewest} to {most} seeds by rank"
    reason = "; ".join(part for part in (reason, *why) if part)
    return Verdict(
        claim,
        f"{family.label}, {variant}, {seeds}",
        word,
        reason,
        numbers,
        beside,
        [record.path for record in family.records(variant)],
        fewest,
    )


def _why(horizon: int, cells: dict[int, Cells]) -> tuple[list[str], list[Number]]:
    """What lies behind a speed-up: what a pass over the window costs, drafts kept by depth, and how many components make them;
    in words, and as numbers."""
    words, numbers = [], []
    timed = [mode for by_seed in cells.values() for record in by_seed.values() if (mode := record.mode("sampling"))]
    if timed:
        cost = statistics.median(1 / mode["conversion_limit"] for mode in timed)
        words.append(f"a pass over {horizon} tokens takes {cost:.2f} times as long as one over 1")
    for rank, by_seed in cells.items():
        found = {depth: over_seeds(by_seed, f"kept:{depth}") for depth in range(1, horizon + 1)}
        kept = {depth: share for depth, share in found.items() if share is not None}
        numbers += [Number(f"rank {rank}, depth {depth}:", share, 3, "kept") for depth, share in kept.items()]
        if kept and rank in (min(cells), max(cells)):
            shares = ", ".join(f"{share.mean:.2f}" for share in kept.values())
            words.append(f"rank {rank} keeps {shares} of its drafts at depths {', '.join(map(str, kept))}")
        effective = over_seeds(by_seed, "effective")
        if rank > 1 and effective is not None:
            numbers.append(Number(f"rank {rank}:", effective, 2, "effective components"))
            if effective.mean < rank / 2:
                words.append(f"components collapsed ({effective.mean:.1f} of {rank} in use)")
    return words, numbers


def _works(claim: Claim, cells: dict[int, Cells]) -> tuple[str, str, list[Number]]:
    """Some rank beats plain decoding; Bonferroni over the ranks. The best rank above 1 stands beside rank 1."""
    level = 1 - 0.05 / len(cells)
    over_plain = {rank: over_seeds(by_seed, "speedup", level=level) for rank, by_seed in cells.items()}
    measured = {rank: interval for rank, interval in over_plain.items() if interval is not None}
    if not measured:
        return UNMEASURED, "no cell was decoded", []
    faster = {rank: interval for rank, interval in measured.items() if interval.low > 1}
    best = max(faster or measured, key=lambda rank: measured[rank].mean)
    percent = f"({100 * level:.1f}%)"
    numbers = [Number(f"rank {best} over plain {percent}:", measured[best], claim.digits, claim.unit)]
    beaten = {rank: over_seeds(cells[rank], "speedup_over_rank1", level=level) for rank in cells if rank > 1}
    known = {rank: interval for rank, interval in beaten.items() if interval is not None}
    if known:
        rival = max(known, key=lambda rank: known[rank].mean)
        numbers.append(Number(f"rank {rival} over rank 1 {percent}:", known[rival], claim.digits, claim.unit))
    if faster:
        return HOLDS, "", numbers
    slower = all(interval.high < 1 for interval in measured.values())
    if slower and len(measured) < len(cells):
        missing = ", ".join(str(rank) for rank in cells if rank not in measured)
        return (
            UNMEASURED,
            f"every other rank is slower than plain decoding, but rank {missing} was not decoded",
            numbers,
        )
    if slower:
        return FAILS, "every rank is slower than plain decoding", numbers
    return UNMEASURED, "undecided: for no rank is the interval above 1, and for some it is not below", numbers


def _trend(claim: Claim, cells: dict[int, Cells]) -> tuple[str, str, list[Number]]:
    """Rank `top` against rank 1 has the expected sign, and no adjacent step surely has the other one (95% over all steps)."""
    wanted = -1 if claim.test == "falls" else 1
    total = difference(cells[claim.top], cells[1], claim.quantity)
    if total is None:
        return UNMEASURED, f"the records hold no {claim.quantity}", []
    numbers = [Number(f"rank {claim.top} - rank 1:", total, claim.digits, claim.unit, sign=True)]
    ranks, apart = [rank for rank in sorted(cells) if rank <= claim.top], ""
    for low, high in itertools.pairwise(ranks):
        step = difference(cells[high], cells[low], claim.quantity, level=1 - 0.05 / (len(ranks) - 1))
        if step is None:
            apart = apart or f"rank {high} shares no seed with rank {low}"
        elif _sign(step) == -wanted:
            numbers.append(Number(f"rank {high} - rank {low}:", step, claim.digits, claim.unit, sign=True))
            return FAILS, f"the step from rank {low} to rank {high} goes the other way", numbers
    word, reason = _signed(claim, total)
    return (UNMEASURED, apart, numbers) if apart and word == HOLDS else (word, reason, numbers)


def equal_level(ranks: int) -> float:
    """Of each of C2's intervals: two one-sided tests at 5%, corrected for the number of ranks above 1."""
    return 1 - 0.1 / ranks


def _equal(claim: Claim, cells: dict[int, Cells]) -> tuple[str, str, list[Number]]:
    """Every rank above 1 against rank 1; one that surely differs is enough to fail."""
    numbers, inside, outside, alone = list[Number](), True, list[int](), list[int]()
    ranks = [rank for rank in sorted(cells) if rank > 1]
    level = equal_level(len(ranks))
    for rank in ranks:
        gap = difference(cells[rank], cells[1], claim.quantity, level=level)
        if gap is None:
            alone.append(rank)
            continue
        numbers.append(Number(f"rank {rank} - rank 1 ({100 * level:.1f}%):", gap, claim.digits, claim.unit, sign=True))
        inside &= _is_nothing(claim, gap)
        if gap.low > claim.margin or gap.high < -claim.margin:
            outside.append(rank)
    if outside:
        return (
            FAILS,
            f"rank {', '.join(map(str, outside))} differs from rank 1 by more than {claim.margin:g} {claim.unit}",
            numbers,
        )
    if alone:
        return UNMEASURED, f"rank {', '.join(map(str, alone))} shares no seed with rank 1", numbers
    if inside:
        return HOLDS, "", numbers
    return UNMEASURED, f"undecided: an interval crosses the margin of {claim.margin:g} {claim.unit}", numbers


def _faster(claim: Claim, cells: dict[int, Cells]) -> tuple[str, str, list[Number]]:
    """Some rank above 1 beats both plain decoding and rank 1; Bonferroni over the ranks."""
    ranks = [rank for rank in sorted(cells) if rank > 1]
    level = 1 - 0.05 / len(ranks)
    both: dict[int, tuple[Interval, Interval]] = {}
    for rank in ranks:
        over_plain = over_seeds(cells[rank], "speedup", level=level)
        over_rank1 = over_seeds(cells[rank], "speedup_over_rank1", level=level)
        if over_plain is not None and over_rank1 is not None:
            both[rank] = over_plain, over_rank1
    if not both:
        return UNMEASURED, "no rank above 1 was measured side by side with rank 1", []
    # Reported: the rank whose weaker interval is best.
    best = max(both, key=lambda rank: min(interval.low for interval in both[rank]))
    percent = f"({100 * level:.1f}%)"
    numbers = [
        Number(f"rank {best} over plain {percent}:", both[best][0], claim.digits, claim.unit),
        Number(f"over rank 1 {percent}:", both[best][1], claim.digits, claim.unit),
    ]
    if all(interval.low > 1 for interval in both[best]):
        return HOLDS, "", numbers
    if len(both) == len(ranks) and all(any(interval.high < 1 for interval in pair) for pair in both.values()):
        slower = [
            "plain decoding" if any(p.high < 1 for p, _ in both.values()) else "",
            "rank 1" if any(r.high < 1 for _, r in both.values()) else "",
        ]
        return FAILS, f"every rank above 1 is slower than {' or '.join(filter(None, slower))}", numbers
    return UNMEASURED, "undecided: for no rank are both intervals above 1, and for some rank neither is below", numbers


def _beside(claim: Claim, family: Family, families: list[Family], means: list[Number]) -> list[Number]:
    """What stands next to the deciding numbers: the means by rank; greedy; for C3 the cells whose target is their own."""
    beside = list(means)
    cells = {rank: family.cells["untied", rank] for rank in family.ranks()}
    if claim.target != "common":
        return beside
    for rank, by_seed in cells.items():
        greedy = over_seeds(by_seed, claim.quantity, "greedy")
        if greedy is not None:
            beside.append(Number(f"greedy, rank {rank}:", greedy, claim.digits, claim.unit))
    if claim.id == "C3":
        for other in families:
            if (
                other.target == "own"
                and other.horizon == family.horizon
                and other.settings["corpus"] == family.settings["corpus"]
            ):
                for rank in other.ranks():
                    own = over_seeds(other.cells["untied", rank], claim.quantity)
                    if own is not None:
                        beside.append(Number(f"own target ({other.size}), rank {rank}:", own, claim.digits, claim.unit))
    return beside


def _sign(interval: Interval) -> int:
    return 1 if interval.low > 0 else -1 if interval.high < 0 else 0


def seeds_text(records: list[Record]) -> str:
    """ "3 seeds (0, 1, 2)", or "1 seed (0)"."""
    seeds = sorted({record.seed for record in records})
    return f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
