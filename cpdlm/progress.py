"""How far long work is: a bar on a terminal; in a log a plain line a minute, without carriage returns."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

LOG_SECONDS = 60.0
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"


class Bar(tqdm):
    """tqdm's bar, with its arguments. Where standard error is no terminal: work of less than a minute says nothing."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        if sys.stderr.isatty():
            settings = {"dynamic_ncols": True} | settings
        else:
            every = {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "delay": LOG_SECONDS, "miniters": 1}
            settings |= every | {"file": _Lines(sys.stderr), "bar_format": LINE}
        super().__init__(*arguments, **settings)


class _Lines:
    """What tqdm writes to rewrite a line, as lines."""

    encoding = "utf-8"

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def write(self, text: str) -> None:
        if line := text.replace("\r", "").strip():
            self.out.write(f"{line}\n")

    def flush(self) -> None:
        self.out.flush()

    def isatty(self) -> bool:
        return False
