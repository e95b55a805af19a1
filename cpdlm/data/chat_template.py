"""The chat template of a Hugging Face tokenizer: how turns are written, and which tokens of that are an answer's.

A template is a foreign program, which may raise and need not end.
"""

import bisect
import ctypes
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from cpdlm.config import ConfigError
from cpdlm.config.words import first_line

TEMPLATE_SECONDS = 10.0  # that a template may take for one prompt or conversation
OTHER_TEXT = "give a corpus without conversations"

Message = Mapping[str, str]  # role (system, user or assistant) and content


def conversation(tokenizer: Any, name: str, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """What `Tokenizer.conversation` says, by the template of a tokenizer of transformers."""
    cuts = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            cuts += [(messages[:number], True), (messages[: number + 1], False)]
    texts = ["", *rendered(tokenizer, name, cuts, OTHER_TEXT)]
    for before, after in itertools.pairwise(texts):
        if not after.startswith(before):
            raise ConfigError(
                f"the chat template of the tokenizer {name} does not append an answer to its prompt "
                f"({before[-40:]!r} becomes {after[max(0, len(before) - 40) : len(before)]!r}); {OTHER_TEXT}"
            )
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer {name} does not say where its tokens stand in a text; {OTHER_TEXT}")
    # All at once, as a prompt is: alone, an answer may begin with other tokens.
    encoded = tokenizer(texts[-1], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends, special = [len(text) for text in texts[1:]], set(tokenizer.all_special_ids)
    ids, answered, ended = [int(token) for token in encoded["input_ids"]], [], -1
    for token, (begin, _) in zip(ids, encoded["offset_mapping"], strict=True):
        part = bisect.bisect_right(ends, begin)  # prompts and answers by turns
        answered.append(part % 2 == 1 and part != ended)
        if token in special:
            ended = part
    return ids, answered


def rendered(tokenizer: Any, name: str, chats: Sequence[tuple[Sequence[Message], bool]], instead: str) -> list[str]:
    """Texts by the template. ConfigError where it is missing, raises, or takes longer than TEMPLATE_SECONDS.

    chats: messages, and whether an answer's beginning is to follow. instead: what to do where it cannot be used.
    """
    if not tokenizer.chat_template:
        raise no_template(name, instead)
    done: list[list[str] | Exception] = []

    def render() -> None:
        try:
            done.append(
                [
                    str(
                        tokenizer.apply_chat_template(
                            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=answer
                        )
                    )
                    for turns, answer in chats
                ]
            )
        except Exception as error:
            done.append(error)

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if not done:
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(TimeoutError))
        done.append(TimeoutError(f"it was not done after {TEMPLATE_SECONDS:g} s"))
    if isinstance(done[0], list):
        return done[0]
    raise ConfigError(
        f"the chat template of the tokenizer {name} cannot be used: {type(done[0]).__name__}: "
        f"{first_line(done[0])}; {instead}, or mend the template"
    ) from done[0]


def no_template(name: str, instead: str) -> ConfigError:
    return ConfigError(
        f"the tokenizer {name} has no chat template, which says how a user's turn is written; {instead}, "
        "or give a model that was tuned for chat"
    )
