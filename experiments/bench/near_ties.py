"""Where greedy texts of ours and of `generate` part: the share of differing tokens, and how near the tie was.

    python experiments/bench/near_ties.py smollm2 --prompts 4 --new-tokens 48

In exact arithmetic the texts are the same. A forward over several tokens rounds otherwise than one over a single token,
which turns ties. So at the first difference of each prompt the two tokens are held against each other in float64: the
gap of their logits behind the same prefix, beside the gap that rounding in this precision may move.

Letters: T position, V vocabulary.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from cpdlm.bench.contenders import Ours, hugging_face
from cpdlm.data.pretrained_files import checkpoint_folder, generation_of
from cpdlm.data.prompts import read_task
from cpdlm.data.tokenizer import HubTokenizer
from cpdlm.decoding import Sampling
from cpdlm.files import default_cache
from cpdlm.model.language_model import LanguageModel
from cpdlm.model.pretrained import load_pretrained
from experiments.bench import record
from experiments.report.decoding import near_ties_table

GREEDY = Sampling(temperature=0)
DRAFTS = {"our loop without drafts": "none", "prompt lookup": "lookup"}


def compare(
    model: LanguageModel, exact: LanguageModel, prompts: Sequence[list[int]], new_tokens: int, eos: Any
) -> list[dict[str, Any]]:
    """An entry per way to decode: tokens, differing tokens, and the float64 gap at each prompt's first difference."""
    generate = hugging_face(model, eos=eos)
    assert generate is not None, "a model without heads has one distribution"
    theirs = [generate(torch.tensor(prompt), new_tokens, GREEDY, 0) for prompt in prompts]
    entries = []
    for name, draft in DRAFTS.items():
        ours = Ours(model, new_tokens, GREEDY, draft, eos=eos)
        mine = [ours.batch([torch.tensor(prompt)], [0])[0].tokens for prompt in prompts]
        parted = [
            parting(*pair, prompt, exact) for pair, prompt in zip(zip(mine, theirs, strict=True), prompts, strict=True)
        ]
        entries.append(
            {
                "method": name,
                "prompts": len(prompts),
                "tokens": sum(map(len, theirs)),
                "differing_tokens": sum(each["tokens"] for each in parted if each),
                "first_differences": [{"at": each["at"], "gap": each["gap"]} for each in parted if each],
            }
        )
    return entries


def parting(mine: list[int], theirs: list[int], prompt: list[int], exact: LanguageModel) -> dict[str, Any] | None:
    """{"at", "gap", "tokens"}: the first place that differs, the float64 gap of the two logits there, and the places
    that differ in all. None where the texts are the same."""
    places = [at for at in range(max(len(mine), len(theirs))) if mine[at : at + 1] != theirs[at : at + 1]]
    if not places:
        return None
    at = places[0]
    if at >= min(len(mine), len(theirs)):
        return {"at": at, "gap": None, "tokens": len(places)}
    log_probs_V = exact_log_probs(exact, [*prompt, *theirs[:at]])
    gap = abs(float(log_probs_V[mine[at]] - log_probs_V[theirs[at]]))
    return {"at": at, "gap": gap, "tokens": len(places)}


@torch.inference_mode()
def exact_log_probs(exact: LanguageModel, text: list[int]) -> Tensor:
    """(V,) of the token behind this text."""
    hidden_D = exact.hidden(torch.tensor([text]))[0, -1]
    logits_V: Tensor = exact.unembedding.weight @ hidden_D
    return logits_V.log_softmax(dim=-1)


def measured(options: argparse.Namespace) -> record.Record:
    source = checkpoint_folder(options.model, str(default_cache()))
    tokenizer = HubTokenizer("model", source)
    prompts = read_task(options.task, tokenizer, default_cache(), options.prompts).prompts

    def load(dtype: str) -> LanguageModel:
        return load_pretrained(source, getattr(torch, dtype), 1, options.model)

    exact = load("float64")
    entries = [
        {"dtype": dtype} | entry
        for dtype in options.dtypes
        for entry in compare(load(dtype), exact, prompts, options.new_tokens, generation_of(source).eos_token_id)
    ]
    return {"entries": entries}


def main(arguments: Sequence[str]) -> int:
    parser = record.parser(__doc__)
    parser.add_argument("model", help="a model without heads: a folder, a GGUF file, smollm2")
    parser.add_argument("--prompts", type=int, default=4, help="how many")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens to write")
    parser.add_argument("--task", default="humaneval", help="whose prompts are continued")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of the weights")
    options = record.parse(parser, arguments, "--prompts 2 --new-tokens 8")
    names = ("model", "prompts", "new_tokens", "task", "dtypes")
    print(near_ties_table(record.run("near_ties", arguments, options, names, measured)).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
