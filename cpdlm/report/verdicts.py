"""The paper's claims C1 to C4 and C6 as data: question, expected outcome, statistic and rule, fixed before any run.

A verdict is a function of the records alone. The word is `holds`, `fails`, or `not measurable here`; the last always says
why (no cells, too few seeds, or an interval that decides nothing). Verdicts C1 to C4 are about the paper's own law
(untied, anchor=none) on trunks of ours; anchored and tied cells stand in a table of their own. C6 is about heads on a
pretrained model, each variant by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from cpdlm.report.results import Cells, Family, Record
from cpdlm.report.statistics import Interval, difference, over_seeds

HOLDS, FAILS, UNMEASURED = "holds", "fails", "not measurable here"


@dataclass(frozen=True)
class Claim:
    """question: what is asked. expected: what the paper says. statistic, rule: how it is answered, in words; `test`,
    `margin` and the rest are the same for the program. target: whose cells count. top: the rank held against rank 1.
    margin: in units of the statistic; a difference that surely lies inside it counts as none. seeds: fewer decide nothing; with one, intervals are over rows
    or prompts alone, and the setting says `1 seed`."""

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


CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="C1",
        question="Does the joint negative log-likelihood fall as the rank rises?",
        expected="joint NLL falls as the rank rises, at equal steps",
        statistic="held-out joint NLL, rank 8 minus rank 1, from scratch; paired over seeds and test rows",
        rule="holds: 95% interval below 0 and no step from one rank to the next surely up; fails: 95% interval above 0 or "
        "inside +-0.01 nats, or a step surely up",
        quantity="joint_nll", unit="nats", target="own", test="falls", margin=0.01,
    ),
    Claim(
        id="C2",
        question="Is the first-token loss independent of the rank?",
        expected="first-token NLL does not depend on the rank",
        statistic="held-out first-token NLL (eq. 11), every rank minus rank 1, from scratch; paired over seeds and test rows",
        rule="equivalence test: holds: every 90% interval inside +-0.02 nats; fails: some 90% interval wholly outside",
        quantity="first_token_nll", unit="nats", target="own", test="equal", margin=0.02,
    ),
    Claim(
        id="C3",
        question="Does draft acceptance rise with the rank?",
        expected="more tokens per trunk pass as the rank rises",
        statistic="tokens per pass when sampling, rank 8 minus rank 1, one common target; paired over seeds and prompts",
        rule="holds: 95% interval above 0 and no step from one rank to the next surely down; fails: 95% interval below 0 or "
        "inside +-0.02, or a step surely down",
        quantity="tokens_per_pass", unit="tokens per pass", target="common", test="rises", margin=0.02,
    ),
    Claim(
        id="C4",
        question="Is decoding faster than autoregressive decoding and than rank 1?",
        expected="faster than plain decoding and than rank 1",
        statistic="speed-up when sampling, over plain decoding and over rank 1, measured side by side on one common target",
        rule="holds: for some rank above 1 both intervals above 1 (95%, corrected for the number of ranks); fails: for every "
        "rank above 1 some interval below 1",
        quantity="speedup", unit="x", target="common", test="faster", margin=0.0, digits=2,
    ),
    Claim(
        id="C6",
        question="Does it work when only heads on a frozen, pretrained model are trained?",
        expected="heads alone make a pretrained model decode faster",
        statistic="speed-up when sampling, over plain decoding of the pretrained model, measured side by side; over rank 1 beside it",
        rule="holds: for some rank the interval over plain decoding is above 1 (95%, corrected for the number of ranks); fails: for "
        "every rank it is below 1",
        quantity="speedup", unit="x", target="pretrained", test="works", margin=0.0, digits=2,
    ),
)  # fmt: skip


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
    """claim, setting (what its records share), word, reason. numbers decide; beside are reported next to them."""

    claim: Claim
    setting: str
    word: str
    reason: str
    numbers: list[Number] = field(default_factory=list)
    beside: list[Number] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    seeds: int = 0

    @property
    def verdict(self) -> str:
        return self.word if self.word == HOLDS else f"{self.word}: {self.reason}"

    def measured(self) -> str:
        return "; ".join(number.text() for number in self.numbers) or "nothing"


def judge(families: list[Family]) -> list[Verdict]:
    """Verdicts in the order of CLAIMS, one per family with at least two ranks (one saying so where there is none)."""
    found = []
    for claim in CLAIMS:
        if claim.target == "pretrained":
            usable = [f for f in families if f.is_pretrained and len(f.all_ranks()) > 1]
            found += [_judge_retrofit(claim, family, variant) for family in usable for variant in family.variants()]
        else:
            usable = [f for f in families if f.target == claim.target and not f.is_pretrained and len(f.ranks()) > 1]
            found += [_judge(claim, family, families) for family in usable]
        if not usable:
            found.append(
                Verdict(
                    claim,
                    "-",
                    UNMEASURED,
                    "no records of two or more ranks on a pretrained model"
                    if claim.target == "pretrained"
                    else f"no records of two or more ranks with {claim.target} target and anchor=none",
                )
            )
    return found


def _judge(claim: Claim, family: Family, families: list[Family]) -> Verdict:
    cells = {rank: family.cells["untied", rank] for rank in family.ranks()}
    tests: dict[str, Callable[[Claim, dict[int, Cells]], tuple[str, str, list[Number]]]] = {
        "falls": _trend, "rises": _trend, "equal": _equal, "faster": _faster
    }  # fmt: skip
    missing = [rank for rank in (1, claim.top) if rank not in cells]
    reported = [over_seeds(cells[rank], claim.quantity) for rank in sorted(cells)]
    means = [
        Number(f"rank {rank}:", interval, claim.digits, claim.unit)
        for rank, interval in zip(sorted(cells), reported, strict=True)
        if interval is not None
    ]
    shared = set() if missing else set(cells[1]) & set(cells[claim.top])
    if missing:
        word, numbers = UNMEASURED, list[Number]()
        reason = f"no cell of rank {' and '.join(map(str, missing))} (there is {', '.join(map(str, cells))})"
    else:
        word, reason, numbers = tests[claim.test](claim, cells)
        if len(shared) < claim.seeds:
            word, reason = (
                UNMEASURED,
                f"{len(shared)} shared seed{'s' * (len(shared) != 1)}, the rule needs {claim.seeds}",
            )
    return Verdict(
        claim, f"{family.label}, {len(shared)} seed{'s' * (len(shared) != 1)}", word, reason, numbers or means, _beside(claim, family, families, means if numbers else []),
        [record.path for record in family.records("untied")], len(shared),
    )  # fmt: skip


def _judge_retrofit(claim: Claim, family: Family, variant: str) -> Verdict:
    cells = {rank: family.cells[variant, rank] for rank in family.ranks(variant)}
    word, reason, numbers = _works(claim, cells)
    beside = []
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
    seeds = {seed for by_seed in cells.values() for seed in by_seed}
    return Verdict(
        claim, f"{family.label}, {variant}, {len(seeds)} seed{'s' * (len(seeds) != 1)}", word, reason, numbers, beside,
        [record.path for record in family.records(variant)], len(seeds),
    )  # fmt: skip


def _works(claim: Claim, cells: dict[int, Cells]) -> tuple[str, str, list[Number]]:
    """Some rank beats plain decoding; Bonferroni over the ranks. The best rank above 1 stands beside rank 1."""
    level = 1 - 0.05 / len(cells)
    over_plain = {rank: over_seeds(by_seed, "speedup", level=level) for rank, by_seed in cells.items()}
    measured = {rank: interval for rank, interval in over_plain.items() if interval is not None}
    if not measured:
        return UNMEASURED, "no cell was decoded", []
    best = max(measured, key=lambda rank: measured[rank].low)
    percent = f"({100 * level:.1f}%)"
    numbers = [Number(f"rank {best} over plain {percent}:", measured[best], claim.digits, claim.unit)]
    beaten = {rank: over_seeds(cells[rank], "speedup_over_rank1", level=level) for rank in cells if rank > 1}
    known = {rank: interval for rank, interval in beaten.items() if interval is not None}
    if known:
        rival = max(known, key=lambda rank: known[rank].mean)
        numbers.append(Number(f"rank {rival} over rank 1 {percent}:", known[rival], claim.digits, claim.unit))
    if measured[best].low > 1:
        return HOLDS, "", numbers
    if all(interval.high < 1 for interval in measured.values()):
        return FAILS, "every rank is slower than plain decoding", numbers
    return UNMEASURED, "undecided: for no rank is the interval above 1, and for some it is not below", numbers


def _trend(claim: Claim, cells: dict[int, Cells]) -> tuple[str, str, list[Number]]:
    """Rank `top` against rank 1 has the expected sign, and no adjacent step surely has the other one (95% over all steps)."""
    wanted = -1 if claim.test == "falls" else 1
    total = difference(cells[claim.top], cells[1], claim.quantity)
    if total is None:
        return UNMEASURED, f"the records hold no {claim.quantity}", []
    numbers = [Number(f"rank {claim.top} - rank 1:", total, claim.digits, claim.unit, sign=True)]
    ranks = [rank for rank in sorted(cells) if rank <= claim.top]
    for low, high in itertools.pairwise(ranks):
        step = difference(cells[high], cells[low], claim.quantity, level=1 - 0.05 / (len(ranks) - 1))
        if step is not None and _sign(step) == -wanted:
            numbers.append(Number(f"rank {high} - rank {low}:", step, claim.digits, claim.unit, sign=True))
            return FAILS, f"the step from rank {low} to rank {high} goes the other way", numbers
    if _sign(total) == wanted:
        return HOLDS, "", numbers
    if _sign(total) == -wanted:
        return FAILS, "the difference goes the other way", numbers
    if -claim.margin < total.low and total.high < claim.margin:
        return FAILS, f"no difference larger than {claim.margin:g} {claim.unit}", numbers
    return UNMEASURED, "undecided: the interval includes 0 and is too wide to say that there is no difference", numbers


def _equal(claim: Claim, cells: dict[int, Cells]) -> tuple[str, str, list[Number]]:
    """Two one-sided tests at 5% each, for every rank against rank 1; all must pass, so that no correction is due."""
    numbers, inside, outside = [], True, list[int]()
    for rank in sorted(cells):
        gap = difference(cells[rank], cells[1], claim.quantity, level=0.9) if rank != 1 else None
        if gap is None:
            continue
        numbers.append(Number(f"rank {rank} - rank 1 (90%):", gap, claim.digits, claim.unit, sign=True))
        inside &= -claim.margin < gap.low and gap.high < claim.margin
        if gap.low > claim.margin or gap.high < -claim.margin:
            outside.append(rank)
    if not numbers:
        return UNMEASURED, "no seed is shared with rank 1", []
    if outside:
        return (
            FAILS,
            f"rank {', '.join(map(str, outside))} differs from rank 1 by more than {claim.margin:g} {claim.unit}",
            numbers,
        )
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
    return f"{len(seeds)} seed{'s' * (len(seeds) != 1)} ({', '.join(map(str, seeds))})"
