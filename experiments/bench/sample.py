"""A text that a model writes, token by token, with what was drafted: the record of the picture in README.md.

    python experiments/bench/sample.py            # the released heads on SmolLM2; seconds

sample.json: the prompt, and each piece of the text with whether it was drafted and accepted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from cpdlm.decoding import Options, Sampling, decode, prepare
from cpdlm.hf.load import load
from experiments.bench import record

QUICK = "--new-tokens 8"
SETTINGS = ("model", "prompt", "new_tokens", "temperature", "seed")
PROMPT = '''class Stack:
    """A stack of items."""

    def __init__(self):
'''


@torch.inference_mode()
def written(options: argparse.Namespace) -> dict[str, Any]:
    loaded = load(Path(options.model), widen=True)
    prepare(loaded.model)
    draft, nodes = loaded.drafting
    emitted: list[list[int]] = []
    text = decode(
        loaded.model,
        torch.tensor(loaded.tokenizer.prompt(options.prompt, False)),
        options.new_tokens,
        Sampling(options.temperature),
        torch.Generator().manual_seed(options.seed),
        draft=draft,
        eos=loaded.eos,
        options=Options(nodes=nodes, on_tokens=lambda _, tokens: emitted.append(tokens)),
    )
    pieces: list[tuple[str, bool]] = []
    ids: list[int] = []
    for tokens in emitted:
        for index, token in enumerate(tokens):
            before = loaded.tokenizer.decode(ids)
            ids.append(token)
            pieces.append((loaded.tokenizer.decode(ids)[len(before) :], index < len(tokens) - 1))
    return {"prompt": options.prompt, "pieces": pieces, "forwards": text.forwards}


def main(arguments: Sequence[str]) -> int:
    parser = record.parser(__doc__)
    add = parser.add_argument
    add("--model", default="smollm2", help="as of cpdlm generate (default: smollm2)")
    add("--prompt", default=PROMPT, help="text that the model goes on with (default: a class and its docstring)")
    add("--new-tokens", type=int, default=96, help="at most")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--seed", type=int, default=0, help="of the text")
    options = record.parse(parser, arguments, QUICK)
    record.run("sample", arguments, options, SETTINGS, written)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
