"""Where a model's own text begins: a function up to its body, a conversation up to an answer, a document's start.

What a model writes after such prompts is what its drafts meet in use.
"""

import ast
import textwrap
import warnings
from collections.abc import Iterator

import numpy as np

from cpdlm.config import ConfigError
from cpdlm.data import windows
from cpdlm.data.stored import TokenSplit
from cpdlm.data.tokenizer import Tokenizer

START = 32  # tokens of a document's start
_OPENINGS = 7  # keeps its draws apart from those of `batches`


def openings(how: str, split: TokenSplit, tokenizer: Tokenizer, most: int) -> Iterator[list[int]]:
    """Prompts of `most` tokens at most, one from every document in an order given by a hash, then a second, and so on.

    how: functions, conversations or starts. ConfigError where conversations are asked of a split without.
    """
    if how == "conversations" and split.trained is None:
        raise ConfigError(
            "data.prompts=conversations needs a corpus of conversations: type corpus=chat, or give a FILE.jsonl"
        )
    within = {"functions": _functions, "conversations": _conversations, "starts": _starts}[how]
    later: list[list[list[int]]] = []
    for document in windows.hash_order(split.documents, _OPENINGS).tolist():
        if found := [each for each in within(split, document, tokenizer) if 0 < len(each) <= most]:
            first, *rest = (found[index] for index in windows.hash_order(len(found), _OPENINGS, document))
            yield first
            later.append(rest)
    for turn in range(max(map(len, later), default=0)):
        yield from (rest[turn] for rest in later if turn < len(rest))


def _functions(split: TokenSplit, document: int, tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.prompt(text) for text in function_heads(tokenizer.decode(_tokens(split, document)))]


def function_heads(source: str) -> list[str]:
    """The lines of every function with a docstring and more, from `def` to the docstring's last, moved to the margin.

    Not of tests and private functions, whose docstrings say little; none of a text that is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in old sources
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
    lines = source.split("\n")
    found = []
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) and len(node.body) > 1:
            if node.name.startswith(("_", "test")):
                continue
            end = node.body[0].end_lineno or 0
            head = textwrap.dedent("\n".join(lines[node.lineno - 1 : end]) + "\n")
            if head.startswith("def") and end < node.body[1].lineno:
                found.append(head)
    return found


def _conversations(split: TokenSplit, document: int, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens before every answer."""
    assert split.trained is not None
    tokens_T = _tokens(split, document)
    answered_T = split.trained[split.offsets[document] : split.offsets[document + 1]]
    begins = np.flatnonzero(answered_T[1:] & ~answered_T[:-1]) + 1
    return [[int(each) for each in tokens_T[:begin]] for begin in begins]


def _starts(split: TokenSplit, document: int, tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.prompt(tokenizer.decode(_tokens(split, document)[: START + 1]))]


def _tokens(split: TokenSplit, document: int) -> windows.Ints:
    return split.tokens[split.offsets[document] : split.offsets[document + 1]].astype(np.int64)
