"""Training text that the frozen model writes itself: prompts of the corpus, continued by the target's distribution.

Heads that draft for a model meet its text when they are used, not the corpus. What is written is kept, a batch at a
time: a killed run goes on, and every run that asks for the same text reads the same.

FOLDER/origin.json     what it was written from and how: hashes of model and corpus, prompts, seed, sampling
FOLDER/NNNNN.npz       of one batch: tokens, lengths of the documents, lengths of their prompts

Letters: P prompts of a batch, T tokens of a prompt.
"""

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpdlm.config import ConfigError
from cpdlm.data.batches import prompts
from cpdlm.data.openings import openings
from cpdlm.data.stored import TokenSplit
from cpdlm.data.tokenizer import Tokenizer
from cpdlm.data.windows import hash_order
from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.loop import decode_batch
from cpdlm.decoding.prepared import prepare
from cpdlm.files import LOCK_SECONDS, replaced, write_json
from cpdlm.model.language_model import LanguageModel
from cpdlm.progress import Bar
from cpdlm.training.states import folder_of, kept_folder

ORIGIN = "origin.json"
SAMPLINGS = {"greedy": Sampling(0.0), "sampled": Sampling()}  # of data.text
PROMPT = 32  # tokens of the corpus that begin a document
POOL = 4  # batches whose prompts are sorted by length together
SEED = 0  # one text for all runs


