"""llama.cpp in a process of its own: a question on each line of standard input, its answer on standard output.

In one process its threads and torch's take turns on the same runtime of OpenMP, which makes both half as fast. Runs as
a script, and imports nothing of this package.
"""

import json
import os
import sys

SLOTS = 4096  # of its cache


def main(file: str, threads: str, speculation: str) -> None:
    import xllamacpp

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = file, SLOTS, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.verbosity = 0
    if speculation:
        params.speculative.types = [
            getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{speculation}")
        ]
    server = xllamacpp.Server(params)
    for line in sys.stdin:
        print(json.dumps(server.handle_completions(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
