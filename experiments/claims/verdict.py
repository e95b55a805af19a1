"""What a claim is, what a verdict says, and the parts of a rule that several claims share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from experiments.families import Family
from experiments.records import Record, counted
from experiments.stats import Interval
from experiments.suite import Arm

HOLDS, CONTRADICTED, NO_DIFFERENCE = "holds", "contradicted", "no difference"
UNDERPOWERED, NOT_RUN = "underpowered", "not run"


@dataclass(frozen=True)
class Claim:
    """A question, and how it is answered.

    question: what is asked. expected: what the paper says. statistic, rule: how it is answered, in words; the claim's
    file has the same as code. figure: the name of the figure that shows it. arms, gpu_arms: of cells that answer it,
    on two cores and on a GPU. quantity: of `experiments.stats.measured`, in `unit` ("x" for ratios). target: "own"
    (trained with the heads), "common" (frozen, the same for every rank), "any", "pretrained" or "timing". wanted: the
    sign of the difference that the paper expects. margin: in units of the statistic; a difference that surely lies
    inside it counts as none. top: the rank held against rank 1. seeds: fewer decide nothing; with one, intervals are
    over rows or prompts alone, and the setting says `1 seed`. part: tells two questions of one claim apart.
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
    part: str = ""

    @property
    def name(self) -> str:
        return f"{self.id} {self.part}".strip()


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

    def short(self, where: str = "") -> str:
        """For one cell of a table of few words: "+0.26 nats WHERE [0.13, 0.38]"."""
        low, high = (f"{end:.{self.digits}f}" for end in (self.interval.low, self.interval.high))
        mean = f"{self.interval.mean:{'+' * self.sign}.{self.digits}f}{' ' * (self.unit != 'x')}{self.unit}"
        return " ".join(part for part in (mean, where, f"[{low}, {high}]") if part)


@dataclass(frozen=True)
class Finding:
    """What a rule makes of the cells of one setting. extent: how far the word reaches. numbers: those that decided."""

    word: str
    reason: str = ""
    numbers: list[Number] = field(default_factory=list)
    extent: str = ""


@dataclass(frozen=True)
class Verdict:
    """The finding of a claim in one setting (what its records share).

    numbers decide; beside are reported next to them. expected: what the paper says of this setting, where that is not
    what it says of the claim.
    """

    claim: Claim
    setting: str
    word: str
    reason: str
    numbers: list[Number] = field(default_factory=list)
    beside: list[Number] = field(default_factory=list)
    records: list[str] = field(default_factory=list)
    seeds: int = 0
    expected: str = ""
    extent: str = ""

    @property
    def phrase(self) -> str:
        """One of: holds; contradicted; no difference within ±x; underpowered (could have seen y or more); not run."""
        return f"{self.word} {self.extent}".strip()

    @property
    def verdict(self) -> str:
        return f"{self.phrase}: {self.reason}" if self.reason else self.phrase

    def measured(self) -> str:
        return "; ".join(number.text() for number in self.numbers) or "nothing"

    def found(self, finding: Finding) -> Verdict:
        """With what a rule found."""
        return replace(self, word=finding.word, reason=finding.reason, numbers=finding.numbers, extent=finding.extent)


@dataclass(frozen=True)
class Answer:
    """A claim in one row: what came out in its deciding setting, and the number that shows it."""

    claim: Claim
    answer: str
    number: str


Shorten = Callable[[Verdict], tuple[str, str]]


def headline(verdicts: Sequence[Verdict], shorten: Shorten) -> Answer:
    """The deciding setting is the first that was run: each claim's rows come with the most evidence first. Words that
    other settings have are counted behind the answer."""
    run = [verdict for verdict in verdicts if verdict.word != NOT_RUN]
    if not run:
        return Answer(verdicts[0].claim, NOT_RUN, "-")
    answer, number = shorten(run[0])
    words = [verdict.word for verdict in run[1:]]
    others = [f"{words.count(word)} {_OTHERS[word]}" for word in _OTHERS if word in words]
    if set(words) - {run[0].word}:
        answer += f" (in {counted(len(words), 'other setting')}: {', '.join(others)})"
    return Answer(verdicts[0].claim, answer, number)


