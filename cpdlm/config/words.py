"""Parts of the sentences that errors are made of: what was meant, and what another error says."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], shown: str = "{}", cutoff: float = 0.6) -> str:
    """ "; did you mean X?", or "" where nothing is near. shown: how X is to be typed."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {shown.format(near[0])}?" if near else ""


def first_line(error: BaseException) -> str:
    """What it says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
