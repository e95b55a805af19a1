"""A table, how it is written, and the words and numbers that its cells and captions share."""

import csv
import io
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpdlm.files import write_bytes
from experiments.claims.verdict import seeds_text
from experiments.records import MODES, Record, counted, decoding_hardware, training_hardware
from experiments.stats import Interval

Column = Callable[[Any], str]  # what a cell says of the row's place
Columns = dict[str, Column]
Pattern = tuple[tuple[str, ...], ...]  # of each part of a path, the values that it takes

_NARROW = 6  # columns of a table that LaTeX need not shrink


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; caption states what was measured and on what."""

    name: str
    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [" | ".join(self.header), " | ".join("---" for _ in self.header)]
        lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in self.rows]
        return "\n".join(f"| {line} |" for line in lines) + f"\n\n{self.caption}\n"

    def latex(self) -> str:
        """A booktabs table, shrunk to the page where it is wide (graphicx); long text wraps in the claims table."""
        columns = (
            "p{0.06\\linewidth}" + "p{0.17\\linewidth}" * (len(self.header) - 1)
            if self.name == "claims"
            else "l" * len(self.header)
        )
        fit = len(self.header) > _NARROW and self.name != "claims"
        body = [" & ".join(map(_escaped, row)) + r" \\" for row in self.rows]
        head = " & ".join(map(_escaped, self.header)) + r" \\"
        return "\n".join(
            [
                r"\begin{table}[t]",
                r"\centering\footnotesize",
                rf"\caption{{{_escaped(self.caption)}}}",
                rf"\label{{tab:{self.name}}}",
                *[r"\resizebox{\linewidth}{!}{"] * fit,
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                head,
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}" + "}" * fit,
                r"\end{table}",
                "",
            ]
        )

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()


def tabulated(name: str, caption: str, columns: Mapping[str, Column], places: Iterable[Any]) -> Table:
    """A row per place."""
    return Table(name, caption, tuple(columns), [tuple(cell(place) for cell in columns.values()) for place in places])


@dataclass(frozen=True)
class Made:
    """A table, or why there is none."""

    name: str
    title: str
    table: Table | str


def write_made(made: Sequence[Made], folder: Path) -> tuple[list[Path], list[str]]:
    """Every table as .md, .tex and .csv: (files, a line per table that is not there).

    What is not there, or has no rows, is removed from `folder`.
    """
    files: list[Path] = []
    notes: list[str] = []
    for each in made:
        if isinstance(each.table, str):
            notes.append(f"table {each.name} left out: {each.table}")
        if isinstance(each.table, str) or not each.table.rows:
            for suffix in ("md", "tex", "csv"):
                (folder / f"{each.name}.{suffix}").unlink(missing_ok=True)
        else:
            files += write_table(each.table, folder)
    return files, notes


def title_of(make: Callable[..., Table]) -> str:
    """The first line of what a table's maker says that it is."""
    return (make.__doc__ or make.__name__).splitlines()[0].rstrip(".")


def write_table(table: Table, folder: Path, notes: Sequence[str] = ()) -> list[Path]:
    """NAME.md (followed by the notes), NAME.tex and NAME.csv."""
    noted = "".join(f"\n- Note: {note}" for note in notes) + "\n" * bool(notes)
    texts = {"md": table.markdown() + noted, "tex": table.latex(), "csv": table.csv()}
    files = {suffix: folder / f"{table.name}.{suffix}" for suffix in texts}
    for suffix, path in files.items():
        write_bytes(path, texts[suffix].encode())
    return list(files.values())


def described(records: Sequence[Record], decoded: bool = True) -> str:
    """Sizes, seeds, steps, sequence length and hardware of some records, in one paragraph. decoded: what they wrote
    counts, too."""
    if not records:
        return "No records."
    sizes = sorted({f"{r.size} ({r['parameters']['trunk'] / 1e6:.1f}M trunk parameters)" for r in records})
    steps = listed({r["training"]["steps"] for r in records})
    lengths = listed({r.config["data"]["context"] for r in records})
    text = f"{counted(len(records), 'record')}; {', '.join(sizes)}; {seeds_text(list(records))}; {steps} steps; "
    text += f"rows of {lengths} tokens"
    trained = "; ".join(sorted({training_hardware(r) for r in records}))
    wrote = [(r, mode) for r in records for name in MODES if decoded and (mode := r.mode(name))]
    if not wrote:
        return f"{text}; trained on {trained}."
    prompts, spans = (listed({mode[key] for _, mode in wrote}) for key in ("prompts", "new_tokens"))
    given = listed({r.config["decode"]["prompt_tokens"] for r, _ in wrote})
    timed = "; ".join(sorted({decoding_hardware(r) for r, _ in wrote}))
    where = f"trained and decoded on {trained}" if trained == timed else f"trained on {trained}; decoded on {timed}"
    return f"{text}; {prompts} prompts of {given} tokens, {spans} new tokens each, batch 1; {where}."


def braces(names: Sequence[str]) -> str:
    """Paths in shell notation, a/x{1,2}-s{0,1}.json: as few patterns as merging one varying part after the other
    leaves."""
    end = ("",)  # so that no name is the beginning of another
    patterns: set[Pattern] = {(*((part,) for part in re.findall(r"\d+|[/-]|[^\d/-]+", name)), end) for name in names}
    for index in reversed(range(max(map(len, patterns), default=0))):
        alike: dict[tuple[Pattern, Pattern], set[str]] = {}
        for pattern in patterns:
            alike.setdefault((pattern[:index], pattern[index + 1 :]), set()).update(*pattern[index : index + 1])
        patterns = {
            before + ((tuple(sorted(parts, key=lambda part: (len(part), part))),) if parts else ()) + after
            for (before, after), parts in alike.items()
        }
    shown = ("".join(c[0] if len(c) == 1 else "{" + ",".join(c) + "}" for c in pattern) for pattern in patterns)
    return ", ".join(sorted(shown))


def shown(interval: Interval | None, digits: int = 3, bare: bool = False, sign: bool = False) -> str:
    if interval is None:
        return "-"
    return f"{interval.mean:.{digits}f}" if bare else interval.text(digits, sign)


def ranged(found: Mapping[str, float], form: str) -> str:
    """A recorded median or mean with its ends."""
    middle = found["median"] if "median" in found else found["mean"]
    return f"{middle:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def recorded(key: str, form: str) -> Column:
    """`ranged` of a row's entry; "-" where it has none."""
    return lambda row: ranged(row[key], form) if row.get(key) is not None else "-"


def with_spread(interval: Interval | None, digits: int, sign: bool = False) -> str:
    if interval is None:
        return "-"
    return interval.text(digits, sign) + (f" ± {interval.spread:.{digits}f}" if interval.seeds > 1 else "")


def dash(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def average(values: Sequence[float], digits: int) -> str:
    """Mean, and the standard deviation where there are several values."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):,.{digits}f}{spread}"


def listed(values: set[int]) -> str:
    return ", ".join(f"{value:,}" for value in sorted(values))


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"} | {
    c: "\\" + c for c in "&%$#_{}"
}


def _escaped(text: str) -> str:
    return re.sub("|".join(map(re.escape, sorted(_TEX, key=len, reverse=True))), lambda match: _TEX[match[0]], text)
