"""Text from a finished model, at the keyboard: streams the output and shows which tokens were drafted.

The text goes to one stream and everything else to standard error, so that the text can be piped. Slow imports come
after the request is checked.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from cpdlm.decoding import Decoded, Sampling
    from cpdlm.hf.load import Opened
    from cpdlm.text import OnTokens

REPEATS = 3  # timed runs of --show: a single one varies too much
GREEN, RESET = "\033[32m", "\033[0m"
# A terminal would obey them.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Incremental:
    """Ids -> text, a few at a time: no piece ends within a character, and all pieces joined are the text.

    An incomplete character decodes to U+FFFD: up to three of them at the end are held back until more is known.
    """

    KEEP, TRIM = 16, 64  # ids that stay as context, and how many have come before older ones are dropped

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        self.ids: list[int] = []
        self.written = 0  # characters of decode(ids) that are out

    def push(self, ids: Sequence[int]) -> str:
        self.ids.extend(ids)
        text = self.decode(self.ids)
        open_end = min(3, len(text) - len(text.rstrip(_UNKNOWN)))
        new = text[self.written : len(text) - open_end]
        self.written += len(new)
        if open_end == 0 and len(self.ids) > self.TRIM:
            self.ids = self.ids[-self.KEEP :]
            self.written = len(self.decode(self.ids))
        return new

    def end(self) -> str:
        return self.decode(self.ids)[self.written :]


class Screen:
    """Writes tokens as they come: on a terminal without control characters, and green where they were drafted."""

    def __init__(self, out: TextIO, decode: Callable[[Sequence[int]], str], show: bool) -> None:
        self.out, self.text, self.is_terminal = out, Incremental(decode), out.isatty()
        self.is_coloured = show and self.is_terminal and not os.environ.get("NO_COLOR")

    def tokens(self, tokens: list[int]) -> None:
        """What one target forward yields: accepted drafts, and one token that the target chose."""
        for index, token in enumerate(tokens):
            self._say(self.text.push([token]), drafted=index < len(tokens) - 1)

    def end(self) -> None:
        self._say(self.text.end(), drafted=False)
        self.out.write("\n")

    def _say(self, piece: str, drafted: bool) -> None:
        if self.is_terminal:
            piece = piece.translate(_CONTROLS)
        self.out.write(f"{GREEN}{piece}{RESET}" if self.is_coloured and drafted and piece else piece)
        self.out.flush()


def run(request: Namespace, out: TextIO) -> None:
    """Write the text to `out`, the rest to standard error. request: the options of `cpdlm generate`.

    Raises ConfigError, RunError or ValueError on bad input.
    """
    sampling, opened, ids, new_tokens = _checked(request)
    from cpdlm.text import Model

    model = Model(opened.load(), request.weights)
    for sentence in model.told:
        print(sentence, file=sys.stderr)

    def write(draft: str | None, on_tokens: OnTokens | None = None) -> Decoded:
        return model.write(ids, new_tokens, sampling, request.seed, draft, on_tokens)

    screen = Screen(out, opened.tokenizer.decode, request.show)
    write(request.draft, lambda row, tokens: screen.tokens(tokens))
    screen.end()
    if request.show:
        if screen.is_coloured:
            print(f"{GREEN}green{RESET}: drafted and accepted", file=sys.stderr)
        print(_speed(lambda: write(request.draft), lambda: write("none")), file=sys.stderr)


def _checked(request: Namespace) -> tuple[Sampling, Opened, list[int], int]:
    """What the small files of the model say to the request; the ids and how many tokens to write."""
    from cpdlm.decoding import Sampling
    from cpdlm.hf.load import open_source
    from cpdlm.text import check_seed, fitting

    sampling = Sampling(request.temperature, request.top_k, request.top_p)
    check_seed(request.seed)
    prompt = _standard_input() if request.prompt is None else request.prompt
    opened = open_source(request.model, request.draft_vocabulary == "own", widen=True)
    ids, new_tokens = fitting(prompt, request.chat, request.max_new_tokens, opened.tokenizer, opened.context)
    return sampling, opened, ids, new_tokens


def _speed(drafting: Callable[[], Decoded], autoregressive: Callable[[], Decoded]) -> str:
    timed = [(_timed(drafting), _timed(autoregressive)) for _ in range(REPEATS)]
    ours, rate = max((mine for mine, _ in timed), key=lambda each: each[1])
    base = max(other for _, (_, other) in timed)
    tokens = len(ours.tokens)
    return (
        f"{tokens} tokens in {ours.forwards} target forwards: {tokens / ours.forwards:.2f} tokens per forward\n"
        f"{rate:.0f} tokens/s; autoregressive decoding of the same prompt {base:.0f} tokens/s: {rate / base:.2f} x "
        f"(the fastest of {REPEATS} runs each, by turns, without printing)"
    )


def _timed(write: Callable[[], Decoded]) -> tuple[Decoded, float]:
    """The output, and tokens per second. (A forward ends with a copy to the host, which synchronises.)"""
    began = time.perf_counter()
    done = write()
    return done, len(done.tokens) / (time.perf_counter() - began)


def _standard_input() -> bytes | str:
    if sys.stdin.isatty():
        print("prompt (Ctrl-D ends it):", file=sys.stderr)
    given = sys.stdin.buffer.read()
    return given.removesuffix(b"\n").removesuffix(b"\r")