_OTHERS = {HOLDS: "hold", CONTRADICTED: "contradict", NO_DIFFERENCE: "no difference", UNDERPOWERED: "underpowered"}


def plain_answer(verdict: Verdict) -> str:
    return {HOLDS: "yes", CONTRADICTED: "no"}.get(verdict.word, verdict.phrase)


def trained(families: Sequence[Family]) -> list[Family]:
    """Families on trunks of ours whose cells were trained, not only timed."""
    return [family for family in families if not family.is_pretrained and not family.is_timing]


def complete(claim: Claim, rows: list[Verdict], missing: str, about: Sequence[Family]) -> list[Verdict]:
    """The rows of a claim, or one that says what is missing; and one for the GPU where `about` was measured on none."""
    found = rows or [Verdict(claim, "-", NOT_RUN, missing)]
    if claim.gpu_arms and not any(on_gpu(family) for family in about):
        reason = f"no records of a GPU; python experiments/sweep.py claim={claim.id} profile=gpu"
        found = [*found, Verdict(claim, "one GPU", NOT_RUN, reason)]
    return found


def on_gpu(family: Family) -> bool:
    return any(record["hardware"]["accelerator"] != "none" for record in family.records())


def sign(interval: Interval) -> int:
    return 1 if interval.low > 0 else -1 if interval.high < 0 else 0


def is_nothing(claim: Claim, gap: Interval) -> bool:
    """Surely inside the margin: counts as no difference, whatever its sign."""
    return -claim.margin < gap.low and gap.high < claim.margin


def no_difference(claim: Claim, reason: str = "", numbers: Sequence[Number] = ()) -> Finding:
    return Finding(NO_DIFFERENCE, reason, list(numbers), f"within ±{claim.margin:g} {claim.unit}")


def underpowered(claim: Claim, open_: Iterable[Interval], reason: str, numbers: Sequence[Number] = ()) -> Finding:
    """open_: the intervals that decide nothing, at least one. What could have been seen is the largest half-width among
    them, for ratios as a factor: an effect of that size would have moved its interval clear of no effect."""
    if claim.unit == "x":
        widest = max(math.sqrt(interval.high / interval.low) for interval in open_)
        size = f"{widest:.2f}x"
    else:
        widest = max((interval.high - interval.low) / 2 for interval in open_)
        size = f"{widest:.2g} {claim.unit}"
    seen = f"{size} or more" if math.isfinite(widest) else "nothing: one row or prompt has no interval"
    return Finding(UNDERPOWERED, reason, list(numbers), f"(could have seen {seen})")


def signed(claim: Claim, gap: Interval, numbers: Sequence[Number] = ()) -> Finding:
    """Of one difference that should have the wanted sign."""
    if is_nothing(claim, gap):
        return no_difference(claim, "", numbers)
    if sign(gap) == claim.wanted:
        return Finding(HOLDS, "", list(numbers))
    if sign(gap) == -claim.wanted:
        return Finding(CONTRADICTED, "the difference goes the other way", list(numbers))
    return underpowered(claim, [gap], "the interval includes 0 and reaches beyond the margin", numbers)


def too_few(claim: Claim, seeds: int, intervals: Iterable[Interval], numbers: Sequence[Number] = ()) -> Finding | None:
    """Where there are fewer seeds than the rule needs: nothing is decided, whatever the intervals."""
    if seeds >= claim.seeds:
        return None
    reason, known = f"{counted(seeds, 'shared seed')}, the rule needs {claim.seeds}", list(intervals)
    if not seeds or not known:
        return Finding(NOT_RUN, reason, list(numbers))
    return underpowered(claim, known, reason, numbers)


def percent(level: float) -> str:
    return f"({100 * level:.1f}%)"


def seeds_text(records: list[Record]) -> str:
    """ "3 seeds (0, 1, 2)", or "1 seed (0)"."""
    seeds = sorted({record.seed for record in records})
    return f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
