"""Help for a terminal of any width."""

import shutil
import textwrap
from argparse import ArgumentParser


class Parser(ArgumentParser):
    """argparse's, whose help has no line wider than the terminal, but for words that are."""

    def format_help(self) -> str:
        return fitted(super().format_help())


def fitted(text: str) -> str:
    """The text with lines that are wider than the terminal broken at spaces; indented ones go on further in."""
    width = shutil.get_terminal_size().columns
    return "\n".join(part for line in text.split("\n") for part in _broken(line, width))


def _broken(line: str, width: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    goes_on = indent and f"{indent}    "
    broken = textwrap.wrap(line, width, subsequent_indent=goes_on, break_long_words=False, break_on_hyphens=False)
    return broken or [""]
