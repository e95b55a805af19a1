"""Times the decoders of a group of trained cells side by side, in a process of its own: what a sweep runs per group.

    python -m experiments.decode_group GROUP.json

GROUP.json: {"cells": [WORDS, ...], "reference": WORDS or null}. WORDS are the settings of a cell as they are typed.
"""

import json
import sys
from pathlib import Path

from cpdlm.config import ConfigError, parse


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        print("usage: python -m experiments.decode_group GROUP.json", file=sys.stderr)
        return 2
    from cpdlm.files import WriteError
    from cpdlm.training.checkpoints import RunError
    from experiments import cell

    group = json.loads(Path(arguments[0]).read_bytes())
    try:
        reference = parse(group["reference"]) if group["reference"] is not None else None
        cell.measure([parse(words) for words in group["cells"]], reference)
    except (ConfigError, RunError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
