"""Bounded joint loss against the dense one: peak memory above weights and gradients, and time, one record.

    python experiments/bench_loss.py [--positions 1024 --rank 8 --horizon 4 --vocab 32768 --width 512 --repeats 3]

Every measurement is one forward and backward pass in a fresh process; repeats alternate between the two sides. The dense
side is `Joint` as everything else uses it: all logits, `log_prob`, autograd. Targets: at most 1/8 of its memory, at most
1.1 times its time.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MEMORY_TARGET, TIME_TARGET = 1 / 8, 1.1


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """One pass: {"seconds", "peak_bytes"} above weights, inputs and gradients, which are there before the clock starts."""
    import torch

    from cpdlm.model.heads import FactorHeads

    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    torch.manual_seed(0)
    heads = FactorHeads(options.width, options.vocab, options.rank, options.horizon).to(device)
    table_VD = (torch.randn(options.vocab, options.width, device=device) * 0.02).requires_grad_()
    hidden_PD = torch.randn(options.positions, options.width, device=device).requires_grad_()
    future_PN = torch.randint(options.vocab, (options.positions, options.horizon), device=device)
    for leaf in (table_VD, hidden_PD, *heads.parameters()):
        leaf.grad = torch.ones_like(leaf)

    def one_pass(positions: int) -> float:
        hidden, future = hidden_PD[:positions], future_PN[:positions]
        if side == "dense":
            loss = -heads.joint(hidden, table_VD).log_prob(future).mean()
        else:
            exists = torch.ones_like(future, dtype=torch.bool)
            weight = torch.full((positions,), 1 / positions, device=device)
            loss, _, _ = heads.nll(
                hidden, future, exists, weight, table_VD, options.horizon, options.chunk_mib * 2**20
            )  # fmt: skip
        loss.backward()
        return loss.item()

    one_pass(1)  # loads kernels and starts threads
    before = _reset_peak(device)
    began, began_cpu = time.perf_counter(), time.process_time()
    loss = one_pass(options.positions)
    peak = _peak(device)  # waits for the GPU
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - began_cpu,  # beside the wall clock, to see a busy machine
        "peak_bytes": peak - before,
        "loss": loss,
    }


def _reset_peak(device: Any) -> int:
    """Memory in use now, from which the peak counts (bytes)."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")
        return _status("VmRSS")
    return _peak(device)


def _peak(device: Any) -> int:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def in_fresh_process(side: str, arguments: list[str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--side", side], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"the {side} side ended with {done.returncode} (killed: out of memory?)\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """The record."""
    import torch  # so that the hardware entry knows of threads and accelerator

    from cpdlm.report import results

    runs: dict[str, list[dict[str, float]]] = {"bounded": [], "dense": []}
    for repeat in range(options.repeats):
        for side in ("bounded", "dense") if repeat % 2 == 0 else ("dense", "bounded"):
            runs[side].append(in_fresh_process(side, arguments))
            print(
                f"{side:<8} {runs[side][-1]['seconds']:7.2f} s {runs[side][-1]['cpu_seconds']:7.2f} s CPU {runs[side][-1]['peak_bytes'] / 2**20:9.0f} MiB",
                file=sys.stderr,
            )
    sides: dict[str, dict[str, Any]] = {
        side: {
            "seconds": statistics.median(run["seconds"] for run in measured),
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in measured),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in measured),
            "loss": measured[0]["loss"],
            "repeats": measured,
        }
        for side, measured in runs.items()
    }
    memory_ratio = sides["bounded"]["peak_bytes"] / sides["dense"]["peak_bytes"]
    time_ratio = sides["bounded"]["seconds"] / sides["dense"]["seconds"]
    assert torch.isclose(torch.tensor(sides["bounded"]["loss"]), torch.tensor(sides["dense"]["loss"]), rtol=1e-4)
    dimensions = {key: getattr(options, key) for key in ("positions", "horizon", "rank", "vocab", "width", "chunk_mib")}
    return {
        "benchmark": "joint loss, head=shared, float32",
        "command": shlex.join(["python", "experiments/bench_loss.py", *arguments]),
        **results.provenance(),
        "dimensions": dimensions,
        "sides": sides,
        "memory_ratio": {"measured": memory_ratio, "target": MEMORY_TARGET, "holds": memory_ratio <= MEMORY_TARGET},
        "time_ratio": {"measured": time_ratio, "target": TIME_TARGET, "holds": time_ratio <= TIME_TARGET},
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--horizon", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk-mib", type=int, default=32, help="bound on the logits alive at once (loss.chunk_mib)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU though there is a GPU")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks")
    parser.add_argument("--side", choices=("bounded", "dense"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return 0
    from cpdlm.files import write_json

    record = compare(options, arguments)
    accelerator = "cpu" if record["hardware"]["accelerator"] == "none" or options.cpu else "gpu"
    path = options.output / f"joint-loss-{accelerator}.json"
    write_json(path, record)
    for key in ("memory_ratio", "time_ratio"):
        print(f"{key}: {record[key]['measured']:.3f} (target at most {record[key]['target']})")
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
