"""What a target forward costs by how its weights are held, and what this machine's memory would allow: one record.

    python experiments/bench/forwards.py            # SmolLM2; a few minutes, and nothing else runs

forwards.json: per way to hold the weights and tokens of a window, behind a text, with logits: milliseconds of a
forward, of its linear maps alone, and of reading the maps' weights once at the rate at which a copy reads and writes,
measured in the same turns. Ways and sizes take turns; medians over the turns, with the least. A prompt's forward stands
beside.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import experiments

experiments.check_python()

import numpy as np
import torch
from torch import nn

from cpdlm.bench.timers import target_calls
from cpdlm.config import WEIGHTS
from cpdlm.decoding import prepare
from cpdlm.decoding.products import GROUP, Int4, Int8, Product
from cpdlm.hf.load import load
from cpdlm.model.language_model import LanguageModel
from experiments.bench import record
from experiments.report.speed import forwards_table

QUICK = "--tokens 1 4 --behind 16 --prompt 32 --turns 2 --ways plain int8"
SETTINGS = ("model", "ways", "tokens", "behind", "prompt", "turns")
COPIED = 2**28  # bytes

Timed = dict[tuple[str, Any], list[float]]


def milliseconds(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return (time.perf_counter() - began) * 1e3, result


class Way:
    """A model whose weights are held in one way."""

    def __init__(self, model: LanguageModel, weights: str, tokens: Sequence[int], behind: int, prompt: int) -> None:
        self.prepared, self.model = prepare(model, weights), model
        random = torch.Generator().manual_seed(0)
        text_BT = torch.randint(model.vocab_size, (1, max(behind, prompt)), generator=random)
        window_BS = torch.randint(model.vocab_size, (1, max(tokens)), generator=random)
        self.calls = target_calls(model, text_BT[:, :behind], window_BS, tokens)
        self.prompt_BT = text_BT[:, :prompt]
        every = [*model.trunk.modules(), model.unembedding]
        self.maps: list[Any] = [each for each in every if isinstance(each, nn.Linear | Product)]

    @property
    def bytes(self) -> int:
        """Of weights that the linear maps read."""
        width = {Int8: 1.0, Int4: 0.5 + 4 / GROUP}
        sizes = (
            width.get(type(each), self.dtype.itemsize) * each.in_features * each.out_features for each in self.maps
        )
        return int(sum(sizes))

    def turn(self, taken: Timed) -> None:
        """One forward and one round of the maps for each number of tokens, after one that does not count."""
        for size, call in self.calls.items():
            inputs = [torch.randn(1, size, each.in_features, dtype=self.dtype) for each in self.maps]
            for counts in (False, True):
                forward, undo = milliseconds(call)
                undo()
                products, _ = milliseconds(partial(self.multiply, inputs))
                if counts:
                    taken.setdefault(("forward", size), []).append(forward)
                    taken.setdefault(("products", size), []).append(products)
        taken.setdefault(("prompt", 0), []).append(milliseconds(lambda: self.model.hidden(self.prompt_BT))[0])

    def multiply(self, inputs: Sequence[torch.Tensor]) -> None:
        for each, x in zip(self.maps, inputs, strict=True):
            each(x)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.trunk.embedding.dtype


def gigabytes_a_second() -> float:
    """Read and written by a copy, the best of three."""
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    return 2 * COPIED / 1e6 / min(milliseconds(lambda: target.copy_(source))[0] for _ in range(3))


@torch.inference_mode()
def measured(options: argparse.Namespace) -> dict[str, Any]:
    ways: dict[str, Way] = {}
    for word in options.ways:
        model = load(Path(options.model), widen=True).model
        ways[word] = Way(model, word, options.tokens, options.behind, options.prompt)
        record.say(f"{word}: {asdict(ways[word].prepared)}")
    rates: list[float] = []
    taken: dict[str, Timed] = {word: {} for word in ways}
    for turn in range(options.turns):
        rates.append(gigabytes_a_second())
        for word in list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]:
            ways[word].turn(taken[word])
    rate = float(np.median(rates))
    rows = []
    for word, way in ways.items():
        bound = way.bytes / rate / 1e6
        for size in options.tokens:
            forward, products = taken[word][("forward", size)], taken[word][("products", size)]
            row = {"weights": word, "tokens": size, "ms": float(np.median(forward)), "least_ms": min(forward)}
            row |= {"products_ms": float(np.median(products)), "read_ms": bound, "bound_tokens_per_s": 1e3 / bound}
            rows.append(row)
    return {
        "dtype": str(next(iter(ways.values())).dtype).removeprefix("torch."),
        "copy_gb_per_s": rate,
        "ways": {word: asdict(way.prepared) | {"bytes": way.bytes} for word, way in ways.items()},
        "prompt_ms": {word: float(np.median(times[("prompt", 0)])) for word, times in taken.items()},
        "rows": rows,
    }


def main(arguments: Sequence[str]) -> int:
    parser = record.parser(__doc__)
    add = parser.add_argument
    add("--model", default="smollm2", help="as of cpdlm generate (default: smollm2)")
    add("--ways", nargs="+", default=list(WEIGHTS[1:]), choices=WEIGHTS, help="ways to hold the weights")
    add("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="of a window")
    add("--behind", type=int, default=128, help="tokens of the text before it")
    add("--prompt", type=int, default=512, help="tokens of a prompt, whose forward is timed as well")
    add("--turns", type=int, default=15, help="of all ways")
    options = record.parse(parser, arguments, QUICK)
    options.cpu = True
    print(forwards_table(record.run("forwards", arguments, options, SETTINGS, measured)).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
