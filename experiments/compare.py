"""Records side by side: what differs between them, what came out, and what stands against a comparison.

./dev compare results/C3/A.json results/C3/B.json

`experiments/run.py` shows its own record so.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cpdlm.config import INCIDENTAL, flat
from cpdlm.terminal import Parser
from experiments.records import MODES, Record, RecordError, decoding_hardware, is_busy, load

FEW_STEPS = 100  # below it a model has learnt too little: it repeats itself, and is drafted with ease


def table(records: Sequence[Record]) -> str:
    """A column per record; of the settings only those that differ. Notes say what cannot be compared."""
    rows = [("", [record["name"] for record in records]), *_settings(records), *_results(records)]
    names = [label for label, _ in rows]
    widths = [max(len(cells[n]) for _, cells in rows) for n in range(len(records))]
    lines = [
        "  ".join([label.ljust(max(map(len, names))), *map(str.ljust, cells, widths)]).rstrip() for label, cells in rows
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in _notes(records))])


def _settings(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    every = [flat(record.config) for record in records]
    keys = sorted({key for each in every for key in each if not key.startswith(INCIDENTAL)})
    rows = [(key, [str(each.get(key)) for each in every]) for key in keys]
    return [(key, cells) for key, cells in rows if len(set(cells)) > 1]


def _results(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    trained = [(r["parameters"]["trained"], r["training"]["tokens_per_second"]) for r in records]
    rows = [("trained parameters, tokens/s", [f"{parameters:,}, {rate:,.0f}" for parameters, rate in trained])]
    rows += [
        (label, [f"{record['likelihood'][key]['mean']:.4f}" for record in records])
        for label, key in (("joint NLL (nats)", "joint_nll"), ("first-token NLL (nats)", "first_token_nll"))
    ]
    for mode in MODES:
        for label, key, middle in (
            ("tokens per forward", "tokens_per_pass", "mean"),
            ("speed-up over AR", "speedup", "median"),
        ):
            found = [record.mode(mode) for record in records]
            cells = [
                f"{each[key][middle]:.2f} [{each[key]['low']:.2f}, {each[key]['high']:.2f}]" if each else "-"
                for each in found
            ]
            rows.append((f"{label}, {mode}", cells))
    return rows


def _notes(records: Sequence[Record]) -> list[str]:
    """What stands between these numbers and a comparison."""
    notes = []
    if len({record["data"]["sha256"] for record in records}) > 1:
        notes.append("the texts differ, so likelihoods cannot be compared")
    if any(record.target == "own" for record in records):
        notes.append("each self target is another model: speed-ups over it are not comparable across cells")
    elif len({record.trunk_sha256 for record in records}) > 1:
        notes.append("the frozen targets differ: speed-ups over them are not comparable")
    if len(machines := sorted({decoding_hardware(record) for record in records})) > 1:
        notes.append(f"decoded on different machines: {'; '.join(machines)}")
    groups = [set((record["decoding"] or {"group": [record["name"]]})["group"]) for record in records]
    if not {record["name"] for record in records} <= set.intersection(*groups):
        notes.append("timed one after another, not side by side as `experiments/sweep.py` does")
    for name, steps in [(record["name"], record["training"]["steps"]) for record in records]:
        if steps < FEW_STEPS:
            notes.append(f"{name}: {steps} steps of training, so its speeds mean nothing")
    notes += [f"{record['name']}: {busy}" for record in records if (busy := is_busy(record))]
    return notes


def main(arguments: list[str]) -> int:
    parser = Parser(prog="./dev compare", description="Show records side by side.")
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD", help="results/CLAIM/NAME.json, two or more")
    options = parser.parse_args(arguments)
    if len(options.records) < 2:
        parser.error("give two records or more")
    try:
        print(table([load(path) for path in options.records]))
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
