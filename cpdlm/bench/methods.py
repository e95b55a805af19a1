"""Ways to decode one target, by name: what `cpdlm bench` can run. A new way is a line in `METHODS`."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpdlm.bench.contenders import (
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
from cpdlm.decoding import Sampling
from cpdlm.decoding.length import Costs
from cpdlm.model.language_model import LanguageModel

AUTOREGRESSIVE, GENERATE, ASSISTED, LLAMA = "AR", "generate", "generate-assisted", "llama.cpp"
LOOKED_UP = 10  # tokens that transformers' prompt lookup drafts, as its own examples have it


@dataclass(frozen=True)
class Setup:
    """What all methods of a comparison share.

    model: made ready for this machine. plain: the same as transformers has it. nodes: drafts of a tree. eos: ids that
    end a text. gguf: the same model for llama.cpp. assistant: another model that drafts for it.
    """

    model: LanguageModel
    plain: LanguageModel
    new_tokens: int
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
            near = difflib.get_close_matches(word, METHODS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"give some of {', '.join(METHODS)}"
            raise ConfigError(f"--methods {word}: there is no such method; {hint}")
        if METHODS[word].needs_heads and model.horizon < 2:
            raise ConfigError(
                f"--methods {word} drafts with heads, and this model has none; cpdlm speed-up trains them"
            )
    suited = {name for name, each in METHODS.items() if not each.named and (model.horizon > 1 or not each.needs_heads)}
    wanted = words or suited
    return {name: method for name, method in METHODS.items() if name == AUTOREGRESSIVE or name in wanted}


def _ours(draft: str) -> Callable[[Setup, Sampling], Contender | None]:
    def make(setup: Setup, sampling: Sampling) -> Contender:
        return Ours(setup.model, setup.new_tokens, sampling, draft, setup.nodes, setup.eos)

    return make


def _paying(draft: str) -> Callable[[Setup, Sampling], Contender | None]:
    def make(setup: Setup, sampling: Sampling) -> Contender:
        costs = Costs.measure(setup.model, sampling, next(setup.model.parameters()).device)
        return Ours(setup.model, setup.new_tokens, sampling, draft, setup.nodes, setup.eos, costs)

    return make


def _theirs(lookup: int | None = None) -> Callable[[Setup, Sampling], Contender | None]:
    def make(setup: Setup, sampling: Sampling) -> Contender | None:
        generate = hugging_face(setup.plain, eos=setup.eos, lookup=lookup)
        return None if generate is None else theirs(generate, setup.new_tokens, sampling)

    return make


def _early_exit(setup: Setup, sampling: Sampling) -> Contender | None:
    generate = hugging_face(setup.plain, eos=setup.eos, assistant_early_exit=exit_layer(setup.plain))
    return None if generate is None else EarlyExit(setup.plain, theirs(generate, setup.new_tokens, sampling))


def _assisted(setup: Setup, sampling: Sampling) -> Contender | None:
    assert setup.assistant is not None
    generate = hugging_face(setup.plain, eos=setup.eos, assistant_model=as_hugging_face(setup.assistant))
    return None if generate is None else theirs(generate, setup.new_tokens, sampling)


def _llama(speculation: str = "") -> Callable[[Setup, Sampling], Contender]:
    def make(setup: Setup, sampling: Sampling) -> Contender:
        return LlamaCpp(setup.gguf, setup.new_tokens, sampling, speculation)

    return make


METHODS = {
    AUTOREGRESSIVE: Method("our loop without drafts", _ours("none"), counted=False),
    GENERATE: Method("transformers' generate", _theirs(), counted=False, is_plain=True),
    "generate-lookup": Method("transformers' prompt lookup", _theirs(LOOKED_UP), is_plain=True),
    "generate-early-exit": Method(
        "transformers' drafts of the first third of the layers", _early_exit, named=True, is_plain=True
    ),
    ASSISTED: Method("transformers' drafts of a second model", _assisted, named=True, is_plain=True),
    "lookup": Method("our prompt lookup", _ours("lookup")),
    "chain": Method("the heads' drafts as a chain", _ours("chain"), needs_heads=True),
    "block": Method("the same, accepted as a block", _ours("block"), needs_heads=True, greedy_twin="chain"),
    "tree": Method("the heads' likeliest prefixes as a tree", _ours("tree"), needs_heads=True),
    "branched": Method("the block, with branches beside it", _ours("branched"), needs_heads=True, greedy_twin="chain"),
    "lookup+chain": Method(
        "prompt lookup where it finds something, else the chain", _ours("lookup+chain"), needs_heads=True
    ),
    "lookup+block": Method(
        "the same, accepted as a block", _ours("lookup+block"), needs_heads=True, greedy_twin="lookup+chain"
    ),
    "lookup+tree": Method("the tree, and prompt lookup as one more branch", _ours("lookup+tree"), needs_heads=True),
    "lookup+branched": Method(
        "branched, and prompt lookup as one more branch",
        _ours("lookup+branched"),
        needs_heads=True,
        greedy_twin="lookup+chain",
    ),
    "chain-paying": Method(
        "as many drafts of the chain as pay on this machine", _paying("chain"), needs_heads=True, counted=False
    ),
    "lookup+chain-paying": Method("the same of lookup+chain", _paying("lookup+chain"), needs_heads=True, counted=False),
    "llama.cpp": Method("llama.cpp on the GGUF file", _llama(), counted=False, named=True),
    "llama.cpp-ngram-simple": Method("the same, with its simple prompt lookup", _llama("NGRAM_SIMPLE"), named=True),
    "llama.cpp-ngram-mod": Method("the same, with its hashed prompt lookup", _llama("NGRAM_MOD"), named=True),
}
