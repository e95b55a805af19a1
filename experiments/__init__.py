"""The suite: what a researcher runs. `cpdlm` is the library beneath it, and never imports it."""

import importlib.util
import sys

NEEDED = ("torch", "transformers", "lightning", "omegaconf")


def check_python() -> None:
    """Exit with a sentence, in place of an ImportError, where this Python is not the one that has the packages."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing or sys.version_info < (3, 11):
        lacks = f"has no {', '.join(missing)}" if missing else f"is Python {sys.version.split()[0]}"
        sys.exit(
            f"error: {sys.executable} {lacks}; the suite runs with .venv/bin/python (3.11 or later), which ./dev setup "
            "makes: activate it with `source .venv/bin/activate`"
        )
