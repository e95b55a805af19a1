"""What a claim is, what a verdict says, and the parts of a rule that several claims share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.families import Family
from experiments.records import Record, counted
from experiments.stats import Interval
from experiments.suite import Arm

HOLDS, FAILS, UNMEASURED, NOT_MEASURED = "holds", "fails", "not measurable here", "not measured here"


@dataclass(frozen=True)
class Claim:
    """A question, and how it is answered.

    question: what is asked. expected: what the paper says. statistic, rule: how it is answered, in words; the claim's file
    has the same as code. figure: the name of the figure that shows it. arms: whose cells answer it, on two cores; gpu_arms:
    at the size that needs a GPU, where the claim is about that, too. quantity: of `experiments.stats.measured`, in `unit`. target: "own" (trained with the heads), "common" (frozen, the
    same for every rank), "any", "pretrained" or "timing". wanted: the sign of the difference that the paper expects.
    margin: in units of the statistic; a difference that surely lies inside it counts as none. top: the rank held against
    rank 1. seeds: fewer decide nothing; with one, intervals are over rows or prompts alone, and the setting says `1 seed`.
    """

    id: str
    question: str
    expected: str
    statistic: str
    rule: str
    quantity: str
    unit: str
    target: str
    figure: str
    arms: tuple[Arm, ...]
    gpu_arms: tuple[Arm, ...] = ()
    wanted: int = 0
    margin: float = 0.0
    digits: int = 3
    top: int = 8
    seeds: int = 1


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
class Finding:
    """What a rule makes of the cells of one setting: a word, its reason, and the numbers that decided."""

    word: str
    reason: str = ""
    numbers: list[Number] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """claim, setting (what its records share), word, reason. numbers decide; beside are reported next to them. expected: what
    the paper says of it, where that is not what it says of the claim."""

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


def trained(families: Sequence[Family]) -> list[Family]:
    """Families on trunks of ours whose cells were trained, not only timed."""
    return [family for family in families if not family.is_pretrained and not family.is_timing]


def complete(claim: Claim, rows: list[Verdict], missing: str, about: Sequence[Family]) -> list[Verdict]:
    """The rows of a claim, or one that says what is missing; and one for the GPU where `about` was measured on none."""
    found = rows or [Verdict(claim, "-", NOT_MEASURED, missing)]
    if claim.gpu_arms and not any(on_gpu(family) for family in about):
        reason = f"no records of a GPU; python experiments/sweep.py claim={claim.id} profile=gpu"
        found = [*found, Verdict(claim, "one GPU", NOT_MEASURED, reason)]
    return found


def on_gpu(family: Family) -> bool:
    return any(record["hardware"]["accelerator"] != "none" for record in family.records())


def sign(interval: Interval) -> int:
    return 1 if interval.low > 0 else -1 if interval.high < 0 else 0


def is_nothing(claim: Claim, gap: Interval) -> bool:
    """Surely inside the margin: counts as no difference, whatever its sign."""
    return -claim.margin < gap.low and gap.high < claim.margin


def signed(claim: Claim, gap: Interval) -> Finding:
    """Of one difference that should have the wanted sign."""
    if is_nothing(claim, gap):
        return Finding(FAILS, f"no difference larger than {claim.margin:g} {claim.unit}")
    if sign(gap) == claim.wanted:
        return Finding(HOLDS)
    if sign(gap) == -claim.wanted:
        return Finding(FAILS, "the difference goes the other way")
    return Finding(UNMEASURED, "undecided: the interval includes 0 and is too wide to say that there is no difference")


def too_few(claim: Claim, seeds: int) -> str:
    return f"{counted(seeds, 'shared seed')}, the rule needs {claim.seeds}" if seeds < claim.seeds else ""


def seeds_text(records: list[Record]) -> str:
    """ "3 seeds (0, 1, 2)", or "1 seed (0)"."""
    seeds = sorted({record.seed for record in records})
    return f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
