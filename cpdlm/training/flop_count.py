"""What a training step costs: the FLOPs that were really done, and the rate of a matrix product on this machine."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

Formula = Callable[..., int]

# torch's own formulas, and what they lack: products that are added in place, and the attention kernel of the CPU.
_FORMULAS: dict[Any, Formula] = dict(flop_registry) | {
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class FlopCount(TorchDispatchMode):
    """Counts, while it is entered, the floating-point operations of matrix products and attention (2 per multiply-add).

    Custom autograd functions and what they recompute are counted as they run, forward and backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            # A product that is summed in another type has that type among its arguments, which the formulas lack.
            operands = (each for each in args if not isinstance(each, torch.dtype))
            self.total += formula(*operands, **(kwargs or {}), out_val=made)
        return made


def matmul_rate(device: torch.device, precision: str, seconds: float = 0.1) -> float:
    """FLOPs per second of a large square matrix product, in the type that `precision` (Lightning's word) multiplies in.

    The best of the runs that fit into `seconds` (two at least, after one that warms up), on torch's current threads.
    """
    dtype = {"16": torch.float16, "bf16": torch.bfloat16, "64": torch.float64}.get(
        precision.split("-")[0], torch.float32
    )
    side = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    left, right = (torch.rand(side, side, generator=generator).to(device, dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    for turn in range(1000):
        start = _now(device)
        torch.mm(left, right)
        took = _now(device) - start
        best = min(best, took) if turn else best
        if turn > 1 and time.perf_counter() - began > seconds:
            break
    return 2 * side**3 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
