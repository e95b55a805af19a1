"""Ways to draft, measured side by side: every drafter and rank, and the baselines; four records.

    python experiments/bench/decode.py --runs runs/cpu-full --train-hydra runs/hydra  # once, a minute a corpus and seed
    python experiments/bench/decode.py --runs runs/cpu-full --only acceptance          # not timed
    python experiments/bench/decode.py --runs runs/cpu-full --hydra runs/hydra --assistant runs/ASSISTANT ...

All methods of a corpus share one frozen trunk, hence one target, the prompts, the loop and the protocol of
`cpdlm.bench.compare`. Heads of several seeds are one contender: every seed's heads write every draw of every prompt.
Intervals are over prompts, each with all its draws and seeds.

decode_acceptance.json   tokens per forward of every drafter; not timed
decode_strategies.json   speed of every drafter, greedy and sampling
decode_sparse.json       the chain by how many components of a draft are evaluated (only with --active)
decode_baselines.json    autoregressive, generate, prompt lookup, assisted generation, sequential heads, ours; memory
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import experiments

experiments.check_python()

from cpdlm.files import check_writable
from experiments.bench import decode_drafters as drafters
from experiments.bench import record
from experiments.bench.decode_baselines import baselines, chosen_drafters, train_sequential_heads
from experiments.bench.decode_heads import Bench, load_benches, target_entry

# record -> its parts, each of the rows of every corpus
RECORDS: dict[str, dict[str, Callable[[Bench], list[dict[str, Any]]]]] = {
    "acceptance": {"strategies": drafters.accepted},
    "strategies": {"cells": drafters.speeds},
    "sparse": {"rows": drafters.sparse},
    "baselines": {"methods": baselines},
}
SETTINGS = (
    *("prompts", "timed_prompts", "prompt_tokens", "new_tokens", "nodes", "draws", "acceptance_draws"),
    *("baseline_draws", "warmups", "seeds", "active"),
)
QUICK = (
    "--prompts 3 --timed-prompts 2 --prompt-tokens 8 --new-tokens 6 --nodes 3 --draws 1 --acceptance-draws 2 "
    "--baseline-draws 2 --warmups 0 --lookup-horizons 3"
)


def main(arguments: Sequence[str]) -> int:
    options = record.parse(parser(), arguments, QUICK)
    if options.train_hydra:
        train_sequential_heads(options)
        return 0
    check_writable(options.output)
    if options.only == "baselines":
        chosen_drafters(options)  # SystemExit where there are none
    benches = load_benches(options)
    for what, parts in RECORDS.items():
        if options.only not in (None, what) or (what == "sparse" and not options.active):
            continue
        settings = record.chosen(options, SETTINGS)
        found = record.begin(f"decoding {what}", "decode", arguments, settings, benches[0].seed)
        found["targets"] = [target_entry(bench) for bench in benches]
        for part, measure in parts.items():
            found[part] = [row for bench in benches for row in measure(bench)]
        if what == "strategies":
            found["suggested"] = drafters.suggested(found["cells"])
            print(f"suggested: {found['suggested']}")
        record.write(options, f"decode_{what}", found)
    return 0


def parser() -> argparse.ArgumentParser:
    made = record.parser(__doc__)
    add = made.add_argument
    add("--runs", type=Path, required=True, help="folder of finished runs")
    add("--cells", nargs="*", default=[], help="names of runs (default: all heads of --seeds on one trunk per corpus)")
    add("--corpora", nargs="*", default=[], help="corpora of the runs (default: all that are there)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="of the heads; the first is that of the draws, too")
    add("--train-hydra", type=Path, help="train sequential heads on the cells' trunks into this folder, and stop")
    add("--hydra", type=Path, help="folder that --train-hydra wrote")
    assistants = "finished next-token runs, one per corpus, that draft for transformers' assisted generation"
    add("--assistant", type=Path, nargs="*", default=[], help=assistants)
    add("--lookup-horizons", type=int, nargs="*", default=[4, 8], help="windows of prompt lookup, with pending token")
    add("--prompts", type=int, default=32, help="of the acceptance")
    add("--timed-prompts", type=int, default=8, help="how many of them are timed")
    add("--prompt-tokens", type=int, default=64, help="tokens of a prompt")
    add("--new-tokens", type=int, default=64, help="tokens to write")
    add("--nodes", type=int, default=8, help="drafts of a tree, width of a beam")
    add("--active", type=int, nargs="*", default=[], help="components of a higher rank that a draft evaluates")
    add("--acceptance-draws", type=int, default=3, help="texts per prompt and seed, of the acceptance under sampling")
    add("--draws", type=int, default=2, help="timed texts per prompt and seed of each drafter, test split")
    add("--baseline-draws", type=int, default=3, help="timed texts per prompt and seed of the baselines, test split")
    add("--warmups", type=int, default=1, help="untimed texts of each contender")
    only = (
        "make one record (acceptance is not timed; sparse needs --active; baselines takes its drafters from strategies)"
    )
    add("--only", choices=tuple(RECORDS), help=only)
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
