"""Conversations as documents: from the lines of a file to turns, and from turns to bytes and back.

A document is the JSON list of [role, content] pairs, so that splits and near-duplicates see little but what was said.
"""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cpdlm.config import ConfigError

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


def written(turns: Iterable[tuple[str, str]]) -> bytes:
    """The document of (role, content) pairs."""
    return json.dumps(list(turns), ensure_ascii=False).encode()


def messages(document: bytes) -> list[dict[str, str]]:
    """The turns of a document, as chat templates take them."""
    return [{"role": role, "content": content} for role, content in json.loads(document)]


def read_conversations(path: Path, content: bytes, name: str, skip_broken: bool = False) -> list[bytes]:
    """The conversations of a file of JSON lines: `messages` with role and content, or `conversations` with from and
    value. ConfigError, naming the line, where one is broken, or has no such turns or no answer.

    name: of the corpus, for messages. skip_broken: leave such lines out, with a warning that names the first;
    ConfigError where none is left.
    """
    found, broken = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                found.append(written(_turns(json.loads(line))))
            except ValueError as error:
                what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                broken.append(f"line {number} of {path.name} is no conversation ({what})")
    if broken and not (skip_broken and found):
        raise ConfigError(
            f"corpus={name}: {broken[0]}; a line is "
            '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}; '
            + ("no line is one" if skip_broken else "--skip-broken (data.skip_broken=true) leaves out what is none")
        )
    if broken:
        warnings.warn(f"corpus={name}: {len(broken)} lines are left out: {broken[0]}", stacklevel=2)
    return found


def _turns(entry: Any) -> list[tuple[str, str]]:
    """ValueError, in words, where `entry` is no conversation."""
    if not isinstance(entry, dict) or not ("messages" in entry or "conversations" in entry):
        raise ValueError("it has neither messages nor conversations")
    key, role, content = ("messages", "role", "content") if "messages" in entry else ("conversations", "from", "value")
    turns = []
    for place, message in enumerate(entry[key] if isinstance(entry[key], list) else [entry[key]], start=1):
        if not isinstance(message, dict) or role not in message:
            raise ValueError(f"message {place} has no {role}")
        if str(message[role]) not in ROLES:
            raise ValueError(f"message {place} has {role}={message[role]!r}, not one of {', '.join(ROLES)}")
        if not isinstance(message.get(content), str):
            raise ValueError(f"message {place} has no {content}")
        turns.append((ROLES[str(message[role])], message[content]))
    said = [each for each, _ in turns if each != "system"]
    if "assistant" not in said or said[0] == "assistant":
        raise ValueError("it has no answer to a user's message")
    return turns
