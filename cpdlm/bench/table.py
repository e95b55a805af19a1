"""The table of a benchmark on a terminal: Markdown where it fits, else a few short lines for each row."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

HEADER = ("task", "mode", "method", "tokens per forward", "accepted by depth", "speed-up [95 %]", "tokens/s")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """rows: as `tasks.row` makes them. Columns are padded, so that it reads as it is."""
    cells = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(each, widths, strict=True)) + " |" for each in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def narrow(rows: Sequence[dict[str, Any]], width: int) -> str:
    """A heading for each task and mode, and a method's numbers below its name, each behind its own word."""
    lines = []
    for (task, mode), group in itertools.groupby(rows, key=lambda row: (row["task"], row["mode"])):
        lines += ["", f"{task}, {mode}"]
        for row in group:
            _, _, method, *numbers = _cells(row)
            lines.append(f"  {method}")
            for name, value in zip(HEADER[3:], numbers, strict=True):
                if value != "-":
                    lines += textwrap.wrap(f"    {name}: {value}", width, subsequent_indent="      ")
    return "\n".join(lines[1:])


def fitting(rows: Sequence[dict[str, Any]], width: int) -> str:
    wide = markdown(rows)
    return wide if wide.index("\n") <= width else narrow(rows, width)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    rate, forward, faster = row["tokens_per_second"], row["tokens_per_forward"], row["speedup"]
    return (
        row["task"],
        row["mode"],
        row["method"],
        "-" if forward is None else f"{forward:.2f}",
        " ".join(f"{share:.2f}" for share in row["accepted_by_depth"]) or "-",
        "-" if faster is None else f"{faster['median']:.2f} [{faster['low']:.2f}, {faster['high']:.2f}]",
        "-" if rate is None else f"{rate:.1f}",
    )
