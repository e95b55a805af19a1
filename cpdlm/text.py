"""Text in, text out: what `cpdlm.load` gives, and `cpdlm generate` writes with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cpdlm.config import ConfigError
from cpdlm.data.tokenizer import Tokenizer
from cpdlm.decoding import Captures, Decoded, Options, Sampling, decode, prepare
from cpdlm.decoding.filtering import is_whole
from cpdlm.decoding.prepared import paying
from cpdlm.hf.load import Loaded, load

NEW_TOKENS = 128
OnTokens = Callable[[int, list[int]], None]


class Model:
    """A model with its tokenizer and its heads, on the GPU where there is one; `cpdlm.load` makes it.

    loaded: its parts; `loaded.model` is the module, `loaded.tokenizer` maps text and ids. told: how its weights are
    held, in sentences.
    """

    def __init__(self, loaded: Loaded, weights: str = "auto") -> None:
        self.loaded, self.device = loaded, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.told = prepare(loaded.model.to(self.device), weights).sentences
        self._captures: dict[str, Captures] = {}

    def generate(self, prompt: str, max_new_tokens: int | None = None, **options: Any) -> str:
        """What the model writes behind `prompt`, without the prompt.

        options: those of `decode`, whose errors it raises.

        >>> model = cpdlm.load(folder)
        >>> text = model.generate("def f1(", max_new_tokens=8, temperature=1.0, seed=3)
        >>> text == model.generate("def f1(", max_new_tokens=8, temperature=1.0, seed=3)
        True
        """
        return self.loaded.tokenizer.decode(self.decode(prompt, max_new_tokens, **options).tokens)

    def decode(
        self,
        prompt: str,
        max_new_tokens: int | None = None,
        *,
        chat: bool = False,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        draft: str | None = None,
    ) -> Decoded:
        """As `generate`: the ids, and how they came about.

        max_new_tokens: default 128, or what the context has room for. chat: put the prompt as a user's turn, by the
        model's chat template. temperature: 0 for the likeliest tokens (default), 1 for the model's distribution.
        top_k, top_p, seed: of sampling. draft: how drafts are made, "none" for none, or another name of
        `cpdlm generate --draft`; the distribution of the text is the same with each. Raises ValueError for a prompt
        that is empty or does not fit, and for options that do not.

        >>> done = cpdlm.load(folder).decode("def f1(", max_new_tokens=8)
        >>> len(done.tokens), done.forwards <= 8
        (8, True)
        """
        check_seed(seed)
        ids, new_tokens = fitting(prompt, chat, max_new_tokens, self.loaded.tokenizer, self.loaded.model.context)
        return self.write(ids, new_tokens, Sampling(temperature, top_k, top_p), seed, draft)

    def write(
        self,
        ids: list[int],
        new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        draft: str | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Decoded:
        """`decode` of ids that fit. on_tokens: as of `decoding.Options`."""
        best, nodes = self.loaded.drafting
        draft = draft or paying(best, self.loaded.model.weights)
        captures = self._captures.setdefault(draft, Captures(self.loaded.model))
        forwards = captures(1, len(ids) + new_tokens, sampling, draft, nodes)
        return decode(
            self.loaded.model,
            torch.tensor(ids, device=self.device),
            new_tokens,
            sampling,
            torch.Generator(self.device).manual_seed(seed),
            draft=draft,
            eos=self.loaded.eos,
            options=Options(nodes=nodes, forwards=forwards, on_tokens=on_tokens),
        )


def load_model(source: Path, weights: str = "auto") -> Model:
    """`cpdlm.load`."""
    return Model(load(source, widen=True), weights)


def check_seed(seed: Any) -> None:
    if not is_whole(seed, 0) or seed >= 2**63:
        raise ConfigError(f"--seed={seed!r} must be a whole number between 0 and {2**63 - 1}")


def fitting(
    prompt: str | bytes, chat: bool, most: int | None, tokenizer: Tokenizer, context: int
) -> tuple[list[int], int]:
    """(ids of the prompt, how many tokens to write). ConfigError where they do not fit the context."""
    ids = tokenizer.prompt(prompt, chat) if prompt else []
    if not ids:
        raise ConfigError("the prompt is empty; give --prompt TEXT, or text on standard input")
    room = context - len(ids)
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens with those that its tokenizer adds, the context of this model is "
            f"{context}; give at most {context - 1}"
        )
    new_tokens = min(NEW_TOKENS, room) if most is None else most
    if not is_whole(new_tokens):
        raise ConfigError(f"--max-new-tokens={most!r} writes nothing; give a whole number, at least 1")
    if new_tokens > room:
        raise ConfigError(
            f"a prompt of {len(ids)} tokens leaves room for {room} in the context of {context}; "
            f"give --max-new-tokens {room} or a shorter prompt"
        )
    return ids, new_tokens
