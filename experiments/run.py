"""One cell from the command line: train, evaluate, decode, write one record.

python experiments/run.py rank=8
python experiments/run.py preset=cpu-heads rank=4 link=first model.trunk=runs/NAME_OF_A_TRUNK_RUN
python experiments/run.py rank=1,2,4 seed=0,1      one cell after another, each in a process of its own
"""

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # experiments/ would hide modules of the same name

import experiments

experiments.check_python()

from cpdlm import config as configuration
from experiments.command import Command

STAGES = ("train", "decode", "all")
GRACE = 60  # seconds that processes have for a last checkpoint when they are told to stop


def main(arguments: list[str]) -> int:
    program = "python experiments/run.py"
    command = Command(program, configuration.help_text(), "as listed above")
    command.add_argument(
        "--stage", choices=STAGES, default="all", help="train also evaluates, decode writes the record"
    )
    command.add_argument("--print-config", action="store_true", help="show the settings and run nothing")
    command.add_argument("--list-presets", action="store_true", help="show every preset with its settings")
    try:
        options = command.read(arguments)
        if options.list_presets:
            print(_presets())
            return 0
        cells = several(options.settings)
        if len(cells) > 1:
            return _each(cells, [word for word in arguments if word not in options.settings])
        config = configuration.parse(options.settings)
    except configuration.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.print_config:
        print(configuration.as_yaml(config), end="")
        return 0
    from cpdlm.processes import is_launched, launched

    if launched() not in (0, config.nodes * config.devices):
        print(
            f"error: the launcher made {launched()} processes, nodes={config.nodes} x devices={config.devices} are "
            f"{config.nodes * config.devices}; write nodes=MACHINES devices=PROCESSES_ON_EACH",
            file=sys.stderr,
        )
        return 2
    if config.nodes * config.devices > 1 and not is_launched():
        return _launch(config, arguments)
    return _run(config, configuration.without_credentials(" ".join([program, *options.settings])), options.stage)


def _presets() -> str:
    """Each preset, and the settings that it stands for, as they are typed."""
    lines = []
    for name, settings in configuration.PRESETS.items():
        words = " ".join(f"{key}={value}" for key, value in settings.items())
        width = max(shutil.get_terminal_size().columns, 30)
        wrapped = textwrap.wrap(words or "(the defaults)", width - 2, break_long_words=False, break_on_hyphens=False)
        lines += [name, *(f"  {line}" for line in wrapped)]
    return "\n".join(lines)


def several(words: list[str]) -> list[list[str]]:
    """The words of every cell that these stand for: a number may have several values, as in rank=1,2,4."""
    known, choices = configuration.leaves(), []
    for word in words:
        key, _, value = word.partition("=")
        many = key in known and known[key].type in ("int", "float") and "," in value
        choices.append([f"{key}={each}" for each in value.split(",") if each] if many else [word])
    return [list(each) for each in itertools.product(*choices)]


def _each(cells: list[list[str]], flags: list[str]) -> int:
    """Run cells one after another, each as this command in a process of its own; then their results side by side."""
    configs = [configuration.parse(words) for words in cells]
    if len({config.run_name for config in configs}) < len(cells):
        raise configuration.ConfigError("these cells have one name: leave out name=, or vary what a name shows")
    for number, words in enumerate(cells, start=1):
        print(f"[{number}/{len(cells)}] python experiments/run.py {' '.join([*words, *flags])}", flush=True)
        if code := _in_a_process([*words, *flags]):
            return code if code > 0 else 1
    from experiments.compare import table
    from experiments.records import load

    paths = [Path(config.output) / config.run_name / f"{config.run_name}.json" for config in configs]
    if all(path.is_file() for path in paths):
        print(f"\n{table([load(path) for path in paths])}")
    return 0


def _in_a_process(arguments: list[str]) -> int:
    """This command with other arguments; its exit code."""
    child = subprocess.Popen([sys.executable, __file__, *arguments])

    def stop(number: int, frame: Any) -> None:
        if number == signal.SIGTERM:  # Ctrl-C reaches the child by itself
            child.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return child.wait()


def _launch(config: configuration.Config, arguments: list[str]) -> int:
    """This command once per process of this machine, as torchrun does it: where one dies, the others are stopped."""
    if config.nodes > 1:
        command = f"experiments/run.py {' '.join(arguments)}"
        print(
            f"error: nodes={config.nodes} needs a launcher on every machine: torchrun --nnodes={config.nodes} "
            f"--nproc-per-node={config.devices} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT "
            f"{command}, or in a SLURM job with --nodes="
            f"{config.nodes} --ntasks-per-node={config.devices}: srun python {command}",
            file=sys.stderr,
        )
        return 2
    from torch.cuda import device_count
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    there = device_count() or max(2, os.cpu_count() or 1)
    if config.devices > there:
        kind = "GPUs" if device_count() else "processors"
        print(f"error: devices={config.devices}: this machine has {there} {kind}; lower devices", file=sys.stderr)
        return 2
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes speak for themselves

    local = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.devices,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        shutdown_timeout=GRACE,
    )

    try:
        elastic_launch(local, sys.executable)(__file__, *arguments)
    except SignalException:
        return 130
    except ChildFailedError as error:
        rank, failure = _cause(error.failures)
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(
                f"error: process {rank} of {config.devices} was killed ({name}), and the others were stopped; "
                "the same command continues from the last checkpoint",
                file=sys.stderr,
            )
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _cause(failures: dict[int, Any]) -> tuple[int, Any]:
    """(rank, failure) of what ended the others: the first that was killed, though others may be noted before it, who
    lost it. SIGTERM is what the launcher then sends."""
    killed = [rank for rank, each in failures.items() if each.exitcode < 0 and each.exitcode != -signal.SIGTERM]
    rank = min(killed or failures, key=lambda rank: failures[rank].timestamp)
    return rank, failures[rank]


def _run(config: configuration.Config, command: str, stage: str) -> int:
    # Slow imports come after the checks above.
    from cpdlm.files import WriteError
    from cpdlm.processes import is_first_process, leave
    from cpdlm.training.checkpoints import RunError, exclusive
    from cpdlm.training.module import NonFiniteLoss
    from cpdlm.training.stopping import Interrupted, ProcessLost
    from experiments import cell
    from experiments.records import RecordError

    folder = cell.run_folder(config)
    try:
        if is_first_process():  # holds the folder for all
            with exclusive(folder):
                code = cell.run(config, command, stage)
        else:
            code = cell.run(config, command, stage)
        if config.nodes * config.devices > 1:
            leave(code)
        return code
    except (configuration.ConfigError, RunError, RecordError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (NonFiniteLoss, ProcessLost) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        print(error if str(error) else "stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if "--list-presets" in sys.argv:  # `| head` ends it without a traceback
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
