"""Text to ids and back behind one small interface: bytes, a BPE trained on the corpus, or a Hugging Face tokenizer.

Documents are bytes throughout; only the tokenizers that need text decode them. A document is encoded without special
tokens: [bos] and [eos] are put round it by the corpus. `token_bytes` says how many bytes of text each id stands for, so
that bits per byte can be computed from ids alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpdlm.config import ConfigError
from cpdlm.config.words import first_line
from cpdlm.data.chat_template import OTHER_TEXT, Message, conversation, no_template, rendered
from cpdlm.data.pretrained_files import brings_code, check_hub
from cpdlm.files import write_json

END = "<|endoftext|>"
DESCRIBED = "tokenizer.json"  # name, size, bos and eos of a stored tokenizer
TRAINING_BYTES = 8 * 2**20  # a BPE is trained on this much of the train split, documents in hash order


class Tokenizer(ABC):
    """What the rest of the project knows of a tokenizer; one without a chat template, where a class says no more."""

    name: str  # as in data.tokenizer
    vocab_size: int
    bos: int
    eos: int

    @abstractmethod
    def encode(self, documents: Sequence[bytes | str]) -> list[NDArray[np.integer]]:
        """Ids of each document, without bos and eos. ConfigError where a document is no text the tokenizer can read."""

    def prompt(self, text: bytes | str, chat: bool = False) -> list[int]:
        """Ids from which a model continues a text as it has seen documents: special tokens of its tokenizer included.

        chat: as a user's turn, by the tokenizer's chat template.
        ConfigError where it has none, or cannot read the text.
        """
        if chat:
            raise no_template(self.name, "leave --chat out")
        return [self.bos, *(int(each) for each in self.encode([text])[0])]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """(ids by the chat template, which of them are an answer's), up to the last answer.

        An answer is what the template puts behind its prompt for one, up to the first special token, included.
        ConfigError where there is no template, or one that changes earlier turns.
        """
        raise no_template(self.name, OTHER_TEXT)

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of some ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> NDArray[np.int64]:
        """(V,) bytes of text behind each id; 0 for special tokens."""

    def described(self) -> dict[str, Any]:
        """What `SavedTokenizer` needs beside its files, JSON-able."""
        return {"name": self.name, "vocab_size": self.vocab_size, "bos": self.bos, "eos": self.eos}

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the files that `SavedTokenizer` needs."""


class BytesTokenizer(Tokenizer):
    """Ids 0..255 are bytes; 256 is <|endoftext|>, both bos and eos. Takes any bytes, UTF-8 or not."""

    name = "bytes"
    vocab_size = 257
    bos = eos = 256

    def encode(self, documents: Sequence[bytes | str]) -> list[NDArray[np.integer]]:
        return [np.frombuffer(each.encode() if isinstance(each, str) else each, dtype=np.uint8) for each in documents]

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", errors="replace")

    def token_bytes(self) -> NDArray[np.int64]:
        return np.array([1] * 256 + [0])

    def save(self, folder: Path) -> None:
        """Nothing to keep."""


class BpeTokenizer(Tokenizer):
    """Byte-level BPE. Its last id is <|endoftext|>, both bos and eos, kept outside the BPE itself so that the same
    characters in a document stay ordinary text."""

    FILE = "bpe.json"

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.vocab_size, self._model = name, model.get_vocab_size() + 1, model
        self.bos = self.eos = self.vocab_size - 1

    @classmethod
    def train(cls, name: str, documents: Sequence[bytes]) -> BpeTokenizer:
        """name: bpe:SIZE, SIZE counting <|endoftext|>. Fewer ids (and a warning) where the text yields fewer merges."""
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, trainers

        size = int(name.partition(":")[2])
        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size - 1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=sys.stderr.isatty(),
        )
        sizes = np.cumsum([len(document) for document in documents])
        few = list(itertools.islice(documents, int((sizes <= TRAINING_BYTES).sum()) or 1))
        model.train_from_iterator(_texts(few, name), trainer)
        if model.get_vocab_size() < size - 1:
            warnings.warn(f"{name}: the corpus yields only {model.get_vocab_size() + 1} tokens", stacklevel=2)
        return cls(name, model)

    def encode(self, documents: Sequence[bytes | str]) -> list[NDArray[np.integer]]:
        encoded = self._model.encode_batch(_texts(documents, self.name), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int64) for one in encoded]

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        text: str = self._model.decode([int(i) for i in ids if int(i) != self.eos])
        return text

    def token_bytes(self) -> NDArray[np.int64]:
        # In the byte-level alphabet one character stands for one byte.
        lengths = [len(self._model.id_to_token(i)) for i in range(self.vocab_size - 1)]
        return np.array([*lengths, 0])

    def save(self, folder: Path) -> None:
        self._model.save(str(folder / self.FILE))


