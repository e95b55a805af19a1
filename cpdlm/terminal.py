"""Help for a terminal of any width."""

import re
import shutil
import textwrap
from argparse import ArgumentParser

ROOM = 22  # characters that a line's last column takes at least


class Parser(ArgumentParser):
    """argparse's, whose help has no line wider than the terminal, but for words that are."""

    def format_help(self) -> str:
        return fitted(super().format_help())


def fitted(text: str, width: int = 0) -> str:
    """The text with lines broken at spaces that are longer than `width` (default: the terminal's).

    A line in columns, which two spaces or more part, goes on under its last column where that has ROOM. Elsewhere its
    columns are closed up. Lines that are indented, or in columns, go on indented.
    """
    width = width or shutil.get_terminal_size().columns
    return "\n".join(part for line in text.split("\n") for part in _broken(line, width))


def _broken(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    columns = [found.end() for found in re.finditer(r"\S {2,}(?=\S)", line)]
    first = line[: len(line) - len(line.lstrip())]
    goes_on = first + "    " * bool(first or columns or line.startswith("usage:"))
    if columns and width - columns[-1] >= ROOM:
        goes_on = " " * columns[-1]
    else:
        line = first + re.sub(" {2,}", "  ", line.lstrip())
    return textwrap.wrap(line, width, subsequent_indent=goes_on, break_long_words=False, break_on_hyphens=False)
