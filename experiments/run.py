"""One cell from the command line: train, evaluate, decode, write one record.

python experiments/run.py rank=8
python experiments/run.py preset=cpu-heads rank=4 anchor=token model.trunk=runs/NAME_OF_A_TRUNK_RUN
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpdlm import config as configuration

STAGES = ("train", "decode", "all")


def main(arguments: list[str]) -> int:
    program = "python experiments/run.py"
    if "--help" in arguments or "-h" in arguments:
        print(configuration.help_text(program))
        print(f"\n  --stage=STAGE   {' | '.join(STAGES)} (train also evaluates; decode also writes the record)")
        return 0
    stage = next((word.removeprefix("--stage=") for word in arguments if word.startswith("--stage=")), "all")
    words = [word for word in arguments if not word.startswith("--stage=") and word != "--print-config"]
    try:
        if stage not in STAGES:
            raise configuration.ConfigError(f"--stage={stage} is not one of {', '.join(STAGES)}")
        config = configuration.parse(words)
    except configuration.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "--print-config" in arguments:
        print(configuration.as_yaml(config), end="")
        return 0
    return _run(config, " ".join([program, *words]), stage)


def _run(config: configuration.Config, command: str, stage: str) -> int:
    # Slow imports come after the checks above.
    from cpdlm.files import WriteError
    from cpdlm.report.results import RecordError
    from cpdlm.training.fit import Interrupted
    from cpdlm.training.module import NonFiniteLoss
    from cpdlm.training.storage import RunError, exclusive
    from experiments import cell

    folder = cell.run_folder(config)
    try:
        # Under several processes the launcher starts this command once more per process; the first holds the folder.
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            with exclusive(folder):
                return cell.run(config, command, stage)
        return cell.run(config, command, stage)
    except (configuration.ConfigError, RunError, RecordError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        print(error if str(error) else "stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
