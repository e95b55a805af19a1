"""Ways to decode a model, side by side on prompts that people know: one record, as `cpdlm bench` measures it.

    python experiments/bench/tasks.py smollm2 --name smollm2                       # timed: nothing else runs
    python experiments/bench/tasks.py smollm2 --name acceptance --acceptance-only  # counted alone

tasks_NAME.json.parts: finished tasks, from which a killed call goes on
tasks_NAME.json: the facts of `cpdlm.benchmark.Measured`, and an entry per task, mode and method.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import experiments

experiments.check_python()

from cpdlm import benchmark
from cpdlm.bench.kept import remove
from cpdlm.bench.table import markdown
from cpdlm.bench.tasks import row
from experiments.bench import record

QUICK = "--prompts 2 --new-tokens 8 --repeats 2 --warmups 0"


def main(arguments: Sequence[str]) -> int:
    parser = record.parser(__doc__)
    benchmark.add_options(parser)
    parser.add_argument("--name", required=True, help="of the record, behind tasks_")
    options = record.parse(parser, arguments, QUICK)
    record.settle(options)
    settings = record.chosen(options, [field.name for field in fields(benchmark.Request)])
    settings["gguf"] = options.gguf and options.gguf.name  # where it lies is not for others
    found = record.begin("tasks", "tasks", arguments, settings, options.seed)
    output = options.output / f"tasks_{options.name}.json"
    measured = benchmark.measure(benchmark.Request(**settings | {"gguf": options.gguf}), output)
    record.write(options, f"tasks_{options.name}", found | measured.facts | {"entries": measured.entries})
    remove(output)
    print(markdown([row(entry) for entry in measured.entries]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
