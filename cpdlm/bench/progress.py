"""How far a long measurement is, and the time left: one line on a terminal, rewritten; a line a minute in a log."""

import sys
import time
from typing import TextIO

EVERY = {True: 0.2, False: 60.0}  # seconds between lines, on a terminal and elsewhere


class Progress:
    """total: steps of `tick`. A line is "LABEL: 12 of 400, 3:20 left", cut to the terminal's width."""

    def __init__(self, total: int, out: TextIO | None = None, width: int = 80) -> None:
        self.total, self.out, self.width = total, out or sys.stderr, width
        self.label, self.done, self.began = "", 0, time.monotonic()
        self.is_terminal = self.out.isatty()
        self.shown = self.began

    def tick(self, steps: int = 1) -> None:
        self.done += steps
        now = time.monotonic()
        if now - self.shown >= EVERY[self.is_terminal]:
            self.shown = now
            self._write(self.line(now))

    def line(self, now: float) -> str:
        minutes, seconds = divmod(round((now - self.began) / self.done * (self.total - self.done)), 60)
        hours, minutes = divmod(minutes, 60)
        left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f"{self.label}: {self.done} of {self.total}, {left} left"

    def say(self, line: str) -> None:
        """A line that stays."""
        self.end()
        print(line, file=self.out, flush=True)

    def end(self) -> None:
        if self.is_terminal:
            self._write("")

    def _write(self, line: str) -> None:
        if self.is_terminal:
            self.out.write(f"\r\033[K{line[: self.width - 1]}")
        else:
            self.out.write(f"{line}\n")
        self.out.flush()
