"""Training text that the frozen model writes itself: prompts of the corpus, continued by the target's distribution.

Heads that draft for a model meet its text when they are used, not the corpus. What is written is kept, a batch at a
time: a killed run goes on, and every run that asks for the same text reads the same.

FOLDER/origin.json     what it was written from and how: hashes of model and corpus, prompts, seed, sampling
FOLDER/NNNNN.npz       tokens and document lengths of one batch

Letters: P prompts of a batch, T tokens of a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cpdlm.config import ConfigError
from cpdlm.data.batches import prompts
from cpdlm.data.stored import TokenSplit
from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.loop import decode_batch
from cpdlm.files import LOCK_SECONDS, replaced, write_json
from cpdlm.model.language_model import LanguageModel
from cpdlm.training.states import kept_folder

ORIGIN = "origin.json"
SAMPLINGS = {"greedy": Sampling(0.0), "sampled": Sampling()}  # of data.text
PROMPT = 32  # tokens of the corpus that begin a document
BATCH = 128  # documents written at once
SEED = 0  # one text for all runs


@dataclass(frozen=True)
class Writing:
    """What to write: `tokens` tokens at least, in documents of `context` tokens, fewer where `eos` ends one before.

    how: of `SAMPLINGS`, the setting `data.text`.
    """

    how: str
    tokens: int
    context: int
    eos: int


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
    room = writing.context - PROMPT
    if room < 1:
        raise ConfigError(
            f"data.text={writing.how} begins documents with {PROMPT} tokens; raise data.context={writing.context}"
        )
    plan = identity | {
        "text": writing.how,
        "tokens": writing.tokens,
        "prompt_tokens": PROMPT,
        "most_new_tokens": room,
        "batch": BATCH,
        "seed": SEED,
        "temperature": SAMPLINGS[writing.how].temperature,
    }
    with kept_folder(cache / "written", plan, seconds) as folder:
        if not (folder / ORIGIN).is_file():
            say(f"the model writes {writing.tokens:,} tokens of training text ({writing.how}): {folder}")
            _write(model, split, writing, folder, device)
            write_json(folder / ORIGIN, plan)
    parts = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    ids, lengths = (np.concatenate([part[name] for part in parts]) for name in ("tokens", "lengths"))
    return TokenSplit(
        ids,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.zeros(len(lengths), np.int32),
        np.zeros(len(lengths), np.int64),
        ["the model itself"],
    ), plan | {"sha256": hashlib.sha256(ids.tobytes() + lengths.tobytes()).hexdigest()}


def _write(model: LanguageModel, split: TokenSplit, writing: Writing, folder: Path, device: torch.device) -> None:
    model = model.to(device).eval()
    done, sampling = 0, SAMPLINGS[writing.how]
    with tqdm(total=writing.tokens, desc=f"writing ({writing.how})", unit="token") as bar:
        for number, prompts_PT in enumerate(prompts(split, writing.tokens // PROMPT, PROMPT).split(BATCH)):
            path = folder / f"{number:05d}.npz"
            if not path.is_file():
                indices = range(number * BATCH, number * BATCH + len(prompts_PT))
                rows = decode_batch(
                    model,
                    list(prompts_PT.to(device)),
                    writing.context - PROMPT,
                    sampling,
                    [torch.Generator().manual_seed(SEED + index) for index in indices],
                    eos=writing.eos,
                    draft="none",
                )
                documents = [[*prompt, *row.tokens] for prompt, row in zip(prompts_PT.tolist(), rows, strict=True)]
                with replaced(path) as temporary, open(temporary, "wb") as file:
                    np.savez(
                        file,
                        tokens=np.array([token for each in documents for token in each], split.tokens.dtype),
                        lengths=np.array([len(each) for each in documents]),
                    )
            written = int(np.load(path)["lengths"].sum())
            done += written
            bar.update(written)
            if done >= writing.tokens:
                return
    raise ConfigError(
        f"data.text={writing.how}: the corpus has prompts for {done:,} tokens of the model's own text, "
        f"data.states={writing.tokens} are asked for; lower it, or raise data.max_bytes if it is set"
    )
