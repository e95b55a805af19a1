"""What a claim is, what a verdict says, and the parts of a rule that several claims share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.families import Family
from experiments.records import Record, counted
from experiments.stats import Interval
from experiments.suite import Arm

HOLDS, CONTRADICTED, NO_DIFFERENCE = "holds", "contradicted", "no difference"
UNDERPOWERED, NOT_RUN = "underpowered", "not run"
# When the rules last changed (UTC; results/LOG.md tells how): margins from what matters to a user; seeds' variance
# pooled; "every" is not corrected.
RULED = "2026-11-29T02:30"


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


Numbers = Sequence[Number]


@dataclass(frozen=True)
class Finding:
    """What a rule makes of the cells of one setting. numbers: those that decided. extent: how far the word reaches."""

    word: str
    reason: str = ""
    numbers: Numbers = ()
    extent: str = ""

    @property
    def phrase(self) -> str:
        """One of: holds; contradicted; no difference within ±x; underpowered (could have seen y or more); not run."""
        return f"{self.word} {self.extent}".strip()

    @property
    def plain(self) -> str:
        return {HOLDS: "yes", CONTRADICTED: "no"}.get(self.word, self.phrase)

    def of(self, claim: Claim, setting: str, **more: object) -> Verdict:
        """more: of the fields of a verdict."""
        return Verdict(**vars(self) | {"claim": claim, "setting": setting} | more)


@dataclass(frozen=True, kw_only=True)
class Verdict(Finding):
    """The finding of a claim in one setting (what its records share).

    numbers decide; beside are reported next to them. expected: what the paper says of this setting, where that is not
    what it says of the claim. started: when the first of its records began. profile: what they were made by.
    """

    claim: Claim
    setting: str
    beside: Numbers = ()
    records: list[str] = field(default_factory=list)
    seeds: int = 0
    expected: str = ""
    started: str = ""
    profile: str = ""

    @property
    def verdict(self) -> str:
        return f"{self.phrase}: {self.reason}" if self.reason else self.phrase

    @property
    def visible(self) -> str:
        """The smallest effect that its deciding intervals could have shown."""
        return self.claim.visible([number.interval for number in self.numbers]) if self.numbers else "-"

    @property
    def command(self) -> str:
        """What makes its records."""
        of_claim = self.profile in ("", "all", "single", self.claim.id)
        return f"python experiments/sweep.py {f'claim={self.claim.id}' if of_claim else f'profile={self.profile}'}"

    @property
    def is_ruled_after(self) -> bool:
        """Its rule is younger than its records."""
        return bool(self.started) and self.started < RULED

    def measured(self) -> str:
        return "; ".join(number.text() for number in self.numbers) or "nothing"


@dataclass(frozen=True)
class Claim:
    """A question, and how it is answered.

    question: what is asked. expected: what the paper says. statistic, rule: how it is answered, in words; the claim's
    file has the same as code. figure: the name of the figure that shows it. arms, gpu_arms: of cells that answer it,
    on two cores and on a GPU. quantity: of `experiments.stats.measured`, in `unit` ("x" for ratios). target: "own"
    (trained with the heads), "common" (frozen, the same for every rank), "any", "pretrained" or "timing". wanted: the
    sign of the difference that the paper expects. margin: in units of the statistic, of a ratio a share; a difference
    that surely lies inside it counts as none. top: the rank held against rank 1. seeds: fewer decide nothing; with one,
    intervals are over rows or prompts alone, and the setting says `1 seed`. part: tells two questions of one claim
    apart. beyond: what an effect must exceed to contradict, in `unit`.
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
    beyond: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.id} {self.part}".strip()

    def number(self, name: str, interval: Interval, sign: bool = False) -> Number:
        return Number(name, interval, self.digits, self.unit, sign)

    def is_nothing(self, gap: Interval) -> bool:
        """Surely inside the margin: counts as no difference, whatever its sign."""
        low, high = (-self.margin, self.margin) if self.unit != "x" else (1 - self.margin, 1 + self.margin)
        return low < gap.low and gap.high < high

    def no_difference(self, numbers: Numbers) -> Finding:
        size = f"{self.margin:.0%}" if self.unit == "x" else f"{self.margin:g} {self.unit}"
        return Finding(NO_DIFFERENCE, "", numbers, f"within ±{size}")

    def underpowered(self, open_: Iterable[Interval], reason: str, numbers: Numbers = ()) -> Finding:
        """open_: the intervals that decide nothing, at least one. What could have been seen is the largest half-width
        among them, for ratios as a factor: an effect of that size would have moved its interval clear of no effect."""
        return Finding(UNDERPOWERED, reason, numbers, f"(could have seen {self.visible(open_)})")

    def visible(self, intervals: Iterable[Interval]) -> str:
        """The largest half-width, for ratios as a factor: an effect of that size beyond `beyond` moves its interval
        clear of none."""
        if self.unit == "x":
            widest = max(math.sqrt(each.high / each.low) if each.low > 0 else math.inf for each in intervals)
            size = f"{widest:.2f}x"
        else:
            widest = self.beyond + max((each.high - each.low) / 2 for each in intervals)
            size = f"{widest:.2g} {self.unit}"
        return f"{size} or more" if math.isfinite(widest) else "nothing: one row or prompt has no interval"

    def signed(self, gap: Interval, numbers: Numbers) -> Finding:
        """Of one difference that should have the wanted sign."""
        if self.is_nothing(gap):
            return self.no_difference(numbers)
        if sign(gap) == self.wanted:
            return Finding(HOLDS, "", numbers)
        if sign(gap) == -self.wanted:
            return Finding(CONTRADICTED, "the difference goes the other way", numbers)
        same = "1" if gap.is_ratio else "0"
        return self.underpowered([gap], f"the interval includes {same} and reaches beyond the margin", numbers)

    def too_few(self, seeds: int, intervals: Iterable[Interval], numbers: Numbers = ()) -> Finding | None:
        """Where there are fewer seeds than the rule needs: nothing is decided, whatever the intervals."""
        if seeds >= self.seeds:
            return None
        reason, known = f"{counted(seeds, 'shared seed')}, the rule needs {self.seeds}", list(intervals)
        return self.underpowered(known, reason, numbers) if seeds and known else Finding(NOT_RUN, reason, numbers)

    def complete(self, rows: list[Verdict], missing: str, about: Sequence[Family] = ()) -> list[Verdict]:
        """The rows, or one that says what is missing; and one for the GPU where `about` was measured on none."""
        found = rows or [Finding(NOT_RUN, missing).of(self, "-")]
        if self.gpu_arms and not any(on_gpu(family) for family in about):
            reason = f"no records of a GPU; python experiments/sweep.py claim={self.id} profile=gpu"
            found = [*found, Finding(NOT_RUN, reason).of(self, "one GPU")]
        return found