class HubTokenizer(Tokenizer):
    """A Hugging Face tokenizer with an end-of-sequence token; bos is its own, or eos where it has none."""

    FOLDER = "hf"

    def __init__(self, name: str, source: str | Path) -> None:
        self.name = name
        if not Path(source).exists():
            check_hub(str(source), f"data.tokenizer={name}")
        try:
            from transformers import AutoTokenizer

            self._model = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        except Exception as error:  # the hub, the file system and the tokenizer classes all raise their own
            if brings_code(error):
                raise ConfigError(
                    f"data.tokenizer={name} brings code of its own (auto_map in {source}), which is not executed; "
                    "give a tokenizer that transformers has"
                ) from error
            reason = first_line(error)
            advice = (
                "Give a Hugging Face name or a local folder (hf:./folder), or type data.tokenizer=bpe:8192 or bytes"
            )
            if name.startswith("model"):
                advice = f"Put the model's own tokenizer into {source}, or name it: data.tokenizer=hf:NAME"
            raise ConfigError(
                f"data.tokenizer={name} cannot be loaded ({type(error).__name__}: {reason}). {advice}"
            ) from error
        if len(self._model) <= len(self._model.all_special_ids):  # what the library makes of a folder without one
            raise ConfigError(
                f"data.tokenizer={name}: {source} holds no tokenizer (tokenizer.json and its like); put the model's "
                "own there, or name it: data.tokenizer=hf:NAME"
            )
        if self._model.eos_token_id is None:
            raise ConfigError(
                f"data.tokenizer={name} has no end-of-sequence token, which separates documents; type "
                "data.tokenizer=bpe:8192 or bytes"
            )
        self.vocab_size = len(self._model)
        self.has_template = bool(self._model.chat_template)
        self.eos = int(self._model.eos_token_id)
        self.bos = self.eos if self._model.bos_token_id is None else int(self._model.bos_token_id)

    def encode(self, documents: Sequence[bytes | str]) -> list[NDArray[np.integer]]:
        encoded = self._model(
            _texts(documents, self.name), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return [np.array(ids, dtype=np.int64) for ids in encoded]

    def prompt(self, text: bytes | str, chat: bool = False) -> list[int]:
        (content,) = _texts([text], self.name)
        if not chat:
            return [int(each) for each in self._model(content, verbose=False)["input_ids"]]
        (prompt,) = rendered(
            self._model, self.name, [([{"role": "user", "content": content}], True)], "leave --chat out"
        )
        return [int(each) for each in self._model(prompt, add_special_tokens=False, verbose=False)["input_ids"]]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        return conversation(self._model, self.name, messages)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        return str(self._model.decode([int(i) for i in ids], skip_special_tokens=True))

    def token_bytes(self) -> NDArray[np.int64]:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        alphabet, special = set(bytes_to_unicode().values()), set(self._model.all_special_ids)
        tokens = self._model.convert_ids_to_tokens(list(range(self.vocab_size)))
        # The space of a byte-level vocabulary is written U+0120, that of a sentencepiece one U+2581.
        marks = ["".join(token or "" for token in tokens).count(mark) for mark in ("\u0120", "\u2581")]
        byte_level = marks[0] > marks[1]
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for index, token in enumerate(tokens):
            if token is None or index in special:
                continue
            if byte_level and set(token) <= alphabet:
                lengths[index] = len(token)
            elif len(token) == 6 and token.startswith("<0x"):
                lengths[index] = 1
            else:
                lengths[index] = len(token.replace("\u2581", " ").encode())
        return lengths

    def save(self, folder: Path) -> None:
        self._model.save_pretrained(str(folder / self.FOLDER))


@lru_cache(maxsize=8)
def tokenizer_hash(source: str, name: str = "model") -> str:
    """sha256 of what a Hugging Face tokenizer does: ids, special tokens, what begins a text, the chat template.

    name: as in data.tokenizer. ConfigError as HubTokenizer.
    """
    tokenizer = HubTokenizer(name, source)
    model = tokenizer._model
    backend = getattr(model, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(model.get_vocab().items()))
    behaviour = [tokenizer.bos, tokenizer.eos, tokenizer.prompt("a"), model.chat_template, model.special_tokens_map]
    return hashlib.sha256(f"{content} {json.dumps(behaviour, sort_keys=True, default=str)}".encode()).hexdigest()


def store_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a folder that is there, so that `stored_tokenizer` needs nothing else."""
    tokenizer.save(folder)
    np.save(folder / "token_bytes.npy", tokenizer.token_bytes().astype(np.int64))
    write_json(folder / DESCRIBED, tokenizer.described())  # last: it says that the rest is there


def stored_tokenizer(folder: Path) -> SavedTokenizer | None:
    """The tokenizer that lies in a folder; None where there is none. ConfigError for a damaged one."""
    if not (folder / DESCRIBED).is_file():
        return None
    try:
        what = json.loads((folder / DESCRIBED).read_text())
        return SavedTokenizer(**what, folder=folder, token_bytes=np.load(folder / "token_bytes.npy"))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder} holds a damaged tokenizer ({type(error).__name__}: {error})") from error


class SavedTokenizer(Tokenizer):
    """A tokenizer in a token cache or bundle: ids need only numpy; text loads the real one at the first call."""

    def __init__(
        self, name: str, vocab_size: int, bos: int, eos: int, folder: Path, token_bytes: NDArray[np.int64]
    ) -> None:
        self.name, self.vocab_size, self.bos, self.eos = name, vocab_size, bos, eos
        self._folder, self._token_bytes = folder, token_bytes

    @cached_property
    def _real(self) -> Tokenizer:
        kind = self.name.partition(":")[0]
        if kind == "bytes":
            return BytesTokenizer()
        if kind == "bpe":
            from tokenizers import Tokenizer as Model

            return BpeTokenizer(self.name, Model.from_file(str(self._folder / BpeTokenizer.FILE)))
        return HubTokenizer(self.name, self._folder / HubTokenizer.FOLDER)

    def encode(self, documents: Sequence[bytes | str]) -> list[NDArray[np.integer]]:
        return self._real.encode(documents)

    def prompt(self, text: bytes | str, chat: bool = False) -> list[int]:
        return self._real.prompt(text, chat)

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        return self._real.conversation(messages)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        return self._real.decode(ids)

    def token_bytes(self) -> NDArray[np.int64]:
        return self._token_bytes

    def save(self, folder: Path) -> None:
        self._real.save(folder)


def build_tokenizer(name: str, train_documents: Sequence[bytes], source: str | None = None) -> Tokenizer:
    """The tokenizer of that name; a BPE is trained on the given documents. source: folder or hub name of a pretrained
    model whose own it is. Raises as the classes say."""
    kind, _, rest = name.partition(":")
    if kind == "bytes":
        return BytesTokenizer()
    if kind == "bpe":
        return BpeTokenizer.train(name, train_documents)
    return HubTokenizer(name, source or rest)


def _texts(documents: Sequence[bytes | str], name: str) -> list[str]:
    try:
        return [document if isinstance(document, str) else document.decode() for document in documents]
    except UnicodeDecodeError as error:
        start = error.object[max(0, error.start - 20) : error.start + 8]
        raise ConfigError(
            f"data.tokenizer={name} needs UTF-8 text, and a document of the corpus is not (byte {error.start}, near "
            f"{start!r}); type data.tokenizer=bytes, or convert the file"
        ) from error
