"""Prompt lookup, drafts without parameters: text repeats itself, so what followed these tokens may follow again.

The last tokens are looked up in the text so far, prompt included: the longest match first, its latest occurrence. The
draft is what followed there. It is a function of the text, so that the acceptance test of a deterministic draft is
exact: all of the draft distribution q is on that token.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LookupSettings:
    """least, longest: how many of the last tokens must, and may, stand earlier in the text. most: drafts copied."""

    least: int = 3
    longest: int = 8
    most: int = 8


@dataclass(frozen=True)
class Copy:
    """tokens: what followed before. matched: how many tokens before them stood there too. No tokens: no match."""

    tokens: Sequence[int] = ()
    matched: int = 0


NOTHING = Copy()


class Lookup:
    """Drafts for one text: where each n-gram of it was last continued."""

    def __init__(self, text: Sequence[int], settings: LookupSettings) -> None:
        self.settings = settings
        self.text: list[int] = []
        self.continued: dict[tuple[int, ...], int] = {}
        self.extend(text)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self.text)
            for size in range(self.settings.least, min(self.settings.longest, end) + 1):
                self.continued[tuple(self.text[end - size :])] = end
            self.text.append(token)

    def draft(self, count: int) -> Copy:
        """At most `count` tokens; a copy that reaches the end of the text goes on with itself."""
        end = len(self.text)
        for size in range(min(self.settings.longest, end), self.settings.least - 1, -1):
            source = self.continued.get(tuple(self.text[end - size :]))
            if source is not None:
                period, count = end - source, min(count, self.settings.most)
                return Copy([self.text[source + k % period] for k in range(count)], size) if count > 0 else NOTHING
        return NOTHING