@dataclass(frozen=True)
class Answer:
    """A claim in one row: what came out in its deciding setting, and the number that shows it."""

    claim: Claim
    answer: str
    number: str


_OTHERS = {HOLDS: "yes", CONTRADICTED: "no", NO_DIFFERENCE: "no difference", UNDERPOWERED: "underpowered"}


def headline(verdicts: Sequence[Verdict], shorten: Callable[[Verdict], tuple[str, str]]) -> Answer:
    """The deciding setting is the first that was run: each claim's rows come with the most evidence first. Words that
    other settings have are counted behind the answer, but for rows whose numbers stand beside the deciding one."""
    run = [verdict for verdict in verdicts if verdict.word != NOT_RUN]
    if not run:
        return Answer(verdicts[0].claim, NOT_RUN, "-")
    answer, number = shorten(run[0])
    words = [verdict.word for verdict in run[1:] if not set(verdict.numbers) <= set(run[0].beside)]
    others = [f"{words.count(word)} {said}" for word, said in _OTHERS.items() if word in words]
    if set(words) - {run[0].word}:
        said = f"other settings: {', '.join(others)})"
        answer = f"{answer[:-1]}; {said}" if answer.endswith(")") else f"{answer} ({said}"
    return Answer(verdicts[0].claim, answer, number)


def fewest_seeds(numbers: Numbers) -> int:
    """Of those that each number was measured with: cells that were trained and not decoded do not count."""
    return min(number.interval.seeds for number in numbers)


def cited(records: Iterable[Record]) -> dict[str, Any]:
    """The fields of a verdict that say what it rests on."""
    those = list(records)
    return {
        "records": [record.path for record in those],
        "started": min((str(record["started"]) for record in those), default=""),
        "profile": min((str(record["profile"]) for record in those), default=""),
    }


def trained(families: Sequence[Family]) -> list[Family]:
    """Families on trunks of ours whose cells were trained, not only timed."""
    return [family for family in families if not family.is_pretrained and not family.is_timing]


def on_gpu(family: Family) -> bool:
    return any(record["hardware"]["accelerator"] != "none" for record in family.records())


def sign(interval: Interval) -> int:
    """Of a difference; of a ratio, above or below 1."""
    same = 1 if interval.is_ratio else 0
    return 1 if interval.low > same else -1 if interval.high < same else 0


def percent(level: float) -> str:
    return f"({100 * level:.1f}%)"


def seeds_text(records: list[Record]) -> str:
    """ "3 seeds (0, 1, 2)", or "1 seed (0)"."""
    seeds = sorted({record.seed for record in records})
    return f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
