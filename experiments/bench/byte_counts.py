"""Counted byte contexts as a language model: what a trained one must beat to have learned more than short contexts.

    python experiments/bench/byte_counts.py corpus=code data.release=2

Contexts of 0 to ORDER bytes, counted on the train split and interpolated as by Witten and Bell (1991): a context that
was seen c times with k different successors weighs c / (c + k) against the next shorter one. It is asked about the test
rows that `evaluate` reads, and sees as little of the text before a row as the models do.

Letters: P positions of the test rows, K contexts of one order.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from numpy.typing import NDArray

from cpdlm.config import parse
from cpdlm.data.batches import TokenDataModule
from cpdlm.data.corpus import load_corpus
from experiments.bench import record

Keys = NDArray[np.int64]


def keys(tokens: NDArray[np.integer], length: int, base: int) -> Keys:
    """One number for every `length` tokens in a row, those that begin at the first, the second, ..."""
    found = np.zeros(len(tokens) - length + 1, dtype=np.int64)
    for at in range(length):
        found = found * base + tokens[at : len(tokens) - length + 1 + at]
    return found


class Counts:
    """How often each context of `order` tokens was seen, with how many different successors, and with which."""

    def __init__(self, tokens: NDArray[np.integer], order: int, base: int) -> None:
        self.grams, self.seen = np.unique(keys(tokens, order + 1, base), return_counts=True)
        contexts = self.grams // base
        first = np.flatnonzero(np.diff(contexts, prepend=-1))
        self.contexts_K = contexts[first]
        self.totals_K = np.add.reduceat(self.seen, first)
        self.kinds_K = np.diff(first, append=len(contexts))
        self.base = base

    def refine(self, shorter_P: NDArray[np.float64], context_P: Keys, token_P: Keys) -> NDArray[np.float64]:
        """Probabilities of the tokens behind these contexts, from those behind the next shorter ones."""
        total_P, kinds_P = (_found(self.contexts_K, each, context_P) for each in (self.totals_K, self.kinds_K))
        seen_P = _found(self.grams, self.seen, context_P * self.base + token_P)
        return np.where(total_P > 0, (seen_P + kinds_P * shorter_P) / np.maximum(total_P + kinds_P, 1), shorter_P)


def _found(sorted_keys: Keys, values: NDArray[np.integer], wanted: Keys) -> NDArray[np.int64]:
    """The values at these keys, 0 where there is none."""
    at = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == wanted, values[at], 0)


def measured(options: argparse.Namespace) -> record.Record:
    config = parse(options.settings)
    corpus = load_corpus(config)
    base = corpus.tokenizer.vocab_size
    batches = list(TokenDataModule(config, corpus).test_batches())
    rows, ids, successors = (
        np.concatenate([batch[name].numpy() for batch in batches])
        for name in ("tokens_BT", "position_ids_BT", "successors_BT")
    )
    nexts = np.concatenate([batch["future_BTN"][:, :, 0].numpy() for batch in batches])
    row_P, at_P = np.nonzero(successors > 0)
    token_P, before_P = nexts[row_P, at_P], ids[row_P, at_P] + 1
    entries: list[dict[str, Any]] = []
    for share in options.tokens or [len(corpus.train.tokens)]:
        probability_P = np.full(len(token_P), 1 / base)
        for order in range(options.order + 1):
            counts = Counts(corpus.train.tokens[:share], order, base)
            known_P = before_P >= order
            context_P = np.zeros(len(token_P), dtype=np.int64)
            for back in reversed(range(order)):
                context_P = context_P * base + rows[row_P, np.maximum(at_P - back, 0)]
            refined_P = counts.refine(probability_P, context_P, token_P)
            probability_P = np.where(known_P, refined_P, probability_P)
            nll = float(-np.log(probability_P).mean())
            entries.append({"tokens": share, "order": order, "nll": nll, "positions": len(token_P)})
    return {"data": {"sha256": corpus.describe()["sha256"]}, "entries": entries}


def main(arguments: Sequence[str]) -> int:
    parser = record.parser(__doc__)
    parser.add_argument("settings", nargs="*", help="of the corpus, as of run.py")
    parser.add_argument("--order", type=int, default=6, help="bytes of the longest context")
    parser.add_argument("--tokens", type=int, nargs="+", help="counted tokens of the train split (default: all)")
    options = record.parse(parser, arguments, "--order 2 --tokens 100000")
    found = record.run("byte_counts", arguments, options, ("settings", "order", "tokens"), measured)
    for entry in found["entries"]:
        print(f"{entry['tokens']:,} tokens, order {entry['order']}: {entry['nll']:.3f} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
