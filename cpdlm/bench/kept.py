"""What a measurement has finished so far, beside its output: a killed one goes on with the next part."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpdlm.files import write_json

Entries = list[dict[str, Any]]


class Kept:
    """Parts by name, in FILE.parts until `remove`. asked: what was asked for, on what; nothing is taken of another.

    file: the output; None keeps nothing. What is taken or replaced is said on standard error.
    """

    def __init__(self, file: Path | None, asked: Mapping[str, Any]) -> None:
        self.path = None if file is None else _place(file)
        self.asked: dict[str, Any] = json.loads(json.dumps(asked, default=str))
        self.parts: dict[str, Entries] = {}
        if self.path is None or not self.path.is_file():
            return
        try:
            found = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            found = None
        if isinstance(found, dict) and found.get("asked") == self.asked:
            self.parts = found["parts"]
            print(f"goes on after {', '.join(self.parts)} of {self.path}", file=sys.stderr, flush=True)
        else:
            print(f"{self.path} is of another measurement, and is replaced", file=sys.stderr, flush=True)

    def part(self, name: str, measure: Callable[[], Entries]) -> Entries:
        """Of an earlier call, or measured and kept."""
        if name not in self.parts:
            self.parts[name] = measure()
            if self.path is not None:
                write_json(self.path, {"asked": self.asked, "parts": self.parts})
        return self.parts[name]


def remove(file: Path) -> None:
    """Once the output is written."""
    _place(file).unlink(missing_ok=True)


def _place(file: Path) -> Path:
    return file.with_name(f"{file.name}.parts")
