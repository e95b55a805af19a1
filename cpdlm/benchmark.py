"""From a model's name to a table: every way of decoding it, side by side, on prompts that people know."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpdlm.config import WEIGHTS, ConfigError
from cpdlm.files import check_writable, default_cache, write_bytes
from cpdlm.progress import Bar

if TYPE_CHECKING:
    from cpdlm.bench.methods import Method
    from cpdlm.data.prompts import Task
    from cpdlm.hf.load import Loaded
    from cpdlm.model.language_model import LanguageModel


@dataclass(frozen=True)
class Request:
    """The options of a measurement, by their names in `add_options`."""

    model: str
    tasks: tuple[str, ...] = ("humaneval", "chat", "prose")
    prompts: int = 100
    new_tokens: int = 128
    methods: tuple[str, ...] = ()  # none: all that suit the model
    nodes: int = 8
    draft_vocabulary: str = "own"
    weights: str = "auto"
    acceptance_only: bool = False
    rows: int = 8
    batch: int = 1
    repeats: int = 3
    warmups: int = 3
    seed: int = 0
    gguf: Path | None = None
    assistant: str = ""


def add_options(parser: ArgumentParser) -> None:
    """An option for each field of `Request`."""
    default = {each.name: each.default for each in fields(Request)}

    def names(text: str) -> tuple[str, ...]:
        return tuple(word for word in text.split(",") if word)

    def number(name: str, help: str) -> None:
        known = default[name.removeprefix("--").replace("-", "_")]
        parser.add_argument(name, type=int, default=known, metavar="N", help=f"{help} (default: {known})")

    add = parser.add_argument
    add("model", metavar="MODEL", help="exported folder, finished run, smollm2, or a model without heads")
    add(
        "--tasks",
        type=names,
        default=default["tasks"],
        help=f"comma-separated: {', '.join(Request.tasks)} (all are the default), files of JSON lines with a prompt or "
        "messages each",
    )
    add("--methods", type=names, default=(), help="comma-separated (default: all that suit the model)")
    number("--prompts", "of each task, at most")
    number("--new-tokens", "written after each prompt, fewer where the text ends")
    number("--nodes", "drafts of a tree")
    number("--batch", "prompts that are decoded at once; above 1 our methods alone")
    number("--repeats", "timed, by turns")
    number("--warmups", "of each method, before anything is timed")
    number("--seed", "of sampling")
    add("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp (default: what MODEL was read from)")
    add("--assistant", default="", metavar="MODEL", help="of the same tokenizer, for --methods generate-assisted")
    add("--draft-vocabulary", default="own", choices=["own", "none"], help="as of cpdlm generate")
    add(
        "--weights",
        default="auto",
        choices=WEIGHTS,
        metavar="HOW",
        help=f"of our methods: {', '.join(WEIGHTS)}, as of cpdlm generate; generate's are plain",
    )
    add("--acceptance-only", action="store_true", help="count tokens per forward in batches, and time nothing")
    number("--rows", "of a batch of --acceptance-only")


@dataclass(frozen=True)
class Measured:
    """entries: as `bench.tasks` makes them. facts: of model, tasks and machine, for a record."""

    entries: list[dict[str, Any]]
    facts: dict[str, Any]

    @property
    def caption(self) -> str:
        """What was measured, on what."""
        facts, hardware = self.facts, self.facts["hardware"]
        counts = ", ".join(f"{task['prompts']} prompts of {name}" for name, task in facts["tasks"].items())
        timed = (
            f"Speed-up: over AR, our loop without drafts. Batch {facts['batch']}, {facts['repeats']} interleaved "
            "repeats; "
            if facts["repeats"]
            else "Not timed. "
        )
        return (
            f"{facts['model']}, {facts['parameters'] / 1e6:.1f}M parameters, {facts['dtype']}, "
            f"weights {facts['weights']}; {counts}; at most {facts['new_tokens']} new tokens each. "
            f"{timed}{hardware['processor']}, {hardware['cores']} cores, "
            f"accelerator: {hardware['accelerator']}. {' '.join(facts['told'])}"
        ).rstrip()


def measure(request: Request, output: Path | None = None) -> Measured:
    """Every task in both modes; progress goes to standard error. Raises ConfigError or RunError on bad input.

    output: what will be written of it; beside that lies what is finished (`bench.kept`, whose `remove` ends it).
    """
    import torch

    from cpdlm.bench import methods, tasks
    from cpdlm.bench.compare import Protocol
    from cpdlm.bench.kept import Kept
    from cpdlm.data.pretrained_files import gguf_file
    from cpdlm.decoding import prepare

    _check(request)
    loaded = _load(request)
    wanted = methods.chosen(request.methods, loaded.model)
    if request.acceptance_only:  # what others count says nothing
        wanted = {name: method for name, method in wanted.items() if method.counted}
        if not wanted:
            raise ConfigError("--acceptance-only counts accepted drafts; give --methods that draft, such as chain,tree")
    given = _tasks(request, loaded)
    model = loaded.model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    plain = copy.deepcopy(model) if any(method.is_plain for method in wanted.values()) else model
    facts = _facts(request, loaded, given, wanted)  # before weights are laid out anew
    kept = Kept(output, vars(request) | facts | {"content": _content(model, given)})
    told = prepare(model, request.weights).sentences
    needs_file = any(name.startswith(methods.LLAMA) for name in wanted)
    gguf = request.gguf or (gguf_file(request.model, str(default_cache())) if needs_file else None)
    assistant = _assistant(request.assistant, loaded) if request.assistant else None
    longest = max(len(prompt) for task in given for prompt in task.prompts)
    setup = methods.Setup(model, plain, request.new_tokens, longest, loaded.eos, request.nodes, gguf, assistant)
    runs = [
        (task, mode, tasks.contenders_of(wanted, setup, mode, request.batch)) for task in given for mode in tasks.MODES
    ]
    protocol = Protocol(request.new_tokens, repeats=request.repeats, warmups=request.warmups, seed=request.seed)
    progress = Bar(total=sum(_texts(request, task) * len(each) for task, _, each in runs), unit="text")
    entries = []
    for task, mode, contenders in runs:
        part = f"{task.name}, {mode}"
        progress.set_description_str(part, refresh=False)
        comparison = tasks.Comparison(setup, task, mode, contenders, progress, request.batch)
        work = partial(comparison.counted, request.rows, request.seed)
        if not request.acceptance_only:
            work = partial(comparison.timed, protocol)
        if part in kept.parts:
            progress.total -= _texts(request, task) * len(contenders)
        entries += kept.part(part, work)
    progress.close()
    return Measured(entries, facts | {"weights": model.weights, "told": told})


def run(request: Request, file: Path | None = None, folder: Path | None = None) -> list[str]:
    """Measure, write the rows and the table with its figure where they are asked for, and give the lines to print."""
    from cpdlm.bench.figure import draw
    from cpdlm.bench.kept import remove
    from cpdlm.bench.table import fitting, markdown
    from cpdlm.bench.tasks import row

    for place in filter(None, (folder, file and file.parent)):
        check_writable(place)
    output = file or (folder and folder / "bench")
    measured = measure(request, output)
    rows = [row(entry) for entry in measured.entries]
    if file is not None:
        write_bytes(file, (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode())
    if folder is not None:
        write_bytes(folder / "bench.md", f"{markdown(rows)}\n\n{measured.caption}\n".encode())
        draw(measured.entries, folder / "bench.png")
    if output is not None:
        remove(output)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    return [fitting(rows, width), "", *textwrap.wrap(measured.caption, min(width, 120))]


def _check(request: Request) -> None:
    for name in ("prompts", "new_tokens", "nodes", "rows", "batch", "repeats"):
        if getattr(request, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(request, name)} measures nothing; give at least 1")
    if bool(request.assistant) != ("generate-assisted" in request.methods):
        raise ConfigError("--assistant MODEL and --methods generate-assisted need each other; give both")
    if not request.tasks:
        raise ConfigError("--tasks is empty; give humaneval, chat, prose or a file of JSON lines")


def _load(request: Request) -> Loaded:
    """With its heads, where it has some. A folder of transformers, a GGUF file or a hub name is a model without."""
    from cpdlm.hf import released
    from cpdlm.hf.load import load
    from cpdlm.training.checkpoints import read_json

    path = Path(request.model)
    shape = read_json(path / "config.json", "")
    is_theirs = path.suffix == ".gguf" or (shape is not None and shape.get("model_type") != "cpdlm")
    if is_theirs or not (path.exists() or released.is_name(path)):
        return _without_heads(request.model)
    return load(path, request.draft_vocabulary == "own", widen=True)


def _without_heads(name: str) -> Loaded:
    import torch

    from cpdlm.data.pretrained_files import checkpoint_folder, generation_of
    from cpdlm.data.tokenizer import HubTokenizer
    from cpdlm.hf.load import Loaded
    from cpdlm.model.pretrained import load_pretrained, multiplies_bfloat16

    source = checkpoint_folder(name, str(default_cache()))
    dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    model = load_pretrained(source, dtype, 1, name)
    tokenizer, eos = HubTokenizer("model", source), generation_of(source).eos_token_id
    return Loaded(model, tokenizer, tokenizer.eos if eos is None else eos)


def _assistant(name: str, loaded: Loaded) -> LanguageModel:
    """A model that drafts for the loaded one, on its device. ConfigError where their ids are not the same tokens."""
    other = _without_heads(name)
    tokenizers = (loaded.tokenizer, other.tokenizer)
    tokens = [[each.decode([index]) for index in range(each.vocab_size)] for each in tokenizers]
    if tokens[0] != tokens[1] or loaded.model.vocab_size != other.model.vocab_size:
        raise ConfigError(
            f"--assistant {name} has another vocabulary than the model it would draft for; give one with the same "
            "tokenizer and as many embeddings"
        )
    return other.model.to(next(loaded.model.parameters()).device)


def _tasks(request: Request, loaded: Loaded) -> list[Task]:
    """ConfigError where a prompt and its new tokens do not fit the context."""
    from cpdlm.data.prompts import read_task

    release = loaded.config.data.release if loaded.config is not None else 0
    given = [read_task(word, loaded.tokenizer, default_cache(), request.prompts, release) for word in request.tasks]
    room = loaded.model.context - request.new_tokens
    for task in given:
        for number, ids in enumerate(task.prompts, start=1):
            if len(ids) > room:
                raise ConfigError(
                    f"prompt {number} of {task.name} has {len(ids)} tokens; with {request.new_tokens} new ones it "
                    f"exceeds the model's context of {loaded.model.context}; lower --new-tokens, or leave it out"
                )
    return given


def _texts(request: Request, task: Task) -> int:
    """How many each method writes."""
    if request.acceptance_only:
        return len(task.prompts)
    return math.ceil(len(task.prompts) / request.batch) * request.repeats + request.warmups


def _content(model: LanguageModel, given: Sequence[Task]) -> list[Any]:
    """What tells weights and prompts of the same names apart."""
    weights = [each for each in model.parameters() if each.requires_grad] + [model.unembedding.weight]
    return [sum(float(each.detach().double().abs().sum()) for each in weights), [task.prompts for task in given]]


def _facts(request: Request, loaded: Loaded, given: Sequence[Task], wanted: Mapping[str, Method]) -> dict[str, Any]:
    from cpdlm.bench.hardware import hardware

    model = loaded.model
    return {
        "model": Path(request.model).name,
        "dtype": str(model.unembedding.weight.dtype).removeprefix("torch."),
        "parameters": sum(each.numel() for each in model.parameters()),
        "horizon": model.horizon,
        "rank": model.rank,
        "new_tokens": request.new_tokens,
        "nodes": request.nodes,
        "batch": request.batch,
        "repeats": 0 if request.acceptance_only else request.repeats,
        "tasks": {task.name: task.provenance | {"prompts": len(task.prompts)} for task in given},
        "methods": {name: method.about for name, method in wanted.items()},
        "hardware": hardware(),
    }
