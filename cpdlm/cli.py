"""The command `cpdlm`: what the library does, from a shell. `python -m cpdlm` is the same.

    cpdlm speed-up MODEL                                   train heads on a model, measure it, export it
    cpdlm generate --model MODEL --prompt 'def main('      write text
    cpdlm bench MODEL                                      every way of decoding it, side by side
    cpdlm export RUN DIR                                   a run as a folder for transformers
    cpdlm release RUN NAME                                 put a run's heads into the package

Slow imports come after the words are read.
"""

import io
import os
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpdlm import benchmark
from cpdlm.config import CHOICES, WEIGHTS
from cpdlm.config.words import nearest
from cpdlm.terminal import Parser, fitted

INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """What follows `cpdlm`. needs: the words that it cannot do without. arguments: adds them to a parser. run: does it;
    returns the lines for standard output."""

    help: str
    needs: str
    arguments: Callable[[Parser], None]
    run: Callable[[Namespace], Sequence[str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for a mistake of the user's (standard error says what to type), 130 where it was stopped."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] not in COMMANDS:
        hint = nearest(words[0], COMMANDS, "cpdlm {}") or f"; give one of {', '.join(COMMANDS)}"
        print(f"error: there is no command {words[0]!r}{hint}", file=sys.stderr)
        return 2
    options = parse(words[0], words[1:])
    if sys.stderr.isatty():
        print("loading ...", file=sys.stderr, flush=True)  # torch and transformers alone take seconds
    from transformers.utils.logging import disable_progress_bar

    from cpdlm.files import WriteError
    from cpdlm.training.checkpoints import RunError

    disable_progress_bar()
    warnings.formatwarning = _sentences()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that does not have all characters
    try:
        for line in COMMANDS[words[0]].run(options):
            print(line)
    except (RunError, WriteError, ValueError) as error:  # ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the text has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _sentences() -> Callable[..., str]:
    """How warnings are written: without the line of ours that gave them, and each once (plan and run read one text)."""
    said: set[str] = set()

    def sentence(message: Warning | str, *_: object) -> str:
        text = f"warning: {message}\n"
        is_new = text not in said
        said.add(text)
        return text if is_new else ""

    return sentence


def parse(name: str, words: Sequence[str]) -> Namespace:
    """The options of a command. SystemExit for --help and for words that are no options."""
    command = COMMANDS[name]
    parser = Parser(f"cpdlm {name}", f"cpdlm {name} {command.needs} [OPTIONS]", command.help)
    command.arguments(parser)
    return parser.parse_intermixed_args(words)


def _overview() -> str:
    lines = [f"  cpdlm {name:<10} {command.help}" for name, command in COMMANDS.items()]
    return fitted(
        "\n".join(
            ["Speculative decoding with heads of rank r, lossless.", "", *lines, "", "cpdlm COMMAND --help says more."]
        )
    )


# --- speed-up ---------------------------------------------------------------------------------------------------------


def _speed_up_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face folder or name, GGUF file, or smollm2")
    add(
        "settings",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="of the run, such as corpus=FOLDER optim.steps=3000",
    )
    add("--output", type=Path, metavar="DIR", help="folder to write, new or empty (default: NAME-fast)")
    add("--corpus", default="", metavar="TEXT", help="text like yours: a folder, a file, or hf:NAME")
    add("--chat", type=Path, metavar="FILE.jsonl", help="conversations like yours; only their answers are trained on")
    add("--skip-broken", action="store_true", help="leave out lines of --chat that are no conversation")
    add("--minutes", type=float, default=30.0, metavar="N", help="of writing text and training (default: 30)")
    add("--dry-run", action="store_true", help="measure the machine, print the plan, and stop")


def _speed_up(options: Namespace) -> Sequence[str]:
    from cpdlm.speed_up import Request, lines, make_plan, speed_up
    from cpdlm.training.checkpoints import RunError
    from cpdlm.training.module import NonFiniteLoss
    from cpdlm.training.stopping import Interrupted, ProcessLost

    given = vars(options)
    only_plan, folder = given.pop("dry_run"), options.output or Path(f"{Path(options.model).name}-fast")
    request = Request(**given | {"output": folder, "settings": tuple(options.settings)})

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if only_plan:
        return make_plan(request, say).lines
    try:
        found = speed_up(request, say)
    except (NonFiniteLoss, ProcessLost) as error:
        raise RunError(str(error)) from error
    except Interrupted as error:
        raise KeyboardInterrupt(str(error)) from error
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    use = f"load it with cpdlm.load({str(folder)!r}), or cpdlm generate --model {folder} --show"
    return [*lines(request.model, found, width), "", f"{folder}: {use}"]


# --- generate ---------------------------------------------------------------------------------------------------------


def _generate_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a finished run or an exported one, or smollm2")
    add("--prompt", metavar="TEXT", help="text to continue; without it standard input, less its last newline")
    add("--chat", action="store_true", help="put the prompt to the model as a user's turn, by its chat template")
    add("--max-new-tokens", type=int, metavar="N", help="tokens to write; without it 128, or the room in the context")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: the likeliest token (default); 1: the model's distribution",
    )
    add("--top-k", type=int, default=0, metavar="K", help="keep the k likeliest tokens (default: 0, all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens of this much probability")
    add("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)")
    ways = ["none", *CHOICES["decode.draft"]]
    add(
        "--draft",
        choices=ways,
        metavar="WAY",
        help=f"how drafts are made: {', '.join(ways)} (default: what was fastest for the model when it was made, else "
        "chain)",
    )
    add(
        "--draft-vocabulary",
        default="own",
        choices=["own", "none"],
        help="own: draft from the model's draft vocabulary, if it has one (default); none: from all tokens",
    )
    add(
        "--weights",
        default="auto",
        choices=WEIGHTS,
        metavar="HOW",
        help="packed: laid out as this machine multiplies fastest; plain: as they are; auto: the faster of these "
        "(default); int8, int4: rounded, and the target is then the model with rounded weights",
    )
    add("--show", action="store_true", help="accepted drafts in green, tokens per forward and per second at the end")


def _generate(options: Namespace) -> Sequence[str]:
    from cpdlm import generate

    generate.run(options, sys.stdout)
    return ()


# --- bench ------------------------------------------------------------------------------------------------------------


def _bench_arguments(parser: Parser) -> None:
    benchmark.add_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the table and a figure")


def _bench(options: Namespace) -> Sequence[str]:
    given = vars(options)
    json, output = given.pop("json"), given.pop("output")
    return benchmark.run(benchmark.Request(**given), json, output)


# --- export, release --------------------------------------------------------------------------------------------------


def _export_arguments(parser: Parser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or smollm2")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write, new or empty")


def _export(options: Namespace) -> Sequence[str]:
    from cpdlm.hf.export import export

    export(options.run, options.folder)
    return [str(path) for path in sorted(options.folder.iterdir())]


def _release_arguments(parser: Parser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished and measured run")
    parser.add_argument("name", metavar="NAME", help="the model, smollm2, or MODEL-WORD for heads of a kind of text")


def _release(options: Namespace) -> Sequence[str]:
    from cpdlm.hf.released import release

    path = release(options.run, options.name)
    return [f"{path}: {path.stat().st_size / 2**20:.1f} MiB"]


COMMANDS = {
    "speed-up": Command(
        "Train heads that draft for a model, measure how fast it is with them, and export it.",
        "MODEL [KEY=VALUE]...",
        _speed_up_arguments,
        _speed_up,
    ),
    "generate": Command("Write text with a finished model.", "--model MODEL", _generate_arguments, _generate),
    "bench": Command("Measure every way of decoding a model on known prompts.", "MODEL", _bench_arguments, _bench),
    "export": Command("Write a run as a folder for transformers and the hub.", "RUN DIR", _export_arguments, _export),
    "release": Command(
        "Put a run's heads into this package (for its maintainers).", "RUN NAME", _release_arguments, _release
    ),
}
