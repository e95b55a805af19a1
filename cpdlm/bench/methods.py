"""Ways to decode one target, by name: what `cpdlm bench` can run. A new way is a line in `METHODS`."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cpdlm.bench.contenders import (
    Compiled,
    Contender,
    EarlyExit,
    Ends,
    Ours,
    as_hugging_face,
    exit_layer,
    hugging_face,
    theirs,
)
from cpdlm.bench.llama import LlamaCpp
from cpdlm.config import ConfigError
from cpdlm.config.words import nearest
from cpdlm.decoding import Sampling
from cpdlm.decoding.length import Costs
from cpdlm.model.language_model import LanguageModel

AUTOREGRESSIVE, GENERATE, ASSISTED, LLAMA = "AR", "generate", "generate-assisted", "llama.cpp"
LOOKED_UP = 10  # tokens that transformers' prompt lookup drafts, as its own examples have it


@dataclass(frozen=True)
class Setup:
    """What all methods of a comparison share.

    model: made ready for this machine. plain: the same as transformers has it. longest: tokens of a prompt. nodes:
    drafts of a tree. eos: ids that end a text. gguf: the same model for llama.cpp. assistant: another model that drafts
    for it.
    """

    model: LanguageModel
    plain: LanguageModel
    new_tokens: int
    longest: int = 0
    eos: Ends = None
    nodes: int = 8
    gguf: Path | None = None
    assistant: LanguageModel | None = None


@dataclass(frozen=True)
class Method:
    """make: the contender for this sampling, or None where there is none. counted: whether its tokens per forward say
    something without its time. named: runs only where it is asked for. is_plain: it runs the modules of transformers.
    greedy_twin: the method that it is under greedy."""

    about: str
    make: Callable[[Setup, Sampling], Contender | None]
    needs_heads: bool = False
    counted: bool = True
    named: bool = False
    is_plain: bool = False
    greedy_twin: str = ""


def chosen(words: Sequence[str], model: LanguageModel) -> dict[str, Method]:
    """The methods of these names (none: all that suit the model) and autoregressive decoding, in the order of METHODS.

    ConfigError for a name that is none, or that drafts with heads where there are none.
    """
    for word in words:
        if word not in METHODS:
            hint = nearest(word, METHODS) or f"; give some of {', '.join(METHODS)}"
            raise ConfigError(f"--methods {word}: there is no such method{hint}")
        if METHODS[word].needs_heads and model.horizon < 2:
            raise ConfigError(
                f"--methods {word} drafts with heads, and this model has none; cpdlm speed-up trains them"
            )
    suited = {name for name, each in METHODS.items() if not each.named and (model.horizon > 1 or not each.needs_heads)}
    wanted = words or suited
    return {name: method for name, method in METHODS.items() if name == AUTOREGRESSIVE or name in wanted}


def _ours(setup: Setup, sampling: Sampling, draft: str, paying: bool = False) -> Contender:
    """paying: only as many drafts as pay on this machine."""
    costs = Costs.measure(setup.model, sampling, next(setup.model.parameters()).device) if paying else None
    return Ours(setup.model, setup.new_tokens, sampling, draft, setup.nodes, setup.eos, costs)


def _theirs(setup: Setup, sampling: Sampling, **more: Any) -> Contender | None:
    """more: arguments of its generate."""
    generate = hugging_face(setup.plain, eos=setup.eos, **more)
    return None if generate is None else theirs(generate, setup.new_tokens, sampling)


def _compiled(setup: Setup, sampling: Sampling) -> Contender | None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError("--methods generate-compiled needs a C++ compiler; install g++, or leave that method out")
    generate = hugging_face(setup.plain, static=True, eos=setup.eos)
    return None if generate is None else Compiled(generate, setup.new_tokens, sampling, setup.longest)


def _early_exit(setup: Setup, sampling: Sampling) -> Contender | None:
    write = _theirs(setup, sampling, assistant_early_exit=exit_layer(setup.plain))
    return None if write is None else EarlyExit(setup.plain, write)


def _assisted(setup: Setup, sampling: Sampling) -> Contender | None:
    assert setup.assistant is not None
    return _theirs(setup, sampling, assistant_model=as_hugging_face(setup.assistant))


def _llama(setup: Setup, sampling: Sampling, speculation: str = "") -> Contender:
    return LlamaCpp(setup.gguf, setup.new_tokens, sampling, speculation)


def _heads(about: str, draft: str, greedy_twin: str = "", paying: bool = False) -> Method:
    make = partial(_ours, draft=draft, paying=paying)
    return Method(about, make, needs_heads=True, counted=not paying, greedy_twin=greedy_twin)


METHODS = {
    AUTOREGRESSIVE: Method("our loop without drafts", partial(_ours, draft="none"), counted=False),
    GENERATE: Method("transformers' generate", _theirs, counted=False, is_plain=True),
    "generate-compiled": Method(
        "the same, compiled by torch, with a cache of fixed size", _compiled, counted=False, named=True, is_plain=True
    ),
    "generate-lookup": Method("transformers' prompt lookup", partial(_theirs, lookup=LOOKED_UP), is_plain=True),
    "generate-early-exit": Method(
        "transformers' drafts of the first third of the layers", _early_exit, named=True, is_plain=True
    ),
    ASSISTED: Method("transformers' drafts of a second model", _assisted, named=True, is_plain=True),
    "lookup": Method("our prompt lookup", partial(_ours, draft="lookup")),
    "chain": _heads("the heads' drafts as a chain", "chain"),
    "block": _heads("the same, accepted as a block", "block", greedy_twin="chain"),
    "tree": _heads("the heads' likeliest prefixes as a tree", "tree"),
    "branched": _heads("the block, with branches beside it", "branched", greedy_twin="chain"),
    "lookup+chain": _heads("prompt lookup where it finds something, else the chain", "lookup+chain"),
    "lookup+block": _heads("the same, accepted as a block", "lookup+block", greedy_twin="lookup+chain"),
    "lookup+tree": _heads("the tree, and prompt lookup as one more branch", "lookup+tree"),
    "lookup+branched": _heads(
        "branched, and prompt lookup as one more branch", "lookup+branched", greedy_twin="lookup+chain"
    ),
    "chain-paying": _heads("as many drafts of the chain as pay on this machine", "chain", paying=True),
    "lookup+chain-paying": _heads("the same of lookup+chain", "lookup+chain", paying=True),
    LLAMA: Method("llama.cpp on the GGUF file", _llama, counted=False, named=True),
    "llama.cpp-ngram-simple": Method(
        "the same, with its simple prompt lookup", partial(_llama, speculation="NGRAM_SIMPLE"), named=True
    ),
    "llama.cpp-ngram-mod": Method(
        "the same, with its hashed prompt lookup", partial(_llama, speculation="NGRAM_MOD"), named=True
    ),
}
