"""C5: the balance loss helps.

Cells: heads of rank 8 on one frozen trunk, with each way to balance the components and with none. The README shows the
default balance (Switch style).
"""

from collections.abc import Sequence

from experiments import star
from experiments.claims.verdict import CONTRADICTED, HOLDS, Claim, Finding, Number, Verdict, cited, percent, trained
from experiments.families import TARGETS, Cells, Family, along
from experiments.records import counted
from experiments.stats import difference, over_seeds, shared_seeds, together

CLAIM = Claim(
    id="C5",
    question="Does a loss that balances the r components help?",
    expected="balancing the components lowers the joint NLL",
    statistic="held-out joint NLL at rank 8, each balance minus none; paired over seeds and test rows",
    rule="holds: for some balance the interval (95%, corrected for their number) is below 0 and not inside ±0.02 "
    "nats; no difference: each interval is inside ±0.02 nats; contradicted: each is above 0 or inside, and not all "
    "are inside",
    quantity="joint_nll",
    unit="nats",
    target="any",
    figure="balance",
    arms=(star.ranks, star.balances),
    margin=0.02,
    seeds=3,
)
_BALANCES = ("balance", "loss.balance_")  # what its families may differ in (prefixes of settings)


def judge(families: Sequence[Family]) -> list[Verdict]:
    """A row per setting with a cell of the top rank without balance and one with."""
    ours = trained(families)
    groups = along((family for family in ours if ("untied", CLAIM.top) in family.cells), *_BALANCES)
    rows = [row for group in groups if (row := _row(group)) is not None]
    return CLAIM.complete(rows, f"no records of rank {CLAIM.top} with balance=none and with another", ours)


def _row(group: list[Family]) -> Verdict | None:
    without = next((family for family in group if family.settings["balance"] == "none"), None)
    if without is None:
        return None
    others = [family for family in group if family is not without]
    base, balanced = _top(without), {family.balance: _top(family) for family in others}
    shared = set(base).intersection(*(shared_seeds(cells, base) for cells in balanced.values()))
    found = _lowers(base, balanced, len(shared))
    corpus = others[0].settings["corpus"]
    setting = f"{corpus}, {without.size}, n={without.horizon}, {TARGETS[without.target]}, rank {CLAIM.top}"
    return found.of(
        CLAIM,
        f"{setting}, {counted(len(shared), 'seed')}",
        beside=[number for family in group for number in _component_use(family)],
        seeds=len(shared),
        **cited(record for family in group for _, record in sorted(_top(family).items())),
    )


def _top(family: Family) -> Cells:
    return family.cells["untied", CLAIM.top]


def _lowers(base: Cells, balanced: dict[str, Cells], shared: int) -> Finding:
    level = 1 - 0.05 / len(balanced)
    found = {name: difference(cells, base, CLAIM.quantity) for name, cells in balanced.items()}
    gaps = together({name: gap for name, gap in found.items() if gap is not None}, level, one_base=True)
    numbers = [CLAIM.number(f"{name} - none {percent(level)}:", gap, sign=True) for name, gap in gaps.items()]
    if few := CLAIM.too_few(shared, gaps.values(), numbers):
        return few
    if any(gap.high < 0 and not CLAIM.is_nothing(gap) for gap in gaps.values()):
        return Finding(HOLDS, "", numbers)
    undecided = [gap for gap in gaps.values() if gap.low <= 0 and not CLAIM.is_nothing(gap)]
    if undecided:
        return CLAIM.underpowered(undecided, "no interval is below 0, and some reach beyond the margin", numbers)
    if all(CLAIM.is_nothing(gap) for gap in gaps.values()):
        return CLAIM.no_difference(numbers)
    return Finding(CONTRADICTED, f"no balance lowers it by more than {CLAIM.margin:g} {CLAIM.unit}", numbers)


def _component_use(family: Family) -> list[Number]:
    """Effective components (exp of the entropy of the mean weights) and tokens per forward."""
    cells = _top(family)
    asked = (("effective", 2, "effective components"), ("tokens_per_pass", 3, "tokens per forward"))
    return [
        Number(f"{family.balance}:", value, digits, unit)
        for quantity, digits, unit in asked
        if (value := over_seeds(cells, quantity)) is not None
    ]


def shown(verdict: Verdict) -> tuple[str, str]:
    """The number is that of the widest interval, which decides what could have been seen."""
    if not verdict.numbers:
        return verdict.plain, "-"
    widest = max(verdict.numbers, key=lambda number: number.interval.high - number.interval.low)
    name = widest.name.partition(" - ")[0].replace("bias", "a gate bias of")
    return verdict.plain, widest.short(f"with {name}")