@dataclass(frozen=True)
class Writing:
    """What to write: `tokens` tokens at least, in documents of `context` tokens, fewer where an end comes before.

    how: of `SAMPLINGS`, the setting `data.text`. prompts: the setting `data.prompts`.
    """

    how: str
    tokens: int
    context: int
    tokenizer: Tokenizer
    prompts: str = "windows"

    @property
    def plan(self) -> dict[str, Any]:
        """What names the folder. More text of the same prompts is the same text and more, but for windows."""
        plan = {"text": self.how, "batch": self.batch, "seed": SEED, "temperature": SAMPLINGS[self.how].temperature}
        if self.prompts == "windows":
            return plan | {"tokens": self.tokens, "prompt_tokens": PROMPT, "most_new_tokens": self.context - PROMPT}
        return plan | {"prompts": self.prompts, "most_prompt_tokens": self.most_prompt_tokens, "context": self.context}

    @property
    def batch(self) -> int:
        """Documents written at once."""
        return 128 if self.prompts == "windows" else 64

    @property
    def most_prompt_tokens(self) -> int:
        return PROMPT if self.prompts == "windows" else self.context * 3 // 4

    @property
    def ends(self) -> list[int]:
        """Tokens that end a document: eos and, in conversations, what ends an answer."""
        if self.prompts != "conversations":
            return [self.tokenizer.eos]
        ids, answered = self.tokenizer.conversation(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
        return [self.tokenizer.eos, ids[len(answered) - 1 - answered[::-1].index(True)]]

    def batches(self, split: TokenSplit) -> Iterator[list[Tensor]]:
        """Prompts that are written on together: of like lengths, since a batch stops where its longest is full."""
        if self.prompts == "windows":
            yield from map(list, prompts(split, self.tokens // PROMPT, PROMPT).split(self.batch))
            return
        found = self._openings(split)
        for number in itertools.count():
            pool = sorted(itertools.islice(found, POOL * self.batch), key=len)
            if not pool:
                return
            for index in hash_order(-(-len(pool) // self.batch), number).tolist():
                yield [torch.tensor(prompt) for prompt in pool[index * self.batch : (index + 1) * self.batch]]

    def _openings(self, split: TokenSplit) -> Iterator[list[int]]:
        """Once, or over and over where the model samples: it goes on otherwise each time."""
        for turn in itertools.count():
            found = openings(self.prompts, split, self.tokenizer, self.most_prompt_tokens)
            first = next(found, None)
            if first is None or (turn > 0 and self.how == "greedy"):
                return
            yield from itertools.chain([first], found)


def written_text(
    model: LanguageModel,
    split: TokenSplit,
    writing: Writing,
    cache: Path,
    identity: dict[str, Any],
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
    seconds: float = LOCK_SECONDS,
) -> tuple[TokenSplit, dict[str, Any]]:
    """Documents that begin as those of `split` do and that the model continues; and the content of origin.json.

    identity: what the text depends on besides `writing`, the hashes of model and corpus. Raises ConfigError where the
    split has too few prompts, WriteError where the disk is full or another process writes it for longer than `seconds`;
    what is done stays.
    """
    if writing.context <= PROMPT:
        raise ConfigError(
            f"data.text={writing.how} begins documents with {PROMPT} tokens; raise data.context={writing.context}"
        )
    plan = identity | writing.plan
    parts = _kept(folder_of(cache / "written", plan), writing.tokens)
    if parts is None:
        with kept_folder(cache / "written", plan, seconds) as folder:
            say(f"the model writes {writing.tokens:,} tokens of training text ({writing.how}): {folder}")
            write_json(folder / ORIGIN, plan)
            _write(model, split, writing, folder, device)
            parts = _kept(folder, writing.tokens)
    assert parts is not None
    ids, lengths = (np.concatenate([part[name] for part in parts]) for name in ("tokens", "lengths"))
    trained = None
    if writing.prompts != "windows":
        after = np.concatenate([part["prompts"] for part in parts])
        ids, lengths, trained = packed(ids, lengths, after, writing.context, writing.tokenizer.eos)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    zeros = np.zeros(len(lengths), np.int32), np.zeros(len(lengths), np.int64)
    text = TokenSplit(ids, offsets, *zeros, ["the model itself"], trained)
    return text, plan | {"sha256": hashlib.sha256(ids.tobytes() + lengths.tobytes()).hexdigest()}


def packed(
    tokens: NDArray[Any], lengths: NDArray[Any], prompts: NDArray[Any], context: int, filler: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """(tokens, lengths, which tokens are trained on) of the documents in an order in which no row of `context` tokens
    cuts one: what the model wrote is then seen behind its whole prompt, as in use.

    lengths: of the documents, `context` at most. prompts: of the tokens that begin them, which are not trained on. What
    stays free of a row is a document of `filler`, not trained on either.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(context)]
    for document in np.argsort(-lengths, kind="stable").tolist():  # best fit, the longest first
        length = int(lengths[document])
        room = next((room for room in range(length, context) if by_room[room]), context)
        if room == context:
            rows.append([])
        row = by_room[room].pop() if room < context else len(rows) - 1
        rows[row].append(document)
        by_room[room - length].append(row)
    begins = np.cumsum(lengths) - lengths
    parts, sizes, marks = [], [], []
    for held in rows:
        for document in held:
            begin, length = int(begins[document]), int(lengths[document])
            parts.append(tokens[begin : begin + length])
            marks.append(np.arange(length) >= prompts[document])
            sizes.append(length)
        if free := context - int(lengths[held].sum()):
            parts.append(np.full(free, filler, tokens.dtype))
            marks.append(np.zeros(free, np.bool_))
            sizes.append(free)
    return np.concatenate(parts), np.array(sizes, np.int64), np.concatenate(marks)


def _kept(folder: Path, tokens: int) -> list[dict[str, NDArray[Any]]] | None:
    """The first parts that hold so many tokens; None where they are not all there."""
    parts: list[dict[str, NDArray[Any]]] = []
    while sum(int(part["lengths"].sum()) for part in parts) < tokens:
        path = folder / f"{len(parts):05d}.npz"
        if not path.is_file():
            return None
        with np.load(path) as arrays:
            parts.append(dict(arrays))
    return parts


def _write(model: LanguageModel, split: TokenSplit, writing: Writing, folder: Path, device: torch.device) -> None:
    model = _fast(model.to(device).eval(), device)
    paths = (folder / f"{number:05d}.npz" for number in itertools.count())
    kept = [int(np.load(path)["lengths"].sum()) for path in itertools.takewhile(Path.is_file, paths)]
    done, sampling, ends = sum(kept), SAMPLINGS[writing.how], writing.ends
    with Bar(total=writing.tokens, initial=done, desc=f"writing ({writing.how})", unit="token") as bar:
        for number, batch in enumerate(writing.batches(split)):
            if number < len(kept):
                continue
            rows = decode_batch(
                model,
                [prompt_T.to(device) for prompt_T in batch],
                writing.context - max(map(len, batch)),
                sampling,
                [torch.Generator().manual_seed(SEED + number * writing.batch + index) for index in range(len(batch))],
                eos=ends,
                draft="none",
            )
            documents = [[*prompt_T.tolist(), *row.tokens] for prompt_T, row in zip(batch, rows, strict=True)]
            with replaced(folder / f"{number:05d}.npz") as temporary, open(temporary, "wb") as file:
                np.savez(
                    file,
                    tokens=np.array([token for each in documents for token in each], split.tokens.dtype),
                    lengths=np.array([len(each) for each in documents]),
                    prompts=np.array([len(prompt_T) for prompt_T in batch]),
                )
            written = sum(map(len, documents))
            done += written
            bar.update(written)
            if done >= writing.tokens:
                return
    raise ConfigError(
        f"data.text={writing.how}: the corpus has prompts for {done:,} tokens of the model's own text, "
        f"data.states={writing.tokens} are asked for; lower it, or raise data.max_bytes if it is set"
    )


def _fast(model: LanguageModel, device: torch.device) -> LanguageModel:
    """As it decodes fastest here: on a processor a copy, since what is prepared cannot train."""
    if device.type != "cpu":
        return model
    model = copy.deepcopy(model)
    prepare(model)
    return model
